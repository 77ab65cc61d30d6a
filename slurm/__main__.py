"""python -m slurm submit | status | wait | cancel: the runs of `python -m experiments` on a Slurm cluster."""

import logging
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, arg

from experiments.harness.runs import selection
from experiments.harness.runs.command_line import end_with
from experiments.harness.runs.estimate import Estimate, gpu_hours, load_estimate
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_ranks
from experiments.harness.runs.parsing import sentences
from experiments.harness.runs.provenance import checkout
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import Run
from slurm import scheduler, site
from slurm.job import Work
from slurm.resources import LEAST_MINUTES
from slurm.scheduler import SlurmError
from slurm.standings import Standing, note_cancelled, standings
from slurm.submission import Array, alone, arrays, script, snapshot
from slurm.submission import submit as submit_arrays

UNFINISHED = ("failed", "cancelled", "lost", "started", "not started")
"""States of runs that `submit` submits."""

QUEUE_RETRIES = 30
"""How often in a row `wait` accepts no answer from the queue, for example while Slurm restarts."""


@dataclass(frozen=True)
class Runs(selection.Runs):
    """The runs that a command works on, and the number of GPUs for each."""

    gpus: Annotated[
        int, arg(help="Data-parallel runs with N ranks, one GPU each, if N divides m (analysis takes --gpus N too).")
    ] = 1

    @property
    def specs(self) -> list[Run]:
        """The runs; those whose micro-batches `gpus` divides use several GPUs."""
        _check(gpus=self.gpus)
        specs = super().specs
        if self.gpus > 1 and any(spec.device == "cpu" for spec in specs):
            raise SlurmError(f"gpus is {self.gpus}, but these runs use no GPU: leave it out, or use --profile paper.")
        ranked = with_ranks(specs, self.gpus)
        if single := sum(spec.processes == 1 for spec in ranked) * (self.gpus > 1):
            print(
                f"{single} of {len(specs)} runs stay on one GPU: each rank perturbs its own micro-batches, so the "
                "number of ranks must divide m.",
                file=sys.stderr,
            )
        return ranked

    def command(self, name: str) -> str:
        """A command of this program for the same runs, for the user to copy."""
        words = ["python -m slurm", name, self.target, "--profile", self.profile]
        words += ["--seeds", str(self.seeds)] * (self.seeds is not None)
        words += ["--gpus", str(self.gpus)] * (self.gpus > 1)
        for option, texts in (("--set", self.set), ("--where", self.where)):
            words += [word for text in texts for word in (option, shlex.quote(text))]
        words += ["--unpublished"] * self.unpublished
        words += ["--results", shlex.quote(str(self.root))] * (self.root != DEFAULT_ROOT)
        return " ".join(words)


def submit(
    runs: OmitArgPrefixes[Runs],
    data_root: Path | None = None,
    nodes: int = 1,
    runs_per_job: int = 1,
    parallelism: int | None = None,
    minutes: int | None = None,
    site_file: Annotated[Path | None, arg(name="site")] = None,
    partition: str | None = None,
    cluster: Literal["slurm", "local"] = "slurm",
    dry_run: bool = False,
) -> int:
    """Submit the runs of a target that are neither done nor queued, and return immediately.

    Args:
        data_root: A folder with the data sets, searched first (or set MSAM_DATA).
        nodes: Number of nodes for the ranks of a data-parallel run.
        runs_per_job: Small runs can share a job, which trains them one after the other.
        parallelism: Most jobs to run at a time; default: no limit.
        minutes: Time limit of a run; default: from measured times, or the model family's limit. A run that needs longer
            is requeued and resumes.
        site_file: The cluster's TOML file (or set MSAM_SLURM_SITE); default: ~/.config/msam/slurm.toml.
        partition: Overrides the site's partition.
        cluster: "local" trains on this machine's cores or GPUs instead, like python -m experiments run.
        dry_run: Print the jobs, their sbatch scripts and the GPU-hours, and let sbatch check them; submit nothing.
    """
    _check(nodes=nodes, runs_per_job=runs_per_job, parallelism=parallelism)
    if minutes is not None and minutes < LEAST_MINUTES:
        raise SlurmError(
            f"minutes is {minutes}, but must be {LEAST_MINUTES} or more, to leave time for a checkpoint before the end."
        )
    specs, results = runs.specs, runs.root
    if cluster == "local":
        return _train_locally(runs, data_root)
    _check_paths(specs)
    facts = site.read(site_file, partition)
    estimate = load_estimate(results)
    packed: dict[str, Any] = {"runs_per_job": runs_per_job, "nodes": nodes, "minutes": minutes}
    try:
        packed["largest"] = scheduler.largest_array()
    except SlurmError as error:
        if not dry_run:
            local_command = f"{runs.command('submit')} --cluster local"
            raise SlurmError(f"{error} To train on this machine's cores or GPUs: {local_command}") from None
        print(error, file=sys.stderr)
    if dry_run:
        checked = "largest" in packed
        waiting = _unfinished(standings(specs, results, need_queue=checked))
        chosen = arrays(waiting, estimate, **packed)
        scripts = [script(array, results, facts, parallelism) for array in chosen]
        return _dry_run(chosen, scripts, estimate, len(specs), checked)
    with alone(results):
        waiting = _unfinished(standings(specs, results, need_queue=True))
        if not waiting:
            print(f"All {len(specs)} runs of {runs} are done or queued; there is nothing to submit.")
            return 0
        chosen = arrays(waiting, estimate, **packed)
        code = snapshot(results)
        work = Work(
            results=str(results),
            data_root=str(data_root.absolute()) if data_root else None,
            submitted=checkout(" ".join(["python -m slurm", *sys.argv[1:]])),
            code=code.name,
        )
        folder, ids = submit_arrays(chosen, work, facts, code=code, parallelism=parallelism)
    print(f"Submitted {len(waiting)} of {len(specs)} runs of {runs} in jobs {', '.join(ids)}.")
    print(f"Logs:    {folder}/JOB_0_log.out")
    print(f"State:   {runs.command('status')}")
    print(f"To stop: scancel {' '.join(ids)}")
    return 0


def status(runs: OmitArgPrefixes[Runs]) -> int:
    """Show each run as done, running, queued, failed, cancelled, lost (no record, no job), started or not started."""
    states = standings(runs.specs, runs.root)
    for run in states:
        log = f"\n{'':14}log: {run.place.log}" if run.place and run.state in ("failed", "lost") else ""
        print(f"{run.spec.run_id}  {run.state:<11} {run.spec.title}{run.words}{log}")
    print(f"\n{_state_counts(states)}.")
    return 0


def wait(runs: OmitArgPrefixes[Runs], every: float = 10.0) -> int:
    """Wait until no run of the target is queued or running; exit with status 1 unless all are done.

    Args:
        every: Seconds between queries.
    """
    _check(every=every)
    specs, before, failures = runs.specs, "", 0
    while True:
        try:
            states = standings(specs, runs.root, need_queue=True)
        except SlurmError as error:
            failures += 1
            if failures > QUEUE_RETRIES:
                raise
            print(f"{time.strftime('%H:%M:%S')}  {error} Retrying.", file=sys.stderr, flush=True)
            time.sleep(every)
            continue
        failures = 0
        if (now := _state_counts(states)) != before:
            print(f"{time.strftime('%H:%M:%S')}  {now}", flush=True)
            before = now
        if not any(run.waiting for run in states):
            break
        time.sleep(every)
    not_done = [run for run in states if run.state != "done"]
    for run in not_done:
        print(f"{run.spec.run_id}  {run.state:<11} {run.spec.title}{run.words}", file=sys.stderr)
    return 1 if not_done else 0


def cancel(runs: OmitArgPrefixes[Runs]) -> int:
    """Cancel the jobs of a target's queued and running runs, including other runs in the same jobs."""
    states = standings(runs.specs, runs.root, need_queue=True)
    places = [run.place for run in states if run.waiting and run.place]
    jobs = list(dict.fromkeys(place.job for place in places))
    if not jobs:
        print(f"No run of {runs} is queued or running.")
        return 0
    scheduler.cancel(jobs)
    note_cancelled(places)
    print(
        f"Asked Slurm to cancel {len(jobs)} jobs. Running jobs write their checkpoints first. To see when they have "
        f"ended: {runs.command('status')}"
    )
    return 0


def _check_paths(specs: Sequence[Run]) -> None:
    """Check that paths in specs are absolute, since jobs run in another folder; make MSAM_DATA absolute."""
    if os.environ.get("MSAM_DATA"):
        os.environ["MSAM_DATA"] = os.path.abspath(os.environ["MSAM_DATA"])
    for spec in specs:
        if "/" in spec.model and not Path(spec.model).expanduser().is_absolute():
            raise SlurmError(f"model is {spec.model!r}, but jobs run in another folder: give its absolute path.")
        if (start := spec.flat["start_weights"]) and not Path(start).expanduser().is_absolute():
            raise SlurmError(f"start_weights is {start!r}, but jobs run in another folder: give its absolute path.")


def _unfinished(states: Sequence[Standing]) -> list[Run]:
    for run in states:
        if run.state == "damaged":
            raise RecordError(f"{run.spec.run_id} is damaged{run.words}")
    return [run.spec for run in states if run.state in UNFINISHED]


def _dry_run(chosen: Sequence[Array], scripts: Sequence[str], estimate: Estimate, total: int, checked: bool) -> int:
    hours, runs, rejected = 0.0, 0, False
    for array, text in zip(chosen, scripts, strict=True):
        size = array.size
        print(
            f"{len(array.jobs)} jobs, each: {array.ranks} ranks on {array.nodes} nodes; per rank: {size.gpus} GPUs, "
            f"{size.cpus} CPUs, {size.memory_gb:g} GB; {size.minutes} minutes"
        )
        for number, job in enumerate(array.jobs):
            for spec in job:
                print(f"  {number:>4}  {spec.run_id}  {spec.title}")
                hours, runs = hours + gpu_hours(spec, estimate), runs + 1
        print(f"\n{text}")
        if checked:
            try:
                print(f"sbatch --test-only: {scheduler.test_only(text)}\n")
            except SlurmError as error:
                rejected = True
                print(f"{error}\n", file=sys.stderr)
    print(
        f"{runs} of {total} runs would be submitted: about {hours:.1f} GPU-hours (guessed unless "
        "measured; no GPU has run these yet)."
    )
    return 2 if rejected else 0


def _train_locally(runs: Runs, data_root: Path | None) -> int:
    """Train on this machine's cores or GPUs, like `python -m experiments run`."""
    if runs.gpus > 1:
        raise SlurmError("Runs with several ranks need Slurm: leave --gpus out with --cluster local.")
    from experiments.__main__ import run

    return run(runs, data_root=data_root)


def _state_counts(states: Sequence[Standing]) -> str:
    counts = Counter(run.state for run in states)
    return ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise SlurmError(f"{name.replace('_', '-')} is {value}, but must be greater than 0.")


def main() -> None:
    """Run the command line. A mistake by the user prints one sentence and exits with status 2."""
    commands: dict[str, Callable[..., int]] = {"submit": submit, "status": status, "wait": wait, "cancel": cancel}
    logging.basicConfig(format="%(message)s", stream=sys.stderr)

    def command() -> int:
        with sentences("python -m slurm", commands):
            return tyro.extras.subcommand_cli_from_dict(commands, prog="python -m slurm", description=__doc__)

    end_with(
        command,
        stopped="Stopped. Queued and running jobs go on: python -m slurm cancel ends them.",
    )


if __name__ == "__main__":
    main()
