"""All exhibits: discovery, order, and that a column of one is not in another."""

import pkgutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import analysis.exhibits
from analysis.exhibit import Exhibit, Target
from analysis.exhibits import declared, exhibit_of, table1, tables
from analysis.frames import Results
from experiments.harness.runs import catalogue
from tests.analysis.invented import any_run, document, published_twice, results_of, study_run


def test_each_file_that_declares_an_exhibit_is_listed():
    files = {module.name for module in pkgutil.iter_modules(analysis.exhibits.__path__)}
    assert set(declared()) == files - {"studies", "tuning"}
    assert all(isinstance(exhibit, Exhibit) for exhibit in declared().values())


def test_tables_are_in_the_order_of_their_exhibits():
    assert tables()[:5] == ["table1", "table2", "table3", "table4", "theory"]
    assert set(tables()) == {experiment.table for experiment in catalogue.catalogue().values()}


def test_an_experiment_is_shown_by_the_exhibit_of_its_table_under_its_name():
    cells = catalogue.cells("resnet_cifar", "smoke")
    assert exhibit_of("resnet_cifar") is table1.EXHIBIT
    frame = results_of(cells, 2, study_run).runs
    assert document("resnet_cifar", frame, cells, 2).title == "resnet_cifar: test accuracy"
    assert document("table1", frame, cells, 2).title == "Table 1: test accuracy"


def test_names_of_figures_are_unique():
    pictures = [picture.name for exhibit in declared().values() for picture in exhibit.figures]
    assert len(pictures) == len(set(pictures))


PUBLISHED = {
    "table1": {"table1.md", "curves.png", "claims.md", "report.html"},
    "table3-theory": {"table3.md", "theory.md", "theory.pdf", "spectra.png"},
    "table4": {"table4.md", "cost.pdf", "cost.png"},
    "micro_batches-rho-batch_size-label_noise-trajectories": {
        *("micro_batches.md", "rho.png", "batch_size.csv", "label_noise.tex", "trajectories.pdf")
    },
}
"""Some files of tables that are published together."""


def assert_redrawn(folder, names):
    specs = dict.fromkeys(run for name in names.split("-") for run in catalogue.runs(name, "smoke"))
    before, after = published_twice(folder, names.split("-"), Results.of(map(any_run, specs)))
    assert {path.name for path in before} >= PUBLISHED[names]
    assert after == before


@pytest.mark.parametrize("names", PUBLISHED)
def test_published_tables_report_and_what_is_in_the_figures_are_the_same_again(tmp_path, names, sketches):
    assert_redrawn(tmp_path, names)


@pytest.mark.parametrize(
    "names", [pytest.param(name, marks=() if name == "table1" else pytest.mark.rare) for name in PUBLISHED]
)
def test_published_tables_figures_and_report_are_redrawn_to_the_byte(tmp_path, names):
    assert_redrawn(tmp_path, names)


def test_one_line_adds_a_column_to_table_1_and_to_no_other_table():
    source = Path(table1.__file__).read_text()
    line = "    *scores.COLUMNS,\n"
    assert source.count(line) == 1
    changed = ModuleType("changed")
    longer = f'{line}    scores.mean_column("test loss", "test_loss"),\n'
    exec(compile(source.replace(line, longer), "table1.py", "exec"), changed.__dict__)
    cells = catalogue.cells("rho", "smoke")
    frame = results_of(cells, 2, study_run).runs
    shown = changed.EXHIBIT.document(Target("table1", tuple(cells), 2), frame)
    usual = document("table1", frame, cells, 2)
    assert [name for name in shown.cells if name not in usual.cells] == ["test loss"]
    added = {"test_loss", "test_loss_half_width", "test_loss_n"}
    assert set(shown.numbers) - set(usual.numbers) == added
    # 1.5 and 1.49 with plain training: 12.7062 * 0.01 / 2.
    assert shown.cells["test loss"].iloc[0] == "1.50 ± 0.06"
    assert not added & set(document("rho", frame, cells, 2).numbers)


@pytest.mark.parametrize(
    ("name", "figure"), [("resnet_cifar", "curves"), ("trajectories", "trajectories"), ("hessian", "flatness")]
)
def test_a_figure_draws_an_arm_that_is_relative_to_its_blocks_base(twice, name, figure):
    cells = [c for c in catalogue.cells(name, "smoke") if c.model == "resnet8"]
    base = next(c for c in cells if c.method == "base")
    cells.append(replace(base, epochs=2 * base.epochs))
    draw = next(picture.draw for picture in exhibit_of(name).figures if picture.name == figure)
    axes = draw(results_of(cells, 2, any_run), Target(name, tuple(cells), 2)).axes[0]
    assert {"SGD", "SGD, twice the epochs", "SAM"} < set(axes.get_legend_handles_labels()[1])
