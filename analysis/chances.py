"""The chances that a table's arms had: the scale of their training, and the values that each perturbed arm tried."""

from collections.abc import Iterable

import pandas as pd

from analysis.cells import TUNED, blocks, of_blocks, scores, values
from analysis.document import listed
from analysis.exhibit import View
from analysis.statistics import paired_difference
from experiments.harness.runs import catalogue
from experiments.harness.runs.facts import DATASETS, is_images
from experiments.harness.runs.spec import Run

_FREE = ("seed", "holdout_examples", "test_examples", "micro_batches", *TUNED)
"""The fields in which a cell of a grid may differ from the table's cell that it chooses for."""


def scales(view: View) -> list[str]:
    """A sentence for each block: images, epochs, steps, augmentation, parameters and test images."""
    runs, lines = view.frame.set_index("run_id"), []
    for where, block in _blocks(view):
        base, fields = block[0], block[0].flat
        noun = "images" if is_images(base.dataset) else "texts"
        of_runs = {name: values(runs, base, view.target.seeds, name) for name in ("steps", "parameters")}
        known = {name: f"{int(one.iloc[0]):,} {name}" for name, one in of_runs.items() if one.nunique() == 1}
        epochs = f"{fields['epochs']} epoch{'s' if fields['epochs'] > 1 else ''}"
        test = fields["test_examples"] or DATASETS[base.dataset].test
        parts = [
            f"{base.examples:,} training {noun}",
            epochs + (f" ({known['steps']})" if "steps" in known else ""),
            f"mini-batches of {fields['batch_size']}",
            *([_augmentation(base)] if is_images(base.dataset) else []),
            *([known["parameters"]] if "parameters" in known else []),
            f"scored on {test:,} test {noun}",
        ]
        lines.append(f"{where}: {', '.join(parts)}.")
    return lines


def tries(view: View) -> list[str]:
    """For each block, the values that the perturbed arms tried, and how far each choice is from its neighbours.

    The grid is that of the experiment or table; its held-out scores are given if its runs are among the results.
    """
    name, profile = f"{view.target.name}-tuning", view.target.cells[0].profile
    if name not in catalogue.targets() or not (grid := catalogue.cells(name, profile)):
        return []
    runs, lines = view.frame.set_index("run_id"), []
    for where, block in _blocks(view):
        perturbed = [cell for cell in block if cell.rho]
        rivals = {cell: [one for one in grid if one.rho and _alike(one, cell)] for cell in perturbed}
        if any(rivals.values()):
            lines.append(f"{where}: {_equal(view, rivals)} {_neighbours(view, runs, rivals)}")
    return lines


def _blocks(view: View) -> Iterable[tuple[str, list[Run]]]:
    """The blocks of training runs that have results, each with its name."""
    names = of_blocks(view.numbers)
    for number, block in enumerate(blocks(view.target.cells, view.target.varies)):
        if view.numbers.loc[view.numbers["block"] == number, "n"].any():
            yield f"{block[0].model}, {block[0].dataset}{names[number]}", block


def _augmentation(cell: Run) -> str:
    name, cutout = cell.flat["augmentation"], cell.flat["cutout"]
    words = "no augmentation" if name == "none" else f"augmentation {name}"
    return f"{words}, cutout {cutout}" if cutout else words


def _alike(one: Run, cell: Run) -> bool:
    """Whether a cell of a grid has a table's cell's method, data and training."""
    mine, theirs = one.flat, cell.flat
    same = all(mine[name] == theirs[name] for name in mine if name not in _FREE)
    return same and one.method == cell.method


def _equal(view: View, rivals: dict[Run, list[Run]]) -> str:
    """The values that the arms tried, and whether all tried equally many."""
    arms = view.target.arms
    by_values: dict[tuple[tuple[float, ...], tuple[int, ...]], list[str]] = {}
    for cell, tried in rivals.items():
        key = tuple(sorted({one.rho for one in tried})), tuple(sorted({one.micro_batches for one in tried}))
        by_values.setdefault((key[0], key[1] if len(key[1]) > 1 else ()), []).append(arms[cell].called(cell))
    parts = []
    for (rhos, counts), names in by_values.items():
        of_m = f" at each m of {listed(counts)}" if counts else ""
        parts.append(f"{listed(names)} tried rho {listed(f'{rho:g}' for rho in rhos) or 'never'}{of_m}")
    numbers = {len(tried) for tried in rivals.values()}
    if len(numbers) == 1:
        begin = f"each perturbed arm tried {numbers.pop()} settings" if len(rivals) > 1 else "tries"
    else:
        begin = "the perturbed arms tried unequally many settings"
    return f"{begin} on held-out examples ({'; '.join(parts)})."


def _neighbours(view: View, runs: pd.DataFrame, rivals: dict[Run, list[Run]]) -> str:
    """The held-out score of each arm's chosen rho over that of its neighbours in the grid, paired by seed."""
    parts = []
    for cell, tried in rivals.items():
        line = sorted((one for one in tried if one.micro_batches == cell.micro_batches), key=lambda one: one.rho)
        name = f"{view.target.arms[cell].called(cell)}, rho {cell.rho:g}"
        place = next((i for i, one in enumerate(line) if one.rho == cell.rho), None)
        if place is None:
            parts.append(f"{name}: not in the grid")
            continue
        held_out = {one: scores(one, runs, catalogue.TUNING_SEEDS) for one in line}
        chosen, near = line[place], [line[i] for i in (place - 1, place + 1) if 0 <= i < len(line)]
        over = [
            f"{lead.mean:+z.2f} over {one.rho:g} ({lead.error:.2f}, {lead.n} seeds)"
            for one in near
            if (lead := paired_difference(held_out[chosen], held_out[one])).n > 1
        ]
        if over:
            parts.append(f"{name}: {' and '.join(over)}")
    if not parts:
        return "The runs of the grid are not among these results."
    begin = "Held-out score of the chosen rho over its neighbours, in points, with the standard error of the paired"
    return f"{begin} difference: {'; '.join(parts)}."
