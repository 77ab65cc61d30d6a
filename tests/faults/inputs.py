"""Records made of anything: whole ones with bytes changed, and texts that only look like records."""

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
from experiments.harness.runs.estimate import measured
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
    """Give the readers so many damaged records: they return something or raise `RecordError`, and write nothing."""
    draws = random.Random(seed)
    found = {"inputs": 0, "refused": 0, "crashes": 0, "writes outside": 0}
    with tempfile.TemporaryDirectory(prefix="msam-inputs-") as folder:
        root = Path(folder) / "results"
        record = whole(root)
        record.fail("a failure of before")
        texts = {path.name: path.read_bytes() for path in record.folder.iterdir() if path.name != "lock"}
        for _ in range(count):
            name = draws.choice(list(texts))
            (record.folder / name).write_bytes(changed(texts[name], draws))
            if unfinished := draws.random() < 0.5 and name != "summary.json":
                (record.folder / "summary.json").unlink()
            refused, crash = outcome(record)
            found["inputs"] += 1
            found["refused"] += refused
            found["crashes"] += crash
            (record.folder / name).write_bytes(texts[name])
            if unfinished:
                (record.folder / "summary.json").write_bytes(texts["summary.json"])
            if crash and found["crashes"] == 1:
                print(f"{name} made a reader fail.", file=sys.stderr)
        there = {path.name for path in record.folder.iterdir()} - set(texts) - {"lock"}
        found["writes outside"] += len(there) + len(list(Path(folder).iterdir())) - 1
    return found


def whole(root: Path) -> Record:
    """A finished run, as far as files tell."""
    record = record_of(SPEC, root)
    record.create(SPEC)
    record.add_environment({"commit": "abc", "dirty": False, "command": "python -m experiments run table1"})
    for epoch in (1, 2, 3):
        record.append({"epoch": epoch, "step": 8 * epoch, "train_loss": 2.0 / epoch, "seconds": 0.5 * epoch})
    save_weights(record, torch.nn.Linear(2, 1))
    record.finish({"test_accuracy": 0.5, "wall_seconds": 1.5, "step_seconds": 0.1})
    return record


def changed(text: bytes, draws: random.Random) -> bytes:
    """The bytes with one to four changes: flipped, cut off, cut out, doubled, or with a piece of something else."""
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
    """Whether a reader refused the record, and whether one did anything but return or refuse."""
    readers: list[Callable[[], Any]] = [
        record.spec,
        record.environments,
        record.metrics,
        record.summary,
        record.failure,
        lambda: load_weights(record),
        lambda: " ".join(state_of(SPEC, record.root)).encode(),
        lambda: _shown(record),
        lambda: measured(record.root),
    ]
    refused = crashed = False
    for reader in readers:
        try:
            reader()
        except RecordError:
            refused = True
        except Exception:
            traceback.print_exc()
            crashed = True
    return refused, crashed


def _shown(record: Record) -> None:
    """What `experiments show` prints, which must be text for any terminal."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        show(record.run_id, record.root)
    printed.getvalue().encode()
    assert all(c.isprintable() or c == "\n" for c in printed.getvalue())


def _other_value(text: bytes, draws: random.Random) -> bytes:
    """JSON with one of its values put in another's place, or taken out; what is no JSON stays."""
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
