"""Shared by the tests of texts."""

from dataclasses import replace

import pytest

from experiments.harness.tasks import glue_files


@pytest.fixture
def dozens(monkeypatch):
    """Made-up tasks are whole with a dozen rows."""
    for name, task in glue_files.TASKS.items():
        if name != "snippets":
            monkeypatch.setitem(glue_files.TASKS, name, replace(task, train=12, test=12))
