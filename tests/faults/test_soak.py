"""The soak's own functions with small numbers: `make soak` has the large ones, and pools and analyses beside them."""

import pytest

from tests.faults import inputs, soak


@pytest.mark.slow
def test_a_training_killed_at_random_instants_ends_as_if_it_had_not_been():
    found = soak.killed_trainings(4, seed=1)
    assert found["kills"] == 4
    assert found["finished runs"] >= 1
    assert sum(found[name] for name in ("wrong ends", "corrupt records", "steps lost beyond the checkpoint")) == 0, (
        found
    )


def test_readers_of_damaged_records_refuse_or_read_and_never_fail():
    found = inputs.read(1500, seed=1)
    assert found["inputs"] == 1500
    assert found["refused"] > 500, "the inputs are too tame to show anything"
    assert found["crashes"] == found["writes outside"] == 0
