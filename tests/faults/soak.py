"""Counts the effects of faults: processes killed at random times, and damaged records (`make soak`).

    python -m tests.faults.soak [--kills 200] [--inputs 100000]

`test_soak.py` runs the same functions with small numbers. If a count that should be 0 is not, the command exits with
status 1.
"""

import argparse
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.harness.machine.verify import TIMES
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record, record_of
from experiments.harness.runs.spec import Training
from experiments.harness.work import checkpoint
from experiments.harness.work.session import Session
from tests.faults import inputs
from tests.specs import BASE

ROOT = Path(__file__).parents[2]

SPEC = replace(BASE, epochs=6, train_examples=128, test_examples=50, augmentation="crop-flip", rho=0.1, micro_batches=4)

COMMAND = ["table1", "--profile", "smoke", "--seeds", "1"]
FOUR_RUNS = ["resnet_cifar", *COMMAND[1:]]


def killed_trainings(kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill training with SIGKILL at random times over its whole length, resume it, and compare the results.

    It writes a checkpoint before every step, so that some kills happen during a write.
    """
    draws, context = random.Random(seed), _fork_server()
    counts = {
        "kills": 0,
        "finished runs": 0,
        "wrong results": 0,
        "corrupt records": 0,
        "steps lost beyond the checkpoint": 0,
    }
    with tempfile.TemporaryDirectory(prefix="msam-soak-") as folder:
        _to_the_end(context, SPEC, Path(folder) / "warm")  # starts the fork server
        length = _to_the_end(context, SPEC, Path(folder) / "uninterrupted")
        expected = _numbers(SPEC, Path(folder) / "uninterrupted")
        root, sessions, known = Path(folder) / "0", 0, (0, 0)
        while counts["kills"] < kills or sessions:
            process = context.Process(target=_train, args=(SPEC, str(root)))
            process.start()
            process.join(draws.uniform(0, length) if counts["kills"] < kills else 120)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                counts["kills"] += 1
                counts["corrupt records"] += not _readable(record_of(SPEC, root))
            sessions += 1
            lost, known = _steps_lost(root, known)
            counts["steps lost beyond the checkpoint"] += lost
            if record_of(SPEC, root).done:
                counts["finished runs"] += 1
                counts["wrong results"] += _numbers(SPEC, root) != expected
                root, sessions, known = Path(folder) / str(counts["finished runs"]), 0, (0, 0)
            _show_progress(counts["kills"], kills)
    return counts


def killed_pools(kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill `python -m experiments run` itself; its workers stop by themselves, and the same command resumes."""
    draws = random.Random(seed)
    counts = {"kills": 0, "finished commands": 0, "wrong results": 0, "workers left over": 0}
    with tempfile.TemporaryDirectory(prefix="msam-soak-") as folder:
        started = time.monotonic()
        _command("experiments", "run", *FOUR_RUNS, "--results", f"{folder}/uninterrupted")
        length, expected = time.monotonic() - started, _all_numbers(Path(folder) / "uninterrupted")
        root = Path(folder) / "0"
        while counts["kills"] < kills:
            process = _start("experiments", "run", *FOUR_RUNS, "--results", str(root))
            try:
                process.wait(draws.uniform(0.2, 1) * length)
                ended = True
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                counts["kills"], ended = counts["kills"] + 1, False
            counts["workers left over"] += _left_over(root)
            if ended or counts["kills"] == kills:
                _command("experiments", "run", *FOUR_RUNS, "--results", str(root))
                counts["finished commands"] += 1
                counts["wrong results"] += _all_numbers(root) != expected
                root = Path(folder) / str(counts["finished commands"])
            _show_progress(counts["kills"], kills)
    return counts


def killed_analyses(kills: int, seed: int = 0) -> dict[str, Any]:
    """Analyse runs while they are written, and kill the analysis: it must not fail or leave incomplete files."""
    draws = random.Random(seed)
    counts = {"calls": 0, "kills": 0, "failed calls": 0, "incomplete files": 0}
    with tempfile.TemporaryDirectory(prefix="msam-soak-") as folder:
        whole = Path(folder) / "whole"
        _command("experiments", "run", *FOUR_RUNS, "--results", str(whole))
        started = time.monotonic()
        _command("analysis", *COMMAND, "--results", str(whole))
        length = time.monotonic() - started
        while counts["kills"] < kills:
            root = Path(folder) / str(counts["calls"])
            with _running("experiments", "run", *COMMAND, "--results", str(root)) as training:
                while not (root / "runs").is_dir():
                    time.sleep(0.05)
                while training.poll() is None and counts["kills"] < kills:
                    reader = _start("analysis", *COMMAND, "--results", str(root))
                    try:
                        counts["failed calls"] += reader.wait(draws.uniform(0, 2) * length) != 0
                    except subprocess.TimeoutExpired:
                        reader.kill()
                        reader.wait()
                        counts["kills"] += 1
                    counts["calls"] += 1
                    counts["incomplete files"] += not _whole_files(root / "local")
                    _show_progress(counts["kills"], kills)
            counts["failed calls"] += _command("analysis", *COMMAND, "--results", str(root)) != 0
            counts["incomplete files"] += not _whole_files(root / "local")
    return counts


def _fork_server() -> Any:
    """A fork server that has imported torch once and computed nothing, like the pool's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.harness.machine.worker"])
    return context


def _train(spec: Training, root: str) -> None:
    from experiments.harness.work.train import train

    train(spec, Session(Path(root)), checkpoint_seconds=0)


def _to_the_end(context: Any, spec: Training, root: Path) -> float:
    """Train without interruption; returns the seconds that it took."""
    started = time.monotonic()
    process = context.Process(target=_train, args=(spec, str(root)))
    process.start()
    process.join()
    return time.monotonic() - started


def _numbers(spec: Training, root: Path) -> tuple[Any, ...]:
    """All numbers of a run except times, and its final weights."""
    import torch

    record = record_of(spec, root)
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in record.metrics()]
    summary = {k: v for k, v in record.summary().items() if k not in TIMES}
    weights = torch.load(record.checkpoint, weights_only=True)["model"]
    return lines, summary, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def _all_numbers(root: Path) -> dict[str, Any]:
    specs = [Record(root, path.name).spec() for path in (root / "runs").iterdir()]
    return {spec.run_id: _numbers(spec, root) for spec in specs}


def _readable(record: Record) -> bool:
    try:
        if (record.folder / "spec.json").exists():
            record.spec()
        record.metrics()
        if (record.folder / "env.json").exists():
            record.environments()
        for path in (record.checkpoint, record.previous_checkpoint):
            checkpoint._read(record, path)
    except RecordError as error:
        print(f"\n{error}", file=sys.stderr)
        return False
    return True


def _steps_lost(root: Path, known: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Steps that the last session repeated although a checkpoint had them.

    Args:
        root: The results root.
        known: The last checkpoint's step and the number of sessions before that session.

    Returns:
        The steps, and the new values of `known`.
    """
    record = record_of(SPEC, root)
    sessions = record.environments() if (record.folder / "env.json").exists() else []
    step, count = known
    lost = max(0, step + 1 - sessions[-1]["first_step"]) if len(sessions) > count else 0
    contents = [checkpoint._read(record, path) for path in (record.checkpoint, record.previous_checkpoint)]
    steps = [content["progress"]["step"] for content in contents if content and "progress" in content]
    return lost, (steps[0] if steps else 0, len(sessions))


def _left_over(root: Path) -> int:
    """Workers that still hold a run half a minute after their pool was killed."""
    until = time.monotonic() + 30
    folders = [Record(root, path.name) for path in (root / "runs").iterdir()] if (root / "runs").is_dir() else []
    while any(record.busy for record in folders) and time.monotonic() < until:
        time.sleep(0.1)
    return sum(record.busy for record in folders)


def _whole_files(folder: Path) -> bool:
    """Whether every file below the folder is complete."""
    for path in folder.rglob("*"):
        text = path.read_bytes() if path.is_file() else b"\n"
        whole = {".pdf": text.rstrip().endswith(b"%%EOF"), ".png": text.endswith(b"IEND\xaeB`\x82")}
        whole[".html"] = text.rstrip().endswith(b"</html>")
        whole[".jsonl"] = not text or text.endswith(b"\n")  # empty if there are no runs
        if path.name.startswith("."):
            continue  # a temporary file, which readers ignore
        if not whole.get(path.suffix, text.endswith(b"\n")):
            print(f"\n{path} is incomplete.", file=sys.stderr)
            return False
    return True


def _start(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _command(module: str, *arguments: str) -> int:
    return _start(module, *arguments).wait()


@contextmanager
def _running(module: str, *arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    process = _start(module, *arguments)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of} ", end="", file=sys.stderr, flush=True)


ZERO = ("wrong results", "corrupt records", "steps lost beyond the checkpoint", "workers left over", "failed calls")
ZERO += ("incomplete files", "crashes", "writes outside")


def main() -> None:
    """Print the counts for all faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=200, help="kills of training; a tenth as many of pools and of analyses"
    )
    parser.add_argument("--inputs", type=int, default=100_000, help="number of damaged records")
    arguments = parser.parse_args()
    soaks: dict[str, Callable[[], dict[str, Any]]] = {
        "trainings": lambda: killed_trainings(arguments.kills),
        "pools": lambda: killed_pools(max(1, arguments.kills // 10)),
        "analyses": lambda: killed_analyses(max(1, arguments.kills // 10)),
        "readers": lambda: inputs.read(arguments.inputs),
    }
    wrong = 0
    for name, soak in soaks.items():
        started = time.monotonic()
        counts = soak()
        words = ", ".join(f"{value} {key}" for key, value in counts.items())
        print(f"\r{name}: {words} ({time.monotonic() - started:.0f} s)", flush=True)
        wrong += sum(counts.get(key, 0) for key in ZERO)
    print("No faults." if not wrong else f"{wrong} faults.")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
