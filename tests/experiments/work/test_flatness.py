"""Curvature runs measure the final weights, resume, are cached, and do not affect training."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import linear_cifar, resnet_cifar, vit_cifar
from experiments.harness.runs import catalogue
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import curvature_of, with_networks, with_ranks
from experiments.harness.runs.record import record_of, state_of
from experiments.harness.runs.spec import SpecError, from_dict
from experiments.harness.tasks.build import build_task
from experiments.harness.work import hessian
from experiments.harness.work.execute import execute
from experiments.harness.work.flatness import halvings
from experiments.harness.work.session import Interrupted, Session
from experiments.harness.work.train import train

LINEAR = replace(linear_cifar.RUNS["smoke"][0], seed=1)
VIT = vit_cifar.RUNS["smoke"][-1]
RESNET = resnet_cifar.RUNS["smoke"][-1]


def measured(cell, examples=16):
    (curvature,) = curvature_of([cell], examples=examples, rho=0.05)
    return curvature


def numbers(root, spec):
    summary = record_of(spec, root).summary()
    return {name: value for name, value in summary.items() if name != "wall_seconds"}


def test_a_curvature_run_trains_its_network_first_and_measures_the_final_weights(tmp_path):
    spec = measured(VIT)
    execute(spec, Session(tmp_path, environment={"commit": "abc", "code": "def", "dirty": False}))
    network = record_of(VIT, tmp_path)
    assert network.done
    summary = numbers(tmp_path, spec)
    task = build_task(VIT)
    task.model.load_state_dict(torch.load(network.checkpoint, weights_only=True)["model"])
    params = list(task.model.eval().parameters())
    for part in ("train", "test"):
        loss = task.loss_fn(task.model, task.sample(part, 16))
        assert summary[f"{part}_loss"] == pytest.approx(loss.item(), rel=1e-6)
        g = torch.autograd.grad(loss, params)
        norm = torch.cat([t.flatten() for t in g]).norm().item()
        assert summary[f"{part}_penalty_m1"] == pytest.approx(norm, rel=1e-4)
        penalties = [summary[f"{part}_penalty_m{m}"] for m in halvings(16)]
        assert penalties == sorted(penalties)
        assert summary[f"{part}_lambda_1"] >= summary[f"{part}_lambda_5"]
        assert summary[f"{part}_residual"] < summary[f"{part}_tolerance"]
        assert summary[f"{part}_ascent_sharpness"] >= summary[f"{part}_sharpness_m1"] > 0
    lines = {(line["part"], line["measure"]): line for line in record_of(spec, tmp_path).metrics()}
    assert sum(lines["train", "density"]["density_weights"]) == pytest.approx(1, abs=1e-5)
    middle = lines["train", "slices"]["slice_losses"][10]
    assert middle == pytest.approx(summary["train_loss"], rel=1e-6)
    assert len(lines["train", "slices"]["plane_losses"]) == 121
    (session,) = record_of(spec, tmp_path).environments()
    assert (session["network"], session["network_commit"]) == (VIT.run_id, "abc")
    assert (session["network_code"], session["network_dirty"]) == ("def", False)


def test_a_second_call_computes_nothing(tmp_path):
    spec = measured(LINEAR)
    execute(spec, Session(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
    execute(spec, Session(tmp_path, report=lambda *_: pytest.fail("measured again")))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")} == before
    assert state_of(spec, tmp_path) == ("done", "")


def test_a_resumed_run_matches_an_uninterrupted_one_and_measures_nothing_twice(tmp_path):
    network = replace(LINEAR, seed=0)  # seed 0 has the figures' measurements
    spec = measured(network)
    execute(spec, Session(tmp_path / "uninterrupted"))
    reports = iter(range(10**6))
    calls = itertools.count()
    train(network, Session(tmp_path / "stopped"))
    with pytest.raises(Interrupted, match="measurements"):
        execute(spec, Session(tmp_path / "stopped", stop=lambda: next(calls) > 60))
    first = record_of(spec, tmp_path / "stopped").metrics()
    assert 0 < len(first) < 13
    state, words = state_of(spec, tmp_path / "stopped")
    assert state == "started"
    assert f"{len(first)} of 13 measurements" in words
    execute(spec, Session(tmp_path / "stopped", report=lambda *_: next(reports)))
    assert next(reports) == 13 - len(first)
    assert record_of(spec, tmp_path / "stopped").metrics()[: len(first)] == first
    assert numbers(tmp_path / "stopped", spec) == numbers(tmp_path / "uninterrupted", spec)


def test_redo_repeats_the_measurement_and_keeps_the_network(tmp_path):
    spec = measured(LINEAR)
    execute(spec, Session(tmp_path))
    before, weights = numbers(tmp_path, spec), record_of(LINEAR, tmp_path).checkpoint.stat().st_mtime_ns
    reports = []
    execute(spec, Session(tmp_path, report=lambda *step: reports.append(step)), redo=True)
    assert reports
    assert numbers(tmp_path, spec) == before
    assert record_of(LINEAR, tmp_path).checkpoint.stat().st_mtime_ns == weights


def test_a_network_without_its_weights_is_reported_with_what_to_do(tmp_path):
    train(LINEAR, Session(tmp_path))
    record_of(LINEAR, tmp_path).checkpoint.unlink()
    spec = measured(LINEAR)
    with pytest.raises(RecordError, match=r"final weights of linear .* delete .*, and the network is retrained"):
        execute(spec, Session(tmp_path))
    assert "final weights" in record_of(spec, tmp_path).failure()
    assert not record_of(spec, tmp_path).done


@pytest.mark.rare
def test_measuring_lambda_1_during_training_does_not_change_training(tmp_path):
    watched = replace(RESNET, curvature_every=2)
    train(RESNET, Session(tmp_path))
    train(watched, Session(tmp_path))
    plain, other = (torch.load(record_of(s, tmp_path).checkpoint, weights_only=True) for s in (RESNET, watched))
    assert all(torch.equal(plain["model"][name], other["model"][name]) for name in plain["model"])
    lines = record_of(watched, tmp_path).metrics()
    assert ["lambda_1" in line for line in lines] == [False, True, False, True]
    task = build_task(RESNET)
    task.model.load_state_dict(plain["model"])
    params = list(task.model.eval().parameters())
    H = hessian.Hessian(lambda b: task.loss_fn(task.model, b), params, [(task.sample("train", 64), 64)])
    exact = hessian.largest_eigenvalues(H, 1, tolerance=1e-4).values[0]
    assert lines[-1]["lambda_1"] == pytest.approx(exact, rel=0.01)


def test_the_last_epoch_is_always_measured(tmp_path):
    spec = replace(LINEAR, curvature_every=3)
    train(spec, Session(tmp_path))
    lines, summary = record_of(spec, tmp_path).metrics(), record_of(spec, tmp_path).summary()
    eigenvalues = {line["epoch"]: line["lambda_1"] for line in lines if "lambda_1" in line}
    assert list(eigenvalues) == sorted({*range(3, spec.epochs + 1, 3), spec.epochs})
    assert summary["lambda_1"] == eigenvalues[spec.epochs]
    assert summary["greatest_lambda_1"] == max(eigenvalues.values())


def test_reestimated_batchnorm_averages_the_batch_statistics_at_the_final_weights(tmp_path):
    spec = replace(measured(replace(RESNET, seed=1)), measured_examples=1)
    execute(spec, Session(tmp_path))
    network = spec.network
    task = build_task(network)
    task.model.load_state_dict(torch.load(record_of(network, tmp_path).checkpoint, weights_only=True)["model"])
    task.model.train()
    layers = [m for m in task.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    inputs = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0].double()))
    with torch.no_grad():
        for x, _ in task.batches(network.epochs, 0):
            task.model(x)
    for layer, seen in inputs.items():
        layer.running_mean.copy_(torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
        layer.running_var.copy_(torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    expected = task.evaluate().scores["test_accuracy"]
    summary = numbers(tmp_path, spec)
    assert summary["test_reestimated_accuracy"] == pytest.approx(expected, abs=0.5 / network.test_examples)
    assert summary["test_accuracy"] == record_of(network, tmp_path).summary()["test_accuracy"]
    assert summary["test_reestimated_accuracy"] != summary["test_accuracy"]
    assert "train_reestimated_accuracy" not in summary


def test_networks_without_batchnorm_are_not_reestimated_and_records_are_json(tmp_path):
    spec = measured(LINEAR)
    execute(spec, Session(tmp_path))
    summary = numbers(tmp_path, spec)
    assert summary["test_accuracy"] == record_of(LINEAR, tmp_path).summary()["test_accuracy"]
    assert not [name for name in summary if "reestimated" in name]
    for line in (record_of(spec, tmp_path).folder / "metrics.jsonl").read_text().splitlines():
        assert {"part", "measure", "seconds", "step", "steps"} <= set(json.loads(line))


def test_each_network_is_trained_before_it_is_measured():
    specs = with_networks(catalogue.runs("table3", "cpu"))
    places = {spec: i for i, spec in enumerate(specs)}
    curvatures = [spec for spec in specs if spec.kind == "curvature"]
    assert len(specs) == 2 * len(curvatures) == 2 * len(catalogue.runs("table3", "cpu"))
    assert all(places[spec.network] == places[spec] - 1 for spec in curvatures)
    table1 = set(catalogue.runs("table1", "cpu"))
    assert {spec.network for spec in curvatures} <= table1, "Table 3 would train additional networks"


def test_a_network_that_is_measured_keeps_its_ranks():
    shared = replace(RESNET, seed=5)
    assert [s.processes for s in with_ranks([shared, RESNET, measured(RESNET)], 2)] == [2, 1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measured_examples": 0}, "measured_examples is 0, but must be greater than 0"),
        ({"measured_rho": 0.0}, "measured_rho is 0.0, but must be greater than 0"),
        ({"measured_examples": 65}, "at most 64"),
        ({"holdout_examples": 10}, "holdout_examples is 10, but must be 0"),
        ({"kind": "train"}, r"measured_examples is 16, but must be 0, or left out, in a Training run"),
        ({"kind": "theory"}, "Stability run"),
        ({"normalised": False}, "normalised is False"),
        ({"ranks": 2}, "ranks is 2"),
    ],
)
def test_specs_that_cannot_be_measured_are_rejected(changes, words):
    with pytest.raises(SpecError, match=words):
        from_dict(measured(RESNET).to_dict() | changes)


def test_halvings_nest():
    assert halvings(16) == [1, 2, 4, 8, 16]
    assert halvings(24) == [1, 2, 4, 8]
    cuts = [set(np.cumsum([24 // m] * m)) for m in halvings(24)]
    assert all(a <= b for a, b in itertools.pairwise(cuts))
