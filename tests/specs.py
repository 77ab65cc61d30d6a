"""The spec that tests start from, to be changed with `replace`, its four shortest arms, and an arm of their own."""

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


def four_arms(base: Training, *, sam_rho: float, msam_rho: float) -> list[Training]:
    """The base optimizer, the control over four micro-batches, SAM and mSAM."""
    control = replace(base, micro_batches=4)
    return [base, control, replace(base, rho=sam_rho), replace(control, rho=msam_rho)]


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
