"""The one seam between the domains: what the training loop needs to know of a task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from experiments.harness.spec import Spec


@dataclass(frozen=True)
class Task:
    """A model, its data and its scores; made from a spec by `build_task`."""

    model: nn.Module
    """On its device, with the spec's initial weights."""
    loss_fn: Callable[[Any], Tensor]
    """Mean loss of a (micro-)batch, a scalar; the forward pass only."""
    batches: Callable[[int, int], Iterator[Any]]
    """`batches(epoch, first)`: the mini-batches of an epoch (from 0) from batch `first` on. A pure function of
    the seed, the epoch and the position: neither the method nor an interruption changes them."""
    steps_per_epoch: int
    evaluate: Callable[[], dict[str, float]]
    """Scores of the model as it is, by name, `test_accuracy` say; leaves the model in eval mode."""
    data: dict[str, str]
    """`data_checksum` and `data_source`, for the record."""


def build_task(spec: Spec, data_root: str | None = None) -> Task:
    """The task of a spec. Draws the initial weights from torch's global generator, which must be seeded.

    Args:
        spec: The run.
        data_root: A folder to look for data in first; see `data.py`.

    Raises:
        DataError: if the data cannot be had.
    """
    from experiments.harness import vision

    return vision.image_task(spec, data_root)
