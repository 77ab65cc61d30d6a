"""Image classification: from a spec to a Task."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness.runs.process import cores
from experiments.harness.runs.spec import Spec
from experiments.harness.tasks.augment import augmented, has_policy, loaded
from experiments.harness.tasks.cifar import CLASSES, MEAN, STD, Cifar, load_cifar
from experiments.harness.tasks.image_models import build, pixel_statistics
from experiments.harness.tasks.task import Task, generator, subsets, to_device

EVALUATION_BATCH = 250

NOISE_SEED = 1
"""Of the labels that are made wrong: the same for every run."""


def image_task(spec: Spec, data_root: Path | None = None, loaders: int | None = None) -> Task:
    """CIFAR-10 or CIFAR-100 with one of the models of `image_models.py`.

    Images lie on the device, and crops and cut-outs are made there; what only the CPU can do (`augment.has_policy`) is
    done ahead of the training.

    Args:
        spec: The run.
        data_root: A folder to look for data in first.
        loaders: Processes that do so, which changes no number; None: one for each core but one, and 4 at most, if
            there is a GPU to keep busy, and none on a CPU, which has nothing else to do.
    """
    return task_of(spec, load_cifar(spec.dataset, data_root), loaders)


def task_of(spec: Spec, cifar: Cifar, loaders: int | None = None) -> Task:
    """The task of a spec on these images."""
    train, holdout = subsets(spec, len(cifar.train_labels))
    device = torch.device(spec.device)

    def on_device(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)

    classes = CLASSES[spec.dataset]
    noisy = with_wrong_labels(cifar.train_labels[train], spec.label_noise, classes)
    on_host = cifar.train_images[train]
    images, labels = on_device(on_host, noisy)
    if spec.holdout_examples:
        scored = "holdout", on_device(cifar.train_images[holdout], cifar.train_labels[holdout])
    else:
        scored = (
            "test",
            on_device(cifar.test_images[: spec.test_examples], cifar.test_labels[: spec.test_examples]),
        )

    model = build(spec.model, classes, spec.image_size)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    mean, std = pixel_statistics(model)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
    seen = partial(normalised, mean=mean, std=std, size=spec.image_size, layout=layout)
    if loaders is None:
        loaders = min(4, cores() - 1) if device.type == "cuda" else 0

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
            return model(images)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(forward(model, x).float(), y, label_smoothing=spec.label_smoothing)

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels), generator=generator(spec.seed, epoch))
        places = to_device(order, device)
        made = (
            loaded(spec, torch.from_numpy(on_host), order, epoch, first, loaders, device.type == "cuda")
            if has_policy(spec)
            else None
        )
        for index in range(first, steps_per_epoch):
            chosen = places[index * spec.batch_size : (index + 1) * spec.batch_size]
            x = augmented(spec, images[chosen], epoch, index) if made is None else to_device(next(made), device)
            yield seen(x), labels[chosen]

    def evaluate() -> dict[str, float]:
        model.eval()
        scores: dict[str, float] = {}
        for part, (x, y) in (scored, ("train", (images, labels))):
            accuracy, loss = _score(lambda images: forward(model, seen(images)), x, y)
            scores |= {f"{part}_accuracy": accuracy, f"{part}_loss": loss}
        return scores

    def sample(part: str, count: int) -> tuple[Tensor, Tensor]:
        x, y = dict([scored, ("train", (images, labels))])[part]
        return seen(x[:count]), y[:count]

    steps_per_epoch = len(labels) // spec.batch_size  # an incomplete last batch is left out
    return Task(
        model=model,
        loss_fn=loss_fn,
        batches=batches,
        steps_per_epoch=steps_per_epoch,
        evaluate=evaluate,
        sample=sample,
        data={"data_checksum": cifar.checksum, "data_source": cifar.source},
    )


def with_wrong_labels(labels: np.ndarray, share: float, classes: int) -> np.ndarray:
    """A copy of (N,) labels of which the share, to the nearest example, is wrong.

    Each of the other classes is as likely; what is wrong at one share is wrong in the same way at greater ones.
    """
    draws = np.random.default_rng(NOISE_SEED)
    wrong = draws.permutation(len(labels))[: round(share * len(labels))]
    shifts = draws.integers(1, classes, len(labels))[wrong]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + shifts) % classes
    return noisy


def normalised(
    images: Tensor,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    size: int = 32,
    layout: torch.memory_format = torch.channels_last,
) -> Tensor:
    """(N, 32, 32, 3) uint8 to (N, 3, size, size) float32 with pixels in [0, 1] taken to (pixel - mean) / std."""
    centre, scale = _statistics(mean, std, images.device)
    x = ((images.float() / 255 - centre) / scale).permute(0, 3, 1, 2)
    if size != x.shape[-1]:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
    return x.contiguous(memory_format=layout)


@cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


@torch.no_grad()
def _score(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy."""
    correct = loss = 0.0
    for x, y in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        logits = forward(x).float()
        correct += (logits.argmax(1) == y).sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
    return correct / len(labels), loss / len(labels)
