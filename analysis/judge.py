"""python -m analysis judge: the verdict on a claim, worked out of runs.csv alone.

This is a second way to every verdict. It shares the declarations with the tables (the catalogue of runs, the arms, the
contrasts of the claims) and no other code: it reads the CSV itself, and computes t tests, Holm's adjustment and
equivalence from their formulas.
"""

import csv
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy import special, stats
from tyro.conf import FlagCreatePairsOff, Positional, arg

from analysis.contrasts import ALL, ALPHA, FAMILIES, LOGARITHM, RATIO, STEP, Contrast, usual_m
from experiments.harness.runs import catalogue
from experiments.harness.runs.checks import unknown
from experiments.harness.runs.command_line import end_with
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.methods import arm_of, arms_of, reference
from experiments.harness.runs.parsing import sentences
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.run import Run
from experiments.harness.runs.spec import PROFILES, SpecError, in_percent

Rows = Mapping[str, Mapping[str, str]]
"""The rows of runs.csv by run_id."""


@dataclass(frozen=True)
class Arguments:
    """Work the verdict on a claim out of runs.csv alone, by other code than that of the tables."""

    claim: Positional[Annotated[str, arg(metavar="CLAIM")]]
    """The short name of a claim, which is that of its page in claims/; all: every claim."""
    profile: Annotated[str, arg(metavar="PROFILE")] = "cpu"
    """Size of the runs: smoke, cpu, gpu or paper."""
    results: Annotated[Path, arg(metavar="DIR")] = DEFAULT_ROOT
    """The results root, whose PROFILE/runs.csv is read; or a folder with a runs.csv, such as results/local/cpu."""
    seeds: Annotated[int | None, arg(metavar="N")] = None
    """Use the seeds 0, ..., N - 1 of each cell. Default: as many as its table is to have, as far as they have
    run."""


@dataclass(frozen=True)
class Verdict:
    """The verdict on one comparison of a claim."""

    contrast: Contrast
    table: str
    where: str
    differences: tuple[float, ...]
    """One for each seed."""
    run_ids: frozenset[str]
    family: str
    margin: float
    p: float = math.nan
    adjusted_p: float = math.nan
    word: str = "not run"

    @property
    def mean(self) -> float:
        """The mean of the differences; NaN without any."""
        return sum(self.differences) / len(self.differences) if self.differences else math.nan


def verdicts(rows: Rows, profile: str, seeds: int | None = None) -> list[Verdict]:
    """The verdicts on all comparisons of all claims of a profile.

    Args:
        rows: The rows of runs.csv.
        profile: Size of the runs.
        seeds: The number of seeds of each cell; None takes those that the table is to have, as far as they have run.
    """
    found = []
    for table in dict.fromkeys(name for contrast in ALL for name in contrast.tables):
        cells = _cells(table, profile)
        counts = [count for cell in cells if (count := _count(cell, rows))]
        planned = catalogue.published_seeds(table, profile)
        used = seeds or max(min(counts, default=0), min(max(counts, default=0), planned))
        for contrast in ALL:
            if used and table in contrast.tables:
                found += [replace(one, table=table) for one in _compared(contrast, cells, rows, used)]
    return _adjusted(found)


def read(folder: Path, profile: str) -> tuple[Path, dict[str, dict[str, str]]]:
    """The path of the runs.csv of a results root or folder, and its rows by run_id.

    Raises:
        RecordError: if there is none, or it cannot be read.
    """
    paths = (folder / profile / "runs.csv", folder / "runs.csv")
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise RecordError(
            f"{paths[0]} does not exist: `python -m analysis --profile {profile} --publish` writes it; or give the "
            f"folder that holds a runs.csv with --results."
        )
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if any("run_id" not in line for line in lines):
        raise RecordError(f"{path} has no column run_id: restore it with git.")
    return path, {line["run_id"]: line for line in lines}


def _cells(table: str, profile: str) -> list[Run]:
    try:
        return catalogue.cells(table, profile)
    except SpecError:
        return []


def _count(cell: Run, rows: Rows) -> int:
    """The number of a cell's seeds that have runs, up to the first gap."""
    seeds = 0
    while replace(cell, seed=cell.seed + seeds).run_id in rows:
        seeds += 1
    return seeds


def _numbers(cell: Run, rows: Rows, seeds: int, column: str = "") -> dict[int, float]:
    """A column of a cell's runs by seed, by default their score; scores in percent."""
    name = column or cell.score
    factor = 100 if in_percent(name) else 1
    texts = {run.seed: rows.get(run.run_id, {}).get(name) for run in with_seeds([cell], seeds)}
    numbers = {seed: float(text) for seed, text in texts.items() if text}
    return {seed: factor * number for seed, number in numbers.items() if not math.isnan(number)}


def _compared(contrast: Contrast, cells: Sequence[Run], rows: Rows, seeds: int) -> Iterator[Verdict]:
    """The comparisons of a contrast in a table, without p values."""
    if contrast.scale == STEP:
        yield from _steps(contrast, cells, rows, seeds)
        return
    sides = _simulated(contrast, cells) if contrast.scale == RATIO else _sides(contrast, cells)
    for parts in sides:
        cell = parts[0]
        where = f"{cell.model}, {cell.dataset}"
        if contrast.scale == RATIO:
            where = f"{cell.model}, eta {cell.learning_rate:g}, rho {cell.rho:g}, {cell.method}"
        for measure in contrast.by_measure(cell.model, cell.profile):
            by_seed = [_numbers(part, rows, seeds, measure.column) for part in parts]
            common = sorted(set.intersection(*map(set, by_seed)))
            differences = _differences([[numbers[seed] for seed in common] for numbers in by_seed], measure.scale)
            what = f", {measure.words}" if measure.words else ""
            yield _unjudged(contrast, parts, f"{where}{what}", differences, rows, seeds)


def _differences(parts: Sequence[Sequence[float]], scale: str) -> list[float]:
    """The differences of two lists of numbers, or of the differences of two pairs of lists."""
    first, second, *others = parts
    if scale == RATIO:
        return [100 * (a / b - 1) for a, b in zip(first, second, strict=True)]
    if scale == LOGARITHM and min((x for part in parts for x in part), default=1.0) > 0:
        return [math.log(a / b) for a, b in zip(first, second, strict=True)]
    if others:
        return [(a - b) - (c - d) for a, b, c, d in zip(*parts, strict=True)]
    return [a - b for a, b in zip(first, second, strict=True)]


def _steps(contrast: Contrast, cells: Sequence[Run], rows: Rows, seeds: int) -> Iterator[Verdict]:
    """The time of a step of mSAM over SAM, as each timing run has measured it within its rounds."""
    for cell in cells:
        if all(cell.flat[name] == value for name, value in contrast.having.items()):
            m = min(usual_m(cell.model, cell.profile), cell.micro_batches)
            for workers in sorted({1, cell.flat["workers"]}):
                ratios = _numbers(cell, rows, seeds, f"msam_m{m}_w{workers}_over_sam")
                where = f"{cell.model}, batch {cell.batch_size}, {workers} worker{'s' * (workers > 1)}"
                yield _unjudged(contrast, (cell,), where, [100 * (x - 1) for x in ratios.values()], rows, seeds)


def _unjudged(
    contrast: Contrast, parts: Sequence[Run], where: str, differences: Iterable[float], rows: Rows, seeds: int
) -> Verdict:
    first = parts[0]
    primary = contrast.is_primary(first.profile, first.model, first.dataset)
    ids = {run.run_id for run in with_seeds(parts, seeds) if rows.get(run.run_id, {}).get(run.score)}
    if contrast.scale == STEP:
        ids = {run.run_id for run in with_seeds(parts, seeds) if run.run_id in rows}
    in_points = contrast.margin is not None or in_percent(first.score)
    return Verdict(
        contrast,
        contrast.tables[0],
        where,
        tuple(round(x, 12) + 0.0 for x in differences),
        frozenset(ids),
        "primary" if primary else contrast.family,
        contrast.margin_in(first.profile) if in_points else math.nan,
    )


def _sides(contrast: Contrast, cells: Sequence[Run]) -> Iterator[tuple[Run, ...]]:
    """For each cell of the first arm, the cells of all arms of the contrast, if they exist."""
    varies = tuple(dict.fromkeys(v for table in contrast.tables for v in catalogue.varies(table)))
    arms = arms_of(cells, varies)
    for cell, arm in arms.items():
        if arm.name != contrast.arms[0]:
            continue
        found: list[Run | None] = [cell, *(reference(cell, name, arms, varies) for name in contrast.arms[1:3])]
        if len(contrast.arms) == 4:
            third = found[2]
            found.append(reference(third, contrast.arms[3], arms, varies) if third else None)
        parts = tuple(one for one in found if one is not None)
        if len(parts) == len(contrast.arms):
            yield parts


def _simulated(contrast: Contrast, cells: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """mSAM and SAM at the same rho, and SAM and the base, in simulations with all data in each step."""
    msam, sam, base = contrast.arms
    for cell in cells:
        for first, second in ((msam, sam), (sam, base)):
            wanted = {"method": second, "rho": 0.0 if second == base else cell.rho}
            if arm_of(cell).name != first or cell.batch_size != cell.flat["train_examples"]:
                continue
            if any(cell.flat[name] != value for name, value in contrast.having.items()):
                continue
            for other in cells:
                same = all(other.flat[n] == cell.flat[n] for n in ("model", "learning_rate", "batch_size"))
                fits = arm_of(other).name == wanted["method"] and other.rho == wanted["rho"]
                alike = second == base or other.flat["normalised"] == cell.flat["normalised"]
                if same and fits and alike:
                    yield cell, other


def _adjusted(found: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts with p values, Holm's adjustment within each family, and their words."""
    tested = [replace(one, p=_p_value(one.differences, one.contrast.line)) for one in found]
    judged = list(tested)
    for family in FAMILIES:
        places = [i for i, one in enumerate(tested) if one.family == family and not math.isnan(one.p)]
        highest = 0.0
        for rank, i in enumerate(sorted(places, key=lambda i: tested[i].p)):
            highest = max(highest, min(1.0, tested[i].p * (len(places) - rank)))
            judged[i] = replace(tested[i], adjusted_p=highest)
    return [replace(one, word=_word(one)) for one in judged]


def _p_value(differences: Sequence[float], line: float) -> float:
    """Student's two-sided one-sample test of the differences, whose mean is compared with the line."""
    n = len(differences)
    if n < 2:
        return math.nan
    excess, spread = np.mean(differences) - line, np.std(differences, ddof=1) / math.sqrt(n)
    if spread == 0:
        return 1.0 if excess == 0 else 0.0
    t = excess / spread
    return float(special.betainc((n - 1) / 2, 0.5, (n - 1) / (n - 1 + t * t)))  # P(|T| > |t|), as an incomplete beta


def _word(one: Verdict) -> str:
    n, effect = len(one.differences), one.mean - one.contrast.line
    if n < 2:
        return "one seed" if n else "not run"
    if one.adjusted_p < ALPHA and abs(effect) >= one.contrast.least:
        return "supported" if (effect > 0) == (one.contrast.expected > 0) else "contradicted"
    half = stats.t.ppf(0.95, n - 1) * np.std(one.differences, ddof=1) / math.sqrt(n)
    within = -one.margin < one.mean - half and one.mean + half < one.margin
    return "equivalent" if within else "inconclusive"


def text(name: str, found: Sequence[Verdict], profile: str) -> str:
    """The verdicts on a claim in words: a line for each comparison.

    Args:
        name: The short name of the claim.
        found: The verdicts on all claims of the profile.
        profile: The profile, which says how many seeds each table is to have.
    """
    contrast = next(one for one in ALL if one.name == name)
    mine = [one for one in found if one.contrast is contrast]
    lines = [f"{contrast.text} ({name})", f"What the comparison isolates: {contrast.isolates}."]
    if not mine:
        return "\n".join([*lines, "Not run: runs.csv has no runs of these arms in its tables."])
    for one in mine:
        n, margin = len(one.differences), "" if math.isnan(one.margin) else f", margin {one.margin:g}"
        if n < 2:
            lines.append(f"  {one.where} ({one.table}): {one.word}")
            continue
        half = stats.t.ppf(0.975, n - 1) * np.std(one.differences, ddof=1) / math.sqrt(n)
        size = f"{one.mean:+.4g} ± {half:.3g} (n={n}), p {one.p:.2g}, adjusted {one.adjusted_p:.2g}{margin}"
        planned = catalogue.published_seeds(one.table, profile)
        early = f", interim: {n} of {planned} seeds" if n < planned else ""
        lines.append(f"  {one.where} ({one.table}): {one.word}{early}. {size}")
    families = {one.family: sum(other.family == one.family and other.p >= 0 for other in found) for one in mine}
    counted = ", ".join(f"{family} ({count})" for family, count in families.items())
    effect = f"Effects in {contrast.unit}, with unadjusted 95 % intervals"
    line = f", tested against {contrast.line:g}" if contrast.line else ""
    return "\n".join([*lines, f"{effect}{line}. Families, with their comparisons: {counted}."])


def run(arguments: Arguments) -> str:
    """Run the command.

    Returns:
        The text to print.

    Raises:
        SpecError, RecordError: for an unknown claim or profile, and for a runs.csv that is missing or damaged.
    """
    known = [contrast.name for contrast in ALL]
    if arguments.claim not in (*known, "all"):
        raise unknown("claim", arguments.claim, [*known, "all"])
    if arguments.profile not in PROFILES:
        raise unknown("profile", arguments.profile, PROFILES)
    if arguments.seeds is not None and arguments.seeds < 1:
        raise SpecError(f"seeds is {arguments.seeds}, but must be 1 or more.")
    path, rows = read(arguments.results.absolute(), arguments.profile)
    try:
        found = verdicts(rows, arguments.profile, arguments.seeds)
    except ValueError as error:
        raise RecordError(f"{path} cannot be read ({error}): restore it with git.") from error
    names = known if arguments.claim == "all" else [arguments.claim]
    return "\n\n".join(
        [*(text(name, found, arguments.profile) for name in names), f"From {path} alone, profile {arguments.profile}."]
    )


def main() -> None:
    """Run the command line; a mistake in it prints one sentence and exits with status 2."""

    def command() -> None:
        program, words = "python -m analysis judge", sys.argv[2:]
        with sentences(program, Arguments):
            arguments = tyro.cli(Arguments, prog=program, args=words, config=(FlagCreatePairsOff,))
        print(run(arguments))

    end_with(command, stopped="Stopped.")
