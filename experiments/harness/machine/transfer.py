"""Finished records as one archive, and records that another machine made. Standard library only.

    python -m experiments export table1 --profile gpu --to table1.tar.gz
    python -m experiments import table1.tar.gz

A machine without git, make or a network can so train runs: export packs them there, import checks them here.
"""

import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from experiments.harness.runs.files import LARGEST_TEXT, RecordError, printable, read_bytes, replacing, write_errors
from experiments.harness.runs.record import LARGEST_CHECKPOINT, Record, record_of
from experiments.harness.runs.spec import Run

FILES = ("spec.json", "env.json", "metrics.jsonl", "predictions.npz", "summary.json")
"""The files of a finished record, in the order in which they are written: the summary, which makes it done, is last."""

WEIGHTS = "checkpoint.pt"
"""The final weights. A record without them is complete, except that no curvature can be measured."""

MOST_FILES = 100_000
"""The most files that an archive may have."""


@dataclass
class Imported:
    """The outcome of an import: run ids, and a sentence for each record that was rejected."""

    taken: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    """Runs that were here before, with the same result."""
    rejected: list[str] = field(default_factory=list)


def pack(specs: Sequence[Run], root: Path, archive: Path, *, weights: bool = False) -> int:
    """Write the finished records of these runs as a `.tar.gz`.

    Args:
        specs: The runs; those that are not done are left out.
        root: The results root.
        archive: The file to write, by rename.
        weights: Also pack the final weights.

    Returns:
        The number of records packed.

    Raises:
        RecordError: if none is finished, or the archive cannot be written.
    """
    records = [record for record in (record_of(spec, root) for spec in specs) if record.done]
    if not records:
        raise RecordError(f"None of these runs is done in {root}: train them first, or name another --results.")
    names = (*FILES, WEIGHTS) if weights else FILES
    with write_errors(archive), replacing(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for record in records:
            for path in (record.folder / name for name in names):
                if path.exists():
                    tar.add(path, f"runs/{record.run_id}/{path.name}", recursive=False)
    return len(records)


def take_in(source: Path, root: Path) -> Imported:
    """Check finished records of another machine and copy them below a results root.

    A finished record of this machine is never replaced. One that has only begun here is.

    Args:
        source: A results folder, a folder of run folders, one run folder, or an archive (tar or zip) of any of them.
        root: The results root.

    Raises:
        RecordError: if the source is missing, is neither a folder nor an archive, or has no run folder.
    """
    if not source.exists():
        raise RecordError(f"{source} does not exist: name a folder with finished runs, or an archive of one.")
    imported = Imported()
    with _folders_of(source) as folders:
        if not folders:
            raise RecordError(f"{source} has no run folder (one with a spec.json): name a results folder or its runs/.")
        for folder in folders:
            try:
                new = _copied(folder, root)
            except RecordError as error:
                imported.rejected.append(printable(str(error)))
            else:
                (imported.taken if new else imported.known).append(folder.name)
    return imported


def _copied(folder: Path, root: Path) -> bool:
    """Check one record and copy it; False if it is here already.

    Raises:
        RecordError: if it is damaged, unfinished, or another result of a run that is done here.
    """
    given, mine = Record(_as_root(folder), folder.name), Record(root, folder.name)
    spec = given.spec()
    if not given.done:
        raise RecordError(f"{folder} is not finished (no summary.json): resume it where it was started.")
    summary, _ = given.summary(), given.metrics()
    if spec.score not in summary:
        raise RecordError(f"{folder} has no {spec.score} in its summary: it is not a complete record.")
    if not given.environments():
        raise RecordError(f"{folder} does not say which code and machine made it: its env.json has no sessions.")
    mine.create(spec)
    with mine.locked():
        if mine.done:
            if mine.summary() != summary:
                raise RecordError(
                    f"{folder} is another result of run {spec.run_id}, which is done here: move {mine.folder} away to "
                    "take the new one."
                )
            return False
        names = [name for name in (*FILES[:-1], WEIGHTS, FILES[-1]) if (folder / name).exists()]
        contents = {name: _bytes(folder / name) for name in names}  # all of it, before anything here is removed
        mine.remove()
        for name, content in contents.items():
            with write_errors(mine.folder / name), replacing(mine.folder / name) as temporary:
                temporary.write_bytes(content)
    return True


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path, LARGEST_CHECKPOINT if path.name == WEIGHTS else LARGEST_TEXT)
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}): copy it again.") from error


def _as_root(folder: Path) -> Path:
    """The results root of a run folder, which must lie in `runs/` for `Record` to read it."""
    if folder.parent.name != "runs":
        raise RecordError(f"{folder} does not lie in a folder named runs: rename {folder.parent} to runs.")
    return folder.parent.parent


@contextmanager
def _folders_of(source: Path) -> Iterator[list[Path]]:
    """The run folders of a source, in `runs/`; those of an archive are in a temporary folder."""
    if source.is_dir():
        runs = source / "runs" if (source / "runs").is_dir() else source
        one = (runs / "spec.json").exists()
        yield [runs.absolute()] if one else [path.parent.absolute() for path in sorted(runs.glob("*/spec.json"))]
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "runs"
        for number, (name, file) in enumerate(_members(source)):
            if number == MOST_FILES:
                raise RecordError(f"{source} has more than {MOST_FILES} files: it is not an archive of records.")
            path = PurePosixPath(name)
            if len(path.parts) > 1 and path.name in (*FILES, WEIGHTS) and ".." not in path.parts:
                target = folder / path.parts[-2] / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.name != WEIGHTS:
                    content = file.read(LARGEST_TEXT + 1)
                    if len(content) > LARGEST_TEXT:
                        raise RecordError(f"{name} in {source} is larger than any record's: give another archive.")
                    target.write_bytes(content)
                    continue
                with target.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
        yield sorted(path.parent for path in folder.glob("*/spec.json"))


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of a tar or zip archive, by name; links and devices are skipped.

    Raises:
        RecordError: if it is neither, or damaged.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as packed:
                for name in packed.namelist():
                    if not name.endswith("/"):
                        with packed.open(name) as file:
                            yield name, file
            return
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)) is not None:
                    yield member.name, content
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise RecordError(
            f"{archive} cannot be read as an archive ({error}): give a .tar.gz that export wrote, or a folder."
        ) from error


def report(imported: Imported, source: Path) -> int:
    """Print the outcome of an import; the status is 1 if a record was rejected."""
    for sentence in imported.rejected:
        print(f"Rejected: {sentence}", file=sys.stderr)
    print(
        f"{len(imported.taken)} runs of {source} taken in, {len(imported.known)} were here already, "
        f"{len(imported.rejected)} rejected."
    )
    return 1 if imported.rejected else 0
