"""Data-parallel runs between real gloo processes."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from experiments import linear_cifar, vit_cifar
from experiments.harness.runs.provenance import ROOT
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import SpecError
from experiments.harness.work.ranks import Ranks
from experiments.harness.work.session import Session
from experiments.harness.work.train import train

WORKER = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from experiments.harness.runs.spec import from_dict
from experiments.harness.work.train import Interrupted, train
from experiments.harness.work.session import Interrupted, Session

rank, root, stop_after = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
spec = from_dict(json.loads(sys.argv[4]))
dist.init_process_group("gloo", init_method=f"file://{root}/meeting-{stop_after}", rank=rank, world_size=spec.processes)
done, first = 0, None

def report(step, steps):
    global done, first
    done, first = step, first or step
    torch.rand(1)  # noise, as dropout would draw it

try:  # only rank 1 is asked to stop, and the ranks have to agree
    train(spec, Session(root, report=report, stop=lambda: rank == 1 and done == stop_after))
except Interrupted as stopped:
    print(stopped)
else:
    print(first, torch.rand(3).tolist())
dist.destroy_process_group()
"""

LINEAR = replace(linear_cifar.SMOKE, micro_batches=4, rho=0.05)
VIT = replace(vit_cifar.SMOKE, batch_size=12, micro_batches=6, rho=0.1, ranks=3, epochs=2)
"""Three ranks: their sums depend on the order."""


def all_ranks(spec, root, stop_after=-1):
    root.mkdir(exist_ok=True)
    arguments = (str(root), str(stop_after), json.dumps(spec.to_dict()))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(spec.processes)
    ]
    ended = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * spec.processes, ended
    return [out for out, _ in ended]


def weights(spec, root):
    return torch.load(record_of(spec, root).checkpoint, weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        LINEAR,
        pytest.param(replace(LINEAR, shared=True), marks=pytest.mark.rare),
        pytest.param(replace(LINEAR, micro_batches=2, shared=True), marks=pytest.mark.rare),
    ],
)
def test_two_ranks_train_the_same_network_as_one(spec, tmp_path):
    """A shared perturbation is shared by all ranks."""
    train(spec, Session(tmp_path / "one"))
    both = replace(spec, ranks=2)
    all_ranks(both, tmp_path / "two")
    one, two = record_of(spec, tmp_path / "one"), record_of(both, tmp_path / "two")
    for name in ("test_accuracy", "test_loss", "train_loss", "epoch_loss", "sharpness"):
        assert two.summary()[name] == pytest.approx(one.summary()[name], abs=1e-5), name
    for name, tensor in weights(spec, tmp_path / "one").items():
        torch.testing.assert_close(weights(both, tmp_path / "two")[name], tensor, rtol=0, atol=1e-5)
    (session,) = two.environments()
    assert (session["ranks"], session["micro_batches_per_rank"]) == (2, spec.micro_batches // 2)


@pytest.mark.rare
def test_ranks_stop_together_and_resume_bit_for_bit(tmp_path):
    """The weights, and each rank's generator."""
    outputs = all_ranks(VIT, tmp_path / "whole")
    noise = [output.partition(" ")[2] for output in outputs]
    assert len(set(noise)) == 3
    assert [output[0] for output in outputs] == ["1"] * 3
    outputs = all_ranks(VIT, tmp_path / "stopped", stop_after=3)
    assert outputs == [f"Stopped before step 4 of {2 * 5}.\n"] * 3
    assert not record_of(VIT, tmp_path / "stopped").done
    assert all_ranks(VIT, tmp_path / "stopped") == [f"4 {drawn}" for drawn in noise]
    whole = weights(VIT, tmp_path / "whole")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(VIT, tmp_path / "stopped").items())
    scores = [record_of(VIT, tmp_path / name).summary() for name in ("whole", "stopped")]
    assert scores[0]["epoch_loss"] == scores[1]["epoch_loss"]


def test_a_run_with_several_ranks_is_not_trained_by_one_process(tmp_path):
    with pytest.raises(SpecError, match="ranks is 3, but 1 process started"):
        train(VIT, Session(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_shares_of_all_ranks_are_the_micro_batches_of_one(monkeypatch):
    import torch.distributed as dist

    import msam

    batch = (torch.arange(12), torch.arange(12))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "new_group", lambda backend: None)
    shares = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        nothing, parts = Ranks(VIT).share(batch)
        assert nothing is None
        shares += parts
    assert [x.tolist() for x, _ in shares] == [x.tolist() for x, _ in msam.split(batch, 6)]
