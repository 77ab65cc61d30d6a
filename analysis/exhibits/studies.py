"""Studies: accuracy against a field that the study varies.

A table of the experiments without a file in this folder is shown as `study(name)`. A file that declares
EXHIBIT = study(name, title, caption) gives it a title and a caption.
"""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from analysis import scores
from analysis.arms import METHOD_WORDS, METHODS, base_name
from analysis.cells import TUNED, in_words
from analysis.cells import scores as scores_of
from analysis.exhibit import LAST, Exhibit, Picture, Target
from analysis.frames import Results
from analysis.plots import (
    Series,
    add_legend,
    draw_points,
    draw_zero,
    limit_to_most,
    over_base,
    panels_of,
    row_of_panels,
    seeds_of,
    set_ticks,
)
from analysis.sentences import family_sentence
from analysis.statistics import mean_interval
from experiments.harness.runs.spec import Run

Draw = Callable[[Results, Target], Figure]


def study(name: str, title: str = "", caption: str = "", *, draw: Draw | None = None, place: int = LAST) -> Exhibit:
    """The exhibit of a study of training runs, with the columns of every table of scores and one figure.

    Args:
        name: The name of the study, as in its experiment's TABLE.
        title: The title of the table; made from the name by default.
        caption: The caption of the figure; the title by default.
        draw: Draws the figure; by default the accuracy against the field that the cells vary.
        place: The place among the exhibits.
    """
    title = title or f"{name}: test accuracy"
    return Exhibit(
        name=name,
        title=title,
        part="{name}: test accuracy",
        shows=scores.shows,
        numbers=scores.numbers,
        text=scores.text,
        sentences=lambda view: [*scores.sentences(view), *family_sentence(view)],
        notes=scores.notes,
        figures=(Picture(name, caption or f"{title}.", draw or against_varied),),
        place=place,
    )


def against(field: str, words: str, logarithmic: bool = False) -> Draw:
    """A figure of each method's accuracy over the base optimizer's against a field, one panel for each model.

    Differences are paired by seed, at the same value of the field.

    Args:
        field: The field.
        words: The label of the axis.
        logarithmic: Whether the axis is logarithmic, with a tick at each value.
    """

    def draw(results: Results, target: Target) -> Figure:
        panels, frame = panels_of(target.cells), results.runs.set_index("run_id")
        bases = over_base(target.cells, target.varies)
        figure, row = row_of_panels(len(panels))
        for axes, (title, rows) in zip(row, panels.items(), strict=True):
            shown = [cell for cell in rows if cell.flat[field] or not logarithmic]  # such an axis has no place for 0
            draw_zero(axes, (cell for cell in rows if target.arms[cell].name == "base"), target.arms)
            for method in METHODS:
                line = [cell for cell in shown if target.arms[cell].name == method != "base"]
                label = _label(line, target) if line else ""
                draw_points(axes, frame, line, target.seeds, Series(field, label, over=bases), target.arms)
            counted = seeds_of(mean_interval(scores_of(cell, frame, target.seeds)) for cell in rows)
            axes.set(title=f"{title}{counted}", xlabel=words, ylabel=f"accuracy over {base_name(rows[0])}, points")
            limit_to_most(axes)
            if logarithmic:
                set_ticks(axes, (cell.flat[field] for cell in shown))
            add_legend(axes)
        return figure

    return draw


def _label(line: Sequence[Run], target: Target) -> str:
    """The method of these cells, with its m if they have one."""
    if len({cell.micro_batches for cell in line}) == 1:
        return target.arms[line[0]].called(line[0])
    return METHOD_WORDS[target.arms[line[0]].name].format(base=base_name(line[0]))


def against_varied(results: Results, target: Target) -> Figure:
    """The accuracy against the numeric field that the study declares to vary or, without one, that its cells vary."""
    numbers = [name for name in target.varies if all(isinstance(cell.flat[name], int | float) for cell in target.cells)]
    field = numbers[0] if numbers else _varied(target.cells)
    return against(field, in_words(field))(results, target)


def _varied(cells: Sequence[Run]) -> str:
    """The numeric field with several values for one method and model; `rho` if there is none."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.model, cell.dataset), []).append(cell)
    varied = [
        name
        for group in groups.values()
        for name in group[0].to_dict()
        if len(distinct := {cell.flat[name] for cell in group}) > 1
        and all(isinstance(value, int | float) for value in distinct)
    ]
    return min(varied, key=lambda name: (name in TUNED, TUNED.index(name) if name in TUNED else 0), default="rho")
