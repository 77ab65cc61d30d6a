"""The Hessian of a mean loss: products with vectors, its largest eigenvalues, trace and spectral density.

The operator's interface and the quadrature are curvlinops'. Eigenvalues are scipy's: of Lanczos' tridiagonal matrix, or
by ARPACK if a network's Lanczos vectors do not fit in memory. Put the model in eval mode first, or BatchNorm couples
the examples of a batch.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.harness.tasks.task import Task
from experiments.harness.work.sharpness import trained

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch warns when linear_operator is imported
    from curvlinops._torch_base import PyTorchLinearOperator
    from curvlinops.papyan2020traces.spectrum import fast_lanczos


KEPT_BYTES = 2**30
"""Memory limit for the vectors and products of one Lanczos run."""


class Hessian(PyTorchLinearOperator):
    """The Hessian of the mean loss over all examples of some batches, at the current weights.

    A product is a backward pass through the graph of the gradient. curvlinops' operator uses forward mode over reverse
    mode instead. Fused attention has no derivative in that mode, and LayerNorm has a wrong one (seen with torch 2.14.1
    against finite differences of gradients). Also, it takes (inputs, labels), while our batches can have any structure.
    With `keep`, the graphs are kept between products, until the weights change.
    """

    SELF_ADJOINT = True

    def __init__(
        self,
        loss_fn: Callable[[Any], Tensor],
        parameters: Sequence[nn.Parameter],
        batches: Sequence[tuple[Any, int]],
        *,
        keep: bool = True,
        before_each: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up the operator; nothing is computed yet.

        Args:
            loss_fn: Takes a batch and returns its mean loss, a scalar.
            parameters: The parameters of the Hessian; one that the loss does not depend on has rows of zeros.
            batches: Each batch with its number of examples.
            keep: Keep the gradients' graphs: products then skip the forward passes, at the memory of these passes.
            before_each: Called before each product; an exception that it raises ends the computation.
        """
        shapes = [tuple(p.shape) for p in parameters]
        super().__init__(shapes, shapes)
        self._loss_fn, self._parameters, self._batches = loss_fn, list(parameters), list(batches)
        self._before_each, self._keep = before_each, keep
        self._kept: list[list[Tensor]] | None = None
        self._versions: list[int] = []
        self.products = 0
        """Number of Hessian-vector products so far."""

    @property
    def device(self) -> torch.device:  # noqa: D102
        return self._parameters[0].device

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102
        return self._parameters[0].dtype

    def _matmat(self, M: list[Tensor]) -> list[Tensor]:
        columns = [self._product([m[..., column] for m in M]) for column in range(M[0].shape[-1])]
        return [torch.stack(parts, dim=-1) for parts in zip(*columns, strict=True)]

    def _product(self, v: list[Tensor]) -> list[Tensor]:
        self._before_each()
        self.products += 1
        if self._keep and (versions := [p._version for p in self._parameters]) != self._versions:
            self._kept = [self._gradient(*batch) for batch in self._batches]
            self._versions = versions
        total = [torch.zeros_like(p) for p in self._parameters]
        for gradient in self._kept or (self._gradient(*batch) for batch in self._batches):
            reached = [(g, t) for g, t in zip(gradient, v, strict=True) if g.requires_grad]
            if reached:  # empty if the loss is linear in the weights
                g, t = zip(*reached, strict=True)
                parts = torch.autograd.grad(
                    g, self._parameters, t, retain_graph=self._keep, allow_unused=True, materialize_grads=True
                )
                torch._foreach_add_(total, parts)
        return total

    def _gradient(self, batch: Any, examples: int) -> list[Tensor]:
        share = examples / sum(count for _, count in self._batches)
        with torch.enable_grad(), twice_differentiable():
            loss = self._loss_fn(batch) * share
        return list(
            torch.autograd.grad(loss, self._parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        )


class Spectrum(NamedTuple):
    """The largest eigenvalues, in descending order."""

    values: np.ndarray
    """(k,)"""
    vectors: np.ndarray
    """(P, k), orthonormal."""
    residual: float
    """||H v - lambda v|| / lambda_1 of the last pair, which converges last; computed from products, not estimated.

    0 for a Hessian that is zero.
    """


def twice_differentiable() -> AbstractContextManager[None]:
    """Use attention that can be differentiated twice, for the forward passes in the block; fused kernels cannot."""
    return sdpa_kernel(SDPBackend.MATH)


def largest_eigenvalues(H: PyTorchLinearOperator, count: int, *, tolerance: float, seed: int = 0) -> Spectrum:
    """The `count` algebraically largest eigenvalues and their vectors.

    Uses Lanczos iteration, which checks convergence after each product and so needs the fewest products. If its vectors
    do not fit in `KEPT_BYTES`, uses ARPACK, which restarts and checks only when its basis is full. Either finds one of
    several equal eigenvalues. So the largest one among the vectors orthogonal to these is computed next, and takes its
    place among them, until it is not larger than the last of them.

    Args:
        H: A symmetric operator of P > count rows.
        count: Number of eigenvalues.
        tolerance: Relative accuracy of each eigenvalue.
        seed: Seed of the first vector.

    Raises:
        scipy.sparse.linalg.ArpackNoConvergence: if ARPACK needs more than 10 P products.
    """
    size = H.shape[0]
    dtype = np.float64 if H.dtype == torch.float64 else np.float32  # an encoder's basis in float64 would fill a laptop
    draws = np.random.default_rng(seed)
    search = _Search(H.to_scipy(dtype), tolerance, min(size, KEPT_BYTES // (2 * 8 * size)), draws)
    spectrum = search.largest(draws.standard_normal(size), count)
    while count > 1:
        further = search.beyond(spectrum)
        if further.values[0] - spectrum.values[-1] <= tolerance * abs(spectrum.values[0]):
            break
        values = np.append(spectrum.values, further.values)
        order = np.argsort(-values, kind="stable")[:count]
        vectors = np.column_stack([spectrum.vectors, further.vectors])[:, order]
        last = vectors[:, -1]
        spectrum = Spectrum(values[order], vectors, _relative(_times(H, last) - values[order][-1] * last, values.max()))
    return spectrum


@dataclass(frozen=True)
class _Search:
    """The search for the largest eigenvalues of an operator."""

    operator: LinearOperator
    tolerance: float
    most: int
    """Number of products, after which ARPACK takes over."""
    draws: np.random.Generator
    scale: float = 0.0
    """Eigenvalues that are smaller than this need to be only as accurate as one of this size."""

    def largest(self, start: np.ndarray, count: int) -> Spectrum:
        """Those that are found from one first vector, so one of each group of equal ones."""
        spectrum = self._lanczos(start, count)
        if spectrum is not None:
            return spectrum
        dtype = self.operator.dtype
        values, vectors = eigsh(self.operator, k=count, which="LA", tol=self.tolerance, v0=start.astype(dtype))
        order = np.argsort(-values)
        values, vectors = values[order].astype(np.float64), vectors[:, order]
        last = vectors[:, -1]
        product = self.operator.matvec(last.astype(dtype)).astype(np.float64)
        return Spectrum(values, vectors, _relative(product - values[-1] * last, values[0]))

    def beyond(self, known: Spectrum) -> Spectrum:
        """The largest one whose vector is orthogonal to the known vectors."""

        def without(v: np.ndarray) -> np.ndarray:
            return v - known.vectors @ (known.vectors.T @ v)

        def product(v: np.ndarray) -> np.ndarray:
            return without(self.operator.matvec(without(v).astype(self.operator.dtype)))

        rest = LinearOperator(self.operator.shape, product, dtype=self.operator.dtype)
        search = replace(self, operator=rest, scale=float(abs(known.values[0])))
        return search.largest(without(self.draws.standard_normal(rest.shape[0])), 1)

    def _lanczos(self, start: np.ndarray, count: int) -> Spectrum | None:
        """Lanczos with full reorthogonalisation and no restarts, in float64; None if `most` products are not enough."""
        size, eps = len(start), np.finfo(self.operator.dtype).eps
        basis, products, w = np.empty((size, 0)), np.empty((size, 0)), start
        diagonal: list[float] = []
        off_diagonal: list[float] = []
        for number in range(1, self.most + 1):
            length = np.linalg.norm(w)
            if number > 1:
                off_diagonal.append(float(length))
                if length <= 1e-13 * max(map(abs, diagonal)):  # the start's Krylov space is exhausted
                    off_diagonal[-1], w = 0.0, self.draws.standard_normal(size)
                    w -= basis @ (basis.T @ w)
                    length = np.linalg.norm(w)
            q = w / length
            basis = np.column_stack([basis, q])
            w = self.operator.matvec(q.astype(self.operator.dtype)).astype(np.float64)
            products = np.column_stack([products, w])
            diagonal.append(float(q @ w))
            for _ in range(2):
                w = w - basis @ (basis.T @ w)
            if number < count:
                continue
            chosen = {"select": "i", "select_range": (number - count, number - 1)}
            values, parts = eigh_tridiagonal(diagonal, off_diagonal, **chosen)
            values, parts = values[::-1], parts[:, ::-1]
            needed = np.maximum(self.tolerance * np.maximum(abs(values), self.scale), eps * abs(values[0]))
            if number == size or (np.linalg.norm(w) * np.abs(parts[-1]) <= needed).all():
                vectors = basis @ parts
                rest = products @ parts[:, -1] - values[-1] * vectors[:, -1]
                return Spectrum(values, vectors, _relative(rest, values[0]))
        return None


def _relative(rest: np.ndarray, scale: float) -> float:
    """||rest|| / |scale|; 0 if there is no rest."""
    length = float(np.linalg.norm(rest))
    return length / abs(float(scale)) if length else 0.0


def lambda_1(task: Task, examples: int, *, tolerance: float = 1e-2) -> float:
    """The largest eigenvalue on the first training examples, in eval mode; model and generators are unchanged.

    Args:
        task: The task with its current model.
        examples: Number of examples.
        tolerance: Relative accuracy.
    """
    with eval_mode(task.model):
        batches = [(task.sample("train", examples), examples)]
        H = Hessian(partial(task.loss_fn, task.model), trained(task.model), batches)
        return float(largest_eigenvalues(H, 1, tolerance=tolerance).values[0])


def trace(
    H: PyTorchLinearOperator, probes: Iterable[np.ndarray], *, known: Spectrum | None = None
) -> tuple[float, float]:
    """Hutchinson's estimate of the trace, and its standard error.

    With `known`, the part of the known eigenvectors is exact and only the rest is estimated, as in Hutch++ (Meyer et
    al. 2021, arXiv 2010.09649). The estimate stays unbiased, and the largest eigenvalues do not add to its variance.

    Args:
        H: A symmetric operator of P rows.
        probes: Independent vectors (P,) of mean 0 and covariance 1; see `rademacher`.
        known: Known eigenvalues and eigenvectors.
    """
    samples = []
    for v in probes:
        rest = v if known is None else v - known.vectors @ (known.vectors.T @ v)
        samples.append(float(rest @ _times(H, rest)))
    exact = 0.0 if known is None else float(known.values.sum())
    n = len(samples)
    return exact + float(np.mean(samples)), float(np.std(samples, ddof=1) / n**0.5) if n > 1 else float("nan")


def rademacher(size: int, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """`count` vectors of `size` independent signs."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield 2.0 * draw.integers(0, 2, size) - 1.0


def density(H: PyTorchLinearOperator, *, nodes: int, probes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The spectral density by stochastic Lanczos quadrature (Papyan 2020, JMLR 21-165; Ghorbani et al. 2019).

    Args:
        H: A symmetric operator of P rows.
        nodes: Lanczos steps from each probe.
        probes: Random first vectors, uniform on the sphere.
        seed: Seed of the probes.

    Returns:
        Eigenvalues and weights, (probes * nodes,) each; the weights sum to 1. The sum of weight * eigenvalue^p
        estimates tr(H^p) / P.
    """
    values, weights = [], []
    with torch.random.fork_rng(devices=[H.device] if H.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(probes):
            theta, parts = _quadrature(H, min(nodes, H.shape[0]))
            values.append(theta)
            weights.append(parts / probes)
    return np.concatenate(values), np.concatenate(weights)


def _quadrature(H: PyTorchLinearOperator, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights from one random first vector; fewer nodes if fewer reach all that it has a part in.

    curvlinops' iteration divides by the length of what is left. Where nothing is left (a zero Hessian, one of low rank,
    or one so small that its square is 0 in float32) it has no result.
    """
    try:
        theta, vectors = fast_lanczos(H, nodes)
        if theta.isfinite().all() and vectors.isfinite().all():
            return theta.double().cpu().numpy(), vectors[0].double().square().cpu().numpy()
    except torch.linalg.LinAlgError:
        pass
    w = torch.randn(H.shape[0], dtype=torch.float64, device=H.device).cpu().numpy()
    basis = np.empty((len(w), 0))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(nodes):
        length = float(np.linalg.norm(w))
        if diagonal and length <= 1e-7 * max(map(abs, diagonal)):
            break
        off_diagonal.append(length)
        basis = np.column_stack([basis, w / length])
        w = _times(H, basis[:, -1])
        diagonal.append(float(basis[:, -1] @ w))
        for _ in range(2):
            w = w - basis @ (basis.T @ w)
    theta, vectors = eigh_tridiagonal(diagonal, off_diagonal[1:])
    return theta, vectors[0] ** 2


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within the block: running BatchNorm statistics, no dropout. Then each layer's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _times(H: PyTorchLinearOperator, v: np.ndarray) -> np.ndarray:
    """The product H v, (P,), in float64."""
    return (H @ torch.as_tensor(v, dtype=H.dtype, device=H.device)).double().cpu().numpy()
