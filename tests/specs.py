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


def four_methods(base: Training, *, micro_batches: int, sam_rho: float, msam_rho: float) -> list[Training]:
    """A block without further arms: base optimizer, the control over the same micro-batches, SAM and mSAM."""
    return [
        base,
        replace(base, micro_batches=micro_batches),
        replace(base, rho=sam_rho),
        replace(base, micro_batches=micro_batches, rho=msam_rho),
    ]


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
