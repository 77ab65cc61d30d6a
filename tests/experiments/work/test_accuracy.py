"""The score during training: it is that of the network, costs little, and changes no bit of the weights."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.harness.machine.verify import verify
from experiments.harness.runs.record import record_of
from experiments.harness.tasks.build import build_task
from experiments.harness.work import accuracy
from experiments.harness.work import train as loop
from experiments.harness.work.session import Session
from experiments.harness.work.train import train
from tests.specs import BASE, four_arms

SPEC = replace(BASE, epochs=4, batch_size=16, train_examples=64, test_examples=14, rho=0.1, micro_batches=2)


class Restless(nn.Module):
    """BatchNorm, dropout, and a forward pass that draws and counts in eval mode too; one module stays in eval mode."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3)
        self.last = nn.Linear(3, num_classes)
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode: bool = True) -> "Restless":
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.drop(self.frozen(self.norm(x)).mean((2, 3)))
        return self.last(x + 0.01 * torch.randn(1)) * (1 + self.calls / 1000)


RESTLESS = replace(SPEC, model=f"{__name__}:Restless")


@pytest.mark.parametrize("spec", [SPEC, RESTLESS, replace(RESTLESS, ema=0.9)], ids=["resnet", "restless", "averaged"])
def test_scoring_during_training_changes_no_bit_of_the_run(spec, tmp_path, monkeypatch):
    train(spec, Session(tmp_path / "with"))
    monkeypatch.setattr(loop, "score_if_due", lambda *_: {})
    train(spec, Session(tmp_path / "without"))
    records = [record_of(spec, tmp_path / name) for name in ("with", "without")]
    first, second = (torch.load(record.checkpoint, weights_only=True)["model"] for record in records)
    assert {name: t.numpy().tobytes() for name, t in first.items()} == {
        name: t.numpy().tobytes() for name, t in second.items()
    }
    lines, plain = (record.metrics() for record in records)
    assert ["test_accuracy" in line for line in lines] == [False, True, False, True]
    for line, other in zip(lines, plain, strict=True):
        shared = {"epoch", "step", "train_loss", "sharpness", "learning_rate"}
        assert {name: line[name] for name in shared} == {name: other[name] for name in shared}


def test_the_score_after_the_last_epoch_is_that_of_the_summary(tmp_path):
    for spec in (SPEC, replace(SPEC, ema=0.9)):  # all 14 test images are scored
        train(spec, Session(tmp_path))
        record = record_of(spec, tmp_path)
        assert record.metrics()[-1]["test_accuracy"] == record.summary()["test_accuracy"]


def test_a_record_from_before_there_were_such_scores_is_verified_without_them(tmp_path):
    train(SPEC, Session(tmp_path))
    record = record_of(SPEC, tmp_path)
    lines = [{name: value for name, value in line.items() if name != "test_accuracy"} for line in record.metrics()]
    (record.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert verify(record, Session(tmp_path)) == []


def test_the_score_is_on_the_first_thousand_examples():
    spec = replace(SPEC, test_examples=1100, model="linear")
    task = build_task(spec)
    x, y = task.sample("test", 1000)
    expected = (task.model(x).argmax(1) == y).double().mean().item()
    assert task.score(task.model.eval(), 1000) == {"test_accuracy": expected}
    held_out = replace(spec, holdout_examples=20, test_examples=None)
    assert set(build_task(held_out).score(task.model, 1000)) == {"holdout_accuracy"}


@pytest.mark.parametrize("examples", [64, 1024, 4096, 50_000])
@pytest.mark.parametrize("epochs", [1, 4, 36, 200])
def test_scoring_takes_at_most_its_share_and_is_alike_for_all_arms(examples, epochs):
    base = replace(BASE, train_examples=examples, epochs=epochs)
    arms = four_arms(base, sam_rho=0.1, msam_rho=0.1)
    assert len({accuracy.interval(spec) for spec in arms}) == 1
    task = SimpleNamespace(score=lambda model, count: {"count": count})
    scores = [accuracy.score_if_due(base, task, nn.Linear(1, 1), epoch) for epoch in range(1, epochs + 1)]
    counts = [score["count"] for score in scores if score]
    assert sum(counts) <= 0.05 * 3 * (examples // 32) * 32 * epochs
    assert counts == [1000] * len(counts)
    assert counts or epochs * examples < 10_000
