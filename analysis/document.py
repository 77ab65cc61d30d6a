"""A table's numbers as people read them: Markdown, LaTeX and plain text from one value.

Text from run records is data: every form escapes all of its cells and lines.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import tabulate

from analysis import published
from analysis.cells import block_words, interval, machines, of_blocks, short, studied, used
from analysis.frames import csv_text
from analysis.statistics import Interval
from experiments.harness.runs.spec import Run

SCORE_NOTE = "Accuracies are mean ± half-width of the 95 % Student t interval (number of seeds)"

_CELL = ("dataset", "model", "label", "learning_rate", "weight_decay", "rho", "batch_size", "label_noise")

COMMITTED = frozenset({*_CELL, "mean", "half_width", "n"})
"""The columns that a committed table needs to be shown beside ours."""

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

    def behind(self) -> list[dict[str, str]]:
        """Of each row the runs behind it, by the column whose text they made; under `runs` if they made all."""
        return [{"runs": ids} for ids in self.numbers["run_ids"]]

    def markdown(self) -> str:
        """Heading, origin, table, claims and notes."""
        cells = self.cells.map(markdown_text)
        body = cells.to_markdown(index=False, disable_numparse=True, colalign=["left"] * cells.shape[1])
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
        """Plain text, a small table for each data set and model, with the committed numbers beside ours."""
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
    """The files of all tables by their path below a results folder, and the published rows beside them."""
    documents = list(documents)
    found = {f"tables/{name}": text for document in documents for name, text in document.files().items()}
    numbers = [d.numbers for d in documents if not d.name.endswith("-tuning") and "model" in d.numbers]
    models, datasets = ([v for n in numbers for v in n[key]] for key in ("model", "dataset"))
    rows = published.neighbours(models, datasets)
    return found | ({"tables/published.md": published.markdown(rows)} if rows else {})


def markdown_text(text: str) -> str:
    """The text with everything escaped that Markdown or HTML would read as markup."""
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", text.replace("&", "&amp;"))


def latex_text(text: str) -> str:
    """The text with everything escaped that LaTeX would read as a command."""
    return "".join(_LATEX.get(c, c) for c in text)


def plain_table(cells: pd.DataFrame) -> str:
    """The cells as plain text, in aligned columns."""
    return tabulate(cells, headers=list(cells.columns), showindex=False, disable_numparse=True)


def spread(found: Interval) -> str:
    """`mean ± half-width (n)`, or what is known of it; `not run` without values."""
    if not found.n:
        return "not run"
    return f"{found.mean:.2f} (1)" if found.n == 1 else f"{found.mean:.2f} ± {found.half_width:.2f} ({found.n})"


def significant(found: Interval, *, signed: bool = False) -> str:
    """As `spread`, with three significant digits of the mean, and the interval to its last one."""
    if not found.n:
        return "" if signed else "not run"
    sign = "+" if signed else ""
    size = max(abs(found.mean), found.half_width if found.n > 1 else 0.0)
    size = size if size > 1e-12 else 1.0  # a difference of nothing at all
    digits = max(0, 2 - math.floor(math.log10(size)))
    if found.n == 1:
        return f"{found.mean:{sign}.{digits}f} (1)"
    return f"{found.mean:{sign}.{digits}f} ± {found.half_width:.{digits}f} ({found.n})"


def score_text(row: Any) -> str:
    """The score of a table's row, as `spread` writes it."""
    return spread(Interval(row.mean, row.half_width, int(row.n)))


def signed(found: Interval) -> str:
    """A difference as `spread` writes it, with its sign; nothing without values."""
    if not found.n:
        return ""
    return f"{found.mean:+.2f} (1)" if found.n == 1 else f"{found.mean:+.2f} ± {found.half_width:.2f} ({found.n})"


def formatted(value: float, form: str) -> str:
    """The number in that format; nothing if it is missing."""
    return "" if pd.isna(value) else format(value, form)


def studied_columns(numbers: pd.DataFrame) -> dict[str, list[str]]:
    """Columns of what a study varies from block to block, and of the learning rate, which changes with it."""
    varied = {block_words(name): name for name in studied(numbers)}
    if varied and "edge" not in numbers:  # a grid has the column anyway
        varied["learning rate"] = "learning_rate"
    return {words: [short(value) for value in numbers[name]] for words, name in varied.items()}


def eigenvalue_columns(numbers: pd.DataFrame, marks: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a table whose score is an eigenvalue: it, and what it is over the base optimizer's and SAM's."""
    rows = list(numbers.itertuples())
    return {
        "lambda 1": [
            significant(Interval(r.mean, r.half_width, int(r.n))) + m for r, m in zip(rows, marks, strict=True)
        ],
        "over base": [significant(interval(row, "over_base"), signed=True) for row in rows],
        "over SAM": [significant(interval(row, "over_sam"), signed=True) for row in rows],
    }


def measure(numbers: pd.DataFrame, column: str, factor: float = 1.0) -> list[str]:
    """A column of means with its intervals, without the count that its row gives already."""
    if column not in numbers:
        return [""] * len(numbers)
    return uncounted(numbers, [significant(found) for found in _intervals(numbers, column, factor)])


def percent(numbers: pd.DataFrame, column: str) -> list[str]:
    """As `measure`, with the digits of a score."""
    return uncounted(numbers, [spread(found) for found in _intervals(numbers, column)])


def _intervals(numbers: pd.DataFrame, column: str, factor: float = 1.0) -> list[Interval]:
    counts = numbers.get(f"{column}_n", numbers["n"])
    found = zip(numbers[column], numbers[f"{column}_half_width"], counts, strict=True)
    return [Interval(factor * a, factor * b, 0 if pd.isna(a) else int(n)) for a, b, n in found]


def uncounted(numbers: pd.DataFrame, texts: Iterable[str]) -> list[str]:
    """The texts without the count that their row gives already, and nothing for what was not run."""
    counts = zip(texts, numbers["n"], strict=True)
    return [text.removesuffix(f" ({n})").removesuffix("not run") for text, n in counts]


def row_notes(numbers: pd.DataFrame, failures: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """For each row a mark like ` [1]` or nothing, and the notes that the marks stand for."""
    texts = [_missing(row, failures) for row in numbers.itertuples()]
    distinct = list(dict.fromkeys(filter(None, texts)))
    marks = [f" [{distinct.index(text) + 1}]" if text else "" for text in texts]
    return marks, [f"[{number}] {text}" for number, text in enumerate(distinct, start=1)]


def _missing(row: Any, failures: Mapping[str, str]) -> str:
    """Which of a cell's runs are missing and why; nothing if all are there, or if none was begun."""
    gaps = list(zip(row.missing_seeds.split(), row.missing_run_ids.split(), strict=True))
    told = [f"seed {seed}" + (f" failed: {failures[i]}" if i in failures else "") for seed, i in gaps]
    if not gaps or (not row.n and not any(i in failures for _, i in gaps)):
        return ""
    return f"{len(gaps)} of {row.expected} runs missing ({'; '.join(told)})."


def origin(frame: pd.DataFrame, numbers: pd.DataFrame, cells: Sequence[Run], seeds: int) -> str:
    """Where a table's numbers are from: the profile, the machines and the commits of its runs."""
    rows = used(frame, numbers)
    begin = f"Profile {cells[0].profile}, {seeds} seed{'s' if seeds > 1 else ''} a cell"
    if rows.empty:
        return f"{begin}; nothing has run yet."
    where = "; ".join(machines(rows)) or "an unknown machine"
    commits = sorted({part[:12] for cell in rows["commit"] for part in cell.split("+")})
    return f"{begin}; {where}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."


def _committed(numbers: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """For each row of ours, what is committed for the same cell."""
    known = {tuple(getattr(row, key) for key in _CELL): score_text(row) for row in committed.itertuples()}
    return [known.get(tuple(getattr(row, key) for key in _CELL), "") for row in numbers.itertuples()]
