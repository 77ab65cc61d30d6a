"""Whether anything has changed since `python -m analysis` last wrote its files: no run is read twice for nothing."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.harness.runs.files import RecordError, read_json, write_json
from experiments.harness.runs.provenance import ROOT, code_hash

NAME = "unchanged.json"
"""In the folder that was written: the fingerprint of all that went in, what came out, and what was printed."""


def fingerprint(root: Path, asked: Any) -> str:
    """A hash over what is asked, the code, the libraries, and the names, sizes and times of all records.

    Args:
        root: The results root.
        asked: The command's arguments, a dataclass.
    """
    digest = hashlib.sha256(repr(dataclasses.asdict(asked)).encode())
    digest.update(code_hash(folders=("analysis", "experiments")).encode() + sys.version.encode())
    for path in (
        ROOT / "analysis" / "report.html.j2",
        ROOT / "requirements.lock",
        *sorted(root.glob("*/tables/*.csv")),
    ):
        digest.update(path.read_bytes())
    folder = root / "runs"
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        digest.update(f"\0{name}".encode("utf-8", "surrogateescape"))
        for entry in sorted(_entries(folder / name), key=lambda entry: entry.name):
            if entry.name.endswith((".json", ".jsonl")):
                found = entry.stat()
                digest.update(f"\0{entry.name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def remembered(folder: Path, stamp: str) -> str | None:
    """What was printed when `folder` was written, if its fingerprint is this one and its files are still there."""
    try:
        found = read_json(folder / NAME)
    except RecordError:
        return None
    files, printed = found.get("files"), found.get("printed")
    if found.get("fingerprint") != stamp or not isinstance(files, list) or not isinstance(printed, str):
        return None
    return printed if all((folder / str(name)).exists() for name in files) else None


def remember(folder: Path, stamp: str, files: Iterable[str], printed: str) -> None:
    """Keep it for the next call."""
    write_json(folder / NAME, {"fingerprint": stamp, "files": sorted(files), "printed": printed})


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []
