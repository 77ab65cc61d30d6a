"""One page a claim: verdict, effects, scale, hardware, cost, runs, how to run it again, and what would change it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.cells import machines
from analysis.claims import in_digits, interim, sentence_of_verdicts
from analysis.contrasts import ALPHA, Contrast
from analysis.document import listed, markdown_table, markdown_text, three_digits
from analysis.evidence import VERDICTS
from analysis.exhibit import Target
from analysis.exhibits import declared
from analysis.scale import Scale, in_words, scales
from analysis.statistics import LARGEST, Interval, paired_difference

LONG = 12
"""With more comparisons, only a sentence for all says what would change the verdict."""

SETTINGS = {"rho": "rho", "micro_batches": "m", "epochs": "epochs", "learning_rate": "learning rate"}
"""Settings that may differ between arms besides the method itself, in words."""


ARM = ("method", "shared", *SETTINGS)
"""What tells the runs of two arms apart."""

MEASURES_OF_FLATNESS = (
    "Lambda 1 is the largest eigenvalue of the loss's Hessian, the trace that of the Hessian. Sharpness is the rise of "
    "the loss at a fixed distance from the weights: the largest that ascent finds, the average over random directions, "
    "or the mean over micro-batches, each in its own direction. All but lambda 1 on test data are of training data. A "
    "network at a higher training loss may be flatter for that reason alone."
)


@dataclass(frozen=True)
class ClaimRow:
    """One comparison of a claim."""

    where: str
    what: str
    effect: str
    """With its unadjusted 95 % interval and n."""
    p: str
    adjusted_p: str
    family: str
    """With its number of comparisons."""
    margin: str
    verdict: str
    scale: str
    change: str
    """What would change the verdict."""


@dataclass(frozen=True)
class ClaimPage:
    """All that is to be said about one claim."""

    name: str
    """Its short name: of its file, and for `python -m analysis judge`."""
    claim: str
    verdict: str
    rows: tuple[ClaimRow, ...]
    text: Mapping[str, tuple[str, ...]]
    """Sentences by heading, in order."""
    commands: tuple[str, ...]
    """What runs it again; the last recomputes the verdict from runs.csv alone."""
    run_ids: tuple[str, ...]

    def markdown(self) -> str:
        """The page as Markdown."""
        cells = pd.DataFrame(
            {
                "where": [row.where for row in self.rows],
                "difference": [row.what for row in self.rows],
                "mean ± 95 % t (n)": [row.effect for row in self.rows],
                "p": [row.p for row in self.rows],
                "p, Holm": [row.adjusted_p for row in self.rows],
                "family (comparisons)": [row.family for row in self.rows],
                "margin": [row.margin for row in self.rows],
                "verdict": [row.verdict for row in self.rows],
                "scale": [row.scale for row in self.rows],
            }
        )
        parts = [f"# {markdown_text(self.claim)}", f"**Verdict:** {markdown_text(self.verdict)}", markdown_table(cells)]
        for heading, sentences in self.text.items():
            lines = list(map(markdown_text, sentences))
            parts += [f"## {heading}", "\n".join(f"- {line}" for line in lines) if len(lines) > 1 else lines[0]]
        parts += ["## Run it again", "\n".join(f"- `{command}`" for command in self.commands)]
        parts.append("The last command recomputes the verdict from runs.csv alone.")
        ids = ", ".join(self.run_ids)
        parts += ["## Runs", f"{len(self.run_ids)} rows of [runs.csv](../runs.csv): {ids}."]
        return "\n\n".join(parts) + "\n"


def claim_pages(numbers: pd.DataFrame, runs: pd.DataFrame, targets: Iterable[Target]) -> list[ClaimPage]:
    """The pages of all claims with comparisons, in order.

    Args:
        numbers: The numbers of the document of the claims.
        runs: One row for each finished run.
        targets: The tables that the claims are tested by.
    """
    known = {claim.text: claim.contrast for exhibit in declared().values() for claim in exhibit.claims}
    by_id, by_name = runs.set_index("run_id"), {target.name: target for target in targets}
    families = numbers.loc[numbers["p"].notna(), "family"].value_counts().to_dict()
    return [
        _page(known[str(text)], list(rows.itertuples()), by_id, by_name, families)
        for text, rows in numbers.groupby("claim", sort=False)
        if str(text) in known
    ]


def page_files(pages: Iterable[ClaimPage]) -> dict[str, str]:
    """The pages as Markdown, by path below a results folder."""
    return {f"claims/{page.name}.md": page.markdown() for page in pages}


def _page(
    contrast: Contrast,
    rows: Sequence[Any],
    runs: pd.DataFrame,
    targets: Mapping[str, Target],
    families: Mapping[str, int],
) -> ClaimPage:
    ids = tuple(dict.fromkeys(run_id for row in rows for run_id in _ids(row, runs)))
    used = runs.loc[list(ids)]
    about = [f"What the comparison isolates: {contrast.isolates}."]
    if contrast.family == "theory":
        about.insert(0, "A theorem checked by simulation: no evidence about networks.")
    about.append(f"Effects are in {contrast.unit}; intervals are unadjusted, verdicts go by p after Holm's adjustment.")
    if contrast.line:
        about.append(f"The p values are those of a difference from {contrast.line:g} instead of zero.")
    arms = used.loc[used["kind"].isin(("train", "curvature")), list(ARM)]
    if contrast.family == "flatness":
        about.append(MEASURES_OF_FLATNESS)
    for where, row in {row.where: row for row in rows}.items():
        if ids_of_arms := [run_id for run_id in _ids(row, runs) if run_id in arms.index]:
            loss = _training_loss(used.loc[ids_of_arms]) if contrast.family == "flatness" else ""
            about.append(f"{where}: {_settings(arms.loc[ids_of_arms])}{loss}.")
    text = {
        "What is compared": tuple(about),
        "Hardware and cost": (*machines(used), _cost(used)),
        "What would change the verdict": tuple(_changes(contrast, rows)),
    }
    sizes = scales(used.reset_index())
    lines = tuple(_row(contrast, row, runs, sizes, families) for row in rows)
    verdict = sentence_of_verdicts([row.verdict for row in rows])
    return ClaimPage(contrast.name, contrast.text, verdict, lines, text, _commands(contrast, rows, targets), ids)


def _row(
    contrast: Contrast, row: Any, runs: pd.DataFrame, sizes: Mapping[str, Scale], families: Mapping[str, int]
) -> ClaimRow:
    profiles = runs.loc[_ids(row, runs)[:1], "profile"]
    early = "".join(interim(row.table, int(row.n), profile) for profile in profiles)
    return ClaimRow(
        where=row.where,
        what=row.what,
        effect=three_digits(_interval(row), signed=True) or "not run",
        p=in_digits(row.p),
        adjusted_p=in_digits(row.adjusted_p),
        family=f"{row.family} ({families.get(row.family, 0)})",
        margin="" if math.isnan(row.margin) else f"{row.margin:g}",
        verdict=f"{row.verdict}{', primary comparison' if row.primary else ''}{early}",
        scale=_scale(row, runs, sizes),
        change=_change(contrast, row),
    )


def _interval(row: Any) -> Interval:
    return Interval(row.difference, row.half_width, int(row.n))


def _ids(row: Any, runs: pd.DataFrame) -> list[str]:
    return [run_id for run_id in ("" if pd.isna(row.run_ids) else str(row.run_ids)).split() if run_id in runs.index]


def _settings(runs: pd.DataFrame) -> str:
    """In which settings the arms of a comparison differ, besides their method, with their values in the arms' order."""
    arms = runs.drop_duplicates()
    different = {name: words for name, words in SETTINGS.items() if arms[name].nunique() > 1}
    if not different:
        return f"the arms have the same {listed(SETTINGS.values())}"
    return f"the arms differ in {listed(f'{words} ({_values(arms[name])})' for name, words in different.items())}"


def _training_loss(runs: pd.DataFrame) -> str:
    """The paired difference in training loss of the two arms that these runs are of, first minus second."""
    arms = [of_arm.set_index("seed") for _, of_arm in runs.groupby(list(ARM), sort=False, dropna=False)]
    if len(arms) != 2 or "train_loss" not in runs:
        return ""
    difference = three_digits(paired_difference(arms[0]["train_loss"], arms[1]["train_loss"]), signed=True)
    return f"; difference of training loss {difference}"


def _values(numbers: pd.Series) -> str:
    return listed(f"{number:g}" for number in numbers)


def _scale(row: Any, runs: pd.DataFrame, sizes: Mapping[str, Scale]) -> str:
    """What the runs of a comparison were trained on, for how long, and with how many parameters."""
    ids = _ids(row, runs)
    parameters = runs.loc[ids, "parameters"].dropna().unique() if "parameters" in runs else ()
    trained = in_words(ids, sizes, with_epochs=True)
    return "; ".join(filter(None, (trained, *(f"{int(number):,} parameters" for number in parameters))))


def _cost(rows: pd.DataFrame) -> str:
    """How long the runs took."""
    hours = float((rows["wall_seconds"].fillna(0) * rows["threads"] * rows["workers"]).sum()) / 3600
    unit = "GPU-hours" if (rows["device"] == "cuda").any() else "core-hours"
    seeds = rows["seed"].nunique()
    words = f"{len(rows)} runs at {seeds} seed{'s' if seeds != 1 else ''}, {hours:.2g} {unit}"
    trained = (rows["kind"] == "curvature").any()
    return f"{words}{', without training the networks that they measure' if trained else ''}."


def _commands(contrast: Contrast, rows: Sequence[Any], targets: Mapping[str, Target]) -> tuple[str, ...]:
    """The commands that make the runs and the verdict."""
    used = [targets[table] for table in dict.fromkeys(str(row.table) for row in rows) if table in targets]
    where = f" --profile {used[0].cells[0].profile}" if used else ""
    return *(target.command for target in used), f"python -m analysis judge {contrast.name}{where}"


def _changes(contrast: Contrast, rows: Sequence[Any]) -> list[str]:
    if contrast.family == "theory":
        return ["A simulated boundary that lies farther from its prediction than the tolerance (docs/theory.md)."]
    if len(rows) <= LONG:
        return [f"{row.where}{_measure(row)}: {_change(contrast, row)}" for row in rows]
    return [
        f"A supported or contradicted comparison: an adjusted p of {ALPHA} or more on further seeds. An inconclusive "
        "one: more seeds."
    ]


def _measure(row: Any) -> str:
    """The measure of a comparison that says which."""
    return f" ({', '.join(str(row.what).split(', ')[-2:])})" if row.table == "table3" else ""


def _change(contrast: Contrast, row: Any) -> str:
    """What would change the verdict on a comparison."""
    difference = _interval(row)
    if row.verdict not in VERDICTS:
        return "two seeds or more; with fewer there is no interval."
    seen = f"{difference.n} seeds with this spread detect {difference.detectable:.3g} with 80 % power, unadjusted"
    if row.verdict in ("supported", "contradicted"):
        small = "; the effect may be smaller than the margin" if difference.equivalent(row.margin) else ""
        return f"an adjusted p of {ALPHA} or more on further seeds (now {in_digits(row.adjusted_p)}){small}. {seen}."
    if row.verdict == "equivalent":
        half = difference.equivalence_half_width
        low, high = difference.mean - half, difference.mean + half
        return (
            f"a 90 % interval that leaves the margin of {row.margin:g} (now {low:+.3g} to {high:+.3g}), or an adjusted "
            f"p below {ALPHA}. {seen}."
        )
    shifted = Interval(difference.mean - contrast.line, difference.half_width, difference.n)
    needed = shifted.needed
    if needed is not None and needed <= difference.n:
        return f"more seeds. {seen}: less than the effect seen, which the adjustment leaves open."
    more = f"more than {LARGEST:,}" if needed is None else f"about {needed}"
    return f"more seeds. {seen}; {more} would detect the effect seen."
