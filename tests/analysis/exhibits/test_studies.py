"""Tables and figures of the side studies: made-up runs against values computed by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from analysis.exhibit import Target
from analysis.exhibits import exhibit_of
from analysis.exhibits.micro_batches import against_m
from analysis.exhibits.rho import against_rho
from analysis.exhibits.studies import against
from analysis.frames import Results
from analysis.publish import target
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import perturbed, with_seeds
from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.spec import SpecError
from tests.analysis.invented import document, pictures, published_twice, results_of, study_run

STUDIES = ("micro_batches", "rho", "batch_size", "label_noise", "trajectories")
COMMITTED = Path(__file__).parents[3] / "results" / "cpu"


def results(name, shift=0.0, seeds=2):
    return Results.of([study_run(spec, shift) for spec in catalogue.runs(name, "smoke", seeds)])


def test_msam_is_compared_with_sam_at_the_same_rho_if_there_is_one():
    cells = [replace(c, rho=rho) for c in catalogue.cells("rho", "smoke") if c.rho for rho in (0.1, 0.2)]
    numbers = document("rho", results_of(cells, 2, study_run).runs, cells, 2).numbers
    rows = {(row.method, row.rho): row for row in numbers.itertuples()}
    assert rows["msam", 0.1].over_sam == pytest.approx(2.0)
    assert rows["msam", 0.2].over_sam == pytest.approx(2.0), "with the other SAM it would be 3"
    assert rows["sam", 0.2].over_sam_n == 0
    other = [c for c in cells if (c.method, c.rho) != ("sam", 0.2)]
    assert document("rho", results("rho").runs, other, 2).numbers["over_sam"].iloc[-1] != pytest.approx(2.0)


def test_claims_distinguish_rows_of_equal_name_by_rho():
    cells = [replace(c, rho=c.rho * times) for c in catalogue.cells("rho", "smoke") for times in (1, 2)]
    cells = list(dict.fromkeys(cells))
    claim, family = document("rho", results_of(cells, 2, study_run).runs, cells, 2).claims
    assert family.startswith("The differences in the lines above as one family (")
    assert "SAM, rho 0.1 over SGD" in claim
    assert "SAM, rho 0.2 over SGD" in claim


@pytest.mark.parametrize(("name", "words"), [("label_noise", "wrong labels"), ("batch_size", "batch")])
def test_claims_name_what_a_study_varies_from_block_to_block(name, words):
    t = target(name, "smoke")
    shown = document(name, results(name).runs, t.cells, 2)
    values = dict.fromkeys(f"{getattr(cell, name):g}" for cell in t.cells)
    blocks = [claim.partition(": ")[0] for claim in shown.claims[:-1]]  # the last is on the family
    assert blocks == [f"resnet8, cifar10, {words} {v}" for v in values]
    assert all(f"resnet8, cifar10, {words} {v}\n" in shown.terminal() for v in values)


def test_the_figure_of_rho_has_means_intervals_and_ticks():
    cells = [replace(c, rho=rho) for c in catalogue.cells("rho", "smoke") for rho in ((0.1, 0.4) if c.rho else (0.0,))]
    figure = against_rho(results_of(cells, 2, study_run), Target("", tuple(cells), 2))
    (axes,) = figure.axes
    drawn = {container.get_label(): container for container in axes.containers}
    assert drawn["mSAM, m=4"].lines[0].get_xydata().tolist() == pytest.approx(np.array([[0.1, 5.0], [0.4, 8.0]]))
    (bars,) = drawn["SAM"].lines[2]
    assert np.array(bars.get_segments()[0])[:, 1] == pytest.approx([3.0, 3.0]), "paired by seed: no spread"
    assert (axes.lines[0].get_label(), list(axes.lines[0].get_ydata())) == ("SGD", [0, 0])
    assert axes.get_ylabel() == "accuracy over SGD, points"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.4"]
    assert axes.get_xticklabels(minor=True) == []
    assert axes.get_title() == "resnet8, cifar10\nn = 2 seeds"


def test_a_collapse_at_one_rho_is_named_and_does_not_flatten_the_others():
    rhos = (0.1, 0.2, 0.3, 0.4, 0.8)
    cells = [replace(c, rho=rho) for c in catalogue.cells("rho", "smoke") for rho in (rhos if c.rho else (0.0,))]
    collapsed = {cell for cell in cells if cell.rho == 0.8}
    runs = [study_run(spec, -0.5 if replace(spec, seed=0) in collapsed else 0.0) for spec in with_seeds(cells, 2)]
    (axes,) = against_rho(Results.of(runs), Target("", tuple(cells), 2)).axes
    low, high = axes.get_ylim()
    assert -5 < low < 0
    assert 8 < high < 10
    assert [text.get_text() for text in axes.texts] == ["-40.0\n-39.0\n-38.0\n↓"]
    (axes,) = against_rho(results_of(cells, 2, study_run), Target("", tuple(cells), 2)).axes
    assert not axes.texts


def networks_by_m(rhos=(0.1, 0.3)):
    """A network with base, control, shared SAM and mSAM at m = 2 and 4, and one without BatchNorm; rho differs by m."""
    base = next(c for c in catalogue.cells("micro_batches", "smoke") if c.method == "base" and c.model == "resnet8")
    cells = []
    for model in ("resnet8", "resnet8-groupnorm"):
        plain = replace(base, model=model)
        cells += [plain, perturbed(plain, "sam", 1, 0.1)]
        for m, rho in zip((2, 4), rhos, strict=True):
            if model == "resnet8":
                cells += [replace(plain, micro_batches=m), perturbed(plain, "shared", m, 0.1)]
            cells.append(perturbed(plain, "msam", m, rho))
    return cells


def drawn_points(axes):
    """The points of each difference: m, mean, and half-width of the interval."""
    return {
        container.get_label(): [(round(x), y, end - y) for (x, y), (_, (_, end)) in zip(xy, segments, strict=True)]
        for container in axes.containers
        for xy in [container.lines[0].get_xydata()]
        for segments in [container.lines[2][0].get_segments()]
    }


def test_the_figure_of_m_has_paired_differences_to_sam_the_control_and_shared_sam():
    def run(spec):
        """The gain of mSAM over the others grows by half a point from one seed to the next."""
        return study_run(spec, 0.005 * spec.seed * (spec.method == "msam"))

    cells = networks_by_m()
    with_batchnorm, without = against_m(results_of(cells, 2, run), Target("", tuple(cells), 2)).axes
    # 0.25 points on average, with 12.706205 * 0.25 as half the width of the interval.
    half = pytest.approx(12.706205 * 0.25)
    assert drawn_points(with_batchnorm) == {
        "mSAM over SAM": [(2, pytest.approx(2.25), half), (4, pytest.approx(4.25), half)],
        "mSAM over plain gradients on the same micro-batches": [
            (1, pytest.approx(3.0), pytest.approx(0.0, abs=1e-9)),
            (2, pytest.approx(4.25), half),
            (4, pytest.approx(6.25), half),
        ],
        "mSAM over SAM on the same micro-batches": [(2, pytest.approx(1.25), half), (4, pytest.approx(3.25), half)],
    }
    assert {name: [m for m, *_ in points] for name, points in drawn_points(without).items()} == {
        "mSAM over SAM": [2, 4],
        "mSAM over plain gradients on the same micro-batches": [1, 2, 4],
    }
    colours = {c.get_label(): c.lines[0].get_color() for c in (*with_batchnorm.containers, *without.containers)}
    assert list(colours.values()) == [ARMS[name].colour for name in ("sam", "control", "shared")]
    assert with_batchnorm.get_title() == "resnet8, cifar10\nn = 2 seeds"


def test_the_axis_of_m_has_both_readings_and_the_band_is_the_margin():
    cells = networks_by_m()
    axes, _ = against_m(results_of(cells, 2, study_run), Target("", tuple(cells), 2)).axes
    (above,) = axes.child_axes
    for ticks, texts in ((axes, ["1", "2", "4"]), (above, ["32", "16", "8"])):
        assert [label.get_text() for label in ticks.get_xticklabels()] == texts
        assert list(ticks.get_xticks()) == [1, 2, 4]
    assert "number of micro-batches" in axes.get_xlabel()
    assert "examples in a micro-batch" in above.get_xlabel()
    (band,) = axes.patches
    assert (band.get_y(), band.get_height()) == (-1.0, 2.0)
    shown = exhibit_of("micro_batches").document(Target("m", tuple(cells), 2), results_of(cells, 2, study_run).runs)
    row = shown.cells[shown.cells["method"] == "mSAM, m=4"].iloc[0]
    assert row[["m", "B/m", "over SAM", "over control", "over shared"]].tolist() == [
        *("4", "8", "+4.00 ± 0.00 (2)", "+6.00 ± 0.00 (2)", "+3.00 ± 0.00 (2)")
    ]


def test_the_figure_of_wrong_labels_has_a_line_for_each_method_over_the_base():
    cells = catalogue.cells("label_noise", "smoke")
    runs = [study_run(spec, -spec.label_noise / 2 if spec.method != "msam" else 0) for spec in with_seeds(cells, 2)]
    figure = against("label_noise", "share of wrong training labels")(Results.of(runs), Target("", tuple(cells), 2))
    (axes,) = figure.axes
    drawn = {c.get_label(): c.lines[0] for c in axes.containers}
    assert drawn["SAM"].get_xydata() == pytest.approx(np.array([[0, 3.0], [0.4, 3.0]]))
    assert drawn["mSAM, m=4"].get_ydata() == pytest.approx([5.0, 25.0])
    assert axes.get_title() == "resnet8, cifar10\nn = 2 seeds"


def test_trajectories_are_compared_by_their_last_eigenvalue():
    cells = catalogue.cells("trajectories", "smoke")
    shown = document("trajectories", results("trajectories").runs, cells, 2)
    row = shown.numbers.set_index("method").loc["msam"]
    assert (row["mean"], row["greatest_lambda_1"]) == (80.4, 90)
    assert row["log_over_base"] == pytest.approx(np.log(80.4 / 80.5), rel=1e-4)
    assert row["test_accuracy"] == pytest.approx(55.5)
    assert "mSAM, m=4 over SAM" in shown.claims[0]


@pytest.mark.parametrize("picture", sorted((COMMITTED / "figures").glob("*.png")), ids=lambda path: path.stem)
def test_no_committed_figure_is_cut_off(picture):
    """The layout leaves at least 3 pixels at each side; text that is too long reaches into them."""
    pixels = imread(picture)[..., :3]
    edges = [side[:3] for turned in (pixels, pixels.transpose(1, 0, 2)) for side in (turned, turned[::-1])]
    assert all((edge == 1).all() for edge in edges)


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.usefixtures("sketches")
def test_each_study_has_a_table_and_a_figure_that_follow_its_runs(name):
    t = target(name, "smoke")
    moved = Results.of([study_run(s, 0.1 * (s.rho > 0)) for s in catalogue.runs(name, "smoke", 2)])
    drawn = [pictures(chosen, t) for chosen in (results(name), results(name), moved)]
    assert list(drawn[0]) == [f"figures/{name}.pdf", f"figures/{name}.png"]
    assert drawn[0] == drawn[1]
    if name != "trajectories":  # its figure has no accuracy
        assert drawn[0][f"figures/{name}.png"] != drawn[2][f"figures/{name}.png"]
    empty = pictures(Results.of([]), t)
    assert empty[f"figures/{name}.png"] != drawn[0][f"figures/{name}.png"]


def experiment(monkeypatch, name, cells):
    """Add an experiment to the catalogue that fills a table of the same name."""
    known = catalogue.catalogue()
    new = catalogue.Experiment(name=name, table=name, summary="", runs={"smoke": cells}, tuning={})
    monkeypatch.setattr(catalogue, "catalogue", lambda: {**known, name: new})


def test_a_study_without_a_file_is_printed_drawn_and_published(tmp_path, monkeypatch, sketches):
    networks = [c for c in catalogue.cells("rho", "smoke") if c.rho in (0.0, 0.1)]
    cells = [replace(c, weight_decay=decay) for c in networks for decay in (0.0, 0.01)]
    experiment(monkeypatch, "decay", cells)
    results = results_of(cells, 2, study_run)
    before, after = published_twice(tmp_path, ["decay"], results)
    assert before == after
    assert {path.name for path in before} >= {"decay.md", "decay.csv", "decay.tex", "decay.png", "report.html"}
    assert "### decay: test accuracy" in before[tmp_path / "smoke/tables/decay.md"].decode()
    assert "<figcaption" in before[tmp_path / "smoke/report.html"].decode()
    (axes,) = exhibit_of("decay").figures[0].draw(results, target("decay", "smoke")).axes
    assert axes.get_xlabel() == "weight decay"
    drawn = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axes.containers}
    assert drawn["mSAM, m=4"] == drawn["SAM"] == [0.0, 0.01]


def test_a_table_with_a_run_of_another_kind_is_rejected(monkeypatch):
    cells = catalogue.cells("cost", "smoke")
    experiment(monkeypatch, "prices", cells)
    with pytest.raises(SpecError, match=r"prices lists .*, a cost run, which the table of prices cannot show"):
        document("prices", Results.of([]).runs, cells, 2)


def test_studies_share_runs_with_table_1():
    table1 = set(catalogue.runs("table1", "cpu"))
    for name in ("rho", "micro_batches"):
        shared = table1 & set(catalogue.runs(name, "cpu"))
        assert {spec.method for spec in shared} == {"base", "control", "sam", "shared", "msam"}, name
    table1 = set(catalogue.runs("table1", "paper"))
    for name in ("batch_size", "label_noise"):
        assert {spec.method for spec in table1 & set(catalogue.runs(name, "paper"))} >= {"base", "control", "msam"}


def test_micro_batches_keep_their_size_when_the_batch_grows():
    cells = catalogue.cells("batch_size", "paper")
    assert {c.batch_size // c.micro_batches for c in cells if c.micro_batches > 1} == {32}
    assert {c.learning_rate / c.batch_size for c in cells} == {0.1 / 256}


@pytest.mark.parametrize(
    ("profile", "several"), [("smoke", [2, 4]), ("cpu", [2, 8, 32]), ("paper", [2, 4, 8, 16, 32, 64])]
)
def test_each_m_has_msam_the_control_and_sam_over_the_same_micro_batches(profile, several):
    networks = [c for c in catalogue.cells("micro_batches", profile) if not c.model.endswith("groupnorm")]
    by_m = {}
    for cell in networks:
        by_m.setdefault(cell.micro_batches, []).append(cell.method)
    assert sorted(by_m.pop(1)) == ["base", "sam"]
    assert sorted(by_m) == several
    assert all(sorted(methods) == ["control", "msam", "shared"] for methods in by_m.values())
