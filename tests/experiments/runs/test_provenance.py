"""The provenance of results, tested in a real clone of this repository."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.harness.runs.files import write_json
from experiments.harness.runs.provenance import PACKAGES, code_hash, environment
from experiments.harness.runs.record import Record, record_of
from experiments.harness.work.session import Interrupted, Session
from experiments.harness.work.train import train
from tests.commands import command
from tests.specs import BASE

ROOT = Path(__file__).parents[3]

SPEC = replace(BASE, model="linear", train_examples=64, test_examples=50)


def call(*arguments: str) -> subprocess.CompletedProcess:
    return command("experiments", *arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The record of a finished run."""
    root = tmp_path_factory.mktemp("results")
    train(SPEC, Session(root, environment={"commit": "abc"}))
    return record_of(SPEC, root)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def provenance_in(folder: Path) -> dict:
    code = (
        "import json; from experiments.harness.runs.provenance import environment; print(json.dumps(environment('x')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_clean_checkout_has_its_commit_and_results_do_not_make_it_dirty(clone):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
    (clone / "results").mkdir(exist_ok=True)
    (clone / "results" / "note.txt").write_text("mine")
    session = provenance_in(clone)
    assert session["commit"] == head.stdout.strip()
    assert session["dirty"] is False


def test_a_change_makes_a_checkout_dirty_and_changed_training_code_changes_its_hash(clone):
    clean = provenance_in(clone)
    (clone / "README.md").write_text("changed")
    elsewhere = provenance_in(clone)
    assert elsewhere["dirty"] is True
    assert elsewhere["code"] == clean["code"]
    (clone / "msam" / "extra.py").write_text("")
    assert provenance_in(clone)["code"] != clean["code"]


def test_the_hash_covers_only_code_that_can_change_a_number(tmp_path):
    for name in ("msam", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    before, harness, counted = code_hash(tmp_path), tmp_path / "experiments" / "harness", set()
    assert before == code_hash()
    for path in harness.rglob("*.py"):
        content = path.read_text()
        path.write_text(content + "\n")
        if code_hash(tmp_path) != before:
            counted.add(path.relative_to(harness).as_posix())
        path.write_text(content)
    paths = [path for package in ("tasks", "work") for path in harness.glob(f"{package}/*.py")]
    both = {path.relative_to(harness).as_posix() for path in paths}
    excluded = {"work/__init__.py", "work/session.py", "work/execute.py"}
    assert counted == both - excluded | {"runs/run.py", "runs/spec.py", "runs/facts.py"}


def test_outside_git_the_commit_is_unknown(clone, tmp_path):
    for name in ("msam", "experiments"):
        (tmp_path / name).symlink_to(clone / name)
    code = (
        "from experiments.harness.runs import provenance as p; p.ROOT = p.Path.cwd(); "
        "print(p.environment('x')['commit'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_versions_and_machine():
    session = environment("make it")
    assert session["command"] == "make it"
    assert set(session["packages"]) == set(PACKAGES)
    assert session["packages"]["torch"].startswith("2.")
    assert session["cpu"]
    assert len(session["code"]) == 16


def test_the_changes_of_a_dirty_checkout_are_kept(clone):
    (clone / "msam" / "extra.py").write_text("")
    (clone / "README.md").write_text("changed\n")
    session = provenance_in(clone)
    assert session["dirty"] is True
    assert "?? msam/extra.py" in session["changes"]
    assert "+changed" in session["changes"]
    (clone / "README.md").write_text("long\n" * 100_000)
    assert provenance_in(clone)["changes"].endswith("more characters]")
    subprocess.run(["git", "checkout", "--quiet", "README.md"], cwd=clone, check=True)
    subprocess.run(["git", "clean", "--quiet", "--force", "msam"], cwd=clone, check=True)
    assert provenance_in(clone)["changes"] is None


def test_the_lock_file_has_a_hash(clone):
    session = provenance_in(clone)
    assert session["lock"] == hashlib.sha256((clone / "requirements.lock").read_bytes()).hexdigest()[:16]
    assert session["driver"] is None or "NVIDIA" in session["driver"]


def test_a_session_records_torchs_settings_and_the_resources_used(finished):
    (session,) = finished.environments()
    assert session["torch_flags"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert session["torch_flags"]["deterministic"] is False
    assert session["threads"] == 1
    assert 0 < session["cpu_seconds"] <= 3 * session["wall_seconds"] + 1
    assert 100e6 < session["peak_memory_bytes"] < 24e9
    assert session["ended"] > "2026"


def test_an_interrupted_session_records_the_resources_used(tmp_path):
    with pytest.raises(Interrupted):
        train(SPEC, Session(tmp_path, stop=lambda: True))
    train(SPEC, Session(tmp_path))
    first, second = record_of(SPEC, tmp_path).environments()
    assert {"cpu_seconds", "wall_seconds", "peak_memory_bytes", "ended"} <= set(first) & set(second)


def test_show_prints_everything_known_about_a_run(finished):
    done = call("show", finished.run_id[:6], "--results", str(finished.root))
    assert done.returncode == 0, done.stderr
    for words in ("done", "linear cifar10", "learning_rate", "session 1 of 1", "commit", "abc", "test_accuracy"):
        assert words in done.stdout
    unknown = call("show", "zzz", "--results", str(finished.root))
    assert unknown.returncode == 2
    assert "'zzz' matches no run in" in unknown.stderr


@pytest.mark.parametrize(
    "arguments",
    [pytest.param([], id="all epochs", marks=pytest.mark.rare), pytest.param(["--epochs", "1"], id="one epoch")],
)
def test_verify_reproduces_the_run(arguments, finished):
    done = call("verify", finished.run_id, *arguments, "--results", str(finished.root))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "matches bit for bit" in done.stdout


def test_verify_rejects_more_epochs_than_the_run_has(finished):
    done = call("verify", finished.run_id, "--epochs", "9", "--results", str(finished.root))
    assert done.returncode == 2
    assert "1 to 2" in done.stderr


@pytest.mark.rare
def test_verify_reports_the_differences(finished, tmp_path):
    forged = Record(tmp_path, finished.run_id)
    shutil.copytree(finished.folder, forged.folder)
    lines = forged.metrics()
    lines[1]["train_loss"] += 1e-12
    (forged.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = forged.summary()
    write_json(forged.folder / "summary.json", {**summary, "test_accuracy": 0.99})
    sessions = forged.environments()
    write_json(forged.folder / "env.json", {"sessions": [{**sessions[0], "cpu": "Another CPU"}]})
    weights = torch.load(forged.checkpoint, weights_only=True)
    weights["model"]["1.bias"][0] += 1
    del weights["sum"]
    torch.save(weights, forged.checkpoint)
    done = call("verify", forged.run_id, "--results", str(tmp_path))
    assert done.returncode == 1
    assert "metrics.jsonl first differs in line 2: train_loss was" in done.stdout
    assert "test_accuracy was 0.99" in done.stdout
    assert "1 of 2 tensors of the final weights differ, first 1.bias" in done.stdout
    assert "Possible cause: cpu was Another CPU" in done.stdout
    assert call("verify", forged.run_id, "--epochs", "1", "--results", str(tmp_path)).returncode == 0
