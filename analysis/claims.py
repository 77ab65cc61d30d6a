"""Which claims of the paper's abstract hold in the runs that are there, each with the runs that say so.

A comparison supports a claim if its paired 95 % t interval leaves out zero on the claim's side, contradicts it if on
the other side, and else does not separate the two. Nothing is averaged over networks, data sets or profiles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.arms import method_name
from analysis.cells import references, run_ids, scores, values
from analysis.document import Document, significant
from analysis.exhibits.theory import PREDICTED_WITHIN
from analysis.frames import Results
from analysis.statistics import Interval, bootstrap_interval, mean_interval, paired
from experiments.harness.spec import Spec

Shown = Mapping[str, tuple[Sequence[Spec], int]]
"""Tables by name, each with its cells and its number of seeds."""

COST_WITHIN = 10.0
"""How many percent longer than SAM's step mSAM's may take to be no significant extra cost: a reading of the paper's
words that is ours alone."""

VERDICTS = ("supported", "not separated", "contradicted")
"""Beside `one seed`, which has no interval, and `not run`."""


@dataclass(frozen=True)
class Comparison:
    """One piece of evidence for or against a claim."""

    claim: str
    table: str
    where: str
    what: str
    difference: Interval
    bootstrap: tuple[float, float]
    verdict: str
    run_ids: str


class Claims(Document):
    """The summary; its comparisons are too many for a terminal."""

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """What is said of each claim; `committed` is not looked at."""
        return "\n".join([self.title, self.origin, *self.claims, "Each comparison is in tables/claims.md."])


def comparisons(results: Results, shown: Shown) -> list[Comparison]:
    """All comparisons that bear on a claim, claim by claim."""
    runs = results.runs.set_index("run_id")
    return [found for claim, make in CLAIMS.items() for found in make(claim, runs, shown)]


def document_claims(profile: str, results: Results, shown: Shown) -> Document:
    """The summary of the claims, ready to be written."""
    found = comparisons(results, shown)
    known = [name for name in ("table1", "table2", "table3", "table4", "theory") if name in shown]
    others = [name for name in shown if name not in known]
    beside = (
        f" The comparisons of {', '.join(others)} stand in their own tables and count in no claim." if others else ""
    )
    numbers = pd.DataFrame(
        [
            {
                "block": list(CLAIMS).index(c.claim),
                "claim": c.claim,
                "table": c.table,
                "where": c.where,
                "what": c.what,
                "difference": c.difference.mean,
                "half_width": c.difference.half_width,
                "n": c.difference.n,
                "bootstrap_low": c.bootstrap[0],
                "bootstrap_high": c.bootstrap[1],
                "verdict": c.verdict,
                "run_ids": c.run_ids,
            }
            for c in found
        ],
        columns=[
            *("block", "claim", "table", "where", "what", "difference", "half_width", "n"),
            *("bootstrap_low", "bootstrap_high", "verdict", "run_ids"),
        ],
    )
    floats = ["difference", "half_width", "bootstrap_low", "bootstrap_high"]
    numbers[floats] = numbers[floats].astype(float).map(lambda x: float(f"{x:.6g}") + 0.0)
    text = pd.DataFrame(
        {
            "claim": [c.claim for c in found],
            "table": [c.table for c in found],
            "where": [c.where for c in found],
            "difference": [c.what for c in found],
            "mean ± 95 % t (n)": [
                significant(Interval(row.difference, row.half_width, int(row.n)), signed=True)
                for row in numbers.itertuples()  # rounded once, as in the tables
            ],
            "95 % bootstrap": [_ends(c.bootstrap) for c in found],
            "verdict": [c.verdict for c in found],
        }
    )
    return Claims(
        name="claims",
        title=f"Which claims of the abstract hold (profile {profile})",
        origin=f"From the runs of {', '.join(known) or 'no table'} alone; none of another profile.{beside}",
        cells=text,
        claims=_told(found),
        notes=NOTES,
        numbers=numbers,
    )


def _told(found: Sequence[Comparison]) -> tuple[str, ...]:
    """A sentence on each claim that the tables bear on, and one on the others."""
    known = {claim: [c for c in found if c.claim == claim] for claim in CLAIMS}
    lines = [_in_all(claim, evidence) for claim, evidence in known.items() if evidence]
    lacking = [claim for claim, evidence in known.items() if not evidence]
    return (*lines, *([f"Not run, their tables are not among these: {'; '.join(lacking)}."] if lacking else []))


def _in_all(claim: str, found: Sequence[Comparison]) -> str:
    """One sentence on a claim."""
    ran = [c for c in found if c.verdict in VERDICTS]
    if not ran:
        return f"{claim}: {'one seed, no interval' if any(c.difference.n for c in found) else 'not run'}."
    counts = {verdict: sum(c.verdict == verdict for c in ran) for verdict in VERDICTS}
    for verdict, count in counts.items():
        if count == len(ran):
            return f"{claim}: {verdict} in {'all ' * (count > 1)}{count} comparison{'s' * (count > 1)}."
    told = ", ".join(f"{verdict} in {count}" for verdict, count in counts.items() if count)
    return f"{claim}: mixed, {told} of {len(ran)} comparisons."


def _paired(
    names: Sequence[str], method: str, over: str, expected: int
) -> Callable[[str, pd.DataFrame, Shown], list[Comparison]]:
    """Comparisons of one method with another in some tables."""

    def make(claim: str, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        found = []
        for name in names:
            cells, seeds = shown.get(name, ((), 0))
            for cell, others in references(cells).items():
                other = others[over]
                if cell.method != method or other is None:
                    continue
                both = paired(*(scores(c, runs, seeds) for c in (cell, other)))
                what = f"{method_name(cell)} over {method_name(other)}"
                found.append(
                    Comparison(
                        claim,
                        name,
                        f"{cell.model}, {cell.dataset}",
                        what,
                        mean_interval(both),
                        bootstrap_interval(both),
                        _verdict(mean_interval(both), expected),
                        _ids((cell, other), runs, seeds),
                    )
                )
        return found

    return make


def _cost(claim: str, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
    """mSAM's step over SAM's in the same run, at Table 1's number of micro-batches or the nearest that was timed."""
    cells, seeds = shown.get("table4", ((), 0))
    found = []
    for cell in cells:
        m = min(_usual_m(cell.model, shown), cell.micro_batches)
        for workers in dict.fromkeys((1, cell.workers)):
            more = 100 * (values(runs, cell, seeds, f"msam_m{m}_w{workers}_over_sam").to_numpy() - 1)
            interval = mean_interval(more)
            verdict = "not run" if not interval.n else "one seed" if interval.n == 1 else "not separated"
            if interval.mean + interval.half_width <= COST_WITHIN:
                verdict = "supported"
            elif interval.mean - interval.half_width > COST_WITHIN:
                verdict = "contradicted"
            where = f"{cell.model}, batch {cell.batch_size}" + (f", {workers} workers" if workers > 1 else "")
            what, ids = f"mSAM, m={m} over SAM, time of a step, percent", _ids((cell,), runs, seeds)
            found.append(Comparison(claim, "table4", where, what, interval, bootstrap_interval(more), verdict, ids))
    return found


def _usual_m(model: str, shown: Shown) -> int:
    """The number of micro-batches that Table 1 gives a model; 8 where it has none."""
    cells, _ = shown.get("table1", ((), 0))
    return next((cell.micro_batches for cell in cells if (cell.model, cell.method) == (model, "msam")), 8)


def _theory(normalised: bool) -> Callable[[str, pd.DataFrame, Shown], list[Comparison]]:
    """The simulated boundaries of mSAM over SAM's, and SAM's over descent's, with all data in each step.

    What the prediction itself may be off counts as no difference.
    """

    def make(claim: str, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        cells, seeds = shown.get("theory", ((), 0))
        cells = [c for c in cells if c.batch_size == c.examples and (not c.rho or c.normalised == normalised)]
        at = {(c.model, c.learning_rate, c.rho, c.method): c for c in cells}
        found = []
        for (model, learning_rate, rho, method), cell in at.items():
            reference = {"sam": (0.0, "base"), "msam": (rho, "sam")}.get(method)
            other = at.get((model, learning_rate, *reference)) if reference else None
            if other is None:
                continue
            mine, theirs = (np.log(scores(c, runs, seeds).astype(float)) for c in (cell, other))
            both = 100 * np.expm1(paired(mine, theirs))
            interval, ids = mean_interval(both), _ids((cell, other), runs, seeds)
            verdict = _verdict(interval, -1)
            if verdict in VERDICTS and abs(interval.mean) < 100 * PREDICTED_WITHIN:
                verdict = "not separated"
            where = f"{model}, eta {learning_rate:g}, rho {rho:g}"
            what = f"{method_name(cell)} over {method_name(other)}, largest stable sharpness, percent"
            found.append(Comparison(claim, "theory", where, what, interval, bootstrap_interval(both), verdict, ids))
        return found

    return make


def _verdict(difference: Interval, expected: int) -> str:
    if difference.n < 2:
        return "one seed" if difference.n else "not run"
    if not difference.separated:
        return "not separated"
    return "supported" if difference.mean * expected > 0 else "contradicted"


def _ids(cells: Sequence[Spec], runs: pd.DataFrame, seeds: int) -> str:
    """The finished runs of some cells."""
    return " ".join(run_id for cell in cells for run_id in run_ids(cell, runs, seeds))


def _ends(ends: tuple[float, float]) -> str:
    return "" if np.isnan(ends[0]) else f"{ends[0]:+.3g} to {ends[1]:+.3g}"


CLAIMS: dict[str, Callable[[str, pd.DataFrame, Shown], list[Comparison]]] = {
    "mSAM's test accuracy is better than SAM's": _paired(("table1", "table2"), "msam", "over_sam", 1),
    "mSAM's test accuracy is better than plain training's": _paired(("table1", "table2"), "msam", "over_base", 1),
    "(ours) ... and than that of plain gradients over the same micro-batches": _paired(
        ("table1", "table2"), "msam", "over_control", 1
    ),
    "SAM's test accuracy is better than plain training's": _paired(("table1", "table2"), "sam", "over_base", 1),
    "mSAM ends in flatter minima than SAM": _paired(("table3",), "msam", "over_sam", -1),
    "mSAM ends in flatter minima than plain training": _paired(("table3",), "msam", "over_base", -1),
    "SAM ends in flatter minima than plain training": _paired(("table3",), "sam", "over_base", -1),
    "(ours) mSAM ends in flatter minima than plain gradients over the same micro-batches": _paired(
        ("table3",), "msam", "over_control", -1
    ),
    "In simulations with unnormalised perturbations mSAM keeps only flatter minima than SAM, and SAM than descent": (
        _theory(normalised=False)
    ),
    "(ours) The same with normalised perturbations, as both methods are used": _theory(normalised=True),
    "mSAM costs not significantly more than SAM": _cost,
}

NOTES = (
    "Supported: the paired 95 % t interval leaves out zero on the claim's side; contradicted: on the other side; one "
    "comparison at a time. Accuracies in percentage points, flatness as the largest Hessian eigenvalue on training "
    "data, which is one measure of several: Table 3 has others, and they do not all agree with it. The bootstrap "
    "interval is that of the mean over the same seeds, and too narrow for a handful of them. Claims marked (ours) are "
    "not the abstract's: they tell mSAM's part from that of BatchNorm over micro-batches, and the method as it is used "
    "from the one that theory covers.",
    "Theory: largest stable sharpness in simulations with all data in each step; differences below "
    f"{PREDICTED_WITHIN:.0%} are taken for none, and settings of one simulation are no independent evidence "
    "(docs/theory.md). Cost: the claim is read as at most "
    f"{COST_WITHIN:g} percent more time than SAM's on as many workers, a number of ours; times are compared within "
    "each round, and the median over rounds is taken.",
)
