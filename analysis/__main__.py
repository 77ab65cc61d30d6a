"""python -m analysis: write the tables of the finished runs, or redraw the committed ones."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from analysis.unchanged import fingerprint, remember, remembered
from experiments.harness.runs import catalogue
from experiments.harness.runs.checks import unknown
from experiments.harness.runs.command_line import end_with
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.parsing import sentences
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import PROFILES, Run, SpecError

if TYPE_CHECKING:
    import pandas as pd

    from analysis.exhibit import Target
    from analysis.frames import Results


@dataclass(frozen=True)
class Arguments:
    """Write and print the tables of the runs in a results folder, next to the committed and the published numbers.

    The files go to RESULTS/local/PROFILE/; with --publish to RESULTS/PROFILE/, which is committed. `python -m analysis
    judge CLAIM` recomputes the verdict on a claim from runs.csv alone, by code of its own.
    """

    targets: Positional[Annotated[tuple[str, ...], arg(metavar="[TARGET ...]")]] = ()
    """Tables, experiments or their grids (table1-tuning), optionally with a number of seeds (table1:8). all: every
    table. Default: table1, and every other table or grid with a finished run that no earlier one shares."""
    profile: Annotated[str, arg(metavar="PROFILE")] = "cpu"
    """Size of the runs: smoke, cpu, gpu or paper."""
    seeds: Annotated[int | None, arg(metavar="N")] = None
    """Use the seeds 0, ..., N - 1 of each cell. Default: the profile's number of seeds; with --publish, the number that
    each committed table is to have."""
    results: Annotated[Path, arg(metavar="DIR")] = DEFAULT_ROOT
    """The results root."""
    gpus: Annotated[int, arg(metavar="N")] = 1
    """Use the runs of python -m slurm submit --gpus N: data-parallel where N divides their micro-batches."""
    publish: bool = False
    """Write the committed files. Rejected if a run is missing or comes from a tree with uncommitted changes, or if the
    runs of one model come from several versions of the training code."""
    partial: bool = False
    """Publish what has been trained so far: runs may be missing. Their rows show fewer seeds, or `not run`."""
    from_committed: bool = False
    """Redraw the committed tables from the committed runs, and do nothing else."""


def run(arguments: Arguments) -> str:
    """Run the command.

    Returns:
        The text to print.

    Raises:
        SpecError, RecordError, Refused: for a mistake in the command line or in the results folder.
    """
    if arguments.profile not in PROFILES:
        raise unknown("profile", arguments.profile, PROFILES)
    root = arguments.results.absolute()
    if arguments.from_committed:
        return _from_committed(arguments, root)

    if arguments.partial and not arguments.publish:
        raise SpecError("--partial is for --publish: without it, tables are always written with the runs there are.")
    local = root / "local" / arguments.profile
    stamp = "" if arguments.publish else fingerprint(root, arguments)
    if stamp and (printed := remembered(local, stamp)) is not None:
        return printed

    from analysis.collect import collect, finished_runs
    from analysis.frames import Results, write_files
    from analysis.publish import documents_of, output_files, publish

    targets = _targets(arguments, finished_runs(root))
    collected = collect(root, curves_of={run.run_id for t in targets for run in t.runs})
    ours = [run for run in collected.finished if run.spec.profile == arguments.profile]
    under_way = [run for run in collected.unfinished if run.spec.profile == arguments.profile and run.metrics.count]
    results = Results.of(ours, () if arguments.publish else under_way)
    if not arguments.publish:
        _reject_nothing(targets, results, root)
    predictions = results.predictions
    committed = {t.name: _committed(root / arguments.profile, t.name) for t in targets}
    folder = root / arguments.profile if arguments.publish else local
    if arguments.publish:
        publish(folder, arguments.profile, targets, results, arguments.partial)
        results = Results.read(folder)
    documents = documents_of(arguments.profile, targets, results, collected.states)
    if not arguments.publish:
        files = {**results.texts(), **output_files(arguments.profile, targets, results, documents)}
        write_files(folder, files)
    problems = [*collected.problems, *predictions.problems.values()]
    parts = [document.terminal(committed.get(document.name)) for document in documents]
    printed = "\n\n".join([*parts, *_neighbours(targets), *_gaps(targets, results, problems), f"Written to {folder}"])
    if stamp:
        remember(local, stamp, files, printed)
    return printed


def _reject_nothing(targets: "list[Target]", results: "Results", root: Path) -> None:
    """Reject a results root that has none of the runs, finished or under way.

    Raises:
        RecordError: with the command that makes them.
    """
    expected = [run.run_id for target in targets for run in target.runs]
    if not {*results.runs["run_id"], *results.under_way["run_id"]}.isdisjoint(expected):
        return
    names = ", ".join(target.name for target in targets)
    raise RecordError(
        f"{root / 'runs'} has none of the {len(expected)} runs of {names} ({targets[0].cells[0].profile}): make them "
        f"with `{targets[0].command}`, or give the folder that holds runs/ with --results."
    )


def _from_committed(arguments: Arguments, root: Path) -> str:
    if arguments.publish or arguments.partial or arguments.targets or arguments.seeds is not None:
        raise SpecError(
            "--from-committed redraws all committed tables: leave out targets, --seeds, --publish and --partial."
        )

    from analysis.publish import redraw

    return "\n".join(f"Written: {path}" for path in redraw(root / arguments.profile, arguments.profile))


def _targets(arguments: Arguments, done: Collection[str]) -> "list[Target]":
    """The targets that the command line names; by default those with a run in `done` that no earlier target shares."""
    from analysis.exhibits import tables
    from analysis.publish import target

    where = (arguments.profile, arguments.results.absolute())
    if arguments.gpus > 1 and not (arguments.targets and not arguments.publish):
        raise SpecError(
            "--gpus needs the names of tables, and excludes --publish, which takes only the runs that experiments list."
        )
    if arguments.targets:
        every = [name for name in tables() if catalogue.cells(name, arguments.profile)]
        names = dict.fromkeys(n for name in arguments.targets for n in (every if name == "all" else [name]))
        return [target(*_with_seeds(name, arguments, where), arguments.gpus) for name in names]
    known, chosen, shared = catalogue.targets(), [], set[Run]()
    for name in (name for table in tables() for name in (table, f"{table}-tuning")):
        if name in known and catalogue.cells(name, arguments.profile):
            seeds = None if name.endswith("-tuning") else arguments.seeds
            candidate = target(*_with_seeds(name, replace(arguments, seeds=seeds), where))
            own = set(candidate.runs) - shared
            if name == "table1" or any(run.run_id in done for run in own):
                chosen.append(candidate)
            shared |= own
    return chosen


def _with_seeds(name: str, arguments: Arguments, where: tuple[str, Path]) -> tuple[str, str, Path, int | None]:
    """Split a target such as `table1:8` into the arguments of `target`: name, profile, root, number of seeds."""
    name, colon, count = name.partition(":")
    if colon and not count.isdecimal():
        raise SpecError(f"{count!r} is not a number of seeds: write a target with its seeds as table1:8.")
    seeds = int(count) if colon else arguments.seeds
    if seeds is None and arguments.publish:
        seeds = catalogue.published_seeds(name, arguments.profile)
    return name, *where, seeds


def _committed(folder: Path, name: str) -> "pd.DataFrame | None":
    from analysis.columns import parse
    from analysis.document import COMMITTED

    path = folder / "tables" / f"{name}.csv"
    try:
        table = parse(path.read_text(encoding="utf-8")) if path.exists() else None
        if table is not None and (absent := sorted(COMMITTED - set(table.columns))):
            raise ValueError(f"it has no column {absent[0]!r}")
        return table
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({error}): restore it with git.") from error


def _neighbours(targets: "list[Target]") -> list[str]:
    from analysis import published

    cells = [cell for target in targets if not target.tuning for cell in target.cells if cell.kind == "train"]
    rows = published.neighbours((c.model for c in cells), (c.dataset for c in cells))
    lines = published.lines(rows)
    return ["Published elsewhere\n" + "\n".join(lines)] if lines else []


def _gaps(targets: "list[Target]", results: "Results", problems: Sequence[str]) -> list[str]:
    """A line for each table with missing or further runs, and for each folder or file that could not be read."""
    from analysis.publish import missing, missing_line

    lines = []
    for target in targets:
        if gaps := missing(target, results):
            lines.append(missing_line(target, gaps))
        if further := _with_higher_seeds(target, results):
            lines.append(f"{target.name} leaves out {further} runs with higher seeds: add them with --seeds.")
    lines += [f"Warning: {problem}" for problem in problems]
    return ["\n".join(lines)] if lines else []


def _with_higher_seeds(target: "Target", results: "Results") -> int:
    """The number of finished runs of the table's cells whose seeds are higher than those the table uses."""
    highest = max(results.runs["seed"], default=0)
    ids = {run.run_id for run in with_seeds(target.cells, 1 + highest)} - {run.run_id for run in target.runs}
    return int(results.runs["run_id"].isin(ids).sum())


def main() -> None:
    """Run the command line; a mistake in it prints one sentence and exits with status 2."""
    if sys.argv[1:2] == ["judge"]:
        from analysis import judge

        judge.main()

    def command() -> None:
        with sentences("python -m analysis", Arguments):
            arguments = tyro.cli(Arguments, prog="python -m analysis", config=(FlagCreatePairsOff,))
        print(run(arguments))

    end_with(command, stopped="Stopped: each file is either unchanged or complete.")


if __name__ == "__main__":
    main()
