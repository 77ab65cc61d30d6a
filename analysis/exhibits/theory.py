"""Linear stability: predicted and simulated boundaries, and the predicted quantities on trained networks."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.arms import COLOURS, MARKS, method_name
from analysis.cells import identity, rounded, scores, values
from analysis.contrasts import PREDICTED_WITHIN, THEORY, Contrast
from analysis.document import formatted, score_text
from analysis.evidence import Evidence, claim, comparison, ids_of
from analysis.exhibit import Comparison, Exhibit, Picture, Shown, Target, View
from analysis.frames import Results
from analysis.plots import add_legend
from analysis.sentences import difference_in_words
from analysis.statistics import mean_interval, paired, paired_difference
from experiments.harness.runs.spec import Run

NOTES = (
    "Largest sharpness lambda_max(H) of an interpolating minimum that the method's steps do not leave: simulated "
    "(mean ± half-width of the 95 % interval over random problems) and predicted by docs/theory.md.",
    "exact: unnormalised perturbations rho times the gradient, all data in each step; the prediction must hold to 2 %. "
    "normalised: perturbations of length rho, as SAM and mSAM are used. No run converges to the minimum, so stable "
    "means bounded; the prediction is 2 / eta for every rho. stochastic: a new random batch for each step, compared "
    "with the prediction for all data, which such a batch size does not reach.",
)

PARTS = ("exact", "normalised", "stochastic")
"""The parts of the table: the setting where the prediction is exact, and two that deviate from it."""


def _part(cell: Run) -> str:
    if cell.batch_size < cell.examples:
        return "stochastic"
    return "normalised" if cell.flat["normalised"] else "exact"


def numbers(frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()) -> pd.DataFrame:
    """Largest stable sharpness of each simulated cell, with its prediction.

    Args:
        frame: one row for each finished run.
        cells: theory specs at seed 0, one for each row.
        seeds: the seeds 0, ..., seeds - 1 are expected and used.
        varies: the fields that the table's experiments declare to vary.

    Returns:
        One row for each cell: `mean` and `half_width` of the simulated boundary, `predicted`, the mean of `simulated /
        predicted - 1`, and its largest absolute value over the seeds (`worst`).
    """
    runs, rows = frame.set_index("run_id"), []
    blocks = list(dict.fromkeys((_part(cell), cell.model) for cell in cells))
    for cell in cells:
        errors = values(runs, cell, seeds, "relative_error")
        row = identity(cell, runs, seeds)
        rows.append(
            {"block": blocks.index((_part(cell), cell.model)), "label": method_name(cell), **row}
            | {
                "part": _part(cell),
                "normalised": cell.flat["normalised"],
                "batch_size": cell.batch_size,
                "examples": cell.examples,
                "predicted": mean_interval(values(runs, cell, seeds, "predicted_sharpness")).mean,
                "relative_error": mean_interval(errors).mean,
                "worst": float(errors.abs().max()) if len(errors) else float("nan"),
            }
        )
    return rounded(pd.DataFrame(rows))


def sentences(view: View) -> list[str]:
    """Whether each part's prediction holds, and whether mSAM's boundary is below SAM's, and SAM's below descent's."""
    lines, table = [], view.numbers[view.numbers["n"] > 0]
    for part in PARTS:
        rows = table[table["part"] == part]
        if rows.empty:
            continue
        worst = rows["worst"].max()
        holds = "holds" if worst < PREDICTED_WITHIN else "does not hold"
        lines.append(
            f"{part}: the prediction {holds} to {PREDICTED_WITHIN:.0%}; simulations deviate by up to {worst:.2%}."
        )
    exact = table[table["part"] == "exact"]
    below = compared = 0
    for _, rows in exact[exact["rho"] > 0].groupby(["model", "learning_rate", "rho"]):
        by_method = rows.set_index("method")["mean"]
        if {"sam", "msam"} <= set(by_method.index):
            descent = 2 / rows["learning_rate"].iloc[0]
            compared, below = compared + 1, below + int(by_method["msam"] < by_method["sam"] < descent)
    if compared:
        lines.append(
            f"exact: mSAM's boundary lies below SAM's, and SAM's below 2 / eta, in {below} of {compared} settings."
        )
    return lines


def text(view: View) -> pd.DataFrame:
    """The predicted and the simulated boundaries."""
    table, rows = view.numbers, view.rows
    return pd.DataFrame(
        {
            "dataset": table["dataset"],
            "part": table["part"],
            "model": table["model"],
            "method": table["label"],
            "eta": [f"{row.learning_rate:g}" for row in rows],
            "rho": [f"{row.rho:g}" if row.rho else "" for row in rows],
            "batch": [f"{row.batch_size} of {row.examples}" for row in rows],
            "predicted": [formatted(row.predicted, ".4g") for row in rows],
            "simulated": [score_text(row) + mark for row, mark in zip(rows, view.marks, strict=True)],
            "simulated / predicted": [formatted(1 + row.relative_error, ".3f") for row in rows],
        }
    )


def theory(results: Results, simulated: Target, flat: Target) -> Figure:
    """One figure: stability boundaries, and the penalty P(m) and largest eigenvalues of trained networks.

    Args:
        results: the runs.
        simulated: the theory's cells; may be empty.
        flat: the cells of Table 3; may be empty.
    """
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (rho, eta, penalty), (left, middle, right) = figure.subplots(2, 3)
    if simulated.cells:
        table = numbers(results.runs, simulated.cells, simulated.seeds)
        _boundaries(rho, table, "rho", f"(a) eta = 0.1, n = {simulated.seeds}")
        _boundaries(eta, table, "learning_rate", f"(b) rho = 0.1, n = {simulated.seeds}")
    models = list(dict.fromkeys(c.model for c in flat.cells))
    if models:
        _penalty(penalty, results.runs, [c for c in flat.cells if c.model == models[0]], flat.seeds)
    for axes, model in zip((left, middle, right), models, strict=False):
        _eigenvalues(axes, results.runs, [c for c in flat.cells if c.model == model], flat.seeds)
    for axes in figure.axes:
        if not axes.has_data():
            axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
    return figure


def _boundaries(axes: Axes, numbers: pd.DataFrame, along: str, title: str) -> None:
    """Draw simulated boundaries as points (filled for the regression) and predictions as lines."""
    other, value = ("learning_rate", 0.1) if along == "rho" else ("rho", 0.1)
    exact = numbers[(numbers["part"] == "exact") & (numbers["n"] > 0)]
    for method in ("base", "sam", "msam"):
        for model, face in (("regression", COLOURS[method]), ("two-layer", "none")):
            rows = exact[(exact["method"] == method) & (exact["model"] == model)]
            if method != "base" or along == "rho":
                rows = rows[rows[other] == value]
            rows = rows.sort_values(along)
            if rows.empty:
                continue
            if method == "base" and along == "rho":
                label = "gradient descent: 2 / eta" if model == "regression" else None
                axes.axhline(rows["predicted"].iloc[0], color=COLOURS[method], lw=1, label=label)
                continue
            style = "-" if model == "regression" else "--"
            axes.plot(rows[along], rows["predicted"], style, color=COLOURS[method], lw=1)
            label = "gradient descent" if method == "base" else rows["label"].iloc[0]
            axes.errorbar(
                rows[along],
                rows["mean"],
                rows["half_width"].fillna(0),
                fmt=MARKS[method],
                ms=4,
                color=COLOURS[method],
                mfc=face,
                label=f"{label}, {model}",
            )
    words = {"rho": "rho (unnormalised)", "learning_rate": "learning rate eta"}[along]
    axes.set(xscale="log", yscale="log", xlabel=words, ylabel="largest stable lambda max(H)", title=title)
    add_legend(axes, fontsize=6)


def _penalty(axes: Axes, runs: pd.DataFrame, cells: Sequence[Run], seeds: int) -> None:
    """Draw P(m) at the final weights; dashed: the expectation over random splits, from the examples' gradients."""
    frame = runs.set_index("run_id")
    for cell in cells:
        counts = [2**k for k in range(20) if 2**k <= cell.flat["measured_examples"]]
        intervals = [mean_interval(values(frame, cell, seeds, f"train_penalty_m{m}")) for m in counts]
        if not intervals[0].n:
            continue
        axes.errorbar(
            counts,
            [interval.mean for interval in intervals],
            [interval.half_width if interval.n > 1 else 0 for interval in intervals],
            fmt=MARKS[cell.method] + "-",
            ms=3,
            lw=1,
            capsize=2,
            color=COLOURS[cell.method],
            label=method_name(cell),
        )
        one, each = (mean_interval(values(frame, cell, seeds, f"train_squared_m{m}")).mean for m in (1, counts[-1]))
        expected = [(one + (each - one) * (m - 1) / (counts[-1] - 1)) ** 0.5 for m in counts]
        axes.loglog(counts, expected, "--", lw=0.7, color=COLOURS[cell.method])
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="m", ylabel="P(m), mean of ||grad L_i||", title=f"(c) {cells[0].model}, training data")
    add_legend(axes, fontsize=6)


def _eigenvalues(axes: Axes, runs: pd.DataFrame, cells: Sequence[Run], seeds: int) -> None:
    """Draw lambda 1 as bars with intervals; points of the same seed are joined by a line, since seeds are paired."""
    frame = runs.set_index("run_id")
    by_cell = [values(frame, cell, seeds, "train_lambda_1") for cell in cells]
    for place, (cell, by_seed) in enumerate(zip(cells, by_cell, strict=True)):
        if len(by_seed):
            interval = mean_interval(by_seed)
            half = interval.half_width if interval.n > 1 else 0
            axes.bar(place, interval.mean, yerr=half, width=0.6, color=COLOURS[cell.method], alpha=0.6, capsize=3)
    for seed in range(seeds):
        points = [(i, v[seed]) for i, v in enumerate(by_cell) if seed in v.index]
        if points:
            axes.plot(*zip(*points, strict=True), "-k", marker=".", lw=0.5, ms=4)
    base, msam = (
        next((v for c, v in zip(cells, by_cell, strict=True) if c.method == m), None) for m in ("base", "msam")
    )
    names = [method_name(cell).replace(", m=", "\nm=").replace(" micro-batches", "") for cell in cells]
    axes.set_xticks(range(len(cells)), names)
    note = ""
    if base is not None and msam is not None and len(base) and len(msam):
        note = f"\nmSAM - base: {difference_in_words(paired_difference(msam, base)).split(':')[0]}"
    axes.set(ylabel="lambda 1, training data", title=f"{cells[0].model}{note}")


def boundaries(contrast: Contrast) -> Evidence:
    """A claim's evidence: simulated boundaries of mSAM over SAM and of SAM over descent, all data in each step."""

    def compare(target: Target, runs: pd.DataFrame, shown: Shown) -> list[Comparison]:
        seeds = target.seeds
        cells = [
            c
            for c in target.cells
            if c.batch_size == c.examples and (not c.rho or c.flat["normalised"] == contrast.having["normalised"])
        ]
        at = {(c.model, c.learning_rate, c.rho, c.method): c for c in cells}
        comparisons = []
        for (model, learning_rate, rho, method), cell in at.items():
            key = {"sam": (0.0, "base"), "msam": (rho, "sam")}.get(method)
            reference = at.get((model, learning_rate, *key)) if key else None
            if reference is None:
                continue
            own, other = (np.log(scores(c, runs, seeds).astype(float)) for c in (cell, reference))
            percent = 100 * np.expm1(paired(own, other))
            where = f"{model}, eta {learning_rate:g}, rho {rho:g}"
            what = f"{method_name(cell)} over {method_name(reference)}, largest stable sharpness, percent"
            used = ids_of((cell, reference), runs, seeds)
            comparisons.append(comparison(contrast, cell, (where, what), percent, used))
        return comparisons

    return compare


EXHIBIT = Exhibit(
    name="theory",
    title="Linear stability: predicted and simulated",
    shows=lambda cell: cell.kind == "theory",
    numbers=numbers,
    text=text,
    sentences=sentences,
    notes=lambda view: NOTES,
    claims=tuple(claim(contrast, boundaries(contrast)) for contrast in THEORY),
    figures=(
        Picture(
            "theory",
            "Stability boundaries, penalty P(m), and largest eigenvalues of trained networks.",
            theory,
            tables=("theory", "table3"),
            place=0,
        ),
    ),
    place=50,
)
