"""Table 4: made-up cost runs against values computed by hand."""

from dataclasses import replace

import pytest

from analysis.exhibit import Target
from analysis.exhibits import table4
from analysis.frames import Results
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import timed_steps, with_seeds
from tests.analysis.invented import cost_run, document, pictures, results_of

CELLS = catalogue.cells("cost", "smoke")
RESNET = CELLS[0]


def results(shift=0.0):
    return results_of(CELLS, 2, cost_run, shift)


def test_each_step_has_a_row_with_its_ratios():
    numbers = table4.numbers(results().runs, [RESNET], 2)
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
    frame = Results.of([cost_run(spec) for spec in with_seeds([*CELLS, larger], 2)]).runs
    claims = document("table4", frame, [*CELLS, larger], 2).claims
    assert "resnet8, batch 32: SAM takes 2.05 ± 0.64 (2) times as long as SGD; mSAM over SAM: m=2 1.11" in claims[0]
    assert claims[4].startswith(
        "resnet8: a step of SAM or mSAM takes 2.00 ms for each micro-batch and 0.500 ms for each"
    )
    assert "R2 1.000" in claims[4]
    assert "vit-micro: a step of SAM or mSAM takes 8.00 ms for each micro-batch and 64.0 ms in addition" in claims[5]
    assert "to the power of 0.60 (R2 1.00)" in claims[-1], "log10(4)"


def test_nothing_has_run():
    shown = document("table4", Results.of([]).runs, CELLS, 2)
    assert set(shown.cells["over base"]) == {"not run"}
    assert shown.claims == ()


@pytest.mark.usefixtures("sketches")
def test_different_times_give_different_pictures():
    t = Target("table4", tuple(CELLS), 2)
    assert pictures(results(), t)["figures/cost.png"] != pictures(results(shift=1.0), t)["figures/cost.png"]


def test_a_missing_repetition_is_reported():
    runs = [cost_run(spec) for spec in with_seeds([RESNET], 2)]
    shown = document("table4", Results.of(runs[:1]).runs, [RESNET], 2)
    assert shown.cells["over base"].iloc[0] == "1.00 (1) [1]"
    assert "1 of 2 runs missing (seed 1)" in shown.notes[0]
