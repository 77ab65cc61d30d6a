"""What an exhibit is: a table of the paper or a study as one value, with its numbers, words, figures and claims."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.cells import trained_anew, warnings
from analysis.document import Document, origin, row_notes
from analysis.statistics import Interval
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import Run, SpecError

LAST = 1000
"""The place of an exhibit that names none."""


@dataclass(frozen=True)
class Target:
    """What one table is made of: a table, an experiment that fills a part of one, or the grid of either."""

    name: str
    cells: tuple[Run, ...]
    seeds: int
    used: tuple[Run, ...] = ()
    """Of a grid: the cells of the table that it was run for."""
    root: Path = DEFAULT_ROOT
    """The results root that the runs belong to."""
    varies: tuple[str, ...] = ()
    """The fields that its experiments declare to vary."""

    @property
    def tuning(self) -> bool:
        """Whether this is the grid of a table."""
        return self.name.endswith("-tuning")

    @cached_property
    def runs(self) -> list[Run]:
        """The runs that the table expects."""
        return with_seeds(self.cells, self.seeds)


Shown = Mapping[str, Target]
"""The tables that are shown together, by name."""


@dataclass(frozen=True)
class View:
    """A target's numbers, from which an exhibit writes its text."""

    target: Target
    frame: pd.DataFrame
    """One row a finished run."""
    numbers: pd.DataFrame
    """One row a row of the table."""
    marks: tuple[str, ...] = ()
    """Of each row: what stands behind its score, a footnote's mark or nothing."""

    @property
    def rows(self) -> list[Any]:
        """The rows of the numbers, as tuples with names."""
        return list(self.numbers.itertuples())


@dataclass(frozen=True)
class Comparison:
    """One piece of evidence for or against a claim."""

    where: str
    what: str
    difference: Interval
    bootstrap: tuple[float, float]
    verdict: str
    run_ids: str
    claim: str = ""
    table: str = ""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper's abstract, or of ours, that an exhibit bears on; several may bear on the same one."""

    text: str
    evidence: Callable[[Target, pd.DataFrame, Shown], list[Comparison]]
    """From the exhibit's own target, the runs by id, and all tables that are shown."""
    place: int | None = None
    """Where it stands among the claims; left out, where the exhibit stands."""
    further: bool = False
    """Whether it is about an arm that the paper does not have: it is mentioned only where there are runs of it."""


@dataclass(frozen=True)
class Picture:
    """A figure of an exhibit."""

    name: str
    caption: str
    draw: Callable[..., Figure]
    """From the results and the exhibit's target; or one target for each name in `tables`, without cells if that table
    is not shown."""
    tables: tuple[str, ...] = ()
    """The tables whose cells it draws, if not the exhibit's alone; one of them is enough to draw it."""
    place: int | None = None
    """Where it stands among the figures; left out, where the exhibit stands."""


def _nothing(view: View) -> Iterable[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A table of the paper or a study. Its functions get frames of runs and return numbers, text and figures."""

    name: str
    """That of the table: what an experiment's TABLE says."""
    title: str
    part: str = "{name}"
    """The title of the part that one experiment fills."""
    shows: Callable[[Run], bool]
    """Whether a cell is one that this exhibit can show."""
    numbers: Callable[[pd.DataFrame, Sequence[Run], int, Sequence[str]], pd.DataFrame]
    """From one row a finished run, the cells at seed 0, the number of seeds, and the fields that are declared to vary:
    one row a row of the table."""
    text: Callable[[View], pd.DataFrame]
    """The table's columns as people read them."""
    sentences: Callable[[View], Iterable[str]] = _nothing
    """What the numbers say, a sentence each."""
    notes: Callable[[View], Iterable[str]] = _nothing
    """How to read the numbers."""
    claims: tuple[Claim, ...] = ()
    figures: tuple[Picture, ...] = ()
    place: int = LAST
    """Where it stands among the exhibits; at the same place they are in the order of their names."""
    form: type[Document] = Document

    def document(self, target: Target, frame: pd.DataFrame, failures: Mapping[str, str] | None = None) -> Document:
        """The table of these cells, ready to be written.

        Args:
            target: The cells.
            frame: One row a finished run.
            failures: Why runs failed, by run_id.

        Raises:
            SpecError: if one of the cells is not for this exhibit.
        """
        if strange := next((cell for cell in target.cells if not self.shows(cell)), None):
            raise SpecError(
                f"{target.name} lists {strange.title!r}, a {strange.kind} run, which the table of {self.name} does not "
                f"show: give it a TABLE that does, or an exhibit in analysis/exhibits/."
            )
        numbers = self.numbers(frame, target.cells, target.seeds, target.varies)
        marks, missing = row_notes(numbers, failures or {})
        view = View(target, frame, numbers, tuple(marks))
        return self.form(
            name=target.name,
            title=self.title if target.name == self.name else self.part.format(name=target.name),
            origin=origin(frame, numbers, target.cells, target.seeds),
            cells=self.text(view),
            claims=tuple(self.sentences(view)),
            notes=(
                *warnings(frame, numbers),
                *missing,
                *trained_anew(frame, target.cells, target.seeds),
                *self.notes(view),
            ),
            numbers=numbers,
        )
