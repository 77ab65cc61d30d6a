"""`vectorized=True` against the algorithm as printed, and against the loop over micro-batches."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import msam
from msam.vectorized import products
from tests.msam.small import Waits, convnet, data, gradients, loss_of, mlp, reference


class Words(nn.Module):
    """What a transformer does with parameters: tables, positions, a token of its own, scales, norms."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 6, padding_idx=0), nn.Embedding(4, 6)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.offset, self.scale = nn.Parameter(torch.randn(1, 5, 6)), nn.Parameter(torch.randn(6))
        self.norm, self.root, self.groups = nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6)
        self.mix, self.bend = nn.Conv1d(6, 6, 3, padding=1, groups=2), nn.PReLU(6)
        self.into, self.out = nn.Linear(6, 40, bias=False), nn.Linear(40, 3)

    def forward(self, ids):
        x = self.words(ids) + self.positions(torch.arange(4)[None])
        x = torch.cat([self.token.expand(len(ids), -1, -1), x], 1) + self.offset
        x = self.norm(x) * self.scale
        x = x + self.bend(self.mix(self.groups(x.mT))).mT
        return self.out(F.gelu(self.into(self.root(x)))).mean(1)


class Pictures(nn.Module):
    """Convolutions of each kind that is done in its own way, with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.small = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.holes = nn.Conv2d(40, 48, (3, 2), padding=(2, 1), dilation=2)
        self.depth = nn.Conv2d(48, 48, 3, groups=48, padding="same")
        self.up = nn.ConvTranspose2d(48, 8, 2)
        self.first, self.second = nn.BatchNorm2d(24), nn.BatchNorm2d(48, affine=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu_(self.first(self.wide(x)))
        x = self.second(self.holes(torch.tanh(self.small(x))))
        return self.out(self.up(self.depth(x)).mean((2, 3)))


def words(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Words().double()


def pictures(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Pictures().double()


def batch_for(make, examples: int, seed: int = 1):
    x, y = data(examples, *{mlp: (5,), convnet: (3, 8, 8), pictures: (3, 4, 4), words: (4,)}[make], seed=seed)
    return (x.abs().mul(4).long().clamp_max(10), y) if make is words else (x, y)


def vectorized(model, batch, m, loss_fn=None, **options):
    return msam.backward(loss_fn or loss_of(model), batch, model, micro_batches=m, vectorized=True, **options)


MODELS = [mlp, convnet, words, pictures]


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("examples", "m"), [(12, 4), (12, 2), (12, 6), (3, 8), (11, 4), (4, 1)])
@pytest.mark.parametrize("make", MODELS)
def test_equals_the_reference(make, examples, m, adaptive):
    if examples == 3 and make in (convnet, pictures):
        examples = 9  # BatchNorm over one example of one position would be another test
    model, batch = make(), batch_for(make, examples)
    expected = reference(model, batch, m, 0.3, adaptive)
    vectorized(model, batch, m, rho=0.3, adaptive=adaptive)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    make=st.sampled_from(MODELS),
    size=st.integers(2, 5),
    m=st.integers(2, 6),
    rho=st.floats(1e-4, 3.0),
    seed=st.integers(0, 5),
)
def test_all_of_a_step_is_that_of_the_loop(make, size, m, rho, seed):
    model, batch = make(seed), batch_for(make, size * m, seed)
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    step = vectorized(model, batch, m, rho=rho)
    expected = msam.backward(loss_of(twin), batch, twin, rho=rho, micro_batches=m)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-7, atol=1e-10)
    for name in ("loss", "perturbed_loss", "gradient_norms"):
        torch.testing.assert_close(getattr(step, name), getattr(expected, name), rtol=1e-8, atol=1e-10)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_model_is_called_once_for_each_pass_whatever_m():
    model, batch = mlp(), data(12, 5)
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    vectorized(model, batch, 6, rho=0.1)
    assert sizes == [12, 12]
    sizes.clear()
    vectorized(model, data(11, 5), 4, rho=0.1)
    assert sizes == [3, 3, 3, 3, 3, 3, 2, 2], "sizes differ, so the default loop is used"


@pytest.mark.parametrize("small", [True, False])
def test_products_are_right_both_ways(small, monkeypatch):
    """The gradient as two factors, and worked out; which is taken is a matter of shapes."""
    monkeypatch.setattr(products.Product, "factorises", lambda *_: small)
    for make in (mlp, words, pictures):
        model, batch = make(), batch_for(make, 12)
        expected = reference(model, batch, 4, 0.3)
        vectorized(model, batch, 4, rho=0.3)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rows", "worked_out"), [(2, False), (200, True)])
def test_which_way_a_product_takes(rows, worked_out, monkeypatch):
    taken, original = [], products.Linear.gradients
    monkeypatch.setattr(products.Linear, "gradients", lambda *given: taken.append(1) or original(*given))
    model = nn.Linear(40, 40).double()
    vectorized(model, data(2 * rows, 40), 2, rho=0.1)
    assert bool(taken) == worked_out


@pytest.mark.parametrize("chosen", ["weight", "bias", "out", "norm"])
def test_what_is_not_perturbed_gets_its_gradient_all_the_same(chosen):
    for make in (words, pictures):
        model, batch = make(), batch_for(make, 8)
        model.out.bias.requires_grad_(False)
        twin = copy.deepcopy(model)
        names = [name for name, p in model.named_parameters() if chosen in name and p.requires_grad]
        if names:
            vectorized(model, batch, 4, rho=0.5, perturb=names.__contains__)
            msam.backward(loss_of(twin), batch, twin, rho=0.5, micro_batches=4, perturb=names.__contains__)
            torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


def test_gradients_that_share_memory_do_not_move_each_other():
    """With one example a micro-batch autograd hands one tensor to both parameters."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(1, 5)), nn.Parameter(torch.randn(1, 5))
            self.out = nn.Linear(5, 3)

        def forward(self, x):
            return self.out(torch.tanh((x + self.a) + (x.square() + self.b)))

    torch.manual_seed(0)
    model, batch = Sum().double(), data(4, 5)
    expected = reference(model, batch, 4, 0.5)
    vectorized(model, batch, 4, rho=0.5)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_batchnorm_in_eval_mode_moves_nothing_and_is_perturbed():
    model, batch = convnet(), batch_for(convnet, 8)
    model.eval()
    before = {name: b.clone() for name, b in model.named_buffers()}
    expected = reference(model, batch, 4, 0.3)
    vectorized(model, batch, 4, rho=0.3)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_micro_batches_weigh_by_what_loss_fn_counts():
    def counted(model):
        return lambda part: (
            F.cross_entropy(model(part[0]), part[1], ignore_index=-100)
            if (part[1] != -100).any()
            else 0 * model(part[0]).sum(),
            (part[1] != -100).sum(),
        )

    model, (x, y) = mlp(), data(12, 5)
    twin = mlp()
    y[[0, 4, 9, 10, 11]] = -100  # all of the last micro-batch
    step = vectorized(model, (x, y), 4, counted(model), rho=0.3)
    msam.backward(counted(twin), (x, y), twin, rho=0.3, micro_batches=4)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)
    assert step.gradient_norms is None, "the micro-batches' own losses are not known"
    model.zero_grad()
    y[:] = -100
    vectorized(model, (x, y), 4, counted(model), rho=0.3)
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_both_passes_see_the_same_dropout_masks():
    model, batch = mlp(dropout=0.5), data(64, 5)
    torch.manual_seed(3)
    model(batch[0])
    after_one_pass = torch.get_rng_state()
    torch.manual_seed(3)
    step = vectorized(model, batch, 8, rho=1e-9)
    assert torch.equal(torch.get_rng_state(), after_one_pass)
    assert step.sharpness.abs() < 1e-7
    step = vectorized(model, batch, 8, rho=1e-9, same_noise=False)
    assert step.sharpness.abs() > 1e-4


def test_adds_to_gradients_already_there_and_serves_any_optimizer():
    model, batch = mlp(), data(12, 5)
    vectorized(model, batch, 4, rho=0.3)
    once = {name: g.clone() for name, g in gradients(model).items()}
    vectorized(model, batch, 4, rho=0.3)
    torch.testing.assert_close(gradients(model), {name: 2 * g for name, g in once.items()})
    torch.optim.AdamW(model.parameters()).step()


def test_no_host_synchronisation():
    model, batch = words(), batch_for(words, 12)
    with Waits() as waits:
        vectorized(model, batch, 4, rho=0.3)
    assert waits.found == []


def test_a_norm_that_overflows_is_seen_in_the_gradient():
    model, (x, y) = mlp().float(), data(8, 5)
    vectorized(model, (x.float(), y), 4, lambda part: loss_of(model)(part) * 1e30, rho=0.1)
    assert not all(p.grad.isfinite().all() for p in model.parameters())


def test_the_first_passs_activations_are_gone_in_the_second():
    model, batch = pictures(), batch_for(pictures, 8)
    seen, alive = [], []

    def note(module, inputs, output):
        alive.append(sum(one() is not None for one in seen[:5]))
        seen.append(weakref.ref(output))

    for module in model.children():
        module.register_forward_hook(note)
    vectorized(model, batch, 4, rho=0.1)
    second = len(seen) // 2
    assert alive[second] == 0


class Positions(nn.Module):
    """A table of positions, which is the same for all examples, and one of labels."""

    def __init__(self, use):
        super().__init__()
        self.table, self.out, self.use = nn.Embedding(4, 6), nn.Linear(6, 3), use
        self.words = nn.Embedding(11, 6)
        self.register_buffer("numbers", torch.arange(4)[None])

    def forward(self, ids):
        return self.out(torch.tanh(self.use(self, self.words(ids))).mean(1))


POSITIONS = {
    "row": lambda net, x: x + net.table(torch.arange(4)[None]),
    "bare": lambda net, x: net.table(torch.arange(4)) + x,
    "buffer": lambda net, x: x.add_(net.table(net.numbers[:, :4])),
    "expanded": lambda net, x: x * net.table(net.numbers.expand(len(x), -1)),
}


@pytest.mark.parametrize("examples", [4, 8])
@pytest.mark.parametrize("use", POSITIONS)
def test_positions_are_told_from_examples_if_there_are_as_many_too(use, examples):
    torch.manual_seed(0)
    model, batch = Positions(POSITIONS[use]).double(), batch_for(words, examples)
    twin = copy.deepcopy(model)
    vectorized(model, batch, 4, rho=0.5)
    msam.backward(loss_of(twin), batch, twin, rho=0.5, micro_batches=4)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.ReLU(inplace=True), nn.Dropout(1e-9, inplace=True)])
@pytest.mark.parametrize("rows", [2, 100])
def test_layers_may_work_in_place(rows, layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), layer, nn.Linear(40, 3)).double()
    twin, batch = copy.deepcopy(model), data(2 * rows, 5)
    vectorized(model, batch, 2, rho=0.5)
    msam.backward(loss_of(twin), batch, twin, rho=0.5, micro_batches=2)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


class Uses(nn.Module):
    """A linear layer, and one more use of parameters."""

    def __init__(self, use):
        super().__init__()
        self.first, self.bare = nn.Linear(5, 5), nn.Parameter(torch.randn(4, 5))
        self.use = use

    def forward(self, x):
        return self.use(self, self.first(x))


REFUSED = {
    "cat on": Uses(lambda net, x: torch.cat([x, net.bare])[: len(x)]),
    "linear on the parameter bare": Uses(lambda net, x: x + F.linear(x.T @ x, net.bare).sum()),
    "add on the parameter bare": Uses(lambda net, x: x.sum() + net.bare.exp().sum()),
    "detach on the parameter first.weight, whose": Uses(lambda net, x: F.linear(x, net.first.weight.detach())),
    ".data or another attribute on": Uses(lambda net, x: x * net.bare.data.norm()),
    "BatchNorm of anything but": Uses(lambda net, x: F.batch_norm(x.T, None, None, training=True).T),
    "BatchNorm that is called past": Uses(lambda net, x: past_the_mode(x)),
    "BatchNorm with momentum=None": nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, momentum=None)),
    "perturbed parameters of torch.bfloat16": nn.Linear(5, 3).bfloat16(),
    "torch.compile": torch.compile(nn.Linear(5, 3)),
    "detach on the parameter bare": Uses(lambda net, x: x * net.bare.norm().detach()),
    "__float__ on the parameter bare": Uses(lambda net, x: x * float(net.bare.norm())),
    "item on the parameter bare": Uses(lambda net, x: x * net.bare.abs().max().item()),
    "tolist on the parameter bare": Uses(lambda net, x: x * net.bare.tolist()[0][0]),
    "gt on the parameter bare": Uses(lambda net, x: x * (net.bare > 0).sum()),
    "argmax on the parameter bare": Uses(lambda net, x: x * net.bare.argmax()),
    "numpy on the parameter bare": Uses(lambda net, x: x * float(numpy_of(net.bare).sum())),
    "dropout on the parameter bare": Uses(lambda net, x: x * F.dropout(net.bare, 0.5).sum()),
    "embedding with max_norm on the parameter bare": Uses(
        lambda net, x: x + F.embedding((x[:, 0] > 0).long(), net.bare, max_norm=0.1)
    ),
    "embedding_bag with max_norm on the parameter bare": Uses(
        lambda net, x: x + F.embedding_bag((x > 0).long(), net.bare, max_norm=0.1)
    ),
    "mul_ on the parameter bare, which writes to it": Uses(lambda net, x: x * net.bare.mul_(2).sum()),
}


def numpy_of(t):
    with torch.no_grad():
        return t.numpy()


def past_the_mode(x):
    with torch._C.DisableTorchFunction():
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]


@pytest.mark.parametrize("words", REFUSED)
def test_refuses_by_name_and_leaves_everything_as_it_was(words):
    model = REFUSED[words]
    before = copy.deepcopy(model.state_dict())
    x, y = data(8, 5)
    x = (x if words != "perturbed parameters of torch.bfloat16" else x.bfloat16()).to(next(model.parameters()).dtype)
    with pytest.raises(NotImplementedError, match=words):
        vectorized(model, (x, y), 4, lambda part: model(part[0]).float().square().mean(), rho=0.1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_refuses_checkpoints_and_passes_that_differ():
    model, (x, y) = mlp().float(), data(8, 5)
    batch = x.float(), y

    calls = iter(range(9))

    def penalised(part):
        x = part[0].clone().requires_grad_()
        loss = F.cross_entropy(model(x), part[1])
        return loss + torch.autograd.grad(loss, x, retain_graph=True)[0].norm()

    for words, loss_fn in {
        "activation checkpointing": lambda part: F.cross_entropy(
            checkpoint(model, part[0], use_reentrant=False), part[1]
        ),
        "calls other functions": lambda part: (
            loss_of(model)(part) if next(calls) == 0 else F.cross_entropy(model[0](part[0])[:, :3], part[1])
        ),
        "other functions in its second": lambda part: F.cross_entropy(
            model(part[0]) + (part[0] @ model[0].weight.T[:, :3] if next(calls) % 2 else 0), part[1]
        ),
        "a gradient within loss_fn": lambda part: penalised(part),
    }.items():
        with pytest.raises(NotImplementedError, match=words):
            vectorized(model, batch, 4, loss_fn, rho=0.1)
        assert all(p.grad is None for p in model.parameters())


def test_a_checkpoint_whose_function_saves_as_much_is_refused_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = (nn.Conv2d(c, 16, 3, padding=1, bias=False) for c in (3, 16))
            self.out = nn.Linear(16, 3)

        def forward(self, x):
            return self.out(
                checkpoint(lambda x: self.block(x.relu()).tanh(), self.stem(x), use_reentrant=False).mean((2, 3))
            )

    with pytest.raises(NotImplementedError, match="activation checkpointing"):
        vectorized(Net().double(), data(8, 3, 8, 8), 4, rho=0.5)


class Prototypes(nn.Module):
    """As many classes as examples; their embeddings go through layers as examples do."""

    def __init__(self, order):
        super().__init__()
        self.into, self.classes, self.order = nn.Linear(5, 4), nn.Linear(6, 4), order
        self.register_buffer("features", torch.randn(8, 6))

    def forward(self, x):
        return self.order(self.into(x), self.classes(self.features))


ORDERS = {
    "logits": lambda x, c: x @ c.T,
    "attention over the classes": lambda x, c: (x @ c.T).softmax(1) @ c,
    "row by row": lambda x, c: x * c,
    "scale": lambda x, c: x * c.sum(),
}


@pytest.mark.parametrize("order", ORDERS)
def test_constants_of_the_batchs_length_are_not_examples(order):
    torch.manual_seed(0)
    model, (x, _) = Prototypes(ORDERS[order]).double(), data(8, 5)
    twin = copy.deepcopy(model)
    steps = []
    for net, one in ((model, True), (twin, False)):
        if order == "row by row" and not one:
            continue  # rows of the mini-batch meet rows of the table, which a micro-batch cannot
        try:
            loss_fn = lambda part, net=net: net(part).square().mean()  # noqa: E731
            steps.append(msam.backward(loss_fn, x, net, rho=0.5, micro_batches=4, vectorized=one))
        except NotImplementedError:
            return
    if order != "row by row":
        torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


TURNED = {
    "examples along the second dimension": lambda net, x: F.linear(x.expand(3, *x.shape), net.bare).sum(0),
    "rounds of examples": lambda net, x: (
        F.linear(x.expand(3, *x.shape).reshape(-1, 5), net.bare).view(3, len(x), 4).sum(0)
    ),
    "bias along the second": lambda net, x: (x.expand(3, *x.shape) * net.bare[0] + net.table[1]).sum(0),
    "layer norm along the second": lambda net, x: F.layer_norm(x.expand(3, *x.shape), (5,), net.table[0]).sum(0),
    "in place along the second": lambda net, x: (x * torch.ones(3, 1, 1)).add_(net.table[0]).sum(0),
    "where": lambda net, x: torch.where(x > 0, x, net.table[0]),
    "addcmul": lambda net, x: torch.addcmul(net.table[0], net.table[1], x),
    "lerp": lambda net, x: torch.lerp(x, x * x, net.table[0]),
    "attention bias": lambda net, x: F.scaled_dot_product_attention(
        x.view(-1, 5, 1), x.view(-1, 5, 1), x.view(-1, 5, 1), attn_mask=net.table[:5]
    ),
    "token among several": lambda net, x: torch.cat([x, net.bare[:1].expand(len(x), -1), x], 1),
    "slice": lambda net, x: x + net.bare[:1, :5],
    "first rows": lambda net, x: x * net.table[: x.shape[1]].sum(0),
    "reshaped": lambda net, x: x * net.bare.reshape(-1)[:5].view(1, 5),
    "scaled": lambda net, x: x @ (net.bare.T @ net.bare * 0.5),
    "split": lambda net, x: x + net.bare.chunk(2)[1].sum(0),
    "matmul": lambda net, x: x @ net.bare.T,
    "mm": lambda net, x: torch.mm(x, net.bare.T),
    "addmm": lambda net, x: torch.addmm(net.table[0, :4], x, net.bare.T),
    "einsum": lambda net, x: torch.einsum("bi,oi->bo", x, net.bare),
    "einsum back": lambda net, x: torch.einsum("oi,bi->bo", net.bare, x),
    "linear of a transpose": lambda net, x: F.linear(x, net.bare.T.contiguous().T),
    "normalised weight": lambda net, x: F.linear(x, F.normalize(net.bare, dim=1)),
    "in place": lambda net, x: (x * 1.0).add_(net.table[0]),
    "flattened rows": lambda net, x: F.linear(x.unsqueeze(1).expand(-1, 3, -1).reshape(-1, 5), net.bare).view(-1, 12),
    "there and back": lambda net, x: F.linear(x[:, None].transpose(0, 1).transpose(0, 1), net.bare)[:, 0],
    "a layer twice": lambda net, x: net.first(x),
    "a layer three times": lambda net, x: net.first(net.first(torch.tanh(x))),
    "its bias elsewhere": lambda net, x: x * net.first.bias,
    "tied": lambda net, x: F.embedding((x[:, :3] > 0).long(), net.table).sum(1) @ net.table.T,
    "looked up twice": lambda net, x: F.embedding((x[:, :3] > 0).long(), net.table).sum(1) + net.table[0],
    "through another function": lambda net, x: F.linear(F.linear(x, net.bare), net.bare.T.tanh()),
    "a token": lambda net, x: torch.cat([net.bare[:1].expand(len(x), -1), x], 1),
    "lookup in a part": lambda net, x: x + F.embedding((x[:, 0] > 0).long(), net.table[:2] * 2),
}


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("use", TURNED)
def test_parameters_may_be_turned_into_other_tensors(use, adaptive):
    torch.manual_seed(0)
    model = Uses(TURNED[use])
    model.table = nn.Parameter(torch.randn(6, 5))
    model, batch = model.double(), data(8, 5)
    twin = copy.deepcopy(model)
    loss_of_square = lambda net: lambda part: torch.tanh(net(part[0])).square().mean()  # noqa: E731
    vectorized(model, batch, 4, loss_of_square(model), rho=0.5, adaptive=adaptive)
    msam.backward(loss_of_square(twin), batch, twin, rho=0.5, micro_batches=4, adaptive=adaptive)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


class Tables(nn.Module):
    """A layer, and a use of what it gives, of parameters and of constants that are as long as the batch."""

    def __init__(self, use):
        super().__init__()
        self.first, self.bare, self.code = nn.Linear(5, 4), nn.Parameter(torch.randn(4)), nn.Embedding(4, 4)
        self.square = nn.Parameter(torch.randn(4, 4))
        for name, shape in {"rows": (4, 4), "start": (1, 4), "table": (4, 9)}.items():
            self.register_buffer(name, torch.randn(shape))
        self.use = use

    def forward(self, x):
        return self.use(self, torch.tanh(self.first(x)))


def through_a_view(net, h):
    made = net.start.expand(len(h), -1).clone()
    made[:, :2].copy_(h[:, :2])
    return made * net.bare


def through_an_index(net, h):
    made = torch.zeros(4, 4, dtype=h.dtype)
    made[0] = h[:, 0]
    return (made[:, : len(h)].T * net.bare[: made.shape[0]]).tanh()


def filled(net, h):
    made = torch.zeros_like(net.start[0])
    made.copy_(net.bare)
    return h * made


FOLLOWED = {
    "parameter first, one example a micro-batch": (4, lambda net, h: net.square @ (h[:, :, None] * net.start[0])),
    "ids that move": (2, lambda net, h: h + net.code((h.detach()[:, 0] > 0).long())),
    "linear of a constant": (2, lambda net, h: (F.linear(net.rows, h)[:, :, None] * net.bare).tanh().mean(0)),
    "inner product with a constant": (
        2,
        lambda net, h: (torch.inner(net.rows, h)[:, :, None] * net.bare).tanh().mean(0),
    ),
    "columns of a constant": (
        2,
        lambda net, h: (net.table[:, (h.detach()[:, 0].abs() * 8).long()][:, :, None] * net.bare).tanh().mean(0) + h,
    ),
    "rows of a constant": (2, lambda net, h: (net.rows[(h.detach()[:, 0].abs() * 3).long()] * net.bare).tanh() + h),
    "shifted": (2, lambda net, h: torch.fft.ifftshift((torch.fft.fftshift(h, dim=0) * net.bare).tanh(), dim=0)),
    "through a view": (2, through_a_view),
    "through an index": (2, through_an_index),
    "filled": (2, filled),
    "transposed ids": (2, lambda net, h: net.code((h.detach().abs() * 3).long().T.contiguous().T)),
    "a number of the activations": (2, lambda net, h: torch.add(h, net.bare, alpha=float(h.detach().mean()))),
    "one row of each, by number": (2, lambda net, h: h[torch.arange(len(h)), h.detach().argmax(1)][:, None] * net.bare),
}


@pytest.mark.parametrize("use", FOLLOWED)
def test_what_a_tensor_comes_from_is_followed_or_refused(use):
    torch.manual_seed(0)
    m, function = FOLLOWED[use]
    model = Tables(function).double()
    twin, x = copy.deepcopy(model), torch.randn(4, 5).double()
    before = copy.deepcopy(model.state_dict())
    square = lambda net: lambda part: torch.tanh(net(part)).square().mean()  # noqa: E731
    try:
        vectorized(model, x, m, square(model), rho=1.0)
    except NotImplementedError:
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        return
    msam.backward(square(twin), x, twin, rho=1.0, micro_batches=m)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


class SharesMemory(nn.Module):
    """Two parameters, or a parameter and a buffer, are the same numbers."""

    def __init__(self, buffer):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        if buffer:
            self.register_buffer("row", self.a.weight.detach()[0])
        else:
            self.b.weight.data = self.a.weight.data


@pytest.mark.parametrize("buffer", [False, True])
def test_parameters_that_share_memory_are_refused(buffer):
    model = SharesMemory(buffer)
    with pytest.raises(NotImplementedError, match="whose memory another tensor of the model shares"):
        vectorized(model, data(8, 5), 4, lambda part: model.b(model.a(part[0].float())).square().mean(), rho=0.1)


def test_parameters_may_be_parts_of_one_storage():
    flat = torch.randn(30)
    model = nn.Linear(5, 3)
    model.weight.data, model.bias.data = flat[:15].view(3, 5), flat[15:18]
    twin, (x, y) = copy.deepcopy(model), data(8, 5)
    vectorized(model, (x.float(), y), 4, rho=0.1)
    msam.backward(loss_of(twin), (x.float(), y), twin, rho=0.1, micro_batches=4)
    torch.testing.assert_close(gradients(model), gradients(twin))


def test_sequences_that_are_padded_to_the_batchs_length():
    torch.manual_seed(0)
    model = nn.Linear(5, 6).double()
    twin, batch = copy.deepcopy(model), {"x": [torch.randn(n, 5).double() for n in (4, 3, 2, 1)]}

    def loss_fn(net):
        return lambda part: torch.tanh(net(nn.utils.rnn.pad_sequence(part["x"]))).sum(0).square().mean()

    try:
        vectorized(model, batch, 2, loss_fn(model), rho=0.5)
    except NotImplementedError:
        return
    msam.backward(loss_fn(twin), batch, twin, rho=0.5, micro_batches=2)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


class Attention(nn.Module):
    """torch's own attention, to itself or to other tokens."""

    def __init__(self, batch_first, cross, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)
        self.batch_first, self.cross, self.out = batch_first, cross, nn.Linear(6, 3)

    def forward(self, x):
        tokens = x.view(len(x), -1, 6)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        other = tokens.flip(-1) if self.cross else tokens
        y, weights = self.attention(tokens, other, other, need_weights=not self.cross)
        y = y if self.batch_first else y.transpose(0, 1)
        return self.out(y.mean(1)) if weights is None else self.out(y.mean(1)) * weights.amax((1, 2))[:, None]


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 6}])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_own_attention(batch_first, cross, options):
    torch.manual_seed(0)
    model, batch = Attention(batch_first, cross, **options).double(), data(8, 18)
    twin = copy.deepcopy(model)
    vectorized(model, batch, 4, rho=0.5)
    msam.backward(loss_of(twin), batch, twin, rho=0.5, micro_batches=4)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


class Columns(nn.Module):
    """BatchNorm over rows, or over pictures of one column, which is the same."""

    def __init__(self, pictures: bool) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(5, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if pictures else nn.BatchNorm1d(4) for _ in range(2))

    def forward(self, x):
        x = self.into(x).tanh()
        for norm in self.norms:
            x = norm(x.mT[..., None])[..., 0].mT if isinstance(norm, nn.BatchNorm2d) else norm(x.mT).mT
        return self.out(x.tanh().mean(1))


@pytest.mark.parametrize("examples", [4, 8])
def test_batch_norm_over_columns(examples):
    """torch 2.14 on a CPU gives wrong gradients where a gradient lies in memory in another way than its input."""
    model, twin, batch = Columns(True).double(), Columns(False).double(), data(examples, 3, 5)
    twin.load_state_dict(model.state_dict())
    vectorized(model, batch, 4, rho=0.05)
    msam.backward(loss_of(twin), batch, twin, rho=0.05, micro_batches=4)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "words", [pytest.param("images", marks=[pytest.mark.rare, pytest.mark.needs("timm")]), "tokens"]
)
def test_under_autocast(words):
    """Rounding to bfloat16 moves the gradient no more than it moves the loop's."""
    torch.manual_seed(0)
    model = timm_model("resnet10t") if words == "images" else Attention(True, False)
    batch = (torch.randn(8, 3, 32, 32), torch.arange(8) % 3) if words == "images" else data(8, 18)
    batch = batch[0].float(), batch[1]
    nets = [model, copy.deepcopy(model), copy.deepcopy(model).double()]

    def loss_fn(net, part):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(net)(part)

    one, loop = (
        msam.backward(
            lambda part, net=net: loss_fn(net, part), batch, net, rho=0.05, micro_batches=4, vectorized=net is model
        )
        for net in nets[:2]
    )
    exact = batch[0].double(), batch[1]
    msam.backward(loss_of(nets[2]), exact, nets[2], rho=0.05, micro_batches=4)
    a, b, c = (torch.cat([p.grad.flatten().double() for p in net.parameters()]) for net in nets)
    assert 0 < (a - c).norm() < 1.5 * (b - c).norm()
    torch.testing.assert_close(one.gradient_norms, loop.gradient_norms, rtol=1e-3, atol=0)
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_normalised_layers():
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        model, batch = mlp(), data(8, 5)
        norm(model[0])
        twin = copy.deepcopy(model) if norm is nn.utils.parametrizations.weight_norm else mlp()
        if norm is nn.utils.weight_norm:
            norm(twin[0])
        vectorized(model, batch, 4, rho=0.5)
        msam.backward(loss_of(twin), batch, twin, rho=0.5, micro_batches=4)
        torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)


def test_hooks_of_parameters_see_the_perturbed_gradient_once():
    model, twin, batch, seen = mlp(), mlp(), data(6, 5), []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()) or g * 0.5)
    vectorized(model, batch, 3, rho=0.3)
    msam.backward(loss_of(twin), batch, twin, rho=0.3, micro_batches=3)
    (g,) = seen
    torch.testing.assert_close(g, twin[0].weight.grad)
    torch.testing.assert_close(model[0].weight.grad, 0.5 * g)


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-4, 1e-3])
def test_rows_that_cancel_leave_the_right_norm(noise):
    """In float32, at the optimum of one input with two labels, where a micro-batch's two gradients cancel."""
    torch.manual_seed(0)
    m, d = 8, 64
    net = nn.Linear(d, d, bias=False)
    x = (torch.randn(m, 1, d).expand(m, 2, d) + noise * torch.randn(m, 2, d)).reshape(2 * m, d)
    y = torch.arange(2 * m)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(4000):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    exact, twin = copy.deepcopy(net).double(), copy.deepcopy(net)
    step = vectorized(net, (x, y), m, rho=0.05)
    expected = msam.backward(loss_of(exact), (x.double(), y), exact, rho=0.05, micro_batches=m)
    loop = msam.backward(loss_of(twin), (x, y), twin, rho=0.05, micro_batches=m)
    own = (net.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()
    usual = (twin.weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert own < max(1e-3, 10 * usual)  # either has the rounding of the logits, which is all that is left of g
    torch.testing.assert_close(step.perturbed_loss.double(), expected.perturbed_loss, rtol=1e-2, atol=0)
    assert loop.perturbed_loss.isfinite()


def test_asks_for_the_mini_batch_itself_and_for_a_loss_of_the_model():
    model, batch = mlp(), data(8, 5)
    with pytest.raises(ValueError, match="the mini-batch itself"):
        msam.backward(loss_of(model), None, model, rho=0.1, micro_batches=msam.split(batch, 4), vectorized=True)
    other = mlp()
    with pytest.raises(ValueError, match="depends on no perturbed parameter"):
        vectorized(model, batch, 4, loss_of(other), rho=0.1)


def timm_model(name, **options):
    import timm

    return timm.create_model(name, num_classes=3, **options)


def text_model(kind, **options):
    import transformers

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24} | options
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, num_labels=3, pad_token_id=0, **small)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


LIBRARIES = {
    "ResNet": ("timm", "resnet18", {}),
    "SE-ResNet": ("timm", "seresnet18", {}),
    "MobileNet": ("timm", "mobilenetv3_small_050", {}),
    "ViT": ("timm", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}),
    "DeiT III with LayerScale": ("timm", "deit3_small_patch16_224", {"img_size": 32, "patch_size": 8}),
    "BERT": ("transformers", "Bert", {}),
    "RoBERTa": ("transformers", "Roberta", {}),
    "Llama": ("transformers", "Llama", {"num_key_value_heads": 2}),
}


@pytest.mark.rare
@pytest.mark.parametrize("examples", [8, 6])  # 6 is the text's length, too
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs(library)) for name, (library, *_) in LIBRARIES.items()]
)
def test_models_of_other_libraries(name, examples):
    torch.manual_seed(0)
    library, kind, options = LIBRARIES[name]
    model = (timm_model if library == "timm" else text_model)(kind, **options).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(model.train())
    y = torch.arange(examples) % 3
    if library == "transformers":
        ids = torch.randint(1, 50, (examples, 6))
        ids[::2, 4:] = 0
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": y}
        losses = [lambda part, net=net: net(**part).loss for net in (model, twin)]
    else:
        batch = torch.randn(examples, 3, 32, 32).double(), y
        losses = [loss_of(model), loss_of(twin)]
    step = vectorized(model, batch, 2, losses[0], rho=0.01)
    expected = msam.backward(losses[1], batch, twin, rho=0.01, micro_batches=2)
    torch.testing.assert_close(step.gradient_norms, expected.gradient_norms, rtol=1e-8, atol=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9 * q.grad.abs().max().item() + 1e-12)
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-10)
