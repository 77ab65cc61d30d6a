"""Fixtures of the tests of the experiments."""

import os
from dataclasses import replace

import pytest

from experiments.harness.tasks import cifar, glue_files
from experiments.harness.tasks.cifar import load_cifar
from tests.specs import twice  # noqa: F401, a fixture


@pytest.fixture
def dozens(monkeypatch):
    """Let invented tasks be complete with a dozen rows."""
    for name, task in glue_files.TASKS.items():
        if name != "snippets":
            monkeypatch.setitem(glue_files.TASKS, name, replace(task, train=12, test=12))


@pytest.fixture(autouse=True)
def quick_images(monkeypatch):
    """Read and verify the images in the usual place once per process, not for each run that is trained in it."""
    monkeypatch.setattr(cifar, "load_cifar", once)


def once(name, root=None):
    """As `load_cifar`; a folder of the caller's is read again each time."""
    if root is not None:
        return load_cifar(name, root)
    place = name, os.environ.get("MSAM_DATA"), os.environ.get("XDG_CACHE_HOME")
    if place not in _loaded:
        _loaded[place] = load_cifar(name)
    return _loaded[place]


_loaded = {}
