"""`Document` writes a table's numbers as Markdown, LaTeX and plain text.

Text from run records is data: every format escapes all cells and lines.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate

from analysis import published
from analysis.cells import block_words, machines, of_blocks, short, studied, used
from analysis.frames import csv_text
from analysis.statistics import Interval
from experiments.harness.runs.catalogue import MARGINS
from experiments.harness.runs.spec import Run

SCORE_NOTE = "Accuracies are mean ± half-width of the 95 % Student t interval (number of seeds)"
SIGNIFICANCE_NOTE = (
    "Intervals are unadjusted for the number of comparisons; significant: the 95 % interval excludes zero. Equivalent: "
    "not significant, and the 90 % interval lies within the margin of equivalence, if there is one ({margins}). "
    "Inconclusive: neither. The verdicts in claims.md are adjusted."
).format(margins=", ".join(f"{profile} {margin:g}" for profile, margin in MARGINS.items()))

_CELL = ("dataset", "model", "label", "learning_rate", "weight_decay", "rho", "batch_size", "label_noise")

COMMITTED = frozenset({*_CELL, "mean", "half_width", "n"})
"""The columns that a committed table needs to be shown next to ours."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
} | {c: f"\\{c}" for c in "&%$#_{}"}


@dataclass(frozen=True)
class Document:
    """A table as text, not yet escaped for any format."""

    name: str
    title: str
    origin: str
    """Profile, machine, commit."""
    cells: pd.DataFrame
    claims: tuple[str, ...]
    notes: tuple[str, ...]
    numbers: pd.DataFrame

    def files(self) -> dict[str, str]:
        """The table's files by name."""
        return {
            f"{self.name}.md": self.markdown(),
            f"{self.name}.csv": csv_text(self.numbers),
            f"{self.name}.tex": self.latex(),
        }

    def run_ids(self) -> list[dict[str, str]]:
        """For each row, the run ids by the column that uses them; under `runs` if all columns use them."""
        return [{"runs": ids} for ids in self.numbers["run_ids"]]

    def markdown(self) -> str:
        """Heading, origin, table, claims and notes."""
        body = markdown_table(self.cells)
        lines = [f"- {markdown_text(line)}\n" for line in self.claims]
        notes = [f"{markdown_text(line)}\n" for line in self.notes]
        parts = [f"### {markdown_text(self.title)}\n", f"{markdown_text(self.origin)}\n", f"{body}\n"]
        return "\n".join([*parts, *(["".join(lines)] if lines else []), *notes])

    def latex(self) -> str:
        """A `tabular` with booktabs rules, then claims and notes as paragraphs."""
        cells = self.cells.map(latex_text)
        cells.columns = [latex_text(name) for name in cells.columns]
        body = cells.style.hide(axis="index").to_latex(hrules=True, column_format="l" * cells.shape[1])
        lines = [self.title + ".", self.origin, *self.claims, *self.notes]
        return body + "".join(f"\\par\\noindent {latex_text(line)}\n" for line in lines)

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """Plain text: a small table for each data set and model, with the committed numbers next to ours."""
        cells = self.cells
        if committed is not None:
            cells = cells.assign(committed=_committed(self.numbers, committed))
        parts = [f"{self.title}\n{self.origin}"]
        varied = of_blocks(self.numbers)
        for number, rows in cells.groupby(self.numbers["block"], sort=True):
            heading = f"{rows['model'].iloc[0]}, {rows['dataset'].iloc[0]}{varied[number]}"
            parts.append(f"{heading}\n{plain_table(rows.drop(columns=['dataset', 'model']))}")
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.claims), "\n".join(self.notes)])])


def table_files(documents: Iterable[Document]) -> dict[str, str]:
    """The files of all tables, and of the rows published elsewhere, by their path below a results folder."""
    documents = list(documents)
    files = {f"tables/{name}": text for document in documents for name, text in document.files().items()}
    numbers = [d.numbers for d in documents if not d.name.endswith("-tuning") and "model" in d.numbers]
    models, datasets = ([v for n in numbers for v in n[key]] for key in ("model", "dataset"))
    rows = published.neighbours(models, datasets)
    return files | ({"tables/published.md": published.markdown(rows)} if rows else {})


def markdown_text(text: str) -> str:
    """The text with all Markdown and HTML markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", text.replace("&", "&amp;"))


def markdown_table(cells: pd.DataFrame) -> str:
    """The cells as a Markdown table, with all markup escaped."""
    texts = cells.map(markdown_text)
    return str(texts.to_markdown(index=False, disable_numparse=True, colalign=["left"] * texts.shape[1]))


def latex_text(text: str) -> str:
    """The text with all LaTeX commands escaped."""
    return "".join(_LATEX.get(c, c) for c in text)


def plain_table(cells: pd.DataFrame) -> str:
    """The cells as plain text in aligned columns."""
    return tabulate(cells, headers=list(cells.columns), showindex=False, disable_numparse=True)


def spread(interval: Interval) -> str:
    """`mean ± half-width (n)`; `mean (1)` for one value, and `not run` for none."""
    if not interval.n:
        return "not run"
    return (
        f"{interval.mean:.2f} (1)"
        if interval.n == 1
        else f"{interval.mean:.2f} ± {interval.half_width:.2f} ({interval.n})"
    )


def three_digits(interval: Interval, *, signed: bool = False) -> str:
    """As `spread`, with three significant digits of the larger of mean and half-width."""
    if not interval.n:
        return "" if signed else "not run"
    sign = "+" if signed else ""
    size = max(abs(interval.mean), interval.half_width if interval.n > 1 else 0.0)
    size = size if size > 1e-12 else 1.0  # a difference of exactly zero
    digits = max(0, 2 - math.floor(math.log10(size)))
    if interval.n == 1:
        return f"{interval.mean:{sign}z.{digits}f} (1)"
    return f"{interval.mean:{sign}z.{digits}f} ± {interval.half_width:.{digits}f} ({interval.n})"


def score_text(row: Any) -> str:
    """The score of a table's row in the format of `spread`."""
    return spread(Interval(row.mean, row.half_width, int(row.n)))


def signed(difference: Interval) -> str:
    """A difference in the format of `spread`, with its sign; empty without values."""
    if not difference.n:
        return ""
    return (
        f"{difference.mean:+z.2f} (1)"
        if difference.n == 1
        else f"{difference.mean:+z.2f} ± {difference.half_width:.2f} ({difference.n})"
    )


def formatted(value: float, form: str) -> str:
    """The number in this format; empty if it is missing."""
    return "" if pd.isna(value) else format(value, form)


def studied_columns(numbers: pd.DataFrame) -> dict[str, list[str]]:
    """The columns of the fields that a study varies from block to block, and of the learning rate."""
    varied = {block_words(name): name for name in studied(numbers)}
    if varied and "edge" not in numbers:  # a grid always has this column
        varied["learning rate"] = "learning_rate"
    return {words: [short(value) for value in numbers[name]] for words, name in varied.items()}


def measure(numbers: pd.DataFrame, column: str, factor: float = 1.0) -> list[str]:
    """A column of means with their intervals, without the count that the score already shows."""
    if column not in numbers:
        return [""] * len(numbers)
    return uncounted(numbers, [three_digits(one) for one in _intervals(numbers, column, factor)])


def percent(numbers: pd.DataFrame, column: str) -> list[str]:
    """As `measure`, with two decimals as in a score."""
    return uncounted(numbers, [spread(one) for one in _intervals(numbers, column)])


def _intervals(numbers: pd.DataFrame, column: str, factor: float = 1.0) -> list[Interval]:
    counts = numbers.get(f"{column}_n", numbers["n"])
    parts = zip(numbers[column], numbers[f"{column}_half_width"], counts, strict=True)
    return [
        Interval(factor * mean, factor * half_width, 0 if pd.isna(mean) else int(n)) for mean, half_width, n in parts
    ]


def uncounted(numbers: pd.DataFrame, texts: Iterable[str]) -> list[str]:
    """The texts without the count that the score already shows; `not run` becomes empty."""
    counts = zip(texts, numbers["n"], strict=True)
    return [text.removesuffix(f" ({n})").removesuffix("not run") for text, n in counts]


def row_notes(numbers: pd.DataFrame, states: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """For each row a footnote mark such as ` [1]` or an empty string, and the footnotes."""
    texts = [_missing(row, states) for row in numbers.itertuples()]
    distinct = list(dict.fromkeys(filter(None, texts)))
    marks = [f" [{distinct.index(text) + 1}]" if text else "" for text in texts]
    return marks, [f"[{number}] {text}" for number, text in enumerate(distinct, start=1)]


def _missing(row: Any, states: Mapping[str, str]) -> str:
    """Which of a cell's runs are missing and why; empty if none is missing or none was started."""
    gaps = list(zip(row.missing_seeds.split(), row.missing_run_ids.split(), strict=True))
    gap_words = [f"seed {seed}" + (f" {states[i]}" if i in states else "") for seed, i in gaps]
    if not gaps or (not row.n and not any(i in states for _, i in gaps)):
        return ""
    return f"{len(gaps)} of {row.expected} runs missing ({'; '.join(gap_words)})."


def origin(frame: pd.DataFrame, numbers: pd.DataFrame, cells: Sequence[Run], seeds: int) -> str:
    """The profile, seeds, machines and commits of a table's runs."""
    rows = used(frame, numbers)
    most = max(numbers["expected"].max(), seeds)  # a grid's learning rates have more seeds than the others
    counts = f"{seeds} to {most}" if most > seeds else f"{seeds}"
    begin = f"Profile {cells[0].profile}, {counts} seed{'s' if most > 1 else ''} per cell"
    if rows.empty:
        return f"{begin}; nothing has run yet."
    where = "; ".join(machines(rows)) or "an unknown machine"
    commits = sorted({part[:12] for cell in rows["commit"] for part in cell.split("+")})
    return f"{begin}; {where}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."


def _committed(numbers: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """The committed score of each row's cell; empty if none is committed."""
    known = {tuple(getattr(row, key) for key in _CELL): score_text(row) for row in committed.itertuples()}
    return [known.get(tuple(getattr(row, key) for key in _CELL), "") for row in numbers.itertuples()]


def listed(items: Iterable[object]) -> str:
    """Items as `a, b and c`."""
    words = [str(item) for item in items]
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
