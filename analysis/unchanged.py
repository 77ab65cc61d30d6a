"""Skip a repeated `python -m analysis` if no record, code or argument has changed since it last wrote its files."""

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
"""A file in the output folder: the fingerprint of all inputs, the files written and the text printed."""


def fingerprint(root: Path, arguments: Any) -> str:
    """A hash of the arguments, the code, the libraries, and the names, sizes and times of all records.

    Args:
        root: The results root.
        arguments: The command's arguments, a dataclass.
    """
    digest = hashlib.sha256(repr(dataclasses.asdict(arguments)).encode())
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
            if entry.name.endswith((".json", ".jsonl", ".npz")):
                status = entry.stat()
                digest.update(f"\0{entry.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def remembered(folder: Path, stamp: str) -> str | None:
    """The text printed when `folder` was written; None if the fingerprint differs or a file is missing."""
    try:
        content = read_json(folder / NAME)
    except RecordError:
        return None
    files, printed = content.get("files"), content.get("printed")
    if content.get("fingerprint") != stamp or not isinstance(files, list) or not isinstance(printed, str):
        return None
    return printed if all((folder / str(name)).exists() for name in files) else None


def remember(folder: Path, stamp: str, files: Iterable[str], printed: str) -> None:
    """Save the fingerprint, file names and printed text for the next call."""
    write_json(folder / NAME, {"fingerprint": stamp, "files": sorted(files), "printed": printed})


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
