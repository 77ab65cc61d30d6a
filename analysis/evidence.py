"""How a paired difference bears on a claim, for the claims of all exhibits."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from analysis.arms import method_name
from analysis.cells import references, run_ids, scores
from analysis.exhibit import Comparison, Shown, Target
from analysis.statistics import Interval, bootstrap_interval, mean_interval, paired
from experiments.harness.runs.spec import Run

VERDICTS = ("supported", "not separated", "contradicted")
"""Beside `one seed`, which has no interval, and `not run`."""


def of_scores(method: str, over: str, expected: int) -> Callable[[Target, pd.DataFrame, Shown], list[Comparison]]:
    """The evidence of the scores of one method against those of another.

    Args:
        method: whose cells are compared.
        over: with what, as `cells.references` names it.
        expected: the sign that the claim gives the differences.
    """

    def compare(target: Target, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        found = []
        for cell, others in references(target.cells, target.varies).items():
            other = others.get(over)
            if cell.method == method and other is not None:
                both = paired(*(scores(c, runs, target.seeds) for c in (cell, other)))
                where, what = f"{cell.model}, {cell.dataset}", f"{method_name(cell)} over {method_name(other)}"
                said = verdict(mean_interval(both), expected)
                found.append(comparison(where, what, both, said, ids_of((cell, other), runs, target.seeds)))
        return found

    return compare


def comparison(where: str, what: str, differences: np.ndarray, said: str, run_ids: str) -> Comparison:
    """A comparison by the differences of its seeds, with both of their intervals."""
    return Comparison(where, what, mean_interval(differences), bootstrap_interval(differences), said, run_ids)


def verdict(difference: Interval, expected: int) -> str:
    """What a difference says of a claim that gives it this sign."""
    if difference.n < 2:
        return "one seed" if difference.n else "not run"
    if not difference.separated:
        return "not separated"
    return "supported" if difference.mean * expected > 0 else "contradicted"


def ids_of(cells: Sequence[Run], runs: pd.DataFrame, seeds: int) -> str:
    """The finished runs of some cells."""
    return " ".join(run_id for cell in cells for run_id in run_ids(cell, runs, seeds))
