"""What every worker of a command is handed, and what ends a run before its end. Standard library only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is written."""


class Diverged(Exception):
    """The loss is no longer finite."""


def _unreported(step: int, steps: int) -> None:
    """A session that reports to nobody."""


def _never() -> bool:
    """A session that goes on to the end."""
    return False


@dataclass(frozen=True)
class Session:
    """What the runs of one command have in common: none of it changes a number.

    It can be pickled, and so sent to a worker, as long as `report` and `stop` can.
    """

    root: Path
    """The results root; a run's record is `root/runs/<run_id>/`."""
    data_root: Path | None = None
    """A folder to look for data in first."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, for the records: `provenance.environment`."""
    report: Callable[[int, int], None] = _unreported
    """Called with (steps done, steps in all) as a run goes on."""
    stop: Callable[[], bool] = _never
    """Asked often; True writes down what there is and ends the run with `Interrupted`."""

    def leave_if_asked(self, words: str) -> None:
        """End the run here if it is asked to stop.

        Raises:
            Interrupted: with these words, if `stop` says so.
        """
        if self.stop():
            raise Interrupted(words)
