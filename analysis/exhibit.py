"""`Exhibit` declares a table of the paper or a study: its title, numbers, text, figures and claims."""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.cells import references, retrained, warnings
from analysis.contrasts import Contrast
from analysis.document import Document, origin, row_notes
from analysis.predictions import Predictions
from analysis.statistics import Interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.methods import Arm, arms_of
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import Run, SpecError

LAST = 1000
"""The default place of an exhibit."""


@dataclass(frozen=True)
class Target:
    """The runs of one table, of an experiment that fills a part of a table, or of the grid of either."""

    name: str
    cells: tuple[Run, ...]
    seeds: int
    used: tuple[Run, ...] = ()
    """For a grid: the cells of the table that it chooses for."""
    root: Path = DEFAULT_ROOT
    """The results root that the runs belong to."""
    varies: tuple[str, ...] = ()
    """The fields that its experiments declare to vary."""

    @cached_property
    def arms(self) -> dict[Run, Arm]:
        """The arm of each cell."""
        return arms_of(self.cells, self.varies)

    @cached_property
    def references(self) -> dict[Run, dict[str, Run | None]]:
        """The cells that each cell is compared with, see `cells.references`."""
        return references(self.cells, self.varies)

    @property
    def tuning(self) -> bool:
        """Whether this is the grid of a table."""
        return self.name.endswith("-tuning")

    @property
    def command(self) -> str:
        """The command that makes its runs."""
        profile = self.cells[0].profile
        seeds = "" if self.seeds == catalogue.usual_seeds(self.name, profile) else f" --seeds {self.seeds}"
        where = "" if self.root == DEFAULT_ROOT else f" --results {shlex.quote(str(self.root))}"
        return f"python -m experiments run {self.name} --profile {profile}{seeds}{where}"

    @cached_property
    def runs(self) -> list[Run]:
        """The runs that the table expects."""
        return with_seeds(self.cells, self.seeds)


Shown = Mapping[str, Target]
"""The tables shown together, by name."""


@dataclass(frozen=True)
class View:
    """The numbers of a target, from which an exhibit writes its text."""

    target: Target
    frame: pd.DataFrame
    """One row for each finished run."""
    numbers: pd.DataFrame
    """One row for each row of the table."""
    marks: tuple[str, ...] = ()
    """For each row, the footnote mark after its score, or an empty string."""

    @property
    def rows(self) -> list[Any]:
        """The rows of the numbers as named tuples."""
        return list(self.numbers.itertuples())


@dataclass(frozen=True)
class Comparison:
    """One piece of evidence for or against a claim."""

    where: str
    what: str
    difference: Interval
    """Its interval is not adjusted for the number of comparisons."""
    bootstrap: tuple[float, float]
    run_ids: str
    verdict: str = ""
    claim: str = ""
    table: str = ""
    p: float = math.nan
    """Of a two-sided t test of the differences against the claim's line; NaN without an interval."""
    adjusted_p: float = math.nan
    """After Holm's adjustment over the comparisons of the family."""
    family: str = ""
    primary: bool = False
    """Whether it is the primary comparison of its profile."""
    margin: float = math.nan
    """The margin of equivalence; NaN if none is declared."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper's abstract, or of ours, that an exhibit tests. Several exhibits may test the same claim."""

    contrast: Contrast
    """What it says, and what would support it."""
    evidence: Callable[[Target, pd.DataFrame, Shown], list[Comparison]]
    """Takes the exhibit's target, the runs by id, and all shown tables; returns comparisons without verdicts."""
    place: int | None = None
    """Its place among the claims; by default that of the exhibit."""

    @property
    def text(self) -> str:
        """The claim in words."""
        return self.contrast.text

    @property
    def unit(self) -> str:
        """What its differences measure."""
        return self.contrast.unit

    @property
    def expected(self) -> int:
        """The sign of the differences, compared with `line`, that supports it."""
        return self.contrast.expected

    @property
    def line(self) -> float:
        """What the intervals are compared with."""
        return self.contrast.line

    @property
    def further(self) -> bool:
        """Whether it is about an arm that the paper does not have: it is mentioned only if it has runs."""
        return self.contrast.further


@dataclass(frozen=True)
class Picture:
    """A figure of an exhibit."""

    name: str
    caption: str
    draw: Callable[..., Figure]
    """Takes the results and the exhibit's target; or one target for each name in `tables`, without cells if that table
    is not shown."""
    tables: tuple[str, ...] = ()
    """The tables whose cells it draws, if not only the exhibit's; it is drawn if at least one is shown."""
    place: int | None = None
    """Its place among the figures; by default that of the exhibit."""


def _none(view: View) -> Iterable[str]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """A table of the paper or a study. Its functions get frames of runs and return numbers, text and figures."""

    name: str
    """The name of the table, as in an experiment's TABLE."""
    title: str
    part: str = "{name}"
    """The title when only one experiment of the table is shown."""
    shows: Callable[[Run], bool]
    """Whether this exhibit can show a cell."""
    numbers: Callable[[pd.DataFrame, Sequence[Run], int, Sequence[str]], pd.DataFrame]
    """Takes the frame of finished runs, the cells at seed 0, the number of seeds, and the fields declared to vary;
    returns one row for each row of the table."""
    with_predictions: Callable[[pd.DataFrame, Target, pd.DataFrame, Predictions], pd.DataFrame] | None = None
    """Adds columns that need the predictions of the runs: takes the numbers, the target, the frame and the predictions.
    """
    text: Callable[[View], pd.DataFrame]
    """The columns of the table as text."""
    sentences: Callable[[View], Iterable[str]] = _none
    """The findings, one sentence each."""
    notes: Callable[[View], Iterable[str]] = _none
    """How to read the numbers."""
    claims: tuple[Claim, ...] = ()
    figures: tuple[Picture, ...] = ()
    place: int = LAST
    """Its place among the exhibits; at equal places they are sorted by name."""
    form: type[Document] = Document

    def document(
        self,
        target: Target,
        frame: pd.DataFrame,
        states: Mapping[str, str] | None = None,
        predictions: Predictions | None = None,
    ) -> Document:
        """The table of the target's cells, ready to be written.

        Args:
            target: The cells.
            frame: One row for each finished run.
            states: Why runs failed or how far they are, by run_id.
            predictions: The predictions of the runs, if any.

        Raises:
            SpecError: if this exhibit cannot show one of the cells.
        """
        if unshown := next((cell for cell in target.cells if not self.shows(cell)), None):
            raise SpecError(
                f"{target.name} lists {unshown.title!r}, a {unshown.kind} run, which the table of {self.name} cannot "
                f"show: use another TABLE, or add an exhibit to analysis/exhibits/."
            )
        numbers = self.numbers(frame, target.cells, target.seeds, target.varies)
        if self.with_predictions and predictions:
            numbers = self.with_predictions(numbers, target, frame, predictions)
        marks, missing = row_notes(numbers, states or {})
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
                *retrained(frame, target.cells, target.seeds),
                *self.notes(view),
            ),
            numbers=numbers,
        )
