"""Curvature and sharpness against dense float64 Hessians and the reference, on small networks of every kind."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call

import msam
from experiments.harness.tasks.image_models import BasicBlock
from experiments.harness.work import hessian, sharpness
from msam.reference import msam_gradient


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(self.embedding(x).mean(1)) @ self.embedding.weight.T


class Attention(nn.Module):
    """A block with torch's fused attention, as timm's and transformers' models call it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(6, 18), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1) + self.out(y).mean(1))


def residual():
    return nn.Sequential(BasicBlock(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


CASES = {
    "residual": (residual, lambda: torch.randn(12, 2, 6, 6), 3),
    "attention": (Attention, lambda: torch.randn(12, 4, 6), 3),
    "tied": (Tied, lambda: torch.randint(0, 7, (12, 3)), 7),
}


@pytest.fixture(params=CASES)
def case(request):
    """(model, loss_fn, batch), float64, with running statistics of its own and in eval mode."""
    make, inputs, classes = CASES[request.param]
    torch.manual_seed(0)
    model = make()
    x, y = inputs(), torch.randint(0, classes, (12,))
    model(x)  # moves BatchNorm's running statistics away from where they begin
    model = model.double().eval()
    batch = (x.double() if x.is_floating_point() else x, y)
    return model, lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), batch


def chunks(batch, parts=3):
    return [(chunk, len(chunk[1])) for chunk in msam.split(batch, parts)]


def dense(model, batch):
    """The Hessian, column by column."""
    params = dict(model.named_parameters())
    shapes = {name: p.shape for name, p in params.items()}

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes.values()])
        w = {n: t.view(s) for t, (n, s) in zip(parts, shapes.items(), strict=True)}
        return nn.functional.cross_entropy(functional_call(model, w, (batch[0],)), batch[1])

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    with hessian.twice_differentiable():
        return torch.autograd.functional.hessian(loss, flat).numpy()


def test_eigenvalues_are_those_of_the_dense_hessian(case):
    model, loss_fn, batch = case
    exact = np.linalg.eigvalsh(dense(model, batch))[::-1][:5]
    for keep in (True, False):
        H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch, 5), keep=keep)
        found = hessian.largest_eigenvalues(H, 5, tolerance=1e-12)
        np.testing.assert_allclose(found.values, exact, rtol=1e-8)
        assert found.residual < 1e-8
        np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-10)


@pytest.mark.parametrize("memory", [hessian.KEPT_BYTES, 0], ids=["Lanczos", "ARPACK"])
def test_eigenvalues_and_residual_are_those_of_the_dense_hessian_with_and_without_memory(case, memory, monkeypatch):
    monkeypatch.setattr(hessian, "KEPT_BYTES", memory)
    model, loss_fn, batch = case
    matrix = dense(model, batch)
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    found = hessian.largest_eigenvalues(H, 5, tolerance=1e-3)
    np.testing.assert_allclose(found.values, np.linalg.eigvalsh(matrix)[::-1][:5], rtol=2e-3)
    last = found.vectors[:, -1]
    exact = np.linalg.norm(matrix @ last - found.values[-1] * last) / found.values[0]
    assert found.residual == pytest.approx(exact, rel=1e-6, abs=1e-12)
    again = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    eigsh(again.to_scipy(np.float64), k=5, which="LA", tol=1e-3, v0=start_of(again), ncv=min(again.shape[0], 11))
    assert not memory or H.products <= again.products


def start_of(H):
    return np.random.default_rng(0).standard_normal(H.shape[0])


def test_more_eigenvalues_than_the_first_vector_reaches_are_found():
    model = nn.Linear(6, 1, bias=False).double()
    x = torch.zeros(2, 6, dtype=torch.float64)
    x[0, 0], x[1, 1] = 2.0, 1.0  # rank 2: four eigenvalues are 0
    H = hessian.Hessian(lambda b: model(b).square().mean(), list(model.parameters()), [(x, 2)])
    found = hessian.largest_eigenvalues(H, 5, tolerance=1e-8)
    np.testing.assert_allclose(found.values, [4.0, 1.0, 0, 0, 0], atol=1e-8)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-8)


def test_the_tolerance_bounds_the_residual_and_the_products(case):
    model, loss_fn, batch = case
    loose, tight = (hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch)) for _ in range(2))
    found = hessian.largest_eigenvalues(loose, 5, tolerance=1e-3)
    assert found.residual < 1e-3
    hessian.largest_eigenvalues(tight, 5, tolerance=1e-10)
    assert 0 < loose.products <= tight.products


def test_the_trace_over_an_exact_basis_is_that_of_the_dense_hessian(case):
    model, loss_fn, batch = case
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    size, exact = H.shape[0], np.trace(dense(model, batch))
    basis = [size**0.5 * e for e in np.eye(size)]
    assert hessian.trace(H, basis)[0] == pytest.approx(exact, rel=1e-8)
    known = hessian.largest_eigenvalues(H, 5, tolerance=1e-12)
    assert hessian.trace(H, basis, beside=known)[0] == pytest.approx(exact, rel=1e-8)


def test_the_stochastic_trace_lies_within_three_of_its_standard_errors(case):
    model, loss_fn, batch = case
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    exact = np.trace(dense(model, batch))
    plain, error = hessian.trace(H, hessian.rademacher(H.shape[0], 40))
    assert abs(plain - exact) < 3 * error
    known = hessian.largest_eigenvalues(H, 5, tolerance=1e-8)
    better, less = hessian.trace(H, hessian.rademacher(H.shape[0], 40), beside=known)
    assert abs(better - exact) < 3 * less
    assert less < error


def test_the_density_has_the_moments_of_the_dense_hessian(case):
    """Each probe's own moments v^T H^p v to rounding, and the mean of many those of the spectrum within its error."""
    model, _, batch = case
    H = torch.from_numpy(dense(model, batch))
    nodes, weights = hessian.density(H, nodes=8, probes=1, seed=3)
    torch.manual_seed(3)
    v = torch.randn(H.shape[0], dtype=H.dtype)
    v /= v.norm()
    for p in range(5):
        probe = (v @ torch.linalg.matrix_power(H, p) @ v).item()
        assert weights @ nodes**p == pytest.approx(probe, rel=1e-6)
    nodes, weights = hessian.density(H, nodes=6, probes=3000)
    assert weights.sum() == pytest.approx(1)
    for p in (1, 2, 3):
        exact = torch.linalg.matrix_power(H, p).trace().item() / H.shape[0]
        probes = 3000 * (weights * nodes**p).reshape(3000, 6).sum(1)  # one moment a probe
        error = probes.std(ddof=1) / 3000**0.5
        assert abs(weights @ nodes**p - exact) < 3 * error
        assert error < 0.03 * exact


def test_products_are_the_differences_of_gradients(case):
    """Central differences share nothing with a second backward pass, nor with forward mode."""
    model, loss_fn, batch = case
    params = list(model.parameters())
    H = hessian.Hessian(loss_fn, params, chunks(batch))
    v = torch.randn(H.shape[0], dtype=torch.float64)
    parts = [t.view(p.shape) for t, p in zip(v.split([p.numel() for p in params]), params, strict=True)]

    def gradient(step):
        with sharpness.moved(params, [step * t for t in parts]):
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(batch), params)])

    difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    torch.testing.assert_close(H @ v, difference, rtol=1e-5, atol=1e-7)


def test_products_equal_those_of_curvlinops_own_operator():
    from curvlinops import HessianLinearOperator

    torch.manual_seed(0)
    model = residual().double().eval()
    batch = torch.randn(12, 2, 6, 6).double(), torch.randint(0, 3, (12,))
    loss, params = nn.CrossEntropyLoss(), list(model.parameters())
    H = hessian.Hessian(lambda b: loss(model(b[0]), b[1]), params, chunks(batch))
    v = torch.randn(H.shape[0], 2, dtype=torch.float64)
    other = HessianLinearOperator(model, loss, params, [batch], check_deterministic=False)
    torch.testing.assert_close(H @ v, other @ v)


def test_kept_graphs_follow_the_weights(case):
    model, loss_fn, batch = case
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    v = torch.randn(H.shape[0], dtype=torch.float64)
    before = H @ v
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    fresh = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch)) @ v
    torch.testing.assert_close(H @ v, fresh, rtol=0, atol=0)
    assert not torch.allclose(before, fresh)


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    w = nn.Parameter(torch.randn(4, dtype=torch.float64))
    H = hessian.Hessian(lambda x: (x @ w).mean(), [w], [(torch.randn(3, 4, dtype=torch.float64), 3)])
    assert not (H @ torch.randn(4, dtype=torch.float64)).any()


def test_whatever_is_raised_before_a_product_ends_the_computation(case):
    model, loss_fn, batch = case

    def stop():
        raise InterruptedError

    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch), before_each=stop)
    with pytest.raises(InterruptedError):
        hessian.largest_eigenvalues(H, 1, tolerance=1e-3)


def test_eval_mode_is_for_the_block_only():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2).eval()))
    before = [m.training for m in model.modules()]
    with hessian.evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("micro_batches", [1, 3, 12])
def test_micro_batch_sharpness_is_the_references(case, micro_batches):
    """m-sharpness and the penalty, from the reference's formulas written out once more."""
    model, loss_fn, batch = case
    rho = 0.05
    found = sharpness.micro_batch_sharpness(loss_fn, batch, model, rho=rho, micro_batches=micro_batches)
    w = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(params, part):
        return nn.functional.cross_entropy(functional_call(model, params, (part[0],)), part[1])

    rises, norms = [], []
    for part in msam.split(batch, micro_batches):
        g = msam_gradient(loss, w, [part], [1], 0.0)
        norm = sum((t**2).sum() for t in g.values()).sqrt()
        e = {name: w[name] + rho * g[name] / norm for name in w}
        rises.append((loss(e, part) - loss(w, part)).item())
        norms.append(norm.item())
    assert found.sharpness == pytest.approx(np.mean(rises), rel=1e-8)
    assert found.penalty == pytest.approx(np.mean(norms), rel=1e-8)
    assert found.squared == pytest.approx(np.mean(np.square(norms)), rel=1e-8)
    assert all(p.grad is None for p in model.parameters())


def test_the_penalty_grows_under_refinement(case):
    """Jensen: P(m) <= P(k m) for nested splits, here 1, 3, 6 and 12 parts of twelve examples."""
    model, loss_fn, batch = case
    measure = partial(sharpness.micro_batch_sharpness, loss_fn, batch, model, rho=1e-4)
    penalties = [measure(micro_batches=m).penalty for m in (1, 3, 6, 12)]
    assert penalties == sorted(penalties)
    assert penalties[0] < 0.99 * penalties[-1]
    first_order = measure(micro_batches=3)
    assert first_order.sharpness == pytest.approx(1e-4 * first_order.penalty, rel=0.01)


def test_sharpness_at_a_distance_of_rho(case):
    """On the average direction half of rho^2 tr(H) / P; ascent reaches more than SAM's single step, within the ball."""
    model, loss_fn, batch = case
    before = [p.detach().clone() for p in model.parameters()]
    H, rho = dense(model, batch), 0.02
    rises = sharpness.random_sharpness(loss_fn, batch, model, rho=rho, directions=400)
    error = rises.std(ddof=1) / 20
    assert abs(rises.mean() - rho**2 * np.trace(H) / len(H) / 2) < 3 * error + 0.02 * abs(rises.mean())
    one_step = sharpness.micro_batch_sharpness(loss_fn, batch, model, rho=rho, micro_batches=1).sharpness
    found = sharpness.ascent_sharpness(loss_fn, batch, model, rho=rho, steps=10)
    assert max(one_step, rises.max()) <= found + 1e-12
    g = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(batch), list(model.parameters()))]).norm().item()
    assert found < rho * g + rho**2 * np.linalg.eigvalsh(H)[-1]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_slices_move_each_filter_by_its_own_length(case):
    model, loss_fn, batch = case
    direction = sharpness.filter_normalised(model, 1)
    for p, d in zip(model.parameters(), direction, strict=True):
        if p.ndim < 2:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
    at = sharpness.loss_slice(loss_fn, batch, model, [direction], [(0.0,), (0.5,)])
    assert at[0] == loss_fn(batch).item()
    with sharpness.moved(list(model.parameters()), [d / 2 for d in direction]):
        assert at[1] == pytest.approx(loss_fn(batch).item(), rel=1e-12)
