"""The task of a spec for image classification."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness.runs.facts import CIFAR_MEAN, CIFAR_STD, image_set
from experiments.harness.runs.process import cores
from experiments.harness.runs.spec import Network
from experiments.harness.tasks.augment import Batches, augmented, has_policy, loaded
from experiments.harness.tasks.data import ImageData, load
from experiments.harness.tasks.image_models import MODELS, build, pixel_statistics
from experiments.harness.tasks.own_models import load_start, source_hash
from experiments.harness.tasks.task import Evaluation, Task, calibration_error, generator, subsets, to_device

EVALUATION_BATCH = 250

NOISE_SEED = 1
"""Seed of the wrong labels, the same for every run."""


def image_task(spec: Network, data_root: Path | None = None, loaders: int | None = None) -> Task:
    """CIFAR-10 or CIFAR-100 with one of the models of `image_models.py`.

    Images are kept on the device, which also does crops and cutout. Augmentation that needs the CPU
    (`augment.has_policy`) is computed ahead of training.

    Args:
        spec: The run.
        data_root: A folder to search for data first.
        loaders: Number of processes that compute ahead; it does not change the numbers. None: for a GPU, all cores
            except one, at most 4; for a CPU, none.
    """
    return task_of(spec, load(spec.dataset, data_root), loaders)


def check(spec: Network, data_root: Path | None = None) -> None:
    """Fetch and verify the images, and the model if it is not in `MODELS`.

    Raises:
        DataError: if something is unavailable or does not match the spec.
    """
    load(spec.dataset, data_root)
    if spec.model not in MODELS or spec.flat["start_weights"]:
        load_start(spec, build(spec.model, image_set(spec.dataset).classes, spec.image_size))


def task_of(spec: Network, data: ImageData, loaders: int | None = None) -> Task:
    """The task of a spec on these images."""
    device = torch.device(spec.device)
    if loaders is None:
        loaders = min(4, cores() - 1) if device.type == "cuda" else 0
    images = _Images(spec, data, loaders)
    return Task(
        model=images.model,
        loss_fn=images.loss,
        batches=images.batches,
        steps_per_epoch=images.steps_per_epoch,
        evaluate=images.evaluate,
        score=images.score,
        sample=images.sample,
        data={"data_checksum": data.checksum, "data_source": data.source, **images.origin},
    )


class _Images:
    """The images of a run on its device, and its model: the state that the functions of its `Task` share.

    Args:
        spec: The run.
        data: All images.
        loaders: See `image_task`.
    """

    def __init__(self, spec: Network, data: ImageData, loaders: int) -> None:
        self.spec, self.loaders, self.device = spec, loaders, torch.device(spec.device)
        train, holdout = subsets(spec, len(data.train_labels))
        facts = image_set(spec.dataset)
        self.on_host = data.train_images[train]
        noisy = with_wrong_labels(data.train_labels[train], spec.label_noise, facts.classes)
        self.images, self.labels = self._on_device(self.on_host, noisy)
        if spec.holdout_examples:
            self.scored, images, labels = "holdout", data.train_images[holdout], data.train_labels[holdout]
        else:
            first = slice(spec.test_examples)
            self.scored, images, labels = "test", data.test_images[first], data.test_labels[first]
        self.parts = {self.scored: self._on_device(images, labels), "train": (self.images, self.labels)}

        model = build(spec.model, facts.classes, spec.image_size)
        self.origin = {**source_hash(spec.model, model), **load_start(spec, model)}
        layout = torch.channels_last if spec.channels_last else torch.contiguous_format
        mean, std = pixel_statistics(model, facts)
        self.model = model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        self.normalise = partial(normalised, mean=mean, std=std, size=spec.image_size, layout=layout)
        self.steps_per_epoch = len(self.labels) // spec.batch_size  # an incomplete last batch is left out

    def forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits, in the spec's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "bfloat16"):
            return model(images)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean cross-entropy of a batch."""
        x, y = batch
        return F.cross_entropy(self.forward(model, x).float(), y, label_smoothing=self.spec.label_smoothing)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The mini-batches of an epoch from `first` on, augmented and normalised."""
        size = self.spec.batch_size
        order = torch.randperm(len(self.labels), generator=generator(self.spec.seed, epoch))
        places = to_device(order, self.device)
        ahead = None
        if has_policy(self.spec):
            batches = Batches(self.spec, torch.from_numpy(self.on_host), order, epoch)
            ahead = loaded(batches, first, self.loaders, self.device.type == "cuda")
        for index in range(first, self.steps_per_epoch):
            chosen = places[index * size : (index + 1) * size]
            if ahead is None:
                x = augmented(self.spec, self.images[chosen], epoch, index)
            else:
                x = to_device(next(ahead), self.device)
            yield self.normalise(x), self.labels[chosen]

    def evaluate(self) -> Evaluation:
        """Accuracy, loss and calibration on the test or held-out images, then accuracy and loss on the training images.

        The loss is the mean negative log likelihood, without label smoothing.
        """
        self.model.eval()
        scores: dict[str, float] = {}
        predictions = {}
        for part, (_, labels) in self.parts.items():
            logits = self.logits(self.model, part, len(labels))
            scores |= {f"{part}_accuracy": _accuracy(logits, labels), f"{part}_loss": _loss(logits, labels)}
            if part == self.scored:
                scores[f"{part}_ece"] = calibration_error(logits, labels)
                chosen = {part: logits.argmax(1), f"{part}_labels": labels}
                predictions = {name: classes.cpu().numpy().astype(np.uint8) for name, classes in chosen.items()}
        return Evaluation(scores, predictions)

    def score(self, model: nn.Module, count: int) -> dict[str, float]:
        """Accuracy of a model on the first `count` test or held-out images."""
        labels = self.parts[self.scored][1][:count]
        return {f"{self.scored}_accuracy": _accuracy(self.logits(model, self.scored, count), labels)}

    @torch.no_grad()
    def logits(self, model: nn.Module, part: str, count: int) -> Tensor:
        """The logits of the first `count` images of a part, (count, classes) in float32, on the device."""
        batches = self.parts[part][0][:count].split(EVALUATION_BATCH)
        return torch.cat([self.forward(model, self.normalise(images)).float() for images in batches])

    def sample(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` examples of a part, without augmentation."""
        x, y = self.parts[part]
        return self.normalise(x[:count]), y[:count]

    def _on_device(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(images).to(self.device), torch.from_numpy(labels).long().to(self.device)


def with_wrong_labels(labels: np.ndarray, share: float, classes: int) -> np.ndarray:
    """A copy of (N,) labels, of which this share (rounded to whole examples) is wrong.

    Each of the other classes is equally likely. The wrong labels at one share are also wrong, in the same way, at
    every larger share.
    """
    draws = np.random.default_rng(NOISE_SEED)
    wrong = draws.permutation(len(labels))[: round(share * len(labels))]
    shifts = draws.integers(1, classes, len(labels))[wrong]
    noisy = labels.copy()
    noisy[wrong] = (labels[wrong] + shifts) % classes
    return noisy


def normalised(
    images: Tensor,
    mean: tuple[float, ...] = CIFAR_MEAN,
    std: tuple[float, ...] = CIFAR_STD,
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


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def _loss(logits: Tensor, labels: Tensor) -> float:
    """The mean cross-entropy."""
    return F.cross_entropy(logits.double(), labels).item()
