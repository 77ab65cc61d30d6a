"""The score of a network during training, for its curve. It chooses nothing, and training goes on as without it."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from experiments.harness.runs.facts import DATASETS
from experiments.harness.runs.spec import Training
from experiments.harness.tasks.task import Task

EXAMPLES = 1000
"""The score is that on the first so many test or held-out examples, or on all if there are fewer."""

SHARE = 0.04
"""The largest share of a run's forward and backward passes that scoring during training may take."""

PASSES = 3
"""A forward and backward pass costs about as much as this many forward passes."""


def interval(spec: Training) -> int:
    """Epochs between two scores, the same for every arm of a block; a run with fewer epochs has none.

    It depends on the spec alone, so a resumed run has the same scores as one that was never stopped.
    """
    trained = spec.examples // spec.batch_size * spec.batch_size
    return math.ceil(_examples(spec) / (PASSES * trained * SHARE))


def score_if_due(spec: Training, task: Task, model: nn.Module, epoch: int) -> dict[str, float]:
    """The model's score after this epoch (counted from 1), counted back from the last epoch; empty if none is due.

    Args:
        spec: The run.
        task: Its task.
        model: The network that the run will be scored with: the task's, or the average of its weights.
        epoch: The epoch that just ended.
    """
    if epoch < interval(spec) or (spec.epochs - epoch) % interval(spec):
        return {}
    with unchanged(model):
        model.eval()
        return task.score(model, _examples(spec))


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module, all buffers and torch's random generators after the block."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers()) if buffer.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _examples(spec: Training) -> int:
    return min(EXAMPLES, spec.holdout_examples or spec.test_examples or DATASETS[spec.dataset].test)
