"""The training loop on real images: bit-for-bit resuming, pairing of methods, and failures."""

import contextlib
import itertools
import json
import math
import shutil
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import msam
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import Training
from experiments.harness.tasks.build import build_task
from experiments.harness.tasks.cifar import load_cifar
from experiments.harness.tasks.image_models import build
from experiments.harness.tasks.images import normalised
from experiments.harness.tasks.process import set_torch
from experiments.harness.tasks.task import Task
from experiments.harness.work import train as loop
from experiments.harness.work.session import Diverged, Interrupted, Session
from experiments.harness.work.train import build_optimizer, schedule, train
from msam import graph
from tests.commands import WARM, warm
from tests.msam.small import Waits
from tests.msam.stand_in import StandIn
from tests.specs import BASE, four_arms

RESNET = replace(
    BASE,
    weight_decay=5e-4,
    epochs=3,
    batch_size=16,
    train_examples=64,
    test_examples=50,
    augmentation="crop-flip",
    rho=0.1,
    micro_batches=3,
    clip_norm=5.0,
)
VIT = replace(RESNET, model="vit-micro", base_optimizer="adamw", learning_rate=1e-3, warmup_epochs=1.0)

TIMES = {"seconds", "wall_seconds", "step_seconds"}


def numbers(spec: Training, root: Path) -> tuple:
    """All numbers of a run except times, and its final weights as bytes."""
    record = record_of(spec, root)
    weights = torch.load(record.checkpoint, weights_only=True)["model"]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in record.metrics()]
    summary = {k: v for k, v in record.summary().items() if k not in TIMES}
    return lines, summary, {name: t.numpy().tobytes() for name, t in weights.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A results root with the record of RESNET, which nothing interrupted. A test that changes it copies it first."""
    root = tmp_path_factory.mktemp("finished")
    train(RESNET, Session(root, environment={"commit": "abc"}), checkpoint_seconds=1e9)
    return root


def in_a_process(spec: Training, root: Path, kill_after: int | None = None) -> list[int]:
    """Train in another process, and kill it when it has reported so many steps; returns the steps it reported."""
    steps, (receiver, sender) = [], WARM.Pipe(duplex=False)
    process = warm(send_steps, spec, root, sender, torch.get_num_threads())
    process.start()
    sender.close()
    with contextlib.suppress(EOFError):
        while kill_after is None or len(steps) < kill_after:
            steps.append(receiver.recv())
        process.kill()
    process.join()
    assert process.exitcode == (0 if kill_after is None else -signal.SIGKILL)
    return steps


def send_steps(spec: Training, root: Path, to: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    train(spec, Session(root, report=lambda step, steps: to.send(step)), checkpoint_seconds=0)


AVERAGED = replace(RESNET, ema=0.9, augmentation="crop-flip-randaugment", cutout=8, schedule="step", fused=True)


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(RESNET, id="resnet"),
        pytest.param(VIT, id="vit", marks=pytest.mark.rare),
        pytest.param(AVERAGED, id="averaged", marks=pytest.mark.rare),
    ],
)
def test_a_killed_and_resumed_run_matches_an_uninterrupted_one_bit_for_bit(spec, tmp_path):
    train(spec, Session(tmp_path / "uninterrupted"))
    first_steps = []
    for kill_after in (3, 4):  # the second kill comes one step later, after the end of an epoch
        first_steps.append(in_a_process(spec, tmp_path / "killed", kill_after)[0])
    steps = in_a_process(spec, tmp_path / "killed")
    assert first_steps[0] == 1
    assert first_steps[1] >= 3, "the second process did not resume"
    assert steps[0] >= first_steps[1] + 3, "the third process did not resume"
    assert steps[-1] == 12
    assert numbers(spec, tmp_path / "killed") == numbers(spec, tmp_path / "uninterrupted")


def test_a_run_killed_between_its_final_weights_and_its_summary_is_completed(finished, tmp_path):
    root = shutil.copytree(finished, tmp_path / "results")
    (record_of(RESNET, root).folder / "summary.json").unlink()
    train(RESNET, Session(root))
    assert numbers(RESNET, root) == numbers(RESNET, finished)


def test_stopping_writes_a_checkpoint_and_the_run_resumes_from_it(finished, tmp_path):
    stop = iter([False] * 6 + [True])
    with pytest.raises(Interrupted):
        train(RESNET, Session(tmp_path / "stopped", stop=lambda: next(stop)))
    assert record_of(RESNET, tmp_path / "stopped").checkpoint.exists()
    assert len(record_of(RESNET, tmp_path / "stopped").metrics()) == 1
    reports = []
    train(RESNET, Session(tmp_path / "stopped", report=lambda step, steps: reports.append((step, steps))))
    assert reports == [(step, 12) for step in range(7, 13)]
    assert numbers(RESNET, tmp_path / "stopped") == numbers(RESNET, finished)


def test_an_averaged_run_stopped_before_its_first_step_averages_only_its_steps(tmp_path):
    train(AVERAGED, Session(tmp_path / "uninterrupted"))
    with pytest.raises(Interrupted):
        train(AVERAGED, Session(tmp_path / "stopped", stop=lambda: True))
    train(AVERAGED, Session(tmp_path / "stopped"))
    assert numbers(AVERAGED, tmp_path / "stopped") == numbers(AVERAGED, tmp_path / "uninterrupted")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK" + b[2:9]])
def test_a_damaged_checkpoint_is_rejected_by_name(damage, tmp_path):
    stop = iter([False] * 2 + [True])
    with pytest.raises(Interrupted):
        train(RESNET, Session(tmp_path, stop=lambda: next(stop)))
    path = record_of(RESNET, tmp_path).checkpoint
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RecordError, match=r"checkpoint\.pt cannot be read.*delete it"):
        train(RESNET, Session(tmp_path))


def test_a_finished_run_is_left_unchanged(finished):
    written = {p.name: p.stat().st_mtime_ns for p in record_of(RESNET, finished).folder.iterdir() if p.name != "lock"}
    train(RESNET, Session(finished, report=lambda *_: pytest.fail("trained again")))
    again = {p.name: p.stat().st_mtime_ns for p in record_of(RESNET, finished).folder.iterdir() if p.name != "lock"}
    assert again == written


def test_the_times_of_checkpoints_change_no_number(finished, tmp_path):
    """The finished run has written none before its end."""
    train(RESNET, Session(tmp_path), checkpoint_seconds=0)
    assert numbers(RESNET, tmp_path) == numbers(RESNET, finished)


def test_a_loss_that_becomes_nan_is_recorded_with_its_step(tmp_path):
    spec = replace(RESNET, learning_rate=1e20, clip_norm=None)
    with pytest.raises(Diverged, match=r"diverged at step 2\b.*Lower"):
        train(spec, Session(tmp_path))
    record = record_of(spec, tmp_path)
    assert not record.done
    assert "diverged at step 2:" in record.failure()


def test_methods_are_paired_by_seed():
    """At one seed, methods have equal initial weights and batches in all epochs; another seed has different ones."""

    def beginning(spec: Training) -> list[torch.Tensor]:
        torch.manual_seed(spec.seed)
        task = build_task(spec)
        first = [t.clone() for t in task.model.state_dict().values()]
        batches = []
        for epoch in range(2):
            for batch in task.batches(epoch, 0):
                torch.rand(spec.micro_batches)  # like dropout, which draws more often for a larger m
                batches += [batch[0].clone(), batch[1].clone()]
        return first + batches

    base = replace(RESNET, rho=0.0, micro_batches=1)
    runs = [beginning(spec) for spec in four_arms(base, sam_rho=0.1, msam_rho=0.2)]
    other = beginning(replace(base, seed=1))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    assert not torch.equal(other[-1], runs[0][-1])
    assert not torch.equal(other[0], runs[0][0])


def test_an_epoch_can_be_resumed_at_any_batch():
    task = build_task(RESNET)
    whole = list(task.batches(1, 0))
    rest = list(task.batches(1, 2))
    assert len(whole) == task.steps_per_epoch == 4
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"micro_batches": 1},
        {"rho": 0.0},
        {"adaptive": True},
        {"shared": True},
        {"clip_norm": 0.5},
        {"nesterov": True},
        {"label_smoothing": 0.2},
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.rare),
    ],
    ids=str,
)
def test_the_loop_is_the_method_with_a_stock_optimizer(change, tmp_path):
    """The loop's weights match those of a hand-written loop bit for bit; a change needs one epoch to show."""
    spec = replace(RESNET, **{"micro_batches": 4, "clip_norm": None, "epochs": 1 if change else 3, **change})
    train(spec, Session(tmp_path))
    torch.manual_seed(spec.seed)
    task = build_task(spec)
    model = task.model

    def loss_fn(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled="precision" in change):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1], label_smoothing=change.get("label_smoothing", 0.0))

    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=change.get("nesterov", False)
    )
    model.train()
    for epoch in range(spec.epochs):
        for index, (x, y) in enumerate(task.batches(epoch, 0)):
            progress = (4 * epoch + index) / (4 * spec.epochs)
            optimizer.param_groups[0]["lr"] = 0.1 * (0.5 * (1 + math.cos(math.pi * progress)))
            optimizer.zero_grad()
            options = {"adaptive": change.get("adaptive", False), "shared": change.get("shared", False)}
            options |= {"rho": change.get("rho", 0.1), "micro_batches": change.get("micro_batches", 4)}
            msam.backward(loss_fn, (x, y), model, **options)
            if "clip_norm" in change:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    weights = torch.load(record_of(spec, tmp_path).checkpoint, weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error as Guo et al. 2017 define it: the sum over bins (a, b] of |B|/n |acc - conf|."""
    total, edges = 0.0, np.linspace(0, 1, 16)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    for low, high in itertools.pairwise(edges):
        chosen = (confidence > low) & (confidence <= high)
        if chosen.any():
            total += chosen.mean() * abs((predicted == labels)[chosen].mean() - confidence[chosen].mean())
    return total


def test_the_scores_and_predictions_are_those_of_the_saved_weights(tmp_path):
    """Recomputed from the checkpoint, with the data set's original pixels and labels."""
    spec = replace(RESNET, learning_rate=0.02, epochs=6)
    train(spec, Session(tmp_path))
    record = record_of(spec, tmp_path)
    model = build("resnet8", 10)
    model.load_state_dict(torch.load(record.checkpoint, weights_only=True)["model"])
    model.eval()
    cifar = load_cifar("cifar10", None)
    chosen = np.random.default_rng(0).permutation(50_000)[:64]
    mean, deviation = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    for part, images, labels in (
        ("test", cifar.test_images[:50], cifar.test_labels[:50]),
        ("train", cifar.train_images[chosen], cifar.train_labels[chosen]),
    ):
        x = torch.tensor((images / 255 - mean) / deviation, dtype=torch.float32).movedim(-1, 1)
        with torch.no_grad():
            logits = model(x).double()
        predicted, likelihoods = logits.argmax(1).numpy(), logits.log_softmax(1).numpy()
        summary = record.summary()
        assert summary[f"{part}_accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-12)
        assert summary[f"{part}_loss"] == pytest.approx(-likelihoods[np.arange(len(labels)), labels].mean(), rel=1e-5)
        if part == "test":
            assert summary["test_ece"] == pytest.approx(calibration_error(np.exp(likelihoods), labels), rel=1e-4)
            with np.load(record.predictions, allow_pickle=False) as kept:
                assert set(kept) == {"test", "test_labels"}
                assert kept["test"].dtype == kept["test_labels"].dtype == np.uint8
                assert (kept["test"] == predicted).all()
                assert (kept["test_labels"] == labels).all()
    assert record.summary()["train_accuracy"] > 0.15, "chance level, so the test would show nothing"


def test_the_schedule_warms_up_and_ends_at_zero():
    factor = schedule(replace(VIT, epochs=10, warmup_epochs=2.0), steps_per_epoch=5)
    values = [factor(step) for step in range(51)]
    assert values[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert values[10] == 1.0
    assert values[30] == pytest.approx(0.5)
    assert values[50] == pytest.approx(0.0)


def test_the_step_schedule_is_a_fifth_after_30_60_and_80_percent():
    factor = schedule(replace(RESNET, schedule="step", epochs=10, warmup_epochs=1.0), steps_per_epoch=4)
    values = [factor(step) for step in range(40)]
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    expected = [1.0] * 8 + [0.2] * 12 + [0.04] * 8 + [0.008] * 8
    assert values[4:] == pytest.approx(expected)


def test_an_averaged_run_ends_with_the_average_of_its_steps(tmp_path):
    """Against a hand-written average, up to the float32 rounding of torch's."""
    spec = replace(RESNET, ema=0.5, epochs=1, clip_norm=None)
    train(spec, Session(tmp_path))
    torch.manual_seed(spec.seed)
    task = build_task(spec)
    optimizer = build_optimizer(spec, task.model)
    factor, average = schedule(spec, task.steps_per_epoch), None
    for index, batch in enumerate(task.batches(0, 0)):
        optimizer.param_groups[0]["lr"] = spec.learning_rate * factor(index)
        optimizer.zero_grad()
        loss_fn = lambda batch: task.loss_fn(task.model, batch)  # noqa: E731
        msam.backward(loss_fn, batch, task.model, rho=spec.rho, micro_batches=spec.micro_batches)
        optimizer.step()
        now = {name: value.double() for name, value in task.model.state_dict().items()}
        average = now if average is None else {name: (average[name] + now[name]) / 2 for name in now}
    saved = torch.load(record_of(spec, tmp_path).checkpoint, weights_only=True)["model"]
    assert any(not torch.equal(saved[name].double(), now[name]) for name in saved)
    for name, value in saved.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), average[name], rtol=1e-4, atol=1e-6)
    task.model.load_state_dict(saved)
    assert record_of(spec, tmp_path).summary()["test_accuracy"] == task.evaluate().scores["test_accuracy"]


@pytest.mark.parametrize("spec", [replace(RESNET, cutout=8, ema=0.9), replace(VIT, fused=True)], ids=["resnet", "vit"])
def test_no_step_waits_for_the_device(spec, tmp_path, monkeypatch):
    """Counted on the CPU. The only exceptions are the collections of losses, every 50 steps and after each epoch.

    AdamW is fused as on GPUs; its other implementations count steps in host tensors and read them.
    """
    collected, counts = [], []
    collect = loop._Recorder.collect_losses
    monkeypatch.setattr(loop._Recorder, "collect_losses", lambda recorder: (collected.append(1), collect(recorder)))
    with Waits() as waits:
        train(
            replace(spec, epochs=2, warmup_epochs=0.0),
            Session(tmp_path, report=lambda *_: counts.append(len(waits.found))),
        )
        assert waits.found[counts[-1] :], "scoring reads values, so the count works"
    assert counts == [counts[0]] * 8, "there are more waits than while the model was built"
    assert len(collected) == 2, "once per epoch"


@pytest.mark.needs("gpu")
def test_no_step_waits_for_the_gpu(tmp_path):
    spec = replace(AVERAGED, device="cuda", augmentation="crop-flip", epochs=1)

    def build(spec: Training, data_root: Path | None) -> Task:
        task = build_task(spec, data_root)
        list(task.batches(0, 0))  # copies the constants that are copied once
        torch.cuda.set_sync_debug_mode("error")
        return task

    try:
        with pytest.raises(RuntimeError, match="synchronizing"):  # the first collection, at the end of the epoch
            train(spec, Session(tmp_path), build=build)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert "collect_losses" in json.loads((record_of(spec, tmp_path).folder / "failure.json").read_text())["traceback"]


def test_torchs_settings_are_the_specs():
    gpu = replace(RESNET, device="cuda")
    try:
        for spec in (gpu, replace(gpu, tf32=True), replace(gpu, deterministic=True), RESNET):
            set_torch(spec)
            assert torch.get_float32_matmul_precision() == ("high" if spec.tf32 else "highest")
            assert torch.backends.cudnn.allow_tf32 == spec.tf32
            assert torch.are_deterministic_algorithms_enabled() == spec.deterministic
            assert torch.get_num_threads() == spec.threads
    finally:
        set_torch(RESNET)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_layout_of_images_and_weights(channels_last):
    task = build_task(replace(RESNET, channels_last=channels_last))
    x, _ = next(task.batches(0, 0))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = next(p for p in task.model.parameters() if p.ndim == 4 and min(p.shape) > 1 and p.shape[1] > 3)
    assert x.is_contiguous(memory_format=layout)
    assert weight.is_contiguous(memory_format=layout)


@pytest.mark.slow
def test_a_compiled_run_takes_the_same_steps_and_resumes_bit_for_bit(tmp_path):
    spec = replace(VIT, model="linear", compile=True, epochs=2, warmup_epochs=0.5)
    train(spec, Session(tmp_path / "uninterrupted"))
    stop = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        train(spec, Session(tmp_path / "stopped", stop=lambda: next(stop)))
    train(spec, Session(tmp_path / "stopped"))
    assert numbers(spec, tmp_path / "stopped") == numbers(spec, tmp_path / "uninterrupted")
    eager = replace(spec, compile=False)
    train(eager, Session(tmp_path))
    for line, other in zip(numbers(spec, tmp_path / "stopped")[0], numbers(eager, tmp_path)[0], strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_optimizers_are_torchs_own():
    model = torch.nn.Linear(2, 2)
    sgd = build_optimizer(RESNET, model)
    assert type(sgd) is torch.optim.SGD
    assert sgd.defaults["momentum"] == 0.9
    assert sgd.defaults["weight_decay"] == 5e-4
    adamw = build_optimizer(VIT, model)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["weight_decay"] == 5e-4
    assert build_optimizer(replace(RESNET, fused=True), model).defaults["fused"]
    assert build_optimizer(replace(VIT, fused=True), model).defaults["fused"]


def test_the_record_of_a_finished_run(finished):
    record = record_of(RESNET, finished)
    summary = record.summary()
    assert 0 <= summary["test_accuracy"] <= 1
    assert 0 <= summary["train_accuracy"] <= 1
    assert summary["steps"] == 12
    assert summary["parameters"] == 78_042
    assert [line["epoch"] for line in record.metrics()] == [1, 2, 3]
    session = record.environments()[0]
    assert session["commit"] == "abc"
    assert session["threads"] == 1
    assert len(session["data_checksum"]) == 64


def test_a_held_out_run_is_scored_only_on_the_held_out_images(tmp_path):
    """The score is recomputed from the final weights and the last images of the permutation."""
    spec = replace(RESNET, holdout_examples=40)
    train(spec, Session(tmp_path))
    record = record_of(spec, tmp_path)
    summary = record.summary()
    assert not any(name.startswith("test") for name in summary)
    cifar = load_cifar("cifar10", None)
    last = np.random.default_rng(0).permutation(50_000)[-40:]
    model = build("resnet8", 10).eval()
    model.load_state_dict(torch.load(record.checkpoint, weights_only=True)["model"])
    with torch.no_grad():
        predicted = model(normalised(torch.from_numpy(cifar.train_images[last]))).argmax(1).numpy()
    assert summary["holdout_accuracy"] == (predicted == cifar.train_labels[last]).mean()


def test_a_run_that_ends_in_nan_has_failed(tmp_path):
    """No loss is computed at the final weights, but scores are."""
    spec = replace(RESNET, model="linear", epochs=1, batch_size=64, learning_rate=3e38, rho=0.0, clip_norm=None)
    with pytest.raises(Diverged, match="diverged after step 1"):
        train(spec, Session(tmp_path))
    assert not record_of(spec, tmp_path).done
    assert "diverged after step 1" in record_of(spec, tmp_path).failure()


@pytest.fixture
def stand_in(monkeypatch):
    """`msam.capture` with a graph that a CPU can replay; returns the captured steps."""
    made = []

    def capture(loss_fn, batch, model, optimizer, **options):
        step = graph.capture(loss_fn, batch, model, optimizer, eager=True, **options)
        graph.check(model, optimizer, None)
        step.record(StandIn(model, optimizer), batch)
        made.append(step)
        return step

    monkeypatch.setattr(msam, "capture", capture)
    monkeypatch.setattr(Training, "check", lambda self: None)  # which rejects it for a CPU
    return made


@pytest.mark.parametrize("passes", ["loop", "vectorized"])
@pytest.mark.parametrize("spec", [RESNET, pytest.param(VIT, marks=pytest.mark.rare)], ids=["resnet", "vit"])
def test_a_run_of_captured_steps_is_that_of_eager_ones_and_resumes_bit_for_bit(spec, passes, stand_in, tmp_path):
    spec = replace(spec, passes=passes, micro_batches=4)
    whole, eager = replace(spec, fused=True, capture=True), replace(spec, fused=True)
    train(whole, Session(tmp_path / "captured"))
    train(eager, Session(tmp_path / "eager"))
    assert [(step.replays, step.eager) for step in stand_in] == [(12, 0)]
    ours, theirs = (record_of(one, tmp_path / where) for one, where in ((whole, "captured"), (eager, "eager")))
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        for name in ("train_loss", "sharpness", "learning_rate"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)
    stop = iter([False] * 6 + [True])
    with pytest.raises(Interrupted):
        train(whole, Session(tmp_path / "stopped", stop=lambda: next(stop)))
    train(whole, Session(tmp_path / "stopped"))
    assert [step.replays for step in stand_in] == [12, 6, 6]
    lines, summary, weights = numbers(whole, tmp_path / "stopped")
    assert (lines, summary, weights) == numbers(whole, tmp_path / "captured")
