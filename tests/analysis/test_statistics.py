"""Intervals against textbook values and against scipy."""

import math

import pandas as pd
import pytest
from scipy import stats

from analysis.statistics import Interval, mean_interval, paired_difference


def test_mean_interval_by_hand():
    # Standard deviation 1 and t(0.975, 2 degrees) = 4.303, so 4.303 / sqrt(3) = 2.484.
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.half_width == pytest.approx(2.484, abs=5e-4)
    assert interval.n == 3


@pytest.mark.parametrize("values", [[0.1, 0.7], [3.0, 1.0, 4.0, 1.0, 5.0], [1e-9, 2e-9, 4e-9]])
def test_mean_interval_equals_scipys(values):
    mean, half_width, _ = mean_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half_width, mean + half_width) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_one_value_has_no_interval_and_none_has_no_mean():
    one, none = mean_interval([7.0]), mean_interval([])
    assert (one.mean, one.n) == (7.0, 1)
    assert math.isnan(one.half_width)
    assert math.isnan(none.mean)
    assert none.n == 0


def test_paired_difference_uses_common_seeds_in_any_order():
    a = pd.Series({2: 9.0, 0: 5.0, 1: 7.0})
    b = pd.Series({0: 4.0, 1: 4.0, 5: 100.0})
    difference = paired_difference(a, b)
    assert difference == pytest.approx(tuple(mean_interval([1.0, 3.0])))
    assert difference.n == 2


def test_pairing_is_not_a_difference_of_independent_means():
    a, b = pd.Series([1.0, 5.0, 9.0]), pd.Series([0.0, 4.0, 8.0])
    assert paired_difference(a, b).half_width == 0.0


@pytest.mark.parametrize(
    ("interval", "significant"),
    [
        (Interval(1.0, 0.9, 3), True),
        (Interval(-1.0, 0.9, 3), True),
        (Interval(1.0, 1.1, 3), False),
        (Interval(0.0, 0.0, 3), False),
        (Interval(1.0, math.nan, 1), False),
        (Interval(math.nan, math.nan, 0), False),
    ],
)
def test_significant(interval, significant):
    assert interval.significant is significant
