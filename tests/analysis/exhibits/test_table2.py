"""Table 2 of invented runs: every cell against a value computed by hand."""

from dataclasses import replace

import pytest

from analysis.__main__ import Arguments, run
from analysis.collect import collect
from analysis.columns import csv_text, parse
from analysis.exhibit import Target
from analysis.exhibits.table2 import EXHIBIT, WideDocument, wide
from analysis.frames import Results
from experiments.harness.runs import catalogue
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import Training
from tests.analysis.invented import document
from tests.fixtures.make_runs import SESSION, write_run
from tests.specs import four_arms

SST2 = Training(
    profile="smoke",
    dataset="sst2",
    model="minilm",
    base_optimizer="adamw",
    learning_rate=1e-4,
    epochs=1,
    batch_size=16,
    train_examples=64,
)
COLA = replace(SST2, dataset="cola")
CELLS = [
    *four_arms(SST2, sam_rho=0.01, msam_rho=0.02),
    *four_arms(COLA, sam_rho=0.001, msam_rho=0.01),
]
SCORES = {  # by seed; on CoLA, SAM has one run and mSAM none
    CELLS[0]: (0.80, 0.82),
    CELLS[1]: (0.80, 0.80),
    CELLS[2]: (0.81, 0.85),
    CELLS[3]: (0.85, 0.85),
    CELLS[4]: (0.10, 0.20),
    CELLS[5]: (0.20, 0.20),
    CELLS[6]: (0.30,),
}
MAJORITY = {"sst2": 0.51, "cola": 0.0}


@pytest.fixture
def root(tmp_path):
    for cell, of_seeds in SCORES.items():
        for seed, score in enumerate(of_seeds):
            record = record_of(replace(cell, seed=seed), tmp_path)
            record.create(replace(cell, seed=seed))
            record.add_environment(SESSION)
            record.finish(
                {"test_score": score, "test_majority": MAJORITY[cell.dataset], "test_loss": 0.5, "wall_seconds": 3.0}
            )
    return tmp_path


@pytest.fixture
def shown(root) -> WideDocument:
    return document("table2", Results.of(collect(root).finished).runs, CELLS, 2)


# For two values that differ by d the half-width is t(0.975, 1) * d / 2 = 6.3531 d.
GOLDEN = {
    "majority class": ["51.00", "0.00"],
    "AdamW": ["81.00 ± 12.71 (2)", "15.00 ± 63.53 (2)"],
    "AdamW, m=4 micro-batches": ["80.00 ± 0.00 (2)", "20.00 ± 0.00 (2)"],
    "SAM": ["83.00 ± 25.41 (2)", "30.00 (1) [1]"],
    "mSAM, m=4": ["85.00 ± 0.00 (2)", "not run"],
    "AdamW, m=4 micro-batches over AdamW": ["-1.00 ± 12.71 (2)", "+5.00 ± 63.53 (2)"],
    "SAM over AdamW": ["+2.00 ± 12.71 (2)", "+20.00 (1)"],
    "mSAM, m=4 over AdamW": ["+4.00 ± 12.71 (2)", ""],
    "mSAM, m=4 over SAM": ["+2.00 ± 25.41 (2)", ""],
}


def test_golden_cells(shown):
    assert list(shown.cells.columns) == ["model", "method", "sst2", "cola"]
    assert {row.method: [row.sst2, row.cola] for row in shown.cells.itertuples()} == GOLDEN
    assert list(shown.cells["method"]) == list(GOLDEN)


def test_rhos_metrics_and_missing_runs_are_reported(shown):
    text = shown.markdown()
    assert "minilm, SAM: rho 0.01 on sst2, 0.001 on cola." in text
    assert "sst2 accuracy, cola Matthews correlation" in text
    assert "1 of 2 runs missing (seed 1)" in text
    assert "minilm, sst2: AdamW over the majority class: +30.00 ± 12.71 (n=2): significant" in text
    assert "minilm, cola: AdamW over the majority class: +15.00 ± 63.53 (n=2): inconclusive" in text
    control = "minilm, sst2: AdamW, m=4 micro-batches over AdamW: -1.00 ± 12.71 (n=2): inconclusive; "
    assert f"{control}SAM over AdamW: +2.00 ± 12.71 (n=2): inconclusive" in text
    assert all(form in shown.files() for form in ("table2.md", "table2.csv", "table2.tex"))


def test_a_second_official_metric_is_reported(root):
    mrpc = replace(SST2, dataset="mrpc")
    for seed, f1 in enumerate((0.80, 0.84)):
        record = record_of(replace(mrpc, seed=seed), root)
        record.create(replace(mrpc, seed=seed))
        record.add_environment(SESSION)
        record.finish({"test_score": 0.7, "test_f1": f1, "wall_seconds": 3.0})
    shown = document("table2", Results.of(collect(root).finished).runs, [*CELLS, mrpc], 2)
    assert "minilm, mrpc, F1: AdamW 82.00 ± 25.41 (2)." in shown.claims
    assert not any("sst2, F1" in line for line in shown.claims)


INT8 = {CELLS[0]: (0.78, 0.79), CELLS[2]: (0.80, 0.81), CELLS[3]: (0.84, 0.83)}
"""Scores after quantisation on SST-2; the control has none."""


@pytest.fixture
def quantised(root) -> WideDocument:
    for cell, of_seeds in INT8.items():
        for seed, score in enumerate(of_seeds):
            record = record_of(replace(cell, seed=seed), root)
            record.finish({**record.summary(), "test_int8_score": score})
    return document("table2", Results.of(collect(root).finished).runs, CELLS, 2)


def test_scores_after_quantisation_have_rows_and_paired_differences(quantised):
    rows = {row.method: row.sst2 for row in quantised.cells.itertuples()}
    assert {method: text for method, text in rows.items() if "int8" in method} == {
        "AdamW, int8": "78.50 ± 6.35 (2)",
        "AdamW, m=4 micro-batches, int8": "not run",
        "SAM, int8": "80.50 ± 6.35 (2)",
        "mSAM, m=4, int8": "83.50 ± 6.35 (2)",
        "AdamW: int8 over float32": "-2.50 ± 6.35 (2)",
        "AdamW, m=4 micro-batches: int8 over float32": "",
        "SAM: int8 over float32": "-2.50 ± 19.06 (2)",
        "mSAM, m=4: int8 over float32": "-1.50 ± 6.35 (2)",
        "AdamW, m=4 micro-batches over AdamW, int8": "",
        "SAM over AdamW, int8": "+2.00 ± 0.00 (2)",
        "mSAM, m=4 over AdamW, int8": "+5.00 ± 12.71 (2)",
        "mSAM, m=4 over SAM, int8": "+3.00 ± 12.71 (2)",
    }
    assert any("after int8 quantisation: " in line and "SAM over AdamW: +2.00" in line for line in quantised.claims)
    assert any(note.startswith("Int8: the same networks") for note in quantised.notes)
    places = [row.method for row in quantised.cells.itertuples()]
    assert quantised.run_ids()[places.index("SAM, int8")]["sst2"].split() == [
        replace(CELLS[2], seed=seed).run_id for seed in range(2)
    ]


def test_scores_after_quantisation_have_the_margin_of_the_others(root):
    for cell, of_seeds in {CELLS[2]: (0.80, 0.81, 0.82, 0.83), CELLS[3]: (0.801, 0.81, 0.821, 0.829)}.items():
        for seed, score in enumerate(of_seeds):
            record = record_of(replace(cell, seed=seed), root)
            if not record.folder.exists():
                record.create(replace(cell, seed=seed))
                record.add_environment(SESSION)
            record.finish({"test_score": 0.8, "wall_seconds": 3.0, "test_int8_score": score})
    shown = document("table2", Results.of(collect(root).finished).runs, CELLS, 4)
    (line,) = [line for line in shown.claims if "after int8 quantisation: " in line]
    assert "mSAM, m=4 over SAM: +0.03 ± 0.15 (n=4): equivalent" in line


def test_claims_on_quantised_scores_compare_that_column_in_points(quantised, root):
    runs = Results.of(collect(root).finished).runs.set_index("run_id")
    target = Target("table2", tuple(CELLS), 2)
    claims = {claim.contrast.name: claim for claim in EXHIBIT.claims}
    sst2, cola = claims["int8-msam-over-base"].evidence(target, runs, {"table2": target})
    assert (sst2.difference.mean, sst2.difference.n, sst2.family) == (pytest.approx(5.0), 2, "int8")
    assert cola.difference.n == 0
    assert EXHIBIT.claims[0].contrast.column == ""


def test_the_committed_table_follows_ours(shown):
    text = shown.terminal(shown.numbers)
    assert text.count("\nminilm   majority class  ") == 2
    assert text.index("Committed") > text.index("mSAM, m=4 over SAM")


def test_the_csv_reproduces_the_table(shown, tmp_path):
    again = wide(parse(csv_text(shown.numbers)))
    expected = shown.cells.replace({r" \[1\]": ""}, regex=True)
    assert again.to_dict("list") == expected.to_dict("list")


def test_tables_with_runs_are_shown_without_being_named(root, sketches):
    """Table 1 is always shown; Table 2 is not, because the runs are not cells of the project's Table 2."""
    write_run(root, catalogue.runs("table1", "smoke")[0], 0.5)
    shown = run(Arguments(profile="smoke", results=root))
    assert "Table 1" in shown
    assert "Table 2: " not in shown
