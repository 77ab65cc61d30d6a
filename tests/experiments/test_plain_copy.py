"""A machine with torch, torchvision, NumPy and three small packages, and a copy of the checkout without git."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from experiments.harness.runs import provenance

ROOT = Path(__file__).parents[2]

NEEDED = ("torch", "torchvision", "numpy", "tyro", "tqdm")
"""What docs/gpu.md names; tyro needs typeguard, docstring_parser and typing_extensions."""

LACKING = (
    *("scipy", "pandas", "sklearn", "transformers", "datasets", "timm", "matplotlib", "submitit", "jinja2"),
    *("huggingface_hub", "safetensors", "pyarrow", "curvlinops", "statsmodels", "rich"),
)


def site_packages(folder: Path) -> Path:
    """The packages of this environment, without those that such a machine lacks."""
    folder.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        package = re.split(r"[-.]", path.name.lower())[0].removeprefix("scikit_")
        if package not in LACKING and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.rare
def test_it_trains_and_exports_records_that_name_their_code(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("msam", "experiments"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = site_packages(tmp_path / "site")

    def command(*arguments):
        words = [sys._base_executable, "-S", "-m", "experiments", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(path)}
        return subprocess.run(words, cwd=copy, capture_output=True, text=True, env=env)

    probe = f"from importlib.util import find_spec; print([n for n in {LACKING + NEEDED!r} if find_spec(n)])"
    words = [sys._base_executable, "-S", "-c", probe]
    done = subprocess.run(words, env={"PYTHONPATH": str(path)}, cwd=copy, capture_output=True, text=True)
    assert done.stdout.strip() == str(list(NEEDED))
    for target in ("resnet_cifar", "wrn_cifar"):
        done = command("run", target, "--profile", "smoke", "--seeds", "1")
        assert done.returncode == 0, done.stderr
    planned = command("plan", "table1", "--profile", "gpu")
    assert planned.returncode == 0, planned.stderr
    done = command("export", "resnet_cifar", "--profile", "smoke", "--seeds", "1", "--to", tmp_path / "records.tar.gz")
    assert done.stdout.startswith("6 of the 6 runs"), done.stderr
    sessions = json.loads(next((copy / "results/runs").glob("*/env.json")).read_text())["sessions"]
    assert sessions[-1]["commit"] is None, "the copy is no repository, whatever it lies in"
    assert sessions[-1]["code"] == provenance.code_hash()


def test_a_copy_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "other"], cwd=tmp_path, check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "copy")
    assert provenance.checkout("")["commit"] is None
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.checkout("")["commit"] is not None
