"""Where data are kept and how they are fetched: the cache, its locks, checksums, downloads. Standard library only."""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import queue
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import NoReturn

from experiments.harness.runs.command_line import Mistake

log = logging.getLogger(__name__)


class DataError(Mistake):
    """Data that are not available or must not be used. The message says what to do."""


class DataUnavailable(DataError):
    """No source has the set. Nothing is wrong with any file: what does not need it can go on."""


class SourceUnavailable(Exception):
    """This source cannot be reached: try the next one. The message becomes part of a `DataError`."""


ANSWER_SECONDS = 10
"""How long a server may take to answer, and later to send the next bytes."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """Where downloads are kept: `$XDG_CACHE_HOME/msam`, or `~/.cache/msam`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msam"


def refuse(what: object, expected: str, found: str, mend: str) -> NoReturn:
    """Says that something has another checksum than it should, and what to do."""
    raise DataError(f"{what} is truncated or altered: its checksum should be {expected}, found {found}. {mend}")


def file_checksum(path: Path, algorithm: str) -> str:
    """The hexadecimal checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Lets one process at a time put something into the cache. The kernel takes the lock back when its holder dies."""
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
    """Turns what the file system says about a folder into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DataError(
                f"The disk of {folder} is full: free some 500 MB there and run again, or set "
                f"XDG_CACHE_HOME to a folder on another disk."
            ) from error
        raise DataError(f"{folder} cannot be used ({error}): {mend}.") from error


def download(url: str, target: Path) -> None:
    """Streams `url` into a file. Unlike torchvision's function it gives up on a silent server."""
    with _open_url(url) as answer, target.open("wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
        size, promised = file.tell(), answer.headers.get("Content-Length")
    if promised is not None and size < int(promised):
        raise OSError(f"the connection broke off after {size} of {promised} bytes")


def _open_url(url: str) -> HTTPResponse:
    """`urlopen` with one limit on everything up to the answer: a socket's timeout leaves name look-up out."""
    answers: queue.SimpleQueue[HTTPResponse | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=ANSWER_SECONDS))
        except Exception as error:  # handed to the caller below
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
