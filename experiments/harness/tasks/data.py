"""What an image loader returns, and how a data set is loaded from its row of facts. Needs only numpy."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness.runs.facts import DATASETS


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
        data_root: A folder to search first.

    Returns:
        `ImageData`, or `glue_files.TextData`.

    Raises:
        DataError: if the data cannot be used; `DataUnavailable` if no source has it.
    """
    module, _, function = DATASETS[dataset].loader.partition(":")
    return getattr(importlib.import_module(module), function)(dataset, data_root)
