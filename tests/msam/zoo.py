"""Small models of timm, torchvision and transformers: does `msam.backward` do them, in a loop and in one pass?

    python -m tests.msam.zoo            # a line for each model: equal, or refused and why
    python -m tests.msam.zoo BERT ViT   # these only

Models are built from their configuration, nothing is downloaded. They are as small as their parts allow, since what
matters here is which functions of torch a library calls, not how wide its layers are.
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msam
from tests.msam.plain import error, plain_step
from tests.msam.zoo_models import ZOO

EXAMPLES, RHO = 8, 0.05
LOOP, ONE_PASS = 1e-9, 1e-6
"""The greatest errors allowed: of the loop against plain autograd, and of one pass against the loop."""


class Wrong(AssertionError):
    """Neither the right gradient nor a refusal that leaves everything as it was."""


@dataclass
class Twins:
    """A model, its twin, and a batch for both."""

    ours: nn.Module
    theirs: nn.Module
    batch: Any

    @classmethod
    def of(cls, name: str) -> "Twins":
        """From the zoo."""
        build, batch = ZOO[name]
        torch.manual_seed(0)
        model = build().double().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d):
                module.p = 0.0
            if "DropPath" in type(module).__name__ or "StochasticDepth" in type(module).__name__:
                module.drop_prob = module.p = 0.0
        return cls(model, copy.deepcopy(model), batch(EXAMPLES))


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    """The mean loss, whatever the model returns."""

    def loss(part: Any) -> Tensor:
        if isinstance(part, dict):
            returned = model(**{name: t for name, t in part.items() if name != "target"})
            if getattr(returned, "loss", None) is not None:
                return returned.loss
            target = part["target"]
        else:
            returned, target = model(part[0]), part[1]
        return F.cross_entropy(logits(returned), target)

    return loss


def logits(returned: Any) -> Tensor:
    """Three numbers for each example, made from what the model returns."""
    if isinstance(returned, dict) and "out" in returned:
        returned = returned["out"]
    for name in ("logits", "logits_per_image", "pooler_output", "last_hidden_state"):
        if not isinstance(returned, Tensor) and getattr(returned, name, None) is not None:
            returned = getattr(returned, name)
    if isinstance(returned, list | tuple):
        returned = sum(t.flatten(1)[:, :3] for t in returned)
    return returned.flatten(2).mean(2) if returned.dim() > 2 and returned.shape[1] == 3 else returned.flatten(1)[:, :3]


def check(name: str, m: int) -> str:
    """Try a model with m micro-batches.

    Returns:
        "equal", or "refused: " and the reason.

    Raises:
        Wrong: with what is wrong.
    """
    twins = Twins.of(name)
    parts = msam.split(twins.batch, m)
    plain = copy.deepcopy(twins.ours)
    expected = plain_step(loss_of(plain), parts, [EXAMPLES // m] * m, plain, RHO)
    msam.backward(loss_of(twins.theirs), twins.batch, twins.theirs, rho=RHO, micro_batches=m)
    compare(f"{name}, loop, m={m}", twins.theirs, plain, expected.gradient, LOOP)
    before = copy.deepcopy(twins.ours)
    try:
        msam.backward(loss_of(twins.ours), twins.batch, twins.ours, rho=RHO, micro_batches=m, vectorized=True)
    except NotImplementedError as refusal:
        if not unchanged(twins.ours, before):
            raise Wrong(f"{name}, m={m}: refused, but left changed") from refusal
        return f"refused: {refusal}".replace("msam.backward(vectorized=True) cannot do ", "").split(": use ")[0]
    theirs = {key: p.grad for key, p in twins.theirs.named_parameters()}
    compare(f"{name}, one pass, m={m}", twins.ours, twins.theirs, theirs, ONE_PASS)
    return "equal"


def compare(
    what: str, ours: nn.Module, theirs: nn.Module, gradient: dict[str, Tensor | None], tolerance: float
) -> None:
    """Compare the gradient, which parameters have none, the weights and the buffers.

    Raises:
        Wrong: if any differs.
    """
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    gradient = {name: gradient[name] for name in found}
    missing = [name for name in found if (found[name] is None) != (gradient[name] is None)]
    if missing:
        raise Wrong(f"{what}: .grad is None where it should not be, or the reverse: {missing[:4]}")
    if not (wrong := error(found, gradient)) <= tolerance:
        raise Wrong(f"{what}: the gradient is off by {wrong:.1e}")
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not torch.equal(a, b):
            raise Wrong(f"{what}: the weight {name} has moved")
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        if not torch.allclose(a, b, rtol=1e-7, atol=1e-9, equal_nan=True):
            raise Wrong(f"{what}: the buffer {name} differs")


def unchanged(model: nn.Module, before: nn.Module) -> bool:
    """Whether weights and buffers are bit for bit what they were, and there is no `.grad`."""
    pairs = zip([*model.parameters(), *model.buffers()], [*before.parameters(), *before.buffers()], strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and all(p.grad is None for p in model.parameters())


def main(names: list[str]) -> int:
    """Print a line for each model; the number of those that are wrong."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started, counts = time.monotonic(), {"equal": 0, "refused": 0, "WRONG": 0}
    for name in names or ZOO:
        begun = time.monotonic()
        try:
            found = {m: check(name, m) for m in (2, 4)}
            text = found[2] if found[2] == found[4] else f"m=2 {found[2]}; m=4 {found[4]}"
        except Exception as error:
            text = f"WRONG {type(error).__name__}: {str(error)[:300]}"
        counts[next(kind for kind in ("WRONG", "refused", "equal") if kind in text)] += 1
        print(f"{name:28} {time.monotonic() - begun:5.2f} s  {text}", flush=True)
    print(f"{counts}, {time.monotonic() - started:.0f} s")
    return counts["WRONG"]


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
