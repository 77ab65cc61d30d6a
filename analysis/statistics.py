"""Means with their 95 % intervals, alone and paired by seed; p values, Holm's adjustment, equivalence and power.

Intervals, p values and equivalence use scipy's t distribution, Holm's adjustment and power those of statsmodels.
"""

import gc
import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from analysis.contrasts import ALPHA

CONFIDENCE = 1 - ALPHA
POWER = 0.8
LARGEST = 10_000


class Interval(NamedTuple):
    """A mean, half the width of its 95 % interval, and the number of values behind it."""

    mean: float
    """NaN without values."""
    half_width: float
    """NaN with fewer than two values: one run has no spread."""
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero; never with fewer than two values."""
        return bool(abs(self.mean) > self.half_width)

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN with fewer than two values."""
        return self.half_width / float(stats.t.ppf((1 + CONFIDENCE) / 2, df=self.n - 1)) if self.n > 1 else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation of the values; NaN with fewer than two."""
        return self.error * math.sqrt(self.n)

    def p_value(self, line: float = 0.0) -> float:
        """The two-sided p value of Student's t test that the mean is `line`; NaN with fewer than two values.

        Without any spread it is 1 on the line and 0 off it.
        """
        if self.n < 2:
            return math.nan
        if not self.error:
            return float(self.mean == line)
        return float(2 * stats.t.sf(abs(self.mean - line) / self.error, self.n - 1))

    def equivalence_p(self, margin: float) -> float:
        """The p value of two one-sided t tests (TOST) that the mean lies beyond -margin or beyond margin.

        It is below 5 % if and only if the 90 % interval lies within the margin. NaN with fewer than two values or
        without a margin.
        """
        if self.n < 2 or math.isnan(margin):
            return math.nan
        room = margin - abs(self.mean)
        if not self.error:
            return float(room <= 0)
        return float(stats.t.sf(room / self.error, self.n - 1))

    def equivalent(self, margin: float) -> bool:
        """Whether the 90 % interval lies within the margin on both sides of zero."""
        return self.equivalence_p(margin) < ALPHA

    @property
    def equivalence_half_width(self) -> float:
        """Half the width of the 90 % interval; NaN with fewer than two values."""
        return float(stats.t.ppf(1 - ALPHA, df=self.n - 1)) * self.error if self.n > 1 else math.nan

    @property
    def detectable(self) -> float:
        """The smallest difference that as many values with this spread detect with 80 % power; NaN below two values.

        Detecting means a two-sided p value below 5 %, without adjustment.
        """
        return _detectable_effect(self.n) * self.deviation if self.n > 1 else math.nan

    @property
    def needed(self) -> int | None:
        """How many values with this spread would detect this mean with 80 % power; None if more than `LARGEST`."""
        if self.n < 2 or not self.error:
            return None
        effect = abs(self.mean) / self.deviation
        found = bisect_left(range(2, LARGEST + 1), POWER, key=lambda n: _power(effect, n)) + 2
        return found if found <= LARGEST else None


def mean_interval(values: Iterable[float]) -> Interval:
    """The mean of independent values and half the width of its two-sided 95 % Student t interval.

    Equal values have a width of exactly zero, although their floating-point mean may not be one of them.
    """
    array = np.asarray(list(values), dtype=float)
    n = len(array)
    if n < 2:
        return Interval(float(array[0]) if n else float("nan"), float("nan"), n)
    error = array.std(ddof=1) / math.sqrt(n) if np.ptp(array) else 0.0
    return Interval(float(array.mean()), float(_quantile(n - 1) * error), n)


@lru_cache(maxsize=10_000)
def _quantile(degrees: int) -> float:
    """What a standard error is multiplied with for half the width of a two-sided 95 % interval."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, df=degrees))


def bootstrap_interval(values: Iterable[float]) -> tuple[float, float]:
    """The ends of the 95 % percentile bootstrap interval of the mean; NaN with fewer than two values.

    Equal values give equal resamples. With few values the interval is too narrow: three values have only ten distinct
    means.
    """
    array = np.asarray(list(values), dtype=float)
    if len(array) < 2:
        return float("nan"), float("nan")
    drawn = stats.bootstrap(
        (array,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def paired_difference(a: pd.Series, b: pd.Series) -> Interval:
    """The mean of a - b over the seeds that both have, with its 95 % Student t interval.

    Args:
        a: values indexed by seed.
        b: values indexed by seed; at equal seeds both runs had the same initial weights and batches.
    """
    return mean_interval(paired(a, b))


def paired(a: pd.Series, b: pd.Series) -> np.ndarray:
    """a - b at the seeds that both have, in the order of the seeds."""
    common = sorted(set(a.index) & set(b.index))
    return a.loc[common].to_numpy(dtype=float) - b.loc[common].to_numpy(dtype=float)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values of a family of tests, in the same order; a missing one (NaN) is in no family."""
    known = [p for p in p_values if not math.isnan(p)]
    gc.freeze()  # statsmodels collects garbage at each call, which takes long with many runs in memory
    try:
        adjusted = iter(multipletests(known, method="holm")[1] if known else ())
    finally:
        gc.unfreeze()
    return [math.nan if math.isnan(p) else float(next(adjusted)) for p in p_values]


def _power(effect: float, n: int) -> float:
    """The probability that a two-sided t test of n values at 5 % detects a mean of `effect` standard deviations.

    Detecting it with the wrong sign does not count; scipy's noncentral t has no value for that at large effects.
    """
    return float(TTestPower().power(effect, n, ALPHA / 2, alternative="larger"))


@lru_cache(maxsize=10_000)
def _detectable_effect(n: int) -> float:
    """The smallest mean, in standard deviations, that n values detect with 80 % power by a two-sided t test at 5 %."""
    return float(optimize.brentq(lambda effect: _power(effect, n) - POWER, 0.0, 20 / math.sqrt(n)))
