"""What workers are handed."""

import pickle
from pathlib import Path

import pytest

from experiments.harness.work.session import Interrupted, Session


def test_it_can_be_sent_to_a_worker():
    session = Session(Path("results"), Path("data"), {"commit": "abc"})
    assert pickle.loads(pickle.dumps(session)) == session


def test_it_ends_a_run_only_if_it_is_asked_to():
    Session(Path()).leave_if_asked("never")
    with pytest.raises(Interrupted, match="after 3"):
        Session(Path(), stop=lambda: True).leave_if_asked("after 3")
