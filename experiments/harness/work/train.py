"""The training loop."""

import contextlib
import io
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import msam
from experiments.harness.runs.facts import is_images
from experiments.harness.runs.record import Record, record_of
from experiments.harness.runs.spec import Network, Training
from experiments.harness.tasks.build import build_task
from experiments.harness.tasks.process import set_torch, torch_environment
from experiments.harness.tasks.task import Task
from experiments.harness.work.accuracy import score_if_due
from experiments.harness.work.average import MovingAverage
from experiments.harness.work.checkpoint import Progress, State, load_checkpoint, save_checkpoint, save_weights
from experiments.harness.work.ranks import Ranks
from experiments.harness.work.session import Diverged, Interrupted, Session
from msam.graph import Captured

CHECK_EVERY = 50
"""Losses are collected every so many steps, since collecting waits for the device."""


def train(
    spec: Training,
    session: Session,
    *,
    redo: bool = False,
    checkpoint_seconds: float = 20.0,
    build: Callable[[Training, Path | None], Task] = build_task,
) -> None:
    """Start or resume the spec's run and complete it; a finished run is left unchanged.

    Args:
        spec: The run.
        session: The folders of records and data, and the callbacks for progress and stopping.
        redo: Delete this run's record first and retrain it.
        checkpoint_seconds: Shortest time between checkpoints; if writing one takes t > 1 seconds, t times as long.
            It does not change the run's numbers.
        build: Builds the task from spec and data root.

    If the run has several ranks, each of the processes calls this function (see `ranks.py`).

    Raises:
        Interrupted: if `session.stop` returns True on any rank.
        RunLocked: if another process is training this run.
        RecordError: if its folder holds another run or a newer version's record; nothing is changed then.
        Diverged: if a loss or a final score is not finite. Like any other failure it is also in the record.
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
            if ranks.count == 1 or record.failure() is None:  # keep the failing rank's message, not a follow-up error
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
    state = _initial_state(spec, task)
    load_checkpoint(record, ranks, state)
    progress, steps = state.progress, spec.epochs * task.steps_per_epoch
    if ranks.first:
        about = {**session.environment, **task.data, **_process_fields(spec)}
        record.add_environment({**about, "first_step": progress.step + 1})
        record.rewind(progress.step // task.steps_per_epoch)
    recorder = _Recorder(record, ranks, session, state, checkpoint_seconds)
    loss_fn = partial(task.loss_fn, _compiled(model, spec) if spec.compile else model)
    take_step = TrainingStep(spec, loss_fn, model, state.optimizer, ranks)

    model.train()
    for batch in _batches_from(task, progress.step, steps):
        recorder.checkpoint_if_due(f"Stopped before step {progress.step + 1} of {steps}.")

        step = take_step(batch)
        state.scheduler.step()
        if state.average is not None:
            state.average.update(task.model)
        progress.step += 1

        recorder.add_step(step)
        if progress.step % task.steps_per_epoch == 0:
            recorder.collect_losses()
            epoch = progress.step // task.steps_per_epoch
            line = _epoch_line(epoch, progress, float(state.scheduler.get_last_lr()[0]))
            if ranks.first:
                scored = task.model if state.average is None else state.average.module
                record.append(line | score_if_due(spec, task, scored, epoch) | _curvature(spec, task, epoch))
            recorder.tick(0)
        session.report(progress.step, steps)

    recorder.checkpoint_if_due("Stopped before the scores.")
    if ranks.first:
        _finish(record, task, state, recorder)


class TrainingStep:
    """A whole training step on a mini-batch, except for the scheduler's: as it is, or as one CUDA graph.

    Args:
        spec: The run. With `capture`, the first step is captured before it is taken.
        loss_fn: The loss of a (micro-)batch.
        model: The network, or its data-parallel wrapper.
        optimizer: The base optimizer.
        ranks: The processes that share each mini-batch.
    """

    def __init__(
        self,
        spec: Network,
        loss_fn: Callable[[Any], torch.Tensor],
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
    ) -> None:
        self.spec, self.loss_fn, self.model, self.optimizer, self.ranks = spec, loss_fn, model, optimizer, ranks
        self.captured: Captured | None = None

    def __call__(self, batch: Any) -> msam.Step:
        """Take the step."""
        spec = self.spec
        if spec.capture:
            if self.captured is None:
                options = {**self._options(), "micro_batches": spec.micro_batches, "clip_norm": spec.clip_norm}
                self.captured = msam.capture(self.loss_fn, batch, self.model, self.optimizer, **options)
            return self.captured(batch)
        self.optimizer.zero_grad()
        batch, micro_batches = self.ranks.share(batch)
        step = msam.backward(self.loss_fn, batch, self.model, micro_batches=micro_batches, **self._options())
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), spec.clip_norm)
        self.optimizer.step()
        return step

    def _options(self) -> dict[str, Any]:
        shared = "ranks" if self.spec.shared else False
        return {"rho": self.spec.rho, "adaptive": self.spec.adaptive, "shared": shared, "passes": self.spec.passes}


class _Recorder:
    """Collects the losses of a training run, writes its checkpoints, and stops it when asked.

    Args:
        record: The run's record.
        ranks: Its processes.
        session: Says when to stop.
        state: The state to save in checkpoints.
        checkpoint_seconds: See `train`.
    """

    def __init__(self, record: Record, ranks: Ranks, session: Session, state: State, checkpoint_seconds: float) -> None:
        self.record, self.ranks, self.session, self.state = record, ranks, session, state
        self.checkpoint_seconds = checkpoint_seconds
        self.next_checkpoint = time.monotonic() + checkpoint_seconds
        self.last_tick = time.monotonic()
        self.uncollected: list[msam.Step] = []

    def add_step(self, step: msam.Step) -> None:
        """Add a step's result; losses are collected every `CHECK_EVERY` steps."""
        self.uncollected.append(step)
        if len(self.uncollected) == CHECK_EVERY:
            self.collect_losses()

    def collect_losses(self) -> None:
        """Copy the losses since the last collection from the device.

        Raises:
            Diverged: naming the first step (counted from 1) with a loss that is not finite.
        """
        if not self.uncollected:
            return
        progress = self.state.progress
        losses = self.ranks.mean(torch.stack([s.loss for s in self.uncollected])).tolist()
        sharpness = self.ranks.mean(torch.stack([s.sharpness for s in self.uncollected])).tolist()
        first = progress.step - len(self.uncollected) + 1
        for step, (loss, rise) in enumerate(zip(losses, sharpness, strict=True), start=first):
            if not math.isfinite(loss + rise):
                raise Diverged(
                    f"diverged at step {step}: the loss is {loss}, and {loss + rise} at the perturbed weights. "
                    "Lower learning_rate or rho."
                )
        progress.losses += losses
        progress.sharpness += sharpness
        self.tick(len(self.uncollected))
        self.uncollected.clear()

    def checkpoint_if_due(self, words: str) -> None:
        """Write a checkpoint if one is due, or if any rank is asked to stop.

        Raises:
            Interrupted: with these words, if any rank is asked to stop.
        """
        stopping, due = self.ranks.any(self.session.stop(), time.monotonic() > self.next_checkpoint)
        if stopping or due:
            self.collect_losses()
            started = time.monotonic()
            save_checkpoint(self.record, self.ranks, self.state)
            seconds = time.monotonic() - started
            self.next_checkpoint = time.monotonic() + self.checkpoint_seconds * max(1.0, seconds)
        if stopping:
            raise Interrupted(words)

    def tick(self, steps: int) -> None:
        """Add the time since the last tick to the run's time."""
        now = time.monotonic()
        self.state.progress.seconds += now - self.last_tick
        if steps:
            self.state.progress.step_seconds.append((now - self.last_tick) / steps)
        self.last_tick = now


def _finish(record: Record, task: Task, state: State, recorder: _Recorder) -> None:
    """Score the network, save its weights and write the summary.

    Raises:
        Diverged: if a score is not finite.
    """
    progress, lines = state.progress, record.metrics()
    if state.average is not None:
        task.model.load_state_dict(state.average.module.state_dict())
    evaluation = task.evaluate()
    scores = evaluation.scores
    if bad := sorted(name for name, value in scores.items() if not math.isfinite(value)):
        raise Diverged(
            f"diverged after step {progress.step}: {bad[0]} is {scores[bad[0]]}. Lower learning_rate or rho."
        )
    recorder.tick(0)
    save_weights(record, task.model)
    record.write_predictions(_packed(evaluation.predictions))
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


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    """The arrays as the contents of an `.npz`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _initial_state(spec: Training, task: Task) -> State:
    optimizer = build_optimizer(spec, task.model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(spec, task.steps_per_epoch))
    return State(task.model, optimizer, scheduler, MovingAverage(task.model, spec.ema) if spec.ema else None)


def _compiled(model: torch.nn.Module, spec: Training) -> Any:
    """The compiled model. Earlier compilations in this process are reset, since they could change its kernels.

    Texts vary in length, so they are compiled with dynamic shapes: otherwise the kernels would depend on the step at
    which a run was resumed.
    """
    torch._dynamo.reset()
    return torch.compile(model, dynamic=not is_images(spec.dataset))


def _curvature(spec: Training, task: Task, epoch: int) -> dict[str, float]:
    """The largest Hessian eigenvalue if it is due at this epoch; measuring it does not affect training."""
    if not spec.curvature_every or (epoch % spec.curvature_every and epoch != spec.epochs):
        return {}
    from experiments.harness.work.hessian import lambda_1

    set_torch(replace(spec, tf32=False))  # as in Table 3
    try:
        return {"lambda_1": lambda_1(task, min(256, spec.examples))}
    finally:
        set_torch(spec)


def _greatest_and_last(eigenvalues: list[float]) -> dict[str, float]:
    """The summary's entries for the eigenvalues measured during training; empty if none were measured."""
    return {"greatest_lambda_1": max(eigenvalues), "lambda_1": eigenvalues[-1]} if eigenvalues else {}


def build_optimizer(spec: Network, model: torch.nn.Module) -> torch.optim.Optimizer:
    """torch's base optimizer over all parameters, with weight decay on those that `spec.decay` selects."""
    params: Any = list(model.parameters())
    if spec.decay == "matrices":  # biases and the weights of norms are vectors
        vectors = {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}
        params = [{"params": [p for p in params if p.ndim > 1]}, vectors]
    fused = spec.fused or None  # None lets torch choose; False would also rule out its foreach kernels
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
    """The factor on the learning rate at a step (counted from 0): linear warm-up, then the spec's schedule."""
    steps, warmup = spec.epochs * steps_per_epoch, spec.warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if spec.schedule == "step":
            return 0.2 ** sum(step / steps >= share for share in (0.3, 0.6, 0.8))
        done = (step - warmup) / (steps - warmup)
        return 1 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _process_fields(spec: Training) -> dict[str, Any]:
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
    """The epoch's line for metrics.jsonl; the losses are cleared for the next epoch."""
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
