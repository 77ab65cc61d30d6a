"""The side studies' tables and figures: from made-up runs, by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from analysis.collect import Run
from analysis.exhibits.studies import against_m, against_rho, pages
from analysis.frames import Results
from analysis.plots import against
from analysis.publish import STUDIES, publish, redraw, target
from experiments.harness import catalogue
from experiments.harness.spec import with_seeds

SESSION = {"commit": "a" * 40, "dirty": False, "code": "c" * 16, "cpu": "a processor"}
GAIN = {"base": 0.0, "control": 0.01, "sam": 0.02, "msam": 0.04}
M = catalogue.cells("micro_batches", "smoke")
COMMITTED = Path(__file__).parents[2] / "results" / "cpu"


def made_up(spec, shift=0.0):
    """A network whose accuracy is 50 % and its method's gain, a tenth more for each rho of 1, and a seed's part."""
    if spec.kind == "curvature":
        summary = {"train_lambda_1": 100.0 - 10 * spec.micro_batches + spec.seed, "test_reestimated_accuracy": 0.61}
        return Run(spec, {**summary, "wall_seconds": 9.0}, [], [SESSION])
    accuracy = 0.5 + GAIN[spec.method] + spec.rho / 10 + spec.seed / 100 + shift
    lines = [
        {"epoch": epoch, "train_loss": 2.0 / epoch, "sharpness": 0.1 * spec.rho, "lambda_1": 10.0 * epoch + spec.seed}
        for epoch in (1, 2)
    ]
    summary = {"test_accuracy": accuracy, "train_accuracy": 0.9, "wall_seconds": 10.0 * (1 + (spec.rho > 0))}
    if spec.curvature_every:
        summary |= {"lambda_1": 80.0 - spec.rho + spec.seed, "greatest_lambda_1": 90.0}
    return Run(spec, summary, lines, [SESSION])


def results(name, shift=0.0, seeds=2):
    return Results.of([made_up(spec, shift) for spec in catalogue.runs(name, "smoke", seeds)])


def test_msam_is_compared_with_sam_of_the_same_rho_where_there_is_one():
    cells = [replace(c, rho=rho) for c in catalogue.cells("rho", "smoke") if c.rho for rho in (0.1, 0.2)]
    t = replace(target("rho", "smoke"), cells=tuple(cells))
    numbers = t.document(Results.of([made_up(spec) for spec in with_seeds(cells, 2)]).runs).numbers
    rows = {(row.method, row.rho): row for row in numbers.itertuples()}
    assert rows["msam", 0.1].over_sam == pytest.approx(2.0)
    assert rows["msam", 0.2].over_sam == pytest.approx(2.0), "with the other SAM it would be 3"
    assert rows["sam", 0.2].over_sam_n == 0
    other = replace(t, cells=tuple(c for c in cells if (c.method, c.rho) != ("sam", 0.2)))
    assert other.document(results("rho").runs).numbers["over_sam"].iloc[-1] != pytest.approx(2.0)


def test_a_networks_curvature_run_adds_to_its_row():
    document = target("micro_batches", "smoke").document(results("micro_batches").runs)
    networks = [cell for cell in M if cell.kind == "train"]
    assert len(document.cells) == len(networks) < len(M)
    row = document.numbers[(document.numbers["method"] == "msam") & (document.numbers["micro_batches"] == 4)].iloc[0]
    assert (row["lambda_1"], row["reestimated"]) == (60.5, 61.0)
    assert row["lambda_1_half_width"] == pytest.approx(12.706205 / 2)
    assert document.cells["lambda 1"].iloc[-1] == "60.5 ± 6.4"
    assert any("Re-estimated" in note for note in document.notes)


def test_claims_tell_rows_of_one_name_apart_by_rho():
    cells = [replace(c, rho=c.rho * times) for c in catalogue.cells("rho", "smoke") for times in (1, 2)]
    t = replace(target("rho", "smoke"), cells=tuple(dict.fromkeys(cells)))
    (claim,) = t.document(Results.of([made_up(spec) for spec in with_seeds(t.cells, 2)]).runs).claims
    assert "SAM, rho 0.1 over SGD" in claim
    assert "SAM, rho 0.2 over SGD" in claim


@pytest.mark.parametrize(("name", "words"), [("label_noise", "wrong labels"), ("batch_size", "batch")])
def test_claims_name_what_a_study_varies_from_block_to_block(name, words):
    t = target(name, "smoke")
    document = t.document(results(name).runs)
    values = dict.fromkeys(f"{getattr(cell, name):g}" for cell in t.cells)
    assert [claim.partition(": ")[0] for claim in document.claims] == [f"resnet8, cifar10, {words} {v}" for v in values]
    assert all(f"resnet8, cifar10, {words} {v}\n" in document.terminal() for v in values)


def test_accuracy_against_rho_is_drawn_at_the_means_with_their_intervals_and_the_rhos_are_named():
    cells = [replace(c, rho=rho) for c in catalogue.cells("rho", "smoke") for rho in ((0.1, 0.4) if c.rho else (0.0,))]
    figure = against_rho(Results.of([made_up(spec) for spec in with_seeds(cells, 2)]), cells, 2)
    (axes,) = figure.axes
    drawn = {container.get_label(): container for container in axes.containers}
    assert drawn["mSAM, m=4"].lines[0].get_xydata().tolist() == pytest.approx(np.array([[0.1, 55.5], [0.4, 58.5]]))
    (bars,) = drawn["SAM"].lines[2]
    assert np.array(bars.get_segments()[0])[:, 1] == pytest.approx([53.5 - 12.706205 / 2, 53.5 + 12.706205 / 2])
    assert axes.lines[0].get_ydata() == pytest.approx([50.5, 50.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.4"]
    assert axes.get_xticklabels(minor=True) == []
    assert axes.get_title().endswith("highest mean 58.5 ± 6.4 %:\nmSAM, m=4, rho 0.4 (n = 2)")


def test_against_m_every_panel_has_its_numbers_and_an_m_with_its_own_rho_an_open_mark():
    own = [replace(c, rho=0.3) for c in M if c.method == "msam" and c.micro_batches == 4 and c.kind == "train"]
    cells = [*M, *(c for c in own if c.model == "resnet8")]
    figure = against_m(Results.of([made_up(spec) for spec in with_seeds(cells, 2)]), cells, 2)
    score, anew, flat = figure.axes[:3]
    assert score.get_title().startswith("resnet8, cifar10\nhighest mean 57.5 ± 6.4 %:\nmSAM, m=4, rho 0.3")
    lines = {c.get_label(): c.lines[0] for c in score.containers}
    assert lines["mSAM, rho 0.1"].get_xydata() == pytest.approx(np.array([[1, 53.5], [2, 55.5], [4, 55.5]]))
    control = lines["SGD over m micro-batches"]
    assert control.get_ydata() == pytest.approx([50.5, 51.5, 51.5])
    alone = lines["mSAM, where an m has a rho of its own"]
    assert alone.get_ydata() == pytest.approx([57.5])
    beside, its_own = control.get_xdata()[-1], alone.get_xdata()[0]
    assert 3.5 < beside < 3.9 < 4.1 < its_own < 4.5, "none hides another's interval"
    own_marks = {line.get_label(): line for line in score.lines if line.get_label() in ("SGD", "SAM")}
    assert own_marks["SAM"].get_xydata() == pytest.approx(np.array([[1, 53.5]]))
    assert own_marks["SGD"].get_ydata() == pytest.approx([50.5])
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted({*lines, *own_marks})
    assert (alone.get_linestyle(), alone.get_markerfacecolor()) == ("None", "none")
    for axes, expected in ((anew, [61, 61, 61]), (flat, [90.5, 80.5, 60.5])):
        drawn = {c.get_label(): c.lines[0] for c in axes.containers}
        assert drawn["mSAM, rho 0.1"].get_ydata() == pytest.approx(expected)
    assert [label.get_text() for label in flat.get_xticklabels()] == ["1", "2", "4"]


def test_wrong_labels_are_drawn_by_method_and_the_title_has_msam_over_sam_at_both_ends():
    cells = catalogue.cells("label_noise", "smoke")
    runs = [made_up(spec, -spec.label_noise / 2 if spec.method != "msam" else 0) for spec in with_seeds(cells, 2)]
    figure = against(Results.of(runs), cells, 2, field="label_noise", words="share of wrong training labels")
    (axes,) = figure.axes
    drawn = {c.get_label(): c.lines[0] for c in axes.containers}
    assert drawn["SAM"].get_xydata() == pytest.approx(np.array([[0, 53.5], [0.4, 33.5]]))
    assert drawn["mSAM"].get_ydata() == pytest.approx([55.5, 55.5])
    title = "resnet8, cifar10\nmSAM over SAM:\n+2.0 ± 0.0 (n = 2) at 0, +22.0 ± 0.0 (n = 2) at 0.4"
    assert axes.get_title() == title


def test_a_network_that_was_trained_anew_to_be_measured_is_told_of():
    t, runs = target("micro_batches", "smoke"), catalogue.runs("micro_batches", "smoke", 2)
    trained = [made_up(spec) for spec in runs if spec.kind == "train"]
    accuracy = {run.spec: run.summary["test_accuracy"] for run in trained}
    for off, words in ((0.0, None), (0.01, f"{len(trained)} of {len(trained)} networks were trained anew")):
        measured = [made_up(spec) for spec in runs if spec.kind == "curvature"]
        for run in measured:
            run.summary["test_accuracy"] = accuracy[run.spec.trained] + off
        notes = " ".join(t.document(Results.of([*trained, *measured]).runs).notes)
        assert ("trained anew" in notes) == bool(words)
        assert words is None or words in notes


def test_trajectories_are_compared_by_their_last_eigenvalue():
    document = target("trajectories", "smoke").document(results("trajectories").runs)
    row = document.numbers.set_index("method").loc["msam"]
    assert (row["mean"], row["over_base"], row["greatest_lambda_1"]) == (80.4, -0.1, 90)
    assert row["test_accuracy"] == pytest.approx(55.5)
    assert "mSAM, m=4 over SAM" in document.claims[0]


@pytest.mark.parametrize("picture", sorted((COMMITTED / "figures").glob("*.png")), ids=lambda path: path.stem)
def test_nothing_of_a_committed_figure_is_cut_off(picture):
    """The layout leaves 3 pixels or more at each side; what is too long for it goes into them."""
    pixels = imread(picture)[..., :3]
    edges = [side[:3] for turned in (pixels, pixels.transpose(1, 0, 2)) for side in (turned, turned[::-1])]
    assert all((edge == 1).all() for edge in edges)


@pytest.mark.parametrize("name", STUDIES)
def test_each_study_has_a_table_and_a_figure_that_follow_its_runs(name):
    t = target(name, "smoke")
    found = [pages(results(name, shift), {name: (t.cells, t.seeds)}) for shift in (0.0, 0.0, 0.1)]
    assert list(found[0]) == [f"figures/{name}.pdf", f"figures/{name}.png"]
    assert found[0] == found[1]
    if name != "trajectories":  # which shows no accuracy
        assert found[0][f"figures/{name}.png"] != found[2][f"figures/{name}.png"]
    nothing = pages(Results.of([]), {name: (t.cells, t.seeds)})
    assert nothing[f"figures/{name}.png"] != found[0][f"figures/{name}.png"]


def test_studies_are_published_and_drawn_again_to_the_byte(tmp_path):
    folder, targets = tmp_path / "smoke", [target(name, "smoke") for name in STUDIES]
    runs = {run.run_id: run for t in targets for run in t.runs}
    publish(folder, "smoke", targets, Results.of([made_up(spec) for spec in runs.values()]))
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert {path.stem for path in before} >= {*STUDIES, "curves"}
    for path in folder.glob("*/*.*"):
        path.unlink()
    redraw(folder, "smoke")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_studies_share_what_table_1_has_trained():
    table1 = set(catalogue.runs("table1", "cpu"))
    for name in ("rho", "batch_size", "label_noise", "micro_batches"):
        shared = table1 & set(catalogue.runs(name, "cpu"))
        assert {spec.method for spec in shared} >= {"base", "control", "sam", "msam"}, name
    assert set(catalogue.runs("table3", "cpu")) & set(catalogue.runs("micro_batches", "cpu"))


def test_micro_batches_keep_their_size_when_the_batch_grows():
    cells = catalogue.cells("batch_size", "cpu")
    assert {c.batch_size // c.micro_batches for c in cells if c.micro_batches > 1} == {16}
    assert {c.learning_rate / c.batch_size for c in cells} == {0.4 / 128}


def test_at_each_m_there_is_the_control_and_msam_at_sams_rho():
    networks = [c for c in catalogue.cells("micro_batches", "cpu") if (c.kind, c.model) == ("train", "resnet8")]
    by_m = {}
    for cell in networks:
        by_m.setdefault(cell.micro_batches, set()).add(cell.rho)
    assert list(by_m) == [1, 2, 4, 8, 16, 32]
    assert all(rhos >= {0.0, 0.05} for rhos in by_m.values())
