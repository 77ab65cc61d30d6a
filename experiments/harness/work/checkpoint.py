"""What a run resumes from: saved whole, checked when it is read, with the one before in reserve.

A checkpoint is a file of torch's with a sum over all that it holds, so that one that was cut off or has lost a bit is
known. It is read without executing anything: tensors, numbers, strings and their collections.
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
from experiments.harness.runs.record import ANEW, Record
from experiments.harness.work.average import MovingAverage
from experiments.harness.work.ranks import Ranks

log = logging.getLogger(__name__)


class Damaged(RecordError):
    """A checkpoint that can be read, but is not what was written."""


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds besides the states of model, optimizer and generators."""

    step: int = 0
    seconds: float = 0.0
    """Time spent in this run, over all sessions."""
    losses: list[float] = field(default_factory=list)
    """Of the steps of the current epoch, as are the sharpnesses."""
    sharpness: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    """One mean for each time that the losses are collected."""


@dataclass
class State:
    """What the steps of a training change, the random generators apart."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    average: MovingAverage | None = None
    progress: Progress = field(default_factory=Progress)


def save_checkpoint(record: Record, ranks: Ranks, state: State) -> None:
    """Write all that the rest of the run depends on, in one rename; every rank comes here, and the first one writes."""
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
    """Take the state and the generators back to the last checkpoint that is whole; without any, both stay as they are.

    Raises:
        RecordError: if there are checkpoints but none is whole, or one cannot be read at all, or is another run's, or
            the ranks do not see the same one.
    """
    useless: dict[Path, str | None] = {}
    for path in (record.checkpoint, record.previous_checkpoint):
        try:
            content = _read(record, path)
        except Damaged as error:
            useless[path] = str(error)
            continue
        if content is None:
            continue
        if "progress" not in content:  # the final weights: this run was ended before its summary
            useless[path] = None
            continue
        try:
            _restore(state, content, ranks.rank)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error
        ranks.agree(state.progress.step, f"{record.checkpoint} is not the same file on all nodes")
        _put_away(record, ranks, useless)
        return
    if damages := [words for words in useless.values() if words]:
        raise RecordError("\n".join(damages))
    ranks.agree(0, f"{record.checkpoint} is not the same file on all nodes")
    _put_away(record, ranks, useless)


def _restore(state: State, content: Mapping[str, Any], rank: int) -> None:
    state.model.load_state_dict(content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    if state.average is not None and content["progress"]["step"]:
        state.average.load_state_dict(content["average"])
    generators = content.get("generators") or [content["generator"]]  # the latter before there were ranks
    torch.set_rng_state(generators[rank])
    if content["cuda_generators"]:
        torch.cuda.set_rng_state(content["cuda_generators"][rank])
    state.progress = Progress(**content["progress"])


def save_weights(record: Record, model: torch.nn.Module) -> None:
    """Replace the checkpoint by the final weights alone."""
    record.write_checkpoint(_serialised({"model": model.state_dict()}))


def load_weights(record: Record) -> dict[str, torch.Tensor]:
    """The final weights of a finished run.

    Raises:
        RecordError: if they are not there, or not whole.
    """
    content = _read(record, record.checkpoint)
    if content is None:
        raise RecordError(f"{record.checkpoint} is not there: train run {record.run_id} again with --redo.")
    if not isinstance(content.get("model"), dict):
        raise _unreadable(record.checkpoint, "it holds no model")
    return content["model"]


def _put_away(record: Record, ranks: Ranks, useless: Mapping[Path, str | None]) -> None:
    """Delete what all ranks have read and none goes on from, lest it takes the place of what they do go on from."""
    if not ranks.first:
        return
    for path, words in useless.items():
        if words:
            log.warning("Run %s goes on from the checkpoint before: %s", record.run_id, words)
        path.unlink(missing_ok=True)


def _serialised(content: dict[str, Any]) -> memoryview:
    buffer = io.BytesIO()
    torch.save({**content, "sum": _sum_of(content)}, buffer)
    return buffer.getbuffer()


def _read(record: Record, path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds; None if it is not there.

    Raises:
        RecordError: if it cannot be read.
        Damaged: if it is not whole.
    """
    read = record.read_checkpoint(path)
    if read is None:
        return None
    try:
        content = torch.load(io.BytesIO(read), map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError("it is not a checkpoint")
        wanted = content.pop("sum", None)
        if wanted is not None and wanted != _sum_of(content):  # those of old have no sum
            raise ValueError("its contents are not those that were written")
    except MemoryError:
        raise
    except Exception as error:  # whatever torch and pickle make of bytes that are not a checkpoint
        raise _unreadable(path, error) from error
    return content


def _sum_of(content: Any) -> str:
    """SHA-256 over the names, the types and the values of what a checkpoint holds."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type == "meta":
                raise ValueError("it holds tensors without values")
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError("it holds tensors that are larger than their memory")
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"{{{len(value)}".encode())
            for name, inner in value.items():
                digest.update(f"{name!r}:".encode())
                take(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for inner in value:
                take(inner)
        else:
            digest.update(f"{value!r};".encode())

    take(content)
    return digest.hexdigest()


def _unreadable(path: Path, why: object) -> "Damaged":
    words = [*str(why).strip().splitlines(), type(why).__name__][0]
    return Damaged(f"{path} cannot be read ({words[:200]}): {ANEW}.")
