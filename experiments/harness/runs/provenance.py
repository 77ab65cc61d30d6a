"""Where a result comes from: code, versions and machine. Standard library only."""

import hashlib
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

TRAINING_CODE = (
    "msam",
    "experiments/harness/runs/run.py",
    "experiments/harness/runs/spec.py",
    "experiments/harness/runs/facts.py",
    "experiments/harness/tasks",
    *(
        f"experiments/harness/work/{name}.py"
        for name in (
            *("train", "accuracy", "average", "checkpoint", "ranks"),
            *("hessian", "sharpness", "flatness", "stability", "timing"),
        )
    ),
)
"""The folders and files that can change a run's numbers; code that only starts, watches or shows runs is left out."""

PACKAGES = (
    *("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn"),
    *("transformers", "tokenizers", "safetensors", "datasets"),
)


DIFF_CHARACTERS = 100_000
"""How much of a dirty checkout's diff a record keeps."""


def environment(command: str) -> dict[str, Any]:
    """Provenance of this session. Call it before the work starts.

    Returns:
        The entries of `checkout` and `machine`.
    """
    return {**checkout(command), **machine()}


def checkout(command: str) -> dict[str, Any]:
    """The state of the checkout that a command was started in.

    Returns:
        `commit` and `dirty` (None outside a git checkout, where only `machine`'s `code` names the code; changes under
        results/ do not count), `changes` (for a dirty
        checkout, the files by `git status`, then the diff, truncated if it is very long), `lock` (a hash of
        requirements.lock, if there is one), `command`.
    """
    status = _git("status", "--porcelain", "--", ".", ":!results")
    changes = f"{status}\n\n{_git('diff', 'HEAD', '--', '.', ':!results') or ''}" if status else None
    if changes and len(changes) > DIFF_CHARACTERS:
        changes = f"{changes[:DIFF_CHARACTERS]}\n[{len(changes) - DIFF_CHARACTERS} more characters]"
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "changes": changes,
        "lock": _lock_hash(),
        "command": command,
    }


def machine() -> dict[str, Any]:
    """The code, versions and hardware that train a run, and its start time.

    Returns:
        `code` (a hash of the training code on disk), `python`, `packages`, `cpu`, `cores`, `system`, `driver` (NVIDIA's
        GPU driver), `started`.
    """
    return {
        "code": code_hash(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "driver": _driver(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def code_hash(root: Path = ROOT, folders: Sequence[str] = TRAINING_CODE) -> str:
    """A hash of 16 hexadecimal digits over the names and contents of the training code's files.

    Args:
        root: The checkout.
        folders: Folders below it, whose Python files are hashed, and single files.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")) or [root / folder]:
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def resources_used() -> dict[str, Any]:
    """CPU time and peak memory of this process so far.

    Returns:
        `cpu_seconds`, `peak_memory_bytes` (resident) and, if torch has used a GPU, `peak_gpu_bytes` (allocated). A
        process that worked on several runs has one peak over all of them.
    """
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usage = {
        "cpu_seconds": round(time.process_time(), 3),
        "peak_memory_bytes": resident if sys.platform == "darwin" else resident * 1024,
    }
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        usage["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return usage


def command_line() -> str:
    """The command that started this process, as a user would type it."""
    return " ".join(["python -m experiments", *sys.argv[1:]])


def _git(*arguments: str) -> str | None:
    if not (ROOT / ".git").exists():  # git would answer for a repository that this copy lies in
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _lock_hash() -> str | None:
    try:
        return hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _driver() -> str | None:
    """The first line of NVIDIA's driver version file."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


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
