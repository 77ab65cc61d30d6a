"""python -m slurm submit | status | wait | cancel: the runs of `python -m experiments` on a Slurm cluster."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from experiments.__main__ import Profile, Results, Seeds, Set, Target
from experiments.harness import catalogue
from experiments.harness.estimate import measured
from experiments.harness.provenance import environment
from experiments.harness.record import DEFAULT_ROOT, RecordError
from experiments.harness.spec import Spec, SpecError
from slurm import scheduler, site
from slurm.resources import LEAST_MINUTES, gpu_hours
from slurm.scheduler import SlurmError
from slurm.submission import Array, Standing, alone, arrays, note_cancelled, script, standings
from slurm.submission import submit as hand_over

Gpus = Annotated[int, arg(help="Ranks of a data-parallel run, one GPU each, where that divides its micro-batches.")]

UNFINISHED = ("failed", "cancelled", "lost", "begun", "not begun")
"""States of runs that `submit` submits."""


def submit(
    target: Positional[Target],
    profile: Profile = "cpu",
    seeds: Seeds = None,
    set: Set = (),
    results: Results = DEFAULT_ROOT,
    data_root: Path | None = None,
    gpus: Gpus = 1,
    nodes: int = 1,
    runs_per_job: int = 1,
    parallelism: int | None = None,
    minutes: int | None = None,
    site_file: Annotated[Path | None, arg(name="site")] = None,
    partition: str | None = None,
    cluster: Literal["slurm", "local"] = "slurm",
    dry_run: bool = False,
) -> int:
    """Submit the runs of a target that are neither done nor queued, and return at once.

    Args:
        data_root: A folder with the data sets, looked into first (or set MSAM_DATA).
        nodes: Nodes that the ranks of a data-parallel run are spread over.
        runs_per_job: Small runs can share a job, which trains them one after the other.
        parallelism: How many jobs may run at a time; left out: as many as Slurm likes.
        minutes: Time limit of a run; left out: from measured times, or the family's own. A run that needs longer is
            queued again and goes on.
        site_file: The cluster's TOML file (or set MSAM_SLURM_SITE; ~/.config/msam/slurm.toml else).
        partition: Put in place of the site's.
        cluster: "local" trains on this machine's cores or GPUs instead, as python -m experiments run does.
        dry_run: Print the jobs, their sbatch scripts and the GPU-hours, let sbatch check them, submit nothing.
    """
    _check(gpus=gpus, nodes=nodes, runs_per_job=runs_per_job, parallelism=parallelism)
    if minutes is not None and minutes < LEAST_MINUTES:
        raise SlurmError(f"minutes is {minutes}, but must be {LEAST_MINUTES} or more, for a checkpoint before the end.")
    specs = _specs(target, profile, seeds, set, gpus)
    results = results.absolute()
    if cluster == "local":
        if gpus > 1:
            raise SlurmError("Runs of several ranks need Slurm: leave --gpus out with --cluster local.")
        from experiments.__main__ import run

        return run(target, profile, seeds, set, results=results, data_root=data_root)
    facts = site.read(site_file, partition)
    estimate, packed = measured(results), {"runs_per_job": runs_per_job, "nodes": nodes, "minutes": minutes}
    try:
        packed["largest"] = scheduler.largest_array()
    except SlurmError as error:
        if not dry_run:
            local = f"python -m slurm submit {target} --profile {profile} --cluster local"
            raise SlurmError(f"{error} To train on this machine's cores or GPUs: {local}") from None
        print(error, file=sys.stderr)
    if dry_run:
        checked = "largest" in packed
        waiting = _to_submit(standings(specs, results)) if checked else specs
        return _dry_run(arrays(waiting, estimate, **packed), results, facts, parallelism, len(specs), checked)
    with alone(results):
        waiting = _to_submit(standings(specs, results))
        if not waiting:
            print(f"All {len(specs)} runs of {target} ({profile}) are done or queued; nothing to submit.")
            return 0
        found = arrays(waiting, estimate, **packed)
        for array in found:
            scheduler.test_only(script(array, results, facts, parallelism))
        told = environment(" ".join(["python -m slurm", *sys.argv[1:]]))
        session = {name: told[name] for name in ("commit", "dirty", "code", "command")}
        folder, ids = hand_over(
            found,
            results,
            facts,
            session=session,
            data_root=str(data_root.absolute()) if data_root else None,
            parallelism=parallelism,
        )
    print(f"Submitted {len(waiting)} of {len(specs)} runs of {target} ({profile}) in jobs {', '.join(ids)}.")
    print(f"Logs:    {folder}/JOB_0_log.out\nState:   python -m slurm status {target} --profile {profile}")
    print(f"To stop: scancel {' '.join(ids)}")
    return 0


def status(
    target: Positional[Target],
    profile: Profile = "cpu",
    seeds: Seeds = None,
    set: Set = (),
    results: Results = DEFAULT_ROOT,
    gpus: Gpus = 1,
) -> int:
    """Say of each run whether it is done, running, queued, failed, cancelled, lost (no record, no job) or not begun."""
    found = standings(_specs(target, profile, seeds, set, gpus), results.absolute())
    for run in found:
        log = f"\n{'':14}log: {run.place.log}" if run.place and run.state in ("failed", "lost") else ""
        print(f"{run.spec.run_id}  {run.state:<9} {run.spec.title}{run.words}{log}")
    print(f"\n{_counted(found)}.")
    return 0


def wait(
    target: Positional[Target],
    profile: Profile = "cpu",
    seeds: Seeds = None,
    set: Set = (),
    results: Results = DEFAULT_ROOT,
    gpus: Gpus = 1,
    every: float = 10.0,
) -> int:
    """Wait until no run of the target is queued or running any more; status 1 unless all are done then.

    Args:
        every: Seconds between looks.
    """
    _check(every=every)
    specs, before = _specs(target, profile, seeds, set, gpus), ""
    while True:
        found = standings(specs, results.absolute())
        if (now := _counted(found)) != before:
            print(f"{time.strftime('%H:%M:%S')}  {now}", flush=True)
            before = now
        if not any(run.waiting for run in found):
            break
        if any(run.state == "submitted" for run in found):
            raise SlurmError("The queue cannot be asked from here (no squeue): wait on a machine of the cluster.")
        time.sleep(every)
    unfinished = [run for run in found if run.state != "done"]
    for run in unfinished:
        print(f"{run.spec.run_id}  {run.state:<9} {run.spec.title}{run.words}", file=sys.stderr)
    return 1 if unfinished else 0


def cancel(
    target: Positional[Target],
    profile: Profile = "cpu",
    seeds: Seeds = None,
    set: Set = (),
    results: Results = DEFAULT_ROOT,
    gpus: Gpus = 1,
) -> int:
    """Ask Slurm to end the jobs of a target's queued and running runs, with whatever other runs share them."""
    scheduler.largest_array()
    found = standings(_specs(target, profile, seeds, set, gpus), results.absolute())
    places = [run.place for run in found if run.waiting and run.place and run.place.job]
    jobs = list(dict.fromkeys(place.job for place in places))
    if not jobs:
        print(f"No run of {target} ({profile}) is queued or running.")
        return 0
    scheduler.cancel(jobs)
    note_cancelled(places)
    print(
        f"Asked Slurm to end {len(jobs)} jobs. Those that run write their checkpoints first: "
        f"python -m slurm status {target} --profile {profile} tells when they are gone."
    )
    return 0


def _specs(target: str, profile: str, seeds: int | None, changes: tuple[str, ...], gpus: int) -> list[Spec]:
    """The runs, those on several GPUs where `gpus` divides their micro-batches."""
    specs = catalogue.runs(target, profile, seeds, changes)
    if gpus == 1:
        return specs
    if any(spec.device == "cpu" for spec in specs):
        raise SlurmError(f"gpus is {gpus}, but these runs use no GPU: leave it out, or take --profile paper.")
    fit = [spec.micro_batches % gpus == 0 and spec.batch_size % gpus == 0 for spec in specs]
    if not all(fit):
        print(
            f"{fit.count(False)} of {len(specs)} runs stay on one GPU: each rank perturbs its own micro-batches, so "
            f"the ranks must divide m.",
            file=sys.stderr,
        )
    return [replace(spec, ranks=gpus) if fits else spec for spec, fits in zip(specs, fit, strict=True)]


def _to_submit(found: Sequence[Standing]) -> list[Spec]:
    for run in found:
        if run.state == "damaged":
            raise RecordError(f"{run.spec.run_id} is damaged{run.words}")
    return [run.spec for run in found if run.state in UNFINISHED]


def _dry_run(
    found: list[Array], results: Path, facts: site.Site, parallelism: int | None, wanted: int, checked: bool
) -> int:
    estimate, hours, runs = measured(results), 0.0, 0
    for array in found:
        size = array.size
        print(
            f"{len(array.jobs)} jobs, each: {array.ranks} ranks on {array.nodes} nodes; a rank: {size.gpus} GPUs, "
            f"{size.cpus} CPUs, {size.memory_gb:g} GB; {size.minutes} minutes"
        )
        for number, job in enumerate(array.jobs):
            for spec in job:
                print(f"  {number:>4}  {spec.run_id}  {spec.title}")
                hours, runs = hours + gpu_hours(spec, estimate), runs + 1
        text = script(array, results, facts, parallelism)
        print(f"\n{text}")
        if checked:
            print(f"sbatch --test-only: {scheduler.test_only(text)}\n")
    print(
        f"{runs} of {wanted} runs would be submitted: about {hours:.1f} GPU-hours (guessed for an A100-class GPU where "
        "nothing was measured; no GPU has run these yet)."
    )
    return 0


def _counted(found: Sequence[Standing]) -> str:
    counts = Counter(run.state for run in found)
    return ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))


def _check(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise SlurmError(f"{name.replace('_', '-')} is {value}, but must be greater than 0.")


def main() -> None:
    """Run the command line; a mistake in it ends with one sentence and exit status 2."""
    commands: dict[str, Callable[..., int]] = {"submit": submit, "status": status, "wait": wait, "cancel": cancel}
    try:
        code = tyro.extras.subcommand_cli_from_dict(commands, prog="python -m slurm", description=__doc__)
    except (SpecError, RecordError) as error:
        print(error, file=sys.stderr)
        code = 2
    except BrokenPipeError:
        code = 0
    except KeyboardInterrupt:
        print("\nStopped looking. What is queued or running goes on: python -m slurm cancel ends it.", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
