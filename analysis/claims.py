"""Which claims of the paper's abstract hold in the runs that are there, each with the runs that say so.

A comparison supports a claim if its paired 95 % t interval leaves out zero on the claim's side, contradicts it if on
the other side, and else does not separate the two. Nothing is averaged over networks, data sets or profiles.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.document import Document, significant
from analysis.evidence import VERDICTS
from analysis.exhibit import Comparison, Shown
from analysis.exhibits import declared
from analysis.exhibits.table4 import COST_WITHIN
from analysis.exhibits.theory import PREDICTED_WITHIN
from analysis.frames import Results
from analysis.statistics import Interval

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


class Claims(Document):
    """The summary; its comparisons are too many for a terminal."""

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """What is said of each claim; `committed` is not looked at."""
        return "\n".join([self.title, self.origin, *self.claims, "Each comparison is in tables/claims.md."])


def claims() -> list[str]:
    """All claims that an exhibit bears on, in their order."""
    found = [
        (exhibit.place if claim.place is None else claim.place, claim.text)
        for exhibit in declared().values()
        for claim in exhibit.claims
    ]
    return list(dict.fromkeys(text for _, text in sorted(found, key=lambda one: one[0])))


def comparisons(results: Results, shown: Shown) -> list[Comparison]:
    """All comparisons that bear on a claim, claim by claim."""
    runs = results.runs.set_index("run_id")
    found = [
        replace(one, claim=claim.text, table=exhibit.name)
        for exhibit in declared().values()
        if exhibit.name in shown
        for claim in exhibit.claims
        for one in claim.evidence(shown[exhibit.name], runs, shown)
    ]
    order = claims()
    return sorted(found, key=lambda one: order.index(one.claim))


def document_claims(profile: str, results: Results, shown: Shown) -> Document:
    """The summary of the claims, ready to be written."""
    found = comparisons(results, shown)
    known = [exhibit.name for exhibit in declared().values() if exhibit.claims and exhibit.name in shown]
    others = [name for name in shown if name not in known]
    beside = (
        f" The comparisons of {', '.join(others)} stand in their own tables and count in no claim." if others else ""
    )
    numbers = _numbers(found)
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


def _numbers(found: Sequence[Comparison]) -> pd.DataFrame:
    """A row a comparison."""
    order = claims()
    numbers = pd.DataFrame(
        [
            {
                "block": order.index(c.claim),
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
    return numbers


def _told(found: Sequence[Comparison]) -> tuple[str, ...]:
    """A sentence on each claim that the tables bear on, and one on the others."""
    known = {claim: [c for c in found if c.claim == claim] for claim in claims()}
    lines = [_in_all(claim, evidence) for claim, evidence in known.items() if evidence]
    further = {claim.text for exhibit in declared().values() for claim in exhibit.claims if claim.further}
    lacking = [claim for claim, evidence in known.items() if not evidence and claim not in further]
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


def _ends(ends: tuple[float, float]) -> str:
    return "" if np.isnan(ends[0]) else f"{ends[0]:+.3g} to {ends[1]:+.3g}"
