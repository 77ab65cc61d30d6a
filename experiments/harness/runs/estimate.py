"""How long runs will take, from the measured step times of earlier ones. Standard library only."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.harness.runs.facts import MODELS, Model, TextSet
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record
from experiments.harness.runs.run import Run, from_text
from experiments.harness.runs.spec import Curvature, Timing, Training


@dataclass(frozen=True)
class Estimate:
    """Measured seconds for each training example that passes forward and backward, by what decides it."""

    exact: dict[tuple, float]
    """Of the very model, batch size, micro-batches and number of passes."""
    by_model: dict[tuple, float]
    """Of the model on the device, over all methods."""

    def seconds(self, spec: Run) -> float | None:
        """Expected seconds of the run on one worker; None where nothing comparable was measured."""
        each = self.exact.get(_exactly(spec)) or self.by_model.get(_roughly(spec))
        return None if each is None else each * work(spec)

    def weight(self, spec: Run) -> float:
        """`seconds`, or a guess good enough for a progress bar."""
        return self.seconds(spec) or work(spec) * (0.00001 if spec.model == "linear" else 0.0007)


PASSES = 1500
"""Forward and backward passes over its examples that a curvature run is worth, a guess: some hundred Hessian-vector
products on two sets, the penalties of ever smaller micro-batches, and slices."""


def gpu_hours(spec: Run, estimate: Estimate) -> float:
    """GPU-hours of a run: from measured times where there are any, else guessed; 0 for one that needs no GPU."""
    if spec.device != "cuda":
        return 0.0
    seconds = estimate.seconds(spec)
    if seconds is None:
        seconds = work(spec) / MODELS.get(spec.model, Model(TextSet)).guessed_speed
    return spec.processes * seconds / 3600


def disk_bytes(spec: Run) -> tuple[float, float]:
    """Bytes that a run keeps, if its model's parameters are known, for good, and those it needs while it trains."""
    weights = 4.0 * (MODELS[spec.model].parameters or 0.0 if spec.model in MODELS else 0.0)
    if type(spec) is not Training:
        return 1e6, 1e6
    states = 2 if spec.base_optimizer == "adamw" else 1
    return weights + 1e5, 3 * weights * (1 + states + (spec.ema > 0))  # two checkpoints, and one being written


def work(spec: Run) -> int:
    """Examples that pass forward and backward in each process of a run: SAM and mSAM look at each twice."""
    if isinstance(spec, Curvature):
        return spec.measured_examples * PASSES
    if isinstance(spec, Timing):
        return spec.batch_size * spec.rounds * 6 * spec.micro_batches.bit_length()
    passes = 1 if spec.rho == 0 else 2
    return spec.examples // spec.batch_size * spec.batch_size * spec.flat["epochs"] * passes // spec.processes


def measured(root: Path) -> Estimate:
    """From the finished runs below a results root, and where there are none from the committed ones."""
    here, committed = _medians(_finished(root)), _medians(_committed(root))
    return Estimate(committed.exact | here.exact, committed.by_model | here.by_model)


def _medians(times: Iterable[tuple[Run, float]]) -> Estimate:
    exact, by_model = defaultdict(list), defaultdict(list)
    for spec, seconds in times:
        exact[_exactly(spec)].append(seconds / work(spec))
        by_model[_roughly(spec)].append(seconds / work(spec))
    return Estimate(
        {key: statistics.median(values) for key, values in exact.items()},
        {key: statistics.median(values) for key, values in by_model.items()},
    )


def _finished(root: Path) -> Iterator[tuple[Run, float]]:
    """Finished runs and their seconds; unreadable ones are left out."""
    for record in _records(root):
        try:
            if record.done:
                yield record.spec(), float(record.summary()["wall_seconds"])
        except (OSError, OverflowError, RecordError, KeyError, TypeError, ValueError):
            continue


def _committed(root: Path) -> Iterator[tuple[Run, float]]:
    """The same of every `runs.csv` below the root, made on another machine perhaps."""
    for path in sorted(root.glob("*/runs.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                try:
                    yield from_text(row), float(row["wall_seconds"])
                except (KeyError, OverflowError, TypeError, ValueError):
                    continue


def _records(root: Path) -> Iterable[Record]:
    folder = root / "runs"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [Record(root, name) for name in names]


def _roughly(spec: Run) -> tuple:
    how = ("device", "threads", "precision", "tf32", "compile", "image_size")
    return spec.kind, spec.model, *(spec.flat[name] for name in how), spec.flat["curvature_every"] > 0


def _exactly(spec: Run) -> tuple:
    how = ("batch_size", "micro_batches", "ranks", "augmentation", "max_length")
    size = ("epochs", "train_examples", "holdout_examples", "test_examples")
    return *_roughly(spec), spec.rho > 0, *(spec.flat[name] for name in (*how, *size))
