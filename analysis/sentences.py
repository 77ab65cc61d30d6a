"""The comparisons of arms that are printed under a table, one sentence for each block of its rows."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from analysis.cells import cells_in_order, interval, of_blocks
from analysis.contrasts import ALPHA
from analysis.exhibit import View
from analysis.statistics import Interval, holm
from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.spec import Run


def difference_in_words(difference: Interval, expected: int = 1, margin: float = math.nan) -> str:
    """A paired difference with its unadjusted interval, and how it is read.

    Args:
        difference: The difference.
        expected: The sign that the paper claims.
        margin: The margin of equivalence; NaN if none is declared.
    """
    if not difference.n:
        return "not run"
    if difference.n == 1:
        return f"{difference.mean:+z.2f} (n=1): one seed, no interval"
    size = f"{difference.mean:+z.2f} ± {difference.half_width:.2f} (n={difference.n})"
    if difference.significant:
        sign = "" if difference.mean * expected > 0 else ", and worse"
        return f"{size}: significant (unadjusted){sign}"
    return f"{size}: {'equivalent' if difference.equivalent(margin) else 'inconclusive'}"


def rows_of_cells(view: View) -> dict[Run, Any]:
    """The row of each cell of a table that begins with what `cells.compared` returns."""
    return dict(zip(cells_in_order(view.target.cells, view.target.varies), view.rows, strict=True))


def claimed_by_block(view: View) -> Iterator[tuple[str, list[tuple[Any, str, str]]]]:
    """For each block, its name and the comparisons that are printed under a table: row, other arm, and its label.

    The label is that of the very row that the differences in the columns `over_...` refer to.
    """
    rows = rows_of_cells(view)
    places = of_blocks(view.numbers)
    for number, block in groupby(rows.items(), key=lambda item: item[1].block):
        mine = list(block)
        pairs = [
            (row, name, rows[other].label)
            for cell, row in mine
            for name in ARMS[row.method].claimed
            if (other := view.target.references[cell].get(f"over_{name}")) is not None
        ]
        first = mine[0][1]
        yield f"{first.model}, {first.dataset}{places[number]}", pairs


def block_sentences(view: View, expected: int = 1, margin: float = math.nan) -> list[str]:
    """One sentence for each block on the differences of its arms, and one on what its seeds can detect.

    Args:
        view: The table.
        expected: the sign of the differences that the paper claims.
        margin: the margin of equivalence; NaN if none is declared.
    """
    lines = []
    for where, pairs in claimed_by_block(view):
        rows = Counter({row.Index: row.label for row, _, _ in pairs}.values())  # of equal labels
        parts, differences = [], []
        for row, other, label in pairs:
            name = f"{row.label}, rho {row.rho:g}" if rows[row.label] > 1 else row.label
            what = f"{name} over {label}"
            differences.append(interval(row, f"over_{other}"))
            parts.append(f"{what}: {difference_in_words(differences[-1], expected, margin)}")
        if parts:
            lines.append(f"{where}: {'; '.join(parts)}.{_detectable(differences)}")
    return lines


def _detectable(differences: Sequence[Interval]) -> str:
    """A sentence on the smallest differences that a block's seeds detect; empty without intervals."""
    sizes = sorted(one.detectable for one in differences if one.n > 1)
    counts = sorted({one.n for one in differences if one.n > 1})
    if not sizes:
        return ""
    seeds = " or ".join(map(str, counts))
    return f" The smallest difference that {seeds} seeds detect with 80 % power: {sizes[0]:.2f} to {sizes[-1]:.2f}."


def family_sentence(view: View) -> list[str]:
    """How many of the differences printed under a table stay significant if they are taken as one family."""
    pairs = [pair for _, of_block in claimed_by_block(view) for pair in of_block]
    differences = [one for row, other, _ in pairs if (one := interval(row, f"over_{other}")).n > 1]
    if not differences:
        return []
    before = sum(one.significant for one in differences)
    after = sum(p < ALPHA for p in holm([one.p_value() for one in differences]))
    return [
        f"The differences in the lines above as one family ({len(differences)}): {before} significant unadjusted, "
        f"{after} after Holm's adjustment. None counts for a claim."
    ]


def measure_sentences(view: View, measure: str, words: str, expected: int, margin: float = math.nan) -> list[str]:
    """One sentence for each block with values: the paired differences of a further measure.

    Args:
        view: A table with a column of `scores.compared_column`.
        measure: The name of that column.
        words: The measure in words.
        expected: The sign of the differences that the paper claims.
        margin: The margin of equivalence of the measure; NaN if none is declared.
    """
    lines = []
    for where, pairs in claimed_by_block(view):
        differences = [(row, label, interval(row, f"{measure}_over_{other}")) for row, other, label in pairs]
        if any(difference.n for _, _, difference in differences):
            parts = (
                f"{row.label} over {label}: {difference_in_words(one, expected, margin)}"
                for row, label, one in differences
            )
            lines.append(f"{where}, {words}: {'; '.join(parts)}.")
    return lines
