"""Writing figures."""

import math
import pickle

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from analysis import plots
from analysis.exhibits import pages, tables
from analysis.frames import Results
from analysis.publish import target
from experiments.harness.runs import catalogue
from tests.analysis.conftest import contents
from tests.analysis.invented import any_run


def test_figures_that_several_processes_write_have_the_bytes_of_those_written_one_by_one(monkeypatch):
    def drawn():
        for name in ("first", "second"):
            with mpl.rc_context(plots.STYLE):
                figure = Figure(figsize=(2, 2), layout="constrained")
                figure.subplots().plot([1, 2], label=name)
            figure.legend()
            yield name, figure

    one_by_one = list(plots.all_files(drawn(), 2))
    assert [set(files) for files in one_by_one] == [{f"{name}.pdf", f"{name}.png"} for name in ("first", "second")]
    monkeypatch.setattr(plots, "FEW", 2)
    monkeypatch.setattr(plots, "cores", lambda: 2)
    monkeypatch.setattr(plots, "files", forbidden)
    assert list(plots.all_files(drawn(), 2)) == one_by_one


def test_a_figure_that_cannot_be_sent_to_another_process_is_written_in_this_one(monkeypatch):
    def drawn():
        for name in ("first", "second"):
            figure = Figure(figsize=(2, 2))
            figure.subplots().xaxis.set_major_formatter(lambda x, _: f"{x:.3f}")
            figure.suptitle(name)
            yield name, figure

    one_by_one = list(plots.all_files(drawn(), 2))
    monkeypatch.setattr(plots, "FEW", 2)
    monkeypatch.setattr(plots, "cores", lambda: 2)
    assert list(plots.all_files(drawn(), 2)) == one_by_one


@pytest.mark.parametrize("lowest", [0.0, -0.5, math.nan])
def test_a_logarithmic_axis_begins_at_half_the_lowest_mean_above_0(lowest):
    axes = Figure().subplots()
    axes.plot([1, 2, 3], [lowest, 4.0, 2.0])
    plots.set_logarithmic(axes)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] == 1.0


def test_every_figure_can_be_sent_to_another_process(monkeypatch):
    sent = []

    def send(figures, count):
        for name, figure in figures:
            received = pickle.loads(pickle.dumps(figure))
            assert repr([*contents(received)]) == repr([*contents(figure)]), name
            sent.append(name)
            yield {}

    monkeypatch.setattr(plots, "all_files", send)
    targets = {name: target(name, "smoke") for name in tables() if catalogue.cells(name, "smoke")}
    runs = dict.fromkeys(run for one in targets.values() for run in one.runs)
    assert [page.name for page in pages(Results.of(map(any_run, runs)), targets)] == sent
    assert {"curves", "flatness", "micro_batches", "rho"} < set(sent)


def forbidden(name, figure):
    """Instead of `plots.files` in the process of the tests; the others have the real one."""
    raise AssertionError(name)
