"""python -m experiments COMMAND: train runs and inspect them."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from experiments.harness.runs import catalogue
from experiments.harness.runs.command_line import end_with
from experiments.harness.runs.estimate import load_estimate
from experiments.harness.runs.files import printable
from experiments.harness.runs.parsing import sentences
from experiments.harness.runs.plan import print_plan
from experiments.harness.runs.record import DEFAULT_ROOT, Record, duration, record_of, state_of
from experiments.harness.runs.selection import Runs
from experiments.harness.runs.spec import PROFILES, Run, SpecError
from experiments.harness.work.session import Session

OUT_OF_TIME = 75
"""Exit status of a `run --minutes` that has not finished: sysexits' "temporary failure, try again"."""


def list_() -> int:
    """Show the experiments, their tables and the number of cells in each profile."""
    for name, experiment in catalogue.catalogue().items():
        counts = ", ".join(f"{p}: {len(experiment.runs[p])}" for p in PROFILES if p in experiment.runs)
        print(f"{experiment.table}  {name:<14} {experiment.summary}\n{'':24}cells in {counts}")
        if experiment.primary:
            print(f"{'':24}primary comparison, on CIFAR-10: {' over '.join(experiment.primary)}")
        if experiment.tuning:
            grids = ", ".join(f"{p}: {len(experiment.tuning[p])}" for p in PROFILES if p in experiment.tuning)
            print(f"{'':24}grid {name}-tuning, cells in {grids}")
    print(f"\nTargets: {', '.join(catalogue.targets())}. Next: python -m experiments plan table1")
    return 0


def plan(
    runs: OmitArgPrefixes[Runs],
    jobs: int | None = None,
) -> int:
    """List the runs of a target, say which are done, and estimate the time left.

    Args:
        jobs: Number of workers (or GPUs) to plan for; default: one per core, or one GPU.
    """
    _check_jobs(jobs)
    print_plan(runs, jobs)
    return 0


def run(
    runs: OmitArgPrefixes[Runs],
    jobs: int | None = None,
    data_root: Path | None = None,
    redo: bool = False,
    minutes: float | None = None,
    per_gpu: int = 1,
) -> int:
    """Train the runs of a target that are not done. Ctrl-C stops cleanly; the same command resumes.

    Args:
        jobs: Number of workers; default: one per core, or `per_gpu` per GPU.
        data_root: A folder with the data sets, searched first (or set MSAM_DATA).
        redo: Retrain all runs of the target, including finished ones; each keeps its old result until it restarts.
        minutes: Stop after so many minutes, with a checkpoint of each run; the exit status is then 75.
        per_gpu: Number of small runs that share each GPU.
    """
    from experiments.harness.runs.provenance import command_line, environment

    _check_jobs(jobs)
    started = time.monotonic()
    specs, results = runs.specs, runs.root
    for record in (record_of(spec, results) for spec in specs):
        if record.done:  # raises if the record is damaged, of another run, or of a newer version
            record.spec(), record.summary()
            record.previous_checkpoint.unlink(missing_ok=True)  # left if it was killed right after its summary
    waiting = [spec for spec in specs if redo or not record_of(spec, results).done]
    if not waiting:
        print(f"All {len(specs)} runs of {runs} are done; there is nothing to train.")
        return 0
    provenance = environment(command_line())

    from experiments.harness.machine import pool
    from experiments.harness.machine.forecast import Forecast

    _check_device(waiting)
    limits = pool.limits(waiting[0].device, jobs, per_gpu, minutes, started)
    done = len(specs) - len(waiting)
    waiting = _with_data(waiting, data_root, needed=not done)
    if not waiting:
        print(f"The other {done} runs of {runs} are done; there is nothing to train.")
        return 0
    for spec in waiting:
        record_of(spec, results).create(spec)
    estimate, workers = load_estimate(results), min(limits.jobs, len(waiting))
    time_left = f"About {duration(Forecast(waiting, estimate, workers).left())} with {workers} workers"
    print(f"Training {len(waiting)} runs of {runs}; {done} are done. {time_left}; corrected after the first steps.")
    sys.stdout.flush()
    session = Session(results, data_root, provenance)
    outcome = pool.run(waiting, session, limits, estimate=estimate, redo=redo)
    for spec, failure in outcome.failed.items():
        print(f"\nFAILED {spec.run_id} {spec.title}\n{failure.rstrip()}", file=sys.stderr)
    if outcome.failed:
        print(f"\n{len(outcome.failed)} of {len(waiting)} runs failed.", file=sys.stderr)
    if outcome.interrupted:
        print("Stopped. The same command resumes from the checkpoints.", file=sys.stderr)
        return 130
    left = sum(not record_of(spec, results).done for spec in specs)
    if outcome.out_of_time and left and not outcome.failed:
        print(f"Stopped after {minutes:g} minutes, {left} runs are left. The same command resumes.", file=sys.stderr)
        return OUT_OF_TIME
    return 1 if outcome.failed else 0


def fetch(runs: OmitArgPrefixes[Runs], data_root: Path | None = None) -> int:
    """Fetch and verify the data sets and encoders of a target, for clusters whose jobs have no network.

    Args:
        data_root: A folder with the data sets, searched first (or set MSAM_DATA).
    """
    specs = runs.specs
    ready = _with_data(specs, data_root, needed=True)
    print(f"The data of {len(ready)} of {len(specs)} runs of {runs} are on this machine.")
    return 0 if len(ready) == len(specs) else 1


def check(
    runs: OmitArgPrefixes[Runs],
    jobs: int = 1,
    gpu: str = "a100",
) -> int:
    """Check every distinct cell of a target at full size: build it, take two small steps, resume it, score it.

    Inputs are random. GPU times and memory are estimated from counted FLOP, not measured.

    Args:
        jobs: Cells at a time; each needs memory for a whole model and its optimizer, three to six times its weights.
        gpu: The GPU whose peak FLOP/s the times are estimated from: a100 or h100.
    """
    from experiments.harness.machine import proof

    _check_jobs(jobs)
    cells = proof.distinct(catalogue.runs(runs.target, runs.profile, 1, runs.set))
    low, high = proof.UTILISATION
    print(
        f"{len(cells)} distinct cells of {runs}. GPU times assume {low:.0%} to {high:.0%} of an {gpu}'s peak; they are "
        "not measured.",
        flush=True,
    )
    failed, started = 0, time.monotonic()
    for number, (cell, report) in enumerate(proof.check_cells(cells, jobs, gpu), start=1):
        spent = time.monotonic() - started
        left = duration(spent * (len(cells) - number) / number)
        print(f"[{number}/{len(cells)}] {proof.line(cell.spec, report)}; {left} left", flush=True)
        failed += report.failure is not None
    print(f"{len(cells) - failed} of {len(cells)} passed in {duration(time.monotonic() - started)}.")
    return 1 if failed else 0


def status(runs: OmitArgPrefixes[Runs]) -> int:
    """Show for each run of a target whether it is done, running, started, failed or not started."""
    counts: Counter[str] = Counter()
    for spec in runs.specs:
        state, words = state_of(spec, runs.root)
        counts[state] += 1
        print(f"{spec.run_id}  {state:<11} {spec.title}{words}")
    print("\n" + ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) + ".")
    return 0


def show(run: Positional[Annotated[str, arg(metavar="RUN")]], results: Path = DEFAULT_ROOT) -> int:
    """Print everything known about one run: its spec, every session that worked on it, and its summary.

    Args:
        run: The run id, or its first characters.
        results: The results root.
    """
    record = _record(run, results)
    spec = record.spec()
    state, words = state_of(spec, record.root)
    print(f"{record.run_id}  {printable(spec.title)}\n{state}{words}\n\nspec")
    _print_fields(spec.to_dict())
    sessions = record.environments() if (record.folder / "env.json").exists() else []
    for number, session in enumerate(sessions, start=1):
        print(f"\nsession {number} of {len(sessions)}")
        _print_fields(session)
    if record.done:
        print("\nsummary")
        _print_fields(record.summary())
    return 0


def verify(
    run: Positional[Annotated[str, arg(metavar="RUN")]],
    epochs: int | None = None,
    results: Path = DEFAULT_ROOT,
    data_root: Path | None = None,
) -> int:
    """Retrain a finished run in a temporary folder and report whether it matches bit for bit, or what differs.

    Args:
        run: The run id, or its first characters.
        epochs: Train and compare only the first epochs; default: the whole run, its scores and its final weights.
        results: The results root.
        data_root: A folder with the data sets, searched first (or set MSAM_DATA).
    """
    from tqdm import tqdm

    from experiments.harness.machine import verify as verification
    from experiments.harness.runs.provenance import command_line, environment

    record = _record(run, results)
    _check_device([record.spec()])
    with tqdm(desc=record.spec().title, unit="step", disable=not sys.stderr.isatty(), leave=False) as bar:

        def report(step: int, steps: int) -> None:
            bar.total = steps
            bar.update(step - bar.n)

        session = Session(record.root, data_root, environment(command_line()), report)
        differences = verification.verify(record, session, epochs)
    weights = " and the final weights" if record.checkpoint.exists() else "; its final weights were removed"
    compared = f"the first {epochs} epochs" if epochs else f"every line, the summary{weights}"
    if not differences:
        print(f"{record.run_id} matches bit for bit: {compared}, except times.")
        return 0
    print(f"{record.run_id} does not match.", *differences, sep="\n")
    return 1


def export(runs: OmitArgPrefixes[Runs], to: Annotated[Path, arg(metavar="FILE.tar.gz")], weights: bool = False) -> int:
    """Pack the finished records of a target into one archive, for `import` on another machine.

    Args:
        to: The archive to write.
        weights: Also pack the final weights, which Table 3 measures.
    """
    from experiments.harness.machine import transfer

    specs = runs.specs
    count = transfer.pack(specs, runs.root, to, weights=weights)
    print(f"{count} of the {len(specs)} runs of {runs} are in {to} ({to.stat().st_size / 1e6:.1f} MB).")
    return 0


def import_(source: Positional[Annotated[Path, arg(metavar="SOURCE")]], results: Path = DEFAULT_ROOT) -> int:
    """Check finished records that another machine made, and copy them to the results.

    Args:
        source: A results folder, its runs/, one run folder, or an archive of any of them.
        results: The results root.
    """
    from experiments.harness.machine import transfer

    return transfer.report(transfer.take_in(source, results.absolute()), source)


def tensorboard(runs: OmitArgPrefixes[Runs], to: Path | None = None) -> int:
    """Convert the metrics of a target's runs, finished or under way, into TensorBoard's event files.

    Args:
        to: The folder to write to; default: RESULTS/tensorboard/PROFILE.
    """
    from experiments.harness.machine.tensorboard import convert

    folder = (to or runs.root / "tensorboard" / runs.profile).absolute()
    written = convert([record_of(spec, runs.root) for spec in runs.specs], folder)
    print(f"{written} of {len(runs.specs)} runs of {runs} written. To see them: tensorboard --logdir {folder}")
    return 0


def clean(results: Path = DEFAULT_ROOT, remove: bool = False) -> int:
    """List the weights and checkpoints that nothing needs any more, with their sizes; --remove removes them.

    Records are never touched. Without its final weights a run can be verified only by its epochs and scores.

    Args:
        results: The results root.
        remove: Remove what is listed.
    """
    from experiments.harness.machine import clean as cleaning

    cleaning.report(results.absolute(), removing=remove)
    return 0


def _record(run: str, results: Path) -> Record:
    """The run whose id starts with `run`.

    Raises:
        SpecError: if no run matches, or several do.
    """
    folder = results.absolute() / "runs"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    matches = [name for name in names if name.startswith(run)]
    if not matches:
        raise SpecError(f"{run!r} matches no run in {folder}: see `status` for the runs of a target.")
    if len(matches) > 1:
        listed = printable(", ".join(matches[:3]))
        raise SpecError(f"{run!r} matches {len(matches)} runs, {listed}, ...: give more characters of the id.")
    return Record(results.absolute(), matches[0])


def _print_fields(fields: Mapping[str, Any]) -> None:
    shown = {printable(str(name)): value for name, value in fields.items()}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        print(f"  {name:<{width}}  {printable(text).replace(chr(10), chr(10) + ' ' * (width + 4))}")


def _check_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise SpecError(f"jobs is {jobs}, but must be 1 or more.")


def _check_device(specs: list[Run]) -> None:
    from experiments.harness.machine.pool import default_jobs

    if any(spec.processes > 1 for spec in specs):
        raise SpecError(
            "These runs are data-parallel (ranks > 1), but this command starts one process per run: submit them with "
            "python -m slurm submit, or leave ranks out."
        )
    if any(spec.device == "cuda" for spec in specs) and not default_jobs("cuda"):
        raise SpecError(
            "These runs need a GPU, and torch finds none on this machine: use --profile cpu, or run the same command "
            "on a machine with a GPU."
        )


def _with_data(specs: list[Run], data_root: Path | None, needed: bool) -> list[Run]:
    """The specs whose data set and encoder are available; each is fetched and verified once, before any worker starts.

    Raises:
        DataUnavailable: if no spec is left although some are `needed`.
    """
    from experiments.harness.tasks.data import check_root
    from experiments.harness.tasks.storage import DataUnavailable
    from experiments.harness.work.execute import check

    check_root(dict.fromkeys(spec.dataset for spec in specs), data_root)
    unavailable: dict[str, DataUnavailable] = {}
    firsts: dict[tuple[object, ...], Run] = {}
    for spec in specs:
        firsts.setdefault((spec.dataset, spec.model, spec.flat["max_length"], spec.flat["start_weights"]), spec)
    for spec in firsts.values():
        try:
            if spec.dataset not in unavailable:
                check(spec, data_root)
        except DataUnavailable as error:
            unavailable[spec.dataset] = error
    available = [spec for spec in specs if spec.dataset not in unavailable]
    if needed and not available:
        raise next(iter(unavailable.values()))
    for dataset, reason in unavailable.items():
        print(f"Not run: {sum(s.dataset == dataset for s in specs)} runs on {dataset}. {reason}", file=sys.stderr)
    return available


def main() -> None:
    """Run the command line. A mistake by the user prints one sentence and exits with status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    commands: dict[str, Callable[..., int]] = {
        "list": list_,
        "plan": plan,
        "fetch": fetch,
        "run": run,
        "status": status,
        "check": check,
        "show": show,
        "verify": verify,
        "export": export,
        "import": import_,
        "tensorboard": tensorboard,
        "clean": clean,
    }
    program = "python -m experiments"

    def command() -> int:
        with sentences(program, commands):
            return tyro.extras.subcommand_cli_from_dict(commands, prog=program, description=__doc__)

    end_with(
        command,
        stopped="Stopped. The same command resumes from the last checkpoints.",
    )


if __name__ == "__main__":
    main()
