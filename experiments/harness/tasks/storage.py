"""The data cache: its folder, locks, checksums and downloads. Standard library only."""

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import os
import queue
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, NoReturn

from experiments.harness.runs.command_line import Mistake

log = logging.getLogger(__name__)


class DataError(Mistake):
    """Data that is unavailable or must not be used. The message says what to do."""


class DataUnavailable(DataError):
    """No source has the set. No file is damaged, so runs that do not need the set can go on."""


class SourceUnavailable(Exception):
    """This source cannot be reached, so the next one is tried. The message becomes part of a `DataError`."""


ANSWER_SECONDS = 10
"""How long a server may take to answer, and then to send the next bytes."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/msam`, or `~/.cache/msam`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msam"


def reject_checksum(source: object, expected: str, actual: str, mend: str) -> NoReturn:
    """Raises the error for a wrong checksum, which says what to do."""
    raise DataError(f"{source} is truncated or altered: its checksum should be {expected}, but is {actual}. {mend}")


def file_checksum(path: Path, algorithm: str) -> str:
    """The hexadecimal checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to read from, or the parts of one that was split: `path.part-aa`, `path.part-ab`, ..., in this order.

    `split -b 50m cifar10.npz cifar10.npz.part-` writes such parts, for places that take no large files.
    """
    parts = [] if path.exists() else parts_of(path)
    with io.BytesIO(b"".join(part.read_bytes() for part in parts)) if parts else path.open("rb") as file:
        yield file


def parts_of(path: Path) -> list[Path]:
    """The parts of a file that was split, in order; none if there are no parts."""
    return sorted(path.parent.glob(f"{path.name}.part-*"))


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Locks a cache entry: one process at a time may write it. The kernel releases the lock when its holder dies."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is downloading %s", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def storage_errors(folder: Path, mend: str) -> Iterator[None]:
    """Turns a file system error about a folder into a sentence that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DataError(
                f"The disk of {folder} is full: free about 500 MB there and run again, or set XDG_CACHE_HOME to a "
                f"folder on another disk."
            ) from error
        raise DataError(f"{folder} cannot be used ({error}): {mend}.") from error


def download(url: str, target: Path) -> None:
    """Streams `url` into a file. Unlike torchvision's function, it times out if the server does not answer."""
    with _open_url(url) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file, 1 << 20)
        size, expected = file.tell(), response.headers.get("Content-Length")
    if expected is not None and size < int(expected):
        raise OSError(f"the connection was lost after {size} of {expected} bytes")


def _open_url(url: str) -> HTTPResponse:
    """`urlopen` with one timeout for everything up to the response: a socket's timeout excludes the name lookup."""
    responses: queue.SimpleQueue[HTTPResponse | Exception] = queue.SimpleQueue()

    def request() -> None:
        try:
            responses.put(urllib.request.urlopen(url, timeout=ANSWER_SECONDS))
        except Exception as error:  # raised in the calling thread below
            responses.put(error)

    threading.Thread(target=request, daemon=True).start()
    try:
        response = responses.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS} s") from None
    if isinstance(response, Exception):
        raise response
    return response
