"""The one seam between the domains: what the training loop needs to know of a task."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.harness.spec import IMAGES, SIMULATED, Spec

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


def build_task(spec: Spec, data_root: str | None = None) -> Task:
    """The task of a spec. Draws the initial weights from torch's global generator, which must be seeded.

    Args:
        spec: The run.
        data_root: A folder to look for data in first; see `data.py`.

    Raises:
        DataError: if the data cannot be had.
    """
    if spec.dataset in IMAGES:
        from experiments.harness import vision

        return vision.image_task(spec, data_root)
    from experiments.harness import glue

    return glue.text_task(spec, data_root)


def set_torch(spec: Spec) -> None:
    """Make this process compute as the spec says; call it before anything is computed."""
    torch.set_num_threads(spec.threads)
    torch.set_float32_matmul_precision("high" if spec.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = spec.tf32
    if spec.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(spec.deterministic)


def here(spec: Spec) -> dict[str, Any]:
    """What this process computes with, for the record; call it after `set_torch`."""
    on_gpu = spec.device == "cuda"
    return {
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch_flags": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.enabled,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cuda": torch.version.cuda if on_gpu else None,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        },
    }


def check(spec: Spec, data_root: str | None = None) -> None:
    """Fetch and verify what a spec's task is made from, before any run starts.

    Raises:
        DataError: if it does not fit; `NotToBeHad` if no source has the data.
    """
    if spec.dataset in SIMULATED:
        from experiments.harness import theory

        theory.check(spec)
    elif spec.dataset in IMAGES:
        from experiments.harness.data import load_cifar

        load_cifar(spec.dataset, Path(data_root) if data_root else None)
        if "/" in spec.model:
            from experiments.harness.models import pretrained

            pretrained(spec.model, 10, spec.image_size)
    else:
        from experiments.harness import glue

        glue.check(spec, data_root)


def subsets(spec: Spec, available: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training examples and of the held-out ones, which never overlap.

    Training examples are the first of a fixed permutation, held-out ones its last.
    """
    order = np.random.default_rng(SUBSET_SEED).permutation(available)
    end = available - spec.holdout_examples
    return order[: min(spec.examples, end)], order[end:]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; this process does not wait for it to arrive."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def generator(*key: int) -> torch.Generator:
    """A generator of its own for a place in the data, so that dropout's draws cannot shift the order."""
    state = np.random.SeedSequence(key).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))
