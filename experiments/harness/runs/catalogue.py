"""The list of experiments, and the runs that a name stands for. Standard library only.

An experiment is a module of `experiments/` with a docstring and

    TABLE     the table its runs fill, for example "table1"
    RUNS      profile -> cells: the runs of the table, each written once, at its first seed
    TUNING    profile -> cells: the grid that chose the hyper-parameters in RUNS (optional)
    VARIES    the fields that a study varies, for example ("batch_size",) (optional). Two cells are compared
              if they differ only in the fields that define their arms; if there is no such pair, these may differ too
    PRIMARY   the two arms whose comparison on this experiment's network on CIFAR-10 is the primary one of every
              profile, for example ("msam", "shared") (in one experiment at most, written before its runs)

A target is an experiment's name, a table's name, either of them followed by "-tuning", or "all": every table, without
the grids.
"""

import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import experiments
from experiments.harness.runs.checks import PROFILES, SpecError, unknown
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.run import Run, from_dict, names

SEEDS = {"smoke": 2, "cpu": 1, "gpu": 8, "paper": 5}
"""Default number of paired seeds (0, 1, ...) of each profile."""

PUBLISHED = "published"
"""Instead of a number of seeds: as many as the committed results are to have."""

PUBLISHED_SEEDS = {"cpu": {"table1": 16, "placebo": 16, "table4": 3, "theory": 3}}
"""Seeds of committed tables by profile, where they differ from `SEEDS`; other tables of the cpu profile have 8."""

TUNING_SEEDS = 2
"""Number of seeds of each cell of a grid, in every profile; see `pairs` of `grids.grid_of_arms`."""

MARGINS = {"smoke": 1.0, "cpu": 1.0, "gpu": 0.2, "paper": 0.2}
"""The margin of equivalence of each profile, in points of accuracy, fixed before the runs: a smaller effect is none."""


@dataclass(frozen=True)
class Experiment:
    """The contents of one experiment module."""

    name: str
    table: str
    summary: str
    runs: Mapping[str, Sequence[Run]]
    tuning: Mapping[str, Sequence[Run]]
    varies: tuple[str, ...] = ()
    primary: tuple[str, str] | None = None
    """The two arms of the primary comparison, if it is on this experiment's network."""


@dataclass(frozen=True)
class Primary:
    """The primary comparison of a profile: the first arm over the second, on one network."""

    table: str
    model: str
    dataset: str
    arms: tuple[str, str]


def catalogue() -> dict[str, Experiment]:
    """All experiments by name, in the order of their tables."""
    by_name = {}
    for module_info in pkgutil.iter_modules(experiments.__path__):
        if module_info.ispkg or module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"experiments.{module_info.name}")
        by_name[module_info.name] = Experiment(
            name=module_info.name,
            table=module.TABLE,
            summary=(module.__doc__ or "").strip().split("\n")[0],
            runs=module.RUNS,
            tuning=getattr(module, "TUNING", {}),
            varies=_varies(module),
            primary=_primary(module),
        )
    if len(several := [name for name, experiment in by_name.items() if experiment.primary]) > 1:
        raise SpecError(f"{' and '.join(several)} declare PRIMARY, but a profile has one primary comparison: keep one.")
    return dict(sorted(by_name.items(), key=lambda item: (item[1].table, item[0])))


def targets() -> list[str]:
    """Every name that `cells` accepts."""
    known = catalogue().values()
    names = list(dict.fromkeys([*(e.table for e in known), *(e.name for e in known)]))
    grids = [f"{n}-tuning" for n in names if any(e.tuning and n in (e.name, e.table) for e in known)]
    return [*names, *grids, "all"]


def cells(target: str, profile: str) -> list[Run]:
    """The cells (specs at their first seed) of an experiment, a table, or one of their grids.

    Raises:
        SpecError: for an unknown target or profile; the message lists the known ones.
    """
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    if target not in targets():
        raise unknown("experiment or table", target, targets())
    name, tuning = target.removesuffix("-tuning"), target.endswith("-tuning")
    chosen = [e for e in catalogue().values() if name in (e.name, e.table, "all")]
    lists = [(e.tuning if tuning else e.runs).get(profile, ()) for e in chosen]
    return list(dict.fromkeys(cell for cells_of_one in lists for cell in cells_of_one))


def runs(target: str, profile: str, seeds: int | str | None = None, changes: Sequence[str] = ()) -> list[Run]:
    """The runs of a target: its cells at their first seed and the next ones, as many as the profile has or `seeds`.

    Args:
        target: An experiment, a table, or one of their grids.
        profile: Size of the runs.
        seeds: Number of seeds; None takes the profile's default, `PUBLISHED` that of each committed table.
        changes: "FIELD=VALUE" strings, applied to every run.

    Raises:
        SpecError: for an unknown name, a spec that cannot be run, or a target without runs in the profile.
    """
    if isinstance(seeds, int) and seeds < 1:
        raise SpecError(f"seeds is {seeds}, but must be 1 or more.")
    if seeds == PUBLISHED and not target.endswith("-tuning"):
        specs = _published(target, profile)
    else:
        specs = with_seeds(cells(target, profile), seeds if isinstance(seeds, int) else usual_seeds(target, profile))
    if not specs:
        raise SpecError(f"{target} has no runs in the profile {profile!r}: choose another profile with --profile.")
    if not changes:
        return specs
    fields = dict(field_and_value(text) for text in changes)
    return list(dict.fromkeys(from_dict({**spec.to_dict(), **fields}) for spec in specs))


def usual_seeds(target: str, profile: str) -> int:
    """The number of seeds of a table, an experiment or a grid unless another one is asked for."""
    return TUNING_SEEDS if target.endswith("-tuning") else SEEDS.get(profile, 1)


def published_seeds(table: str, profile: str) -> int:
    """The number of seeds that a committed table or grid is to have."""
    if table.endswith("-tuning"):
        return TUNING_SEEDS
    usual = 8 if profile == "cpu" else SEEDS.get(profile, 1)
    return PUBLISHED_SEEDS.get(profile, {}).get(table, usual)


def _published(target: str, profile: str) -> list[Run]:
    """The runs of the committed tables of a target, seed by seed."""
    chosen = [e for e in catalogue().values() if target in (e.name, e.table, "all")]
    counted = [(cell, published_seeds(e.table, profile)) for e in chosen for cell in e.runs.get(profile, ())]
    cells(target, profile)  # which rejects unknown names
    most = max((seeds for _, seeds in counted), default=0)
    by_seed = (replace(cell, seed=cell.seed + k) for k in range(most) for cell, seeds in counted if k < seeds)
    return list(dict.fromkeys(by_seed))


def varies(target: str) -> tuple[str, ...]:
    """The fields that the experiments of a target vary, in the order declared."""
    name = target.removesuffix("-tuning")
    chosen = [e for e in catalogue().values() if name in (e.name, e.table)]
    return tuple(dict.fromkeys(field for e in chosen for field in e.varies))


def primary(profile: str) -> Primary | None:
    """The primary comparison of a profile; None if no experiment declares one for a network on CIFAR-10."""
    for experiment in catalogue().values():
        for cell in experiment.runs.get(profile, ()):
            if experiment.primary and cell.dataset == "cifar10":
                return Primary(experiment.table, cell.model, cell.dataset, experiment.primary)
    return None


def _primary(module: ModuleType) -> tuple[str, str] | None:
    declared = getattr(module, "PRIMARY", None)
    if declared is None:
        return None
    if not isinstance(declared, tuple | list) or len(declared) != 2:
        raise SpecError(f"{module.__name__} has PRIMARY {declared!r}, but it must be two arms: {', '.join(ARMS)}.")
    for name in declared:
        if name not in ARMS:
            raise unknown("arm", name, list(ARMS))
    first, second = declared
    return first, second


def _varies(module: ModuleType) -> tuple[str, ...]:
    fields = tuple(getattr(module, "VARIES", ()))
    if unknown := [field for field in fields if field not in names()]:
        known = ", ".join(names())
        raise SpecError(f"{module.__name__} varies {unknown[0]!r}, which is not a field; the fields are: {known}.")
    return fields


def field_and_value(text: str) -> tuple[str, Any]:
    """The field and the value of "FIELD=VALUE"; a value that is not JSON is text.

    Raises:
        SpecError: if the text has another form or names no field.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise SpecError(f"--set and --where take FIELD=VALUE, as in --set epochs=3, but got {text!r}.")
    if name not in names():
        raise unknown("field", name, list(names()))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
