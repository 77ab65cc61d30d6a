"""How long runs will take, from the measured step times of earlier ones. Standard library only."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.harness.record import Record, RecordError
from experiments.harness.spec import Spec


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


def work(spec: Spec) -> int:
    """Examples that pass forward and backward in each process of a run: SAM and mSAM look at each twice."""
    if spec.kind == "curvature":
        return spec.measured_examples * PASSES
    passes = 1 if spec.rho == 0 else 2
    return spec.examples // spec.batch_size * spec.batch_size * spec.epochs * passes // spec.ranks


def measured(root: Path) -> Estimate:
    """What the finished runs below a results root tell; unreadable ones are left out."""
    exact, by_model = defaultdict(list), defaultdict(list)
    for record in _records(root):
        try:
            if not record.done:
                continue
            spec, seconds = record.spec(), float(record.summary()["wall_seconds"])
        except (OSError, RecordError, KeyError, TypeError, ValueError):
            continue
        exact[_exactly(spec)].append(seconds / work(spec))
        by_model[_roughly(spec)].append(seconds / work(spec))
    return Estimate(
        {key: statistics.median(values) for key, values in exact.items()},
        {key: statistics.median(values) for key, values in by_model.items()},
    )


def _records(root: Path) -> Iterable[Record]:
    folder = root / "runs"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [Record(root, name) for name in names]


def _roughly(spec: Spec) -> tuple:
    return spec.kind, spec.model, spec.device, spec.threads, spec.precision, spec.curvature_every > 0


def _exactly(spec: Spec) -> tuple:
    size = (spec.epochs, spec.train_examples, spec.holdout_examples, spec.test_examples)
    return *_roughly(spec), spec.batch_size, spec.micro_batches, spec.rho > 0, spec.ranks, size
