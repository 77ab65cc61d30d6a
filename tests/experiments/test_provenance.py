"""Where a result comes from, asked in a real clone of this repository."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.harness.provenance import PACKAGES, environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone") / "repository"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def asked(folder: Path) -> dict:
    code = "import json; from experiments.harness.provenance import environment; print(json.dumps(environment('x')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_clean_checkout_names_its_commit_and_results_are_no_dirt(clone):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
    (clone / "results").mkdir(exist_ok=True)
    (clone / "results" / "note.txt").write_text("mine")
    session = asked(clone)
    assert session["commit"] == head.stdout.strip()
    assert session["dirty"] is False


def test_a_change_is_dirt_and_one_in_the_training_code_changes_its_hash(clone):
    clean = asked(clone)
    (clone / "README.md").write_text("changed")
    elsewhere = asked(clone)
    assert elsewhere["dirty"] is True
    assert elsewhere["code"] == clean["code"]
    (clone / "msam" / "extra.py").write_text("")
    assert asked(clone)["code"] != clean["code"]


def test_outside_git_the_commit_is_unknown(clone, tmp_path):
    for name in ("msam", "experiments"):
        (tmp_path / name).symlink_to(clone / name)
    code = "from experiments.harness import provenance as p; p.ROOT = p.Path.cwd(); print(p.environment('x')['commit'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_versions_and_machine():
    session = environment("make it")
    assert session["command"] == "make it"
    assert set(session["packages"]) == set(PACKAGES)
    assert session["packages"]["torch"].startswith("2.")
    assert session["cpu"]
    assert len(session["code"]) == 16
