"""Files of records and other JSON: written atomically and checked when read.

Records may come from anywhere, so they are read as data, never as code. A file that is not a regular file, or lies in
a linked folder, or is larger than any record, or is not strict JSON, is rejected by name. Standard library only.
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
"""The largest JSON or metrics.jsonl file that is read, in bytes; real ones have some thousands."""


class RecordError(Mistake):
    """A record that cannot be read or written. The message names the file and says what to do."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object so that a reader sees either the old file or the complete new one."""
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RecordError: if the file is missing, unreadable, or anything but one JSON object.
    """
    return parse_object(read_text(path), path)


@contextlib.contextmanager
def replacing(path: Path, former: Path | None = None) -> Iterator[Path]:
    """A temporary path next to `path` that replaces it when the block succeeds.

    The old file is kept as `former`, if given, so one of the two is complete whenever this process is killed.
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
    """A record's text, safe for a terminal: control and unprintable characters are shown as escape codes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an error while a run's file is written into a sentence that says how to fix it."""
    try:
        yield
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written ({error.strerror or error}): free space there, and the same command resumes "
            "from the last checkpoint."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a text so that a reader sees either the old file or the complete new one."""
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
        raise RecordError(f"{path} cannot be read ({error}): repair it or move its folder away.") from error


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The contents of a regular file in a folder that is not a link.

    Raises:
        OSError: if it is missing, not a regular file, or larger than `most`.
    """
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a symbolic link", str(path))
    with open(path, "rb", opener=no_link) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than any record has", str(path))
        return file.read()


def no_link(path: str, flags: int) -> int:
    """An opener that does not follow links and does not block on pipes."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """Parse a file's text as one JSON object; `path` is for the error message.

    Raises:
        RecordError: if it is not one JSON object.
    """
    try:
        content = json.loads(
            text, object_pairs_hook=_reject_repeated, parse_constant=_reject_constant, parse_int=_parse_integer
        )
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not JSON ({error}): repair it or move its folder away.") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} does not hold a JSON object: repair it or move its folder away.")
    return content


def _reject_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is repeated in one object")
    return content


def _parse_integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def finite(content: Any) -> Any:
    """The content with numbers that are not finite replaced by their names, since JSON has no NaN."""
    if isinstance(content, Mapping):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    return content
