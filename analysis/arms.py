"""How the arms of a comparison are called and drawn, everywhere the same: what `runs/methods.py` declares."""

from experiments.harness.runs.methods import ARMS, BASE_OPTIMIZERS, arm_of
from experiments.harness.runs.spec import Run

METHODS = tuple(ARMS)
"""In the order of the tables' rows."""

COLOURS = {name: arm.colour for name, arm in ARMS.items()}
LINES = {name: arm.line for name, arm in ARMS.items()}
"""Of the arms, where lines have no marks."""
MARKS = {name: arm.mark for name, arm in ARMS.items()}
METHOD_WORDS = {name: arm.legend for name, arm in ARMS.items()}
"""Of arms whose m differs from point to point."""


def base_name(cell: Run) -> str:
    """What a cell's base optimizer is called."""
    return BASE_OPTIMIZERS[cell.base_optimizer]


def method_name(cell: Run) -> str:
    """What a cell's arm is called, with its base optimizer or its m."""
    return arm_of(cell).called(cell)
