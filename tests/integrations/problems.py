"""What the recipes are measured with: small problems of uneven lengths, a float64 reference, an optimizer that records.

The reference is `tests.msam.plain`, which shares nothing with the package. Weights stay where they are (lr = 0), so
every step of a framework is compared with the gradient at one point.
"""

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import msam
from tests.msam.plain import plain_step

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
RECIPES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.+?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)

IGNORED = -100
M, RHO = 4, 0.05
VOCABULARY, CLASSES = 40, 5
RIGHT = 1e-5
"""Relative error up to which a recipe is right: float32 rounds at 1e-7."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A setting of a recipe.

    Attributes:
        framework: The heading of the recipe.
        setting: What is on.
        needs: Packages that it takes.
        run: Runs the recipe at this rho, or the framework's stock loop if rho is None; returns the gradient at each
            optimizer step, flat.
        reference: The gradient that each step should find, for rho.
        in_bf16: Whether the forward passes are, and the reference's too.
    """

    framework: str
    setting: str
    needs: tuple[str, ...]
    run: Callable[[float | None], list[Tensor]]
    reference: Callable[[float], Tensor]
    in_bf16: bool = False

    def error(self) -> float:
        """The recipe against the reference."""
        expected = self.reference(RHO)
        assert worst([self.reference(0.0)], expected) > 0.01, "the perturbation shows"
        return worst(self.run(RHO), expected)

    def error_at_zero(self) -> float:
        """The recipe at rho = 0 against the stock framework; in bf16 against the plain loop."""
        return worst(self.run(0.0), self.reference(0.0) if self.in_bf16 else self.run(None)[0])


def recipe(framework: str, rho: float) -> dict[str, Any]:
    """What the code of a recipe defines, with another rho."""
    code, count = re.subn(r"\brho=[\d.]+", f"rho={rho!r}", RECIPES[framework])
    assert count == 1, framework
    names: dict[str, Any] = {}
    exec(compile(code, f"docs/integrations.md: {framework}", "exec"), names)
    return names


class Recorder(torch.optim.SGD):
    """Steps nowhere, and keeps the gradients that it was to step on."""

    def __init__(self, params: Any, lr: float = 0.0) -> None:
        super().__init__(params, lr=lr)
        self.gradients: list[Tensor] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        found = closure() if closure else None
        self.gradients.append(flat([p.grad for group in self.param_groups for p in group["params"]]))
        return found


def flat(gradients: Sequence[Tensor | None]) -> Tensor:
    """All that there are, in one vector."""
    return torch.cat([g.detach().double().flatten() for g in gradients if g is not None])


def worst(found: Sequence[Tensor], expected: Tensor) -> float:
    """The greatest relative error of a step."""
    return max(((g - expected).norm() / expected.norm()).item() for g in found)


def clipped(gradient: Tensor, norm: float | None) -> Tensor:
    return gradient if norm is None else gradient * min(1.0, norm / (gradient.norm().item() + 1e-6))


class Tagger(nn.Module):
    """Labels every token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(ids)))).transpose(1, 2)


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


@functools.cache
def token_batches(count: int, examples: int = 8) -> list[Batch]:
    """Padded batches, each of another width, whose rows have very different lengths."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for number in range(count):
        width = 6 + 3 * number
        ids = torch.randint(0, VOCABULARY, (examples, width), generator=generator)
        labels = torch.randint(0, CLASSES, (examples, width), generator=generator)
        lengths = torch.randint(1, width + 1, (examples, 1), generator=generator).sort(dim=0).values
        labels[torch.arange(width) >= lengths] = IGNORED
        batches.append((ids, labels))
    return batches


def mean_and_count(model: nn.Module, part: Any) -> tuple[Tensor, Tensor]:
    """The mean over valid tokens, and their number."""
    ids, labels = part
    return F.cross_entropy(model(ids), labels, ignore_index=IGNORED), labels.ne(IGNORED).sum()


def reference(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Any], Any],
    batches: Sequence[Any],
    shares: Sequence[float],
    rho: float,
) -> Tensor:
    """The sum over batches of share * mSAM gradient, in float64 and flat.

    Args:
        model: Of any type; a copy is taken to float64.
        loss_of: Takes a model and a micro-batch, returns a mean loss, or that and a count.
        batches: The accumulated batches.
        shares: What each counts for.
        rho: Radius.
    """
    total: Tensor | None = None
    for batch, share in zip(batches, shares, strict=True):
        twin = copy.deepcopy(model).double()
        parts = msam.split(batch, M)
        step = plain_step(functools.partial(loss_of, twin), parts, [size_of(part) for part in parts], twin, rho)
        gradient = share * flat([step.gradient[name] for name, p in twin.named_parameters() if p.requires_grad])
        total = gradient if total is None else total + gradient
    return total


def in_bf16(
    make: Callable[[], nn.Module], loss_of: Callable[[nn.Module, Any], Any], batches: Sequence[Any], rho: float
) -> Tensor:
    """`msam.backward` of one batch in a plain loop, the model's forward passes in bf16 and the rest not.

    bf16 rounds at 4e-3, so nothing that is not this very computation comes within 1e-5 of a recipe's gradient.
    """
    (batch,), model = batches, make()
    forward = model.forward

    def autocast_forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return tree_map(lambda t: t.float() if isinstance(t, Tensor) else t, forward(*args, **kwargs))

    model.forward = autocast_forward
    loss_fn = functools.partial(loss_of, model)
    msam.backward(loss_fn, batch, model, rho=rho, micro_batches=M)
    return flat([p.grad for p in model.parameters()])


def size_of(part: Any) -> int:
    first = next(iter(part.values())) if hasattr(part, "values") else part[0]
    return len(first)
