"""The time left of many runs on one machine, corrected by what runs take here as soon as some have trained a while."""

import statistics
from collections.abc import Mapping, Sequence

from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.spec import Run, Timing

ENOUGH = 0.08
"""The share of a run that must be trained before its speed counts."""

LONG_SECONDS = 5.0
"""The expected time of runs that also correct the times of other models; that of shorter ones varies too much."""


class Forecast:
    """Expected times of runs, times how much longer or shorter runs take on this machine, now.

    Args:
        specs: All runs, in the order in which they start.
        estimate: Expected seconds of each run, from earlier runs, perhaps on another machine.
        jobs: Number of runs at a time; timing runs go alone.
    """

    def __init__(self, specs: Sequence[Run], estimate: Estimate, jobs: int) -> None:
        self.expected = {spec: estimate.weight(spec) for spec in specs}
        self._overhead, self._jobs = estimate.overhead, jobs
        self._waiting = dict.fromkeys(specs)
        self._begun: dict[Run, tuple[float, float]] = {}
        self._fractions: Mapping[Run, float] = {}
        self._started: dict[Run, float] = {}
        self._besides: list[float] = []
        """Seconds before the first step of a run."""
        self._measured: dict[Run, float] = {}
        """Actual over expected seconds of the steps, by run."""

    @property
    def calibrated(self) -> bool:
        """Whether a run has trained enough here to correct the expected times."""
        return bool(self._of_long_runs())

    def observe(self, fractions: Mapping[Run, float], now: float) -> None:
        """Take note of the active runs and the fraction of each that is done."""
        self._fractions = dict(fractions)
        for spec, fraction in fractions.items():
            self._waiting.pop(spec, None)
            self._started.setdefault(spec, now)
            if fraction:  # before its first step a run starts its process and reads its data
                if spec not in self._begun:
                    self._besides.append(now - self._started[spec])
                began, already = self._begun.setdefault(spec, (now, fraction))
                if fraction - already >= ENOUGH:
                    self._measure(spec, now - began, fraction - already)

    def finished(self, spec: Run, now: float) -> None:
        """Take note that a run has ended."""
        self._waiting.pop(spec, None)
        if spec in self._started and spec not in self._begun:  # it was too short to report a step
            self._besides.append(now - self._started[spec])
        began, already = self._begun.get(spec, (now, 1.0))
        if 1 - already >= ENOUGH:
            self._measure(spec, now - began, 1 - already)
        self._fractions = {other: f for other, f in self._fractions.items() if other != spec}

    def left(self) -> float:
        """Seconds until all runs have ended."""
        rest = {spec: self.seconds(spec) * (1 - fraction) for spec, fraction in self._fractions.items()}
        rest |= {spec: self.seconds(spec) for spec in self._waiting}
        alone = sum(seconds for spec, seconds in rest.items() if isinstance(spec, Timing))
        others = [seconds for spec, seconds in rest.items() if not isinstance(spec, Timing)]
        return alone + max(sum(others) / self._jobs, max(others, default=0.0))

    def seconds(self, spec: Run) -> float:
        """Seconds of a whole run: as expected, times the median ratio of its model's runs here, else of all runs."""
        alike = [ratio for run, ratio in self._measured.items() if run.model == spec.model and run.kind == spec.kind]
        ratios = alike or self._of_long_runs() or [1.0]
        besides = statistics.median(self._besides) if self._besides else self._overhead
        return besides + (self.expected[spec] - self._overhead) * statistics.median(ratios)

    def _of_long_runs(self) -> list[float]:
        return [ratio for run, ratio in self._measured.items() if self.expected[run] >= LONG_SECONDS]

    def _measure(self, spec: Run, seconds: float, fraction: float) -> None:
        self._measured[spec] = seconds / max((self.expected[spec] - self._overhead) * fraction, 1e-9)
