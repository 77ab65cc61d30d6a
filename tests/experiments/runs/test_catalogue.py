"""The catalogue: what an experiment may declare about its comparisons."""

import pytest

from experiments import resnet_cifar, wrn_cifar
from experiments.harness.runs import catalogue
from experiments.harness.runs.checks import PROFILES, SpecError
from experiments.harness.runs.methods import ARMS


def test_every_profile_has_a_margin_of_equivalence():
    assert set(catalogue.MARGINS) == set(PROFILES)
    assert all(margin > 0 for margin in catalogue.MARGINS.values())


@pytest.mark.parametrize("profile", PROFILES)
def test_the_primary_comparison_is_msam_over_the_shared_perturbation_on_the_resnet(profile):
    primary = catalogue.primary(profile)
    assert (primary.table, primary.dataset, primary.arms) == ("table1", "cifar10", ("msam", "shared"))
    assert primary.model in {cell.model for cell in resnet_cifar.RUNS[profile]}
    assert set(primary.arms) <= set(ARMS)


def test_an_unknown_arm_is_refused(monkeypatch):
    monkeypatch.setattr(resnet_cifar, "PRIMARY", ("msam", "share"))
    with pytest.raises(SpecError, match="Unknown arm 'share': did you mean shared"):
        catalogue.catalogue()
    monkeypatch.setattr(resnet_cifar, "PRIMARY", ("msam",))
    with pytest.raises(SpecError, match="must be two arms"):
        catalogue.catalogue()


def test_a_second_primary_comparison_is_refused(monkeypatch):
    monkeypatch.setattr(wrn_cifar, "PRIMARY", ("msam", "sam"), raising=False)
    with pytest.raises(SpecError, match="resnet_cifar and wrn_cifar declare PRIMARY, but a profile has one"):
        catalogue.catalogue()


def test_without_a_declaration_there_is_none(monkeypatch):
    monkeypatch.delattr(resnet_cifar, "PRIMARY")
    assert catalogue.primary("cpu") is None
