"""The cost of the top 5 Hessian eigenvalues against bare Lanczos iteration: python -m benchmarks.curvature.

The peer is Lanczos with full reorthogonalisation and no restarts. It stops at the first step at which all five Ritz
residuals are below the tolerance, so no method needs fewer products from one starting vector. Its time counts only its
products. One thread; the networks are those of Table 1, which `make reproduce-table1` trains.
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
    """The peer's number of products and their seconds."""
    v = np.random.default_rng(0).standard_normal(H.shape[0])
    basis, alphas, betas, seconds = [v / np.linalg.norm(v)], [], [], 0.0
    while True:
        started = time.perf_counter()
        w = (H @ torch.from_numpy(basis[-1]).float()).double().numpy()
        seconds += time.perf_counter() - started
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
            sys.exit(f"{spec.title} is not trained: run make reproduce-table1.")
        task = build_task(spec)
        task.model.load_state_dict(torch.load(record.checkpoint, weights_only=True)["model"])
        with hessian.eval_mode(task.model):
            parts = split(task.sample("train", EXAMPLES), EXAMPLES // CHUNK)
            H = hessian.Hessian(
                lambda batch, task=task: task.loss_fn(task.model, batch),
                sharpness.trained(task.model),
                [(part, CHUNK) for part in parts],
            )
            H @ torch.zeros(H.shape[0])  # builds the graphs, which both sides use
            products, seconds = bare(H)
            before, started = H.products, time.perf_counter()
            spectrum = hessian.largest_eigenvalues(H, EIGENVALUES, tolerance=TOLERANCE)
            ours = time.perf_counter() - started
        print(
            f"{spec.title}: {H.products - before} products in {ours:.1f} s; bare Lanczos "
            f"{products} in {seconds:.1f} s; ratio {ours / seconds:.3f} (lambda 1 {spectrum.values[0]:.1f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
