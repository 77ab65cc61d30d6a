"""Exit statuses and error messages of all commands."""

import pytest

from experiments.harness.runs.command_line import Mistake, end_with
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.spec import SpecError
from experiments.harness.tasks.storage import DataError, DataUnavailable
from slurm.scheduler import SlurmError


def raising(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (lambda: None, 0, ""),
        (lambda: 7, 7, ""),
        (raising(BrokenPipeError()), 0, ""),
        (raising(OSError(28, "No space left", "results")), 2, "results cannot be used (No space left)"),
        (raising(KeyboardInterrupt()), 130, "Stopped."),
        *((raising(kind("rho is wrong")), 2, "rho is wrong\n") for kind in (Mistake, SpecError, RecordError)),
        *((raising(kind("no set")), 2, "no set\n") for kind in (DataError, DataUnavailable, SlurmError)),
    ],
)
def test_a_command_ends_with_one_sentence_and_a_status(command, status, words, capsys):
    with pytest.raises(SystemExit) as end:
        end_with(command, stopped="Stopped.")
    error = capsys.readouterr().err
    assert (end.value.code or 0) == status
    assert words in error
    assert bool(error) == bool(words)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        end_with(raising(ZeroDivisionError()), stopped="")
