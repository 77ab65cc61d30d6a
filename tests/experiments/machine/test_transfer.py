"""Records that go from one machine to another: the same bytes arrive, and what is not a finished record does not."""

import json
import os
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from experiments.harness.machine import transfer
from experiments.harness.machine.transfer import pack, take_in
from experiments.harness.runs import catalogue, provenance
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record, record_of
from tests.commands import command

ROOT = Path(__file__).parents[3]
FIXTURES = ROOT / "tests/fixtures"

DONE = sorted(path.parent.name for path in (FIXTURES / "runs").glob("*/summary.json"))


def contents(root: Path) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for run_id in DONE
        for path in (root / "runs" / run_id).iterdir()
        if path.name in transfer.FILES
    }


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "records.tar.gz"
    specs = [Record(FIXTURES, run_id).spec() for run_id in DONE]
    assert pack(specs, FIXTURES, path) == len(DONE) > 3
    return path


def test_an_exported_archive_arrives_unchanged_once(archive, tmp_path):
    mine = tmp_path / "results"
    imported = take_in(archive, mine)
    assert (imported.taken, imported.known, imported.rejected) == (DONE, [], [])
    assert contents(mine) == contents(FIXTURES)
    assert take_in(archive, mine).known == DONE


def test_predictions_travel_with_their_record(tmp_path):
    given, mine = tmp_path / "given", tmp_path / "mine"
    shutil.copytree(FIXTURES / "runs", given / "runs")
    record = Record(given, DONE[0])
    record.write_predictions(b"arrays")
    pack([record.spec()], given, tmp_path / "one.tar.gz")
    take_in(tmp_path / "one.tar.gz", mine)
    assert Record(mine, DONE[0]).predictions.read_bytes() == b"arrays"


@pytest.mark.parametrize("form", ["root", "runs", "one", "zip"])
def test_any_folder_or_archive_of_records_is_taken(form, tmp_path):
    source = {"root": FIXTURES, "runs": FIXTURES / "runs", "one": FIXTURES / "runs" / DONE[0]}.get(form)
    if source is None:
        source = tmp_path / "records.zip"
        with zipfile.ZipFile(source, "w") as packed:
            for path in sorted((FIXTURES / "runs").rglob("*.json*")):
                packed.write(path, path.relative_to(FIXTURES / "runs"))
    imported = take_in(source, tmp_path / "results")
    assert imported.taken == (DONE[:1] if form == "one" else DONE)
    unfinished = len(list((FIXTURES / "runs").glob("*/spec.json"))) - len(DONE)
    assert len(imported.rejected) == (0 if form == "one" else unfinished)
    assert all("is not finished" in sentence for sentence in imported.rejected)


def altered(archive: Path, change) -> Path:
    """A copy of an archive with every file passed through a function of its name and bytes."""
    copy = archive.with_name("altered.tar")
    with tarfile.open(archive) as given, tarfile.open(copy, "w") as new:
        for member in given:
            name, content = change(member.name, given.extractfile(member).read())
            path = archive.with_name("member")
            path.write_bytes(content)
            new.add(path, name)
    return copy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, b: (name.replace(DONE[0], "0" * 12), b), "the folder was renamed"),
        (lambda name, b: (name, b.replace(b'"learning_rate": 0', b'"learning_rate": 7')), "describes run"),
        (lambda name, b: (name, b[:-9] if name.endswith(f"{DONE[0]}/summary.json") else b), "is not JSON"),
        (lambda name, b: (name, b"{}" if name.endswith(f"{DONE[0]}/summary.json") else b), "in its summary"),
        (lambda name, b: (name.replace(f"{DONE[0]}/env.json", "x/y"), b), "env.json"),
    ],
)
def test_a_record_that_was_altered_is_rejected_and_the_others_are_taken(archive, tmp_path, change, words):
    imported = take_in(altered(archive, change), tmp_path / "results")
    assert words in " ".join(imported.rejected)
    assert DONE[0] not in imported.taken
    assert not (tmp_path / "results/runs" / DONE[0] / "summary.json").exists()


def test_a_finished_run_is_never_replaced_and_one_that_was_begun_is(archive, tmp_path):
    mine = Record(tmp_path / "results", DONE[0])
    mine.create(Record(FIXTURES, DONE[0]).spec())
    mine.append({"epoch": 1, "step": 1})
    assert DONE[0] in take_in(archive, mine.root).taken
    assert mine.metrics() == Record(FIXTURES, DONE[0]).metrics()
    summary = mine.summary() | {"test_accuracy": 0.99}
    (mine.folder / "summary.json").write_text(json.dumps(summary))
    imported = take_in(archive, mine.root)
    assert "another result" in imported.rejected[0]
    assert mine.summary() == summary


def test_a_record_that_cannot_be_read_leaves_what_was_begun_here(archive, tmp_path):
    mine = Record(tmp_path / "results", DONE[0])
    mine.create(Record(FIXTURES, DONE[0]).spec())
    mine.append({"epoch": 1, "step": 1})
    take_in(archive, tmp_path / "given")
    weights = tmp_path / "given/runs" / DONE[0] / "checkpoint.pt"
    weights.symlink_to("/etc/passwd")
    assert "cannot be read" in take_in(weights.parent, mine.root).rejected[0]
    assert mine.metrics() == [{"epoch": 1, "step": 1}]


def test_no_file_leaves_the_results(archive, tmp_path):
    """Names with .., absolute names, and links, in an archive and in a folder."""
    outside = tmp_path / "outside"
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as tar:
        for name in ("../outside/spec.json", f"{outside}/spec.json", "runs/../../outside/summary.json"):
            tar.add(FIXTURES / "runs" / DONE[0] / "spec.json", name)
        link = tarfile.TarInfo("runs/linked/spec.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert take_in(evil, tmp_path / "results").taken == []
    assert not outside.exists()
    linked = tmp_path / "folder/runs" / DONE[0]
    linked.mkdir(parents=True)
    for name in ("spec.json", "env.json", "metrics.jsonl"):
        (linked / name).write_bytes((FIXTURES / "runs" / DONE[0] / name).read_bytes())
    os.symlink(FIXTURES / "runs" / DONE[0] / "summary.json", linked / "summary.json")
    assert take_in(linked, tmp_path / "results").taken == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "has no run folder"),
        (lambda path: path.write_bytes(b"no archive"), "cannot be read as an archive"),
    ],
)
def test_what_has_no_records_is_rejected_by_name(tmp_path, make, words):
    make(tmp_path / "source")
    with pytest.raises(RecordError, match=words):
        take_in(tmp_path / "source", tmp_path / "results")


def test_a_table_of_the_gpu_profile_without_weights_is_a_small_archive(tmp_path):
    """Under 16 MB for its largest table, with numbers that do not compress, and the sessions of an interrupted run."""
    draws = random.Random(0)
    specs = catalogue.runs("table1", "gpu", 1)
    for spec in specs:
        record = record_of(spec, tmp_path)
        record.create(spec)
        for _ in range(4):
            record.add_environment({"commit": None, "changes": None, **provenance.machine()})
        for epoch in range(spec.epochs):
            record.append({"epoch": epoch, **{name: draws.random() for name in ("a", "b", "c", "d", "e")}})
        record.write_checkpoint(bytes(1_000_000))
        record.finish({f"score_{number}": draws.random() for number in range(40)})
    assert pack(specs, tmp_path, tmp_path / "x.tar.gz") == len(specs)
    largest = max(len(catalogue.runs(f"table{number}", "gpu")) for number in (1, 2, 3, 4))
    assert (tmp_path / "x.tar.gz").stat().st_size / len(specs) * largest < 2e6


def test_the_commands(tmp_path):
    spec = Record(FIXTURES, DONE[0]).spec()
    archive, mine = tmp_path / "all.tar.gz", tmp_path / "mine"
    pack([spec], FIXTURES, archive)
    done = command("experiments", "import", archive, "--results", mine)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 runs" in done.stdout
    words = ("export", "table1", "--profile", "gpu", "--to", tmp_path / "x.tar.gz", "--results", mine)
    nothing = command("experiments", *words)
    assert nothing.returncode == 2
    assert "None of these runs is done" in nothing.stderr
