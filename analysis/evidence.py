"""The verdict of a paired difference on a claim, for the claims of all exhibits."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis.cells import references, run_ids, scores
from analysis.exhibit import Comparison, Shown, Target
from analysis.statistics import Interval, bootstrap_interval, mean_interval, paired
from experiments.harness.runs.spec import Run

VERDICTS = ("supported", "not significant", "contradicted")
"""The verdicts with an interval; the others are `one seed` and `not run`."""


def of_scores(method: str, over: str, expected: int) -> Callable[[Target, pd.DataFrame, Shown], list[Comparison]]:
    """A claim's evidence: the scores of one method compared with those of another.

    Args:
        method: the method whose cells are compared.
        over: the column of `cells.references` with the cells that they are compared with.
        expected: the sign of the differences that the claim states.
    """

    def compare(target: Target, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        comparisons = []
        for cell, by_name in references(target.cells, target.varies).items():
            arm, reference = target.arms[cell], by_name.get(over)
            if arm.name == method and reference is not None:
                differences = paired(*(scores(c, runs, target.seeds) for c in (cell, reference)))
                where = f"{cell.model}, {cell.dataset}"
                what = f"{arm.called(cell)} over {target.arms[reference].called(reference)}"
                result = verdict(mean_interval(differences), expected)
                comparisons.append(
                    comparison(where, what, differences, result, ids_of((cell, reference), runs, target.seeds))
                )
        return comparisons

    return compare


def comparison(where: str, what: str, differences: np.ndarray, verdict: str, run_ids: str) -> Comparison:
    """A comparison from the differences of each seed, with the t and the bootstrap interval."""
    return Comparison(where, what, mean_interval(differences), bootstrap_interval(differences), verdict, run_ids)


def verdict(difference: Interval, expected: int) -> str:
    """The verdict on a claim that states this sign for the difference."""
    if difference.n < 2:
        return "one seed" if difference.n else "not run"
    if not difference.significant:
        return "not significant"
    return "supported" if difference.mean * expected > 0 else "contradicted"


def ids_of(cells: Sequence[Run], runs: pd.DataFrame, seeds: int) -> str:
    """The ids of the finished runs of some cells, as one string."""
    return " ".join(run_id for cell in cells for run_id in run_ids(cell, runs, seeds))
