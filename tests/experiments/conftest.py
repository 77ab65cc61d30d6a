"""Shared by the tests of texts."""

import pytest

from experiments.harness import texts
from experiments.harness.spec import TEXTS


@pytest.fixture
def dozens(monkeypatch):
    """Made-up tasks are whole with a dozen rows."""
    monkeypatch.setattr(texts, "TEXTS", {**dict.fromkeys(TEXTS, (12, 12)), "snippets": TEXTS["snippets"]})
