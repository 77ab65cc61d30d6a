"""Table 1: test accuracy of each method, and its training curves."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis import scores
from analysis.cells import ids, references, rounded
from analysis.cells import scores as test_scores
from analysis.chances import scales, tries
from analysis.exhibit import Exhibit, Picture, Target, View
from analysis.frames import Results
from analysis.plots import add_common_legend, draw_band, draw_under_way, panels_of, seeds_of, set_logarithmic
from analysis.predictions import Predictions
from analysis.sentences import claimed_by_block, measure_sentences
from analysis.statistics import Interval
from analysis.two_way import two_way_interval
from experiments.harness.runs.spec import Run, in_percent

MEASURES = {"nll": "test NLL", "ece": "calibration error, points"}
"""Further measures of the test set, by their columns in the CSV; lower is better."""

COLUMNS = (
    *scores.COLUMNS,
    scores.compared_column("NLL", "nll", "test_loss"),
    scores.compared_column("ECE %", "ece", "test_ece", factor=100, digits="score"),
)
"""The columns after the score and its differences. To add a column, add an entry, such as

    scores.mean_column("train loss", "train_loss")
"""

NOTES = (
    "NLL is the mean negative log likelihood of the test images, ECE their expected calibration error (15 bins); lower "
    "is better.",
)
NOTE_TWO_WAY = (
    "Two-way intervals draw seeds and test images together (95 % bootstrap, 2,000 resamples of the kept predictions); "
    "all other intervals are over seeds alone, for these test images."
)


def with_two_way(numbers: pd.DataFrame, target: Target, frame: pd.DataFrame, predictions: Predictions) -> pd.DataFrame:
    """Add the two-way interval of each difference whose runs all have predictions: `over_sam_two_way_low`, `_high`."""
    columns: dict[str, list[float]] = {}
    runs = frame.set_index("run_id")
    for row, (cell, others) in enumerate(references(target.cells, target.varies).items()):
        for over, other in others.items():
            ends = _two_way(cell, other, runs, target.seeds, predictions) if other else (float("nan"),) * 2
            for end, value in zip(("low", "high"), ends, strict=True):
                columns.setdefault(f"{over}_two_way_{end}", [float("nan")] * len(numbers))[row] = value
    added = rounded(pd.DataFrame(columns, index=numbers.index))
    return numbers.join(added) if added.notna().to_numpy().any() else numbers


def _two_way(cell: Run, other: Run, runs: pd.DataFrame, seeds: int, predictions: Predictions) -> tuple[float, float]:
    """The two-way interval of a paired difference; NaN unless every run behind the difference has predictions."""
    common = sorted(set.intersection(*(set(test_scores(one, runs, seeds).index) for one in (cell, other))))
    mine, theirs = ([predictions.of(ids(one, seeds)[seed - one.seed]) for seed in common] for one in (cell, other))
    known = [one for one in (*mine, *theirs) if one is not None]
    labels = [one.labels[""] for one in known]
    if len(known) < 2 * len(common) or not all(np.array_equal(labels[0], y) for y in labels[1:]):
        return float("nan"), float("nan")
    a, b = ([one.classes[""] for one in arm if one] for arm in (mine, theirs))
    return two_way_interval(a, b, labels[0]) if known else (float("nan"), float("nan"))


def sentences(view: View) -> list[str]:
    """The differences of the scores, those of the other measures, and the two-way intervals."""
    lines = scores.sentences(view)
    for measure, words in MEASURES.items():
        lines += measure_sentences(view, measure, words, -1)
    return lines + two_way_sentences(view)


def two_way_sentences(view: View) -> list[str]:
    """One sentence for each block with two-way intervals: those of the differences that are printed for each arm."""
    lines = []
    for where, pairs in claimed_by_block(view):
        ends = [(row.label, label, *_ends(row, other)) for row, other, label in pairs]
        parts = [f"{a} over {b}: {low:+.2f} to {high:+.2f}" for a, b, low, high in ends if not pd.isna(low)]
        if parts:
            lines.append(f"{where}, two-way intervals over seeds and test images: {'; '.join(parts)}.")
    return lines


def _ends(row: Any, other: str) -> tuple[float, float]:
    low, high = (getattr(row, f"over_{other}_two_way_{end}", float("nan")) for end in ("low", "high"))
    return low, high


def notes(view: View) -> Iterable[str]:
    """The scale of each block, the values that its arms tried, and how to read the numbers."""
    yield from scales(view)
    yield from tries(view)
    yield from scores.notes(view)
    yield from NOTES
    if any(str(name).endswith("_two_way_low") for name in view.numbers):
        yield NOTE_TWO_WAY


def curves(results: Results, target: Target) -> Figure:
    """By epoch, one column for each model: training loss, its rise under the perturbation and, if recorded, accuracy.

    Bands are over the seeds of finished runs; a dotted line is one run that is not finished.
    """
    panels = {
        title: rows for title, rows in panels_of(target.cells).items() if len(rows) > 1 and rows[0].model != "linear"
    }
    finished, under_way = (_in_percent(curves) for curves in (results.curves, results.under_way))
    scored = any(c.score in curves for curves in (finished, under_way) for c in target.cells)
    figure = Figure(figsize=(3.4 * len(panels), 7.5 if scored else 5), layout="constrained")
    grid = figure.subplots(2 + scored, len(panels), squeeze=False)
    for column, (title, rows) in zip(grid.T, panels.items(), strict=True):
        last: dict[str, Interval] = {}
        for cell in rows:
            about: dict[str, Any] = {"cell": cell, "seeds": target.seeds, "arm": target.arms[cell]}
            for axes, measure in zip(column, ("train_loss", "sharpness", cell.score), strict=False):
                if measure != "sharpness" or cell.rho:
                    end = draw_band(axes, finished, column=measure, **about)
                    draw_under_way(axes, under_way, column=measure, **about)
                    last.setdefault(target.arms[cell].called(cell), end)
        column[0].set(title=f"{title}{seeds_of(last.values())}")
        for axes, words in zip(column, ("training loss", "rise of the loss", "accuracy % (first 1,000)"), strict=False):
            axes.set(xlabel="epoch", ylabel=words)
            if "accuracy" not in words:
                set_logarithmic(axes)
    add_common_legend(figure, len(panels))
    return figure


def _in_percent(curves: pd.DataFrame) -> pd.DataFrame:
    return curves.assign(**{name: 100 * curves[name] for name in curves if in_percent(str(name))})


EXHIBIT = Exhibit(
    name="table1",
    title="Table 1: test accuracy",
    part="{name}: test accuracy",
    shows=scores.shows,
    numbers=partial(scores.numbers, columns=COLUMNS),
    text=partial(scores.text, columns=COLUMNS),
    with_predictions=with_two_way,
    sentences=sentences,
    notes=notes,
    claims=scores.CLAIMS,
    figures=(
        Picture(
            "curves",
            "Training loss and its rise at the perturbed weights, by epoch; bands are 95 % intervals over seeds.",
            curves,
        ),
    ),
    place=10,
)
