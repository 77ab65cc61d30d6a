"""The one training loop."""

import contextlib
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import msam
from experiments.harness.runs.facts import is_images
from experiments.harness.runs.record import Record, record_of
from experiments.harness.runs.spec import Network, Training
from experiments.harness.tasks.build import build_task
from experiments.harness.tasks.process import here, set_torch
from experiments.harness.tasks.task import Task
from experiments.harness.work.average import MovingAverage
from experiments.harness.work.checkpoint import Progress, load_checkpoint, save_checkpoint, save_weights
from experiments.harness.work.ranks import Ranks
from experiments.harness.work.session import Diverged, Interrupted

CHECK_EVERY = 50
"""Steps between looks at the losses, each of which waits for the device."""


def train(
    spec: Training,
    root: Path,
    *,
    data_root: str | None = None,
    environment: Mapping[str, Any] | None = None,
    redo: bool = False,
    checkpoint_seconds: float = 20.0,
    report: Callable[[int, int], None] = lambda step, steps: None,
    stop: Callable[[], bool] = lambda: False,
    build: Callable[[Training, str | None], Task] = build_task,
) -> None:
    """Train the spec's run to its end, from its last checkpoint if there is one; a finished run is left alone.

    Args:
        spec: The run.
        root: The results root; the record is `root/runs/<run_id>/`.
        data_root: A folder to look for data in first.
        environment: Provenance of this session, for the record.
        redo: Delete what there is of this run first, and train it anew.
        checkpoint_seconds: Least time between checkpoints, and as many times what one takes to write where that is
            more than a second. It does not change the run's numbers.
        report: Called with (steps done, steps in all) as the run goes on.
        stop: Asked before every step; True writes a checkpoint and raises `Interrupted`.
        build: Makes the task from spec and data root.

    A run of several ranks is trained by as many processes (see `ranks.py`), each of which calls this.

    Raises:
        Interrupted: if `stop` said so, on any rank.
        RunLocked: if another process trains this run.
        RecordError: if its folder holds something else, or a newer version's record; nothing is touched then.
        Diverged: if a loss or a final score is not finite; like any other failure it is also in the record.
    """
    record, ranks = record_of(spec, root), Ranks(spec)
    with record.locked() if ranks.first else contextlib.nullcontext():
        if ranks.any(ranks.first and not record.begin(spec, redo=redo)) == [True]:
            return
        try:
            with record.session() if ranks.first else contextlib.nullcontext():
                _train(spec, record, ranks, build, data_root, environment or {}, checkpoint_seconds, report, stop)
        except Interrupted:
            raise
        except Exception as error:
            if ranks.count == 1 or record.failure() is None:  # the other ranks only see that one is gone
                record.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
            raise


def _train(
    spec: Training,
    record: Record,
    ranks: Ranks,
    build: Callable[[Training, str | None], Task],
    data_root: str | None,
    environment: Mapping[str, Any],
    checkpoint_seconds: float,
    report: Callable[[int, int], None],
    stop: Callable[[], bool],
) -> None:
    set_torch(spec)
    ranks.seed()
    task = build(spec, data_root)
    model = ranks.wrapped(task.model)
    loss_fn = partial(task.loss_fn, _compiled(model, spec) if spec.compile else model)
    steps = spec.epochs * task.steps_per_epoch
    optimizer = build_optimizer(spec, task.model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(spec, task.steps_per_epoch))
    average = MovingAverage(task.model, spec.ema) if spec.ema else None
    state = (task.model, optimizer, scheduler, average)
    progress = load_checkpoint(record, ranks, *state)
    if ranks.first:
        record.add_environment({**environment, **task.data, **_here(spec), "first_step": progress.step + 1})
        record.rewind(progress.step // task.steps_per_epoch)
    clock, next_checkpoint = _Clock(progress), time.monotonic() + checkpoint_seconds
    seen: list[msam.Step] = []

    model.train()
    for batch in _batches_from(task, progress.step, steps):
        stopping, checkpoint_due = ranks.any(stop(), time.monotonic() > next_checkpoint)
        if stopping or checkpoint_due:
            _look(seen, progress, ranks, clock)
            begun = time.monotonic()
            save_checkpoint(record, ranks, progress, *state)
            took = time.monotonic() - begun
            next_checkpoint = time.monotonic() + checkpoint_seconds * max(1.0, took)
        if stopping:
            raise Interrupted(f"Stopped before step {progress.step + 1} of {steps}.")

        optimizer.zero_grad()
        batch, micro_batches = ranks.share(batch)
        taken = msam.backward(loss_fn, batch, model, rho=spec.rho, micro_batches=micro_batches, adaptive=spec.adaptive)
        seen.append(taken)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        optimizer.step()
        scheduler.step()
        if average is not None:
            average.update(task.model)
        progress.step += 1

        end_of_epoch = progress.step % task.steps_per_epoch == 0
        if len(seen) == CHECK_EVERY or end_of_epoch:
            _look(seen, progress, ranks, clock)
        if end_of_epoch:
            epoch = progress.step // task.steps_per_epoch
            line = _epoch_line(epoch, progress, float(scheduler.get_last_lr()[0]))
            if ranks.first:
                record.append(line | _curvature(spec, task, epoch))
        report(progress.step, steps)

    stopping, checkpoint_due = ranks.any(stop(), time.monotonic() > next_checkpoint)
    if stopping or checkpoint_due:
        save_checkpoint(record, ranks, progress, *state)
    if stopping:
        raise Interrupted("Stopped before the scores.")
    if not ranks.first:
        return
    last = record.metrics()[-1]
    if average is not None:
        task.model.load_state_dict(average.module.state_dict())
    scores = task.evaluate()
    if lost := sorted(name for name, value in scores.items() if not math.isfinite(value)):
        raise Diverged(f"failed after step {steps}: {lost[0]} is {scores[lost[0]]}. Lower learning_rate or rho.")
    clock.tick(0)
    save_weights(record, task.model)
    record.finish(
        {
            **scores,
            **_greatest_and_last([line["lambda_1"] for line in record.metrics() if "lambda_1" in line]),
            "epoch_loss": last["train_loss"],
            "sharpness": last["sharpness"],
            "steps": steps,
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "wall_seconds": round(progress.seconds, 3),
            "step_seconds": statistics.median(progress.step_seconds),
        }
    )


def _compiled(model: torch.nn.Module, spec: Training) -> Any:
    """The model through `torch.compile`, as in a process of its own: what was compiled before would change its kernels.

    Texts are of any length, and what is compiled for one would depend on where a run was resumed.
    """
    torch._dynamo.reset()
    return torch.compile(model, dynamic=not is_images(spec.dataset))


def _curvature(spec: Training, task: Task, epoch: int) -> dict[str, float]:
    """The largest Hessian eigenvalue, if it is this epoch's turn; training goes on as if nothing had been measured."""
    if not spec.curvature_every or (epoch % spec.curvature_every and epoch != spec.epochs):
        return {}
    from experiments.harness.work.hessian import lambda_1

    set_torch(replace(spec, tf32=False))  # as in Table 3
    try:
        return {"lambda_1": lambda_1(task, min(256, spec.examples))}
    finally:
        set_torch(spec)


def _greatest_and_last(eigenvalues: list[float]) -> dict[str, float]:
    """For the summary, what was measured along the training; nothing if nothing was."""
    return {"greatest_lambda_1": max(eigenvalues), "lambda_1": eigenvalues[-1]} if eigenvalues else {}


def build_optimizer(spec: Network, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The stock base optimizer over all parameters, with weight decay on those that the spec says."""
    params: Any = list(model.parameters())
    if spec.decay == "matrices":  # biases and the weights of norms are vectors
        vectors = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
        params = [{"params": [p for p in params if p.ndim > 1]}, vectors]
    fused = spec.fused or None  # None leaves the choice to torch, False would rule out its own
    if spec.base_optimizer == "adamw":
        return torch.optim.AdamW(params, spec.learning_rate, weight_decay=spec.weight_decay, fused=fused)
    return torch.optim.SGD(
        params,
        spec.learning_rate,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        nesterov=spec.nesterov,
        fused=fused,
    )


def schedule(spec: Training, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate's factor at a step (from 0): linear warm-up, then the spec's schedule."""
    steps, warmup = spec.epochs * steps_per_epoch, spec.warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if spec.schedule == "step":
            return 0.2 ** sum(step / steps >= share for share in (0.3, 0.6, 0.8))
        done = (step - warmup) / (steps - warmup)
        return 1 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _here(spec: Training) -> dict[str, Any]:
    """What this process knows of itself, for the record."""
    return {
        **here(spec),
        "ranks": spec.ranks,
        "micro_batches_per_rank": spec.micro_batches // spec.ranks,
    }


class _Clock:
    """Adds the time since the last tick to the run's own."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.last = progress, time.monotonic()

    def tick(self, steps: int) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.last
        if steps:
            self.progress.step_seconds.append((now - self.last) / steps)
        self.last = now


def _batches_from(task: Task, step: int, steps: int) -> Iterator[Any]:
    """The mini-batches of the steps from `step` (counted from 0) to the last."""
    while step < steps:
        epoch, position = divmod(step, task.steps_per_epoch)
        for batch in task.batches(epoch, position):
            yield batch
            step += 1


def _look(seen: list[msam.Step], progress: Progress, ranks: Ranks, clock: _Clock) -> None:
    """Fetch the losses of the steps since the last look.

    Raises:
        Diverged: naming the first step, from 1, whose loss is not finite.
    """
    if not seen:
        return
    losses = ranks.mean(torch.stack([s.loss for s in seen])).tolist()
    sharpness = ranks.mean(torch.stack([s.sharpness for s in seen])).tolist()
    first = progress.step - len(seen) + 1
    for step, (loss, rise) in enumerate(zip(losses, sharpness, strict=True), start=first):
        if not math.isfinite(loss + rise):
            raise Diverged(
                f"failed at step {step}: its loss is {loss}, {loss + rise} at the perturbed weights. "
                "Lower learning_rate or rho."
            )
    progress.losses += losses
    progress.sharpness += sharpness
    clock.tick(len(seen))
    seen.clear()


def _epoch_line(epoch: int, progress: Progress, learning_rate: float) -> dict[str, Any]:
    """The epoch's means for metrics.jsonl; the next epoch starts empty."""
    line = {
        "epoch": epoch,
        "step": progress.step,
        "train_loss": statistics.fmean(progress.losses),
        "sharpness": statistics.fmean(progress.sharpness),
        "learning_rate": learning_rate,
        "seconds": round(progress.seconds, 3),
    }
    progress.losses.clear()
    progress.sharpness.clear()
    return line
