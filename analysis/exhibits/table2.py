"""Table 2: scores on text, one column for each task."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from analysis import scores
from analysis.cells import DIGITS, cells_in_order, interval, mean_columns, rounded, values
from analysis.chances import scales, tries
from analysis.contrasts import QUANTISED
from analysis.document import SIGNIFICANCE_NOTE, Document, formatted, plain_table, score_text, signed, spread
from analysis.evidence import claim
from analysis.exhibit import Exhibit, View
from analysis.sentences import difference_in_words, measure_sentences
from analysis.statistics import Interval, mean_interval, paired_difference
from experiments.harness.runs.facts import DATASETS, is_images, text_set
from experiments.harness.runs.spec import Run

NOTES = (
    "Scores are mean ± half-width of the 95 % Student t interval (number of seeds), times 100, on the test texts (of "
    "GLUE its validation split) after the last epoch: {metrics}. Differences are paired by seed. " + SIGNIFICANCE_NOTE,
    "The majority row always predicts the most frequent label of the training set.",
)
NOTE_INT8 = (
    "Int8: the same networks after dynamic int8 quantisation of their linear layers, on the CPU. Int8 over float32 is "
    "the loss by quantisation, paired by network."
)

INT8 = scores.compared_column("int8", "int8", "test_int8_score", factor=100, digits="score")
"""The score after quantisation, and its paired differences to other arms."""

_QUANTISED = ", int8"
"""The end of the labels of quantised networks."""


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """The scores, and the score of always predicting the most frequent label (`majority`)."""
    table, runs = scores.numbers(frame, cells, seeds, varies), frame.set_index("run_id")
    majorities = {cell: values(runs, cell, seeds, "test_majority") for cell in cells}
    by_dataset = {cell.dataset: 100 * majority.mean() for cell, majority in majorities.items() if len(majority)}
    table["majority"] = table["dataset"].map(by_dataset).astype(float).round(DIGITS)
    ordered = cells_in_order(cells, varies)
    by_quantisation = [difference_to_float32(runs, cell, seeds) for cell in ordered]
    added = {**INT8.numbers(runs, ordered, seeds, varies), **mean_columns("int8_loss", by_quantisation, counted=True)}
    return table.join(rounded(pd.DataFrame(added)))


def difference_to_float32(runs: pd.DataFrame, cell: Run, seeds: int) -> Interval:
    """The score after quantisation minus the score before, in points, paired by network."""
    after, before = (100 * values(runs, cell, seeds, name) for name in ("test_int8_score", "test_score"))
    return paired_difference(after, before)


def further_metrics(view: View) -> list[str]:
    """A line for each model and task with a second official metric: its value for each method, times 100."""
    runs, lines = view.frame.set_index("run_id"), defaultdict(list)
    for cell in view.target.cells:
        column, words = text_set(cell.dataset).second or ("", "")
        mean = mean_interval(100 * values(runs, cell, view.target.seeds, column))
        if mean.n:
            half = f" ± {mean.half_width:.2f}" if mean.n > 1 else ""
            text = f"{view.target.arms[cell].called(cell)} {mean.mean:.2f}{half} ({mean.n})"
            lines[f"{cell.model}, {cell.dataset}, {words}"].append(text)
    return [f"{name}: {', '.join(texts)}." for name, texts in lines.items()]


def over_majority(numbers: pd.DataFrame) -> list[str]:
    """The base optimizer of each block over the most frequent label, and whether the difference is significant."""
    lines = []
    for row in numbers[(numbers["method"] == "base") & (numbers["n"] > 0)].itertuples():
        difference = Interval(row.mean - row.majority, row.half_width, int(row.n))
        lines.append(
            f"{row.model}, {row.dataset}: {row.label} over the majority class: {difference_in_words(difference)}."
        )
    return lines


@dataclass(frozen=True)
class WideDocument(Document):
    """A table with a column for each task; on a terminal the committed table follows below."""

    def run_ids(self) -> list[dict[str, str]]:
        """For each row, the ids of the runs behind the score of each task."""
        ids = {(row.model, row.label, row.dataset): row.run_ids for row in self.numbers.itertuples()}
        tasks = list(self.cells.columns[2:])
        rows = [(row.model, row.method.removesuffix(_QUANTISED)) for row in self.cells.itertuples()]
        return [{task: ids.get((*row, task), "") for task in tasks} for row in rows]

    def terminal(self, committed: pd.DataFrame | None = None) -> str:
        """Plain text, with the committed numbers as a second table."""
        parts = [f"{self.title}\n{self.origin}", plain_table(self.cells)]
        if committed is not None:
            parts += ["Committed", plain_table(wide(committed))]
        return "\n\n".join([*parts, *filter(None, ["\n".join(self.claims), "\n".join(self.notes)])])


def wide(numbers: pd.DataFrame, marks: Sequence[str] = ()) -> pd.DataFrame:
    """The rows with a column for each task: scores first, then differences; then the same after quantisation."""
    tasks = list(dict.fromkeys(numbers["dataset"]))
    marks = marks or [""] * len(numbers)
    texts: dict[tuple[str, str], dict[str, str]] = {}
    for model, block in numbers.groupby("model", sort=False):
        rows = [(row, marks[row.Index]) for row in block.itertuples()]
        base = next((row.label for row, _ in rows if row.method == "base"), "base")
        sam = next((row.label for row, _ in rows if row.method == "sam"), "SAM")
        for row, _ in rows:
            texts.setdefault((model, "majority class"), {})[row.dataset] = formatted(row.majority, ".2f")
        for row, mark in rows:
            texts.setdefault((model, row.label), {})[row.dataset] = score_text(row) + mark
        measures = {"": ""}
        if "int8_n" in block and block["int8_n"].any():
            measures["int8_"] = _QUANTISED
        for prefix, end in measures.items():
            for row, _ in rows if prefix else ():
                score = Interval(row.int8, row.int8_half_width, int(row.int8_n))
                texts.setdefault((model, f"{row.label}{end}"), {})[row.dataset] = spread(score)
            for row, _ in rows if prefix else ():
                loss = signed(interval(row, "int8_loss"))
                texts.setdefault((model, f"{row.label}: int8 over float32"), {})[row.dataset] = loss
            for column, other in (("over_base", base), ("over_sam", sam)):
                for row, _ in rows:
                    if other != row.label and (column == "over_base" or row.method == "msam"):
                        name = f"{row.label} over {other}{end}"
                        texts.setdefault((model, name), {})[row.dataset] = signed(interval(row, prefix + column))
    rows_of_text = [
        {"model": model, "method": label, **{t: by_task.get(t, "") for t in tasks}}
        for (model, label), by_task in texts.items()
    ]
    return pd.DataFrame(rows_of_text)


def sentences(view: View) -> list[str]:
    """The values of rho, the further metrics, and the differences."""
    table = view.numbers
    radii = [
        f"{model}, {label}: rho " + ", ".join(f"{row.rho:g} on {row.dataset}" for row in rows.itertuples()) + "."
        for (model, label), rows in table[table["rho"] > 0].groupby(["model", "label"], sort=False)
    ]
    margin = scores.margin_of(view.target.cells[0])
    quantised = measure_sentences(view, "int8", "after int8 quantisation", 1, margin)
    return [*radii, *further_metrics(view), *over_majority(table), *scores.sentences(view), *quantised]


def notes(view: View) -> list[str]:
    """Explain how to read the scores."""
    metrics = ", ".join(f"{dataset} {DATASETS[dataset].metric}" for dataset in dict.fromkeys(view.numbers["dataset"]))
    quantised = [NOTE_INT8] if view.numbers["int8_n"].any() else []
    return [*(note.format(metrics=metrics) for note in NOTES), *quantised, *scales(view), *tries(view)]


EXHIBIT = Exhibit(
    name="table2",
    title="Table 2: scores on text",
    part="{name}: scores on text",
    shows=lambda cell: cell.kind == "train" and not is_images(cell.dataset),
    numbers=numbers,
    text=lambda view: wide(view.numbers, view.marks),
    sentences=sentences,
    notes=notes,
    claims=(*scores.CLAIMS, *(claim(contrast) for contrast in QUANTISED)),
    place=20,
    form=WideDocument,
)
