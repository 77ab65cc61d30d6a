"""Shared by the tests of texts."""

import pytest

from experiments.harness.runs.facts import TEXTS
from experiments.harness.tasks import glue_files


@pytest.fixture
def dozens(monkeypatch):
    """Made-up tasks are whole with a dozen rows."""
    monkeypatch.setattr(glue_files, "TEXTS", {**dict.fromkeys(TEXTS, (12, 12)), "snippets": TEXTS["snippets"]})
