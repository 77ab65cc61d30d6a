"""python -m experiments list | plan | check | fetch | run | status | show | verify: what trains."""

import contextlib
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from experiments.harness.runs import catalogue
from experiments.harness.runs.command_line import end_with
from experiments.harness.runs.estimate import Estimate, disk_bytes, gpu_hours, measured
from experiments.harness.runs.files import printable
from experiments.harness.runs.grids import with_networks
from experiments.harness.runs.process import cores
from experiments.harness.runs.record import DEFAULT_ROOT, Record, duration, record_of, state_of
from experiments.harness.runs.selection import Runs
from experiments.harness.runs.spec import PROFILES, Run, SpecError, Timing
from experiments.harness.work.session import Session

if TYPE_CHECKING:
    from experiments.harness.machine.proof import Report

NIGHT_HOURS = 12


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
        jobs: Workers at a time, so GPUs where these are needed; left out: one for each core, or a single GPU.
    """
    _check_jobs(jobs)
    specs, results = runs.specs, runs.root
    estimate, left, alone, unknown = measured(results), 0.0, 0.0, 0
    for spec in specs:
        done = record_of(spec, results).done
        seconds = estimate.seconds(spec)
        if not done:
            unknown += seconds is None
            if isinstance(spec, Timing):  # these run one at a time
                alone += seconds or 0
            else:
                left += seconds or 0
        when = "done" if done else "time unknown" if seconds is None else f"about {duration(seconds)}"
        print(f"{spec.run_id}  {when:<14} {spec.title}")
    waiting = [spec for spec in specs if not record_of(spec, results).done]
    print(f"\n{len(specs)} runs, {len(specs) - len(waiting)} done, {len(waiting)} to do.")
    if waiting:
        jobs = jobs or (cores() if waiting[0].device == "cpu" else 1)  # counting GPUs would load torch
        words = (
            f"About {duration(left / jobs + alone)} with {jobs} workers" if unknown < len(waiting) else "Time unknown"
        )
        more = f"; {unknown} of them have no measured step time yet" if unknown else ""
        print(f"{words}{more}.")
    if any(spec.device == "cuda" for spec in waiting):
        _print_gpu_plan(runs, waiting, estimate, jobs or 1)
    return 0


def _print_gpu_plan(runs: Runs, waiting: list[Run], estimate: Estimate, gpus: int) -> None:
    """GPU-hours of each table and in all, nights and disk."""
    print("\nGPU-hours by measured times where there are any, else guessed for an A100-class GPU:")
    tables = list(dict.fromkeys(e.table for e in catalogue.catalogue().values()))
    tables += [f"{name}-tuning" for name in tables if f"{name}-tuning" in catalogue.targets()]
    for name in tables if runs.target == "all" else [runs.target]:
        with contextlib.suppress(SpecError):  # a table without runs in this profile
            specs = {*with_networks(catalogue.runs(name, runs.profile, runs.seeds, runs.set))}
            left = {spec for spec in specs if not record_of(spec, runs.root).done}
            alone = " (not among all: its choices are made before)" if left - set(waiting) else ""
            print(f"  {name:<21} {len(left):>5} runs {sum(gpu_hours(s, estimate) for s in left):>8.0f} h{alone}")
    hours = sum(gpu_hours(spec, estimate) for spec in waiting)
    print(f"  {'in all':<21} {len(waiting):>5} runs {hours:>8.0f} h, shared ones once")
    nights = ", ".join(f"{math.ceil(hours / n / NIGHT_HOURS)} on {n}" for n in sorted({1, 4, 8, gpus}))
    print(f"Nights of {NIGHT_HOURS} hours: {nights} GPUs.")
    kept = sum(disk_bytes(spec)[0] for spec in waiting)
    working = sorted((disk_bytes(spec)[1] for spec in waiting), reverse=True)[:gpus]
    print(f"Disk: {kept / 1e9:.0f} GB for final weights, and {sum(working) / 1e9:.1f} GB more for {gpus} at a time.")


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
        redo: Train the target's runs again, finished ones too; each keeps its result until its own turn comes.
    """
    from experiments.harness.runs.provenance import command_line, environment

    _check_jobs(jobs)
    specs, results = runs.specs, runs.root
    for record in (record_of(spec, results) for spec in specs):
        if record.done:  # and not damaged, foreign, or a newer version's
            record.spec(), record.summary()
            record.previous_checkpoint.unlink(missing_ok=True)  # it was ended right after its summary
    waiting = [spec for spec in specs if redo or not record_of(spec, results).done]
    if not waiting:
        print(f"All {len(specs)} runs of {runs} are done; nothing to train.")
        return 0
    provenance = environment(command_line())

    from experiments.harness.machine import pool

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
        Session(results, data_root, provenance),
        jobs=min(jobs or pool.default_jobs(waiting[0].device), len(waiting)),
        estimate=measured(results),
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


def check(
    runs: OmitArgPrefixes[Runs],
    jobs: int = 1,
    gpu: str = "a100",
) -> int:
    """Prove every distinct cell of a target at full size: built, two steps on a small batch, resumed, scored.

    Inputs are made up. Figures of a GPU are estimated from counted FLOP, not measured.

    Args:
        jobs: Cells at a time; each needs memory for a whole model and its optimizer, three to six times its weights.
        gpu: Whose peak the times are estimated from: a100 or h100.
    """
    from experiments.harness.machine import proof

    _check_jobs(jobs)
    cells = proof.distinct(catalogue.runs(runs.target, runs.profile, 1, runs.set))
    low, high = proof.UTILISATION
    print(
        f"{len(cells)} distinct cells of {runs}. Of a GPU: {low:.0%} to {high:.0%} of an {gpu}'s peak, not measured.",
        flush=True,
    )
    failed, begun = 0, time.monotonic()
    for number, (cell, report) in enumerate(proof.prove(cells, jobs, gpu), start=1):
        spent = time.monotonic() - begun
        left = duration(spent * (len(cells) - number) / number)
        print(f"[{number}/{len(cells)}] {_checked(cell.spec, report)}; {left} left", flush=True)
        failed += report.failure is not None
    print(f"{len(cells) - failed} of {len(cells)} passed in {duration(time.monotonic() - begun)}.")
    return 1 if failed else 0


def _checked(spec: Run, report: "Report") -> str:
    what = f"{spec.model} {spec.dataset} {spec.method}{' curvature' if spec.network else ''}"
    if report.failure:
        return f"{what}: FAILED: {report.failure}"
    least, most = (duration(seconds) for seconds in report.run_seconds)
    low, high = (bytes_ / 1e9 for bytes_ in report.gpu_memory)
    return (
        f"{what}: {report.parameters / 1e6:.1f} M parameters, passed in {report.seconds:.0f} s with "
        f"{report.memory / 1e9:.1f} GB here; {report.step_flops / 1e12:.3g} TFLOP a step of {spec.batch_size}, a run "
        f"{least} to {most}, {low:.1f} to {high:.1f} GB"
    )


def status(runs: OmitArgPrefixes[Runs]) -> int:
    """Say of each run of a target whether it is done, running, begun, failed or not begun."""
    counts: Counter[str] = Counter()
    for spec in runs.specs:
        state, words = state_of(spec, runs.root)
        counts[state] += 1
        print(f"{spec.run_id}  {state:<9} {spec.title}{words}")
    print("\n" + ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) + ".")
    return 0


def show(run: Positional[Annotated[str, arg(metavar="RUN")]], results: Path = DEFAULT_ROOT) -> int:
    """Print all that is known of one run: its spec, every session that worked on it, and what it found.

    Args:
        run: The name of its folder, or the beginning of it.
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
    """Make a finished run again, in a temporary folder, and say whether it is the same bit for bit, or what differs.

    Args:
        run: The name of its folder, or the beginning of it.
        epochs: Train only so many and compare those; left out: the whole run, its scores and its final weights.
        results: The results root.
        data_root: A folder with the data sets, looked into first (or set MSAM_DATA).
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
        found = verification.verify(record, session, epochs)
    compared = f"the first {epochs} epochs" if epochs else "every line, the summary and the final weights"
    if not found:
        print(f"{record.run_id} is the same bit for bit: {compared}, times apart.")
        return 0
    print(f"{record.run_id} is not the same.", *found, sep="\n")
    return 1


def _record(run: str, results: Path) -> Record:
    """The run whose folder's name begins so.

    Raises:
        SpecError: if there is none, or there are several.
    """
    folder = results.absolute() / "runs"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if name.startswith(run)]
    if len(found) != 1:
        several = f"{len(found)} runs, {printable(', '.join(found[:3]))}, ...: write more of its name"
        raise SpecError(f"{run!r} is {several if found else f'no run in {folder}: status names the runs of a target'}.")
    return Record(results.absolute(), found[0])


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
            "These runs are data-parallel (ranks is above 1), and this command gives each run one process: submit them "
            "with python -m slurm submit, or leave ranks out."
        )
    if any(spec.device == "cuda" for spec in specs) and not default_jobs("cuda"):
        raise SpecError(
            "These runs need a GPU and this machine has none that torch can use: take --profile cpu here, or run "
            "the same command on a machine with a GPU."
        )


def _with_data(specs: list[Run], data_root: Path | None, needed: bool) -> list[Run]:
    """Fetch and verify each data set and encoder once, before any worker starts; leave out what no source has.

    Raises:
        DataUnavailable: if that leaves nothing although some is `needed`.
    """
    from experiments.harness.tasks.storage import DataUnavailable
    from experiments.harness.work.execute import check

    lacking: dict[str, DataUnavailable] = {}
    for dataset, model, max_length in dict.fromkeys((s.dataset, s.model, s.flat["max_length"]) for s in specs):
        first = next(s for s in specs if (s.dataset, s.model, s.flat["max_length"]) == (dataset, model, max_length))
        try:
            if dataset not in lacking:
                check(first, data_root)
        except DataUnavailable as error:
            lacking[dataset] = error
    found = [spec for spec in specs if spec.dataset not in lacking]
    if needed and not found:
        raise next(iter(lacking.values()))
    for dataset, reason in lacking.items():
        print(f"Not run: {sum(s.dataset == dataset for s in specs)} runs on {dataset}. {reason}", file=sys.stderr)
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
        "check": check,
        "show": show,
        "verify": verify,
    }
    end_with(
        lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="python -m experiments", description=__doc__),
        stopped="Stopped. The same command goes on from the last checkpoints.",
    )


if __name__ == "__main__":
    main()
