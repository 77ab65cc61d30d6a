"""Which runs a command is about, as its command line says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, UseAppendAction, arg

from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_networks
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import Run


@dataclass(frozen=True)
class Runs:
    """Which runs a command is about."""

    target: Positional[Annotated[str, arg(metavar="TARGET", help="An experiment or a table, as `list` names them.")]]
    profile: Annotated[str, arg(metavar="PROFILE", help="Size of the runs: smoke, cpu or paper.")] = "cpu"
    seeds: Annotated[int | None, arg(help="How many paired seeds, 0, 1, ...; left out: the profile's own.")] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="FIELD=VALUE", help="Change fields of every spec; the tables leave such runs out."),
    ] = ()
    results: Annotated[Path, arg(metavar="DIR", help="The results root.")] = DEFAULT_ROOT

    @property
    def specs(self) -> list[Run]:
        """The runs, and in front of those that measure a network the one that trains it.

        Raises:
            SpecError: if they are unknown, or cannot be run.
        """
        return with_networks(catalogue.runs(self.target, self.profile, self.seeds, self.set))

    @property
    def root(self) -> Path:
        """The results root, whatever folder the command goes to."""
        return self.results.absolute()

    def __str__(self) -> str:
        return f"{self.target} ({self.profile})"
