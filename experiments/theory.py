"""Linear stability: the sharpest minimum that gradient descent, SAM and mSAM can stay at, predicted and simulated.

    python -m experiments run theory

Each run draws an interpolating minimum of a small model in float64 and simulates the method's steps to find the largest
sharpness lambda_max(H) at which the minimum is stable; docs/theory.md derives the prediction. There are three parts:
unnormalised perturbations with full-batch steps, for which the prediction is exact; normalised perturbations (as in SAM
and mSAM), and random batches, for which it is not.
"""

from dataclasses import replace

from experiments.harness.runs.spec import Stability

TABLE = "theory"

DESCENT = Stability(
    profile="cpu",
    dataset="interpolation",
    model="regression",
    train_examples=64,
    base_optimizer="sgd",
    learning_rate=0.1,
    epochs=200,
    batch_size=64,
    normalised=False,
)

M = 8
RHOS = (0.01, 0.03, 0.1, 0.3)
LEARNING_RATES = (0.03, 0.3, 1.0)


def three_methods(base: Stability, rhos: tuple[float, ...]) -> list[Stability]:
    """Gradient descent, then SAM and mSAM at each rho."""
    perturbed = [replace(base, micro_batches=m, rho=rho) for m in (1, M) for rho in rhos]
    return [base, *perturbed]


EXACT = [
    cell
    for model in ("regression", "two-layer")
    for cell in (
        *three_methods(replace(DESCENT, model=model), RHOS),
        *(c for eta in LEARNING_RATES for c in three_methods(replace(DESCENT, model=model, learning_rate=eta), (0.1,))),
    )
]
NORMALISED = [replace(cell, normalised=True) for cell in three_methods(DESCENT, (0.03, 0.3))[1:]]
STOCHASTIC = [
    cell
    for batch in (32, 16, 8)
    for cell in three_methods(replace(DESCENT, batch_size=batch, epochs=8 * batch), (0.1,))
]

CELLS = [*EXACT, *NORMALISED, *STOCHASTIC]

RUNS = {
    "smoke": [replace(cell, profile="smoke") for cell in three_methods(DESCENT, (0.1,))],
    "cpu": CELLS,
    "paper": [replace(cell, profile="paper") for cell in CELLS],
}
