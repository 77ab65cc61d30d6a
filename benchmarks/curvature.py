"""Top-5 Hessian eigenvalues beside the bare Lanczos iteration, in one run: python -m benchmarks.curvature.

The peer is Lanczos with full reorthogonalisation and no restarts, stopped at the first step at which all five Ritz
residuals are below the tolerance: nobody needs fewer products from one starting vector. Its time counts its products
alone. One thread; a network of Table 1 that `make reproduce-table1` has left in results/.
"""

import sys
import time

import numpy as np
import torch

from experiments import resnet_cifar
from experiments.harness.runs.record import DEFAULT_ROOT, record_of
from experiments.harness.tasks.build import build_task
from experiments.harness.work import hessian, sharpness
from experiments.harness.work.flatness import CHUNK, EIGENVALUES, TOLERANCE
from msam import split

EXAMPLES = 256


def bare(H: hessian.Hessian) -> tuple[int, float]:
    """(products, their seconds) of the peer."""
    v = np.random.default_rng(0).standard_normal(H.shape[0])
    basis, alphas, betas, seconds = [v / np.linalg.norm(v)], [], [], 0.0
    while True:
        begun = time.perf_counter()
        w = (H @ torch.from_numpy(basis[-1]).float()).double().numpy()
        seconds += time.perf_counter() - begun
        alphas.append(w @ basis[-1])
        Q = np.array(basis)
        for _ in range(2):
            w = w - Q.T @ (Q @ w)
        betas.append(np.linalg.norm(w))
        basis.append(w / betas[-1])
        if len(alphas) > EIGENVALUES:
            T = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
            values, vectors = np.linalg.eigh(T)
            residuals = betas[-1] * abs(vectors[-1, -EIGENVALUES:]) / values[-EIGENVALUES:]
            if residuals.max() < TOLERANCE:
                return len(alphas), seconds


def main() -> None:
    torch.set_num_threads(1)
    for spec in resnet_cifar.RUNS["cpu"]:
        record = record_of(spec, DEFAULT_ROOT)
        if not record.done or not record.checkpoint.exists():
            sys.exit(f"{spec.title} is not trained: make reproduce-table1 does it.")
        task = build_task(spec)
        task.model.load_state_dict(torch.load(record.checkpoint, weights_only=True)["model"])
        with hessian.evaluating(task.model):
            parts = split(task.sample("train", EXAMPLES), EXAMPLES // CHUNK)
            H = hessian.Hessian(
                lambda batch, task=task: task.loss_fn(task.model, batch),
                sharpness.trained(task.model),
                [(part, CHUNK) for part in parts],
            )
            H @ torch.zeros(H.shape[0])  # the graphs are both sides' alike
            products, seconds = bare(H)
            before, begun = H.products, time.perf_counter()
            found = hessian.largest_eigenvalues(H, EIGENVALUES, tolerance=TOLERANCE)
            ours = time.perf_counter() - begun
        print(
            f"{spec.title}: {H.products - before} products in {ours:.1f} s; bare Lanczos "
            f"{products} in {seconds:.1f} s; ratio {ours / seconds:.3f} (lambda 1 {found.values[0]:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
