"""The claims as a forest plot: for each, the effects with their intervals on one axis, with verdict, n and scale."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.document import three_digits
from analysis.exhibit import Claim
from analysis.exhibits import declared
from analysis.statistics import Interval
from experiments.harness.runs.facts import is_images

LONG = 12
"""A claim with more comparisons is folded."""


@dataclass(frozen=True)
class Row:
    """One comparison; positions are percentages of the axis' width."""

    where: str
    what: str
    scale: str
    effect: str
    n: int
    verdict: str
    middle: float | None = None
    """None if the comparison was not run."""
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Panel:
    """A claim and its comparisons."""

    claim: str
    axis: str
    """What is drawn, and on which side of the line it supports the claim."""
    line: float
    """The position of the line that the intervals are compared with."""
    ticks: tuple[tuple[float, str], ...]
    rows: tuple[Row, ...]

    @property
    def folded(self) -> bool:
        """Whether it has so many comparisons that they are shown on request."""
        return len(self.rows) > LONG


def panels(numbers: pd.DataFrame, runs: pd.DataFrame) -> list[Panel]:
    """A panel for each claim with comparisons.

    Args:
        numbers: The numbers of the document of the claims.
        runs: One row for each finished run.
    """
    known = {claim.text: claim for exhibit in declared().values() for claim in exhibit.claims}
    by_id = runs.set_index("run_id")
    return [
        _panel(known[str(text)], list(rows.itertuples()), by_id)
        for text, rows in numbers.groupby("claim", sort=False)
        if str(text) in known
    ]


def _panel(claim: Claim, rows: Sequence[Any], runs: pd.DataFrame) -> Panel:
    ends = [claim.line, *(end for row in rows for end in _ends(row))]
    ticks = _ticks(min(ends), max(ends))
    low, high = min([*ends, *ticks]), max([*ends, *ticks])
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / span, 2)

    drawn = []
    for row in rows:
        effect = three_digits(Interval(row.difference, row.half_width, int(row.n)), signed=True).partition(" (")[0]
        about = (row.where, row.what, scale(row, runs), effect or "not run", int(row.n), row.verdict)
        drawn.append(Row(*about, place(row.difference), *map(place, _ends(row))) if row.n else Row(*about))
    side = "right" if claim.expected > 0 else "left"
    axis = f"{claim.unit}; an interval wholly to the {side} of the line at {claim.line:g} supports the claim"
    return Panel(claim.text, axis, place(claim.line), tuple((place(t), f"{t:g}") for t in ticks), tuple(drawn))


def _ends(row: Any) -> list[float]:
    """The ends of a comparison's interval; twice its value if it has no interval."""
    if not row.n:
        return []
    half = 0.0 if math.isnan(row.half_width) else row.half_width
    return [row.difference - half, row.difference + half]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within an axis."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (5, 2, 1, 0.5) if (high - low) / (factor * step) >= 3)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scale(row: Any, runs: pd.DataFrame) -> str:
    """What the runs of a comparison were trained on, or what was timed.

    Args:
        row: A comparison, a row of the claims' numbers.
        runs: The finished runs by id.
    """
    rows = runs.loc[[run_id for run_id in str(row.run_ids).split() if run_id in runs.index]]
    lengths: dict[str, list[str]] = {}
    for what, length in _scales(rows):
        lengths[what] = [*lengths.get(what, ()), *([length] if length not in lengths.get(what, ()) else [])]
    return "; ".join(", ".join(filter(None, (what, " or ".join(several)))) for what, several in lengths.items())


def _scales(rows: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """For each run, what it was trained on, and for how long."""
    for row in rows.itertuples():
        if row.kind in ("train", "curvature"):
            unit = "images" if is_images(row.dataset) else "texts"
            if pd.isna(row.train_examples):
                yield f"all {unit}", f"{row.epochs:g} epochs"
            else:
                examples = int(row.train_examples)
                yield f"{examples:,} {unit}", f"{examples // int(row.batch_size) * int(row.epochs):,} steps"
        elif row.kind == "cost":
            yield f"{row.epochs:g} rounds on {'a GPU' if row.device == 'cuda' else 'CPUs'}", ""
        else:
            yield "simulated", ""
