"""The files below a results root that nothing needs any more. Records, finished or not, are never among them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.harness.runs import catalogue
from experiments.harness.runs.files import RecordError, printable
from experiments.harness.runs.record import Record, RunLocked, in_bytes, record_of
from experiments.harness.runs.spec import PROFILES, Run


@dataclass(frozen=True)
class Unneeded:
    """A file that may be removed."""

    path: Path
    size: int
    """In bytes."""
    why: str
    title: str
    """Of its run."""


def unneeded(root: Path) -> list[Unneeded]:
    """The files that nothing needs any more; folders that cannot be read and runs in progress are left out.

    - Final weights of finished runs: only runs that measure a network read them. Those of a network that an experiment
      measures are needed until that measurement is done.
    - The previous checkpoint of a finished run, and temporary files of processes that were killed.

    Checkpoints of unfinished runs are always needed: the runs resume from them.
    """
    folder = root / "runs"
    records = [Record(root, path.name) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    measuring = _measuring(records)
    files = []
    for record in records:
        try:
            if record.folder.is_dir() and not record.folder.is_symlink() and not record.busy:
                files += [_entry(path, why, record) for path, why in _files(record, measuring)]
        except (OSError, RecordError):
            continue
    return files


def remove(files: list[Unneeded], root: Path) -> int:
    """Remove files that are still not needed.

    Returns:
        The bytes that this freed.
    """
    freed, still = 0, {one.path for one in unneeded(root)}
    for one in files:
        try:
            with Record(root, one.path.parent.name).locked():
                if one.path in still:
                    one.path.unlink()
                    freed += one.size
        except (FileNotFoundError, RunLocked):
            continue
    return freed


def _files(record: Record, measuring: dict[Run, list[Run]]) -> Iterator[tuple[Path, str]]:
    yield from ((path, "left by a process that was killed") for path in record.left_by_killed())
    if not record.done:
        return
    spec, _ = record.spec(), record.summary()
    if record.previous_checkpoint.exists():
        yield record.previous_checkpoint, "checkpoint of a finished run"
    waiting = [run for run in _at_seed(spec, measuring) if not record_of(run, record.root).done]
    if record.checkpoint.exists() and not waiting:
        yield record.checkpoint, "final weights"


def _at_seed(spec: Run, measuring: dict[Run, list[Run]]) -> list[Run]:
    """The runs that measure the spec's network, at its seed."""
    return [replace(cell, seed=spec.seed) for cell in measuring.get(replace(spec, seed=0), [])]


def _measuring(records: list[Record]) -> dict[Run, list[Run]]:
    """By network, the runs that measure it, all at seed 0: those that experiments list, and those with a record."""
    cells = [cell for e in catalogue.catalogue().values() for p in PROFILES for cell in e.runs.get(p, ())]
    for record in records:
        try:
            cells.append(replace(record.spec(), seed=0))
        except RecordError:
            continue
    measuring: dict[Run, list[Run]] = {}
    for cell in dict.fromkeys(cells):
        if cell.network is not None:
            measuring.setdefault(replace(cell.network, seed=0), []).append(cell)
    return measuring


def _entry(path: Path, why: str, record: Record) -> Unneeded:
    return Unneeded(path, path.lstat().st_size, why, record.spec().title)


def report(root: Path, *, removing: bool) -> None:
    """Print what is not needed below a results root, with its size; remove it if asked to."""
    files = unneeded(root)
    for one in files:
        print(f"{in_bytes(one.size):>8}  {one.path.parent.name}/{one.path.name}  {one.why}: {printable(one.title)}")
    total = in_bytes(sum(one.size for one in files))
    if not files:
        print(f"{root} has nothing to remove.")
    elif removing:
        print(f"\nRemoved {in_bytes(remove(files, root))} of {total}.")
    else:
        print(f"\n{len(files)} files, {total}. To remove them, give the same command with --remove.")
