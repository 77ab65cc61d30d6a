"""Intervals of a difference of accuracies over training seeds and test examples together.

A paired t interval over seeds takes the test examples as given. The two-way bootstrap draws seeds and examples, both
with replacement, and both arms get the same draws (the pigeonhole bootstrap of Owen 2007, arXiv 0712.1111, which is
conservative). With few seeds a percentile interval is too narrow in turn; the t interval does not have this fault.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from analysis.statistics import CONFIDENCE

RESAMPLES = 2000


def two_way_interval(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], labels: np.ndarray, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The ends of the 95 % two-way bootstrap interval of the accuracy of `a` minus that of `b`, in percent.

    Equal predictions give equal resamples, on every machine.

    Args:
        a: The predicted classes of one arm's networks, one array (N,) for each seed.
        b: Those of the other arm, at the same seeds.
        labels: (N,) The true classes.
        resamples: The number of resamples.

    Returns:
        Two numbers in [-100, 100]; NaN with fewer than two seeds.

    Raises:
        ValueError: if the arms have different seeds, or a network has not one prediction for each label.
    """
    if len(a) != len(b):
        raise ValueError(f"One arm has {len(a)} seeds and the other {len(b)}: give the seeds that both have.")
    if any(one.shape != labels.shape for one in (*a, *b)):
        raise ValueError("A network has not one prediction for each label: give those of the same test examples.")
    if len(a) < 2:
        return float("nan"), float("nan")
    gains = np.stack([(x == labels).astype(np.float32) - (y == labels) for x, y in zip(a, b, strict=True)])
    seeds, examples = (_counts(axis, size, resamples) for axis, size in enumerate(gains.shape))
    # Sums of whole numbers are exact, so the order in which a processor adds them does not matter.
    sums = (seeds.astype(float) * (gains @ examples)).sum(axis=0)
    ends = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    low, high = np.quantile(100 * sums / gains.size, ends)
    return float(low), float(high)


@lru_cache(maxsize=4)
def _counts(axis: int, size: int, resamples: int) -> np.ndarray:
    """How often each resample draws each seed (axis 0) or example (axis 1): (size, resamples), float32."""
    random = np.random.default_rng(axis)
    counts = np.empty((resamples, size), dtype=np.float32)
    for row in counts:
        row[:] = np.bincount(random.integers(size, size=size), minlength=size)
    return counts.T
