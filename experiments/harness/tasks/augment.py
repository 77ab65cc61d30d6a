"""Image augmentation: random crops and flips, cutout, AutoAugment and RandAugment.

Every draw comes from a generator seeded by its position in the data (seed, epoch, batch). So the images do not depend
on the method, on interruptions, or on the number of loader processes. Images are uint8, (N, 32, 32, 3).
"""

import signal
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from experiments.harness.runs.facts import CIFAR_MEAN
from experiments.harness.runs.spec import Network
from experiments.harness.tasks.task import generator, to_device

CROP_AND_FLIP, CUTOUT, POLICY = 1, 2, 3
"""Last part of the seed of a batch's generator, by what it draws; (seed, epoch) alone orders the examples."""


def augmented(spec: Network, images: Tensor, epoch: int, index: int) -> Tensor:
    """The augmented images of mini-batch `index` of an epoch, on their device; a policy needs them on the CPU.

    Crop and flip come first, then the policy, then cutout, as in the papers that report all three.
    """
    if spec.augmentation != "none":
        images = crop_and_flip(images, generator(spec.seed, epoch, index, CROP_AND_FLIP))
    if has_policy(spec):
        images = by_policy(images, spec.augmentation, generator(spec.seed, epoch, index, POLICY))
    if spec.cutout:
        images = cut_out(images, spec.cutout, generator(spec.seed, epoch, index, CUTOUT))
    return images


def has_policy(spec: Network) -> bool:
    """Whether images go through AutoAugment or RandAugment, which work on one image at a time, on the CPU."""
    return spec.augmentation.endswith("augment")


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4 black pixels, crop 32 x 32 at a random position, flip each image with probability 1/2."""
    count, size = images.shape[0], images.shape[1]
    top, left = to_device(torch.randint(0, 9, (2, count), generator=generator), images.device)
    mirrored = to_device(torch.randint(0, 2, (count,), generator=generator).bool(), images.device)
    line = torch.arange(size, device=images.device)
    rows = top[:, None] + line
    columns = left[:, None] + torch.where(mirrored[:, None], line.flip(0), line)
    padded = F.pad(images, (0, 0, 4, 4, 4, 4))
    example = torch.arange(count, device=images.device)
    return padded[example[:, None, None], rows[:, :, None], columns[:, None, :]]


def cut_out(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Fill a square of each image with the data's mean colour. Its centre is in the image; a part may lie outside.

    From DeVries and Taylor 2017 (arXiv 1708.04552), who set the square to zero in normalised images.
    """
    count, size = images.shape[0], images.shape[1]
    centres = to_device(torch.randint(0, size, (2, count, 1), generator=generator), images.device)
    line = torch.arange(size, device=images.device)
    first = centres - side // 2
    rows, columns = (first <= line) & (line < first + side)
    mean = _mean_colour(images.device)
    return torch.where((rows[:, :, None] & columns[:, None, :])[..., None], mean, images)


def by_policy(images: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """AutoAugment's policy for CIFAR-10 (arXiv 1805.09501) or RandAugment (arXiv 1909.13719), image by image.

    Both are torchvision's; RandAugment has its defaults (2 operations of magnitude 9 in 31 steps). They draw from
    torch's global CPU generator, which is seeded for the batch and restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        transform = _policy(name)
        return torch.stack([transform(image) for image in images.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)


class Batches(Dataset):
    """The mini-batches of an epoch by index, computed on the CPU.

    Args:
        spec: The run.
        images: All training images, on the CPU.
        order: The epoch's order of the images.
        epoch: Counted from 0.
    """

    def __init__(self, spec: Network, images: Tensor, order: Tensor, epoch: int) -> None:
        self.spec, self.images, self.order, self.epoch = spec, images, order, epoch

    def __len__(self) -> int:
        return len(self.order) // self.spec.batch_size

    def __getitem__(self, index: int) -> Tensor:
        chosen = self.order[index * self.spec.batch_size : (index + 1) * self.spec.batch_size]
        return augmented(self.spec, self.images[chosen], self.epoch, index)


def loaded(batches: Batches, first: int, workers: int, pinned: bool = False) -> Iterator[Tensor]:
    """The mini-batches of an epoch from `first` on, computed ahead by worker processes.

    Args:
        batches: All mini-batches of the epoch.
        first: Index of the first batch to return.
        workers: Number of worker processes, which does not change any pixel; 0: this process computes the batches.
        pinned: Whether batches are for a GPU.
    """
    _policy(batches.spec.augmentation)  # its imports take seconds; forked processes inherit them
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=range(first, len(batches)),
            num_workers=workers,
            pin_memory=pinned,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # seeds the workers' generators, which nothing draws from
        )
    )


def _leave_signals_to_the_run(worker: int) -> None:
    """Ignore signals, which Slurm and terminals send to all processes: the run ends this one after its checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@cache
def _mean_colour(device: torch.device) -> Tensor:
    return (torch.tensor(CIFAR_MEAN) * 255).round().byte().to(device)


@cache
def _policy(name: str) -> torch.nn.Module:
    from torchvision.transforms import v2

    if name == "crop-flip-randaugment":
        return v2.RandAugment()
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
