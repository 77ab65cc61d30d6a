"""The patches of docs/extending.md: each applies, touches as few files as it says, and shows in the results."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PATCHES = [
    (section.partition("\n")[0], patch)
    for section in PAGE.split("\n## ")[1:]
    for patch in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
]
COMMANDS = """
import sys
from analysis.__main__ import main as analyse
from experiments.__main__ import main as experiment

def command(main, *words):
    sys.argv = ["", *words, *how]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words

how = sys.argv[1:]
if __name__ == "__main__":
    for target in ("resnet_cifar", "linear_cifar", "momentum"):
        command(experiment, "run", target)
    command(analyse, "table1", "momentum")
"""
"""What a user would type as four commands, in one process."""


def touched(patch: str) -> set[str]:
    return set(re.findall(r"^\+\+\+ b/(\S+)$", patch, re.MULTILINE))


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A copy of the repository with every patch."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("msam", "experiments", "analysis"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "requirements.lock", copy)  # whose hash a record holds
    for _, patch in PATCHES:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=copy, check=True)
    return copy


@pytest.fixture(scope="module")
def results(tmp_path_factory, patched):
    """Its tables and figures after the smoke profile."""
    copy, results = patched, tmp_path_factory.mktemp("results")
    settings = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    how = ["--profile", "smoke", "--seeds", "1", "--results", str(results)]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *how], cwd=copy, env=settings, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return results / "local" / "smoke"


@pytest.mark.parametrize(
    ("section", "product", "experiments"),
    [
        ("An arm", 1, 1),
        ("A data set", 2, 1),
        ("A model", 0, 1),
        ("A column of Table 1", 1, 0),
        ("A study", 1, 1),
    ],
)
def test_an_edit_touches_as_few_files_as_it_says(section, product, experiments):
    files = {file for name, patch in PATCHES if name == section for file in touched(patch)}
    lists = {file for file in files if re.fullmatch(r"experiments/\w+\.py", file)}
    assert (len(files - lists), len(lists)) == (product, experiments), files


def test_every_patch_applies_and_is_listed(patched):
    settings = {**os.environ, "PYTHONPATH": str(patched)}
    command = [sys.executable, "-m", "experiments", "list"]
    done = subprocess.run(command, cwd=patched, env=settings, text=True, capture_output=True, check=True)
    assert "momentum" in done.stdout


def read(folder: Path, name: str) -> str:
    (path,) = folder.rglob(name)
    return path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_arm_is_in_table_claims_and_report(results):
    assert re.search(r"\| SGD, averaged weights +\|", read(results, "table1.md"))
    assert "SGD, averaged weights over SGD" in read(results, "table1.md")
    assert "averaged weights" in read(results, "report.html")
    assert "averaged weights over plain training" in read(results, "claims.md")


@pytest.mark.slow
def test_the_data_set_and_the_model_have_rows(results):
    rows = [line for line in read(results, "table1.md").splitlines() if line.startswith("|")]
    assert any("| digits" in row and "(1)" in row for row in rows)
    assert any("torchvision.models:shufflenet" in row and "(1)" in row for row in rows)


@pytest.mark.slow
def test_the_column_is_in_table_1_alone(results):
    assert "| train loss" in read(results, "table1.md")
    assert "| train loss" not in read(results, "momentum.md")


@pytest.mark.slow
def test_the_study_has_a_table_and_a_figure(results):
    assert re.search("momentum 0.9: .*SAM over SGD", read(results, "momentum.md"))
    assert any(path.stat().st_size > 5_000 for path in results.rglob("momentum.png"))
    assert "Momentum 0 is plain SGD." in read(results, "report.html")
