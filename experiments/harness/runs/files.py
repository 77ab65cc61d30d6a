"""The files of records and other JSON: written whole, and checked when read.

Records may come from anywhere: they are data, never code, and what is not a regular file in its own folder, or larger
than any record, or not strict JSON, is rejected, naming the file. Standard library only.
"""

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.harness.runs.command_line import Mistake

LARGEST_TEXT = 64 * 2**20
"""Bytes that a reader takes from a JSON file or from metrics.jsonl; real ones have some thousands."""


class RecordError(Mistake):
    """A record that cannot be read or written. The message names the file and says what to do."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees the old file or the whole new one."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RecordError: if the file is missing, unreadable, or anything but one JSON object.
    """
    return parse_object(read_text(path), path)


@contextlib.contextmanager
def replacing(path: Path, former: Path | None = None) -> Iterator[Path]:
    """A temporary path next to `path` that takes its place when the block ends well.

    What was there before is kept as `former`, if given: one of the two is whole whenever this process dies.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if former is not None and path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def printable(text: str) -> str:
    """A text out of a record for a terminal: what would steer it, or cannot be written, is shown by its code."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Around the writing of a run's file: an error says how to mend it."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written ({error.strerror or error}): make room there, and the same command goes on from "
            "the last checkpoint."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text so that a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a text of at most `LARGEST_TEXT` bytes.

    Raises:
        RecordError: if the file is missing, unreadable or not UTF-8.
    """
    try:
        return read_bytes(path, LARGEST_TEXT).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} cannot be read ({error}): mend it or move its folder away.") from error


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The contents of a regular file in a folder that is not a link.

    Raises:
        OSError: if it is missing, or anything else, or larger than `most`.
    """
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a link", str(path))
    with open(path, "rb", opener=no_link) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than any record", str(path))
        return file.read()


def no_link(path: str, flags: int) -> int:
    """An opener that follows no link and waits for no pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """A JSON object out of the text that `path` holds.

    Raises:
        RecordError: if it is anything else.
    """
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}): mend it or move its folder away.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} does not hold a JSON object: mend it or move its folder away.")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return content


def _whole(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def finite(content: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as its name."""
    if isinstance(content, Mapping):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content
