"""The claims of the paper's abstract and ours, each with the comparisons for and against it and their runs.

Verdicts go by p values with Holm's adjustment over the comparisons of a family (`contrasts.FAMILIES`); an effect that
lies within the profile's margin is equivalent to none. Nothing is averaged over networks, data sets or profiles.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.contrasts import COST_WITHIN, FAMILIES, PREDICTED_WITHIN
from analysis.document import Document, three_digits
from analysis.evidence import VERDICTS, judged
from analysis.exhibit import Claim, Comparison, Shown
from analysis.exhibits import declared
from analysis.frames import Results
from analysis.statistics import Interval
from experiments.harness.runs import catalogue

NOTES = (
    "Intervals are unadjusted 95 % t intervals of differences paired by seed. Verdicts go by p, a two-sided paired t "
    "test, after Holm's adjustment over the family. Supported: the adjusted p is below 0.05 and the difference has the "
    "sign that the claim states; contradicted: the same with the opposite sign. Equivalent: neither, and the 90 % "
    "interval lies within the margin (two one-sided t tests at 5 %). Inconclusive: none of these. A supported effect "
    "may still be smaller than the margin.",
    "Accuracies are in percentage points. The bootstrap interval is for the mean over the same seeds; with few seeds "
    "it is too narrow. Claims marked (ours) are not in the abstract: they name what mSAM's effect consists of, or "
    "concern the method as used instead of the one that the theory covers.",
    "Flatness is compared by six measures of Table 3, each a comparison of its own: by the natural log of the ratio "
    "or, where that is said, by the difference. Cost: we read the claim as at most "
    f"{COST_WITHIN:g} percent more time than SAM on the same number of workers, so its intervals are compared with "
    f"{COST_WITHIN:g} percent instead of zero. Times are ratios within a round; the median over rounds is used.",
    "Theory: largest stable sharpness in simulations with all data in each step. These rows check theorems and are no "
    f"evidence about networks. Differences below {PREDICTED_WITHIN:.0%} count as none, and settings of one simulation "
    "are not independent (docs/theory.md).",
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
    """The evidence of all shown tables, claim by claim, with verdicts adjusted over the shown comparisons."""
    runs = results.runs.set_index("run_id")
    evidence: list[tuple[Claim, Comparison]] = [
        (claim, replace(one, claim=claim.text, table=exhibit.name))
        for exhibit in declared().values()
        if exhibit.name in shown
        for claim in exhibit.claims
        for one in claim.evidence(shown[exhibit.name], runs, shown)
    ]
    order = claims()
    return sorted(judged(evidence), key=lambda one: order.index(one.claim))


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
    rows: list[Any] = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "claim": [c.claim for c in evidence],
            "table": [c.table for c in evidence],
            "where": [c.where for c in evidence],
            "difference": [c.what for c in evidence],
            "mean ± 95 % t (n)": [
                three_digits(Interval(row.difference, row.half_width, int(row.n)), signed=True)
                for row in rows  # rounded once, as in the tables
            ],
            "95 % bootstrap": [_ends(c.bootstrap) for c in evidence],
            "p": [in_digits(row.p) for row in rows],
            "p, Holm": [in_digits(row.adjusted_p) for row in rows],
            "margin": ["" if math.isnan(c.margin) else f"{c.margin:g}" for c in evidence],
            "verdict": [c.verdict for c in evidence],
        }
    )
    return Claims(
        name="claims",
        title=f"Which claims of the abstract hold (profile {profile})",
        origin=f"From the runs of {', '.join(claiming) or 'no table'} in this profile only.{remark}",
        cells=text,
        claims=_sentences(evidence),
        notes=(*_families(evidence, profile), *_planned(evidence, profile), *NOTES),
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
                "p": c.p,
                "adjusted_p": c.adjusted_p,
                "family": c.family,
                "primary": c.primary,
                "margin": c.margin,
                "verdict": c.verdict,
                "run_ids": c.run_ids,
            }
            for c in evidence
        ],
        columns=[
            *("block", "claim", "table", "where", "what", "difference", "half_width", "n"),
            *("bootstrap_low", "bootstrap_high", "p", "adjusted_p", "family", "primary", "margin"),
            *("verdict", "run_ids"),
        ],
    )
    floats = ["difference", "half_width", "bootstrap_low", "bootstrap_high", "p", "adjusted_p", "margin"]
    numbers[floats] = numbers[floats].astype(float).map(lambda x: float(f"{x:.6g}") + 0.0)
    return numbers


def _families(evidence: Sequence[Comparison], profile: str) -> tuple[str, ...]:
    """A sentence on the primary comparison, and one with the number of comparisons of each other family."""
    primary = [c for c in evidence if c.primary]
    named = catalogue.primary(profile)
    if named is None:
        first = "No primary comparison is declared for this profile."
    else:
        about = f"{' over '.join(named.arms)}, {named.model} on {named.dataset}"
        verdict = ", ".join(c.verdict + interim(c.table, c.difference.n, profile) for c in primary) or "not run"
        first = f"The primary comparison, declared before its runs and in a family of its own: {about}: {verdict}."
    counts = Counter(c.family for c in evidence if c.difference.n > 1)
    parts = [f"{name} ({FAMILIES[name]}): {counts[name]}" for name in FAMILIES if counts[name] and name != "primary"]
    if not parts:
        return (first,)
    return first, f"Families of Holm's adjustment, with their comparisons that have run: {'; '.join(parts)}."


def interim(table: str, n: int, profile: str) -> str:
    """What follows the verdict of a comparison with fewer seeds than its table is to have; otherwise nothing."""
    planned = catalogue.published_seeds(table, profile)
    return f" (interim: {n} of {planned} seeds)" if 1 < n < planned else ""


def _planned(evidence: Sequence[Comparison], profile: str) -> tuple[str, ...]:
    """A sentence on the tables with comparisons that have fewer seeds than were planned."""
    early = [c.table for c in evidence if interim(c.table, c.difference.n, profile)]
    parts = [f"{table} {catalogue.published_seeds(table, profile)}" for table in dict.fromkeys(early)]
    if not parts:
        return ()
    return (
        f"Interim: {len(early)} comparisons have fewer seeds than were planned ({', '.join(parts)}). Their verdicts "
        "are those of a look before the end, which finds an effect by chance more often than p says; they count when "
        "all seeds have run.",
    )


def _sentences(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """A sentence on each claim with comparisons, and one that lists the claims without."""
    by_claim = {claim: [c for c in comparisons if c.claim == claim] for claim in claims()}
    judged = {claim: [c.verdict for c in evidence] for claim, evidence in by_claim.items() if evidence}
    lines = [f"{claim}: {sentence_of_verdicts(verdicts)}" for claim, verdicts in judged.items()]
    optional = {claim.text for exhibit in declared().values() for claim in exhibit.claims if claim.further}
    lacking = [claim for claim, evidence in by_claim.items() if not evidence and claim not in optional]
    return (*lines, *([f"Not run, because their tables are not included: {'; '.join(lacking)}."] if lacking else []))


def sentence_of_verdicts(verdicts: Sequence[str]) -> str:
    """The verdicts on a claim in words, such as "mixed, supported in 1, inconclusive in 2 of 3 comparisons"."""
    ran = [verdict for verdict in verdicts if verdict in VERDICTS]
    if not ran:
        return "one seed, no interval." if "one seed" in verdicts else "not run."
    counts = {verdict: ran.count(verdict) for verdict in VERDICTS}
    for verdict, count in counts.items():
        if count == len(ran):
            return f"{verdict} in {'all ' * (count > 1)}{count} comparison{'s' * (count > 1)}."
    parts = ", ".join(f"{verdict} in {count}" for verdict, count in counts.items() if count)
    missing = f"; {len(verdicts) - len(ran)} not run" if len(ran) < len(verdicts) else ""
    return f"mixed, {parts} of {len(ran)} comparisons{missing}."


def in_digits(p: float) -> str:
    """A p value with two significant digits; empty if there is none."""
    if math.isnan(p):
        return ""
    return "<0.0001" if p < 1e-4 else f"{p:.2g}"


def _ends(ends: tuple[float, float]) -> str:
    return "" if np.isnan(ends[0]) else f"{ends[0]:+.3g} to {ends[1]:+.3g}"
