"""Image classification: from a spec to a Task."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness.data import load_cifar
from experiments.harness.models import build
from experiments.harness.spec import Spec
from experiments.harness.task import Task, generator, subsets

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's training pixels, by channel; CIFAR-100 is scaled alike."""

EVALUATION_BATCH = 250

NOISE_SEED = 1
"""Of the labels that are made wrong: the same for every run."""


def image_task(spec: Spec, data_root: str | None = None) -> Task:
    """CIFAR-10 or CIFAR-100 with one of the models of `models.py`."""
    cifar = load_cifar(spec.dataset, Path(data_root) if data_root else None)
    train, holdout = subsets(spec, len(cifar.train_labels))
    device = torch.device(spec.device)

    def on_device(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images).to(device), torch.from_numpy(labels).long().to(device)

    classes = 100 if spec.dataset == "cifar100" else 10
    noisy = with_wrong_labels(cifar.train_labels[train], spec.label_noise, classes)
    images, labels = on_device(cifar.train_images[train], noisy)
    if spec.holdout_examples:
        scored = "holdout", on_device(cifar.train_images[holdout], cifar.train_labels[holdout])
    else:
        scored = (
            "test",
            on_device(cifar.test_images[: spec.test_examples], cifar.test_labels[: spec.test_examples]),
        )

    model = build(spec.model, classes).to(device, memory_format=torch.channels_last)

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.precision == "bfloat16"):
            return model(images)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(forward(model, x).float(), y, label_smoothing=spec.label_smoothing)

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(labels), generator=generator(spec.seed, epoch)).to(device)
        for index in range(first, steps_per_epoch):
            chosen = order[index * spec.batch_size : (index + 1) * spec.batch_size]
            x = images[chosen]
            if spec.augmentation == "crop-flip":
                x = crop_and_flip(x, generator(spec.seed, epoch, index, 1))  # (seed, epoch, 0) is (seed, epoch)
            yield normalised(x), labels[chosen]

    def evaluate() -> dict[str, float]:
        model.eval()
        scores = {}
        for part, (x, y) in (scored, ("train", (images, labels))):
            accuracy, loss = _score(partial(forward, model), x, y)
            scores |= {f"{part}_accuracy": accuracy, f"{part}_loss": loss}
        return scores

    def sample(part: str, count: int) -> tuple[Tensor, Tensor]:
        x, y = dict([scored, ("train", (images, labels))])[part]
        return normalised(x[:count]), y[:count]

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


def normalised(images: Tensor) -> Tensor:
    """(N, 32, 32, 3) uint8 to (N, 3, 32, 32) float32 of mean 0 and deviation 1, in channels-last memory."""
    mean = torch.tensor(MEAN, device=images.device)
    std = torch.tensor(STD, device=images.device)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad (N, 32, 32, 3) images by 4 black pixels, cut 32 x 32 at a random place, mirror every other one."""
    count, size = images.shape[0], images.shape[1]
    top, left = torch.randint(0, 9, (2, count), generator=generator).to(images.device)
    mirrored = torch.randint(0, 2, (count,), generator=generator).bool().to(images.device)
    line = torch.arange(size, device=images.device)
    rows = top[:, None] + line
    columns = left[:, None] + torch.where(mirrored[:, None], line.flip(0), line)
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    example = torch.arange(count, device=images.device)
    return padded[example[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.no_grad()
def _score(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy."""
    correct = loss = 0.0
    for x, y in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        logits = forward(normalised(x)).float()
        correct += (logits.argmax(1) == y).sum().item()
        loss += F.cross_entropy(logits, y, reduction="sum").item()
    return correct / len(labels), loss / len(labels)
