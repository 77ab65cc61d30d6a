"""A timing run: the time of a full training step of each method, with the methods interleaved.

All methods take steps in one process, on the same network and batches. Each round times every method once, in a new
order, so that anything that slows the machine affects all of them equally. The first round is discarded. Then the same
is timed data-parallel, in `spec.workers` processes that share each mini-batch. A step is zero_grad, the gradient and
the optimizer step, on data that is already loaded. The base optimizer's gradient is `loss.backward()`.

    python -m experiments.harness.work.timing SPEC STORE RANK       # the command of one data-parallel process
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import binom
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import msam
from experiments.harness.runs.grids import timed_steps
from experiments.harness.runs.process import cores
from experiments.harness.runs.record import Record
from experiments.harness.runs.spec import Timing, Training, from_dict
from experiments.harness.tasks.build import build_task
from experiments.harness.tasks.process import set_torch, torch_environment
from experiments.harness.tasks.task import Task
from experiments.harness.work.session import Session
from experiments.harness.work.train import build_optimizer
from msam.graph import Captured
from msam.perturbation import Weights
from msam.state import State

BATCHES = 4
"""Number of different mini-batches; the rounds cycle through them."""


def measure(spec: Timing, record: Record, session: Session) -> None:
    """Time the steps on one worker, then on `spec.workers`. Each kind of step is a line of metrics.jsonl.

    The summary has the lines' numbers by method, m and workers: `msam_m4_w1_seconds`, ...

    Raises:
        Interrupted: if `session.stop` returns True; the run starts over next time.
        RuntimeError: if the workers need more cores than there are, or a data-parallel process failed.
    """
    started = time.monotonic()
    record.rewind(-1)
    rounds = spec.rounds + 1

    def each(done: int) -> None:
        session.stop_if_asked(f"Stopped after {done} of {rounds} rounds.")
        session.report(done, 2 * rounds)

    if spec.device == "cpu" and spec.workers * spec.threads > (available := cores()):
        raise RuntimeError(
            f"{spec.workers} workers of {spec.threads} threads need more than the {available} available cores: lower "
            "workers or threads."
        )
    set_torch(spec)
    task = _task(spec, session.data_root)
    record.add_environment({**session.environment, **task.data, **torch_environment(spec)})
    lines = timed(spec, task, task.model, 1, 0, each)
    if spec.workers > 1:
        lines += data_parallel(spec, session)
    for line in lines:
        record.append({**line, "step": len(lines), "steps": len(lines)})
    named = {
        f"{line['measure']}_m{line['m']}_w{line['workers']}_{name}": value
        for line in lines
        for name, value in line.items()
        if name not in ("measure", "m", "workers")
    }
    parameters = sum(p.numel() for p in task.model.parameters())
    record.finish({**named, "parameters": parameters, "wall_seconds": round(time.monotonic() - started, 3)})


def timed(
    spec: Timing, task: Task, model: nn.Module, workers: int, rank: int, each: Callable[[int], None] = lambda done: None
) -> list[dict[str, Any]]:
    """Time the steps in this process, which is one of `workers` that share every mini-batch.

    Args:
        spec: The run.
        task: Its task.
        model: The task's model, in DistributedDataParallel if there are several workers.
        workers: Number of processes.
        rank: Rank of this process.
        each: Called after each round with the number of finished rounds.

    Returns:
        One line per step: `seconds` (the median over the rounds), `ratio` and `over_sam` (the medians of the ratios to
        the base optimizer and to SAM within each round) with their 95 % intervals `_low` and `_high`,
        `examples_per_second`, the peak memory allocated in a step (of a captured one, what its graph keeps), and the
        bytes that are all-reduced.
    """
    reduced = _ReducedBytes()
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(reduced, _count_and_reduce)
    optimizer, steps = build_optimizer(spec, task.model), timed_steps(spec, workers)
    shares = [_share(batch, workers, rank) for batch in islice(cycle(task.batches(0, 0)), BATCHES)]
    model.train()

    loss_fn = partial(task.loss_fn, model)
    captured = {cell: _captured(cell, loss_fn, shares[0], model, optimizer) for cell in steps if cell.capture}

    def take(cell: Training, batch: Any) -> None:
        if cell.capture:
            captured[cell](batch)
            return
        optimizer.zero_grad()
        if cell.method == "base":
            loss_fn(batch).backward()
        elif cell.method == "sam" and workers > 1:
            _synchronous_sam(loss_fn, batch, task.model, cell.rho)
        else:
            msam.backward(loss_fn, batch, model, **_options(cell, workers))
        optimizer.step()

    times: dict[Training, list[float]] = {step: [] for step in steps}
    for number, batch in zip(range(spec.rounds + 1), cycle(shares)):
        for step in random.Random(number).sample(steps, len(steps)):
            seconds = _seconds(spec, workers, partial(take, step, batch))
            if number:
                times[step].append(seconds)
        each(number + 1)
    base, sam = (times[next(step for step in steps if step.method == method)] for method in ("base", "sam"))
    lines = []
    for step in steps:
        reduced.bytes = 0
        memory = captured[step].bytes if step.capture else peak_bytes(partial(take, step, shares[0]), spec.device)
        lines.append(
            {"measure": step.method, "m": step.micro_batches, "workers": workers}
            | median_interval("seconds", times[step])
            | median_interval("ratio", _within_rounds(times[step], base))
            | median_interval("over_sam", _within_rounds(times[step], sam))
            | {
                "examples_per_second": spec.batch_size / median(times[step]),
                "memory_bytes": memory,
                "reduced_bytes": reduced.bytes,
            }
        )
    return lines


def _captured(
    cell: Training,
    loss_fn: Callable[[Any], torch.Tensor],
    batch: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Captured:
    """A cell's whole step as one CUDA graph."""
    return msam.capture(loss_fn, batch, model, optimizer, **_options(cell, 1))


def _options(cell: Training, workers: int) -> dict[str, Any]:
    """The cell's arguments of `msam.backward` in one of `workers` processes."""
    return {"rho": cell.rho, "micro_batches": cell.micro_batches // workers, "passes": cell.passes}


def _synchronous_sam(loss_fn: Callable[[Any], torch.Tensor], batch: Any, network: nn.Module, rho: float) -> None:
    """Data-parallel SAM: one perturbation for all workers, from the averaged gradient. It takes two all-reduces."""
    params = list(network.parameters())
    state = State([network], params, lazily=True)
    before = state.taken("before")
    loss_fn(batch).backward()
    gradient = [p.grad for p in params]
    network.zero_grad()
    with Weights(params, rho, adaptive=False).moved(gradient), state.rewound(before):
        loss_fn(batch).backward()


def peak_bytes(step: Callable[[], None], device: str = "cpu") -> int:
    """The peak memory that a step allocates, in addition to what was allocated before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def _task(spec: Timing, data_root: Path | None) -> Task:
    torch.manual_seed(spec.seed)
    return build_task(spec, data_root)


def _share(batch: Any, workers: int, rank: int) -> Any:
    return msam.split(batch, workers)[rank]


def _seconds(spec: Timing, workers: int, step: Callable[[], None]) -> float:
    """Seconds of one step, started together by all workers, including its work on the device."""
    if workers > 1:
        dist.barrier()
    started = time.perf_counter()
    step()
    if spec.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median and its 95 % interval from order statistics (binomial)."""
    ordered = sorted(values)
    first = max(int(binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
    return {name: median(ordered), f"{name}_low": ordered[first], f"{name}_high": ordered[-1 - first]}


def _within_rounds(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, others, strict=True)]


class _ReducedBytes:
    """Counts the bytes that are all-reduced."""

    def __init__(self) -> None:
        self.bytes = 0


def _count_and_reduce(reduced: _ReducedBytes, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    reduced.bytes += bucket.buffer().nbytes
    world = dist.group.WORLD
    assert world is not None
    return allreduce_hook(world, bucket)


def data_parallel(spec: Timing, session: Session) -> list[dict[str, Any]]:
    """The lines of the first of `spec.workers` processes, started here."""
    with tempfile.TemporaryDirectory() as folder:
        data_root = None if session.data_root is None else str(session.data_root)
        task = json.dumps({"spec": spec.to_dict(), "data_root": data_root})
        command = [sys.executable, "-m", "experiments.harness.work.timing", task, folder]
        processes = []
        try:
            for rank in range(spec.workers):
                with open(Path(folder) / f"{rank}.log", "w") as log:
                    processes.append(subprocess.Popen([*command, str(rank)], stdout=log, stderr=log))
            while any(p.poll() is None for p in processes):
                session.stop_if_asked("Stopped in the data-parallel rounds.")
                if any(p.poll() for p in processes):
                    break
                time.sleep(0.2)
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            logs = "\n".join((Path(folder) / f"{rank}.log").read_text()[-2000:] for rank in failed)
            raise RuntimeError(f"Data-parallel process {failed[0]} of {spec.workers} failed:\n{logs}")
        return json.loads((Path(folder) / "lines.json").read_text())


def main() -> None:
    """Run one of the data-parallel processes."""
    job, folder, rank = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    spec, data_root = from_dict(job["spec"]), job["data_root"]
    assert isinstance(spec, Timing)
    set_torch(spec)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=spec.workers)
    task = _task(spec, Path(data_root) if data_root else None)
    lines = timed(spec, task, DistributedDataParallel(task.model), spec.workers, rank)
    if rank == 0:
        (folder / "lines.json").write_text(json.dumps(lines))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
