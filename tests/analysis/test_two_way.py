"""The two-way bootstrap, against explicit loops and against its limits."""

import numpy as np
import pytest

from analysis.two_way import two_way_interval


def arms(gains):
    """Predictions and labels whose differences of correctness are these gains, (seeds, examples) in -1, 0, 1."""
    labels = np.full(gains.shape[1], 3, dtype=np.uint8)
    a, b = (np.where(sign * gains > 0, 3, 5).astype(np.uint8) for sign in (1, -1))
    return list(a), list(b), labels


def percentiles(means):
    return tuple(np.quantile(100 * np.array(means), [0.025, 0.975]))


def draws(axis, size, resamples):
    random = np.random.default_rng(axis)
    return [random.integers(size, size=size) for _ in range(resamples)]


def test_it_equals_explicit_loops_over_drawn_seeds_and_examples():
    gains = np.random.default_rng(7).integers(-1, 2, size=(4, 7))
    means = []
    for seeds, examples in zip(draws(0, 4, 300), draws(1, 7, 300), strict=True):
        total = 0
        for seed in seeds:
            for example in examples:
                total += gains[seed, example]
        means.append(total / (4 * 7))
    assert two_way_interval(*arms(gains), resamples=300) == pytest.approx(percentiles(means), abs=1e-12)


def test_with_equal_examples_it_is_the_bootstrap_over_seeds_and_with_equal_seeds_that_over_examples():
    effects = np.array([1, 1, 0, -1, 1, 0])
    by_seed = [effects[seeds].mean() for seeds in draws(0, 6, 2000)]
    repeated = np.repeat(effects[:, None], 40, axis=1)
    assert two_way_interval(*arms(repeated)) == pytest.approx(percentiles(by_seed), abs=1e-12)
    by_example = [effects[examples].mean() for examples in draws(1, 6, 2000)]
    repeated = np.repeat(effects[None], 9, axis=0)
    assert two_way_interval(*arms(repeated)) == pytest.approx(percentiles(by_example), abs=1e-12)


def test_it_is_as_wide_as_the_sum_of_the_variances_of_seeds_and_examples():
    """For gains that are a sum of an effect of the seed and one of the example, the variances add."""
    random = np.random.default_rng(3)
    gains = random.integers(-1, 1, size=(12, 1)) + random.integers(0, 2, size=(1, 400))
    low, high = two_way_interval(*arms(gains))
    variances = gains.mean(1).var() / 12 + gains.mean(0).var() / 400
    assert high - low == pytest.approx(2 * 1.96 * 100 * variances**0.5, rel=0.06)
    assert (low + high) / 2 == pytest.approx(100 * gains.mean(), abs=2)


def test_equal_arms_have_no_interval_around_zero_and_one_seed_has_none():
    a, b, labels = arms(np.zeros((3, 5), dtype=int))
    assert two_way_interval(a, b, labels) == (0, 0)
    assert np.isnan(two_way_interval(a[:1], b[:1], labels)).all()


def test_different_seeds_or_examples_are_rejected():
    a, b, labels = arms(np.ones((3, 5), dtype=int))
    with pytest.raises(ValueError, match="3 seeds and the other 2"):
        two_way_interval(a, b[:2], labels)
    with pytest.raises(ValueError, match="same test examples"):
        two_way_interval(a, b, labels[:4])
