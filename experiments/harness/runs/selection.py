"""The runs that a command line selects."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_networks
from experiments.harness.runs.provenance import code_hash
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import Run, SpecError


def published(folder: Path) -> set[str]:
    """The ids of the committed runs below `folder` that this checkout's training code made."""
    try:
        with open(folder / "runs.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return set()
    code = code_hash()
    return {row["run_id"] for row in rows if row.get("code") == code}


@dataclass(frozen=True)
class Runs:
    """The runs that a command works on."""

    target: Positional[Annotated[str, arg(metavar="TARGET", help="An experiment or a table; see `list`.")]]
    profile: Annotated[str, arg(metavar="PROFILE", help="Size of the runs: smoke, cpu, gpu or paper.")] = "cpu"
    seeds: Annotated[
        int | Literal["published"] | None,
        arg(help="Number of paired seeds, 0, 1, ..., or `published`, as the committed tables; default: the profile's."),
    ] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="FIELD=VALUE", help="Change a field of every spec; tables leave such runs out."),
    ] = ()
    where: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="FIELD=VALUE", help="Only the specs with this value of a field, as in --where model=resnet8."),
    ] = ()
    results: Annotated[Path, arg(metavar="DIR", help="The results root.")] = DEFAULT_ROOT
    unpublished: Annotated[
        bool, arg(help="Leave out the runs that the committed results have, made by this training code.")
    ] = False

    @property
    def specs(self) -> list[Run]:
        """The runs; a run that measures a network is preceded by the run that trains it.

        Raises:
            SpecError: if the target is unknown, its specs cannot be run, or `where` leaves none of them.
        """
        specs = catalogue.runs(self.target, self.profile, self.seeds, self.set)
        for field, value in map(catalogue.field_and_value, self.where):
            known = sorted({str(spec.flat.get(field)) for spec in specs})
            specs = [spec for spec in specs if spec.flat.get(field) == value]
            if not specs:
                raise SpecError(f"No run of {self} has {field}={value}; its values are: {', '.join(known)}.")
        if self.unpublished:
            committed = published(DEFAULT_ROOT / self.profile)
            specs = [spec for spec in specs if spec.run_id not in committed]
        return with_networks(specs)

    @property
    def root(self) -> Path:
        """The results root as an absolute path."""
        return self.results.absolute()

    def __str__(self) -> str:
        return f"{self.target} ({self.profile})"
