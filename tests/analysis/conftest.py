"""Fixtures shared by all tests of the analysis."""

import pytest

from experiments.harness.runs import record
from tests.specs import twice  # noqa: F401, a fixture


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Skip fsync, which takes most of the time: a test's folders need not survive a power cut."""
    monkeypatch.setattr(record.os, "fsync", lambda descriptor: None)
