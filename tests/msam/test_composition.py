"""With the rest of PyTorch: optimizers, compilation, checkpointing, hooks, devices of parameters, diagnostics."""

import copy
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import msam
from msam import parallel
from msam.reference import msam_gradient
from tests.msam.small import Waits, convnet, data, gradients, loss_of, mlp, pure_loss, reference


def assert_is_reference(model, batch, m, rho, **options):
    expected = reference(model, batch, m, rho)
    msam.backward(options.pop("loss_fn", loss_of(model)), batch, model, rho=rho, micro_batches=m, **options)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)


def test_perturb_chooses_by_name():
    """Weights only: biases stay at w and outside the norm, and get the gradient at the perturbed weights."""
    model, batch = mlp(), data(6, 5)
    biases = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if n.endswith("bias")}
    w = {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight")}
    parts, seen = msam.split(batch, 2), []

    def loss(weights, part):
        return F.cross_entropy(functional_call(model, {**weights, **biases}, part[0]), part[1])

    expected = msam_gradient(loss, w, parts, [3, 3], 0.5)

    def loss_fn(part):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return loss_of(model)(part)

    step = msam.backward(loss_fn, batch, model, rho=0.5, micro_batches=2, perturb=lambda name: name.endswith("weight"))
    found = gradients(model)
    torch.testing.assert_close({n: found[n] for n in w}, expected, rtol=1e-11, atol=1e-13)
    at_perturbed = [{n: seen[i][n] for n in w} for i in (1, 3)]
    for name, bias in biases.items():
        each = [torch.autograd.grad(loss(p, part), bias)[0] / 2 for p, part in zip(at_perturbed, parts, strict=True)]
        torch.testing.assert_close(found[name], sum(each), rtol=1e-11, atol=1e-13)
        assert torch.equal(seen[1][name], seen[0][name])
    distance = torch.cat([(seen[1][n] - seen[0][n]).flatten() for n in w]).norm()
    torch.testing.assert_close(distance, torch.tensor(0.5, dtype=torch.float64))
    assert step.gradient_norms.shape == (2,)


def test_perturb_that_chooses_nothing_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match=r"names, such as 0\.weight"):
        msam.backward(loss_of(model), data(4, 5), model, rho=0.1, perturb=lambda name: "norm" in name)


def test_requires_grad_toggled_between_steps():
    model, batch = mlp(), data(6, 5)
    for frozen in (False, True, False):
        model[0].weight.requires_grad_(not frozen)
        model.zero_grad()
        msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=2)
        assert (model[0].weight.grad is None) == frozen
        assert [p.requires_grad for p in model.parameters()] == [not frozen, True, True, True]
    torch.testing.assert_close(gradients(model), reference(model, batch, 2, 0.3), rtol=1e-11, atol=1e-13)


def test_tied_parameters_move_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(5, 5)
            self.b = nn.Linear(5, 5)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))[:, :3]

    assert_is_reference(Tied().double(), data(6, 5), 2, 0.4)


def test_parameters_of_two_types():
    """float32 and float64 in one norm."""
    model, batch = mlp(), data(6, 5)
    expected = reference(model, batch, 2, 0.4)
    model[0].float()

    def loss_fn(part):
        return F.cross_entropy(model[3](torch.tanh(model[0](part[0].float()).double())), part[1])

    step = msam.backward(loss_fn, batch, model, rho=0.4, micro_batches=2)
    assert step.gradient_norms.dtype == torch.float64
    for name, g in gradients(model).items():
        torch.testing.assert_close(g.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_parametrizations_are_perturbed_in_their_own_parameters():
    model = mlp()
    parametrizations.weight_norm(model[0])
    assert_is_reference(model, data(6, 5), 2, 0.2)


def test_a_cache_of_parametrized_weights_is_refused():
    model = mlp()
    parametrizations.weight_norm(model[0])
    with parametrize.cached(), pytest.raises(NotImplementedError, match="outside of it"):
        msam.backward(loss_of(model), data(6, 5), model, rho=0.2)


def test_a_loss_of_other_parameters_than_the_models_is_refused():
    """functional_call with parameters of its own: the model's are not what the loss depends on."""
    model, batch = mlp(), data(6, 5)
    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="depends on no perturbed parameter"):
        msam.backward(
            lambda part: F.cross_entropy(functional_call(model, own, part[0]), part[1]), batch, model, rho=0.2
        )
    with torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        msam.backward(loss_of(model), batch, model, rho=0.2)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 6, 6]), nn.SyncBatchNorm(4)])
def test_other_normalisations(norm):
    model = convnet()
    model[1] = copy.deepcopy(norm).double()
    if isinstance(norm, nn.SyncBatchNorm):
        model.eval()  # on a CPU it runs in eval mode only
    assert_is_reference(model, data(8, 3, 8, 8), 4, 0.4)


def test_channels_last():
    model = convnet().to(memory_format=torch.channels_last)
    x, y = data(8, 3, 8, 8)
    assert_is_reference(model, (x.to(memory_format=torch.channels_last), y), 4, 0.4)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.body = convnet()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def test_activation_checkpointing():
    """Running statistics move in the recomputed forward pass too: of the clean pass, as in plain training."""
    model, batch = Checkpointed(False), data(8, 3, 8, 8)
    expected = reference(model.body, batch, 2, 0.4)
    msam.backward(loss_of(model), batch, model, rho=0.4, micro_batches=2)
    torch.testing.assert_close(gradients(model.body), expected, rtol=1e-10, atol=1e-13)
    twin = Checkpointed(False)
    for part in msam.split(batch, 2):
        loss_of(twin)(part).backward()
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("path", ["around", "through"])
def test_reentrant_checkpointing_is_refused(path):
    """Else its parameters would have no ascent gradient; where others lie before it, torch itself refuses."""
    model, (x, y) = Checkpointed(True), data(8, 3, 8, 8)
    first = nn.Conv2d(3, 3, 1).double() if path == "through" else nn.Identity()
    model = nn.Sequential(first, model, nn.Linear(3, 3).double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        msam.backward(loss_of(model), (x.requires_grad_(), y), model, rho=0.4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # torch's warning of a defect in Python 3.13.0
def test_a_compiled_model():
    model, batch = convnet(), data(8, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    expected = reference(model, batch, 2, 0.4)
    for _ in range(2):
        model.zero_grad()
        msam.backward(loss_of(compiled), batch, compiled, rho=0.4, micro_batches=2, perturb=lambda n: "_orig" not in n)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)
    assert model[1].num_batches_tracked == 4


def test_hooks_fire_as_documented():
    """A tensor hook sees ascent and perturbed gradient of each micro-batch, a post-accumulate hook the latter."""
    model, batch = mlp(), data(6, 5)
    tensor, accumulated = [], []
    model[0].weight.register_hook(lambda g: tensor.append(g.norm().item()))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.norm().item()))
    msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=3)
    assert len(tensor) == 6
    assert len(accumulated) == 3
    assert accumulated[-1] == pytest.approx(model[0].weight.grad.norm().item())


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
}
NEWER = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since version 2.9.")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[NEWER] * (name == "Muon")) for name in OPTIMIZERS])
def test_any_optimizer_and_scheduler_steps_on_the_reference_gradient(name):
    """And state_dict round trips: three steps, saved, two more, against five whose gradients the reference gave."""
    make = getattr(torch.optim, name)
    bias = name != "Muon"  # which is for matrices

    def model_of():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias)).double()

    model, twin, batch = model_of(), model_of(), data(8, 5)
    optimizer, other = make(model.parameters(), **OPTIMIZERS[name]), make(twin.parameters(), **OPTIMIZERS[name])
    scheduler, slower = (torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, other))
    for step in range(5):
        if step == 3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
            model = model_of()
            optimizer = make(model.parameters(), **OPTIMIZERS[name])
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            for part, content in zip((model, optimizer, scheduler), saved, strict=True):
                part.load_state_dict(content)
        optimizer.zero_grad()
        msam.backward(loss_of(model), batch, model, rho=0.2, micro_batches=2)
        for p, g in zip(twin.parameters(), reference(twin, batch, 2, 0.2).values(), strict=True):
            p.grad = g
        for o, s in ((optimizer, scheduler), (other, slower)):
            o.step()
            s.step()
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-7, atol=1e-9)


def test_a_closure_is_the_perturbed_objective():
    """LBFGS asks for it at several weights, and is given the mSAM gradient of each."""
    model, twin, batch = mlp(), mlp(), data(8, 5)

    def closure():
        optimizer.zero_grad()
        return msam.backward(loss_of(model), batch, model, rho=0.05, micro_batches=2).perturbed_loss

    def closure_of_reference():
        for p, g in zip(twin.parameters(), reference(twin, batch, 2, 0.05).values(), strict=True):
            p.grad = g
        with torch.no_grad():
            w = {n: p.detach() for n, p in twin.named_parameters()}
            losses = []
            for part in msam.split(batch, 2):
                with torch.enable_grad():
                    g = torch.autograd.grad(loss_of(twin)(part), list(twin.parameters()))
                norm = torch.cat([t.flatten() for t in g]).norm()
                at = {n: w[n] + 0.05 * t / norm for n, t in zip(w, g, strict=True)}
                losses.append(pure_loss(twin)(at, part))
        return sum(losses) / 2

    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    other = torch.optim.LBFGS(twin.parameters(), lr=0.5, max_iter=4)
    for _ in range(2):
        optimizer.step(closure)
        other.step(closure_of_reference)
    torch.testing.assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), rtol=1e-8, atol=1e-10)


def test_different_noise_on_request():
    model, (x, y) = mlp(dropout=0.5), data(8, 5)
    masks = []
    model[2].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    torch.manual_seed(3)
    msam.backward(loss_of(model), (x, y), model, rho=1e-9, micro_batches=2)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    masks.clear()
    torch.manual_seed(3)
    msam.backward(loss_of(model), (x, y), model, rho=1e-9, micro_batches=2, same_noise=False)
    assert not torch.equal(masks[0], masks[1])
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for part in x.tensor_split(2):  # two passes over each micro-batch
        model(part)
        model(part)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("adaptive", [False, True])
def test_no_host_synchronisation(adaptive):
    model, batch = convnet(), data(8, 3, 8, 8)
    scaler = torch.amp.GradScaler("cpu")
    with Waits() as waits:
        step = msam.backward(loss_of(model), batch, model, rho=0.3, micro_batches=4, adaptive=adaptive, scaler=scaler)
        assert step.sharpness.shape == ()
    assert not waits.found
    with Waits() as waits:
        step.loss.item()
    assert waits.found == ["_local_scalar_dense"]


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"adaptive": True}, {"shared": True}, {"vectorized": True}, {"passes": "streams"}, {"rho": 0.0}],
    ids=str,
)
def test_nothing_waits_for_the_gpu(options, counted):
    model, (x, y) = convnet().cuda(), data(8, 3, 8, 8)
    batch, options = (x.cuda(), y.cuda()), {"rho": 0.3, "micro_batches": 4} | options

    def loss_fn(part):
        loss = loss_of(model)(part)
        return (loss, (part[1] >= 0).sum()) if counted else loss

    msam.backward(loss_fn, batch, model, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        msam.backward(loss_fn, batch, model, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Box:
    """A saved tensor that is counted while the graph keeps it."""

    alive = 0

    def __init__(self, tensor):
        self.tensor = tensor
        Box.alive += 1

    def __del__(self):
        Box.alive -= 1


@pytest.mark.parametrize("perturb", [None, lambda name: name.startswith("3.")])
def test_activations_of_one_pass_are_alive_at_a_time(perturb):
    model, batch, alive = mlp(), data(12, 5), []

    def loss_fn(part):
        alive.append(Box.alive)
        return loss_of(model)(part)

    def pack(tensor):
        return Box(tensor.detach())  # a tensor with its graph would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        msam.backward(loss_fn, batch, model, rho=0.3, micro_batches=3, perturb=perturb)
    assert alive == [0] * 6


SIZE = 1200


def peak_copies(step) -> float:
    """The most that a step has allocated at once, in copies of the one large parameter."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    alive = accumulate((event.nbytes() for event in events if event.name() == "[memory]"), initial=0)
    return max(alive) / (4 * SIZE * SIZE)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("accumulated", [False, True])
def test_memory_above_plain_training(m, accumulated, adaptive):
    """Two copies of the parameters; three where `.grad` holds something, which is then set aside."""
    model, x = nn.Linear(SIZE, SIZE, bias=False), torch.randn(8, SIZE)
    loss_fn = lambda part: model(part).square().mean()  # noqa: E731
    loss_fn(x).backward()
    usual = peak_copies(lambda: loss_fn(x).backward())
    if not accumulated:
        model.zero_grad()
        usual = 1.0  # the gradient itself
    found = peak_copies(lambda: msam.backward(loss_fn, x, model, rho=0.1, micro_batches=m, adaptive=adaptive))
    assert found - usual < (3 if accumulated else 2) + 0.1


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


def encoding(x, y):
    from transformers import BatchEncoding

    return BatchEncoding({"x": x, "y": y})


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        pytest.param(encoding, lambda part: (part["x"], part["y"]), marks=pytest.mark.needs("transformers")),
        (Pair, lambda part: (part.x, part.y)),
    ],
    ids=["BatchEncoding", "dataclass"],
)
def test_batches_of_transformers_and_dataclasses(pack, unpack):
    model, (x, y) = mlp(), data(7, 5)
    expected = reference(model, (x, y), 3, 0.3)
    kinds = []

    def loss_fn(part):
        kinds.append(type(part))
        return loss_of(model)(unpack(part))

    msam.backward(loss_fn, pack(x, y), model, rho=0.3, micro_batches=3)
    assert set(kinds) == {type(pack(x, y))}
    torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("how", ["whole", "a layer", "in place"])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", None])
def test_cuda_graphs_that_torch_compile_makes_are_refused_on_a_gpu_alone(mode, how, monkeypatch):
    """Nothing is compiled: only who would be. A CPU has no such graphs, so there every mode is taken."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    wrapped = model
    if how == "whole":
        wrapped = torch.compile(model, mode=mode)
    elif how == "a layer":
        model[0] = torch.compile(model[0], mode=mode)
    else:
        model[1].compile(mode=mode)
    assert parallel.unwrapped(wrapped)[0] is model
    monkeypatch.setattr(nn.Module, "parameters", lambda module: iter([SimpleNamespace(is_cuda=True)]))
    if mode in ("reduce-overhead", "max-autotune"):
        with pytest.raises(NotImplementedError, match=r"compile in the default mode.*msam\.capture"):
            parallel.unwrapped(wrapped)
    else:
        assert parallel.unwrapped(wrapped)[0] is model
