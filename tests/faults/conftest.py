"""Fixtures of the tests of faults."""

from tests.experiments.conftest import quick_images  # noqa: F401, a fixture
