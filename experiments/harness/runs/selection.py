"""The runs that a command line selects."""

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
    """The runs that a command works on."""

    target: Positional[Annotated[str, arg(metavar="TARGET", help="An experiment or a table; see `list`.")]]
    profile: Annotated[str, arg(metavar="PROFILE", help="Size of the runs: smoke, cpu, gpu or paper.")] = "cpu"
    seeds: Annotated[int | None, arg(help="Number of paired seeds, 0, 1, ...; default: the profile's.")] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="FIELD=VALUE", help="Change a field of every spec; tables leave such runs out."),
    ] = ()
    results: Annotated[Path, arg(metavar="DIR", help="The results root.")] = DEFAULT_ROOT

    @property
    def specs(self) -> list[Run]:
        """The runs; a run that measures a network is preceded by the run that trains it.

        Raises:
            SpecError: if the target is unknown or its specs cannot be run.
        """
        return with_networks(catalogue.runs(self.target, self.profile, self.seeds, self.set))

    @property
    def root(self) -> Path:
        """The results root as an absolute path."""
        return self.results.absolute()

    def __str__(self) -> str:
        return f"{self.target} ({self.profile})"
