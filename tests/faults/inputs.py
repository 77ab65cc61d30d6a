"""Damaged records: intact records with changed bytes or values."""

import contextlib
import io
import json
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from experiments.__main__ import show
from experiments.harness.runs.estimate import load_estimate
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record, record_of, state_of
from experiments.harness.work.checkpoint import load_weights, save_weights
from tests.specs import BASE

SPEC = replace(BASE, model="linear", epochs=3)

PIECES = [
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"9" * 5000,
        b"9" * 400,
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b'"\\ud800"',
    ),
    *(b"../../../etc/passwd", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b'"', b"{", b"}", b"[" * 2000),
    *(b'"spec"', b'"format": 2', b'"epoch": "x"', b'"epoch": 0', b'"seconds": null', b'"sessions": {}', b'"run_id"'),
    *(b"<script>alert(1)</script>", b"\\input{/etc/passwd}", b"|", "é".encode("latin-1"), "é".encode("utf-16")),
]


def read(count: int, seed: int = 0) -> dict[str, Any]:
    """Give the readers `count` damaged records; they must return or raise `RecordError`, and write nothing."""
    draws = random.Random(seed)
    counts = {"inputs": 0, "rejected": 0, "crashes": 0, "writes outside": 0}
    with tempfile.TemporaryDirectory(prefix="msam-inputs-") as folder:
        root = Path(folder) / "results"
        record = whole(root)
        record.fail("an earlier failure")
        texts = {path.name: path.read_bytes() for path in record.folder.iterdir() if path.name != "lock"}
        for _ in range(count):
            name = draws.choice(list(texts))
            (record.folder / name).write_bytes(changed(texts[name], draws))
            if unfinished := draws.random() < 0.5 and name != "summary.json":
                (record.folder / "summary.json").unlink()
            rejected, crash = outcome(record)
            counts["inputs"] += 1
            counts["rejected"] += rejected
            counts["crashes"] += crash
            (record.folder / name).write_bytes(texts[name])
            if unfinished:
                (record.folder / "summary.json").write_bytes(texts["summary.json"])
            if crash and counts["crashes"] == 1:
                print(f"{name} made a reader crash.", file=sys.stderr)
        new = {path.name for path in record.folder.iterdir()} - set(texts) - {"lock"}
        counts["writes outside"] += len(new) + len(list(Path(folder).iterdir())) - 1
    return counts


def whole(root: Path) -> Record:
    """The record of a finished run, written without training."""
    record = record_of(SPEC, root)
    record.create(SPEC)
    record.add_environment({"commit": "abc", "dirty": False, "command": "python -m experiments run table1"})
    for epoch in (1, 2, 3):
        record.append({"epoch": epoch, "step": 8 * epoch, "train_loss": 2.0 / epoch, "seconds": 0.5 * epoch})
    save_weights(record, torch.nn.Linear(2, 1))
    record.finish({"test_accuracy": 0.5, "wall_seconds": 1.5, "step_seconds": 0.1})
    return record


def changed(text: bytes, draws: random.Random) -> bytes:
    """The bytes with one to four changes: bytes flipped, truncated, removed, repeated, inserted or replaced."""
    for _ in range(draws.randint(1, 4)):
        text = _changed_once(text, draws)
    return text


def _changed_once(text: bytes, draws: random.Random) -> bytes:
    at, until = sorted(draws.randint(0, len(text)) for _ in range(2))
    piece, byte = draws.choice(PIECES), bytes([draws.randrange(256)])
    ways = {
        "flip": text[:at] + byte + text[at + 1 :],
        "cut off": text[:at],
        "cut out": text[:at] + text[until:],
        "double": text[:until] + text[at:],
        "insert": text[:at] + piece + text[at:],
        "replace": text[:at] + piece + text[until:],
    }
    way = draws.choice([*ways, "other value"])
    return ways[way] if way in ways else _other_value(text, draws)


def outcome(record: Record) -> tuple[bool, bool]:
    """Whether a reader rejected the record, and whether a reader crashed."""
    readers: list[Callable[[], Any]] = [
        record.spec,
        record.environments,
        record.metrics,
        record.summary,
        record.failure,
        lambda: load_weights(record),
        lambda: " ".join(state_of(SPEC, record.root)).encode(),
        lambda: _shown(record),
        lambda: load_estimate(record.root),
    ]
    rejected = crashed = False
    for reader in readers:
        try:
            reader()
        except RecordError:
            rejected = True
        except Exception:
            traceback.print_exc()
            crashed = True
    return rejected, crashed


def _shown(record: Record) -> None:
    """Check that the output of `experiments show` is safe for any terminal."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        show(record.run_id, record.root)
    printed.getvalue().encode()
    assert all(c.isprintable() or c == "\n" for c in printed.getvalue())


def _other_value(text: bytes, draws: random.Random) -> bytes:
    """JSON with one of its values replaced; a text that is not JSON is unchanged."""
    lines = text.split(b"\n")
    at = draws.randrange(len(lines))
    try:
        content = json.loads(text if len(lines) > 8 else lines[at])
    except (ValueError, RecursionError):
        return text
    inner = content["spec"] if isinstance(content, dict) and isinstance(content.get("spec"), dict) else content
    if isinstance(inner, dict) and inner:
        name = draws.choice(list(inner))
        inner[name] = draws.choice([None, -1, 0, 1e308, "x", "../x", [], {}, True, inner[draws.choice(list(inner))]])
    written = json.dumps(content).encode()
    return written if len(lines) > 8 else b"\n".join([*lines[:at], written, *lines[at + 1 :]])
