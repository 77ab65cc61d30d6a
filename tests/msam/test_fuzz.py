"""A hundred cases of the fuzzer, always the same ones, and that it would notice what is wrong."""

import pytest
import torch

import msam
from tests.msam import fuzz
from tests.msam.fuzz_cases import case

CASES, AT_ONCE = 100, 20

FAULTS = 15
"""A case that every way can do, with few operations."""


@pytest.mark.filterwarnings("ignore")  # of torch, about nets that nobody would train
@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_random_cases_are_right_or_refused(first):
    wrong = {seed: what for seed in range(first, first + AT_ONCE) if (what := fuzz.tried(seed, with_faults=False)[2])}
    assert not wrong, "python -m tests.msam.fuzz --cases 1 --seed " + str(wrong)


@pytest.mark.filterwarnings("ignore")
def test_a_fault_leaves_nothing_half_way():
    assert fuzz.faults(FAULTS, every=12)


def test_a_case_is_the_same_each_time():
    a, b = case(7), case(7)
    assert a.text == b.text
    assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), b.net.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_gradient_is_noticed(monkeypatch):
    """That of weights which are perturbed a hundred-thousandth too far."""
    usual = msam.backward
    monkeypatch.setattr(msam, "backward", lambda *given, rho, **more: usual(*given, rho=1.00001 * rho, **more))
    assert any("gradient is off" in fuzz.tried(seed, with_faults=False)[2] for seed in range(8))
