"""Intervals, p values, adjustment, equivalence and power, each against a second way."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from analysis.statistics import Interval, holm, mean_interval, paired_difference


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


def test_equal_values_have_no_spread_at_all():
    """Their floating-point mean differs from them: numpy's standard deviation of these is not zero."""
    assert np.std([0.1] * 3, ddof=1) > 0
    assert mean_interval([0.1] * 3).half_width == 0.0


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


VALUES = [[0.1, 0.7], [3.0, 1.0, 4.0, 1.0, 5.0], [-0.4, 0.2, 0.1, -0.3, 0.3, 0.25, -0.1, 0.0]]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("line", [0.0, 0.5])
def test_p_value_equals_scipys_t_test(values, line):
    assert mean_interval(values).p_value(line) == pytest.approx(stats.ttest_1samp(values, line).pvalue, rel=1e-9)


def test_p_value_without_spread_or_interval():
    assert mean_interval([2.0, 2.0]).p_value() == 0.0
    assert mean_interval([0.0, 0.0]).p_value() == 1.0
    assert math.isnan(mean_interval([2.0]).p_value())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("margin", [0.2, 1.0, 5.0])
def test_equivalence_is_statsmodels_and_the_90_percent_interval(values, margin):
    interval = mean_interval(values)
    expected, *_ = ttost_paired(np.array(values), np.zeros(len(values)), -margin, margin)
    assert interval.equivalence_p(margin) == pytest.approx(expected, rel=1e-9)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert interval.equivalent(margin) == (-margin < low and high < margin)
    assert interval.mean + interval.equivalence_half_width == pytest.approx(high)


def test_nothing_is_equivalent_without_a_margin_or_an_interval():
    assert not mean_interval([0.0, 0.1, -0.1]).equivalent(math.nan)
    assert not mean_interval([0.0]).equivalent(1.0)
    assert mean_interval([0.0, 0.0]).equivalent(1.0)


def by_hand(p_values):
    """Holm's step-down: the k-th smallest of n times n - k, and never less than the one before."""
    adjusted = [math.nan] * len(p_values)
    for k, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        smaller = [adjusted[j] for j in range(len(p_values)) if not math.isnan(adjusted[j])]
        adjusted[i] = max([min(1.0, p_values[i] * (len(p_values) - k)), *smaller])
    return adjusted


@pytest.mark.parametrize("p_values", [[0.01, 0.04, 0.03], [0.5, 0.001, 0.02, 0.02], [0.9, 0.8], [0.03]])
def test_holm_by_hand(p_values):
    assert holm(p_values) == pytest.approx(by_hand(p_values))


def test_a_missing_p_value_is_in_no_family():
    assert holm([0.01, math.nan, 0.04]) == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)
    assert holm([]) == []


def test_holm_keeps_the_share_of_families_with_a_false_finding():
    """With twenty true nulls a family, about 5 % of the families have one below 5 %, and 64 % unadjusted."""
    families = np.random.default_rng(0).uniform(size=(1000, 20))
    assert np.mean([min(holm(family)) < 0.05 for family in families.tolist()]) == pytest.approx(0.05, abs=0.015)
    assert np.mean(families.min(axis=1) < 0.05) == pytest.approx(0.64, abs=0.05)


@pytest.mark.parametrize("n", [3, 8, 16])
def test_four_in_five_samples_with_the_detectable_effect_are_significant(n):
    """By simulation, and by statsmodels' own solution, which also counts detections with the wrong sign."""
    effect = Interval(0.0, stats.t.ppf(0.975, n - 1) / n**0.5, n).detectable  # a standard deviation of 1
    samples = np.random.default_rng(n).normal(effect, 1.0, size=(20_000, n))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.012)
    solved = TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8, alternative="two-sided")
    assert effect == pytest.approx(solved, rel=1e-4)


def test_the_number_of_values_needed_is_the_smallest_that_detects_the_mean():
    seen = Interval(0.739, 0.751, 8)
    effect, n = seen.mean / seen.deviation, seen.needed
    powers = [TTestPower().power(effect, count, 0.05, alternative="two-sided") for count in (n - 1, n)]
    assert powers[0] < 0.8 <= powers[1]
    assert Interval(1e-6, 1.0, 8).needed is None
    assert Interval(0.0, 0.0, 8).needed is None
