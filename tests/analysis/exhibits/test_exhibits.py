"""The exhibits as a whole: how they are found, in what order, and that a column of one is in no other."""

import pkgutil
from pathlib import Path
from types import ModuleType

import analysis.exhibits
from analysis.exhibit import Exhibit, Target
from analysis.exhibits import declared, exhibit_of, table1, tables
from experiments.harness.runs import catalogue
from tests.analysis.invented import document, results_of, study_run


def test_each_file_that_declares_an_exhibit_is_found():
    files = {module.name for module in pkgutil.iter_modules(analysis.exhibits.__path__)}
    assert set(declared()) == files - {"studies", "tuning"}
    assert all(isinstance(exhibit, Exhibit) for exhibit in declared().values())


def test_tables_stand_in_the_order_of_their_exhibits_and_every_one_has_cells():
    assert tables()[:5] == ["table1", "table2", "table3", "table4", "theory"]
    assert set(tables()) == {experiment.table for experiment in catalogue.catalogue().values()}


def test_an_experiment_is_shown_as_its_table_and_under_its_own_name():
    cells = catalogue.cells("resnet_cifar", "smoke")
    assert exhibit_of("resnet_cifar") is table1.EXHIBIT
    frame = results_of(cells, 2, study_run).runs
    assert document("resnet_cifar", frame, cells, 2).title == "resnet_cifar: test accuracy"
    assert document("table1", frame, cells, 2).title == "Table 1: test accuracy"


def test_figures_and_claims_have_one_name_each():
    pictures = [picture.name for exhibit in declared().values() for picture in exhibit.figures]
    assert len(pictures) == len(set(pictures))


def test_one_line_adds_a_column_to_table_1_and_to_no_other_table():
    source = Path(table1.__file__).read_text()
    line = "COLUMNS = (*scores.COLUMNS,)"
    assert source.count(line) == 1
    changed = ModuleType("changed")
    longer = line.replace(",)", ', scores.mean_column("test loss", "test_loss"))')
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
