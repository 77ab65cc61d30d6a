"""What some tests need and not every machine has.

A test that needs such a thing carries `@pytest.mark.needs("npm")`, or uses a fixture of `BY_FIXTURE`, which marks it.
`tests/conftest.py` skips a marked test with the sentence of `reason`. Code that starts the thing itself calls
`require`, so that a test without the mark fails on every machine, not only on those that lack the thing.
`MSAM_SLURM_TESTS=required`, `MSAM_BROWSER_TESTS=required` and `MSAM_INTEGRATION_TESTS=required` (of accelerate and
lightning) make a failure of what would be a skip.
"""

import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
BY_FIXTURE = {"cluster": "slurm", "loopback": "slurm", "chromium": "browser", "axe": "browser"}
PACKAGES = (
    *("accelerate", "fastai", "ignite", "lightning", "peft", "schedulefree", "skorch", "tensordict"),
    *("torch_geometric", "trl"),
    *("pandas", "pytorch_optimizer", "tensorboard", "timm", "torchvision", "transformers"),
)
"""Packages that a test may need, by the names they are imported by."""

REQUIRED_BY = {"slurm": "MSAM_SLURM_TESTS", "browser": "MSAM_BROWSER_TESTS"}
REQUIRED_BY |= dict.fromkeys(("accelerate", "lightning"), "MSAM_INTEGRATION_TESTS")

current: frozenset[str] = frozenset()
"""The needs of the test that runs now."""


def require(need: str) -> None:
    """Let the current test go on, or skip it.

    Raises:
        RuntimeError: The test is not marked, so it would not be chosen by `-m needs`.
    """
    if need not in current:
        raise RuntimeError(f"This test needs {need}: mark it with @pytest.mark.needs({need!r}), see tests/needs.py.")
    if why := reason(need):
        unavailable(need, why)


def unavailable(need: str, why: str) -> NoReturn:
    """Skip the current test, or fail it where the environment requires the need."""
    if os.environ.get(REQUIRED_BY.get(need, "")) == "required":
        pytest.fail(why)
    pytest.skip(why)


@functools.cache
def reason(need: str) -> str | None:
    """Why this machine cannot meet the need, as a sentence; None if it can."""
    return CHECKS[need]()


def _slurm() -> str | None:
    if lost := _lost(*SLURM):
        mend = "apt-get install --no-install-recommends slurm-wlm munge"
        return f"The tests on Slurm need {lost}, which is not on PATH: {mend}."
    if os.geteuid():
        return "The tests on Slurm start its daemons, which need root."
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(Path(folder) / "null", 0o20666, os.makedev(1, 3))
        except OSError as error:
            return f"The tests on Slurm make device files, which this machine refuses: {error.strerror}."
    return None


def _browser() -> str | None:
    if lost := _lost("chromium", "npm"):
        return f"The tests of the report in a browser need {lost}, which is not on PATH."
    return None


def _mount() -> str | None:
    if os.geteuid():
        return "Mounting a small disk needs root."
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
        try:
            mounted = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return "Mounting a small disk needs the program mount, which is not on PATH."
        if mounted.returncode:
            return f"This machine refuses to mount a small disk: {mounted.stderr.splitlines()[0]}"
        subprocess.run(["umount", folder], check=True)
    return None


def _gpu() -> str | None:
    import torch  # slow, and only this check needs it

    return None if torch.cuda.is_available() else "This machine has no GPU that torch can use."


def _program(name: str) -> str | None:
    return f"{name} is not on PATH." if _lost(name) else None


def _package(name: str) -> str | None:
    return f"The package {name} is not installed." if importlib.util.find_spec(name) is None else None


def _lost(*programs: str) -> str | None:
    """The first of the programs that is not installed."""
    return next((name for name in programs if shutil.which(name) is None), None)


CHECKS = {
    "slurm": _slurm,
    "browser": _browser,
    "mount": _mount,
    "gpu": _gpu,
    "npm": functools.partial(_program, "npm"),
    "flock": functools.partial(_program, "flock"),
    **{name: functools.partial(_package, name) for name in PACKAGES},
}
