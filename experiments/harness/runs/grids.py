"""Lists of specs that experiments share: the four methods of a block, grids, seeds, and what is measured of them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from experiments.harness.runs.spec import Spec, shareable


def four_methods(base: Spec, *, micro_batches: int, sam_rho: float, msam_rho: float) -> list[Spec]:
    """A block of Table 1: base optimizer, the control over the same micro-batches, SAM and mSAM."""
    return [
        base,
        replace(base, micro_batches=micro_batches),
        replace(base, rho=sam_rho),
        replace(base, micro_batches=micro_batches, rho=msam_rho),
    ]


def curvature_of(cells: Iterable[Spec], *, examples: int, rho: float) -> list[Spec]:
    """Curvature runs of the networks that these cells end with, on so many training and so many test examples."""
    return [replace(cell, kind="curvature", measured_examples=examples, measured_rho=rho) for cell in cells]


def timed_steps(spec: Spec, workers: int = 1) -> list[Spec]:
    """Whose steps a cost run times on so many workers: those of the four methods, with m = 2, 4, ... up to its own.

    Several workers perturb their own micro-batches, so an m that they do not divide is left out.
    """
    counts = [2**k for k in range(1, spec.micro_batches.bit_length()) if not 2**k % workers]
    base = replace(spec, kind="train", workers=1, micro_batches=1, rho=0.0)
    plain = [base, *(replace(base, micro_batches=m) for m in counts)]
    return plain + [replace(base, micro_batches=m, rho=spec.rho) for m in (1, *counts)]


def with_networks(specs: Iterable[Spec]) -> list[Spec]:
    """The specs, each behind the training whose network it measures."""
    return list(dict.fromkeys(s for spec in specs for s in (spec.trained, spec) if s is not None))


def tuning_grid(
    base: Spec,
    *,
    micro_batches: Sequence[int],
    rhos: Sequence[float],
    learning_rates: Sequence[float] = (),
    holdout_examples: int = 5000,
) -> list[Spec]:
    """The grid that chooses a block's hyper-parameters, the same for every method.

    It is scored on training examples that are held out. First the base optimizer's learning rate (unless it is
    a published one); then, at the one that `base` has, rho for SAM, and rho and m for mSAM.
    """
    base = replace(base, holdout_examples=holdout_examples)
    return [
        *(replace(base, learning_rate=learning_rate) for learning_rate in learning_rates),
        *(replace(base, micro_batches=m, rho=rho) for m in (1, *micro_batches) for rho in rhos),
    ]


def with_seeds(cells: Iterable[Spec], seeds: int) -> list[Spec]:
    """Every cell at seeds 0, ..., seeds - 1; seed by seed, so that an interrupted sweep has whole rows."""
    cells = list(cells)
    return list(dict.fromkeys(replace(cell, seed=seed) for seed in range(seeds) for cell in cells))


def with_ranks(specs: Iterable[Spec], ranks: int) -> list[Spec]:
    """The specs with `ranks` data-parallel processes where that divides their micro-batches; the others as they are.

    So are the networks that curvature runs among them measure: with other ranks they would be other networks.
    """
    specs = list(specs)
    measured = {spec.trained for spec in specs}
    fit = {spec for spec in specs if ranks > 1 and spec not in measured and shareable(spec, ranks)}
    return [replace(spec, ranks=ranks) if spec in fit else spec for spec in specs]
