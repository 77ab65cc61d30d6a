"""Lists of cells that experiments share: the arms of a block, grids, seeds, and what is measured of them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from experiments.harness.runs.run import Run, hints
from experiments.harness.runs.spec import Curvature, Network, Timing, Training

R = TypeVar("R", bound=Run)


def four_methods(base: Training, *, micro_batches: int, sam_rho: float, msam_rho: float) -> list[Training]:
    """A block of Table 1: base optimizer, the control over the same micro-batches, SAM and mSAM."""
    return [
        base,
        replace(base, micro_batches=micro_batches),
        replace(base, rho=sam_rho),
        replace(base, micro_batches=micro_batches, rho=msam_rho),
    ]


def curvature_of(cells: Iterable[Training], *, examples: int, rho: float) -> list[Run]:
    """Curvature runs of the networks that these cells end with, on so many training and so many test examples."""
    measured: dict[str, Any] = {"measured_examples": examples, "measured_rho": rho}
    return [Curvature(**_fields(cell, Training), **measured) for cell in cells]


def timing_of(cell: Training, *, rho: float, micro_batches: int, rounds: int, workers: int = 1) -> Timing:
    """The timing of all arms' steps on the network of a cell, with m up to `micro_batches`."""
    fields = _fields(cell, Network) | {"rho": rho, "micro_batches": micro_batches}
    return Timing(**fields, rounds=rounds, workers=workers)


def timed_steps(timing: Timing, workers: int = 1) -> list[Training]:
    """Whose steps a timing takes on so many workers: those of the four methods, with m = 2, 4, ... up to its own.

    Several workers perturb their own micro-batches, so an m that they do not divide is left out.
    """
    counts = [2**k for k in range(1, timing.micro_batches.bit_length()) if not 2**k % workers]
    base = Training(**_fields(timing, Network) | {"micro_batches": 1, "rho": 0.0}, epochs=1)
    plain = [base, *(replace(base, micro_batches=m) for m in counts)]
    return plain + [replace(base, micro_batches=m, rho=timing.rho) for m in (1, *counts)]


def _fields(run: Run, cls: type[Run]) -> dict[str, Any]:
    """The fields of a run that every run of this class has."""
    return {name: getattr(run, name) for name in hints(cls)}


def with_networks(specs: Iterable[Run]) -> list[Run]:
    """The specs, each behind the training whose network it measures."""
    return list(dict.fromkeys(s for spec in specs for s in (spec.network, spec) if s is not None))


def tuning_grid(
    base: Training,
    *,
    micro_batches: Sequence[int],
    rhos: Sequence[float],
    learning_rates: Sequence[float] = (),
    holdout_examples: int = 5000,
) -> list[Training]:
    """The grid that chooses a block's hyper-parameters, the same for every method.

    It is scored on training examples that are held out. First the base optimizer's learning rate (unless it is
    a published one); then, at the one that `base` has, rho for SAM, and rho and m for mSAM.
    """
    base = replace(base, holdout_examples=holdout_examples)
    return [
        *(replace(base, learning_rate=learning_rate) for learning_rate in learning_rates),
        *(replace(base, micro_batches=m, rho=rho) for m in (1, *micro_batches) for rho in rhos),
    ]


def with_seeds(cells: Iterable[R], seeds: int) -> list[R]:
    """Every cell at seeds 0, ..., seeds - 1; seed by seed, so that an interrupted sweep has whole rows."""
    cells = list(cells)
    return list(dict.fromkeys(replace(cell, seed=seed) for seed in range(seeds) for cell in cells))


def with_ranks(specs: Iterable[Run], ranks: int) -> list[Run]:
    """The specs with `ranks` data-parallel processes where that divides their micro-batches; the others as they are.

    So are the networks that curvature runs among them measure: with other ranks they would be other networks.
    """
    specs = list(specs)
    measured = {spec.network for spec in specs}

    def divided(spec: Run) -> Run:
        if type(spec) is not Training or ranks == 1 or spec in measured or not spec.divisible(ranks):
            return spec
        return replace(spec, ranks=ranks)

    return [divided(spec) for spec in specs]
