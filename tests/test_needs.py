"""A test that needs what not every machine has cannot forget to say so."""

import pytest

from tests import needs
from tests.slurm.loopback import Loopback


def test_a_test_without_the_mark_gets_no_cluster_on_any_machine():
    with pytest.raises(RuntimeError, match=r"needs slurm: mark it with @pytest.mark.needs\('slurm'\)"):
        Loopback()


@pytest.mark.parametrize("need", sorted(needs.REQUIRED_BY))
def test_what_the_environment_requires_fails_instead_of_skipping(need, monkeypatch):
    monkeypatch.delenv(needs.REQUIRED_BY[need], raising=False)
    with pytest.raises(pytest.skip.Exception, match="the reason"):
        needs.unavailable(need, "the reason")
    monkeypatch.setenv(needs.REQUIRED_BY[need], "required")
    with pytest.raises(pytest.fail.Exception, match="the reason"):
        needs.unavailable(need, "the reason")


@pytest.mark.parametrize("need", ["slurm", "browser", "npm", "flock"])
def test_a_missing_program_is_named_in_a_sentence(need, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "is not on PATH" in needs.CHECKS[need]()
