"""Whether a finished run reproduces bit for bit: it is made again in another folder and compared, file by file."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.harness.runs.files import RecordError, printable
from experiments.harness.runs.record import Record, record_of
from experiments.harness.runs.spec import Run, SpecError, Timing, Training
from experiments.harness.work.checkpoint import load_weights
from experiments.harness.work.execute import execute
from experiments.harness.work.session import Interrupted, Session

TIMES = ("seconds", "wall_seconds", "step_seconds")
"""What differs from run to run."""

EXPLAINS = ("code", "lock", "commit", "python", "packages", "cpu", "gpu", "driver", "system", "threads", "torch_flags")
"""Entries of a session that may explain a difference, the likeliest first."""


def verify(
    record: Record,
    session: Session,
    epochs: int | None = None,
) -> list[str]:
    """Make a finished run again in a temporary folder and compare what it left.

    Args:
        record: The finished run.
        session: Its provenance says what differs; the temporary folder takes the place of its results root.
        epochs: Train only so many; None: all, and compare the scores and the final weights too.

    Returns:
        A sentence for each difference, the first place where the lines part among them; empty if there is none.

    Raises:
        RecordError: if the run is not finished, or damaged.
        SpecError: if it cannot be compared: it timed something, or other epochs are asked for than it has.
    """
    if not record.done:
        raise RecordError(f"Run {record.run_id} is not finished: run it first.")
    spec = record.spec()
    _check(spec, epochs)
    with tempfile.TemporaryDirectory(prefix="msam-verify-") as folder:
        again = record_of(spec, Path(folder))
        if spec.network:  # what is measured anew is the measurement, not the network's training
            _copy_network(record_of(spec.network, record.root), again.root)
        try:
            execute(spec, _until(epochs, spec, replace(session, root=again.root)))
        except Interrupted:
            if epochs is None:
                raise
        return _differences(record, again, epochs)


def _copy_network(network: Record, root: Path) -> None:
    """What a measurement needs of the network's run, checked as any record is."""
    copy = record_of(network.spec(), root)
    copy.create(network.spec())
    for session in network.environments():
        copy.add_environment(session)
    weights = network.read_checkpoint(network.checkpoint)
    if weights is None:
        raise RecordError(f"{network.checkpoint} is not there: train run {network.run_id} again with --redo.")
    copy.write_checkpoint(weights)
    copy.finish(network.summary())


def _check(spec: Run, epochs: int | None) -> None:
    if isinstance(spec, Timing):
        raise SpecError("A cost run is of times, which are never the same twice: run it again with --redo and compare.")
    if spec.processes > 1:
        raise SpecError("A data-parallel run needs its processes: submit it again to another --results and compare.")
    if epochs is None:
        return
    if type(spec) is not Training:
        raise SpecError("Only a training has epochs: leave --epochs out.")
    if not 0 < epochs <= spec.epochs:
        raise SpecError(f"epochs is {epochs}, but this run has 1 to {spec.epochs}.")


def _until(epochs: int | None, spec: Run, session: Session) -> Session:
    """The session, whose `stop` ends the run after so many epochs."""
    done = False

    def reached(step: int, steps: int) -> None:
        nonlocal done
        wanted = steps if epochs is None else steps * epochs // spec.flat["epochs"]
        done = epochs is not None and step >= wanted
        session.report(min(step, wanted), wanted)

    return replace(session, report=reached, stop=lambda: done)


def _differences(record: Record, again: Record, epochs: int | None) -> list[str]:
    before, now = record.metrics(), again.metrics()
    if epochs is not None:
        before, now = before[:epochs], now[:epochs]
    found = []
    if len(before) != len(now):
        found.append(f"metrics.jsonl has {len(before)} lines there and {len(now)} here.")
    for number, (line, other) in enumerate(zip(before, now, strict=False), start=1):
        if words := _parted(line, other):
            found.append(f"metrics.jsonl parts in line {number}: {words}.")
            break
    if epochs is None:
        if words := _parted(record.summary(), again.summary()):
            found.append(f"summary.json: {words}.")
        if type(record.spec()) is Training:
            found += _weights(load_weights(record), load_weights(again))
    return [printable(words) for words in [*found, *_explanations(record, again)]] if found else []


def _parted(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = [n for n in dict.fromkeys([*there, *here]) if n not in TIMES and there.get(n) != here.get(n)]
    return ", ".join(f"{name} was {there.get(name)!r} and is {here.get(name)!r}" for name in names)


def _weights(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[str]:
    parted = [name for name in dict.fromkeys([*before, *now]) if not _same(before.get(name), now.get(name))]
    return [f"{len(parted)} of {len(before)} tensors of the final weights differ, {parted[0]} first."] if parted else []


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bit for bit: NaN equals NaN and 0.0 is not -0.0."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def _explanations(record: Record, again: Record) -> list[str]:
    try:
        sessions, here = record.environments(), again.environments()[-1]
    except RecordError as error:
        return [str(error)]
    found = []
    for name in EXPLAINS:
        values = [session.get(name) for session in sessions]
        if any(value != here.get(name) for value in values):
            there = " and ".join(dict.fromkeys(str(value) for value in values))
            found.append(f"It may be the {name}: {there} there, {here.get(name)} here.")
    return found
