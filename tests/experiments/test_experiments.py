"""The experiments' lists of runs are complete and valid, and use the hyper-parameters that the grids chose."""

import csv
import importlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

import msam
from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import guessed_seconds
from experiments.harness.runs.methods import arm_of, arms_of
from experiments.harness.runs.spec import PROFILES
from experiments.harness.tasks.image_models import build

FAMILIES = ("resnet_cifar", "wrn_cifar", "vit_cifar")
COMMITTED = Path(__file__).parents[2] / "results" / "cpu" / "runs.csv"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("profile", PROFILES)
def test_each_family_runs_its_arms_in_every_profile(name, profile):
    arms = arms_of(catalogue.cells(name, profile))
    blocks = defaultdict(list)
    for cell, arm in arms.items():
        blocks[cell.dataset].append(arm.name)
    assert set(blocks) == ({"cifar10", "cifar100"} if profile == "paper" else {"cifar10"})
    # Without BatchNorm, SAM on micro-batches is SAM.
    expected = ["base", "twice", "control", "sam", *(["shared"] * (name != "vit_cifar")), "msam"]
    if profile in ("gpu", "paper"):
        expected += ["asam", "masam"]
    assert all(names == expected for names in blocks.values())


@pytest.mark.parametrize("profile", PROFILES)
def test_cells_are_of_their_profile_and_at_their_first_seed(profile):
    for name, experiment in catalogue.catalogue().items():
        runs, grid = experiment.runs.get(profile, ()), experiment.tuning.get(profile, ())
        assert {cell.profile for cell in (*runs, *grid)} <= {profile}
        assert {cell.seed for cell in runs} <= {16 if name == "placebo" else 0}
        assert all(cell.seed >= 100 for cell in grid)


def test_all_is_every_table_without_the_grids():
    tables = {e.table for e in catalogue.catalogue().values() if e.runs.get("cpu")}
    union = {spec for table in tables for spec in catalogue.runs(table, "cpu")}
    assert set(catalogue.runs("all", "cpu")) == union
    assert not any(spec.flat["holdout_examples"] for spec in union)


def test_docstrings_name_the_table_and_the_command():
    for name, experiment in catalogue.catalogue().items():
        text = importlib.import_module(f"experiments.{name}").__doc__
        assert f"python -m experiments run {name}" in text
        assert experiment.table.replace("table", "Table ") in text
        assert experiment.summary.endswith(".")


@pytest.mark.parametrize("profile", ["cpu", "gpu", "paper"])
def test_no_seed_that_chooses_is_reported_and_every_perturbed_arm_has_as_many_tries(profile):
    for table in ("table1", "table2"):
        grid = catalogue.runs(f"{table}-tuning", profile)
        reported = {spec.seed for spec in catalogue.runs(table, profile, catalogue.PUBLISHED)}
        assert reported.isdisjoint(spec.seed for spec in grid)
        tries = defaultdict(lambda: defaultdict(set))
        for cell in catalogue.cells(f"{table}-tuning", profile):
            if cell.rho:
                tries[cell.dataset, cell.model, cell.adaptive][arm_of(cell).name].add(cell.rho)
        for by_arm in tries.values():
            assert len(by_arm) > 1
            assert len(set(map(frozenset, by_arm.values()))) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_grids_are_scored_on_held_out_images_and_share_no_run_with_the_table(profile):
    assert all(spec.holdout_examples > 0 for spec in catalogue.cells("table1-tuning", profile))
    assert all(spec.holdout_examples == 0 for spec in catalogue.runs("table1", profile))


@pytest.mark.parametrize("name", [*FAMILIES, "linear_cifar", "bert_glue"])
def test_the_table_uses_what_the_committed_grid_chose(name):
    """Learning rate of the base, then rho of each perturbed arm: best mean held-out score, of equal ones the largest
    value, inside the grid."""
    scores = _held_out(f"{name}-tuning")
    cells = [
        cell for cell, arm in arms_of(catalogue.cells(name, "cpu")).items() if arm.name not in ("control", "twice")
    ]
    assert {_block(cell) for cell in cells} == {_block(cell) for cell in scores}
    rates = {_place(cell): cell.learning_rate for cell in cells if cell.method == "base"}
    for cell in cells:
        assert cell.learning_rate == rates[_place(cell)]
        field = "learning_rate" if cell.method == "base" else "rho"
        rivals = [c for c in scores if _block(c) == _block(cell)]
        best = max(rivals, key=lambda c: (round(scores[c], 9), getattr(c, field)))
        assert getattr(cell, field) == getattr(best, field), f"{cell.title}: the grid chose {best.title}"
        assert _inside(best, rivals, field), best.title


def test_each_m_tries_as_many_rhos_and_uses_the_committed_grids_choice():
    """Four at each m, the same for all arms there; at m = 1 and 8 with BatchNorm by Table 1's grid."""
    tried = defaultdict(dict)
    for cell, held_out in (_held_out("micro_batches-tuning") | _held_out("resnet_cifar-tuning")).items():
        if cell.rho:
            tried[cell.model, cell.micro_batches, cell.method][cell.rho] = round(held_out, 9)
    assert {len(scores) for scores in tried.values()} == {4}
    assert all(tried[m].keys() == tried[*m[:2], "msam"].keys() for m in tried if m[2] == "shared")
    used = {(c.model, c.micro_batches, c.method): c.rho for c in catalogue.cells("micro_batches", "cpu") if c.rho}
    assert used == {m: max(scores, key=lambda rho: (scores[rho], rho)) for m, scores in tried.items()}


def _held_out(grid):
    """Mean held-out score of each cell of a committed grid, over all its seeds."""
    runs = catalogue.runs(grid, "cpu")
    with open(COMMITTED, newline="") as file:
        scores = {row["run_id"]: float(row[runs[0].score] or "nan") for row in csv.DictReader(file)}
    by_cell = defaultdict(list)
    for spec in runs:
        by_cell[_cell(spec)].append(scores[spec.run_id])
    return {cell: fmean(held_out) for cell, held_out in by_cell.items()}


def _inside(best, rivals, field):
    values = sorted(getattr(c, field) for c in rivals)
    return values[0] < getattr(best, field) < values[-1]


def _cell(spec):
    return replace(spec, seed=0)


def _block(spec):
    return *_place(spec), spec.method


def _place(spec):
    return spec.dataset, spec.train_examples


@pytest.mark.parametrize("name", [*FAMILIES, "bert_glue"])
def test_all_perturbed_arms_search_the_same_rhos(name):
    tried = defaultdict(list)
    for cell in catalogue.cells(f"{name}-tuning", "cpu"):
        if cell.rho:
            tried[cell.dataset, cell.method].append(cell.rho)
    for dataset in {dataset for dataset, _ in tried}:
        assert len({tuple(rhos) for (where, _), rhos in tried.items() if where == dataset}) == 1


@pytest.mark.parametrize(("name", "rows"), [("table1", 19), ("table2", 26)])
def test_the_page_of_results_shows_the_committed_table(name, rows):
    page = (COMMITTED.parents[2] / "docs" / "results.md").read_text()
    table = (COMMITTED.parent / "tables" / f"{name}.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == rows + 2
    assert all(line in page for line in lines)


def test_the_gpu_profile_has_all_arms_on_all_of_cifar10_in_minutes():
    """By the guessed step times, which are those of one trial on an H200."""
    arms = {"base", "twice", "control", "sam", "shared", "msam", "asam", "masam"}
    for name, without in (("resnet_cifar", set()), ("wrn_cifar", set()), ("vit_cifar", {"shared"})):
        cells = catalogue.cells(name, "gpu")
        assert {arm.name for arm in arms_of(cells).values()} == arms - without
        assert all(cell.examples == 50_000 and cell.capture and cell.tf32 for cell in cells)
    resnet = [guessed_seconds(cell) for cell in catalogue.cells("resnet_cifar", "gpu")]
    assert max(resnet) < 9 * 60
    assert sum(resnet) + 20 * len(resnet) < 15 * 60, "with 20 s to start and score each run"


def test_a_grid_of_the_gpu_profile_trains_no_seed_that_is_reported_and_gives_arms_equal_tries():
    for table in ("table1", "table2"):
        grid, reported = catalogue.runs(f"{table}-tuning", "gpu"), catalogue.runs(table, "gpu")
        assert {run.seed for run in grid} == {100, 101}
        assert not {run.seed for run in grid} & {run.seed for run in reported}
        for network in {(run.dataset, run.model) for run in grid}:
            tries = Counter(run.method for run in grid if (run.dataset, run.model) == network and run.rho)
            for alike in (("sam", "shared", "msam"), ("asam", "masam")):
                assert len({tries[arm] for arm in alike if arm in tries}) == 1


def test_a_networks_without_batchnorm_needs_no_run_of_sam_over_micro_batches():
    """Its gradient is SAM's."""
    torch.manual_seed(0)
    model = build("vit-tiny", 10)
    batch = torch.randn(6, 3, 32, 32), torch.arange(6)

    def gradient(**options):
        model.zero_grad()
        msam.backward(lambda part: F.cross_entropy(model(part[0]), part[1]), batch, model, rho=0.05, **options)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    sam, shared = gradient(), gradient(micro_batches=3, shared=True)
    assert (sam - shared).norm() < 1e-4 * sam.norm()
    assert (sam - gradient(micro_batches=3)).norm() > 1e-2 * sam.norm()
