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

from analysis import published, tables
from analysis.collect import csv_text
from analysis.statistics import Interval
from experiments.harness.runs.facts import IMAGES, METRICS
from experiments.harness.runs.spec import Spec

TITLES = {
    "table1": "Table 1: test accuracy",
    "table2": "Table 2: GLUE",
    "table3": "Table 3: flatness",
    "table4": "Table 4: cost",
    "theory": "Linear stability: predicted and simulated",
    "micro_batches": "Accuracy and flatness against m",
    "rho": "Accuracy against rho",
    "batch_size": "Accuracy against the batch size",
    "label_noise": "Accuracy with wrong training labels",
    "trajectories": "Largest Hessian eigenvalue along training",
}

SCORE_NOTE = "Accuracies are mean ± half-width of the 95 % Student t interval (number of seeds)"
NOTES_1 = (
    f"{SCORE_NOTE}; differences are in percentage points and paired by seed. Intervals are for one "
    "comparison at a time. Time is the mean for one run, other work of the machine included, and its ratio to the base "
    "optimizer's: Table 4 is what to compare costs by.",
    "The test accuracy is that of the last epoch, never of the best one.",
    "Seeds differ in initial weights and the order of batches. The images of a subset are the same for all seeds, and "
    "so are its wrong labels where there are some: intervals say nothing of other images.",
)
NOTE_SAME_RHO = "mSAM is compared with SAM at the same rho where there is one."
NOTE_MEASURED = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss, measured as in Table 3. Re-estimated: the test "
    "accuracy once BatchNorm's statistics have been averaged over one more epoch of mini-batches at the final weights."
)
NOTE_TRAJECTORIES = (
    "Lambda 1 is the largest Hessian eigenvalue of the training loss on the first 256 training examples (all where "
    "there are fewer), in eval mode, relative tolerance 0.01: after the last epoch, and its greatest value among the "
    "epochs at which it was measured. Means ± half-width of the 95 % Student t interval (number of seeds); differences "
    "are paired by seed, and negative is flatter."
)
NOTES_2 = (
    "Scores are mean ± half-width of the 95 % Student t interval (number of seeds), times 100, on the validation split "
    "after the last epoch: {metrics}. Differences are paired by seed. Intervals are for one comparison at a time.",
    "The majority row always gives the commonest label of the training set.",
)
NOTES_3 = (
    "Largest Hessian eigenvalue (lambda 1) and trace of the training loss at the final weights, on the first "
    "{examples} training and {examples} test examples, without augmentation; BatchNorm in eval mode, with its running "
    "statistics; float32. Means ± half-width of the 95 % Student t interval (number of seeds); differences are paired "
    "by seed, and negative is flatter. Lanczos residuals are at most {residual:.1g} of lambda 1; each trace has its "
    "own standard error in the records.",
    "Sharpness, times 1,000: rise of the loss at distance rho={rho} from the weights: the greatest found by ascent (a "
    "lower bound of the maximum), the mean over random directions, and the mean over m micro-batches of each one's "
    "rise at its own perturbation. One rho for all methods of a data set.",
    "Reparametrisation can change all of these without changing the function (Dinh et al. 2017, arXiv 1703.04933): "
    "between methods of one network and training they compare, between networks they do not.",
)
NOTES_4 = (
    "A step is zero_grad, the gradient and the optimizer, on batches that are there; median over rounds in which every "
    "method takes one step in a random order, in one process, with one thread on CPUs. Means ± half-width of the 95 % "
    "Student t interval over repetitions (their number). Over base and over SAM: the median "
    "of the ratios within a round, of steps on as many workers. On several workers SAM "
    "has one perturbation for all, from the gradient averaged over them, as plain data parallelism would have it; each "
    "worker perturbs its own micro-batches with mSAM.",
    "Memory: the peak of what a step allocates above weights, data and what stood before it, in one worker. Reduced: "
    "what each worker hands over to be averaged in a step, seen by DistributedDataParallel's own hook; plain training "
    "hands over each gradient once.",
)
NOTES_THEORY = (
    "Largest sharpness lambda_max(H) of an interpolating minimum at which the method's own steps stay there: simulated "
    "(mean ± half-width of the 95 % interval over random problems) and predicted by docs/theory.md.",
    "exact: unnormalised perturbations rho times the gradient, all data in each step; the prediction must hold to 2 %. "
    "normalised: perturbations of length rho, as SAM and mSAM are used; nothing ends at the minimum, and stable means "
    "bounded: predicted 2 / eta whatever rho. stochastic: batches drawn anew for each step, beside the prediction for "
    "all the data, which such a batch size does not reach.",
)
NOTES_TUNING = (
    f"{SCORE_NOTE}, on training images held out from training. The best mean is chosen; the test set is not looked at.",
)

_CELL = ("dataset", "model", "label", "learning_rate", "weight_decay", "rho", "batch_size", "label_noise")

COMMITTED = frozenset({*_CELL, "mean", "half_width", "n"})
"""The columns that a committed table needs to be shown beside ours."""

LINEAR = "linear model (floor)"

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
        varied = tables.of_blocks(self.numbers)
        for number, rows in cells.groupby(self.numbers["block"], sort=True):
            heading = f"{rows['model'].iloc[0]}, {rows['dataset'].iloc[0]}{varied[number]}"
            parts.append(f"{heading}\n{_plain(rows.drop(columns=['dataset', 'model']))}")
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.claims), "\n".join(self.notes)])])


@dataclass(frozen=True)
class WideDocument(Document):
    """A table with a column for each task: on a terminal the committed one stands below it."""

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """Plain text; the committed numbers as a second table."""
        parts = [f"{self.title}\n{self.origin}", _plain(self.cells)]
        if committed is not None:
            parts += ["Committed", _plain(wide(committed))]
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.claims), "\n".join(self.notes)])])


def document_1(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 1, or the part of it that one experiment fills, ready to be written."""
    numbers = tables.table_1(frame, cells, seeds)
    marks, notes = _row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": [LINEAR if row.model == "linear" else row.model for row in rows],
            "method": numbers["label"],
            **_studied(numbers),
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            "test accuracy %": [_score(row) + mark for row, mark in zip(rows, marks, strict=True)],
            "over base": [_signed(tables.interval(row, "over_base")) for row in rows],
            "over SAM": [_signed(tables.interval(row, "over_sam")) for row in rows],
            "train accuracy %": [_number(row.train_accuracy, ".2f") for row in rows],
        }
    )
    several = numbers[numbers["method"] == "sam"].groupby("block")["rho"].nunique().gt(1).any()
    if measured := "lambda_1" in numbers:
        text["lambda 1"] = _measure(numbers, "lambda_1")
        text["BatchNorm re-estimated %"] = _percent(numbers, "reestimated")
    text["time"] = [_time(row) for row in rows]
    return _document(
        (name, frame, [cell for cell in cells if cell.kind == "train"], seeds),
        numbers,
        text,
        title=f"{name}: test accuracy",
        claims=tables.claims(numbers),
        notes=(
            *notes,
            *tables.trained_anew(frame, cells, seeds),
            *NOTES_1,
            *([NOTE_SAME_RHO] if several else []),
            *([NOTE_MEASURED] if measured else []),
        ),
    )


def document_trajectories(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """The largest eigenvalue after training and its greatest value on the way, ready to be written."""
    numbers = tables.trajectories_table(frame, cells, seeds)
    marks, notes = _row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": numbers["model"],
            "method": numbers["label"],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            **_eigenvalue_columns(numbers, marks),
            "greatest on the way": _measure(numbers, "greatest_lambda_1"),
            "test accuracy %": _percent(numbers, "test_accuracy"),
        }
    )
    return _document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=name,
        claims=tables.claims(numbers, expected=-1),
        notes=(*notes, *tables.trained_anew(frame, cells, seeds), NOTE_TRAJECTORIES),
    )


def document_2(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 2, or the part of it that one experiment fills, ready to be written."""
    numbers = tables.table_2(frame, cells, seeds)
    marks, notes = _row_notes(numbers, failures or {})
    metrics = ", ".join(f"{dataset} {METRICS[dataset]}" for dataset in dict.fromkeys(numbers["dataset"]))
    radii = [
        f"{model}, {label}: rho " + ", ".join(f"{row.rho:g} on {row.dataset}" for row in rows.itertuples()) + "."
        for (model, label), rows in numbers[numbers["rho"] > 0].groupby(["model", "label"], sort=False)
    ]
    return _document(
        (name, frame, cells, seeds),
        numbers,
        wide(numbers, marks),
        title=f"{name}: GLUE",
        claims=(
            *radii,
            *tables.further_metrics(frame, cells, seeds),
            *tables.over_majority(numbers),
            *tables.claims(numbers),
        ),
        notes=(*notes, *(note.format(metrics=metrics) for note in NOTES_2)),
        kind=WideDocument,
    )


def document_3(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 3, or the part of it that one experiment fills, ready to be written."""
    numbers = tables.table_3(frame, cells, seeds)
    marks, notes = _row_notes(numbers, failures or {})
    split = f"m{max((c.micro_batches for c in cells), default=1)}"
    measures = {
        "lambda 1, test": "test_lambda_1",
        "lambda 1 / lambda 5": "train_lambda_ratio",
        "trace": "train_trace",
    }
    rises = {
        "sharpness": "train_ascent_sharpness",
        "average": "train_average_sharpness",
        "m=1": "train_sharpness_m1",
        f"m={split[1:]}": f"train_sharpness_{split}",
    }
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": numbers["model"],
            "method": numbers["label"],
            **_eigenvalue_columns(numbers, marks),
            **{title: _measure(numbers, column) for title, column in measures.items()},
            **{title: _measure(numbers, column, 1000) for title, column in rises.items()},
        }
    )
    told = {
        "examples": ", ".join(dict.fromkeys(str(c.measured_examples) for c in cells)),
        "rho": ", ".join(dict.fromkeys(f"{c.measured_rho:g}" for c in cells)),
        "residual": numbers["residual"].max(),
    }
    return _document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=f"{name}: flatness",
        claims=tables.claims(numbers, expected=-1),
        notes=(
            *notes,
            *tables.trained_anew(frame, cells, seeds),
            *(note.format(**told) for note in NOTES_3),
            *published.FLATNESS,
        ),
    )


def document_4(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Table 4, or the part of it that one experiment fills, ready to be written."""
    numbers = tables.table_4(frame, cells, seeds)
    marks, notes = _row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": numbers["model"],
            "batch": numbers["batch_size"].astype(str),
            "method": [row.label.partition(", batch")[0] for row in rows],
            "workers": numbers["workers"].astype(str),
            "ms a step": _measure(numbers, "seconds", 1000),
            "over base": [_score(row) + mark for row, mark in zip(rows, marks, strict=True)],
            "over SAM": _uncounted(numbers, [spread(tables.interval(row, "over_sam")) for row in rows]),
            "examples/s": [_number(row.examples_per_second, ".0f") for row in rows],
            "memory, MB": [_number(row.memory_bytes / 1e6, ".1f") for row in rows],
            "reduced, MB": [_number(row.reduced_bytes / 1e6, ".2f") if row.workers > 1 else "" for row in rows],
        }
    )
    return _document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=f"{name}: cost",
        claims=tables.cost_claims(numbers),
        notes=(*notes, *NOTES_4),
    )


def document_theory(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
) -> Document:
    """Predicted and simulated stability, ready to be written."""
    numbers = tables.theory_table(frame, cells, seeds)
    marks, notes = _row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "part": numbers["part"],
            "model": numbers["model"],
            "method": numbers["label"],
            "eta": [f"{row.learning_rate:g}" for row in rows],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            "batch": [f"{row.batch_size} of {row.examples}" for row in rows],
            "predicted": [_number(row.predicted, ".4g") for row in rows],
            "simulated": [_score(row) + mark for row, mark in zip(rows, marks, strict=True)],
            "simulated / predicted": [_number(1 + row.relative_error, ".3f") for row in rows],
        }
    )
    return _document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=name,
        claims=tables.theory_claims(numbers),
        notes=(*notes, *NOTES_THEORY),
    )


def wide(numbers: pd.DataFrame, marks: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of `table_2` with a column for each task: scores first, then what they are over each other."""
    tasks = list(dict.fromkeys(numbers["dataset"]))
    marks = marks or [""] * len(numbers)
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for model, block in numbers.groupby("model", sort=False):
        rows = [(row, marks[row.Index]) for row in block.itertuples()]
        base = next((row.label for row, _ in rows if row.method == "base"), "base")
        sam = next((row.label for row, _ in rows if row.method == "sam"), "SAM")
        for row, _ in rows:
            texts.setdefault((model, "majority class"), {})[row.dataset] = _number(row.majority, ".2f")
        for row, mark in rows:
            texts.setdefault((model, row.label), {})[row.dataset] = _score(row) + mark
        for column, other in (("over_base", base), ("over_sam", sam)):
            for row, _ in rows:
                if other != row.label and (column == "over_base" or row.method == "msam"):
                    texts.setdefault((model, f"{row.label} over {other}"), {})[row.dataset] = _signed(
                        tables.interval(row, column)
                    )
    found = [
        {"model": model, "method": label, **{t: told.get(t, "") for t in tasks}}
        for (model, label), told in texts.items()
    ]
    return pd.DataFrame(found)


def document_tuning(
    name: str,
    frame: pd.DataFrame,
    cells: Sequence[Spec],
    seeds: int,
    failures: Mapping[str, str] | None = None,
    used: Sequence[Spec] = (),
) -> Document:
    """The grid of a table, ready to be written; `used` are the cells of the table itself."""
    numbers = tables.tuning_table(frame, cells, seeds)
    kind = "accuracy" if cells[0].dataset in IMAGES else "score"
    marks, notes = _row_notes(numbers, failures or {})
    rows = list(numbers.itertuples())
    text = pd.DataFrame(
        {
            "dataset": numbers["dataset"],
            "model": numbers["model"],
            "method": numbers["label"],
            **_studied(numbers),
            "learning rate": [f"{row.learning_rate:g}" for row in rows],
            "weight decay": [f"{row.weight_decay:g}" for row in rows],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            f"held-out {kind} %": [_score(row) + mark for row, mark in zip(rows, marks, strict=True)],
            "choice": [_choice(row) for row in rows],
        }
    )
    table = name.removesuffix("-tuning")
    return _document(
        (name, frame, cells, seeds),
        numbers,
        text,
        title=f"The grid of {TITLES.get(table, table).partition(':')[0] if table.startswith('table') else table}: "
        f"held-out accuracy",
        claims=tables.choices(numbers, cells, used),
        notes=(*notes, *NOTES_TUNING),
    )


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


def _studied(numbers: pd.DataFrame) -> dict[str, list[str]]:
    """Columns of what a study varies from block to block, and of the learning rate, which changes with it."""
    varied = {words: name for name, words in tables.BLOCK_WORDS.items() if name in tables.studied(numbers)}
    if varied and "edge" not in numbers:  # a grid has the column anyway
        varied["learning rate"] = "learning_rate"
    return {words: [f"{value:g}" for value in numbers[name]] for words, name in varied.items()}


def _eigenvalue_columns(numbers: pd.DataFrame, marks: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a table whose score is an eigenvalue: it, and what it is over the base optimizer's and SAM's."""
    rows = list(numbers.itertuples())
    return {
        "lambda 1": [
            significant(Interval(r.mean, r.half_width, int(r.n))) + m for r, m in zip(rows, marks, strict=True)
        ],
        "over base": [significant(tables.interval(row, "over_base"), signed=True) for row in rows],
        "over SAM": [significant(tables.interval(row, "over_sam"), signed=True) for row in rows],
    }


def _measure(numbers: pd.DataFrame, column: str, factor: float = 1.0) -> list[str]:
    """A column of `table_3` with its intervals, without the count that its row gives already."""
    if column not in numbers:
        return [""] * len(numbers)
    return _uncounted(numbers, [significant(found) for found in _intervals(numbers, column, factor)])


def _percent(numbers: pd.DataFrame, column: str) -> list[str]:
    """As `_measure`, with the digits of a score."""
    return _uncounted(numbers, [spread(found) for found in _intervals(numbers, column)])


def _intervals(numbers: pd.DataFrame, column: str, factor: float = 1.0) -> list[Interval]:
    counts = numbers.get(f"{column}_n", numbers["n"])
    found = zip(numbers[column], numbers[f"{column}_half_width"], counts, strict=True)
    return [Interval(factor * a, factor * b, 0 if pd.isna(a) else int(n)) for a, b, n in found]


def _uncounted(numbers: pd.DataFrame, texts: Iterable[str]) -> list[str]:
    """The texts without the count that their row gives already, and nothing for what was not run."""
    counts = zip(texts, numbers["n"], strict=True)
    return [text.removesuffix(f" ({n})").removesuffix("not run") for text, n in counts]


def _document(
    about: tuple[str, pd.DataFrame, Sequence[Spec], int],
    numbers: pd.DataFrame,
    text: pd.DataFrame,
    *,
    title: str,
    claims: Iterable[str],
    notes: Iterable[str],
    kind: type[Document] = Document,
) -> Document:
    """The table `text` of the numbers, with where they are from and what keeps them from being compared."""
    name, frame, cells, seeds = about
    return kind(
        name=name,
        title=TITLES.get(name, title),
        origin=_origin(frame, numbers, cells, seeds),
        cells=text,
        claims=tuple(claims),
        notes=(*tables.warnings(frame, numbers), *notes),
        numbers=numbers,
    )


def _plain(cells: pd.DataFrame) -> str:
    return tabulate(cells, headers=list(cells.columns), showindex=False, disable_numparse=True)


def _score(row: Any) -> str:
    return spread(Interval(row.mean, row.half_width, int(row.n)))


def _signed(found: Interval) -> str:
    if not found.n:
        return ""
    return f"{found.mean:+.2f} (1)" if found.n == 1 else f"{found.mean:+.2f} ± {found.half_width:.2f} ({found.n})"


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


def _time(row: Any) -> str:
    seconds = _number(row.wall_seconds, ".0f" if row.wall_seconds >= 10 else ".1f")
    ratio = "" if pd.isna(row.relative_time) else f" (x{row.relative_time:.2f})"
    return f"{seconds} s{ratio}" if seconds else ""


def _choice(row: Any) -> str:
    edge = "" if row.edge in ("interior", "only value") else f" (at the edge: {row.edge})"
    if row.chosen:
        return f"chosen{edge}"
    return f"best so far{edge}" if row.best else ""


def _row_notes(numbers: pd.DataFrame, failures: Mapping[str, str]) -> tuple[list[str], list[str]]:
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


def _origin(frame: pd.DataFrame, numbers: pd.DataFrame, cells: Sequence[Spec], seeds: int) -> str:
    rows = tables.used(frame, numbers)
    begin = f"Profile {cells[0].profile}, {seeds} seed{'s' if seeds > 1 else ''} a cell"
    if rows.empty:
        return f"{begin}; nothing has run yet."
    machines = "; ".join(tables.machines(rows)) or "an unknown machine"
    commits = sorted({part[:12] for cell in rows["commit"] for part in cell.split("+")})
    return f"{begin}; {machines}; commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."


def _committed(numbers: pd.DataFrame, committed: pd.DataFrame) -> list[str]:
    """For each row of ours, what is committed for the same cell."""
    known = {tuple(getattr(row, key) for key in _CELL): _score(row) for row in committed.itertuples()}
    return [known.get(tuple(getattr(row, key) for key in _CELL), "") for row in numbers.itertuples()]
