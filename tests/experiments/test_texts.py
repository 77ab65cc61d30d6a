"""GLUE in the hub's layout, the packages from PyPI, and what is refused before training."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.harness import texts
from experiments.harness.data import DataError, NotToBeHad
from experiments.harness.spec import METRICS, TEXTS
from experiments.harness.texts import TASKS, load_texts

ROOT = Path(__file__).parents[2]
ROWS = 12


def columns_of(task: str, rows: int = ROWS) -> dict[str, list]:
    """A dozen made-up rows of a task."""
    known = TASKS[task]
    labels = [i % len(known.labels) for i in range(rows)] if known.labels else [i * 5 / (rows - 1) for i in range(rows)]
    return {c: [f"{c} number {i} of {task} .".replace("_", " ") for i in range(rows)] for c in known.columns} | {
        "label": labels,
        "idx": list(range(rows)),
    }


def write(folder: Path, task: str, **changed) -> Path:
    """The task in the hub's layout below a folder; `changed` replaces columns, None leaves one out."""
    place = folder / task
    place.mkdir(parents=True, exist_ok=True)
    content = {name: values for name, values in (columns_of(task) | changed).items() if values is not None}
    for split in ("train", *TASKS[task].validation):
        pq.write_table(pa.table(content), place / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MSAM_DATA", raising=False)


def test_every_set_of_texts_has_its_size_its_task_and_its_metric():
    assert set(TEXTS) == set(TASKS) == set(METRICS)
    for name, words in METRICS.items():
        assert words.split()[0].lower() in TASKS[name].metrics[0].replace("_", " ")


@pytest.mark.parametrize("task", [name for name in TASKS if name != "snippets"])
@pytest.mark.parametrize("above", ["", "glue"])
def test_the_hubs_layout(task, above, tmp_path):
    write(tmp_path / above, task)
    data = load_texts(task, tmp_path)
    wanted = columns_of(task)
    assert [list(s) for s in data.train.sentences] == [wanted[c] for c in TASKS[task].columns]
    assert data.train.labels.tolist() == wanted["label"]
    assert data.train.labels.dtype == (np.int64 if TASKS[task].labels else np.float64)
    assert set(data.validation) == set(TASKS[task].validation)
    assert str(tmp_path) in data.source


def test_the_environment_names_a_folder_and_the_checksum_is_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setenv("MSAM_DATA", str(write(tmp_path / "a", "rte")))
    first = load_texts("rte").checksum
    assert load_texts("rte", write(tmp_path / "b", "rte")).checksum == first
    other = write(tmp_path / "c", "rte", label=[1, *columns_of("rte")["label"][1:]])
    assert load_texts("rte", other).checksum != first


@pytest.mark.parametrize(
    ("task", "changed", "words"),
    [
        ("rte", {"sentence2": None}, "no column 'sentence2', only sentence1, label, idx. Is it rte"),
        ("rte", {"label": [2] + [0] * 11}, r"row 0 has the label 2; those of rte are 0 \(entailment\)"),
        ("sst2", {"label": [-1] * 12}, "row 0 has the label -1"),
        ("cola", {"sentence": ["fine ."] * 4 + ["  "] + ["fine ."] * 7}, "sentence of row 4 is empty"),
        ("cola", {"sentence": ["fine ."] * 4 + [None] + ["fine ."] * 7}, "sentence of row 4 is empty"),
        ("stsb", {"label": [float("nan")] * 12}, "a label is not a finite number"),
    ],
)
def test_files_that_are_not_their_task_are_refused(task, changed, words, tmp_path):
    write(tmp_path, task, **changed)
    with pytest.raises(DataError, match=words):
        load_texts(task, tmp_path)


def test_a_missing_split_and_a_damaged_file_are_named(tmp_path):
    write(tmp_path, "mnli")
    (tmp_path / "mnli" / "validation_mismatched-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="has no validation_mismatched split"):
        load_texts("mnli", tmp_path)
    (write(tmp_path, "rte") / "rte" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"rte/train-00000-of-00001.parquet cannot be read"):
        load_texts("rte", tmp_path)


def test_an_unknown_task_is_refused():
    with pytest.raises(DataError, match="no set of texts called 'boolq'"):
        load_texts("boolq")


def test_offline_is_told_in_a_sentence_and_at_once(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(NotToBeHad, match=r"does not hold qnli/ or glue/qnli/; .*Point --data-root"):
        load_texts("qnli", tmp_path)
    assert time.monotonic() - begun < 20


def test_a_hub_that_is_silent_is_not_waited_for():
    """A server that takes the connection counts as an answer; a port where nobody listens does not."""
    ask = "import time; from experiments.harness.texts import hub_answers; t = time.monotonic(); print(hub_answers())"
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr


def test_the_snippets_are_split_once_and_equal_texts_stay_together():
    data = load_texts("snippets")
    validation = data.validation["validation"]
    assert (len(data.train.labels), len(validation.labels)) == TEXTS["snippets"]
    plain = [{" ".join(t.lower().split()) for t in split.sentences[0]} for split in (data.train, validation)]
    assert not plain[0] & plain[1]
    assert 0.45 < data.train.labels.mean() < 0.55
    assert data.checksum == "2739299e75136063a0a30813b69435e7a27e891f3b8c8b75eb7b535af9253cd1"


def test_minilm_is_a_folder_that_transformers_reads():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(texts.minilm())
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 384, 30522)


def test_an_altered_package_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "msam").mkdir()
    (tmp_path / "msam" / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"vaderSentiment-3.3.2.tar.gz is truncated or altered"):
        load_texts("snippets")
