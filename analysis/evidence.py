"""The evidence on a declared contrast: the paired differences behind it, and the verdicts after Holm's adjustment."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.cells import run_ids, scores, values
from analysis.contrasts import ALPHA, LOGARITHM, Contrast
from analysis.exhibit import Claim, Comparison, Shown, Target
from analysis.statistics import bootstrap_interval, holm, mean_interval, paired
from experiments.harness.runs.spec import Run, in_percent

VERDICTS = ("supported", "equivalent", "inconclusive", "contradicted")
"""The verdicts with an interval; the others are `one seed` and `not run`."""

Evidence = Callable[[Target, pd.DataFrame, Shown], list[Comparison]]


def claim(contrast: Contrast, evidence: Evidence | None = None, place: int | None = None) -> Claim:
    """The claim that a contrast declares.

    Args:
        contrast: The declaration.
        evidence: Finds its comparisons; by default those of the scores, or the declared column, of the cells' runs.
        place: As in `Claim`.
    """
    return Claim(contrast, evidence or of_cells(contrast), place)


def of_cells(contrast: Contrast) -> Evidence:
    """A contrast's comparisons between the cells of a table, paired by seed."""

    def compare(target: Target, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        def measured(cell: Run) -> pd.Series:
            column = contrast.column
            by_seed = values(runs, cell, target.seeds, column) if column else scores(cell, runs, target.seeds)
            return 100 * np.log(by_seed) if contrast.scale == LOGARITHM else by_seed

        comparisons = []
        for cells in sides(target, contrast.arms):
            first, second, *others = (measured(cell) for cell in cells)
            differences = paired(first, second)
            if others:
                differences = paired((first - second).dropna(), (others[0] - others[1]).dropna())
            names = [target.arms[cell].called(cell) for cell in cells]
            what = f"{names[0]} over {names[1]}"
            if others:
                what = f"({names[0]} - {names[1]}) - ({names[2]} - {names[3]})"
            where = f"{cells[0].model}, {cells[0].dataset}"
            used = ids_of(cells, runs, target.seeds)
            comparisons.append(comparison(contrast, cells[0], (where, what), differences, used))
        return comparisons

    return compare


def sides(target: Target, arms: Sequence[str]) -> Iterator[tuple[Run, ...]]:
    """For each cell of the first arm, itself and the cells of the other arms that it is compared with, if all exist."""
    for cell, others in target.references.items():
        if target.arms[cell].name == arms[0]:
            cells = [cell, *(others.get(f"over_{name}") for name in arms[1:3])]
            if len(arms) == 4:
                third = cells[2]
                cells.append(target.references[third].get(f"over_{arms[3]}") if third else None)
            found = tuple(one for one in cells if one is not None)
            if len(found) == len(arms):
                yield found


def comparison(
    contrast: Contrast, cell: Run, words: tuple[str, str], differences: np.ndarray, run_ids: str
) -> Comparison:
    """A comparison, without its verdict, which depends on the others of its family.

    Args:
        contrast: What it is evidence on.
        cell: The cell of the first arm.
        words: Where it was measured, and what is compared.
        differences: One for each seed. Rounding errors are removed, so that equal scores differ by exactly zero.
        run_ids: The ids of the runs of all sides.
    """
    differences = np.round(differences, 9)
    difference = mean_interval(differences)
    points = contrast.margin is not None or in_percent(cell.score)
    primary = contrast.is_primary(cell.profile, cell.model, cell.dataset)
    return Comparison(
        *words,
        difference,
        bootstrap_interval(differences),
        run_ids=run_ids,
        p=difference.p_value(contrast.line),
        family="primary" if primary else contrast.family,
        primary=primary,
        margin=contrast.margin_in(cell.profile) if points else math.nan,
    )


def judged(evidence: Sequence[tuple[Claim, Comparison]]) -> list[Comparison]:
    """The comparisons with their adjusted p values and verdicts, in the same order.

    Args:
        evidence: All comparisons of a profile, each with its claim. Holm's adjustment is over those of a family that
            have a p value.
    """
    families: dict[str, list[int]] = defaultdict(list)
    for place, (_, one) in enumerate(evidence):
        families[one.family].append(place)
    adjusted = [math.nan] * len(evidence)
    for places in families.values():
        for place, p in zip(places, holm([evidence[i][1].p for i in places]), strict=True):
            adjusted[place] = p
    pairs = zip(evidence, adjusted, strict=True)
    return [replace(one, adjusted_p=p, verdict=_verdict(claim.contrast, one, p)) for (claim, one), p in pairs]


def _verdict(contrast: Contrast, one: Comparison, adjusted_p: float) -> str:
    if one.difference.n < 2:
        return "one seed" if one.difference.n else "not run"
    effect = one.difference.mean - contrast.line
    if adjusted_p < ALPHA and abs(effect) >= contrast.least:
        return "supported" if effect * contrast.expected > 0 else "contradicted"
    return "equivalent" if one.difference.equivalent(one.margin) else "inconclusive"


def ids_of(cells: Sequence[Run], runs: pd.DataFrame, seeds: int) -> str:
    """The ids of the finished runs of some cells, as one string."""
    return " ".join(run_id for cell in cells for run_id in run_ids(cell, runs, seeds))
