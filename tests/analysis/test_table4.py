"""Table 4: from made-up cost runs, by hand."""

from dataclasses import replace

import pytest

from analysis.collect import Run
from analysis.exhibits.studies import pages
from analysis.exhibits.table4 import cost_claims, table_4
from analysis.frames import Results
from analysis.publish import publish, redraw, target
from experiments.harness import catalogue
from experiments.harness.spec import timed_steps, with_seeds

SESSION = {"commit": "a" * 40, "dirty": False, "code": "c" * 16, "cpu": "a processor"}
CELLS = catalogue.cells("cost", "smoke")
PARAMETERS = {"resnet8": 100, "vit-micro": 1000, "wrn-10-1": 10_000}
RESNET = CELLS[0]


def made_up(spec, shift=0.0):
    """A perturbed step takes 2 ms for each micro-batch and 0.5 for each example, four times as much for ten times the
    parameters; a plain one half of that, and two workers half the time."""
    size = 4.0 ** (len(str(PARAMETERS[spec.model])) - 3)
    summary = {"parameters": PARAMETERS[spec.model], "wall_seconds": 9.0}
    for workers in (1, 2):
        for step in timed_steps(spec, workers):
            whole = (1 + (step.rho > 0)) / 2 / workers
            seconds = whole * size * (0.002 * step.micro_batches + 0.0005 * spec.batch_size)
            base = size * (0.002 + 0.0005 * spec.batch_size) / 2 / workers
            found = {"seconds": seconds, "ratio": seconds / base + spec.seed / 10 + shift, "reduced_bytes": 4e6}
            sam = size * (0.002 + 0.0005 * spec.batch_size) / workers
            found["over_sam"] = seconds / sam + spec.seed / 1000
            found |= {"examples_per_second": spec.batch_size / seconds, "memory_bytes": 1e6 / step.micro_batches}
            summary |= {f"{step.method}_m{step.micro_batches}_w{workers}_{key}": v for key, v in found.items()}
    return Run(spec, summary, [], [SESSION])


def results(seeds=2, shift=0.0):
    return Results.of([made_up(spec, shift) for spec in with_seeds(CELLS, seeds)])


def test_each_step_has_a_row_with_its_ratios():
    numbers = table_4(results().runs, [RESNET], 2)
    rows = {(row.method, row.micro_batches, row.workers): row for row in numbers.itertuples()}
    assert list(rows) == [(s.method, s.micro_batches, w) for w in (1, 2) for s in timed_steps(RESNET, w)]
    msam = rows["msam", 4, 1]
    assert msam.seconds == pytest.approx(0.024)
    assert msam.mean == pytest.approx(0.024 / 0.009 + 0.05, rel=1e-5)
    assert msam.half_width == pytest.approx(12.706205 * 0.05, rel=1e-5)
    assert msam.over_sam == pytest.approx(24 / 18 + 0.0005, rel=1e-5)
    assert msam.memory_bytes == 250_000
    assert rows["msam", 4, 2].over_sam == pytest.approx(24 / 18 + 0.0005, rel=1e-5), "SAM's on two workers"
    assert (msam.n, msam.over_sam_n) == (2, 2)


def test_scaling_is_fitted():
    larger = replace(RESNET, batch_size=64)
    frame = Results.of([made_up(spec) for spec in with_seeds([*CELLS, larger], 2)]).runs
    claims = cost_claims(table_4(frame, [*CELLS, larger], 2))
    assert "resnet8, batch 32: SAM takes 2.05 ± 0.64 (2) times as long as SGD; mSAM over SAM: m=2 1.11" in claims[0]
    assert claims[4].startswith(
        "resnet8: a step of SAM or mSAM takes 2.00 ms for each micro-batch and 0.500 ms for each"
    )
    assert "R2 1.000" in claims[4]
    assert "vit-micro: a step of SAM or mSAM takes 8.00 ms for each micro-batch and 64.0 ms besides" in claims[5]
    assert "to the power of 0.60 (R2 1.00)" in claims[-1], "log10(4)"


def test_nothing_has_run():
    document = target("table4", "smoke").document(Results.of([]).runs)
    assert set(document.cells["over base"]) == {"not run"}
    assert document.claims == ()


def test_published_and_drawn_again_to_the_byte(tmp_path):
    folder = tmp_path / "smoke"
    publish(folder, "smoke", [target("table4", "smoke")], results())
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert {path.name for path in before} >= {"table4.md", "cost.pdf", "cost.png"}
    for path in folder.glob("*/*.*"):
        path.unlink()
    redraw(folder, "smoke")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    other = pages(results(shift=1.0), {"table4": (CELLS, 2)})
    assert other["figures/cost.png"] != before[folder / "figures" / "cost.png"]


def test_a_missing_repetition_is_told():
    runs = [made_up(spec) for spec in with_seeds([RESNET], 2)]
    document = replace(target("table4", "smoke"), cells=(RESNET,)).document(Results.of(runs[:1]).runs)
    assert document.cells["over base"].iloc[0] == "1.00 (1) [1]"
    assert "1 of 2 runs missing (seed 1)" in document.notes[0]
