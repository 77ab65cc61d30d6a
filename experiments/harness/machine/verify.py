"""Checks whether a finished run reproduces bit for bit: retrains it in another folder and compares the files."""

import re
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
"""Fields that differ every time."""

ADDED = ("test_accuracy", "test_score", "holdout_accuracy", "holdout_score")
"""Entries of metrics.jsonl that older records lack."""

ADDED_AT_THE_END = re.compile(r"_ece$|_int8_")
"""Entries of summary.json that older records lack."""

EXPLAINS = (
    *("code", "model_code", "start_weights_checksum", "lock", "commit", "python", "packages"),
    *("cpu", "gpu", "driver", "system", "threads", "torch_flags"),
)
"""Entries of a session that may explain a difference, most likely first."""


def verify(
    record: Record,
    session: Session,
    epochs: int | None = None,
) -> list[str]:
    """Execute a finished run again in a temporary folder and compare the two records.

    Args:
        record: The finished run.
        session: The session to run in; the temporary folder replaces its results root.
        epochs: Number of epochs to train and compare; None: all epochs, the scores and the final weights.

    Returns:
        One sentence per difference; of metrics.jsonl, only the first line that differs. Empty if all match.

    Raises:
        RecordError: if the run is not finished, or damaged.
        SpecError: if the run cannot be compared (a timing or data-parallel run), or `epochs` is out of range.
    """
    if not record.done:
        raise RecordError(f"Run {record.run_id} is not finished: run it first.")
    spec = record.spec()
    _check(spec, epochs)
    with tempfile.TemporaryDirectory(prefix="msam-verify-") as folder:
        repeat = record_of(spec, Path(folder))
        if spec.network:  # only the measurement is repeated, not the training of the network
            _copy_network(record_of(spec.network, record.root), repeat.root)
        try:
            execute(spec, _stopped_after(epochs, spec, replace(session, root=repeat.root)))
        except Interrupted:
            if epochs is None:
                raise
        return _differences(record, repeat, epochs)


def _copy_network(network: Record, root: Path) -> None:
    """Copy the parts of a network's record that a measurement needs; they are checked as they are read."""
    copy = record_of(network.spec(), root)
    copy.create(network.spec())
    for session in network.environments():
        copy.add_environment(session)
    weights = network.read_checkpoint(network.checkpoint)
    if weights is None:
        raise RecordError(f"{network.checkpoint} is missing: retrain run {network.run_id} with --redo.")
    copy.write_checkpoint(weights)
    copy.finish(network.summary())


def _check(spec: Run, epochs: int | None) -> None:
    if isinstance(spec, Timing):
        raise SpecError("A timing run measures times, which always differ: rerun it with --redo and compare them.")
    if spec.processes > 1:
        raise SpecError(
            "verify cannot retrain data-parallel runs: submit it with another --results and compare the two folders."
        )
    if epochs is None:
        return
    if type(spec) is not Training:
        raise SpecError("Only training runs have epochs: leave --epochs out.")
    if not 0 < epochs <= spec.epochs:
        raise SpecError(f"epochs is {epochs}, but must be 1 to {spec.epochs} for this run.")


def _stopped_after(epochs: int | None, spec: Run, session: Session) -> Session:
    """The session with a `stop` that ends the run after this many epochs."""
    done = False

    def report(step: int, steps: int) -> None:
        nonlocal done
        last = steps if epochs is None else steps * epochs // spec.flat["epochs"]
        done = epochs is not None and step >= last
        session.report(min(step, last), last)

    return replace(session, report=report, stop=lambda: done)


def _differences(record: Record, repeat: Record, epochs: int | None) -> list[str]:
    before, now = record.metrics(), repeat.metrics()
    if epochs is not None:
        before, now = before[:epochs], now[:epochs]
    differences = []
    if len(before) != len(now):
        differences.append(f"metrics.jsonl had {len(before)} lines and now has {len(now)}.")
    for number, (line, other) in enumerate(zip(before, now, strict=False), start=1):
        known = {name: other[name] for name in other if name in line or name not in ADDED}
        if words := _changed(line, known):
            differences.append(f"metrics.jsonl first differs in line {number}: {words}.")
            break
    if epochs is None:
        summary = record.summary()
        known = {n: v for n, v in repeat.summary().items() if n in summary or not ADDED_AT_THE_END.search(n)}
        if words := _changed(summary, known):
            differences.append(f"summary.json differs: {words}.")
        if type(record.spec()) is Training and record.checkpoint.exists():
            differences += _weight_differences(load_weights(record), load_weights(repeat))
    return [printable(words) for words in [*differences, *_explanations(record, repeat)]] if differences else []


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [n for n in dict.fromkeys([*before, *now]) if n not in TIMES and before.get(n) != now.get(n)]
    return ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)


def _weight_differences(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> list[str]:
    names = [name for name in dict.fromkeys([*before, *now]) if not _same(before.get(name), now.get(name))]
    return [f"{len(names)} of {len(before)} tensors of the final weights differ, first {names[0]}."] if names else []


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bit for bit: NaN equals NaN and 0.0 is not -0.0."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def _explanations(record: Record, repeat: Record) -> list[str]:
    try:
        sessions, now = record.environments(), repeat.environments()[-1]
    except RecordError as error:
        return [str(error)]
    explanations = []
    for name in EXPLAINS:
        values = [session.get(name) for session in sessions]
        if any(value != now.get(name) for value in values):
            before = " and ".join(dict.fromkeys(str(value) for value in values))
            explanations.append(f"Possible cause: {name} was {before} and is {now.get(name)}.")
    return explanations
