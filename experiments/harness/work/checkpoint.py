"""Checkpoints: saved atomically, verified when read, with the previous one as a fallback.

A checkpoint is a torch file with a checksum over its contents, so a truncated or corrupted file is detected. Reading
one never executes code: it holds only tensors, numbers, strings and their collections.
"""

import hashlib
import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import DELETE_TO_RESUME, Record
from experiments.harness.work.average import MovingAverage
from experiments.harness.work.ranks import Ranks

log = logging.getLogger(__name__)


class Damaged(RecordError):
    """A checkpoint whose contents are not what was written."""


@dataclass
class Progress:
    """The progress of a run: what a checkpoint holds besides the states of model, optimizer and generators."""

    step: int = 0
    seconds: float = 0.0
    """Time spent on this run, over all sessions."""
    losses: list[float] = field(default_factory=list)
    """The loss of each step of the current epoch."""
    sharpness: list[float] = field(default_factory=list)
    """The sharpness of each step of the current epoch."""
    step_seconds: list[float] = field(default_factory=list)
    """The mean time of a step, once for each time that losses are collected."""


@dataclass
class State:
    """What training steps change, except the random generators."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    average: MovingAverage | None = None
    progress: Progress = field(default_factory=Progress)


def save_checkpoint(record: Record, ranks: Ranks, state: State) -> None:
    """Write everything that the rest of the run depends on, atomically. All ranks call this; the first one writes."""
    generators = ranks.gathered(torch.get_rng_state())
    cuda_generators = ranks.gathered(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else []
    if not ranks.first:
        return ranks.wait()
    content = {
        "progress": vars(state.progress),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "average": state.average.state_dict() if state.average else None,
        "generators": generators,
        "cuda_generators": cuda_generators,
    }
    record.write_checkpoint(_serialised(content))
    ranks.wait()


def load_checkpoint(record: Record, ranks: Ranks, state: State) -> None:
    """Restore the state and the generators from the last intact checkpoint. Without checkpoints, nothing changes.

    Raises:
        RecordError: if there are checkpoints but none is intact, or one cannot be read or does not match the state, or
            the ranks do not see the same one.
    """
    unusable: dict[Path, str | None] = {}
    for path in (record.checkpoint, record.previous_checkpoint):
        try:
            content = _read(record, path)
        except Damaged as error:
            unusable[path] = str(error)
            continue
        if content is None:
            continue
        if "progress" not in content:  # the final weights: the run ended before its summary was written
            unusable[path] = None
            continue
        try:
            _restore(state, content, ranks.rank)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error
        ranks.agree(state.progress.step, f"{record.checkpoint} is not the same file on all nodes")
        _delete_unused(record, ranks, unusable)
        return
    if damages := [words for words in unusable.values() if words]:
        raise RecordError("\n".join(damages))
    ranks.agree(0, f"{record.checkpoint} is not the same file on all nodes")
    _delete_unused(record, ranks, unusable)


def _restore(state: State, content: Mapping[str, Any], rank: int) -> None:
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    if state.average is not None and content["progress"]["step"]:
        state.average.load_state_dict(content["average"])
    generators = content.get("generators") or [content["generator"]]  # older checkpoints have only one
    torch.set_rng_state(generators[rank])
    if content["cuda_generators"]:
        torch.cuda.set_rng_state(content["cuda_generators"][rank])
    state.progress = Progress(**content["progress"])


def save_weights(record: Record, model: torch.nn.Module) -> None:
    """Replace the checkpoint by the final weights."""
    record.write_checkpoint(_serialised({"model": model.state_dict()}))


def load_weights(record: Record) -> dict[str, torch.Tensor]:
    """The final weights of a finished run.

    Raises:
        RecordError: if they are missing or damaged.
    """
    content = _read(record, record.checkpoint)
    if content is None:
        raise RecordError(f"{record.checkpoint} is missing: retrain run {record.run_id} with --redo.")
    if not isinstance(content.get("model"), dict):
        raise _unreadable(record.checkpoint, "it has no model")
    return content["model"]


def _delete_unused(record: Record, ranks: Ranks, unusable: Mapping[Path, str | None]) -> None:
    """Delete the checkpoints that no rank resumes from, so that they do not replace the one that is resumed."""
    if not ranks.first:
        return
    for path, words in unusable.items():
        if words:
            log.warning("Run %s resumes from the previous checkpoint: %s", record.run_id, words)
        path.unlink(missing_ok=True)


def _serialised(content: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save({**content, "sum": _checksum(content)}, buffer)
    return buffer.getbuffer()


def _read(record: Record, path: Path) -> dict[str, Any] | None:
    """The contents of a checkpoint; None if there is none.

    Raises:
        RecordError: if it cannot be read.
        Damaged: if its contents are not what was written.
    """
    stored = record.read_checkpoint(path)
    if stored is None:
        return None
    try:
        content = torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it is not a checkpoint")
        expected = content.pop("sum", None)
        if expected is not None and expected != _checksum(content):  # older checkpoints have no checksum
            raise ValueError("its contents do not match its checksum")
    except MemoryError:
        raise
    except Exception as error:  # torch and pickle raise many types for bytes that are not a checkpoint
        raise _unreadable(path, error) from error
    return content


def _checksum(content: Any) -> str:
    """SHA-256 over the names, types and values of a checkpoint's contents."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type == "meta":
                raise ValueError("it has tensors without values")
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError("it has tensors that are larger than their storage")
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"{{{len(value)}".encode())
            for name, inner in value.items():
                digest.update(f"{name!r}:".encode())
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(f"{value!r};".encode())

    add(content)
    return digest.hexdigest()


def _unreadable(path: Path, why: object) -> "Damaged":
    words = [*str(why).strip().splitlines(), type(why).__name__][0]
    return Damaged(f"{path} cannot be read ({words[:200]}): {DELETE_TO_RESUME}.")
