"""python -m analysis: the tables of the runs that are there, and the committed ones."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from analysis.unchanged import fingerprint, remember, remembered
from experiments.harness.runs import catalogue
from experiments.harness.runs.command_line import end_with
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import PROFILES, Run, SpecError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.collect import Collected
    from analysis.exhibit import Target
    from analysis.frames import Results


@dataclass(frozen=True)
class Arguments:
    """Write and print the tables of the runs in a results folder, beside what is committed and published.

    The files go to RESULTS/local/PROFILE/; with --publish to RESULTS/PROFILE/, which is committed.
    """

    targets: Positional[Annotated[tuple[str, ...], arg(metavar="[TARGET ...]")]] = ()
    """Tables, experiments, or their grids (table1-tuning), each with a number of seeds if wanted (table1:8); all: every
    table. Left out: table1, and what else has runs of its own."""
    profile: Annotated[str, arg(metavar="PROFILE")] = "cpu"
    """Size of the runs: smoke, cpu or paper."""
    seeds: Annotated[int | None, arg(metavar="N")] = None
    """Look at the seeds 0, ..., N - 1 of each cell. Left out: the profile's own number."""
    results: Annotated[Path, arg(metavar="DIR")] = DEFAULT_ROOT
    """The results root."""
    gpus: Annotated[int, arg(metavar="N")] = 1
    """Runs that python -m slurm submit --gpus N made: data-parallel where N divides their micro-batches."""
    publish: bool = False
    """Write the committed files; refused if a run is missing or of an unclean tree, or if several versions of the
    training code trained a model's runs."""
    from_committed: bool = False
    """Draw the committed tables again from the committed runs, and do nothing else."""


def run(arguments: Arguments) -> str:
    """Do what the command line says.

    Returns:
        What there is to print.

    Raises:
        SpecError, RecordError, Refused: for a mistake in the command line or the folders.
    """
    if arguments.profile not in PROFILES:
        raise SpecError(f"Unknown profile {arguments.profile!r}; the profiles are {', '.join(PROFILES)}.")
    root = arguments.results.absolute()
    if arguments.from_committed:
        return _from_committed(arguments, root)

    local = root / "local" / arguments.profile
    stamp = "" if arguments.publish else fingerprint(root, arguments)
    if stamp and (printed := remembered(local, stamp)) is not None:
        return printed

    from analysis.collect import collect, finished_runs
    from analysis.frames import Results, write_files
    from analysis.publish import documents, everything, publish

    targets = _targets(arguments, finished_runs(root))
    found = collect(root, curves_of={run.run_id for t in targets for run in t.runs})
    results = Results.of(run for run in found.finished if run.spec.profile == arguments.profile)
    committed = {t.name: _committed(root / arguments.profile, t.name) for t in targets}
    folder = root / arguments.profile if arguments.publish else local
    if arguments.publish:
        publish(folder, arguments.profile, targets, results)
        results = Results.read(folder)
    told = documents(arguments.profile, targets, results, found.failures)
    if not arguments.publish:
        files = {**results.texts(), **everything(arguments.profile, targets, results, told)}
        write_files(folder, files)
    parts = [document.terminal(committed.get(document.name)) for document in told]
    printed = "\n\n".join([*parts, *_neighbours(targets), *_gaps(targets, results, found), f"Written to {folder}"])
    if stamp:
        remember(local, stamp, files, printed)
    return printed


def _from_committed(arguments: Arguments, root: Path) -> str:
    if arguments.publish or arguments.targets or arguments.seeds is not None:
        raise SpecError("--from-committed draws all committed tables as they are: leave targets and flags out.")

    from analysis.publish import redraw

    return "\n".join(f"Written: {path}" for path in redraw(root / arguments.profile, arguments.profile))


def _targets(arguments: Arguments, done: Collection[str]) -> "list[Target]":
    """What the command line names; without names, what has finished runs of its own among `done`."""
    from analysis.exhibits import tables
    from analysis.publish import target

    where = (arguments.profile, arguments.results.absolute())
    if arguments.gpus > 1 and not (arguments.targets and not arguments.publish):
        raise SpecError("--gpus takes the names of tables and no --publish, which is for the runs as they are listed.")
    if arguments.targets:
        every = [name for name in tables() if catalogue.cells(name, arguments.profile)]
        names = dict.fromkeys(n for name in arguments.targets for n in (every if name == "all" else [name]))
        return [target(*_with_seeds(name, arguments.seeds, where), arguments.gpus) for name in names]
    known, chosen, shared = catalogue.targets(), [], set[Run]()
    for name in (name for table in tables() for name in (table, f"{table}-tuning")):
        if name in known and catalogue.cells(name, arguments.profile):
            found = target(name, *where, None if name.endswith("-tuning") else arguments.seeds)
            own = set(found.runs) - shared
            if name == "table1" or any(run.run_id in done for run in own):
                chosen.append(found)
            shared |= own
    return chosen


def _with_seeds(name: str, seeds: int | None, where: tuple[str, Path]) -> tuple[str, str, Path, int | None]:
    """A target as it was named, `table1:8` say, and where its runs are, for `target`."""
    name, colon, own = name.partition(":")
    if colon and not own.isdecimal():
        raise SpecError(f"A target may be followed by a colon and a number of seeds, as in table1:8; not {own!r}.")
    return name, *where, int(own) if colon else seeds


def _committed(folder: Path, name: str) -> "pd.DataFrame | None":
    from analysis.columns import parse
    from analysis.document import COMMITTED

    path = folder / "tables" / f"{name}.csv"
    try:
        table = parse(path.read_text(encoding="utf-8")) if path.exists() else None
        if table is not None and (lost := sorted(COMMITTED - set(table.columns))):
            raise ValueError(f"it has no column {lost[0]!r}")
        return table
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({error}): restore it with git.") from error


def _neighbours(targets: "list[Target]") -> list[str]:
    from analysis import published

    cells = [cell for target in targets if not target.tuning for cell in target.cells if cell.kind == "train"]
    rows = published.neighbours((c.model for c in cells), (c.dataset for c in cells))
    lines = published.lines(rows)
    return ["Published elsewhere\n" + "\n".join(lines)] if lines else []


def _gaps(targets: "list[Target]", results: "Results", found: "Collected") -> list[str]:
    """What is missing, what failed and what could not be read."""
    from analysis.publish import missing, missing_line

    lines = []
    for target in targets:
        if gaps := missing(target, results):
            lines.append(missing_line(target, gaps))
        if further := _further(target, results):
            lines.append(f"{target.name} has {further} runs with higher seeds, left out here: name --seeds.")
    lines += [f"Left alone: {problem}" for problem in found.problems]
    return ["\n".join(lines)] if lines else []


def _further(target: "Target", results: "Results") -> int:
    """How many finished runs of the table's cells have seeds that it does not look at."""
    highest = max(results.runs["seed"], default=0)
    ids = {run.run_id for run in with_seeds(target.cells, 1 + highest)} - {run.run_id for run in target.runs}
    return int(results.runs["run_id"].isin(ids).sum())


def main() -> None:
    """Run the command line; a mistake in it ends with a sentence and exit status 2."""
    arguments = tyro.cli(Arguments, prog="python -m analysis", config=(FlagCreatePairsOff,))

    end_with(lambda: print(run(arguments)), stopped="Stopped: the files are as they were, or whole.")


if __name__ == "__main__":
    main()
