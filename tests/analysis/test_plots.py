"""Writing figures."""

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis import plots


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
    monkeypatch.setattr(plots, "files", elsewhere)
    assert list(plots.all_files(drawn(), 2)) == one_by_one


def elsewhere(name, figure):
    """Fails in the process of the tests."""
    import multiprocessing

    assert multiprocessing.parent_process()
    return plots.files(name, figure)
