"""Specs: what is refused, what names a run, and what JSON keeps."""

import dataclasses
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.harness.runs.facts import IMAGE_MODELS
from experiments.harness.runs.grids import curvature_of, four_methods, tuning_grid, with_seeds
from experiments.harness.runs.spec import METHODS, Spec, SpecError

BASE = Spec(
    profile="smoke",
    dataset="cifar10",
    model="resnet8",
    base_optimizer="sgd",
    learning_rate=0.1,
    epochs=2,
    batch_size=32,
)


TEXT = replace(BASE, dataset="sst2", model="minilm", base_optimizer="adamw")


@given(
    rho=st.floats(0, 10),
    micro_batches=st.integers(1, 32),
    seed=st.integers(0, 1000),
    holdout=st.integers(0, 5000),
    clip=st.none() | st.floats(0.1, 10),
    model=st.sampled_from(IMAGE_MODELS),
)
def test_json_round_trip(rho, micro_batches, seed, holdout, clip, model):
    spec = replace(
        BASE,
        rho=rho,
        micro_batches=micro_batches,
        seed=seed,
        holdout_examples=holdout,
        clip_norm=clip,
        model=model,
    )
    again = Spec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.run_id == spec.run_id


def test_a_run_id_is_what_it_always_was():
    """Finished runs are found by these names: a change here orphans every one of them."""
    assert BASE.run_id == "a68b71721bce"


def test_every_field_is_part_of_the_name():
    others = {
        "profile": "cpu",
        "dataset": "cifar100",
        "model": "resnet20",
        "base_optimizer": "adamw",
        "augmentation": "crop-flip",
        "precision": "bfloat16",
        "cutout": 8,
        "image_size": 64,
        "ema": 0.9,
        "channels_last": False,
        "fused": True,
        "compile": True,
        "tf32": True,
        "deterministic": True,
        "device": "cuda",
        "nesterov": True,
        "label_smoothing": 0.1,
        "label_noise": 0.1,
        "train_examples": 64,
        "test_examples": 64,
        "clip_norm": 1.0,
        "warmup_epochs": 0.5,
        "schedule": "linear",
        "decay": "matrices",
        "dropout": 0.1,
        "attention": "sdpa",
    }
    (measured,) = curvature_of([BASE], examples=16, rho=0.1)
    theory = replace(BASE, kind="theory", dataset="interpolation", model="regression", base_optimizer="sgd")
    assert len({BASE.run_id, measured.run_id, theory.run_id}) == 3
    assert replace(theory, normalised=False).run_id != theory.run_id
    timed = replace(BASE, kind="cost", rho=0.1, micro_batches=2)
    assert replace(timed, workers=2).run_id != timed.run_id
    for field in dataclasses.fields(Spec):
        if field.name in ("kind", "normalised", "workers"):
            continue
        value = others[field.name] if field.name in others else getattr(BASE, field.name) + 1
        base = TEXT if field.name in ("dropout", "attention", "max_length") else BASE
        base = replace(base, micro_batches=2) if field.name == "ranks" else base
        base = replace(BASE, device="cuda") if field.name in ("tf32", "deterministic") else base
        base = replace(BASE, model="hf-hub:timm/a") if field.name == "image_size" else base
        base = measured if field.name in ("measured_examples", "measured_rho") else base
        changed = replace(base, **{field.name: value})
        assert changed.run_id != base.run_id, field.name


def test_an_int_may_stand_for_a_float_without_changing_the_name():
    assert replace(BASE, rho=1).run_id == replace(BASE, rho=1.0).run_id


def test_a_field_at_its_default_is_not_in_the_name():
    assert replace(BASE, label_smoothing=0.0).run_id == BASE.run_id


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ranks", 0),
        ("ranks", 2),  # of m = 1: SAM
        ("micro_batches", 0),
        ("micro_batches", -4),
        ("micro_batches", 33),
        ("micro_batches", 2.0),
        ("micro_batches", True),
        ("rho", -0.1),
        ("rho", float("nan")),
        ("rho", float("inf")),
        ("rho", "0.1"),
        ("learning_rate", 0.0),
        ("epochs", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("profile", "gpu"),
        ("model", "resnet9"),
        ("dataset", "mnist"),
        ("train_examples", 16),
        ("train_examples", 50_001),
        ("holdout_examples", 49_999),
        ("test_examples", 10_001),
        ("warmup_epochs", 2.0),
        ("label_smoothing", 1.0),
        ("label_noise", 1.0),
        ("ema", 1.0),
        ("cutout", 33),
        ("image_size", 64),  # of a model that is no pretrained one
        ("tf32", True),  # on a CPU
        ("deterministic", True),
        ("schedule", "steps"),
        ("nesterov", 1),
        ("threads", 0),
    ],
)
def test_refuses_by_field_and_value(field, value):
    with pytest.raises(SpecError) as error:
        replace(BASE, **{field: value})
    message = str(error.value)
    assert "must be" in message
    assert field in message or field.endswith("_examples")


def test_refuses_unknown_and_missing_fields():
    with pytest.raises(SpecError, match="Unknown field 'rhoo'"):
        Spec.from_dict({**BASE.to_dict(), "rhoo": 1})
    fields = BASE.to_dict()
    del fields["model"]
    with pytest.raises(SpecError, match="lacks the field 'model'"):
        Spec.from_dict(fields)


def test_the_four_methods():
    cells = four_methods(BASE, micro_batches=4, sam_rho=0.1, msam_rho=0.2)
    assert tuple(cell.method for cell in cells) == METHODS
    assert [(c.rho, c.micro_batches) for c in cells] == [(0, 1), (0, 4), (0.1, 1), (0.2, 4)]


def test_a_grid_treats_the_methods_alike():
    grid = tuning_grid(BASE, micro_batches=[4], learning_rates=(0.1, 0.2), rhos=(0.1, 0.2))
    assert [cell.rho for cell in grid if cell.method == "sam"] == [0.1, 0.2]
    assert [cell.rho for cell in grid if cell.method == "msam"] == [0.1, 0.2]
    assert [cell.learning_rate for cell in grid if cell.method == "base"] == [0.1, 0.2]


def test_seeds_go_round_the_cells_and_nothing_is_run_twice():
    cells = [BASE, replace(BASE, rho=0.1), BASE]
    assert with_seeds(cells, 2) == [
        BASE,
        replace(BASE, rho=0.1),
        replace(BASE, seed=1),
        replace(BASE, rho=0.1, seed=1),
    ]


def test_a_row_of_runs_csv_is_the_spec_again():
    (measured,) = curvature_of([replace(BASE, nesterov=True, clip_norm=0.5)], examples=16, rho=0.1)
    for spec in (BASE, TEXT, measured, replace(BASE, train_examples=64)):
        row = {name: "" if value is None else str(value) for name, value in spec.to_dict().items()}
        assert Spec.from_text({**row, "test_accuracy": "0.5", "method": spec.method}) == spec
    with pytest.raises(ValueError, match="many"):
        Spec.from_text({**row, "epochs": "many"})
