"""The check of cells at full size: which cells are distinct, what is estimated, and what is detected."""

from dataclasses import replace

import pytest
import torch

from experiments import bert_glue, resnet_cifar, roberta_glue, vit_cifar, wrn_cifar
from experiments.harness.machine import proof
from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import disk_bytes, gpu_hours, load_estimate
from experiments.harness.runs.facts import MODELS, ImageSet, Model, is_images
from experiments.harness.runs.grids import curvature_of
from experiments.harness.runs.record import Record, duration
from experiments.harness.runs.spec import SpecError
from experiments.harness.tasks.image_models import build
from tests.commands import command


def test_cells_are_distinct_if_a_check_can_see_the_difference():
    base = resnet_cifar.PAPER
    same = [
        replace(base, seed=1),
        replace(base, learning_rate=0.2),
        replace(base, epochs=100),
        replace(base, batch_size=64),
    ]
    assert len(proof.distinct([base, *same])) == 1
    others = [
        replace(base, rho=0.1),
        replace(base, micro_batches=8),
        replace(base, micro_batches=8, rho=0.1),
        replace(base, dataset="cifar100"),
        replace(base, label_smoothing=0.0),
        replace(base, precision="float32" if base.precision == "bfloat16" else "bfloat16"),
        replace(base, ema=0.999),
        wrn_cifar.PAPER,
        *curvature_of([base], examples=64, rho=0.05),
    ]
    assert len(proof.distinct([base, *others])) == 1 + len(others)
    texts = [replace(bert_glue.PAPER, dataset=name) for name in ("cola", "rte", "qqp")]
    assert len(proof.distinct(texts)) == 1, "two labels each"
    assert len(proof.distinct([*texts, replace(texts[0], dataset="mnli"), replace(texts[0], dataset="stsb")])) == 3


def test_the_tables_of_the_paper_profile_have_cells_of_every_model_and_method():
    cells = [cell.spec for t in ("table1", "table2") for cell in proof.distinct(catalogue.runs(t, "paper", 1))]
    published = {name for name, model in MODELS.items() if model.parameters} - {"resnet18"}  # of the gpu profile
    arms = {"base", "control", "sam", "shared", "msam", "asam", "masam"}  # twice the epochs count as a base
    without_batchnorm = {"vit-small", "bert-base-uncased", "roberta-base"}  # where SAM on micro-batches is SAM
    expected = {(m, k) for m in published for k in arms - ({"shared"} if m in without_batchnorm else set())}
    assert {(s.model, s.method) for s in cells} == expected


@pytest.mark.parametrize(
    "spec",
    [resnet_cifar.PAPER, wrn_cifar.PAPER, vit_cifar.PAPER, bert_glue.PAPER, roberta_glue.PAPER],
    ids=lambda s: s.model,
)
def test_flops_and_parameters_match_the_published_ones(spec):
    """A backward pass has twice the multiply-adds of a forward pass, except for the first layer's inputs."""
    published = {  # G multiply-adds, by hand: from the convolutions' sizes; for encoders, 85 M per token and attention
        "resnet50": 1.3,
        "wrn-28-10": 5.25,
        "vit-small": 0.42,
        "bert-base-uncased": 11.2,
        "roberta-base": 11.2,
    }[spec.model]
    flops, saved = proof.costs(spec)
    assert flops == pytest.approx(3 * 2e9 * published, rel=0.04)
    assert saved / 4 == pytest.approx(activations(spec), rel=0.25)
    expected, _ = proof.published(spec)
    with torch.device("meta"):
        model = build(spec.model, 10) if is_images(spec.dataset) else proof.encoder(spec)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count - expected) < 0.005 * expected
    assert count == pytest.approx(MODELS[spec.model].parameters, rel=0.01)


def activations(spec):
    """Saved activations per example, by hand: what each layer saves, times its size, over all layers."""
    if spec.model == "resnet50":  # per block: inputs of 3 convolutions and 3 norms, 3 outputs of in-place ReLUs
        sizes = [(256, 64, 32, 3), (512, 128, 16, 4), (1024, 256, 8, 6), (2048, 512, 4, 3)]
        return sum(blocks * side**2 * (5 * narrow + 3 * wide) for wide, narrow, side, blocks in sizes)
    if spec.model == "wrn-28-10":  # per block: inputs of 2 norms, 2 ReLUs (whose outputs are the convolutions' inputs)
        return sum(4 * 4 * side**2 * width for width, side in ((160, 32), (320, 16), (640, 8)))
    width, inner, heads, layers, tokens = {
        "vit-small": (384, 384, 12, 7, 64),
        "bert-base-uncased": (768, 3072, 12, 12, 128),
        "roberta-base": (768, 3072, 12, 12, 128),
    }[spec.model]
    # Eager attention saves three maps: before and after the softmax, and after dropout.
    attention = 0 if spec.model == "vit-small" else 3 * heads * tokens**2
    return layers * (tokens * (9 * width + 2 * inner) + attention)


@pytest.mark.rare
def test_the_command_passes_the_smoke_cells():
    done = command("experiments", "check", "table1", "--profile", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(proof.distinct(catalogue.runs("table1", "smoke", 1)))
    assert f"{count} of {count} passed" in done.stdout
    assert "not measured" in done.stdout


def test_faults_are_detected(monkeypatch):
    (cell,) = proof.distinct([replace(resnet_cifar.SMOKE, model="wrn-10-1")])
    assert proof.check_cell(cell, "a100").failure is None
    monkeypatch.setitem(MODELS, "wrn-10-1", Model(ImageSet, 1e6, "somebody"))
    assert "published count is 1000000 (somebody)" in proof.check_cell(cell, "a100").failure
    monkeypatch.undo()
    monkeypatch.setattr(Record, "read_checkpoint", lambda self, path: None)
    assert "did not resume from its checkpoint" in proof.check_cell(cell, "a100").failure
    monkeypatch.setattr(Record, "write_checkpoint", lambda self, content: None)
    assert "did not stop at its checkpoint" in proof.check_cell(cell, "a100").failure
    with pytest.raises(SpecError, match="a100, h100"):
        list(proof.check_cells([cell], 1, "abacus"))


def test_estimates_grow_with_the_run():
    (small,) = proof.distinct([resnet_cifar.SMOKE])
    (large,) = proof.distinct([replace(resnet_cifar.SMOKE, rho=0.1, epochs=8, batch_size=64)])
    one, other = (proof.check_cell(cell, "a100") for cell in (small, large))
    assert other.step_flops == pytest.approx(4 * one.step_flops), "twice the examples, twice each"
    assert other.run_seconds[0] == pytest.approx(4 * one.run_seconds[0]), "twice the epochs, twice each example"
    assert one.run_seconds[0] < one.run_seconds[1]
    assert one.gpu_memory[0] < one.gpu_memory[1] < other.gpu_memory[1]


def test_the_plan_of_gpu_nights(tmp_path):
    arguments = ["plan", "table1", "--profile", "paper", "--jobs", "3", "--results", str(tmp_path)]
    done = command("experiments", *arguments)
    specs = catalogue.runs("table1", "paper")
    hours = sum(gpu_hours(spec, load_estimate(tmp_path)) for spec in specs)
    assert f"table1                {len(specs):>5} runs {duration(3600 * hours):>8}" in done.stdout
    assert f"{-(-hours // 36):.0f} on 3," in done.stdout
    assert f"Disk: {sum(disk_bytes(spec)[0] for spec in specs) / 1e9:.0f} GB" in done.stdout
    assert "guessed" in done.stdout
