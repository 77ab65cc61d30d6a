"""What all tests of the analysis share."""

import pytest

from experiments.harness.runs import record


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """A test's folders need not survive a power cut: waiting for the disk is most of these tests' time."""
    monkeypatch.setattr(record.os, "fsync", lambda descriptor: None)
