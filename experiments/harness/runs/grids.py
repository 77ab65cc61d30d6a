"""Lists of cells that experiments share: the arms of a block, grids, seeds, curvature and timing runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from experiments.harness.runs.methods import ARMS
from experiments.harness.runs.run import Run, hints
from experiments.harness.runs.spec import Curvature, Network, Timing, Training

R = TypeVar("R", bound=Run)

GRID_SEED = 100
"""The first seed of a grid; tables report the seeds from 0 on."""


def all_arms(base: Training, *, micro_batches: int, rhos: Mapping[str, float]) -> list[Training]:
    """A block with the base optimizer, twice its epochs, the control, and every perturbed arm.

    Args:
        base: The base optimizer's cell.
        micro_batches: m of the arms that split the mini-batch.
        rhos: rho of each perturbed arm, by its name in `methods.ARMS`; an arm that is not named has no cell.
    """
    plain = [base, replace(base, **ARMS["twice"].changed(base.flat)), replace(base, micro_batches=micro_batches)]
    return plain + [perturbed(base, name, micro_batches, rho) for name, rho in rhos.items()]


def perturbed(base: Training, arm: str, micro_batches: int, rho: float) -> Training:
    """The cell of a perturbed arm: `sam`, `shared`, `msam`, `asam` or `masam`."""
    split = replace(base, rho=rho, adaptive=arm in ("asam", "masam"))
    if arm in ("sam", "asam"):
        return split
    split = replace(split, micro_batches=micro_batches)
    return replace(split, shared=True, passes="loop") if arm == "shared" else split


def curvature_of(cells: Iterable[Training], *, examples: int, rho: float) -> list[Run]:
    """Curvature runs of these cells' final networks, on `examples` training and `examples` test examples."""
    measured: dict[str, Any] = {"measured_examples": examples, "measured_rho": rho}
    return [Curvature(**_fields(cell, Training), **measured) for cell in cells]


def timing_of(cell: Training, *, rho: float, micro_batches: int, rounds: int, workers: int = 1) -> Timing:
    """The timing run of all arms' steps on the network of a cell, with m up to `micro_batches`."""
    fields = _fields(cell, Network) | {"rho": rho, "micro_batches": micro_batches}
    return Timing(**fields, rounds=rounds, workers=workers)


def timed_steps(timing: Timing, workers: int = 1) -> list[Training]:
    """The cells whose steps a timing run measures: the four methods, with m = 2, 4, ... up to its own m.

    Each worker perturbs its own micro-batches, so an m that the number of workers does not divide is skipped.
    """
    counts = [2**k for k in range(1, timing.micro_batches.bit_length()) if not 2**k % workers]
    base = Training(**_fields(timing, Network) | {"micro_batches": 1, "rho": 0.0}, epochs=1)
    plain = [base, *(replace(base, micro_batches=m) for m in counts)]
    return plain + [replace(base, micro_batches=m, rho=timing.rho) for m in (1, *counts)]


def grid_of_arms(
    base: Training,
    *,
    micro_batches: int,
    rhos: Mapping[str, Sequence[float]],
    learning_rates: Sequence[float] = (),
    pairs: int = 1,
    holdout_examples: int = 5000,
) -> list[Training]:
    """The grid for a block of `all_arms`: the base optimizer's learning rate, then the rhos of each perturbed arm.

    Runs are scored on held-out training examples, at seeds from `GRID_SEED` on, so no seed that chooses is one that a
    table reports.

    Args:
        base: The base optimizer's cell; rhos are tried at its learning rate.
        micro_batches: m of the arms that split the mini-batch.
        rhos: By arm, as many values for each.
        learning_rates: Those tried without a perturbation; none if a published one is used.
        pairs: How many pairs of seeds try each learning rate, on which every arm depends; a rho has one pair.
        holdout_examples: The number of held-out examples.
    """
    base = replace(base, holdout_examples=holdout_examples, seed=GRID_SEED)
    return [
        *(replace(base, learning_rate=rate, seed=base.seed + 2 * k) for k in range(pairs) for rate in learning_rates),
        *(perturbed(base, arm, micro_batches, rho) for arm, values in rhos.items() for rho in values),
    ]


def _fields(run: Run, cls: type[Run]) -> dict[str, Any]:
    """The run's fields that `cls` also has."""
    return {name: getattr(run, name) for name in hints(cls)}


def with_networks(specs: Iterable[Run]) -> list[Run]:
    """The specs, each preceded by the training run whose network it measures."""
    return list(dict.fromkeys(s for spec in specs for s in (spec.network, spec) if s is not None))


def with_seeds(cells: Iterable[R], seeds: int) -> list[R]:
    """Every cell at its own seed and the next ones; seed by seed, so that an interrupted sweep has complete rows."""
    cells = list(cells)
    return list(dict.fromkeys(replace(cell, seed=cell.seed + k) for k in range(seeds) for cell in cells))


def with_ranks(specs: Iterable[Run], ranks: int) -> list[Run]:
    """The specs with `ranks` data-parallel processes where `ranks` divides their micro-batches; others are unchanged.

    Networks that curvature runs measure are also unchanged: other ranks would make other networks.
    """
    specs = list(specs)
    measured = {spec.network for spec in specs}

    def divided(spec: Run) -> Run:
        if type(spec) is not Training or ranks == 1 or spec in measured or not spec.divisible(ranks):
            return spec
        return replace(spec, ranks=ranks)

    return [divided(spec) for spec in specs]
