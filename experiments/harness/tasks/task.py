"""The interface between the training loop and images or texts: what the loop needs to know about a task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness.runs.spec import Network

SUBSET_SEED = 0
"""Seed of the permutation that subsets and held-out examples are taken from, the same for every run."""

BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)."""


@dataclass(frozen=True)
class Evaluation:
    """The scores of a network, and what it predicted."""

    scores: dict[str, float]
    """By name, for example `test_accuracy`."""
    predictions: dict[str, np.ndarray]
    """For each scored part, `<part>` (N,) with the predicted classes and `<part>_labels` (N,) with the true ones, both
    uint8, or float32 for a regression; texts add `<part>_int8`."""


@dataclass(frozen=True)
class Task:
    """A model, its data and its scores; `build_task` builds it from a spec."""

    model: nn.Module
    """On its device, with the spec's initial weights."""
    loss_fn: Callable[[nn.Module, Any], Tensor]
    """Mean loss of a (micro-)batch under `model` or its data-parallel wrapper, a scalar. Forward pass only."""
    batches: Callable[[int, int], Iterator[Any]]
    """`batches(epoch, first)`: the mini-batches of an epoch (counted from 0) from batch `first` on. They depend only
    on the seed, the epoch and the position, not on the method or on interruptions."""
    steps_per_epoch: int
    evaluate: Callable[[], Evaluation]
    """Scores and predictions of the current model; leaves it in eval mode."""
    score: Callable[[nn.Module, int], dict[str, float]]
    """`score(model, count)`: the main score of a model on the first `count` test or held-out examples, in the model's
    present mode."""
    sample: Callable[[str, int], Any]
    """`sample(part, count)`: the first `count` examples of `train` or of the scored part, as one batch, without
    augmentation."""
    data: dict[str, str]
    """`data_checksum` and `data_source`, for the record."""


def subsets(spec: Network, available: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training examples and of the held-out examples, which never overlap.

    Training examples are the first of a fixed permutation, held-out examples the last.
    """
    order = np.random.default_rng(SUBSET_SEED).permutation(available)
    end = available - spec.holdout_examples
    return order[: min(spec.examples, end)], order[end:]


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The expected calibration error in [0, 1] of the predicted classes.

    Examples are sorted into `BINS` equal ranges of confidence, the largest probability. The error is the mean over the
    examples of |accuracy - mean confidence| of their bin.

    Args:
        logits: (N, classes).
        labels: (N,) classes.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    gaps = (predicted == labels).double() - confidence
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return torch.zeros(BINS, dtype=gaps.dtype, device=gaps.device).index_add(0, bins, gaps).abs().sum().item() / len(
        labels
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device, without waiting for the copy on a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def generator(*key: int) -> torch.Generator:
    """A separate generator for a position in the data, so that dropout's draws do not change the order."""
    state = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
