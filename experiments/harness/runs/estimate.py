"""How long runs will take, from the measured step times of earlier runs. Standard library only."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from experiments.harness.runs.facts import MODELS, Model, TextSet
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import DEFAULT_ROOT, Record
from experiments.harness.runs.run import Run, from_text
from experiments.harness.runs.spec import Curvature, Timing, Training


@dataclass(frozen=True)
class Estimate:
    """Measured seconds of one forward and backward pass of one training example."""

    exact: dict[tuple, float]
    """For runs with the same model, batch size, micro-batches and number of passes."""
    by_model: dict[tuple, float]
    """For the model on the device, over all methods."""
    by_step: dict[tuple, float] = field(default_factory=dict)
    """For runs whose steps are alike, but whose lengths may differ."""
    overhead: float = 4.0
    """Seconds that a run takes besides: its process, its data, its first step and its scores."""
    here: bool = False
    """Whether some of it was measured in this results root."""

    def seconds(self, spec: Run) -> float | None:
        """Expected seconds of the run's steps on one worker; None if nothing comparable was measured."""
        per_example = (
            self.exact.get(_exact_key(spec)) or self.by_step.get(_step_key(spec)) or self.by_model.get(_model_key(spec))
        )
        return None if per_example is None else per_example * work(spec)

    def weight(self, spec: Run) -> float:
        """All seconds that a run takes: from `seconds`, or a guess that is good enough for a progress bar."""
        guess = guessed_seconds(spec) if spec.device == "cuda" else work(spec) * _SLOWNESS.get(spec.model, 0.0007)
        return self.overhead + (self.seconds(spec) or guess)


_SLOWNESS = {"linear": 0.00001}
"""Seconds of one example's pass on a CPU where nothing is measured, of models unlike the others."""

PASSES = 1500
"""The cost of a curvature run, in forward and backward passes over its examples. A guess: some hundred Hessian-vector
products on two sets, the penalties of smaller and smaller micro-batches, and slices."""


def gpu_hours(spec: Run, estimate: Estimate) -> float:
    """GPU-hours of a run: from measured times if available, otherwise guessed; 0 for a run that needs no GPU."""
    if spec.device != "cuda":
        return 0.0
    return spec.processes * (estimate.seconds(spec) or guessed_seconds(spec)) / 3600


def guessed_seconds(spec: Run) -> float:
    """A guess at the seconds of a run on one GPU, without the time to start it, see `facts.Model`."""
    model = MODELS.get(spec.model, Model(TextSet))
    return work(spec) / model.guessed_speed * (1 + model.guessed_micro_batch * (spec.micro_batches - 1))


def disk_bytes(spec: Run) -> tuple[float, float]:
    """Bytes that a run keeps at the end, and bytes that it needs while it trains, if its parameter count is known."""
    weights = 4.0 * (MODELS[spec.model].parameters or 0.0 if spec.model in MODELS else 0.0)
    if type(spec) is not Training:
        return 1e6, 1e6
    states = 2 if spec.base_optimizer == "adamw" else 1
    return weights + 1e5, 3 * weights * (1 + states + (spec.ema > 0))  # two checkpoints, plus one being written


def work(spec: Run) -> int:
    """Examples that pass forward and backward in each process of a run: SAM and mSAM pass each one twice."""
    if isinstance(spec, Curvature):
        return spec.measured_examples * PASSES
    if isinstance(spec, Timing):
        return spec.batch_size * spec.rounds * 6 * spec.micro_batches.bit_length()
    passes = 1 if spec.rho == 0 else 2
    return spec.examples // spec.batch_size * spec.batch_size * spec.flat["epochs"] * passes // spec.processes


def load_estimate(root: Path) -> Estimate:
    """The estimate from the finished runs below a results root; where it has none, from the committed runs.

    These are the root's or, if it has none, those of this checkout.
    """
    finished = list(_finished(root))
    local = _medians((spec, seconds) for spec, seconds, _ in finished)
    committed = _medians(_committed(root)) if any(root.glob("*/runs.csv")) else _of_committed(DEFAULT_ROOT)
    besides = [other for _, _, other in finished if other is not None]
    return Estimate(
        committed.exact | local.exact,
        committed.by_model | local.by_model,
        committed.by_step | local.by_step,
        OF_A_PROCESS + statistics.median(besides) if besides else Estimate.overhead,
        bool(finished),
    )


@cache
def _of_committed(root: Path) -> Estimate:
    """The estimate from a root's committed runs, which a process reads once: there are hundreds."""
    return _medians(_committed(root))


OF_A_PROCESS = 1.0
"""Seconds to start a worker and to end it."""


def _medians(times: Iterable[tuple[Run, float]]) -> Estimate:
    exact: dict[tuple, list[float]] = defaultdict(list)
    by_model: dict[tuple, list[float]] = defaultdict(list)
    by_step: dict[tuple, list[float]] = defaultdict(list)
    for spec, seconds in times:
        exact[_exact_key(spec)].append(seconds / work(spec))
        by_model[_model_key(spec)].append(seconds / work(spec))
        by_step[_step_key(spec)].append(seconds / work(spec))

    def medians(times: dict[tuple, list[float]]) -> dict[tuple, float]:
        return {key: statistics.median(values) for key, values in times.items()}

    return Estimate(medians(exact), medians(by_model), medians(by_step))


def _finished(root: Path) -> Iterator[tuple[Run, float, float | None]]:
    """Finished runs, their seconds, and what their sessions took besides; unreadable records are skipped."""
    for record in _records(root):
        try:
            if record.done:
                seconds = float(record.summary()["wall_seconds"])
                yield record.spec(), seconds, _besides(record, seconds)
        except (OSError, OverflowError, RecordError, KeyError, TypeError, ValueError):
            continue


def _besides(record: Record, seconds: float) -> float | None:
    """What a run's sessions took besides its steps; None if that is not known."""
    try:
        return max(0.0, sum(float(session["wall_seconds"]) for session in record.environments()) - seconds)
    except (RecordError, KeyError, TypeError, ValueError):
        return None


def _committed(root: Path) -> Iterator[tuple[Run, float]]:
    """Runs and their seconds from every `runs.csv` below the root, possibly from another machine."""
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


def _model_key(spec: Run) -> tuple:
    fields = ("device", "threads", "precision", "tf32", "compile", "capture", "passes", "image_size")
    return spec.kind, spec.model, *(spec.flat[name] for name in fields), spec.flat["curvature_every"] > 0


def _exact_key(spec: Run) -> tuple:
    size = ("epochs", "train_examples", "holdout_examples", "test_examples")
    return *_step_key(spec), *(spec.flat[name] for name in size)


def _step_key(spec: Run) -> tuple:
    step = ("batch_size", "micro_batches", "ranks", "augmentation", "max_length")
    return *_model_key(spec), spec.rho > 0, *(spec.flat[name] for name in step)
