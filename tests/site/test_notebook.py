"""The notebook runs from top to bottom within two minutes and shows what is committed, up to rounding."""

import re
import resource
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [
    pytest.mark.own_target,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the client and its messages
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

SECONDS = 120
POINTS = 1.5
"""How far an accuracy may be from the committed one: another processor rounds differently."""

NOTEBOOK = Path(__file__).parents[2] / "docs" / "sam_and_msam_on_digits.ipynb"


def cpu_seconds():
    """Of processes that were started here and have ended: the notebook's kernel uses one core."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def printed(notebook):
    """What each cell of code printed."""
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def accuracies(notebook):
    found = re.findall(r"(\w+): ([0-9.]+) % of the test", "".join(printed(notebook)))
    return {name: float(score) for name, score in found}


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_committed_outputs_are_of_one_run_from_top_to_bottom(committed):
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type in ("stream", "display_data") for cell in cells for output in cell.outputs)
    assert "image/png" in cells[-1].outputs[-1].data


def test_the_conclusion_is_that_of_the_committed_outputs(committed):
    """The text says that no difference is significant: it must change when the outputs do."""
    assert printed(committed)[-2].count("not significant") == 3
    assert "In the run shown here no difference is larger than its interval" in committed.cells[-1].source


def test_it_runs_and_shows_the_same(committed, tmp_path):
    again = nbformat.read(NOTEBOOK, as_version=4)
    before = cpu_seconds()
    NotebookClient(again, timeout=4 * SECONDS, resources={"metadata": {"path": str(tmp_path)}}).execute()
    seconds = cpu_seconds() - before
    assert list(accuracies(again)) == list(accuracies(committed)) == ["SGD", "SAM", "mSAM"]
    assert accuracies(again) == pytest.approx(accuracies(committed), abs=POINTS)
    assert 1 < seconds < SECONDS
