"""Runs to frames to files to frames."""

import json
import stat
from dataclasses import replace

import pandas as pd
import pytest

from analysis.collect import collect
from analysis.columns import csv_text, parse
from analysis.frames import Results, curves, frame, write_files
from experiments.harness.runs.files import RecordError
from tests.fixtures import make_runs
from tests.fixtures.make_runs import MSAM, ROOT, SGD, write_run


def test_frame_begins_with_the_identifying_columns():
    table = frame(collect(ROOT).finished)
    assert " ".join(table.columns[:9]) == ("run_id profile dataset model method base_optimizer rho micro_batches seed")
    row = table.set_index("run_id").loc[MSAM.run_id]
    assert (row["method"], row["rho"], row["micro_batches"], row["seed"]) == ("msam", 0.2, 4, 0)
    assert (row["learning_rate"], row["train_examples"], row["nesterov"]) == (0.1, 64, False)
    assert pd.isna(row["clip_norm"])
    assert (row["test_accuracy"], row["train_loss"], row["steps"]) == (0.65, 0.1 + 0.2, 4)
    assert row["commit"] == make_runs.SESSION["commit"]
    assert row["dirty"] is False or row["dirty"] == False  # noqa: E712 - numpy's own False
    assert "summary_epochs" not in table  # the summary repeats the spec


def test_curves_have_one_row_an_epoch():
    table = curves(collect(ROOT).finished)
    assert len(table) == 2 * 12
    mine = table[table["run_id"] == SGD.run_id]
    assert mine["epoch"].tolist() == [1, 2]
    assert mine["train_loss"].tolist() == [2.5 - 0.6, 2.5 - 1.2]


def test_files_round_trip_to_equal_frames_and_equal_bytes(tmp_path):
    results = Results.of(collect(ROOT).finished)
    write_files(tmp_path, results.texts())
    again = Results.read(tmp_path)
    pd.testing.assert_frame_equal(again.runs, results.runs)
    pd.testing.assert_frame_equal(again.curves, results.curves)
    assert again.provenance == results.provenance
    assert again.texts() == results.texts()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.csv", "provenance.jsonl", "runs.csv"]


def test_every_float_keeps_all_its_bits(tmp_path):
    numbers = [1e-17 / 3, 0.1 + 0.2, 1e300 / 7, 5e-324, 123456789.123456789]
    for seed, number in enumerate(numbers):
        record = write_run(tmp_path, replace(SGD, seed=seed), 0.5)
        record.finish({**record.summary(), "odd": number})
    texts = Results.of(collect(tmp_path).finished).texts()
    assert sorted(parse(texts["runs.csv"])["odd"]) == sorted(numbers)


def test_order_of_runs_does_not_matter():
    runs = collect(ROOT).finished
    assert Results.of(runs).texts() == Results.of(reversed(runs)).texts()


def test_parts_join_to_the_whole():
    results = Results.of(collect(ROOT).finished)
    ids = list(results.runs["run_id"])
    joined = results.only(set(ids[::2])).joined(results.only(set(ids[1::2])))
    assert joined.texts() == results.texts()
    assert len(results.only({ids[0]}).runs) == 1
    assert Results.of([]).joined(results).texts() == results.texts()


def test_integers_stay_integers_next_to_missing_values(tmp_path):
    write_run(tmp_path, SGD, 0.5)
    write_run(tmp_path, replace(SGD, train_examples=None, seed=1), 0.5)
    lines = csv_text(frame(collect(tmp_path).finished)).splitlines()
    place = lines[0].split(",").index("train_examples")
    assert [line.split(",")[place] for line in lines[1:]] == ["64", ""]


def test_summary_that_contradicts_its_spec_does_not_replace_it(tmp_path):
    record = write_run(tmp_path, SGD, 0.5)
    record.finish({**record.summary(), "epochs": 99, "commit": "forged"})
    row = frame(collect(tmp_path).finished).iloc[0]
    assert (row["epochs"], row["summary_epochs"]) == (2, 99)
    assert (row["commit"], row["summary_commit"]) == (make_runs.SESSION["commit"], "forged")


def test_non_finite_numbers_survive(tmp_path):
    record = write_run(tmp_path, SGD, 0.5)
    record.finish({**record.summary(), "test_loss": float("inf"), "train_loss": float("nan")})
    table = frame(collect(tmp_path).finished)
    assert table["test_loss"].tolist() == [float("inf")]
    assert table["train_loss"].isna().all()
    assert csv_text(parse(csv_text(table))) == csv_text(table)


HOSTILE = 'a,b "c"\n| d \x1b[2J\x00 \ud800 ; =1+1'


def test_hostile_text_stays_one_cell_of_one_line(tmp_path):
    record = write_run(tmp_path, SGD, 0.5, cpu=HOSTILE, **{"key\n": HOSTILE})
    record.finish({**record.summary(), "note": HOSTILE, "k\ney": "v"})
    record.append({"epoch": 3, "remark": HOSTILE})
    results = Results.of(collect(tmp_path).finished)
    texts = results.texts()
    assert texts["runs.csv"].count("\n") == 2
    assert texts["provenance.jsonl"].count("\n") == 1
    assert "\x1b" not in "".join(texts.values())
    write_files(tmp_path / "out", texts)
    assert Results.read(tmp_path / "out").texts() == texts
    assert results.runs["note"].tolist() == ['a,b "c" | d  [2J  ? ; =1+1']


def test_a_run_shows_the_commits_of_all_its_sessions(tmp_path):
    record = write_run(tmp_path, SGD, 0.5)
    record.add_environment({**make_runs.SESSION, "commit": "fedcba9", "dirty": True})
    record.add_environment({**make_runs.SESSION, "commit": None, "dirty": None})
    row = frame(collect(tmp_path).finished).iloc[0]
    assert row["commit"] == f"{make_runs.SESSION['commit']}+fedcba9+unknown"
    assert row["dirty"]
    assert row["cpu"] == "Invented CPU"


@pytest.mark.parametrize("network", [False, True, None])
def test_a_measurement_is_dirty_if_its_networks_training_was(tmp_path, network):
    write_run(tmp_path, SGD, 0.5, network_dirty=network)
    dirty = frame(collect(tmp_path).finished)["dirty"].iloc[0]
    assert pd.isna(dirty) if network is None else dirty == network


def test_provenance_contains_no_machine_and_no_folder_names(tmp_path):
    write_run(
        tmp_path,
        SGD,
        0.5,
        hostname="node17",
        cwd="/home/lovelace/msam",
        command="/home/lovelace/.venv/bin/python -m experiments run table1 --results=/scr/lovelace/results",
        data_source="/scratch/lovelace/data/cifar",
        packages={"msam": "0.1 @ file:///home/lovelace/msam"},
        fetched="https://example.org/a/b.tar.gz",
    )
    text = Results.of(collect(tmp_path).finished).texts()["provenance.jsonl"]
    assert "lovelace" not in text
    assert "node17" not in text
    session = json.loads(text)["sessions"][0]
    assert session["command"] == "python -m experiments run table1 --results=results"
    assert session["data_source"] == "cifar"
    assert session["fetched"] == "https://example.org/a/b.tar.gz"
    assert session["commit"] == make_runs.SESSION["commit"]


def test_failed_write_leaves_the_old_file(tmp_path):
    write_files(tmp_path, {"a.csv": "old"})
    with pytest.raises(UnicodeEncodeError):
        write_files(tmp_path, {"a.csv": "new \ud800"})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a.csv": "old"}
    assert stat.S_ISREG((tmp_path / "a.csv").stat().st_mode)


@pytest.mark.parametrize(
    ("name", "text"),
    [("runs.csv", "a,b\n1,2\n"), ("runs.csv", ""), ("provenance.jsonl", "[]\n"), ("curves.csv", None)],
)
def test_damaged_committed_files_are_reported(tmp_path, name, text):
    write_files(tmp_path, Results.of(collect(ROOT).finished).texts())
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match="restore them with git"):
        Results.read(tmp_path)


def test_rows_from_before_a_field_get_its_default(tmp_path):
    results = Results.of(collect(ROOT).finished)
    write_files(tmp_path, results.texts())
    path = tmp_path / "runs.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    place = lines[0].index("label_noise")
    path.write_text("\n".join(",".join(line[:place] + line[place + 1 :]) for line in lines) + "\n")
    assert "label_noise" not in path.read_text()
    read = Results.read(tmp_path)
    assert (read.runs["label_noise"] == 0).all()
    assert read.runs[results.runs.columns].equals(results.runs)
    newer = read.joined(Results.of([]))
    assert newer.texts()["runs.csv"] == results.texts()["runs.csv"]
