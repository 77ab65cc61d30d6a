"""The arms: which runs belong to each, what each is compared with, and how each is named and drawn.

Standard library only. Experiments, tables, figures, claims, the report and the command line read this list. To add an
arm, add one entry here and one line to an experiment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.harness.runs.spec import Run

Fields = Mapping[str, Any]
"""A run's fields by their names in records."""

BASE_OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
"""The base optimizers, and their names in tables."""

CHOSEN = ("rho",)
"""Fields that are tuned for each arm: they may differ in every comparison, but a cell with an equal value is preferred.
"""


def zero(value: float) -> bool:
    """True without a perturbation."""
    return value == 0


def positive(value: float) -> bool:
    """True with a perturbation."""
    return value > 0


def one(value: int) -> bool:
    """True if the mini-batch is not split."""
    return value == 1


def several(value: int) -> bool:
    """True if the mini-batch is split into micro-batches."""
    return value > 1


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method that runs are trained with."""

    name: str
    """Its name in records, CSV files and on the command line."""
    words: str
    """Its name in tables: `{base}` stands for the base optimizer, `{m}` for the number of micro-batches."""
    legend: str
    """Its name in the legends of figures, where all values of m share a line; `{base}` as above."""
    title: str
    """Its name in lists of runs; `{optimizer}`, `{m}` and `{rho}` are filled in from the run."""
    colour: str
    line: Any
    """Matplotlib's line style."""
    mark: str
    """Matplotlib's marker."""
    has: Mapping[str, Callable[[Any], bool]]
    """The conditions that a run of this arm meets: one for each field that defines the arm."""
    change: Callable[[Fields], dict[str, Any]] | None = None
    """For an arm that is defined relative to its block's base: takes the base's fields, returns those that differ."""
    against: tuple[str, ...] = ()
    """The arms that tables compare it with."""
    claimed: tuple[str, ...] = ()
    """The arms of `against` whose comparison is printed under the table."""

    def called(self, run: "Run") -> str:
        """The arm's name in tables, for this run."""
        return self.words.format(base=BASE_OPTIMIZERS[run.base_optimizer], m=run.micro_batches)

    def described(self, run: "Run") -> str:
        """The arm in the title of this run."""
        return self.title.format(optimizer=run.base_optimizer, m=run.micro_batches, rho=f"{run.rho:g}")

    def changed(self, base: Fields) -> dict[str, Any]:
        """The fields that this arm changes in a base with these fields."""
        return self.change(base) if self.change else {}

    def fits(self, fields: Fields) -> bool:
        """Whether a run with these fields meets every condition of the arm."""
        return all(condition(fields[name]) for name, condition in self.has.items())


ARMS = {
    arm.name: arm
    for arm in (
        Arm(
            name="base",
            words="{base}",
            legend="{base}",
            title="{optimizer}",
            colour="#262626",
            line="-",
            mark="o",
            has={"rho": zero, "micro_batches": one},
        ),
        Arm(
            name="twice",
            words="{base}, twice the epochs",
            legend="{base}, twice the epochs",
            title="{optimizer}, twice the epochs",
            colour="#7f7f7f",
            line=(0, (5, 2, 1, 2)),
            mark="p",
            has={"rho": zero, "micro_batches": one},
            change=lambda base: {"epochs": 2 * base["epochs"]},
            against=("base",),
            claimed=("base",),
        ),
        Arm(
            name="control",
            words="{base}, m={m} micro-batches",
            legend="{base} on micro-batches",
            title="{optimizer} over m={m}",
            colour="#b3b3ec",
            line=":",
            mark="v",
            has={"rho": zero, "micro_batches": several},
            against=("base",),
            claimed=("base",),
        ),
        Arm(
            name="sam",
            words="SAM",
            legend="SAM",
            title="SAM rho={rho}",
            colour="#d98c26",
            line="--",
            mark="s",
            has={"rho": positive, "micro_batches": one},
            against=("base", "twice"),
            claimed=("base", "twice"),
        ),
        Arm(
            name="shared",
            words="SAM, m={m} micro-batches",
            legend="SAM on micro-batches",
            title="SAM over m={m} rho={rho}",
            colour="#8c6bb1",
            line=(0, (5, 1)),
            mark="X",
            has={"rho": positive, "micro_batches": several, "shared": bool},
            against=("base", "sam", "control"),
            claimed=("sam", "control"),
        ),
        Arm(
            name="msam",
            words="mSAM, m={m}",
            legend="mSAM",
            title="mSAM m={m} rho={rho}",
            colour="#1b7837",
            line="-.",
            mark="D",
            has={"rho": positive, "micro_batches": several},
            against=("base", "twice", "sam", "control", "shared"),
            claimed=("sam", "control", "shared", "twice"),
        ),
        Arm(
            name="asam",
            words="ASAM",
            legend="ASAM",
            title="ASAM rho={rho}",
            colour="#b2477d",
            line=(0, (3, 1, 1, 1)),
            mark="^",
            has={"rho": positive, "micro_batches": one, "adaptive": bool},
            against=("base", "sam"),
            claimed=("base",),
        ),
        Arm(
            name="masam",
            words="mSAM with ASAM's perturbation, m={m}",
            legend="mSAM with ASAM's perturbation",
            title="mSAM (ASAM's perturbation) m={m} rho={rho}",
            colour="#2b6ca3",
            line=(0, (1, 1)),
            mark="P",
            has={"rho": positive, "micro_batches": several, "adaptive": bool},
            against=("base", "sam", "control", "asam"),
            claimed=("asam", "control"),
        ),
    )
}
"""By name, in the order of the tables' rows. If a run fits several entries, its arm is the one with most conditions."""


def arm_of(run: "Run") -> Arm:
    """The arm of a single run. A run of an arm that is relative to a base counts as a base."""
    fields = run.flat
    fitting = [arm for arm in reversed(ARMS.values()) if arm.change is None and arm.fits(fields)]
    return max(fitting, key=lambda arm: len(arm.has))


def arms_of(cells: Iterable["Run"], varies: Sequence[str] = ()) -> dict["Run", Arm]:
    """The arm of each cell of a table, including arms that are relative to a base.

    Args:
        cells: The cells of a table.
        varies: The fields that the study varies; a difference from the base in one of them does not make an arm.
    """
    arms = {cell: arm_of(cell) for cell in cells}
    for arm in (arm for arm in ARMS.values() if arm.change):
        for base in [cell for cell in arms if arm.fits(cell.flat)]:
            changed = arm.changed(base.flat)
            if not changed.keys() & set(varies):
                arms |= {cell: arm for cell in arms if cell.flat == {**base.flat, **changed}}
    return arms


def reference(cell: "Run", name: str, arms: Mapping["Run", Arm], varies: Sequence[str] = ()) -> "Run | None":
    """The cell of another arm that a cell is compared with, or None.

    The two cells are equal in all fields except those that define their arms and, if there is no such cell, those that
    the study varies. A field on which both arms have the same condition (m for mSAM and the control) must be equal too.
    Only `CHOSEN` fields may always differ, and a cell with equal values is preferred.

    Args:
        cell: The cell to compare.
        name: The other arm.
        arms: The arms of all cells of the table, from `arms_of`.
        varies: The fields that the study declares.
    """
    mine, other = arms[cell], ARMS[name]
    free = {field for field in {*mine.has, *other.has} if mine.has.get(field) is not other.has.get(field)}
    free |= {*CHOSEN, *mine.changed(cell.flat), *other.changed(cell.flat)}
    known = [c for c, arm in arms.items() if arm is other and c != cell]
    for also in ((), varies):
        fits = [c for c in known if not differing(c, cell) - free - set(also)]
        if fits:
            return min(fits, key=lambda c: len(differing(c, cell)))
    return None


def differing(a: "Run", b: "Run") -> set[str]:
    """The fields in which two runs differ."""
    return {name for name, value in a.flat.items() if b.flat.get(name) != value}
