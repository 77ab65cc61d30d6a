"""Small models and data, the reference's gradient for them, and a count of what waits for a device."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import msam
from msam.reference import msam_gradient


def mlp(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3)).double()


def convnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


def data(examples: int, *shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (examples,), generator=generator)


def loss_of(model: nn.Module):
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def pure_loss(model: nn.Module):
    return lambda w, batch: F.cross_entropy(functional_call(copy.deepcopy(model), w, batch[0]), batch[1])


def reference(model: nn.Module, batch, m: int, rho: float, adaptive: bool = False) -> dict[str, torch.Tensor]:
    parts = msam.split(batch, m)
    w = {name: p.detach() for name, p in model.named_parameters()}
    return msam_gradient(pure_loss(model), w, parts, [len(p[1]) for p in parts], rho, adaptive)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


class Waits(TorchDispatchMode):
    """Operations that have to know a tensor's value, for which a GPU would be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique_dim", "_unique2", "masked_select"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))
