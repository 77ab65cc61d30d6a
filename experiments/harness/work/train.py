"""The one training loop."""

import contextlib
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
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
from experiments.harness.tasks.process import set_torch, torch_environment
from experiments.harness.tasks.task import Task
from experiments.harness.work.average import MovingAverage
from experiments.harness.work.checkpoint import Progress, State, load_checkpoint, save_checkpoint, save_weights
from experiments.harness.work.ranks import Ranks
from experiments.harness.work.session import Diverged, Interrupted, Session

CHECK_EVERY = 50
"""Steps after which the losses are collected, which waits for the device."""


def train(
    spec: Training,
    session: Session,
    *,
    redo: bool = False,
    checkpoint_seconds: float = 20.0,
    build: Callable[[Training, Path | None], Task] = build_task,
) -> None:
    """Train the spec's run to its end, from its last checkpoint if there is one; a finished run is left unchanged.

    Args:
        spec: The run.
        session: Where its record and its data are, and whom to report to.
        redo: Delete what there is of this run first, and train it again.
        checkpoint_seconds: Least time between checkpoints, and as many times what one takes to write where that is
            more than a second. It does not change the run's numbers.
        build: Makes the task from spec and data root.

    A run of several ranks is trained by as many processes (see `ranks.py`), each of which calls this.

    Raises:
        Interrupted: if `session.stop` says so, on any rank.
        RunLocked: if another process trains this run.
        RecordError: if its folder holds something else, or a newer version's record; nothing is touched then.
        Diverged: if a loss or a final score is not finite; like any other failure it is also in the record.
    """
    record, ranks = record_of(spec, session.root), Ranks(spec)
    with record.locked() if ranks.first else contextlib.nullcontext():
        if ranks.any(ranks.first and not record.begin(spec, redo=redo)) == [True]:
            return
        try:
            with record.session() if ranks.first else contextlib.nullcontext():
                _train(spec, record, ranks, session, checkpoint_seconds, build)
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
    session: Session,
    checkpoint_seconds: float,
    build: Callable[[Training, Path | None], Task],
) -> None:
    set_torch(spec)
    ranks.seed()
    task = build(spec, session.data_root)
    model = ranks.wrapped(task.model)
    loss_fn = partial(task.loss_fn, _compiled(model, spec) if spec.compile else model)
    state = _initial_state(spec, task)
    load_checkpoint(record, ranks, state)
    progress, steps = state.progress, spec.epochs * task.steps_per_epoch
    if ranks.first:
        about = {**session.environment, **task.data, **_process(spec)}
        record.add_environment({**about, "first_step": progress.step + 1})
        record.rewind(progress.step // task.steps_per_epoch)
    keeper = _Keeper(record, ranks, session, state, checkpoint_seconds)

    model.train()
    for batch in _batches_from(task, progress.step, steps):
        keeper.checkpoint_if_due(f"Stopped before step {progress.step + 1} of {steps}.")

        state.optimizer.zero_grad()
        batch, micro_batches = ranks.share(batch)
        step = msam.backward(loss_fn, batch, model, rho=spec.rho, micro_batches=micro_batches, adaptive=spec.adaptive)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip_norm)
        state.optimizer.step()
        state.scheduler.step()
        if state.average is not None:
            state.average.update(task.model)
        progress.step += 1

        keeper.took(step)
        if progress.step % task.steps_per_epoch == 0:
            keeper.collect_losses()
            epoch = progress.step // task.steps_per_epoch
            line = _epoch_line(epoch, progress, float(state.scheduler.get_last_lr()[0]))
            if ranks.first:
                record.append(line | _curvature(spec, task, epoch))
        session.report(progress.step, steps)

    keeper.checkpoint_if_due("Stopped before the scores.")
    if ranks.first:
        _finish(record, task, state, keeper)


class _Keeper:
    """Keeps a training's record as it goes on: its losses, its checkpoints, and whether it is asked to stop.

    Args:
        record: The run's.
        ranks: Its processes, this one among them.
        session: Who asks it to stop.
        state: What a checkpoint holds.
        checkpoint_seconds: As `train` says.
    """

    def __init__(self, record: Record, ranks: Ranks, session: Session, state: State, checkpoint_seconds: float) -> None:
        self.record, self.ranks, self.session, self.state = record, ranks, session, state
        self.checkpoint_seconds = checkpoint_seconds
        self.next_checkpoint = time.monotonic() + checkpoint_seconds
        self.last_tick = time.monotonic()
        self.unread: list[msam.Step] = []

    def took(self, step: msam.Step) -> None:
        """Take in what a step returned; every `CHECK_EVERY` steps its losses are collected."""
        self.unread.append(step)
        if len(self.unread) == CHECK_EVERY:
            self.collect_losses()

    def collect_losses(self) -> None:
        """Fetch the losses of the steps since the last time.

        Raises:
            Diverged: naming the first step, from 1, whose loss is not finite.
        """
        if not self.unread:
            return
        progress = self.state.progress
        losses = self.ranks.mean(torch.stack([s.loss for s in self.unread])).tolist()
        sharpness = self.ranks.mean(torch.stack([s.sharpness for s in self.unread])).tolist()
        first = progress.step - len(self.unread) + 1
        for step, (loss, rise) in enumerate(zip(losses, sharpness, strict=True), start=first):
            if not math.isfinite(loss + rise):
                raise Diverged(
                    f"failed at step {step}: its loss is {loss}, {loss + rise} at the perturbed weights. "
                    "Lower learning_rate or rho."
                )
        progress.losses += losses
        progress.sharpness += sharpness
        self.tick(len(self.unread))
        self.unread.clear()

    def checkpoint_if_due(self, words: str) -> None:
        """Write a checkpoint if it is time for one, or if any rank is asked to stop.

        Raises:
            Interrupted: with these words, in the latter case.
        """
        stopping, due = self.ranks.any(self.session.stop(), time.monotonic() > self.next_checkpoint)
        if stopping or due:
            self.collect_losses()
            begun = time.monotonic()
            save_checkpoint(self.record, self.ranks, self.state)
            took = time.monotonic() - begun
            self.next_checkpoint = time.monotonic() + self.checkpoint_seconds * max(1.0, took)
        if stopping:
            raise Interrupted(words)

    def tick(self, steps: int) -> None:
        """Add the time since the last tick to the run's own."""
        now = time.monotonic()
        self.state.progress.seconds += now - self.last_tick
        if steps:
            self.state.progress.step_seconds.append((now - self.last_tick) / steps)
        self.last_tick = now


def _finish(record: Record, task: Task, state: State, keeper: _Keeper) -> None:
    """Score the network, keep its weights and write the summary.

    Raises:
        Diverged: if a score is not finite.
    """
    progress, lines = state.progress, record.metrics()
    if state.average is not None:
        task.model.load_state_dict(state.average.module.state_dict())
    scores = task.evaluate()
    if lost := sorted(name for name, value in scores.items() if not math.isfinite(value)):
        raise Diverged(
            f"failed after step {progress.step}: {lost[0]} is {scores[lost[0]]}. Lower learning_rate or rho."
        )
    keeper.tick(0)
    save_weights(record, task.model)
    record.finish(
        {
            **scores,
            **_greatest_and_last([line["lambda_1"] for line in lines if "lambda_1" in line]),
            "epoch_loss": lines[-1]["train_loss"],
            "sharpness": lines[-1]["sharpness"],
            "steps": progress.step,
            "parameters": sum(p.numel() for p in task.model.parameters()),
            "wall_seconds": round(progress.seconds, 3),
            "step_seconds": statistics.median(progress.step_seconds),
        }
    )


def _initial_state(spec: Training, task: Task) -> State:
    optimizer = build_optimizer(spec, task.model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(spec, task.steps_per_epoch))
    return State(task.model, optimizer, scheduler, MovingAverage(task.model, spec.ema) if spec.ema else None)


def _compiled(model: torch.nn.Module, spec: Training) -> Any:
    """The model through `torch.compile`, as in a new process: what was compiled before would change its kernels.

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


def _process(spec: Training) -> dict[str, Any]:
    """How this process computes, for the record."""
    return {
        **torch_environment(spec),
        "ranks": spec.ranks,
        "micro_batches_per_rank": spec.micro_batches // spec.ranks,
    }


def _batches_from(task: Task, step: int, steps: int) -> Iterator[Any]:
    """The mini-batches of the steps from `step` (counted from 0) to the last."""
    while step < steps:
        epoch, position = divmod(step, task.steps_per_epoch)
        for batch in task.batches(epoch, position):
            yield batch
            step += 1


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
