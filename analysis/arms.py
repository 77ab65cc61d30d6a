"""How the arms of a comparison are called and drawn, everywhere the same."""

from experiments.harness.runs.spec import METHODS, Spec

_BASE = {"sgd": "SGD", "adamw": "AdamW"}

COLOURS = dict(zip(METHODS, ("#262626", "#b3b3ec", "#d98c26", "#1b7837"), strict=True))
"""Of the methods, everywhere: apart for the colour-blind, and from dark to light base, mSAM, SAM, control."""

LINES = dict(zip(METHODS, ("-", ":", "--", "-."), strict=True))
"""Of the methods, where lines have no marks."""

METHOD_WORDS = {"base": "{base}", "control": "{base} over micro-batches", "sam": "SAM", "msam": "mSAM"}
"""Of methods whose m differs from point to point."""

MARKS = dict(zip(METHODS, ("o", "v", "s", "D"), strict=True))


def base_name(cell: Spec) -> str:
    """What a cell's base optimizer is called."""
    return _BASE[cell.base_optimizer]


def method_name(cell: Spec) -> str:
    """What a method is called, with its base optimizer or its m."""
    base = base_name(cell)
    return {
        "base": base,
        "control": f"{base}, m={cell.micro_batches} micro-batches",
        "sam": "SAM",
        "msam": f"mSAM, m={cell.micro_batches}",
    }[cell.method]
