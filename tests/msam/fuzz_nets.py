"""Random nets for the fuzzer: stages drawn from a grammar, each from (B, T, F) to (B, T, F).

A stage has layers of its own, and uses them, and bare parameters, in ways that models use them and in some that none
does. Examples never meet outside BatchNorm, but stages move their dimension about, mix constants of any shape with
them, and turn parameters into other tensors before they meet examples.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, FEATURES = 3, 4
"""Positions and features of each example. The batch has as many examples as either at times, so lengths may mislead."""


class Stage(nn.Module):
    """What draws one of `uses`, with layers for it.

    Args:
        name: For the report of a case.
        use: Takes the stage and x.
        **parts: Modules, parameters, and tensors that become buffers.
    """

    def __init__(self, name: str, use: Callable[["Stage", Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.name, self.use = name, use
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Attention(nn.Module):
    """By hand, with the heads and positions moved as libraries do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv, self.out = way, nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.bias = parameter(2, T, T)

    def forward(self, x: Tensor) -> Tensor:
        B, length, _ = x.shape
        qkv = self.qkv(x)
        if self.way == "permute":
            q, k, v = qkv.reshape(B, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        elif self.way == "unbind":
            q, k, v = qkv.reshape(B, length, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (t.view(B, length, 2, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
        if self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) + self.bias[:, :length, :length]).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(B, length, -1))


class Cell(nn.Module):
    """A recurrent cell of one's own: the same layer at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.on, self.start = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES), parameter(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, out = self.start.expand(len(x), -1), []
        for step in x.unbind(1):
            h = torch.tanh(self.into(step) + self.on(h))
            out.append(h)
        return torch.stack(out, 1)


class Bag(nn.Module):
    """Words looked up for each position: which is a whole number made of x."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.table = nn.EmbeddingBag(7, FEATURES) if way == "bag" else nn.Embedding(7, FEATURES, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        ids = x.detach().abs().mul(2).long().clamp_max(6)
        if self.way == "bag":
            return x + self.table(ids[:, 0])[:, None]
        if self.way == "rows":
            return x + self.table.weight[ids[..., 0]]
        return x + self.table(ids[..., 0].mT.contiguous().mT if self.way == "turned" else ids[..., 0])


def in_order(make: Callable[[], nn.Module]) -> Callable[[random.Random], nn.Module]:
    """A layer on channels first."""
    return lambda draw: Stage("", lambda s, x: s.layer(x.transpose(1, 2)).transpose(1, 2), layer=make())


def picture(make: Callable[[], nn.Module]) -> Callable[[random.Random], nn.Module]:
    """A layer on pictures: features are 4 channels."""
    return lambda draw: Stage("", lambda s, x: s.layer(x.mT.unsqueeze(-1)).squeeze(-1).mT, layer=make())


def columns(make: Callable[[], nn.Module]) -> Callable[[random.Random], nn.Module]:
    """The same of two equal columns: of one alone, torch 2.14's BatchNorm may give wrong gradients on a CPU."""
    return lambda draw: Stage("", lambda s, x: s.layer(torch.stack([x.mT, x.mT], -1))[..., 0].mT, layer=make())


LAYERS: dict[str, Callable[[random.Random], nn.Module]] = {
    "linear": lambda draw: nn.Linear(FEATURES, FEATURES, bias=draw.random() < 0.7),
    "wide": lambda draw: nn.Sequential(nn.Linear(FEATURES, 24), nn.GELU(), nn.Linear(24, FEATURES)),
    "layer norm": lambda draw: nn.LayerNorm(FEATURES),
    "rms norm": lambda draw: nn.RMSNorm(FEATURES),
    "group norm": in_order(lambda: nn.GroupNorm(2, FEATURES)),
    "instance norm": in_order(lambda: nn.InstanceNorm1d(FEATURES, affine=True)),
    "instance norm with statistics": in_order(lambda: nn.InstanceNorm1d(FEATURES, track_running_stats=True)),
    "batch norm": in_order(lambda: nn.BatchNorm1d(FEATURES)),
    "batch norm, plain": in_order(lambda: nn.BatchNorm1d(FEATURES, affine=False)),
    "batch norm, cumulative": in_order(lambda: nn.BatchNorm1d(FEATURES, momentum=None)),
    "batch norm 2d": columns(lambda: nn.BatchNorm2d(FEATURES)),
    "conv1d": in_order(lambda: nn.Conv1d(FEATURES, FEATURES, 3, padding=1)),
    "conv1d, groups": in_order(lambda: nn.Conv1d(FEATURES, FEATURES, 3, padding="same", groups=2)),
    "conv2d": picture(lambda: nn.Conv2d(FEATURES, FEATURES, (3, 1), padding=(1, 0))),
    "conv2d, dilated": picture(lambda: nn.Conv2d(FEATURES, FEATURES, 3, padding=2, dilation=2, bias=False)),
    "conv2d, reflected": picture(lambda: nn.Conv2d(FEATURES, FEATURES, (3, 1), padding=(1, 0), padding_mode="reflect")),
    "conv transpose": in_order(lambda: nn.ConvTranspose1d(FEATURES, FEATURES, 3, padding=1)),
    "prelu": lambda draw: nn.PReLU(),
    "prelu by channel": in_order(lambda: nn.PReLU(FEATURES)),
    "gru": lambda draw: Stage("", lambda s, x: s.layer(x)[0], layer=nn.GRU(FEATURES, FEATURES, batch_first=True)),
    "bilinear": lambda draw: Stage("", lambda s, x: s.layer(x, x), layer=nn.Bilinear(FEATURES, FEATURES, FEATURES)),
    "cell": lambda draw: Cell(),
    "attention": lambda draw: Attention(draw.choice(["permute", "unbind", "chunk", "fused"])),
    "lookup": lambda draw: Bag(draw.choice(["bag", "rows", "table", "turned"])),
    "weight norm": lambda draw: nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, FEATURES)),
    "spectral norm": lambda draw: nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, FEATURES)),
    "twice": lambda draw: Stage("", lambda s, x: s.layer(torch.tanh(s.layer(x))), layer=nn.Linear(FEATURES, FEATURES)),
    "dropout": lambda draw: nn.Dropout(0.3),
    "in place": lambda draw: nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(inplace=True)),
    "counter": lambda draw: Stage("", counted, steps=torch.zeros(())),
}
"""Layers as a library has them."""


def counted(stage: Stage, x: Tensor) -> Tensor:
    stage.steps += 1
    return x * stage.steps.div(9).cos()
