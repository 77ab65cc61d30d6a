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
    """An embedding that shares its weight with the output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x):
        return self.norm(self.embedding(x).mean(1)) @ self.embedding.weight.T


class Attention(nn.Module):
    """A block with torch's fused attention, called as in timm and transformers."""

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


SELDOM = ("residual", "attention")
"""Cases that only make test-rare tries."""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.rare if name in SELDOM else ()) for name in CASES])
def case(request):
    """(model, loss_fn, batch) in float64, in eval mode, with running statistics that are not the initial ones."""
    make, inputs, classes = CASES[request.param]
    torch.manual_seed(0)
    model = make()
    x, y = inputs(), torch.randint(0, classes, (12,))
    model(x)  # updates BatchNorm's running statistics
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


@pytest.mark.parametrize("keep", [True, False], ids=["kept graphs", "new graphs"])
def test_eigenvalues_are_those_of_the_dense_hessian(case, keep):
    model, loss_fn, batch = case
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch, 5), keep=keep)
    spectrum = hessian.largest_eigenvalues(H, 5, tolerance=1e-12)
    np.testing.assert_allclose(spectrum.values, np.linalg.eigvalsh(dense(model, batch))[::-1][:5], rtol=1e-8)
    assert spectrum.residual < 1e-8
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(5), atol=1e-10)


@pytest.mark.parametrize("memory", [hessian.KEPT_BYTES, 0], ids=["Lanczos", "ARPACK"])
def test_both_solvers_reach_the_tolerance_and_report_the_true_residual(case, memory, monkeypatch):
    monkeypatch.setattr(hessian, "KEPT_BYTES", memory)
    model, loss_fn, batch = case
    matrix = dense(model, batch)
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    spectrum = hessian.largest_eigenvalues(H, 5, tolerance=1e-3)
    np.testing.assert_allclose(spectrum.values, np.linalg.eigvalsh(matrix)[::-1][:5], rtol=2e-3)
    last = spectrum.vectors[:, -1]
    exact = np.linalg.norm(matrix @ last - spectrum.values[-1] * last) / spectrum.values[0]
    assert spectrum.residual == pytest.approx(exact, rel=1e-6, abs=1e-12)
    peer = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    start = np.random.default_rng(0).standard_normal(H.shape[0])
    eigsh(peer.to_scipy(np.float64), k=5, which="LA", tol=1e-3, v0=start, ncv=min(peer.shape[0], 11))
    assert not memory or H.products <= 2 * peer.products, "a second search shows that none of them is repeated"


def test_eigenvalues_outside_the_krylov_space_of_the_first_vector_are_computed():
    model = nn.Linear(6, 1, bias=False).double()
    x = torch.zeros(2, 6, dtype=torch.float64)
    x[0, 0], x[1, 1] = 2.0, 1.0  # rank 2: four eigenvalues are 0
    H = hessian.Hessian(lambda b: model(b).square().mean(), list(model.parameters()), [(x, 2)])
    spectrum = hessian.largest_eigenvalues(H, 5, tolerance=1e-8)
    np.testing.assert_allclose(spectrum.values, [4.0, 1.0, 0, 0, 0], atol=1e-8)
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(5), atol=1e-8)


@pytest.mark.parametrize("memory", [hessian.KEPT_BYTES, 0], ids=["Lanczos", "ARPACK"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-8])
def test_repeated_eigenvalues_are_all_found(tolerance, memory, monkeypatch):
    """A linear softmax model with zero weights has each eigenvalue nine times."""
    monkeypatch.setattr(hessian, "KEPT_BYTES", memory)
    torch.manual_seed(0)
    x, y = torch.randn(200, 12).double() * torch.linspace(1, 4, 12).double(), torch.randint(0, 10, (200,))
    model = nn.Linear(12, 10, bias=False).double()
    nn.init.zeros_(model.weight)
    H = hessian.Hessian(lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), [model.weight], [((x, y), 200)])
    exact = np.linalg.eigvalsh(dense(model, (x, y)))[::-1][:11]
    for count in (5, 11):
        spectrum = hessian.largest_eigenvalues(H, count, tolerance=tolerance)
        np.testing.assert_allclose(spectrum.values, exact[:count], rtol=2 * tolerance)
        np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(count), atol=1e-6)
        assert spectrum.residual < 2 * max(tolerance, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_hessian(dtype):
    """Of a loss that is linear in the weights: eigenvalues 0, residual 0, and a density that is a spike at 0."""
    model = nn.Linear(6, 2).to(dtype)
    x = torch.randn(4, 6, dtype=dtype)
    H = hessian.Hessian(lambda b: model(b).mean(), list(model.parameters()), [(x, 4)])
    spectrum = hessian.largest_eigenvalues(H, 3, tolerance=1e-3)
    assert (spectrum.values == 0).all()
    assert spectrum.residual == 0
    np.testing.assert_allclose(spectrum.vectors.T @ spectrum.vectors, np.eye(3), atol=1e-10)
    nodes, weights = hessian.density(H, nodes=5, probes=3)
    assert (nodes == 0).all()
    assert weights.sum() == pytest.approx(1)
    assert hessian.trace(H, hessian.rademacher(H.shape[0], 3))[0] == 0


@pytest.mark.parametrize(("scale", "accuracy"), [(12.0, 5e-3), (25.0, 5e-3), (40.0, 5e-3), (1e3, 0.05)])
def test_a_model_that_is_saturated_in_float32(scale, accuracy):
    """Almost nothing is left of its Hessian. What float32 keeps of it is found; no NaN, and it ends."""
    torch.manual_seed(0)
    model, x = nn.Linear(20, 4), torch.randn(32, 20)
    with torch.no_grad():
        model.weight *= scale
        y = model(x).argmax(1)
    H = hessian.Hessian(
        lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), list(model.parameters()), [((x, y), 32)]
    )
    spectrum = hessian.largest_eigenvalues(H, 5, tolerance=1e-3)
    columns = (H.to_scipy(np.float32) @ np.eye(H.shape[0], dtype=np.float32)).astype(np.float64)
    exact = np.linalg.eigvalsh((columns + columns.T) / 2)[::-1][:5]
    noise = np.linalg.norm(columns - columns.T, 2)  # of float32, which is not symmetric
    np.testing.assert_allclose(spectrum.values, exact, rtol=accuracy, atol=noise + accuracy * 1e-3 * abs(exact[0]))
    assert np.isfinite(spectrum.residual)
    nodes, weights = hessian.density(H, nodes=8, probes=2)
    assert np.isfinite(nodes).all()
    assert weights.sum() == pytest.approx(1, abs=1e-5)


def test_the_density_of_an_identity_is_a_spike():
    model = nn.Linear(30, 1, bias=False).double()
    H = hessian.Hessian(lambda b: model.weight.square().sum() / 2, list(model.parameters()), [(None, 1)])
    nodes, weights = hessian.density(H, nodes=6, probes=2)
    assert nodes @ weights == pytest.approx(1)
    np.testing.assert_allclose(nodes[weights > 1e-12], 1, rtol=1e-10)


def test_the_tolerance_bounds_the_residual_and_the_products(case):
    model, loss_fn, batch = case
    loose, tight = (hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch)) for _ in range(2))
    assert hessian.largest_eigenvalues(loose, 5, tolerance=1e-3).residual < 1e-3
    hessian.largest_eigenvalues(tight, 5, tolerance=1e-10)
    assert 0 < loose.products <= tight.products


def test_the_trace_over_an_exact_basis_is_that_of_the_dense_hessian(case):
    model, loss_fn, batch = case
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    size, exact = H.shape[0], np.trace(dense(model, batch))
    basis = [size**0.5 * e for e in np.eye(size)]
    assert hessian.trace(H, basis)[0] == pytest.approx(exact, rel=1e-8)
    known = hessian.largest_eigenvalues(H, 5, tolerance=1e-12)
    assert hessian.trace(H, basis, known=known)[0] == pytest.approx(exact, rel=1e-8)


def test_the_stochastic_trace_lies_within_three_of_its_standard_errors(case):
    model, loss_fn, batch = case
    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch))
    exact = np.trace(dense(model, batch))
    plain, error = hessian.trace(H, hessian.rademacher(H.shape[0], 40))
    assert abs(plain - exact) < 3 * error
    known = hessian.largest_eigenvalues(H, 5, tolerance=1e-8)
    better, less = hessian.trace(H, hessian.rademacher(H.shape[0], 40), known=known)
    assert abs(better - exact) < 3 * less
    assert less < error


def test_the_density_has_the_moments_of_the_dense_hessian(case):
    """One probe's moments are v^T H^p v up to rounding; the mean of many is the spectrum's within its error."""
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
        probes = 3000 * (weights * nodes**p).reshape(3000, 6).sum(1)  # one moment per probe
        error = probes.std(ddof=1) / 3000**0.5
        assert abs(weights @ nodes**p - exact) < 3 * error
        assert error < 0.03 * exact


def test_products_are_the_differences_of_gradients(case):
    """Central differences are independent of a second backward pass and of forward mode."""
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


def test_an_exception_before_a_product_ends_the_computation(case):
    model, loss_fn, batch = case

    def stop():
        raise InterruptedError

    H = hessian.Hessian(loss_fn, list(model.parameters()), chunks(batch), before_each=stop)
    with pytest.raises(InterruptedError):
        hessian.largest_eigenvalues(H, 1, tolerance=1e-3)


def test_eval_mode_lasts_only_for_the_block():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2).eval()))
    before = [m.training for m in model.modules()]
    with hessian.eval_mode(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("micro_batches", [1, 3, 12])
def test_micro_batch_sharpness_is_the_references(case, micro_batches):
    """m-sharpness and the penalty, against the formulas written out with the reference."""
    model, loss_fn, batch = case
    rho = 0.05
    rise = sharpness.micro_batch_sharpness(loss_fn, batch, model, rho=rho, micro_batches=micro_batches)
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
    assert rise.sharpness == pytest.approx(np.mean(rises), rel=1e-8)
    assert rise.penalty == pytest.approx(np.mean(norms), rel=1e-8)
    assert rise.squared == pytest.approx(np.mean(np.square(norms)), rel=1e-8)
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
    """The mean over directions is rho^2 tr(H) / (2 P); ascent beats SAM's single step and stays within the ball."""
    model, loss_fn, batch = case
    before = [p.detach().clone() for p in model.parameters()]
    H, rho = dense(model, batch), 0.02
    rises = sharpness.random_sharpness(loss_fn, batch, model, rho=rho, directions=400)
    error = rises.std(ddof=1) / 20
    assert abs(rises.mean() - rho**2 * np.trace(H) / len(H) / 2) < 3 * error + 0.02 * abs(rises.mean())
    one_step = sharpness.micro_batch_sharpness(loss_fn, batch, model, rho=rho, micro_batches=1).sharpness
    ascent = sharpness.ascent_sharpness(loss_fn, batch, model, rho=rho, steps=10)
    assert max(one_step, rises.max()) <= ascent + 1e-12
    g = torch.cat([g.flatten() for g in torch.autograd.grad(loss_fn(batch), list(model.parameters()))]).norm().item()
    assert ascent < rho * g + rho**2 * np.linalg.eigvalsh(H)[-1]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_slices_move_each_filter_in_proportion_to_its_length(case):
    model, loss_fn, batch = case
    direction = sharpness.filter_normalised(model, 1)
    for p, d in zip(model.parameters(), direction, strict=True):
        if p.ndim < 2:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
    losses = sharpness.loss_slice(loss_fn, batch, model, [direction], [(0.0,), (0.5,)])
    assert losses[0] == loss_fn(batch).item()
    with sharpness.moved(list(model.parameters()), [d / 2 for d in direction]):
        assert losses[1] == pytest.approx(loss_fn(batch).item(), rel=1e-12)
