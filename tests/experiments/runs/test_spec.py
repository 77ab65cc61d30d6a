"""Specs: what is rejected, how run ids are formed, and JSON round trips."""

import dataclasses
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.harness.runs.facts import models_of
from experiments.harness.runs.grids import GRID_SEED, all_arms, curvature_of, grid_of_arms, timing_of, with_seeds
from experiments.harness.runs.methods import arms_of
from experiments.harness.runs.spec import Curvature, SpecError, Stability, Timing, from_dict, from_text
from tests.specs import BASE

KINDS = [
    BASE,
    *curvature_of([BASE], examples=16, rho=0.1),
    timing_of(BASE, rho=0.1, micro_batches=4, rounds=3, workers=2),
    Stability(
        profile="smoke",
        dataset="interpolation",
        model="regression",
        base_optimizer="sgd",
        learning_rate=0.1,
        epochs=8,
        batch_size=32,
        train_examples=32,
    ),
]
TEXT = replace(BASE, dataset="sst2", model="minilm", base_optimizer="adamw")


@given(
    rho=st.floats(0, 10),
    micro_batches=st.integers(1, 32),
    seed=st.integers(0, 1000),
    holdout=st.integers(0, 5000),
    clip=st.none() | st.floats(0.1, 10),
    model=st.sampled_from(models_of("cifar10")),
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
    again = from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.run_id == spec.run_id


def test_run_ids_do_not_change():
    """Finished runs are found by their ids: a change would orphan all of them."""
    assert BASE.run_id == "a68b71721bce"


def test_every_field_changes_the_run_id():
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
        "start_weights": "start.safetensors@0123456789ab",
        "warmup_epochs": 0.5,
        "schedule": "linear",
        "decay": "matrices",
        "dropout": 0.1,
        "attention": "sdpa",
        "weight_decay": 0.1,
        "workers": 1,
        "padding": "max_length",
        "passes": "vectorized",
    }
    assert len({run.run_id for run in KINDS}) == len(KINDS)
    tried = set()
    for run in KINDS:
        for field in dataclasses.fields(run):
            value = others[field.name] if field.name in others else not_the_same(getattr(run, field.name))
            base = replace(run, **needed(run, field.name))
            try:
                changed = replace(base, **{field.name: value})
            except SpecError:
                continue  # this kind allows only one value
            assert changed.run_id != base.run_id, field.name
            tried.add(field.name)
    assert tried == {field.name for run in KINDS for field in dataclasses.fields(run)}


def not_the_same(value):
    return not value if isinstance(value, bool) else value + 1


def needed(run, name):
    """The other changes that a field needs before it can vary."""
    if name in ("dropout", "attention", "max_length"):
        return {"dataset": "sst2", "model": "minilm"}
    if name == "padding":
        return {"dataset": "sst2", "model": "minilm"}
    if name in ("tf32", "deterministic", "capture"):
        return {"device": "cuda"} | ({"workers": 1} if isinstance(run, Timing) else {})
    changes = {"ranks": {"micro_batches": 2}, "image_size": {"model": "hf-hub:timm/a"}, "adaptive": {"rho": 0.1}}
    return (changes | {"shared": {"rho": 0.1, "micro_batches": 2}}).get(name, {})


@pytest.mark.parametrize("run", KINDS, ids=lambda run: run.kind)
def test_records_of_a_run_keep_its_kind(run):
    fields = json.loads(json.dumps(run.to_dict()))
    assert from_dict(fields) == run
    assert type(from_dict(fields)) is type(run)
    assert set(fields) == set(BASE.to_dict()), "the same flat form for every kind"
    assert not isinstance(run, Timing) or fields["epochs"] == run.rounds


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measured_examples": 16}, "measured_examples is 16, but must be 0, or left out, in a Training run"),
        ({"workers": 2}, "workers is 2, but must be 1, or left out, in a Training run"),
        ({"normalised": False}, "normalised is False, but must be True, or left out, in a Training run"),
        ({"kind": "guess"}, "kind is 'guess', but must be one of train, curvature, cost, theory"),
    ],
)
def test_records_reject_the_fields_of_other_kinds(changes, words):
    with pytest.raises(SpecError, match=words):
        from_dict(BASE.to_dict() | changes)


def test_a_curvature_run_knows_its_training_run():
    (measured,) = curvature_of([BASE], examples=16, rho=0.1)
    assert isinstance(measured, Curvature)
    assert measured.network == BASE
    assert BASE.network is None
    with pytest.raises(SpecError, match="interpolation for a stability run"):
        replace(KINDS[-1], dataset="cifar10")
    with pytest.raises(SpecError, match="a set of images or texts"):
        replace(BASE, dataset="interpolation", model="regression")


def test_a_model_may_be_any_callable_or_folder():
    for model in ("torchvision.models:shufflenet_v2_x0_5", "/models/mine"):
        assert replace(BASE, model=model).model == model
    with pytest.raises(SpecError, match=r"model is 'resnet9', but must be one of linear, .* or module:callable"):
        replace(BASE, model="resnet9")
    with pytest.raises(SpecError, match="model is 'a:b c'"):
        replace(BASE, model="a:b c")


def test_an_int_for_a_float_field_does_not_change_the_run_id():
    assert replace(BASE, rho=1).run_id == replace(BASE, rho=1.0).run_id


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
        ("profile", "tpu"),
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
        ("image_size", 64),  # for a model that is not pretrained
        ("tf32", True),  # on a CPU
        ("deterministic", True),
        ("schedule", "steps"),
        ("nesterov", 1),
        ("threads", 0),
    ],
)
def test_a_rejected_value_is_named_with_its_field(field, value):
    with pytest.raises(SpecError) as error:
        replace(BASE, **{field: value})
    message = str(error.value)
    assert "must be" in message
    assert field in message or field.endswith("_examples")


def test_unknown_and_missing_fields_are_rejected():
    with pytest.raises(SpecError, match="Unknown field 'rhoo'"):
        from_dict({**BASE.to_dict(), "rhoo": 1})
    fields = BASE.to_dict()
    del fields["model"]
    with pytest.raises(SpecError, match="lacks the field 'model'"):
        from_dict(fields)


def test_a_block_has_each_arm_once():
    rhos = {"sam": 0.1, "shared": 0.1, "msam": 0.2, "asam": 0.5, "masam": 1.0}
    cells = all_arms(BASE, micro_batches=4, rhos=rhos)
    arms = arms_of(cells)
    assert [arms[cell].name for cell in cells] == ["base", "twice", "control", *rhos]
    assert {arms[cell].name: cell.rho for cell in cells if cell.rho} == rhos
    assert [cell.micro_batches for cell in cells] == [1, 1, 4, 1, 4, 4, 1, 4]
    assert [cell.epochs for cell in cells] == [BASE.epochs, 2 * BASE.epochs] + [BASE.epochs] * 6


def test_a_grid_tries_the_same_values_for_every_arm_at_seeds_that_no_table_reports():
    rhos = dict.fromkeys(("sam", "shared", "msam"), (0.1, 0.2))
    grid = grid_of_arms(BASE, micro_batches=4, learning_rates=(0.1, 0.2), rhos=rhos, pairs=2, holdout_examples=50)
    for arm in rhos:
        assert [cell.rho for cell in grid if cell.method == arm] == [0.1, 0.2]
    runs = with_seeds(grid, 2)
    assert {(r.learning_rate, r.seed) for r in runs if r.method == "base"} == {
        (rate, seed) for rate in (0.1, 0.2) for seed in range(GRID_SEED, GRID_SEED + 4)
    }
    assert {r.seed for r in runs if r.rho} == {GRID_SEED, GRID_SEED + 1}
    assert {r.holdout_examples for r in runs} == {50}


def test_seeds_repeat_the_cells_and_duplicates_are_dropped():
    cells = [BASE, replace(BASE, rho=0.1), BASE]
    assert with_seeds(cells, 2) == [
        BASE,
        replace(BASE, rho=0.1),
        replace(BASE, seed=1),
        replace(BASE, rho=0.1, seed=1),
    ]


def test_a_row_of_runs_csv_gives_the_spec_back():
    (measured,) = curvature_of([replace(BASE, nesterov=True, clip_norm=0.5)], examples=16, rho=0.1)
    for spec in (BASE, TEXT, measured, replace(BASE, train_examples=64)):
        row = {name: "" if value is None else str(value) for name, value in spec.to_dict().items()}
        assert from_text({**row, "test_accuracy": "0.5", "method": spec.method}) == spec
    with pytest.raises(ValueError, match="many"):
        from_text({**row, "epochs": "many"})
