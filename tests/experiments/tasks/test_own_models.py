"""What users bring: the source of their model is in the record, and start weights are checked before they are used."""

import hashlib
import importlib
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import SpecError
from experiments.harness.tasks.build import check_task
from experiments.harness.tasks.image_models import build
from experiments.harness.tasks.storage import DataError
from experiments.harness.work.session import Session
from experiments.harness.work.train import train
from tests.specs import BASE

SPEC = replace(BASE, model="linear", epochs=1, train_examples=32, test_examples=10)


def named(path, digest=None):
    return f"{path}@{digest or hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(7)
    return build("linear", 10).state_dict()


def saved(path, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def test_training_starts_from_the_file_and_the_record_has_its_checksum(tmp_path, weights):
    path = saved(tmp_path / "start.safetensors", weights)
    tiny = replace(SPEC, learning_rate=1e-30, start_weights=named(path))  # so small that the weights stay as they were
    train(tiny, Session(tmp_path))
    record = record_of(tiny, tmp_path)
    final = torch.load(record.checkpoint, weights_only=True)["model"]
    assert {name: t.tolist() for name, t in final.items()} == {name: t.tolist() for name, t in weights.items()}
    (session,) = record.environments()
    assert session["start_weights_checksum"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tiny.run_id != replace(tiny, start_weights=None).run_id
    assert "from start.safetensors" in tiny.title
    assert "start_weights" not in SPEC.to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("1.bias"), "1.bias is missing"),
        (lambda w: w.update(extra=torch.ones(1)), "extra is not in the model"),
        (lambda w: w.update({"1.bias": torch.ones(11)}), r"1.bias is torch.float32 \(11,\) where the model has"),
        (lambda w: w.update({"1.bias": torch.ones(10).half()}), "1.bias is torch.float16"),
        (lambda w: w.update({"1.bias": torch.full((10,), torch.nan)}), "1.bias has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_rejected_before_any_run(tmp_path, weights, change, words):
    change(weights)
    path = saved(tmp_path / "start.safetensors", weights)
    with pytest.raises(DataError, match=rf"start.safetensors do not fit the model: {words}.*whole state_dict"):
        check_task(replace(SPEC, start_weights=named(path)))


def test_a_missing_altered_or_foreign_file_is_rejected_with_what_to_do(tmp_path, weights):
    path = saved(tmp_path / "start.safetensors", weights)
    spec = replace(SPEC, start_weights=named(path))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    with pytest.raises(DataError, match=rf"is truncated or altered.*give start_weights={path}@{actual}"):
        check_task(spec)
    path.write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"cannot be read .*safetensors"):
        check_task(replace(SPEC, start_weights=named(path)))
    path.unlink()
    with pytest.raises(DataError, match=r"start.safetensors do not exist"):
        check_task(spec)
    with pytest.raises(
        SpecError, match=r"start_weights is 'w.pt', but must be PATH.safetensors@DIGEST, .* \(`sha256sum"
    ):
        replace(SPEC, start_weights="w.pt")


def test_the_source_of_a_users_model_is_in_the_record_and_changes_with_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_layers.py").write_text("from torch import nn\nclass Layer(nn.Linear): pass\n")
    (tmp_path / "own_model.py").write_text(
        "from torch import nn\nfrom own_layers import Layer\n"
        "def net(num_classes): return nn.Sequential(nn.Flatten(), Layer(3072, num_classes))\n"
    )
    spec, hashes = replace(SPEC, model="own_model:net"), []
    for changed in (None, None, "own_model.py", "own_layers.py"):
        if changed:
            with open(tmp_path / changed, "a") as file:
                file.write("# another line\n")
        for name in ("own_model", "own_layers"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        train(spec, Session(tmp_path), redo=True)
        (session,) = record_of(spec, tmp_path).environments()
        hashes.append(session["model_code"])
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    train(SPEC, Session(tmp_path))
    (session,) = record_of(SPEC, tmp_path).environments()
    assert "model_code" not in session
