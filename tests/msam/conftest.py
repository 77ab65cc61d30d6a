"""Both ways of moving weights: other memory, as on the CPU, and in their place, as on a GPU."""

import pytest

from msam import perturbation
from tests import needs

IN_BOTH_WAYS = ("test_gradient", "test_properties", "test_precision", "test_composition")


collect_ignore_glob = ["zoo*.py"] if any(map(needs.reason, ("timm", "torchvision", "transformers"))) else []
"""Not imported for their doctests where they cannot be; the tests of `test_zoo.py` then skip."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of these modules runs in both ways."""
    if metafunc.module.__name__.rpartition(".")[2] in IN_BOTH_WAYS and "way" in metafunc.fixturenames:
        metafunc.parametrize("way", [("cpu",), ()], ids=["swapped", "in place"], indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> None:
    """Other memory on these types of devices; elsewhere as it is."""
    swapped_on = getattr(request, "param", perturbation.SWAPPED_ON)
    usual, perturbation.SWAPPED_ON = perturbation.SWAPPED_ON, swapped_on
    yield
    perturbation.SWAPPED_ON = usual
