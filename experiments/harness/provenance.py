"""Where a result comes from: code, versions and machine. Standard library only."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TRAINING_CODE = ("msam", "experiments/harness")
"""What a run's numbers depend on, beside its spec."""

PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn"),
    *("transformers", "tokenizers", "safetensors", "datasets"),
)


def environment(command: str) -> dict[str, Any]:
    """Provenance of this session, as it is when called: call it before the work starts.

    Returns:
        What `checkout` and `machine` do.
    """
    return {**checkout(command), **machine()}


def checkout(command: str) -> dict[str, Any]:
    """Which commit a command was given at.

    Returns:
        `commit` and `dirty` (None outside a git checkout; changes under results/ are no dirt), `command`.
    """
    status = _git("status", "--porcelain", "--", ".", ":!results")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "command": command,
    }


def machine() -> dict[str, Any]:
    """What a run is trained by, and when it begins.

    Returns:
        `code` (a hash of the training code as it lies on the disk), `python`, `packages`, `cpu`, `cores`, `system`,
        `started`.
    """
    return {
        "code": code_hash(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_hash(root: Path = ROOT, folders: Sequence[str] = TRAINING_CODE) -> str:
    """Sixteen hexadecimal digits over the names and contents of the training code's files, or of other folders'."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def command_line() -> str:
    """The command this process was started with, as a person would type it."""
    return " ".join(["python -m experiments", *sys.argv[1:]])


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
