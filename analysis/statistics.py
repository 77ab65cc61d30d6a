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
    """NaN if there is no value."""
    half_width: float
    """NaN if there are fewer than two values: one run says nothing about its spread."""
    n: int

    @property
    def separated(self) -> bool:
        """Whether the interval leaves out zero; never with fewer than two values."""
        return bool(abs(self.mean) > self.half_width)


def mean_interval(values: Iterable[float]) -> Interval:
    """The mean of independent values and half the width of its two-sided 95 % Student t interval."""
    array = np.asarray(list(values), dtype=float)
    n = len(array)
    if n < 2:
        return Interval(float(array[0]) if n else float("nan"), float("nan"), n)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, df=n - 1)
    return Interval(float(array.mean()), float(quantile * stats.sem(array)), n)


def paired_difference(a: pd.Series, b: pd.Series) -> Interval:
    """The mean of a - b over the seeds that both have, with its 95 % Student t interval.

    Args:
        a: values indexed by seed.
        b: values indexed by seed; at one seed both runs began alike and saw the same batches.
    """
    common = sorted(set(a.index) & set(b.index))
    return mean_interval(a.loc[common].to_numpy(dtype=float) - b.loc[common].to_numpy(dtype=float))
