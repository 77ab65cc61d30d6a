"""Names, colours and markers of the arms, as `runs/methods.py` declares them, for all tables and figures."""

from experiments.harness.runs.methods import ARMS, BASE_OPTIMIZERS, arm_of
from experiments.harness.runs.spec import Run

METHODS = tuple(ARMS)
"""In the order of the rows of the tables."""

COLOURS = {name: arm.colour for name, arm in ARMS.items()}
MARKS = {name: arm.mark for name, arm in ARMS.items()}
METHOD_WORDS = {name: arm.legend for name, arm in ARMS.items()}
"""The name of each arm in a legend whose points differ in m."""


def base_name(cell: Run) -> str:
    """The name of a cell's base optimizer."""
    return BASE_OPTIMIZERS[cell.base_optimizer]


def method_name(cell: Run) -> str:
    """The name of a cell's arm, with its base optimizer or its m."""
    return arm_of(cell).called(cell)
