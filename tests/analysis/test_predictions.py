"""Predictions: from records through the published file and back; damaged ones; their size."""

import io
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from analysis.collect import collect
from analysis.frames import Results
from analysis.predictions import LARGEST_PUBLISHED, NAME, Predicted, Predictions, of_record
from analysis.publish import publish, redraw, target
from experiments.harness.runs import catalogue
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.record import record_of
from tests.fixtures.make_runs import CONTROL, MSAM, SAM, SGD, write_run

LABELS = np.random.default_rng(0).integers(10, size=64).astype(np.uint8)


def predicted(correct, labels=LABELS):
    """Predictions of which the first `correct` are right."""
    return np.where(np.arange(len(labels)) < correct, labels, (labels + 1) % 10).astype(labels.dtype)


def keep(root, spec, correct, **arrays):
    """Write a run with this many right predictions of 64, and its predictions."""
    record = write_run(root, spec, correct / 64)
    np.savez(record.folder / NAME, **({"test": predicted(correct), "test_labels": LABELS} | arrays))
    return record


@pytest.fixture(autouse=True)
def known(monkeypatch):
    cells = {"smoke": [SGD, CONTROL, SAM, MSAM]}
    only = catalogue.Experiment(name="one", table="table1", summary="", runs=cells, tuning={})
    monkeypatch.setattr(catalogue, "catalogue", lambda: {"one": only})


def fill(root, seeds=2, first=0):
    for number, spec in enumerate(with_seeds([replace(c, seed=first) for c in (SGD, CONTROL, SAM, MSAM)], seeds)):
        keep(root, spec, 20 + number % 8)


def published(root, into, seeds=2):
    results = Results.of(collect(root).finished)
    publish(into, "smoke", [target("table1", "smoke", seeds=seeds)], results)
    return results, (into / NAME).read_bytes() if (into / NAME).exists() else None


def test_predictions_come_back_from_the_published_file_which_has_the_labels_once(tmp_path):
    fill(tmp_path)
    int8 = predicted(9)
    keep(tmp_path, MSAM, 23, test_int8=int8)
    results, content = published(tmp_path, tmp_path / "smoke")
    runs = {run.run_id: run for run in with_seeds([SGD, CONTROL, SAM, MSAM], 2)}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert set(arrays.files) == {*runs, f"{MSAM.run_id}_int8", "labels_cifar10_64"}
        assert np.array_equal(arrays["labels_cifar10_64"], LABELS)
        assert np.array_equal(arrays[f"{MSAM.run_id}_int8"], int8)
    again = Results.read(tmp_path / "smoke")
    accuracies = dict(zip(again.runs["run_id"], again.runs["test_accuracy"], strict=True))
    for run_id in runs:
        mine, theirs = again.predictions.of(run_id), results.predictions.of(run_id)
        assert all(np.array_equal(mine.classes[name], array) for name, array in theirs.classes.items())
        assert np.mean(mine.classes[""] == mine.labels[""]) == accuracies[run_id]


def test_a_second_call_writes_the_same_bytes_also_from_the_committed_files_alone(tmp_path):
    fill(tmp_path)
    _, first = published(tmp_path, tmp_path / "smoke")
    table = (tmp_path / "smoke/tables/table1.csv").read_bytes()
    assert b"over_sam_two_way_low" in table
    assert published(tmp_path, tmp_path / "smoke")[1] == first
    (tmp_path / "empty").mkdir()
    assert published(tmp_path / "empty", tmp_path / "smoke")[1] == first
    redraw(tmp_path / "smoke", "smoke")
    assert (tmp_path / "smoke/tables/table1.csv").read_bytes() == table


def test_runs_without_predictions_are_absent_and_without_any_there_is_no_file(tmp_path):
    for spec in with_seeds([SGD, CONTROL, SAM, MSAM], 2):
        write_run(tmp_path, spec, 0.5)
    _, content = published(tmp_path, tmp_path / "smoke")
    assert content is None
    assert "two_way" not in (tmp_path / "smoke/tables/table1.csv").read_text()
    keep(tmp_path, SGD, 32)
    _, content = published(tmp_path, tmp_path / "smoke")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert set(arrays.files) == {SGD.run_id, "labels_cifar10_64"}


def test_a_retrained_run_takes_its_new_predictions_and_the_others_keep_theirs(tmp_path):
    fill(tmp_path / "a")
    published(tmp_path / "a", tmp_path / "smoke")
    keep(tmp_path / "b", MSAM, 40)
    published(tmp_path / "b", tmp_path / "smoke")
    after = Results.read(tmp_path / "smoke").predictions
    assert np.mean(after.of(MSAM.run_id).classes[""] == LABELS) == 40 / 64
    assert np.mean(after.of(replace(MSAM, seed=1).run_id).classes[""] == LABELS) == 27 / 64


def archive(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def lying():
    """An array whose header says 2 ** 40 values."""
    header = io.BytesIO()
    form = {"descr": "|u1", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(header, form)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("test.npy", header.getvalue())
    return file.getvalue()


DAMAGED = {
    "no archive": (b"PK\3\4 and no more", ""),
    "truncated": (archive(test=predicted(20), test_labels=LABELS)[:-90], ""),
    "pickled": (archive(test=np.array([{}] * 64), test_labels=LABELS), "allow_pickle"),
    "too large": (archive(test=np.zeros(9 * 2**20, dtype=np.uint8)), "more than any record's"),
    "lying": (lying(), ""),
    "other name": (archive(tset=predicted(20), tset_labels=LABELS), "no array 'test'"),
    "no labels": (archive(test=predicted(20)), "has no labels"),
    "floats": (archive(test=predicted(20).astype(float), test_labels=LABELS.astype(float)), "one row of uint8"),
    "not finite": (archive(test=np.float32([np.nan]), test_labels=np.float32([0])), "finite"),
    "two rows": (archive(test=np.zeros((2, 9), np.uint8), test_labels=np.zeros((2, 9), np.uint8)), "one row"),
    "too short": (archive(test=predicted(20)[:40], test_labels=LABELS), "40 values of uint8 for 64 labels"),
    "empty": (archive(test=LABELS[:0], test_labels=LABELS[:0]), "0 values"),
    "other accuracy": (archive(test=predicted(21), test_labels=LABELS), "0.328125, but the summary says 0.3125"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_predictions_are_reported_in_a_sentence_and_the_run_still_counts(tmp_path, name):
    content, words = DAMAGED[name]
    record = keep(tmp_path, SGD, 20)
    (record.folder / NAME).write_bytes(content)
    results = Results.of(collect(tmp_path).finished)
    assert list(results.runs["run_id"]) == [SGD.run_id]
    assert results.predictions.problems == {}  # it is not read before it is needed
    assert results.predictions.of(SGD.run_id) is None
    (sentence,) = results.predictions.problems.values()
    assert str(record.folder / NAME) in sentence
    assert "counts without its predictions" in sentence
    assert words in sentence
    assert "\n" not in sentence


def test_a_link_is_not_followed(tmp_path):
    record = keep(tmp_path, SGD, 20)
    os.rename(record.folder / NAME, tmp_path / NAME)
    (record.folder / NAME).symlink_to(tmp_path / NAME)
    with pytest.raises(RecordError, match="cannot be used"):
        of_record(record.folder / NAME, {})


def test_a_run_that_was_scored_on_other_examples_is_left_out_and_reported(tmp_path):
    fill(tmp_path)
    late = max(with_seeds([SGD, CONTROL, SAM, MSAM], 2), key=lambda spec: spec.run_id)
    others = (LABELS + 3) % 10
    keep(tmp_path, late, 20, test=predicted(20, others), test_labels=others)
    results, content = published(tmp_path, tmp_path / "smoke")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        assert late.run_id not in arrays.files
        assert len(arrays.files) == 8
    assert "scored on other examples" in results.predictions.problems[late.run_id]
    assert late.run_id in set(Results.read(tmp_path / "smoke").runs["run_id"])


def test_a_damaged_published_file_is_an_error_that_git_mends(tmp_path):
    fill(tmp_path)
    _, content = published(tmp_path, tmp_path / "smoke")
    (tmp_path / "smoke" / NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(RecordError, match="restore them with git"):
        Results.read(tmp_path / "smoke")
    with np.load(io.BytesIO(content)) as arrays:
        other = dict(arrays) | {MSAM.run_id: predicted(1)}
    np.savez(tmp_path / "smoke" / NAME, **other)
    with pytest.raises(RecordError, match="restore the file with git"):
        redraw(tmp_path / "smoke", "smoke")


def test_some_1900_runs_of_10_000_images_fit_into_the_published_file():
    """Of networks of half the accuracy, whose mistakes are spread evenly over the classes: as hard to pack as any."""
    random = np.random.default_rng(1)
    labels = random.integers(10, size=10_000).astype(np.uint8)

    def run():
        guesses = random.integers(10, size=10_000).astype(np.uint8)
        return Predicted({"": np.where(random.random(10_000) < 0.45, labels, guesses)}, {"": labels})

    names = [f"run{number}" for number in range(8)]
    content = Predictions(dict.fromkeys(names, run)).content(dict.fromkeys(names, "cifar10"))
    assert 1_850 < LARGEST_PUBLISHED / (len(content) / 9) < 2_000  # eight runs and the labels


def test_records_keep_predictions_where_the_analysis_reads_them(tmp_path):
    record = record_of(SGD, tmp_path)
    assert record.predictions == record.folder / NAME
