"""The evidence on a declared contrast: the paired differences behind it, and the verdicts after Holm's adjustment."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.cells import run_ids, scores, values
from analysis.contrasts import ALPHA, DIFFERENCE, LOGARITHM, Contrast
from analysis.exhibit import Claim, Comparison, Shown, Target
from analysis.statistics import bootstrap_interval, holm, mean_interval
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
    """A contrast's comparisons between the cells of a table, paired by seed: one for each of its measures."""

    def compare(target: Target, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        comparisons = []
        for cells in sides(target, contrast.arms):
            names = [target.arms[cell].called(cell) for cell in cells]
            arms = f"{names[0]} over {names[1]}"
            if len(names) == 4:
                arms = f"({names[0]} - {names[1]}) - ({names[2]} - {names[3]})"
            where = f"{cells[0].model}, {cells[0].dataset}"
            used = ids_of(cells, runs, target.seeds)
            for measure in contrast.by_measure(cells[0].model, cells[0].profile):
                by_seed, log = differences(cells, runs, target.seeds, measure.column, measure.scale == LOGARITHM)
                what = f"{arms}, {measure.words}, {LOGARITHM if log else DIFFERENCE}" if measure.words else arms
                comparisons.append(comparison(contrast, cells[0], (where, what), by_seed, used))
        return comparisons

    return compare


def differences(
    cells: Sequence[Run], runs: pd.DataFrame, seeds: int, column: str = "", logarithmic: bool = False
) -> tuple[np.ndarray, bool]:
    """The differences of two cells, or of the differences of two pairs of cells, by seed.

    Args:
        cells: Two cells, or four.
        runs: The finished runs by id.
        seeds: The number of seeds.
        column: The number in the runs' summaries that is compared; by default the score, accuracies in percent.
        logarithmic: Whether natural logarithms are compared, provided that all values are positive.

    Returns:
        The differences at the seeds that all cells have, and whether they are differences of logarithms.
    """
    factor = 100 if in_percent(column) else 1
    by_seed = [factor * values(runs, cell, seeds, column) if column else scores(cell, runs, seeds) for cell in cells]
    common = sorted(set.intersection(*(set(one.index) for one in by_seed)))
    parts = [one.loc[common].to_numpy(dtype=float) for one in by_seed]
    logarithmic = logarithmic and all((part > 0).all() for part in parts)
    first, second, *others = map(np.log, parts) if logarithmic else parts
    return first - second - ((others[0] - others[1]) if others else 0.0), logarithmic


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
    differences = np.round(differences, 12)
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
