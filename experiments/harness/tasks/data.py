"""What an image loader returns, and how a data set is loaded from its row of facts. Needs only numpy."""

import importlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.runs.facts import DATASETS
from experiments.harness.tasks.storage import DataError


@dataclass(frozen=True, eq=False)
class ImageData:
    """A complete image data set.

    Attributes:
        train_images: uint8, (N, 32, 32, 3), red-green-blue, C-contiguous.
        train_labels: int64, (N,); for CIFAR-100 the fine labels.
        test_images: uint8, (M, 32, 32, 3).
        test_labels: int64, (M,).
        source: Where the data came from, in words.
        checksum: sha256 over the bytes of the four arrays, in this order.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    source: str
    checksum: str


def load(dataset: str, data_root: Path | None) -> Any:
    """Load a data set with the loader from its row in `facts.DATASETS`.

    Args:
        dataset: A name in `facts.DATASETS`.
        data_root: A folder to search first; None: the folder in `MSAM_DATA`, if it is set.

    Returns:
        `ImageData`, or `glue_files.TextData`.

    Raises:
        DataError: if the folder does not exist or the data cannot be used; `DataUnavailable` if no source has it.
    """
    check_root([dataset], data_root, any_of=False)
    module, _, function = DATASETS[dataset].loader.partition(":")
    return getattr(importlib.import_module(module), function)(dataset, data_root)


def check_root(datasets: Collection[str], data_root: Path | None, any_of: bool = True) -> None:
    """Reject a data folder that does not exist, or, with `any_of`, a `data_root` that has none of the data sets.

    Args:
        datasets: The data sets that are asked for.
        data_root: The folder from `--data-root`; None: that of `MSAM_DATA`, if it is set.
        any_of: Whether one of the data sets must be there. Data sets that are never read from such a folder are left
            out of this.

    Raises:
        DataError: the message says what was looked for.
    """
    given = data_root or os.environ.get("MSAM_DATA")
    if not given:
        return
    option, folder = "--data-root" if data_root else "MSAM_DATA", Path(given).expanduser()
    looked_for = {name: files for name in datasets if (files := _looked_for(name))}
    words = "; ".join(f"{name} as {' or '.join(files)}" for name, files in looked_for.items())
    if not folder.is_dir():
        wrong = "is not a folder" if folder.exists() else "does not exist"
        looked = f"; it was searched for {words}" if words else ""
        raise DataError(f"The folder {folder}, given by {option}, {wrong}{looked}. Correct it, or leave it out.")
    found = any((folder / file).exists() for files in looked_for.values() for file in files)
    if any_of and data_root and looked_for and not found:
        raise DataError(
            f"The folder {folder}, given by {option}, has none of the data sets. It was searched for {words}. Correct "
            "it, or leave it out to use the cache or a download."
        )


def _looked_for(dataset: str) -> tuple[str, ...]:
    """The paths below a data folder, of which one shows that it has the data set; empty if it is never read there."""
    module, _, _ = DATASETS[dataset].loader.partition(":")
    paths = getattr(importlib.import_module(module), "looked_for", None) if module else None
    return paths(dataset) if paths else ()
