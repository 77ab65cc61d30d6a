"""What is left of a target: its runs, the time they will take and, on GPUs, hours and disk space."""

import contextlib
import math

from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import Estimate, disk_bytes, gpu_hours, load_estimate
from experiments.harness.runs.grids import with_networks
from experiments.harness.runs.process import cores
from experiments.harness.runs.record import duration, record_of
from experiments.harness.runs.selection import Runs
from experiments.harness.runs.spec import Run, SpecError, Timing

NIGHT_HOURS = 12


def print_plan(runs: Runs, jobs: int | None) -> None:
    """Print each run with its state or its expected time, then the time of all that is left.

    Args:
        runs: The target.
        jobs: Number of workers (or GPUs) to plan for; None: one per core, or one GPU.
    """
    specs, results = runs.specs, runs.root
    estimate, left, longest, alone, unknown = load_estimate(results), 0.0, 0.0, 0.0, 0
    for spec in specs:
        done = record_of(spec, results).done
        measured = estimate.seconds(spec) is not None
        seconds = estimate.weight(spec) if measured or spec.device == "cuda" else None
        if not done:
            unknown += seconds is None
            if isinstance(spec, Timing):  # timing runs go one at a time
                alone += seconds or 0
            else:
                left, longest = left + (seconds or 0), max(longest, seconds or 0)
        about = "about" if measured else "guess:"
        when = "done" if done else "time unknown" if seconds is None else f"{about} {duration(seconds)}"
        print(f"{spec.run_id}  {when:<14} {spec.title}")
    waiting = [spec for spec in specs if not record_of(spec, results).done]
    print(f"\n{len(specs)} runs, {len(specs) - len(waiting)} done, {len(waiting)} to do.")
    if waiting:
        jobs = jobs or (cores() if waiting[0].device == "cpu" else 1)  # counting GPUs would load torch
        guessed = all(estimate.seconds(spec) is None for spec in waiting)
        where = "runs in this results folder" if estimate.here else "the committed runs, on other machines"
        source = "a guess" if guessed else f"from {where}"
        words = f"About {duration(max(left / jobs, longest) + alone)} with {jobs} workers, {source}"
        words = words if unknown < len(waiting) else "Time unknown"
        unmeasured = f"; {unknown} of them have no measured step time yet" if unknown else ""
        print(f"{words}{unmeasured}.")
    if any(spec.device == "cuda" for spec in waiting):
        _print_gpu_plan(runs, waiting, estimate, jobs or 1)


def _print_gpu_plan(runs: Runs, waiting: list[Run], estimate: Estimate, gpus: int) -> None:
    """GPU time of each table and in total, nights and disk space."""
    print("\nGPU time, from measured steps where available, otherwise guessed (facts.py says from what):")
    tables = list(dict.fromkeys(e.table for e in catalogue.catalogue().values()))
    tables += [f"{name}-tuning" for name in tables if f"{name}-tuning" in catalogue.targets()]
    for name in tables if runs.target == "all" else [runs.target]:
        with contextlib.suppress(SpecError):  # a table without runs in this profile
            specs = {*with_networks(catalogue.runs(name, runs.profile, runs.seeds, runs.set))}
            left = {spec for spec in specs if not record_of(spec, runs.root).done}
            note = " (a grid, not part of the target all)" if left - set(waiting) else ""
            time_left = duration(3600 * sum(gpu_hours(spec, estimate) for spec in left))
            print(f"  {name:<21} {len(left):>5} runs {time_left:>8}{note}")
    hours = sum(gpu_hours(spec, estimate) for spec in waiting)
    print(f"  {'in total':<21} {len(waiting):>5} runs {duration(3600 * hours):>8}, each shared run counted once")
    nights = ", ".join(f"{math.ceil(hours / n / NIGHT_HOURS)} on {n}" for n in sorted({1, 4, 8, gpus}))
    print(f"Nights of {NIGHT_HOURS} hours: {nights} GPUs.")
    kept = sum(disk_bytes(spec)[0] for spec in waiting)
    working = sorted((disk_bytes(spec)[1] for spec in waiting), reverse=True)[:gpus]
    print(f"Disk: {kept / 1e9:.0f} GB for final weights, plus {sum(working) / 1e9:.1f} GB for {gpus} at a time.")
