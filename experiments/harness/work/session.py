"""The session that all workers of a command share, and the exceptions that end a run early. Standard library only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Interrupted(Exception):
    """The run was asked to stop, after its checkpoint was written."""


class Diverged(Exception):
    """The loss is no longer finite."""


def _no_report(step: int, steps: int) -> None:
    """The default: no progress reports."""


def _never() -> bool:
    """The default: never stop early."""
    return False


@dataclass(frozen=True)
class Session:
    """What the runs of one command share. None of it changes a run's numbers.

    It can be pickled, and so passed to a worker, if `report` and `stop` can.
    """

    root: Path
    """The results root; a run's record is `root/runs/<run_id>/`."""
    data_root: Path | None = None
    """A folder to search for data first."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Provenance, for the records: `provenance.environment`."""
    report: Callable[[int, int], None] = _no_report
    """Called with (steps done, total steps) during a run."""
    stop: Callable[[], bool] = _never
    """Called often; if it returns True, the run saves its state and raises `Interrupted`."""

    def stop_if_asked(self, words: str) -> None:
        """End the run if it is asked to stop.

        Raises:
            Interrupted: with these words, if `stop` returns True.
        """
        if self.stop():
            raise Interrupted(words)
