"""The one seam between the domains: what the training loop needs to know of a task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness.runs.spec import Network

SUBSET_SEED = 0
"""Of the one permutation that subsets and held-out examples are cut from: the same for every run."""


@dataclass(frozen=True)
class Task:
    """A model, its data and its scores; made from a spec by `build_task`."""

    model: nn.Module
    """On its device, with the spec's initial weights."""
    loss_fn: Callable[[nn.Module, Any], Tensor]
    """Mean loss of a (micro-)batch under `model` or its data-parallel wrapper, a scalar; the forward pass only."""
    batches: Callable[[int, int], Iterator[Any]]
    """`batches(epoch, first)`: the mini-batches of an epoch (from 0) from batch `first` on. A pure function of
    the seed, the epoch and the position: neither the method nor an interruption changes them."""
    steps_per_epoch: int
    evaluate: Callable[[], dict[str, float]]
    """Scores of the model as it is, by name, `test_accuracy` say; leaves the model in eval mode."""
    sample: Callable[[str, int], Any]
    """`sample(part, count)`: the first `count` examples of `train` or of the part that is scored, as one batch; what
    training makes up (crops, flips) is not in it."""
    data: dict[str, str]
    """`data_checksum` and `data_source`, for the record."""


def subsets(spec: Network, available: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training examples and of the held-out ones, which never overlap.

    Training examples are the first of a fixed permutation, held-out ones its last.
    """
    order = np.random.default_rng(SUBSET_SEED).permutation(available)
    end = available - spec.holdout_examples
    return order[: min(spec.examples, end)], order[end:]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; this process does not wait for it to arrive."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def generator(*key: int) -> torch.Generator:
    """A separate generator for a place in the data, so that dropout's draws cannot shift the order."""
    state = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
