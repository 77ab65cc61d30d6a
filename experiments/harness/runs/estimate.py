"""How long runs will take, from the measured step times of earlier ones. Standard library only."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record
from experiments.harness.runs.spec import Spec


@dataclass(frozen=True)
class Estimate:
    """Measured seconds for each training example that passes forward and backward, by what decides it."""

    exact: dict[tuple, float]
    """Of the very model, batch size, micro-batches and number of passes."""
    by_model: dict[tuple, float]
    """Of the model on the device, over all methods."""

    def seconds(self, spec: Spec) -> float | None:
        """Expected seconds of the run on one worker; None where nothing comparable was measured."""
        each = self.exact.get(_exactly(spec)) or self.by_model.get(_roughly(spec))
        return None if each is None else each * work(spec)

    def weight(self, spec: Spec) -> float:
        """`seconds`, or a guess good enough for a progress bar."""
        return self.seconds(spec) or work(spec) * (0.00001 if spec.model == "linear" else 0.0007)


PASSES = 1500
"""Forward and backward passes over its examples that a curvature run is worth, a guess: some hundred Hessian-vector
products on two sets, the penalties of ever smaller micro-batches, and slices."""


GUESSED = {"resnet50": 2500, "wrn-28-10": 1200, "vit-small": 4000, "bert-base-uncased": 400, "roberta-base": 400}
"""Examples a second forward and backward on an A100-class GPU with TensorFloat-32, guesses for plans. Not measured: no
GPU has run these yet. What is not here is taken for an encoder."""

PARAMETERS = {
    "resnet50": (23.5e6, "torchvision's, with the stem of CIFAR and 10 classes"),
    "wrn-28-10": (36.5e6, "Zagoruyko and Komodakis 2016, table 4"),
    "vit-small": (6.3e6, "omihub777/ViT-CIFAR"),
    "bert-base-uncased": (110e6, "Devlin et al. 2019, section 3"),
    "roberta-base": (125e6, "Liu et al. 2019, section 4.1"),
}
"""Of the models of the `paper` profile, as rounded as they were published, and by whom."""


def gpu_hours(spec: Spec, estimate: Estimate) -> float:
    """GPU-hours of a run: from measured times where there are any, else guessed; 0 for one that needs no GPU."""
    if spec.device != "cuda":
        return 0.0
    seconds = estimate.seconds(spec)
    if seconds is None:
        seconds = work(spec) / GUESSED.get(spec.model, GUESSED["bert-base-uncased"])
    return spec.ranks * seconds / 3600


def disk_bytes(spec: Spec) -> tuple[float, float]:
    """Bytes that a run of a model of `PARAMETERS` keeps for good, and those it needs while it trains."""
    weights = 4.0 * PARAMETERS.get(spec.model, (0.0, ""))[0]
    if spec.kind != "train":
        return 1e6, 1e6
    states = 2 if spec.base_optimizer == "adamw" else 1
    return weights + 1e5, 3 * weights * (1 + states + (spec.ema > 0))  # two checkpoints, and one being written


def work(spec: Spec) -> int:
    """Examples that pass forward and backward in each process of a run: SAM and mSAM look at each twice."""
    if spec.kind == "curvature":
        return spec.measured_examples * PASSES
    if spec.kind == "cost":
        return spec.batch_size * spec.epochs * 6 * spec.micro_batches.bit_length()
    passes = 1 if spec.rho == 0 else 2
    return spec.examples // spec.batch_size * spec.batch_size * spec.epochs * passes // spec.ranks


def measured(root: Path) -> Estimate:
    """From the finished runs below a results root, and where there are none from the committed ones."""
    here, committed = _medians(_finished(root)), _medians(_committed(root))
    return Estimate(committed.exact | here.exact, committed.by_model | here.by_model)


def _medians(times: Iterable[tuple[Spec, float]]) -> Estimate:
    exact, by_model = defaultdict(list), defaultdict(list)
    for spec, seconds in times:
        exact[_exactly(spec)].append(seconds / work(spec))
        by_model[_roughly(spec)].append(seconds / work(spec))
    return Estimate(
        {key: statistics.median(values) for key, values in exact.items()},
        {key: statistics.median(values) for key, values in by_model.items()},
    )


def _finished(root: Path) -> Iterator[tuple[Spec, float]]:
    """Finished runs and their seconds; unreadable ones are left out."""
    for record in _records(root):
        try:
            if record.done:
                yield record.spec(), float(record.summary()["wall_seconds"])
        except (OSError, OverflowError, RecordError, KeyError, TypeError, ValueError):
            continue


def _committed(root: Path) -> Iterator[tuple[Spec, float]]:
    """The same of every `runs.csv` below the root, made on another machine perhaps."""
    for path in sorted(root.glob("*/runs.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    yield Spec.from_text(row), float(row["wall_seconds"])
                except (KeyError, OverflowError, TypeError, ValueError):
                    continue


def _records(root: Path) -> Iterable[Record]:
    folder = root / "runs"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [Record(root, name) for name in names]


def _roughly(spec: Spec) -> tuple:
    how = spec.device, spec.threads, spec.precision, spec.tf32, spec.compile, spec.image_size
    return spec.kind, spec.model, *how, spec.curvature_every > 0


def _exactly(spec: Spec) -> tuple:
    size = (spec.epochs, spec.train_examples, spec.holdout_examples, spec.test_examples)
    shape = spec.batch_size, spec.micro_batches, spec.rho > 0, spec.ranks, spec.augmentation, spec.max_length
    return *_roughly(spec), *shape, size
