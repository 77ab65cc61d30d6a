"""The functions of `make soak` with small numbers; pools and analyses are killed only by `make soak`."""

import pytest

from tests.faults import inputs, soak


@pytest.mark.rare
def test_training_killed_at_random_times_matches_uninterrupted_training():
    counts = soak.killed_trainings(4, seed=1)
    assert counts["kills"] == 4
    assert counts["finished runs"] >= 1
    faults = ("wrong results", "corrupt records", "steps lost beyond the checkpoint")
    assert sum(counts[name] for name in faults) == 0, counts


@pytest.mark.rare
def test_readers_of_damaged_records_return_or_reject_and_never_crash():
    counts = inputs.read(1500, seed=1)
    assert counts["inputs"] == 1500
    assert counts["rejected"] > 500, "the damage is too weak to show anything"
    assert counts["crashes"] == counts["writes outside"] == 0
