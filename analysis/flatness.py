"""Measures of flatness, and how two methods are compared by each: by the ratio of their values, paired by seed.

A measure such as the largest Hessian eigenvalue differs between networks and seeds by factors, so the logarithms of its
values are compared, and a mean difference of logarithms is printed as a ratio. A measure with values of 0 or below has
no logarithm: it is compared by plain differences.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analysis.cells import compared, interval, references, values
from analysis.contrasts import FLATTER
from analysis.document import three_digits
from analysis.evidence import differences
from analysis.exhibit import View
from analysis.plots import panels_of
from analysis.sentences import claimed_by_block
from analysis.statistics import Interval, mean_interval
from experiments.harness.runs.spec import Run

Compared = Mapping[Run, Mapping[str, Run | None]]
"""The cells that each cell of a table is compared with, by name."""


def difference_columns(
    name: str, column: str, runs: pd.DataFrame, others: Compared, seeds: int, *, logarithmic: bool = False
) -> pd.DataFrame:
    """The paired differences of a measure, for the numbers of a table.

    Args:
        name: What the columns begin with: `log_` gives `log_over_base`, `log_over_base_half_width` and
            `log_over_base_n`.
        column: The measure's name in the records.
        runs: The finished runs by id.
        others: The cells that each cell is compared with, from `cells.references`.
        seeds: The number of seeds.
        logarithmic: Whether logarithms are compared; a comparison with a value of 0 or below is then left empty.

    Returns:
        One row for each row of the table.
    """
    rows = []
    for cell, by_name in others.items():
        row: dict[str, float | int] = {}
        for over, other in by_name.items():
            by_seed = np.array([])
            if other is not None:
                by_seed, log = differences((cell, other), runs, seeds, column, logarithmic)
                by_seed = by_seed if log == logarithmic else by_seed[:0]
            mean, half_width, n = mean_interval(by_seed)
            row |= {f"{name}{over}": mean, f"{name}{over}_half_width": half_width, f"{name}{over}_n": n}
        rows.append(row)
    return pd.DataFrame(rows)


def eigenvalue_numbers(
    frame: pd.DataFrame, cells: Sequence[Run], seeds: int, varies: Sequence[str] = ()
) -> pd.DataFrame:
    """One row for each cell of a table whose score is an eigenvalue: its mean, and its ratios to other cells' values.

    Returns:
        What `cells.compared` returns, with `log_over_base` and the like instead of `over_base`: the paired differences
        of the natural logarithms.
    """
    runs, others = frame.set_index("run_id"), references(cells, varies)
    table = compared(frame, cells, seeds, varies)
    logs = difference_columns("log_", cells[0].score, runs, others, seeds, logarithmic=True)
    return table.drop(columns=[name for name in table if str(name).startswith("over_")]).join(logs)


def eigenvalue_columns(numbers: pd.DataFrame, marks: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a table whose score is an eigenvalue: the score, and its ratios to base optimizer and SAM."""
    rows = list(numbers.itertuples())
    means = [three_digits(Interval(r.mean, r.half_width, int(r.n))) for r in rows]
    ratios = {
        f"ratio to {words}": [_counted(interval(row, f"log_over_{name}"), row.n) for row in rows]
        for name, words in shown_references(numbers, "log_").items()
    }
    return {"lambda 1": [text + mark for text, mark in zip(means, marks, strict=True)], **ratios}


def shown_references(numbers: pd.DataFrame, name: str) -> dict[str, str]:
    """The arms whose comparisons a table has columns for, with their words: base, SAM and, if it is there, shared."""
    words = {"base": "base", "sam": "SAM", "shared": "shared"}
    return {arm: words[arm] for arm in words if f"{name}over_{arm}" in numbers}


def eigenvalue_sentences(view: View) -> list[str]:
    """One sentence for each block: the ratios of its arms' eigenvalues, and whether they are significant."""
    lines = []
    for where, pairs in claimed_by_block(view):
        parts = [
            f"{row.label} over {label}: {_in_words(interval(row, f'log_over_{other}'))}" for row, other, label in pairs
        ]
        if any(interval(row, f"log_over_{other}").n for row, other, _ in pairs):
            lines.append(f"{where}: lambda 1 of {'; '.join(parts)}.")
        elif pairs:
            lines.append(f"{where}: not run.")
    return lines


def _in_words(ratio: Interval) -> str:
    """A ratio with its interval, and whether it is significantly flatter or sharper."""
    if not ratio.n:
        return "not run"
    if ratio.n == 1:
        return f"{as_ratio(ratio)} (n=1), one seed, no interval"
    size = f"{as_ratio(ratio)}, n={ratio.n}"
    if not ratio.significant:
        return f"{size}, inconclusive"
    return f"{size}, significantly {'flatter' if ratio.mean < 0 else 'sharper'}"


def _counted(ratio: Interval, n: int) -> str:
    """The ratio, with its number of seeds where that is not the row's."""
    return as_ratio(ratio) + (f" ({ratio.n})" if ratio.n not in (0, n) else "")


def as_ratio(difference: Interval) -> str:
    """A mean difference of logarithms as a ratio with the ends of its interval: `x0.62 (0.55 to 0.70)`."""
    if not difference.n:
        return ""
    ratio = f"x{_digits(difference.mean)}"
    if difference.n == 1:
        return ratio
    low, high = (difference.mean + sign * difference.half_width for sign in (-1, 1))
    return f"{ratio} ({_digits(low)} to {_digits(high)})"


def _digits(log_ratio: float) -> str:
    """A ratio with two decimals, or two significant digits if it is below 0.1 or above 10."""
    ratio = float(np.exp(min(log_ratio, 700.0)))
    return f"{ratio:.2f}" if 0.1 <= ratio < 10 else f"{ratio:.2g}"


def ranks_within_seeds(runs: pd.DataFrame, cells: Sequence[Run], seeds: int, column: str) -> Interval:
    """Spearman's rank correlation of a measure with the test accuracy of the measured networks, over the cells.

    It is computed within each seed that three or more cells have, and averaged over these seeds. Below 0, the flatter
    network is the more accurate one.

    Args:
        runs: The finished runs by id.
        cells: Curvature runs on one network and data set.
        seeds: The number of seeds.
        column: The measure's name in the records.
    """
    points: dict[int, list[tuple[float, float]]] = {}
    for cell in cells:
        assert cell.network is not None
        flat, scores = (values(runs, cell, seeds, name) for name in (column, cell.network.score))
        for seed in flat.index.intersection(scores.index):
            points.setdefault(seed, []).append((flat[seed], scores[seed]))
    ordered = (points[seed] for seed in sorted(points))
    return mean_interval(
        stats.spearmanr(pairs).statistic
        for pairs in ordered
        if len(pairs) > 2 and all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
    )


def rank_sentences(runs: pd.DataFrame, cells: Sequence[Run], seeds: int) -> list[str]:
    """For each network, whether the flatter minima are the more accurate ones, by each measure that claims use."""
    lines = []
    for where, block in panels_of(cells).items():
        measures = FLATTER[0].by_measure(block[0].flat["model"], block[0].profile)
        columns = {m.words: m.column for m in measures} | {"and, which is no flatness, the training loss": "train_loss"}
        ranks = {words: ranks_within_seeds(runs, block, seeds, column) for words, column in columns.items()}
        parts = [f"{words} {rank.mean:+.2f} ± {rank.half_width:.2f}" for words, rank in ranks.items() if rank.n > 1]
        if parts:
            lines.append(
                f"{where}: rank correlation of test accuracy with flatness within a seed, over the arms (below 0: the "
                f"flatter, the more accurate; n={max(rank.n for rank in ranks.values())}): {'; '.join(parts)}."
            )
    return lines


def micro_batch_measures(names: Sequence[str]) -> list[str]:
    """The columns with the sharpness of micro-batches and its parts, by kind and m."""
    known = [name for name in names if re.fullmatch(r"(train|test)_(sharpness|penalty|squared)_m\d+", str(name))]
    return sorted(known, key=lambda name: (name.rsplit("m", 1)[0], int(name.rsplit("m", 1)[1])))
