"""The exhibits: one file for each table of the paper, and for each study that needs more than the default exhibit.

Every file in this folder that declares EXHIBIT is an exhibit. A table of the experiments without a file is a study,
shown by `studies`. The grid of any table is shown by `tuning`.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis import plots
from analysis.exhibit import Exhibit, Shown, Target
from analysis.exhibits.studies import study
from analysis.exhibits.tuning import grid
from analysis.frames import Results
from experiments.harness.runs import catalogue


@dataclass(frozen=True)
class Page:
    """A drawn figure."""

    name: str
    caption: str
    files: dict[str, bytes]
    """PDF and PNG, by path below a results folder."""
    exhibit: str
    """The name of its table."""


@cache
def declared() -> dict[str, Exhibit]:
    """The exhibits with a file in this folder, by name, in order."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    exhibits = [module.EXHIBIT for module in modules if hasattr(module, "EXHIBIT")]
    return {exhibit.name: exhibit for exhibit in sorted(exhibits, key=_place)}


def tables() -> list[str]:
    """The tables that the experiments fill, in the order of their exhibits."""
    names = dict.fromkeys(experiment.table for experiment in catalogue.catalogue().values())
    return [exhibit.name for exhibit in sorted(map(exhibit_of, names), key=_place)]


def exhibit_of(name: str) -> Exhibit:
    """The exhibit that shows a table, an experiment, or the grid of either."""
    if name.endswith("-tuning"):
        name = name.removesuffix("-tuning")
        of = declared().get(name)
        return grid(name, of.title.partition(":")[0] if of and name.startswith("table") else name)
    experiments = catalogue.catalogue()
    if name in experiments and name not in {experiment.table for experiment in experiments.values()}:
        name = experiments[name].table
    return declared().get(name) or study(name)


def all_exhibits(shown: Iterable[str]) -> list[Exhibit]:
    """The exhibits with a file, and those of the named tables without one, in order."""
    others = [exhibit_of(name) for name in shown if name in tables() and name not in declared()]
    return sorted([*declared().values(), *others], key=_place)


def pages(results: Results, shown: Shown) -> list[Page]:
    """The figures of some tables, in order.

    Args:
        results: runs and curves.
        shown: the tables by name.
    """
    pictures = []
    for exhibit in all_exhibits(shown):
        for picture in exhibit.figures:
            names = picture.tables or (exhibit.name,)
            if any(name in shown for name in names):
                place = exhibit.place if picture.place is None else picture.place
                pictures.append((place, picture, names, exhibit.name))
    pictures.sort(key=lambda entry: entry[0])

    def drawn() -> Iterator[tuple[str, Figure]]:
        for _, picture, names, _ in pictures:
            with mpl.rc_context(plots.STYLE):
                yield picture.name, picture.draw(results, *(shown.get(name, Target(name, (), 0)) for name in names))

    pages = []
    for (_, picture, _, owner), files in zip(pictures, plots.all_files(drawn(), len(pictures)), strict=True):
        by_path = {f"figures/{name}": page for name, page in files.items()}
        pages.append(Page(picture.name, picture.caption, by_path, owner))
    return pages


def _place(exhibit: Exhibit) -> tuple[int, str]:
    return exhibit.place, exhibit.name
