"""One random case of the fuzzer: a net, a batch, a loss, and the options of a step, all from one number."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msam
from tests.msam.fuzz_nets import FEATURES, LAYERS, T
from tests.msam.fuzz_uses import met, moved

WIDTH = 5


class Net(nn.Module):
    """Stages between a layer for the features and one for the classes."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, 3)
        self.names: list[str] = []
        self.stages = nn.ModuleList(self._stage(draw) for _ in range(draw.choice([1, 1, 2, 2, 3, 4])))
        self.residual = [draw.random() < 0.3 for _ in self.stages]
        self.bent = [draw.random() < 0.6 for _ in self.stages]
        if draw.random() < 0.1:
            self.unused = nn.Linear(2, 2)
        self._tie(draw)
        for p in self.parameters():
            if draw.random() < 0.05:
                p.requires_grad_(False)
        self.into.weight.requires_grad_(True)

    def _stage(self, draw: random.Random) -> nn.Module:
        kind = draw.choice([*LAYERS, *["met"] * 16, *["moved"] * 12])
        stage = met(draw) if kind == "met" else moved(draw) if kind == "moved" else LAYERS[kind](draw)
        self.names.append(getattr(stage, "name", "") or kind)
        return stage

    def _tie(self, draw: random.Random) -> None:
        """Let two layers have one weight."""
        alike = [m for m in self.modules() if type(m) is nn.Linear and m.weight.shape == (FEATURES, FEATURES)]
        alike = [m for m in alike if "weight" in m._parameters]
        if len(alike) > 1 and draw.random() < 0.5:
            alike[1].weight = alike[0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.into(x))
        for stage, residual, bent in zip(self.stages, self.residual, self.bent, strict=True):
            y = stage(x)
            y = torch.tanh(y) if bent else y
            x = x + y if residual else y
        return self.out(x.mean(1))


@dataclass
class Case:
    """What a number stands for."""

    seed: int
    net: nn.Module
    batch: Any
    examples: int
    m: int
    loss_of: Callable[[nn.Module], Callable[[Any], Any]]
    options: dict[str, Any]
    shared: bool
    held: bool
    """Whether there is a gradient in `.grad` before."""
    steps: int
    noisy: bool
    """Whether it draws random numbers, which one pass draws in another order."""
    empty: bool
    """Whether some micro-batch may count nothing."""
    text: str


def case(seed: int) -> Case:
    """The case of this number."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    net = Net(draw).double()
    if draw.random() < 0.1:
        net.eval()
    m = draw.choice([1, 2, 2, 2, 3, 3, 4, 4, 5, 6])
    examples = m * draw.choice([1, 2, 2, 3, 4]) if draw.random() < 0.8 else draw.randint(1, 12)
    batch, x_and_y = _batch(draw, examples)
    loss_of, text, empty = _loss(draw, x_and_y, batch)
    options: dict[str, Any] = {"rho": draw.choice([0, 1e-6, 0.01, 0.05, 0.05, 0.3, 0.3, 2.0])}
    if draw.random() < 0.25:
        options["adaptive"] = True
    if draw.random() < 0.2:
        chosen = {name for name, p in net.named_parameters() if draw.random() < 0.6 or name == "into.weight"}
        options["perturb"] = chosen.__contains__
    noisy = net.training and any(isinstance(module, nn.Dropout) for module in net.modules())
    return Case(
        seed=seed, net=net, batch=batch, examples=examples, m=m, loss_of=loss_of, options=options,
        shared=draw.random() < 0.12, held=draw.random() < 0.3, steps=draw.choice([1, 1, 1, 2]), noisy=noisy,
        empty=empty, text=f"{net.names} B={examples} m={m} {list(options)} rho={options['rho']} {text}",
    )  # fmt: skip


def _batch(draw: random.Random, examples: int) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]:
    """A batch of some structure, and how to find x and y in it."""
    x = torch.randn(examples, T, WIDTH, dtype=torch.float64)
    y = torch.randint(0, 3, (examples,))
    batches: list[tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]] = [
        ((x, y), lambda b: (b[0], b[1])),
        ([x, y], lambda b: (b[0], b[1])),
        ({"x": x, "y": y}, lambda b: (b.pop("x"), b["y"])),
        ({"in": {"x": x, "name": "words", "nothing": None}, "y": (y, y.clone())}, lambda b: (b["in"]["x"], b["y"][0])),
        (({"x": x}, {"y": [y, y + 0]}), lambda b: (b[0]["x"], b[1]["y"][1])),
        ({"x": x, "y": y, "names": [str(i) for i in range(examples)]}, lambda b: (b["x"], b["y"])),
        (torch.cat([x.flatten(1), y[:, None]], 1), lambda b: (b[:, :-1].view(-1, T, WIDTH), b[:, -1].long())),
    ]
    return draw.choice(batches)


def _loss(draw: random.Random, x_and_y: Any, batch: Any) -> tuple[Callable[[nn.Module], Any], str, bool]:
    kind = draw.choice(["mean", "mean", "mean", "square", "count", "tensor count", "weight", "aux"])
    absent = kind in ("count", "tensor count", "weight") and not isinstance(batch, Tensor)
    if absent:
        y = x_and_y(dict(batch) if isinstance(batch, dict) else batch)[1]
        y[torch.rand(len(y)) < draw.choice([0.2, 0.5, 0.9])] = -100

    def loss_of(net: nn.Module) -> Callable[[Any], Any]:
        def loss_fn(part: Any) -> Any:
            x, y = x_and_y(dict(part) if isinstance(part, dict) else part)
            z = net(x)
            if kind == "square":
                return z.square().mean() + z.sum(1).sin().mean()
            loss, count = F.cross_entropy(z, y), (y != -100).sum()
            if kind == "aux":
                return msam.Output(loss, aux={"logits": z})
            if kind == "weight":
                return msam.Output(loss, weight=0.5 * count.item())
            return loss if kind == "mean" else (loss, count.item() if kind == "count" else count)

        return loss_fn

    return loss_of, kind, absent


def as_pairs(loss_fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of a loss function of msam's kinds, one that returns a loss, or a loss and a number."""

    def plain(part: Any) -> Any:
        returned = loss_fn(part)
        if isinstance(returned, msam.Output):
            return returned.loss if returned.weight is None else (returned.loss, returned.weight)
        return returned

    return plain
