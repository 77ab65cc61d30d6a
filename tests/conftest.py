"""For all tests: what a machine lacks is a skip with a sentence as its reason, see `tests/needs.py`."""

import pytest

from tests import needs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fixture that needs something marks the tests that use it, in time for `-m needs`."""
    for item in items:
        for fixture in needs.BY_FIXTURE.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.needs(needs.BY_FIXTURE[fixture]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the test before its fixtures are made, unless all its needs are met."""
    needs.current = frozenset(need for mark in item.iter_markers("needs") for need in mark.args)
    for need in sorted(needs.current):
        needs.require(need)
