"""python -m experiments, called as a user calls it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.harness.runs import catalogue
from experiments.harness.runs.provenance import code_hash
from experiments.harness.runs.selection import Runs
from tests.commands import command

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return command("experiments", *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A results root, and the command that trained the smoke runs of the linear model in it."""
    root = tmp_path_factory.mktemp("results")
    done = call("run", "linear_cifar", "--profile", "smoke", "--jobs", "1", "--results", str(root))
    assert done.returncode == 0, done.stderr
    return root, done


@pytest.fixture
def results(trained):
    return trained[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "table9"], "Unknown experiment or table 'table9'"),
        (["run", "table1", "--profile", "huge"], "Unknown profile 'huge'"),
        (["run", "table1", "--set", "colour=red"], "Unknown field 'colour'"),
        (["run", "table1", "--set", "epochs"], "FIELD=VALUE"),
        (["run", "table1", "--where", "colour=red"], "Unknown field 'colour'"),
        (["run", "table1", "--where", "model"], "FIELD=VALUE"),
        (["plan", "table1", "--where", "model=resnet"], "resnet8, vit-micro, wrn-10-1"),
        (["run", "table1", "--set", "micro_batches=0"], "micro_batches is 0"),
        (["run", "table1", "--set", "micro_batches=-2"], "micro_batches is -2"),
        (["run", "table1", "--set", "micro_batches=4096"], "at most the batch size"),
        (["run", "table1", "--set", "rho=-0.5"], "rho is -0.5"),
        (["run", "table1", "--set", "rho=NaN"], "rho is nan"),
        (["run", "table1", "--seeds", "0"], "seeds is 0"),
        (["run", "table1", "--set", "seed=18446744073709551616"], "seed is 18446744073709551616"),
        (["plan", "table1", "--jobs", "-3"], "jobs is -3"),
        (["run", "table1", "--jobs", "0"], "jobs is 0"),
        (["run"], "TARGET"),
        (["train"], "train"),
    ],
)
def test_mistakes_end_in_a_sentence_and_status_2(arguments, words, tmp_path):
    done = call(*arguments, *(["--results", str(tmp_path)] if len(arguments) > 1 else []))
    assert done.returncode == 2
    assert words in done.stderr + done.stdout
    assert not list(tmp_path.iterdir()), "something was written"


def test_paper_runs_without_a_gpu_are_rejected_with_a_way_out(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = call("run", "resnet_cifar", "--profile", "paper", "--results", str(tmp_path))
    assert done.returncode == 2
    assert "--profile cpu" in done.stderr
    assert not list(tmp_path.iterdir()), "something was written"


def test_fetch_verifies_the_data_and_trains_nothing(tmp_path):
    done = call("fetch", "linear_cifar", "--profile", "smoke", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "The data of 2 of 2 runs of linear_cifar (smoke) are on this machine." in done.stdout
    assert not list(tmp_path.iterdir()), "something was written"
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"no images")
    rejected = call("fetch", "linear_cifar", "--profile", "smoke", "--data-root", str(tmp_path))
    assert rejected.returncode == 2
    assert "cifar-10-batches-py" in rejected.stderr


def test_list_names_every_experiment_and_its_cells():
    done = call("list")
    assert done.returncode == 0
    for name in ("resnet_cifar", "wrn_cifar", "vit_cifar", "linear_cifar", "table1-tuning"):
        assert name in done.stdout


def test_plan_counts_finished_and_missing_runs_and_the_time_left(results):
    done = call("plan", "linear_cifar", "--profile", "smoke", "--seeds", "3", "--results", str(results))
    assert "3 runs, 2 done, 1 to do." in done.stdout
    assert "About" in done.stdout
    whole = call("plan", "table1", "--profile", "paper", "--results", str(results))
    assert whole.returncode == 0
    assert "guess: " in whole.stdout
    assert "workers, a guess." in whole.stdout


def test_a_second_call_trains_nothing(results):
    before = {p: p.stat().st_mtime_ns for p in results.rglob("*")}
    done = call("run", "linear_cifar", "--profile", "smoke", "--results", str(results))
    assert done.returncode == 0
    assert "nothing to train" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in results.rglob("*")} == before


def test_more_seeds_keep_the_runs_that_are_done(results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    done = call("run", "linear_cifar", "--profile", "smoke", "--seeds", "3", "--results", str(tmp_path / "results"))
    assert "Training 1 runs" in done.stdout
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 3


@pytest.mark.rare
def test_redo_retrains_and_reproduces_the_numbers(results, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(results, root)

    def accuracies() -> list[float]:
        return [json.loads(p.read_text())["test_accuracy"] for p in sorted(root.glob("runs/*/summary.json"))]

    before, written = accuracies(), [p.stat().st_mtime_ns for p in sorted(root.glob("runs/*/summary.json"))]
    assert call("run", "linear_cifar", "--profile", "smoke", "--redo", "--results", str(root)).returncode == 0
    assert accuracies() == before
    assert [p.stat().st_mtime_ns for p in sorted(root.glob("runs/*/summary.json"))] != written


def test_redo_does_not_change_records_of_a_newer_version(results, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(results, root)
    newer = sorted(root.glob("runs/*"))[-1]
    (newer / "spec.json").write_text('{"format": 99, "spec": {}}')
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    done = call("run", "linear_cifar", "--profile", "smoke", "--redo", "--results", str(root))
    assert done.returncode == 2
    assert "newer version" in done.stderr
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_a_damaged_finished_run_does_not_count_as_done(results, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(results, root)
    damaged = min(root.glob("runs/*/summary.json"))
    damaged.write_text("")
    done = call("run", "linear_cifar", "--profile", "smoke", "--results", str(root))
    assert done.returncode == 2
    assert str(damaged) in done.stderr
    assert "1 damaged, 1 done" in call("status", "linear_cifar", "--profile", "smoke", "--results", str(root)).stdout


def test_status_distinguishes_the_states(results, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(results, root)
    first, second = sorted(root.glob("runs/*"))
    (first / "summary.json").unlink()
    (first / "failure.json").write_text('{"message": "diverged at step 3: the loss is nan"}')
    (second / "summary.json").unlink()
    (second / "metrics.jsonl").write_bytes(b"\xff\n{}\n")
    done = call("status", "linear_cifar", "--profile", "smoke", "--seeds", "3", "--results", str(root))
    assert "diverged at step 3" in done.stdout
    assert "1 damaged, 1 failed, 1 not started." in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["plan", "table1"], ["plan", "table1", "--profile", "paper"], ["status", "table1"]],
    ids=" ".join,
)
def test_commands_that_train_nothing_do_not_import_torch(arguments):
    code = (
        f"import runpy, sys; sys.argv = ['experiments', *{arguments!r}]\n"
        "try: runpy.run_module('experiments', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.rare
def test_rows_whose_data_is_unavailable_stay_not_run_and_the_others_train(tmp_path):
    """GLUE is not available without a folder or the hub, but the snippets are."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "MSAM_DATA": ""}
    code = (
        "import sys; from dataclasses import replace; from experiments import __main__, bert_glue; "
        "from experiments.harness.runs import catalogue; "
        "small = replace(bert_glue.SMOKE, train_examples=16, epochs=1, test_examples=8); "
        "bert_glue.RUNS['smoke'] = [small, replace(small, dataset='rte')]; __main__.main()"
    )
    arguments = ["run", "bert_glue", "--profile", "smoke", "--seeds", "1", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Not run: 1 runs on rte. GLUE's rte is not available" in done.stderr
    assert "Training 1 runs of bert_glue" in done.stdout
    assert len(list(tmp_path.glob("runs/*/summary.json"))) == 1


def test_each_row_is_printed_as_soon_as_it_has_a_seed_then_with_its_mean(trained):
    root, done = trained
    first, second = (line for line in done.stderr.splitlines() if line.startswith("["))
    values = [100 * json.loads(p.read_text())["test_accuracy"] for p in root.glob("runs/*/summary.json")]
    assert re.match(r"\[1/2\] linear cifar10 .* seed 0: test accuracy \d+\.\d % in \d+ s; .* left$", first)
    assert f"(mean of 2 seeds: {sum(values) / 2:.1f} %)" in second


@pytest.mark.needs("tensorboard")
def test_tensorboard_shows_the_metrics_of_the_records(results, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second call replaces the events of the first
        done = call(
            "tensorboard", "linear_cifar", "--profile", "smoke", "--results", str(results), "--to", str(tmp_path)
        )
    assert f"2 of 2 runs of linear_cifar (smoke) written. To see them: tensorboard --logdir {tmp_path}" in done.stdout
    for folder in tmp_path.iterdir():
        events = EventAccumulator(str(folder)).Reload()
        lines = (results / "runs" / folder.name.rpartition("_")[2] / "metrics.jsonl").read_text().splitlines()
        losses = [(line["epoch"], pytest.approx(line["train_loss"])) for line in map(json.loads, lines)]
        assert [(event.step, event.value) for event in events.Scalars("train_loss")] == losses


def test_without_tensorboard_the_command_says_how_to_install_it(results, tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("raise ImportError('hidden by this test')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.removeprefix("torch.utils.").startswith("tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    done = call("tensorboard", "linear_cifar", "--profile", "smoke", "--results", str(results))
    assert done.returncode == 2
    assert done.stderr == (
        "TensorBoard is not installed (hidden by this test): install it with .venv/bin/python -m pip install "
        "tensorboard, and run again.\n"
    )


def test_what_is_published_can_be_left_out_and_seeds_be_those_of_the_committed_tables(monkeypatch, tmp_path):
    every = Runs("linear_cifar", "cpu", seeds="published").specs
    assert [spec.seed for spec in every[::2]] == list(range(16)), "seed by seed"
    assert {spec.seed for spec in Runs("rho", "cpu", seeds="published").specs} == set(range(8))
    monkeypatch.setattr("experiments.harness.runs.selection.DEFAULT_ROOT", tmp_path)
    assert Runs("linear_cifar", "cpu", seeds="published", unpublished=True).specs == every
    (tmp_path / "cpu").mkdir()
    rows = [(every[0].run_id, code_hash()), (every[1].run_id, "older code")]
    lines = ["run_id,code", *map(",".join, rows)]
    (tmp_path / "cpu" / "runs.csv").write_text("\n".join(lines))
    assert Runs("linear_cifar", "cpu", seeds="published", unpublished=True).specs == every[1:]


def test_the_runs_of_one_network_can_be_selected_with_the_networks_that_they_measure():
    both = Runs("table3", "cpu", seeds=2, where=("model=vit-micro", "rho=0.0")).specs
    measured = [spec for spec in both if spec.kind == "curvature"]
    assert both == [spec for one in measured for spec in (one.network, one)]
    assert measured == [
        spec for spec in catalogue.runs("table3", "cpu", 2) if spec.model == "vit-micro" and not spec.flat["rho"]
    ]
