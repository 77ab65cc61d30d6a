"""The forest plots of the claims, as a figure and in the report, from made-up comparisons."""

from dataclasses import replace

import pytest

from analysis.claims import document_claims
from analysis.contrasts import ALL
from analysis.exhibit import Target
from analysis.forest import opening, panels
from analysis.forest_figure import draw, files
from analysis.publish import output_files
from analysis.scale import in_words, scales
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import perturbed
from tests.analysis.invented import any_run, results_of, study_run

BASE = next(c for c in catalogue.cells("resnet_cifar", "smoke") if c.method == "base")
CELLS = [BASE, replace(BASE, epochs=2 * BASE.epochs), replace(BASE, micro_batches=4)]
CELLS += [perturbed(BASE, arm, 4, 0.1) for arm in ("sam", "shared", "msam")]
TABLE1 = Target("table1", tuple(CELLS), 3)
SCALE = "64 images, 8 steps"


def spread(spec):
    """The gain of mSAM over shared SAM is 1 point, more or less by a tenth; plain training gains nothing."""
    return study_run(spec, 0.001 * (spec.seed - 1) * (spec.method == "msam"))


def claims_of(cells=CELLS, run=spread, name="table1"):
    results = results_of(cells, 3, run)
    numbers = document_claims("smoke", results, {name: Target(name, tuple(cells), 3)}).numbers
    return numbers, results.runs


def texts_at(axes):
    """The texts of the figure by line, from left to right."""
    lines = {}
    for text in sorted(axes.texts, key=lambda text: text.get_position()[0]):
        lines.setdefault(text.get_position()[1], []).append(text.get_text())
    return [lines[place] for place in sorted(lines)]


def test_the_figure_has_a_line_for_each_comparison_with_effect_interval_and_verdict():
    numbers, runs = claims_of()
    (axes,) = draw(numbers, runs, "smoke").axes
    drawn = {round(c.lines[0].get_ydata()[0]): c for c in axes.containers}
    assert len(drawn) == len(numbers)
    lines = texts_at(axes)
    rows = sorted(numbers.itertuples(), key=lambda row: not row.primary)
    for (place, container), row in zip(sorted(drawn.items()), rows, strict=True):
        assert container.lines[0].get_xdata() == pytest.approx([row.difference])
        (segment,) = container.lines[2][0].get_segments()
        ends = [row.difference - row.half_width, row.difference + row.half_width]
        assert segment[:, 0] == pytest.approx(ends)
        label, effect, verdict = lines[place + 1]
        assert effect == f"{row.difference:+.2f} ± {row.half_width:.2f} (3)"
        assert verdict.partition(",")[0] == row.verdict
        both = "twice the epochs" in row.what
        lengths = ("64 images, 16 or 8 steps", "64 images, 8 or 16 steps") if both else (SCALE,)
        assert any(f"({length})" in label for length in lengths)


def test_the_primary_comparison_is_first_and_marked_and_the_band_is_the_margin():
    numbers, runs = claims_of()
    (axes,) = draw(numbers, runs, "smoke").axes
    key, heading, isolates, first, *others = texts_at(axes)
    assert heading == ["mSAM over SAM on micro-batches"]
    assert "who shares a perturbation" in isolates[0]
    assert first[0] == f"★ primary: resnet8, cifar10 ({SCALE})"
    assert not any("★" in text for line in others for text in line)
    (band,) = axes.patches
    assert (band.get_x(), band.get_width()) == (-1.0, 2.0)
    assert any("±1" in text for text in key)
    verdicts = {row.claim: row.verdict for row in numbers.itertuples()}
    assert first[2].startswith(verdicts[next(c.text for c in ALL if c.name == "msam-over-shared")])


def test_a_primary_comparison_without_runs_is_said_to_be_not_run():
    numbers, runs = claims_of([cell for cell in CELLS if not cell.shared])
    (axes,) = draw(numbers, runs, "smoke").axes
    _, heading, words, *_ = texts_at(axes)
    assert heading == ["★ primary comparison: mSAM over SAM on micro-batches, resnet8 on cifar10"]
    assert words == ["not run"]
    assert "not run" in opening(numbers, runs, "smoke")[1]


def test_the_figure_is_a_file_only_if_there_is_a_comparison_of_accuracy():
    numbers, runs = claims_of()
    assert list(files(numbers, runs, "smoke")) == ["figures/contrasts.pdf", "figures/contrasts.png"]
    flat = catalogue.cells("hessian", "smoke")
    assert files(*claims_of(flat, any_run, "table3"), "smoke") == {}


def test_the_report_begins_with_the_scale_before_any_number_of_accuracy():
    numbers, runs = claims_of()
    first, second = opening(numbers, runs, "smoke")
    assert first.startswith(f"Scale of the trainings: resnet8 on cifar10: {SCALE}.")
    row = numbers[numbers["primary"]].iloc[0]
    assert f"{row['difference']:+.2f} ± {row['half_width']:.2f}"[:5] in second
    assert row["verdict"] in second
    results = results_of(CELLS, 3, spread)
    page = output_files("smoke", [TABLE1], results)["report.html"]
    assert page.index(SCALE) < page.index("points") < page.index('<section id="claims">')


def test_the_panel_of_the_primary_comparison_is_first_with_its_margin():
    numbers, runs = claims_of()
    drawn = panels(numbers, runs)
    assert drawn[0].name == "msam-over-shared"
    assert len(drawn) == numbers["claim"].nunique()
    low, high = drawn[0].band
    assert low < drawn[0].line < high
    assert high - drawn[0].line == pytest.approx(drawn[0].line - low, abs=0.02)
    (row,) = drawn[0].rows
    assert row.primary
    assert row.middle == pytest.approx(high, abs=0.1), "a difference of 1 point, which is the margin"
    assert row.p


def test_ratios_of_flatness_are_drawn_on_a_log_scale_and_differences_only_written():
    cells = [c for c in catalogue.cells("hessian", "smoke") if c.model == "resnet8"]
    numbers, runs = claims_of(cells, any_run, "table3")
    panel = next(p for p in panels(numbers, runs) if p.name == "flatness-msam-over-sam")
    places = {text: place for place, text in panel.ticks}
    assert panel.line == places["x1"]
    rows = {row.what.split(", ")[2]: row for row in panel.rows if ", lambda 1, " in row.what or "average" in row.what}
    assert len(panel.rows) == 6
    assert rows["lambda 1"].effect.startswith("x0.6")
    assert rows["lambda 1"].middle < panel.line, "flatter is to the left"
    assert rows["average sharpness"].middle is None
    assert panel.band is None


def test_each_claim_has_its_page_folded_below_its_comparisons():
    results = results_of(CELLS, 3, spread)
    made = output_files("smoke", [TABLE1], results)
    for name in (path.removeprefix("claims/").removesuffix(".md") for path in made if path.startswith("claims/")):
        _, found, rest = made["report.html"].partition(f'<details class="page" id="claim-{name}">')
        assert found
        text = rest.partition("</details>")[0]
        assert f"python -m analysis judge {name}" in text
        assert "What would change the verdict" in text
        assert "`" not in text
        assert "\\" not in text


def test_the_scale_leaves_out_an_incomplete_last_batch():
    cell = replace(BASE, train_examples=70)
    numbers, runs = claims_of([cell, perturbed(cell, "sam", 1, 0.1)])
    (row,) = numbers.itertuples()
    assert in_words(row.run_ids.split(), scales(runs)) == "70 images, 8 steps"
    assert in_words(row.run_ids.split(), scales(runs), with_epochs=True) == "70 images, 4 epochs, 8 steps"
