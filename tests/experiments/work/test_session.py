"""Sessions, which are passed to workers."""

import pickle
from pathlib import Path

import pytest

from experiments.harness.work.session import Interrupted, Session


def test_a_session_can_be_pickled():
    session = Session(Path("results"), Path("data"), {"commit": "abc"})
    assert pickle.loads(pickle.dumps(session)) == session


def test_a_session_ends_a_run_only_if_asked():
    Session(Path()).stop_if_asked("never")
    with pytest.raises(Interrupted, match="after 3"):
        Session(Path(), stop=lambda: True).stop_if_asked("after 3")
