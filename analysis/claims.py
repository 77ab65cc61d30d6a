"""The claims of the paper's abstract, each with the comparisons for and against it and their runs.

A comparison supports a claim if its difference is significant (its paired 95 % t interval excludes zero) with the sign
that the claim states, and contradicts it if significant with the opposite sign. Nothing is averaged over networks, data
sets or profiles.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from analysis.document import Document, three_digits
from analysis.evidence import VERDICTS
from analysis.exhibit import Comparison, Shown
from analysis.exhibits import declared
from analysis.exhibits.table4 import COST_WITHIN
from analysis.exhibits.theory import PREDICTED_WITHIN
from analysis.frames import Results
from analysis.statistics import Interval

NOTES = (
    "Supported: the difference is significant (its paired 95 % t interval excludes zero) with the sign that the claim "
    "states; contradicted: significant with the opposite sign. Nothing is adjusted for the number of comparisons. "
    "Accuracies are in percentage points. Flatness is the largest Hessian eigenvalue on training data, one of several "
    "measures: Table 3 has others, and they do not all agree with it. The bootstrap interval is for the mean over the "
    "same seeds; with so few seeds it is too narrow. Claims marked (ours) are not in the abstract: they distinguish "
    "the effect of mSAM from that of BatchNorm over micro-batches, and the method as used from the one that the theory "
    "covers.",
    "Theory: largest stable sharpness in simulations with all data in each step. Differences below "
    f"{PREDICTED_WITHIN:.0%} count as not significant, and settings of one simulation are not independent evidence "
    "(docs/theory.md). Cost: we read the claim as at most "
    f"{COST_WITHIN:g} percent more time than SAM on the same number of workers, so its intervals are compared with "
    f"{COST_WITHIN:g} percent instead of zero. Times are ratios within a round; the median over rounds is used.",
)


class Claims(Document):
    """The summary of the claims. The terminal shows only the sentences: there are too many comparisons."""

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """The sentence on each claim; `committed` is ignored."""
        return "\n".join([self.title, self.origin, *self.claims, "All comparisons are in tables/claims.md."])


def claims() -> list[str]:
    """The claims of all exhibits, in order."""
    placed = [
        (exhibit.place if claim.place is None else claim.place, claim.text)
        for exhibit in declared().values()
        for claim in exhibit.claims
    ]
    return list(dict.fromkeys(text for _, text in sorted(placed, key=lambda pair: pair[0])))


def comparisons(results: Results, shown: Shown) -> list[Comparison]:
    """The evidence of all shown tables, claim by claim."""
    runs = results.runs.set_index("run_id")
    evidence = [
        replace(one, claim=claim.text, table=exhibit.name)
        for exhibit in declared().values()
        if exhibit.name in shown
        for claim in exhibit.claims
        for one in claim.evidence(shown[exhibit.name], runs, shown)
    ]
    order = claims()
    return sorted(evidence, key=lambda one: order.index(one.claim))


def document_claims(profile: str, results: Results, shown: Shown) -> Document:
    """The summary of the claims, ready to be written."""
    evidence = comparisons(results, shown)
    claiming = [exhibit.name for exhibit in declared().values() if exhibit.claims and exhibit.name in shown]
    unclaimed = [name for name in shown if name not in claiming]
    remark = (
        f" The comparisons of {', '.join(unclaimed)} are in their own tables and count for no claim."
        if unclaimed
        else ""
    )
    numbers = _numbers(evidence)
    text = pd.DataFrame(
        {
            "claim": [c.claim for c in evidence],
            "table": [c.table for c in evidence],
            "where": [c.where for c in evidence],
            "difference": [c.what for c in evidence],
            "mean ± 95 % t (n)": [
                three_digits(Interval(row.difference, row.half_width, int(row.n)), signed=True)
                for row in numbers.itertuples()  # rounded once, as in the tables
            ],
            "95 % bootstrap": [_ends(c.bootstrap) for c in evidence],
            "verdict": [c.verdict for c in evidence],
        }
    )
    return Claims(
        name="claims",
        title=f"Which claims of the abstract hold (profile {profile})",
        origin=f"From the runs of {', '.join(claiming) or 'no table'} in this profile only.{remark}",
        cells=text,
        claims=_sentences(evidence),
        notes=NOTES,
        numbers=numbers,
    )


def _numbers(evidence: Sequence[Comparison]) -> pd.DataFrame:
    """One row for each comparison. Claims without any do not count in the blocks' numbers."""
    order = list(dict.fromkeys(c.claim for c in evidence))
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
            for c in evidence
        ],
        columns=[
            *("block", "claim", "table", "where", "what", "difference", "half_width", "n"),
            *("bootstrap_low", "bootstrap_high", "verdict", "run_ids"),
        ],
    )
    floats = ["difference", "half_width", "bootstrap_low", "bootstrap_high"]
    numbers[floats] = numbers[floats].astype(float).map(lambda x: float(f"{x:.6g}") + 0.0)
    return numbers


def _sentences(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """A sentence on each claim with comparisons, and one that lists the claims without."""
    by_claim = {claim: [c for c in comparisons if c.claim == claim] for claim in claims()}
    lines = [_sentence(claim, evidence) for claim, evidence in by_claim.items() if evidence]
    optional = {claim.text for exhibit in declared().values() for claim in exhibit.claims if claim.further}
    lacking = [claim for claim, evidence in by_claim.items() if not evidence and claim not in optional]
    return (*lines, *([f"Not run, because their tables are not included: {'; '.join(lacking)}."] if lacking else []))


def _sentence(claim: str, evidence: Sequence[Comparison]) -> str:
    """The verdicts on a claim in one sentence."""
    ran = [c for c in evidence if c.verdict in VERDICTS]
    if not ran:
        return f"{claim}: {'one seed, no interval' if any(c.difference.n for c in evidence) else 'not run'}."
    counts = {verdict: sum(c.verdict == verdict for c in ran) for verdict in VERDICTS}
    for verdict, count in counts.items():
        if count == len(ran):
            return f"{claim}: {verdict} in {'all ' * (count > 1)}{count} comparison{'s' * (count > 1)}."
    parts = ", ".join(f"{verdict} in {count}" for verdict, count in counts.items() if count)
    return f"{claim}: mixed, {parts} of {len(ran)} comparisons."


def _ends(ends: tuple[float, float]) -> str:
    return "" if np.isnan(ends[0]) else f"{ends[0]:+.3g} to {ends[1]:+.3g}"
