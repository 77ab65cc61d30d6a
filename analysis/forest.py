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
        about = (row.where, row.what, _scale(row, runs), effect or "not run", int(row.n), row.verdict)
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


def _scale(row: Any, runs: pd.DataFrame) -> str:
    """What the runs of a comparison were trained on, or what was timed."""
    words = dict.fromkeys(_scales(runs.loc[[i for i in str(row.run_ids).split() if i in runs.index]]))
    return "; ".join(words)


def _scales(rows: pd.DataFrame) -> Iterator[str]:
    for row in rows.itertuples():
        if row.kind in ("train", "curvature"):
            examples = int(row.train_examples) if not pd.isna(row.train_examples) else None
            unit = "images" if is_images(row.dataset) else "texts"
            if examples is None:
                yield f"all {unit}, {row.epochs:g} epochs"
            else:
                steps = examples // int(row.batch_size) * int(row.epochs)
                yield f"{examples:,} {unit}, {steps:,} steps"
        elif row.kind == "cost":
            yield f"{row.epochs:g} rounds on {'a GPU' if row.device == 'cuda' else 'CPUs'}"
        else:
            yield "simulated"
