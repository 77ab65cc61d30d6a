"""The claims as a forest plot: for each, the effects with their intervals on one axis, with verdict, n and scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.claims import in_digits, interim
from analysis.contrasts import LOGARITHM, Contrast
from analysis.document import three_digits
from analysis.exhibits import declared
from analysis.flatness import as_ratio
from analysis.scale import Scale, in_words, scales
from analysis.statistics import Interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.methods import ARMS

LONG = 12
"""A claim with more comparisons is folded."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; positions are percentages of the axis' width."""

    where: str
    what: str
    scale: str
    effect: str
    n: int
    verdict: str
    p: str
    """After Holm's adjustment; empty without an interval."""
    primary: bool
    middle: float | None = None
    """None if the comparison was not run, or has another unit than the axis."""
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Panel:
    """A claim and its comparisons."""

    name: str
    """The short name of the claim."""
    claim: str
    isolates: str
    """What the compared runs differ in."""
    axis: str
    """What is drawn, and on which side of the line it supports the claim."""
    line: float
    """The position of the line that the intervals are compared with."""
    band: tuple[float, float] | None
    """The ends of the margin of equivalence; None if none is declared."""
    ticks: tuple[tuple[float, str], ...]
    rows: tuple[Row, ...]

    @property
    def folded(self) -> bool:
        """Whether it has so many comparisons that they are shown on request."""
        return len(self.rows) > LONG


def panels(numbers: pd.DataFrame, runs: pd.DataFrame) -> list[Panel]:
    """A panel for each claim with comparisons; the primary comparison comes first.

    Args:
        numbers: The numbers of the document of the claims.
        runs: One row for each finished run.
    """
    known = {claim.text: claim.contrast for exhibit in declared().values() for claim in exhibit.claims}
    sizes = scales(runs)
    groups = [(str(text), list(rows.itertuples())) for text, rows in numbers.groupby("claim", sort=False)]
    groups.sort(key=lambda group: not any(row.primary for row in group[1]))
    return [_panel(known[text], rows, sizes) for text, rows in groups if text in known]


def opening(numbers: pd.DataFrame, runs: pd.DataFrame, profile: str) -> list[str]:
    """What the results of a profile begin with: the scale of the trainings, and then the primary comparison.

    Args:
        numbers: The numbers of the document of the claims.
        runs: One row for each finished run.
        profile: The profile of the results.
    """
    sizes, networks = scales(runs), dict[str, str]()
    rows: list[Any] = list(numbers[numbers["family"].isin(("primary", "accuracy")) & (numbers["n"] > 0)].itertuples())
    for row in rows:
        words = in_words(str(row.run_ids).split(), sizes)
        networks[row.where] = min(networks.get(row.where, words), words, key=len)
    by_scale: dict[str, list[str]] = {}
    for where, words in networks.items():
        by_scale.setdefault(words, []).append(where.replace(", ", " on "))
    lines = []
    if by_scale:
        parts = "; ".join(f"{', '.join(several)}: {words}" for words, several in by_scale.items())
        lines.append(f"Scale of the trainings: {parts}. The verdicts hold at this scale only.")
    if named := catalogue.primary(profile):
        about = f"{' over '.join(ARMS[arm].legend for arm in named.arms)}, {named.model} on {named.dataset}"
        words = "; ".join(_in_words(row) + interim(row.table, int(row.n), profile) for row in rows if row.primary)
        words = words or "not run"
        lines.append(f"Primary comparison, declared before its runs: {about}: {words}.")
    return lines


def _in_words(row: Any) -> str:
    """The effect and the verdict of a comparison."""
    effect = three_digits(Interval(row.difference, row.half_width, int(row.n)), signed=True)
    return f"{effect} points, {row.verdict}" + (f" (p {in_digits(row.adjusted_p)})" if row.n > 1 else "")


def _panel(contrast: Contrast, rows: Sequence[Any], sizes: Mapping[str, Scale]) -> Panel:
    drawn = [row for row in rows if row.n and not (contrast.measures and _by_difference(row))]
    margin = next((float(row.margin) for row in drawn if not math.isnan(row.margin)), math.nan)
    band = [] if math.isnan(margin) else [-margin, margin]
    ends = [contrast.line, *band, *(end for row in drawn for end in _ends(row))]
    ticks = _ratio_ticks(min(ends), max(ends)) if contrast.measures else _ticks(min(ends), max(ends))
    low, high = min([*ends, *ticks]), max([*ends, *ticks])
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(2 + 96 * (value - low) / span, 2)

    lines, placed = [], {row.Index for row in drawn}
    for row in sorted(rows, key=lambda row: not row.primary):
        at = zip(("middle", "low", "high"), map(place, (row.difference, *_ends(row))), strict=True)
        lines.append(Row(**_about(contrast, row, sizes) | (dict(at) if row.Index in placed else {})))
    return Panel(
        name=contrast.name,
        claim=contrast.text,
        isolates=contrast.isolates,
        axis=_axis(contrast),
        line=place(contrast.line),
        band=(place(-margin), place(margin)) if band else None,
        ticks=tuple((place(t), f"x{math.exp(t):.3g}" if contrast.measures else f"{t:g}") for t in ticks),
        rows=tuple(lines),
    )


def _about(contrast: Contrast, row: Any, sizes: Mapping[str, Scale]) -> dict[str, Any]:
    """The words of a comparison."""
    difference = Interval(row.difference, row.half_width, int(row.n))
    log = contrast.measures and not _by_difference(row)
    effect = as_ratio(difference) if log else three_digits(difference, signed=True).partition(" (")[0]
    return {
        "where": row.where,
        "what": row.what,
        "scale": in_words(str(row.run_ids).split(), sizes),
        "effect": effect or "not run",
        "n": int(row.n),
        "verdict": row.verdict,
        "p": in_digits(row.adjusted_p),
        "primary": bool(row.primary),
    }


def _axis(contrast: Contrast) -> str:
    """What is drawn, and on which side of the line an interval supports the claim."""
    side, line = "right" if contrast.expected > 0 else "left", f"{contrast.line:g}"
    unit = contrast.unit
    if contrast.measures:
        unit, line = "ratio on a log scale; differences are not drawn", "x1"
    return f"{unit}; an interval wholly to the {side} of the line at {line} supports the claim, before adjustment"


def _by_difference(row: Any) -> bool:
    """Whether a measure of flatness was compared by its differences instead of its logarithms."""
    return not str(row.what).endswith(LOGARITHM)


def _ends(row: Any) -> list[float]:
    """The ends of a comparison's interval; twice its value if it has no interval."""
    if not row.n:
        return []
    half = 0.0 if math.isnan(row.half_width) else row.half_width
    return [row.difference - half, row.difference + half]


def _ratio_ticks(low: float, high: float) -> list[float]:
    """The logarithms of three or more round ratios within an axis, or as many as there are."""
    within = [0.0]
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.1, 1.2, 1.5, 2, 3, 5, 7, 8, 9)):
        logs = [math.log(factor * 10.0**power) for power in range(-6, 7) for factor in factors]
        within = [log for log in logs if low <= log <= high]
        if len(within) >= 3:
            break
    return within


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within an axis."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (5, 2, 1, 0.5) if (high - low) / (factor * step) >= 3)
    return [round(step * k, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
