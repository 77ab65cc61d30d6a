"""python -m experiments list | plan | fetch | run | status: the only command line that trains."""

import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from experiments.harness import catalogue
from experiments.harness.estimate import measured
from experiments.harness.record import DEFAULT_ROOT, RecordError, duration, record_of, state_of
from experiments.harness.spec import PROFILES, Spec, SpecError, with_networks


@dataclass(frozen=True)
class Runs:
    """Which runs a command is about, as it is told on the command line."""

    target: Positional[Annotated[str, arg(metavar="TARGET", help="An experiment or a table, as `list` names them.")]]
    profile: Annotated[str, arg(metavar="PROFILE", help="Size of the runs: smoke, cpu or paper.")] = "cpu"
    seeds: Annotated[int | None, arg(help="How many paired seeds, 0, 1, ...; left out: the profile's own.")] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="FIELD=VALUE", help="Change fields of every spec; such runs are no part of the tables."),
    ] = ()
    results: Annotated[Path, arg(metavar="DIR", help="The results root.")] = DEFAULT_ROOT

    @property
    def specs(self) -> list[Spec]:
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


def list_() -> int:
    """Show the experiments, their tables and the number of cells in each profile."""
    for name, experiment in catalogue.catalogue().items():
        counts = ", ".join(f"{p}: {len(experiment.runs[p])}" for p in PROFILES if p in experiment.runs)
        print(f"{experiment.table}  {name:<14} {experiment.summary}\n{'':24}cells in {counts}")
        if experiment.tuning:
            grids = ", ".join(f"{p}: {len(experiment.tuning[p])}" for p in PROFILES if p in experiment.tuning)
            print(f"{'':24}grid {name}-tuning, cells in {grids}")
    print(f"\nTargets: {', '.join(catalogue.targets())}. Next: python -m experiments plan table1")
    return 0


def plan(
    runs: OmitArgPrefixes[Runs],
    jobs: int | None = None,
) -> int:
    """Print the runs of a target, which are done, and the time still needed.

    Args:
        jobs: Workers at a time; left out: one for each core, or a single GPU.
    """
    from experiments.harness.pool import default_jobs

    _check_jobs(jobs)
    specs, results = runs.specs, runs.root
    estimate, left, alone, unknown = measured(results), 0.0, 0.0, 0
    for spec in specs:
        done = record_of(spec, results).done
        seconds = estimate.seconds(spec)
        if not done:
            unknown += seconds is None
            if spec.kind == "cost":  # these run one at a time
                alone += seconds or 0
            else:
                left += seconds or 0
        when = "done" if done else "time unknown" if seconds is None else f"about {duration(seconds)}"
        print(f"{spec.run_id}  {when:<14} {spec.title}")
    waiting = [spec for spec in specs if not record_of(spec, results).done]
    print(f"\n{len(specs)} runs, {len(specs) - len(waiting)} done, {len(waiting)} to do.")
    if waiting:
        jobs = jobs or (default_jobs("cpu") if waiting[0].device == "cpu" else 1)  # counting GPUs would load torch
        words = (
            f"About {duration(left / jobs + alone)} with {jobs} workers" if unknown < len(waiting) else "Time unknown"
        )
        more = f"; {unknown} of them have no measured step time yet" if unknown else ""
        print(f"{words}{more}.")
    return 0


def run(
    runs: OmitArgPrefixes[Runs],
    jobs: int | None = None,
    data_root: Path | None = None,
    redo: bool = False,
) -> int:
    """Train the runs of a target that are not done. Ctrl-C stops cleanly; the same command goes on.

    Args:
        jobs: Workers at a time; left out: one for each core, or one for each GPU.
        data_root: A folder with the data sets, looked into first (or set MSAM_DATA).
        redo: Train the target's runs anew, finished ones too; each keeps its result until its own turn comes.
    """
    from experiments.harness.provenance import command_line, environment

    _check_jobs(jobs)
    specs, results = runs.specs, runs.root
    for record in (record_of(spec, results) for spec in specs):
        if record.done:  # and not damaged, foreign, or a newer version's
            record.spec(), record.summary()
    waiting = [spec for spec in specs if redo or not record_of(spec, results).done]
    if not waiting:
        print(f"All {len(specs)} runs of {runs} are done; nothing to train.")
        return 0
    session = environment(command_line())

    from experiments.harness import pool

    _check_device(waiting)
    done = len(specs) - len(waiting)
    waiting = _with_data(waiting, data_root, needed=not done)
    if not waiting:
        print(f"The other {done} runs of {runs} are done; nothing to train.")
        return 0
    for spec in waiting:
        record_of(spec, results).create(spec)
    print(f"Training {len(waiting)} runs of {runs}; {done} are done.", flush=True)
    outcome = pool.run(
        waiting,
        results,
        jobs=min(jobs or pool.default_jobs(waiting[0].device), len(waiting)),
        environment=session,
        estimate=measured(results),
        data_root=str(data_root) if data_root else None,
        redo=redo,
    )
    for spec, failure in outcome.failed.items():
        print(f"\nFAILED {spec.run_id} {spec.title}\n{failure.rstrip()}", file=sys.stderr)
    if outcome.failed:
        print(f"\n{len(outcome.failed)} of {len(waiting)} runs failed.", file=sys.stderr)
    if outcome.interrupted:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 1 if outcome.failed else 0


def fetch(runs: OmitArgPrefixes[Runs], data_root: Path | None = None) -> int:
    """Fetch and verify the data sets and encoders of a target, for machines whose jobs have no network.

    Args:
        data_root: A folder with the data sets, looked into first (or set MSAM_DATA).
    """
    specs = runs.specs
    found = _with_data(specs, data_root, needed=True)
    print(f"The data of {len(found)} of {len(specs)} runs of {runs} are here.")
    return 0 if len(found) == len(specs) else 1


def status(runs: OmitArgPrefixes[Runs]) -> int:
    """Say of each run of a target whether it is done, running, begun, failed or not begun."""
    counts: Counter[str] = Counter()
    for spec in runs.specs:
        state, words = state_of(spec, runs.root)
        counts[state] += 1
        print(f"{spec.run_id}  {state:<9} {spec.title}{words}")
    print("\n" + ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) + ".")
    return 0


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise SpecError(f"jobs is {jobs}, but must be 1 or more.")


def _check_device(specs: list[Spec]) -> None:
    from experiments.harness.pool import default_jobs

    if any(spec.ranks > 1 for spec in specs):
        raise SpecError(
            "These runs are data-parallel (ranks is above 1), and this command gives each run one process: submit them "
            "with python -m slurm submit, or leave ranks out."
        )
    if any(spec.device == "cuda" for spec in specs) and not default_jobs("cuda"):
        raise SpecError(
            "These runs need a GPU and this machine has none that torch can use: take --profile cpu here, or run "
            "the same command on a machine with a GPU."
        )


def _with_data(specs: list[Spec], data_root: Path | None, needed: bool) -> list[Spec]:
    """Fetch and verify each data set and encoder once, before any worker starts; leave out what no source has.

    Raises:
        NotToBeHad: if that leaves nothing although some is `needed`.
    """
    from experiments.harness.data import NotToBeHad
    from experiments.harness.task import check

    lacking: dict[str, NotToBeHad] = {}
    for dataset, model, max_length in dict.fromkeys((s.dataset, s.model, s.max_length) for s in specs):
        first = next(s for s in specs if (s.dataset, s.model, s.max_length) == (dataset, model, max_length))
        try:
            if dataset not in lacking:
                check(first, str(data_root) if data_root else None)
        except NotToBeHad as error:
            lacking[dataset] = error
    found = [spec for spec in specs if spec.dataset not in lacking]
    if needed and not found:
        raise next(iter(lacking.values()))
    for dataset, error in lacking.items():
        print(f"Not run: {sum(s.dataset == dataset for s in specs)} runs on {dataset}. {error}", file=sys.stderr)
    return found


def main() -> None:
    """Run the command line; a mistake in it ends with one sentence and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    commands: dict[str, Callable[..., int]] = {
        "list": list_,
        "plan": plan,
        "fetch": fetch,
        "run": run,
        "status": status,
    }
    from experiments.harness.data import DataError

    try:
        code = tyro.extras.subcommand_cli_from_dict(commands, prog="python -m experiments", description=__doc__)
    except (SpecError, RecordError, DataError) as error:
        print(error, file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 0
    except OSError as error:
        print(
            f"{error.filename or 'A file'} cannot be used ({error.strerror or error}): mend that and run again.",
            file=sys.stderr,
        )
        code = 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoints.", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
