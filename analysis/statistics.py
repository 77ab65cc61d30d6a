"""Means with their 95 % intervals, alone and paired by seed."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95


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


def mean_interval(values: Iterable[float]) -> Interval:
    """The mean of independent values and half the width of its two-sided 95 % Student t interval."""
    array = np.asarray(list(values), dtype=float)
    n = len(array)
    if n < 2:
        return Interval(float(array[0]) if n else float("nan"), float("nan"), n)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, df=n - 1)
    return Interval(float(array.mean()), float(quantile * stats.sem(array)), n)


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
