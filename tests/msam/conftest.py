"""Both ways of moving weights: lent memory, as on the CPU, and in their place, as on a GPU."""

import pytest

from msam import perturbation

IN_BOTH_WAYS = ("test_gradient", "test_properties", "test_precision", "test_composition")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of these modules runs in both ways."""
    if metafunc.module.__name__.rpartition(".")[2] in IN_BOTH_WAYS and "way" in metafunc.fixturenames:
        metafunc.parametrize("way", [("cpu",), ()], ids=["lent", "in place"], indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> None:
    """Lends memory on these types of devices; elsewhere as it is."""
    lent_on = getattr(request, "param", perturbation.LENT_ON)
    usual, perturbation.LENT_ON = perturbation.LENT_ON, lent_on
    yield
    perturbation.LENT_ON = usual
