"""Every setting of every recipe."""

from collections.abc import Iterator

from tests.integrations import hugging_face, lightnings, loops, ranks
from tests.integrations.problems import Case


def alone() -> list[Case]:
    """Those of one process."""
    return [*hugging_face.cases(), *lightnings.cases(), *loops.cases()]


def all_cases() -> Iterator[Case]:
    yield from alone()
    yield from ranks.cases()
