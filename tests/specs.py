"""The spec that tests start from, to be changed with `replace`, and an arm of their own."""

from dataclasses import replace

import pytest

from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.spec import Training

BASE = Training(
    profile="smoke",
    dataset="cifar10",
    model="resnet8",
    base_optimizer="sgd",
    learning_rate=0.1,
    epochs=2,
    batch_size=32,
)


@pytest.fixture
def twice(monkeypatch):
    """An arm that only its block's base defines."""
    arm = replace(
        ARMS["base"],
        name="twice",
        words="{base}, twice the epochs",
        change=lambda base: {"epochs": 2 * base["epochs"]},
        against=("base",),
        claimed=("base",),
    )
    monkeypatch.setitem(ARMS, "twice", arm)
    return arm
