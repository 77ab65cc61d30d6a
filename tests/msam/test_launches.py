"""What a step asks of a device besides its forward and backward passes: on a GPU each operation is a launch."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import msam
from msam import perturbation

LAYERS = 20
FREE = {"equal", "empty_like", "detach", "view", "select", "promote_types", "_reshape_alias", "as_strided"}
"""Operations that launch nothing: they make a view, take memory, or compare what lies on a CPU."""

A_STEP, A_MICRO_BATCH = 25, 30
"""Launches at most, however many parameters and buffers there are."""


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.count[name] += 1
        return function(*args, **(kwargs or {}))


def network(layers: int) -> nn.Module:
    """A net of 3 parameters and 3 buffers a layer, and 2 parameters more."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(layers)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 3))


def launches(layers: int, m: int, **options) -> int:
    """Those of a step that are not its passes'."""
    model = network(layers)
    batch = torch.randn(16, 4, 4, 4), torch.arange(16) % 3

    def loss_fn(part):
        return F.cross_entropy(model(part[0]), part[1])

    with Launches() as step:
        msam.backward(loss_fn, batch, model, micro_batches=m, rho=0.1, **options)
    model.zero_grad()
    with Launches() as passes:
        for part in msam.split(batch, m):
            torch.autograd.grad(loss_fn(part), list(model.parameters()))
            loss = loss_fn(part) / m
            if options.get("passes") == "streams":  # which adds gradients up itself
                torch.autograd.grad(loss, list(model.parameters()))
            else:
                loss.backward()
    return step.count.total() - passes.count.total()


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Weights are moved in their place."""
    monkeypatch.setattr(perturbation, "SWAPPED_ON", ())


@pytest.mark.parametrize("m", [1, 4, 8])
@pytest.mark.parametrize("passes", ["loop", "streams"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_they_are_few_for_62_parameters_and_60_buffers(m, passes, adaptive):
    model = network(LAYERS)
    assert (len(list(model.parameters())), len(list(model.buffers()))) == (62, 60)
    assert launches(LAYERS, m, passes=passes, adaptive=adaptive) <= A_STEP + m * A_MICRO_BATCH


@pytest.mark.parametrize("options", [{"passes": "loop"}, {"passes": "streams"}, {"shared": True}], ids=str)
def test_they_do_not_grow_with_the_model(options):
    assert launches(LAYERS, 4, **options) == launches(2, 4, **options)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_of_all_micro_batches_is_one_call_of_each_pass(affine):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.Flatten(), nn.Linear(16, 3))
    batch = torch.randn(16, 4, 4, 4), torch.arange(16) % 3

    def loss_fn(part):
        return F.cross_entropy(model(part[0]), part[1])

    def calls(m):
        with Launches() as step:
            msam.backward(loss_fn, batch, model, micro_batches=m, rho=0.1, passes="vectorized")
        return {name: count for name, count in step.count.items() if "batch_norm" in name}

    assert calls(2) == calls(8) == {"native_batch_norm": 2, "native_batch_norm_backward": 2}
