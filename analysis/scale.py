"""How large the runs behind a comparison are, in words."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from experiments.harness.runs.facts import is_images


class Scale(NamedTuple):
    """What a run was trained on and for how long, or what was timed or simulated."""

    what: str
    epochs: str = ""
    steps: str = ""


def scales(runs: pd.DataFrame) -> dict[str, Scale]:
    """The scale of each run, by run_id.

    Args:
        runs: One row for each finished run.
    """
    columns = ["run_id", "kind", "dataset", "train_examples", "batch_size", "epochs", "device"]
    return {str(row.run_id): _of_run(row) for row in runs[columns].itertuples()}


def in_words(run_ids: Iterable[str], known: Mapping[str, Scale], *, with_epochs: bool = False) -> str:
    """The distinct scales of some runs: `1,024 images, 288 or 576 steps`.

    Args:
        run_ids: The runs; those that are not known are left out.
        known: From `scales`.
        with_epochs: Whether the epochs are named next to the steps.
    """
    lengths: dict[str, dict[str, None]] = {}
    for one in (known[run_id] for run_id in run_ids if run_id in known):
        length = ", ".join(filter(None, (one.epochs, one.steps))) if with_epochs else one.steps or one.epochs
        lengths.setdefault(one.what, {})[length] = None
    several = {what: list(words) if with_epochs else _unit_once(list(words)) for what, words in lengths.items()}
    return "; ".join(", ".join(filter(None, (what, " or ".join(words)))) for what, words in several.items())


def _of_run(row: Any) -> Scale:
    if row.kind == "cost":
        return Scale(f"{row.epochs:g} rounds on {'a GPU' if row.device == 'cuda' else 'CPUs'}")
    if row.kind not in ("train", "curvature"):
        return Scale("simulated")
    unit, epochs = "images" if is_images(row.dataset) else "texts", f"{row.epochs:g} epochs"
    if pd.isna(row.train_examples):
        return Scale(f"all {unit}", epochs)
    examples = int(row.train_examples)
    steps = examples // int(row.batch_size) * int(row.epochs)  # an incomplete last batch is left out
    return Scale(f"{examples:,} {unit}", epochs, f"{steps:,} steps")


def _unit_once(lengths: list[str]) -> list[str]:
    """The lengths with their unit at the last one only."""
    return [*(length.rpartition(" ")[0] for length in lengths[:-1]), lengths[-1]]
