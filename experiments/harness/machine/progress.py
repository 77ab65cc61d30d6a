"""Progress of many runs: a bar on a terminal, otherwise a line per run."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from experiments.harness.machine.forecast import Forecast
from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.record import duration, record_of
from experiments.harness.runs.spec import Run, in_percent


class Display:
    """A line for each finished run and, on a terminal, a live bar; both show the time left.

    Args:
        specs: All runs.
        estimate: Expected time of each run, for the bar.
        jobs: Number of runs at a time.
    """

    def __init__(self, specs: Sequence[Run], estimate: Estimate, jobs: int) -> None:
        self.forecast = Forecast(specs, estimate, jobs)
        self.seconds = self.forecast.expected
        self.done, self.count, self.announced = 0.0, 0, False
        self.bar = tqdm(
            total=sum(self.seconds.values()),
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f}% |{bar}| {desc}",
            leave=False,
        )

    def update(self, fractions: Mapping[Run, float]) -> None:
        """Show the progress of each active run, from 0 to 1."""
        self.forecast.observe(fractions, time.monotonic())
        self._announce()
        done = self.done + sum(self.seconds[spec] * fraction for spec, fraction in fractions.items())
        self.bar.n = min(done, self.bar.total)
        names = "; ".join(f"{spec.title} {fraction:.0%}" for spec, fraction in fractions.items())
        self.bar.set_description_str(f"{self.count}/{len(self.seconds)} runs, {self._left()} left: {names}")

    def finished(self, spec: Run, failure: str | None, root: Path) -> None:
        """Print a run's score, or the last line of its failure."""
        self.done += self.seconds[spec]
        self.count += 1
        self.forecast.finished(spec, time.monotonic())
        record = record_of(spec, root)
        if failure is not None:
            words = f"FAILED: {failure.strip().splitlines()[-1]}"
        elif record.done:
            summary = record.summary()
            name = spec.score
            score = _in_words(name, summary[name])
            words = f"{name.replace('_', ' ')} {score} in {summary['wall_seconds']:.0f} s{_row(spec, root)}"
        else:
            words = "stopped, checkpoint written"
        line = f"[{self.count}/{len(self.seconds)}] {spec.title}: {words}; {self._left()} left"
        tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()

    def _left(self) -> str:
        return duration(self.forecast.left())

    def _announce(self) -> None:
        """Say once how long everything takes, as soon as it is known from steps on this machine."""
        if not self.announced and self.forecast.calibrated:
            self.announced = True
            tqdm.write(f"From the first steps on this machine: about {self._left()} left.", file=sys.stderr)


def _row(spec: Run, root: Path) -> str:
    """The mean of the run's row so far, if it has several seeds."""
    records = [record_of(replace(spec, seed=seed), root) for seed in range(spec.seed + 1)]
    values = [record.summary()[spec.score] for record in records if record.done]
    return f" (mean of {len(values)} seeds: {_in_words(spec.score, fmean(values))})" if len(values) > 1 else ""


def _in_words(score: str, value: float) -> str:
    return f"{100 * value:.1f} %" if in_percent(score) else f"{value:.4g}"
