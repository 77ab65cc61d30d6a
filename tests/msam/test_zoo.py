"""Models of other libraries: the loop is right, and one pass is right or refused by name."""

import pytest

try:
    from tests.msam.zoo import check
    from tests.msam.zoo_models import ZOO
except ModuleNotFoundError:  # the tests skip and name the library
    ZOO = {}

pytestmark = pytest.mark.needs("timm", "torchvision", "transformers")


@pytest.mark.rare
@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_done_or_refused(name, m):
    outcome = check(name, m)
    assert outcome == "equal" or outcome.startswith("refused: ")


def test_there_are_many():
    assert len(ZOO) >= 60
