"""Timing runs: the steps of all methods, interleaved, in one process and data-parallel in real processes."""

import os
import subprocess
import sys
from dataclasses import replace
from statistics import median

import pytest
import torch

from experiments.harness.machine import pool
from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import load_estimate
from experiments.harness.runs.grids import timed_steps
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import SpecError, from_dict
from experiments.harness.work import timing
from experiments.harness.work.execute import execute
from experiments.harness.work.session import Interrupted, Session
from experiments.harness.work.timing import peak_bytes

RESNET = catalogue.cells("cost", "smoke")[0]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of one timing run."""
    root = tmp_path_factory.mktemp("results")
    execute(RESNET, Session(root))
    return record_of(RESNET, root)


def test_which_steps_are_timed():
    alone = [(step.method, step.micro_batches) for step in timed_steps(RESNET)]
    assert alone == [("base", 1), ("control", 2), ("control", 4), ("sam", 1), ("msam", 2), ("msam", 4)]
    shared = [(step.method, step.micro_batches) for step in timed_steps(replace(RESNET, workers=4), 4)]
    assert shared == [("base", 1), ("control", 4), ("sam", 1), ("msam", 4)]


def test_every_step_is_timed_in_one_process_and_data_parallel(record):
    steps = [(line["measure"], line["m"], line["workers"]) for line in record.metrics()]
    assert steps == [(s.method, s.micro_batches, w) for w in (1, 2) for s in timed_steps(RESNET, w)]
    summary = record.summary()
    for method, m, workers in steps:
        name = f"{method}_m{m}_w{workers}"
        assert summary[f"{name}_seconds"] > 0
        assert summary[f"{name}_ratio_low"] <= summary[f"{name}_ratio"] <= summary[f"{name}_ratio_high"]
        assert summary[f"{name}_over_sam_low"] <= summary[f"{name}_over_sam"] <= summary[f"{name}_over_sam_high"]
        assert summary[f"{name}_examples_per_second"] == pytest.approx(32 / summary[f"{name}_seconds"])
    assert summary["base_m1_w1_ratio"] == summary["base_m1_w2_ratio"] == 1
    assert summary["sam_m1_w1_over_sam"] == summary["sam_m1_w2_over_sam"] == 1
    assert RESNET.score in summary


def test_data_parallel_steps_reduce_each_gradient_once_except_for_sam(record):
    summary = record.summary()
    for step in timed_steps(RESNET, 2):
        times = 2 if step.method == "sam" else 1
        assert summary[f"{step.method}_m{step.micro_batches}_w2_reduced_bytes"] == times * 4 * summary["parameters"]
    assert summary["msam_m4_w1_reduced_bytes"] == 0


def test_activations_of_one_micro_batch_are_alive_at_once(record):
    summary = record.summary()
    assert summary["msam_m4_w1_memory_bytes"] < 0.6 * summary["sam_m1_w1_memory_bytes"]


@pytest.mark.rare
def test_a_stopped_timing_run_starts_over(tmp_path):
    calls = iter(range(100))
    with pytest.raises(Interrupted, match="2 of 4 rounds"):
        execute(RESNET, Session(tmp_path, stop=lambda: next(calls) == 1))
    assert not record_of(RESNET, tmp_path).done
    done = []
    execute(RESNET, Session(tmp_path, report=lambda step, steps: done.append(step)))
    assert done == [1, 2, 3, 4]
    assert len(record_of(RESNET, tmp_path).metrics()) == 6 + 6


@pytest.mark.rare
def test_a_data_parallel_process_that_fails_ends_the_run_with_its_message(tmp_path):
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_1"
    damaged.parent.mkdir()
    damaged.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"(?s)Data-parallel process \d of 2 failed.*DataError"):
        timing.data_parallel(RESNET, Session(tmp_path, data_root=tmp_path))


def test_peak_bytes_counts_what_is_alive_at_once():
    def step():
        for _ in range(3):
            x = torch.empty(2**20, dtype=torch.uint8)
            del x
        kept = [torch.empty(2**20, dtype=torch.uint8) for _ in range(2)]
        del kept

    assert 2 * 2**20 <= peak_bytes(step) < 2.5 * 2**20


@pytest.mark.rare
def test_the_profiler_prints_nothing_in_workers():
    words = (
        "import torch; from experiments.harness.work.timing import peak_bytes; "
        "print(peak_bytes(lambda: torch.ones(1000)))"
    )
    settings = {**os.environ, **pool.library_settings([])}
    done = subprocess.run([sys.executable, "-c", words], env=settings, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("4000\n", "")


def test_each_round_has_a_new_order_and_the_first_round_is_discarded(monkeypatch):
    spec = replace(RESNET, rounds=6, workers=1)
    task = timing._task(spec, None)
    taken = []
    monkeypatch.setattr(timing, "_seconds", lambda spec, workers, step: taken.append(step.args[0]) or 1.0 + len(taken))
    lines = timing.timed(spec, task, task.model, 1, 0)
    steps = timed_steps(spec)
    rounds = [taken[i : i + len(steps)] for i in range(0, len(taken), len(steps))]
    assert len(rounds) == 7
    assert all(set(order) == set(steps) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 3
    of_base = [1.0 + n for n, step in enumerate(taken, start=1) if step == steps[0]]
    assert lines[0]["seconds"] == median(of_base[1:])


@pytest.mark.rare
def test_a_timing_run_has_the_machine_to_itself(tmp_path):
    others = catalogue.runs("linear_cifar", "smoke")
    specs = [others[0], RESNET, *others[1:]]
    pool.run(specs, Session(tmp_path), pool.Limits(2), estimate=load_estimate(tmp_path))
    folders = [record_of(spec, tmp_path).folder for spec in specs]
    spans = [((f / "env.json").stat().st_mtime_ns, (f / "summary.json").stat().st_mtime_ns) for f in folders]
    timed = spans[1]
    assert len(specs) > 2
    assert all(end <= timed[0] or begin >= timed[1] for begin, end in (spans[0], *spans[2:]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rho": 0.0}, "rho is 0.0, but must be greater than 0 for a timing"),
        ({"micro_batches": 1}, "a power of 2 that divides the batch size"),
        ({"micro_batches": 6}, "a power of 2"),
        ({"batch_size": 30}, "divides the batch size, 30"),
        ({"workers": 3}, "workers is 3, but must be a divisor of micro_batches, 4"),
        ({"device": "cuda"}, "1 on GPUs"),
        ({"kind": "train"}, "workers is 2, but must be 1, or left out, in a Training run"),
    ],
)
def test_specs_that_cannot_be_timed_are_rejected(changes, words):
    with pytest.raises(SpecError, match=words):
        from_dict(RESNET.to_dict() | changes)
