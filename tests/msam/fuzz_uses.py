"""Uses of bare parameters, constants, and the dimension of the examples, for the fuzzer's nets."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.msam.fuzz_nets import FEATURES, LAYERS, Stage, T, parameter

Use = Callable[[Any, Tensor], Tensor]

TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda p: p,
    "scaled": lambda p: 0.5 * p,
    "exp": lambda p: p.clamp_max(1).exp(),
    "tanh": torch.tanh,
    "softmax": lambda p: p.softmax(-1),
    "normalised": lambda p: F.normalize(p, dim=-1),
    "there and back": lambda p: p.mT.contiguous().mT if p.dim() > 1 else p.flip(0),
    "reshaped": lambda p: p.reshape(-1).view(p.shape),
    "halves": lambda p: torch.cat(p.chunk(2, -1)[::-1], -1),
    "weighed": lambda p: p / (1 + p.square().sum()),
    "masked": lambda p: torch.where(p > 0, p, 0.1 * p),
    "itself twice": lambda p: p + p * p,
    "cumulative": lambda p: p.cumsum(-1),
    "rows": lambda p: torch.stack(list(p)) if p.dim() > 1 else p,
    "detached in part": lambda p: p * p.detach().norm(),
}
"""From a parameter to a tensor of its shape, without examples."""

MEETS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "add": ((FEATURES,), lambda x, p: x + p),
    "sub from": ((FEATURES,), lambda x, p: p - x),
    "mul": ((T, FEATURES), lambda x, p: x * p),
    "mul, a row": ((1, T, 1), lambda x, p: p * x),
    "div": ((FEATURES,), lambda x, p: x / (2 + p.tanh())),
    "add in place": ((T, FEATURES), lambda x, p: (x * 1).add_(p)),
    "add in place by +=": ((FEATURES,), lambda x, p: torch.Tensor.__iadd__(x * 1, p)),
    "add with alpha": ((FEATURES,), lambda x, p: torch.add(x, p, alpha=0.3)),
    "matmul": ((FEATURES, FEATURES), lambda x, p: x @ p),
    "matmul with the transpose": ((FEATURES, FEATURES), lambda x, p: torch.matmul(x, p.T)),
    "matmul from the left": ((T, T), lambda x, p: p @ x),
    "matmul of one vector": ((FEATURES,), lambda x, p: x + (x @ p)[..., None]),
    "two dimensions": ((FEATURES, FEATURES), lambda x, p: x + (x[:, 0] @ p)[:, None]),
    "addmm": ((FEATURES, FEATURES), lambda x, p: torch.addmm(p[0], x.reshape(-1, FEATURES), p).view(x.shape)),
    "einsum": ((FEATURES, FEATURES), lambda x, p: torch.einsum("btf,gf->btg", x, p)),
    "einsum, other order": ((T, T), lambda x, p: torch.einsum("st,btf->bsf", p, x)),
    "linear": ((FEATURES, FEATURES), F.linear),
    "conv": ((FEATURES, FEATURES, 1), lambda x, p: F.conv1d(x.mT, p).mT),
    "norm": ((FEATURES,), lambda x, p: F.layer_norm(x, (FEATURES,), p)),
    "token": ((1, 1, FEATURES), lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1)[:, :-1]),
    "token after": ((1, 1, FEATURES), lambda x, p: torch.cat([x, p.repeat(len(x), 1, 1)], 1)[:, 1:]),
    "where": ((FEATURES,), lambda x, p: torch.where(x > 0, x, p)),
    "maximum": ((FEATURES,), torch.maximum),
    "lerp": ((FEATURES,), lambda x, p: torch.lerp(x, p, 0.3)),
    "power": ((FEATURES,), lambda x, p: (x.abs() + 0.5) ** p.tanh()),
    "addcmul": ((FEATURES,), lambda x, p: torch.addcmul(x, x, p)),
    "outer": ((FEATURES,), lambda x, p: x + (x[..., None] * p).sum(-1)),
    "attention query": ((T, FEATURES), lambda x, p: F.scaled_dot_product_attention(p.expand_as(x), x, x)),
    "baddbmm": ((FEATURES, FEATURES), lambda x, p: torch.baddbmm(x, x, p.expand(len(x), -1, -1))),
}
"""A parameter's shape, and how it, or what it is turned into, meets examples."""

MOVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Any], Tensor]] = {
    "positions first": lambda f, x, s: f(x.transpose(0, 1)).transpose(0, 1),
    "all rows": lambda f, x, s: f(x.reshape(-1, FEATURES)).view(x.shape),
    "flattened": lambda f, x, s: f(x.flatten(0, 1)).unflatten(0, (len(x), -1)),
    "two views": lambda f, x, s: sum(f(torch.cat([x, 2 * x])).chunk(2)),
    "two views stacked": lambda f, x, s: f(torch.stack([x, 2 * x])).sum(0),
    "two views by example": lambda f, x, s: f(torch.stack([x, 2 * x], 1)).sum(1),
    "repeated": lambda f, x, s: f(x.repeat_interleave(2, 0)).view(len(x), 2, T, -1).sum(1),
    "repeated whole": lambda f, x, s: f(x.repeat(2, 1, 1)).view(2, *x.shape).sum(0),
    "turned": lambda f, x, s: f(x.flip(0)).flip(0),
    "turned both ways": lambda f, x, s: f(x.flip(1, 0)).flip(1, 0),
    "rolled": lambda f, x, s: f(x.roll(1, 0)).roll(-1, 0),
    "shifted": lambda f, x, s: torch.fft.ifftshift(f(torch.fft.fftshift(x, dim=(0,))), dim=(0,)),
    "sorted and back": lambda f, x, s: sorted_and_back(f, x),
    "broadcast by a constant": lambda f, x, s: f(x * s.outer).sum(0),
    "broadcast, positions left": lambda f, x, s: f(x[:, 0] + s.outer[:, 0]).sum(0)[:, None] + x,
    "constant first": lambda f, x, s: x + f(F.linear(s.rows, x[:, 0]).unsqueeze(-1) * s.square[0]).mean(0)[:, None],
    "constant inside": lambda f, x, s: x + f(torch.inner(s.rows, x[:, 0]).unsqueeze(-1) * s.square[0]).mean(0)[:, None],
    "picked from a constant": lambda f, x, s: x + f(s.table[:, ids_of(x)].unsqueeze(-1) * s.square[0]).mean(0)[:, None],
    "selected from a constant": lambda f, x, s: (
        x + f(torch.index_select(s.table, 1, ids_of(x)).unsqueeze(-1) * s.square[0]).mean(0)[:, None]
    ),
    "written into a constant": lambda f, x, s: f(written(x, s)),
    "one position": lambda f, x, s: x + f(x[:, :1]),
    "squeezed": lambda f, x, s: x + f(x[:, :1].squeeze(1)).unsqueeze(1),
    "masked": lambda f, x, s: f(x.masked_fill(x > 1, 0.5)),
    "windows": lambda f, x, s: f(F.pad(x, (0, 0, 0, 1)).view(-1, 2, FEATURES)).view(len(x), -1, FEATURES)[:, :T],
    "einsum": lambda f, x, s: torch.einsum("tbf->btf", f(torch.einsum("btf->tbf", x))),
    "index": lambda f, x, s: x + f(x[torch.arange(len(x)), 0])[:, None],
    "separate indices": lambda f, x, s: separate(f, x, s),
    "matrix product": lambda f, x, s: f(x @ s.square),
    "scores": lambda f, x, s: (f(x) @ s.square).softmax(-1) @ s.square,
    "empty and filled": lambda f, x, s: filled(f, x),
    "checked": lambda f, x, s: f(x if x.shape[-1] == FEATURES else x.mT),
}
"""Ways for a layer f of features to meet x, with the examples moved about; s has constants."""


def ids_of(x: Tensor) -> Tensor:
    return x.detach()[:, 0, 0].abs().mul(3).long().clamp_max(8)


def sorted_and_back(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    return f(x[order])[order.argsort()]


def written(x: Tensor, s: Any) -> Tensor:
    """x, through a view, in memory that was a constant's."""
    made = s.start.expand(len(x), -1, -1).clone()
    made[:, :, :2].copy_(x[:, :, :2])
    return made


def separate(f: Callable[[Tensor], Tensor], x: Tensor, s: Any) -> Tensor:
    """Two lists of indices with a slice between them come first in the result, in place of the examples."""
    i = torch.arange(4)
    grid = x[:, 0, :, None, None] * s.outer.new_ones(FEATURES, 4)
    return x + f(grid[:, i, :, i]).mean(0)[:, None]


def filled(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[:, 0], out[:, 1:] = f(x[:, 0]), x[:, 1:]
    return out


def met(draw: random.Random) -> nn.Module:
    """A parameter that is turned into something and meets examples."""
    meeting = draw.choice(list(MEETS))
    shape, meet = MEETS[meeting]
    turnings = [draw.choice(list(TURNS)) for _ in range(draw.choice([0, 1, 1, 2]))]
    turns = [TURNS[name] for name in turnings]

    def use(stage: Stage, x: Tensor) -> Tensor:
        p = stage.p
        for turn in turns:
            p = turn(p)
        return meet(x, p)

    return Stage(" ".join([meeting, "of", *turnings]), use, p=parameter(*shape))


def moved(draw: random.Random) -> nn.Module:
    """A layer of features that meets examples out of their place."""
    moving = draw.choice(list(MOVES))
    move = MOVES[moving]
    kind = draw.choice(["linear", "linear", "layer norm", "rms norm", "scale", "matrix"])
    own = draw.choice([3, 4, 6, 8])
    constants = {
        "outer": torch.randn(own, 1, 1, 1),
        "rows": torch.randn(own, FEATURES),
        "square": torch.randn(FEATURES, FEATURES),
        "table": torch.randn(own, 9),
        "start": torch.randn(1, T, FEATURES),
    }
    if kind == "scale":
        layer: nn.Module = Stage("scale", lambda s, x: x * s.p, p=parameter(FEATURES))
    elif kind == "matrix":
        layer = Stage("matrix", lambda s, x: x @ s.p, p=parameter(FEATURES, FEATURES))
    else:
        layer = LAYERS[kind](draw)
    return Stage(f"{moving}, {kind}", lambda s, x: move(s.layer, x, s), layer=layer, **constants)
