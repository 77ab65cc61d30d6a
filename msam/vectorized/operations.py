"""Operations with parameters over all micro-batches at once, each micro-batch at weights of its own.

An operation lives for both passes of a step. Micro-batch i of m is the i-th of m equal parts along the first dimension
of what the operation is given and of what it returns. The clean pass runs at w; its backward pass (`ascent`) keeps what
makes up each micro-batch's gradient g_i, and its norm. The perturbed pass runs at w + e_i, e_i = scale_i * T^2 g_i with
T = 1 (ASAM: |w|); its backward pass (`descent`) gives the sum of the gradients over all micro-batches.
"""

import collections
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Stack = Tensor | Sequence[Tensor]
"""One tensor for each micro-batch: a list, or stacked along a first dimension."""


class Operation(ABC):
    """One call of a torch function with an input x and parameters; either may be absent.

    Args:
        m: The number of micro-batches.
        perturbed: Whether each of the parameters is.
        adaptive: Whether T is |w|.

    Attributes:
        norms: ||T g_i||, over the perturbed parameters that nothing else uses. Shape (m,); None without a gradient.
        trained: Whether each of the parameters wants a gradient. In the clean pass they stay out of autograd's graph.
    """

    def __init__(self, m: int, perturbed: Sequence[bool], adaptive: bool) -> None:
        self.m, self._perturbed, self._adaptive = m, perturbed, adaptive
        self.norms: Tensor | None = None
        self.trained: Sequence[bool] = [True] * len(perturbed)
        self.sums: list[Sum | None] = [None] * len(perturbed)
        """Of each parameter that other operations use too, where their gradients add up."""
        self._own: list[Stack | None] = [None] * len(perturbed)

    @abstractmethod
    def clean(self, x: Any, *params: Any) -> Tensor:
        """The function's value at w."""

    @abstractmethod
    def ascent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> Tensor | None:
        """The gradient by x at w, if wanted; those by the parameters stay here."""

    @abstractmethod
    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        """The function's value at w + e_i. Shape of scale: (m,)."""

    @abstractmethod
    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        """The gradients at w + e_i by x, if wanted, and by each parameter."""

    def renew(self, new: "Operation") -> None:  # noqa: B027
        """Use the constants of the second pass's call, which may be other tensors."""

    def _keep(self, params: Sequence[Tensor | None], gradients: Sequence[Stack | None]) -> None:
        """Take the micro-batches' gradients by the perturbed parameters, and their norm."""
        norms = []
        for number, (w, own) in enumerate(zip(params, gradients, strict=True)):
            if w is None or own is None or not self._perturbed[number]:
                continue
            if (total := self.sums[number]) is not None:
                total.add(own)
            else:
                self._own[number] = own
                norms += [torch.stack(torch._foreach_norm([g * w if self._adaptive else g for g in own]))]
        if norms:
            self.norms = torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def _weights(self, scale: Tensor, params: Sequence[Tensor | None]) -> list[Any]:
        """Each parameter's w + e_i; w m times if it is not perturbed. A stack of gradients becomes one of weights."""
        found: list[Any] = []
        for number, w in enumerate(params):
            own, self._own[number] = self._own[number], None
            if w is not None and (total := self.sums[number]) is not None:
                found.append(total.moved(w, scale, self._adaptive))
            elif w is None or own is None:
                found.append([w] * self.m)
            else:
                found.append(_moved(w, own, scale, self._adaptive))
        return found


class Sum:
    """The micro-batches' gradients by a parameter that several operations use: each of them adds its own."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._weights: Stack | None = None

    def add(self, gradients: Stack) -> None:
        """Add those of one operation."""
        stack = stacked(gradients)
        self._total = stack.clone() if self._total is None else self._total.add_(stack)

    @torch.no_grad()
    def norms(self, w: Tensor, adaptive: bool) -> Tensor | None:
        """||T g_i||. Shape (m,); None if there is no gradient."""
        if self._total is None:
            return None
        return torch.linalg.vector_norm((self._total * w if adaptive else self._total).flatten(1), dim=1)

    def moved(self, w: Tensor, scale: Tensor, adaptive: bool) -> Stack:
        """w + e_i, worked out once."""
        if self._weights is None:
            total = self._total
            self._weights = [w] * len(scale) if total is None else _moved(w, total, scale.to(w.device), adaptive)
        return self._weights


def _moved(w: Tensor, own: Stack, scale: Tensor, adaptive: bool) -> Stack:
    """w + e_i for each micro-batch. A stack of gradients becomes one of weights."""
    in_place = isinstance(own, Tensor)  # else autograd may have handed the same memory to others too
    moved = [
        torch.addcmul(w, g * w * w if adaptive else g, factor, out=g if in_place else None)
        for g, factor in zip(own, scale, strict=True)
    ]
    return own if in_place else moved


class Each(Operation):
    """Any function, one micro-batch after the other.

    For what is cheap beside the products, and for BatchNorm, which averages over a micro-batch and moves its running
    statistics with each.
    """

    def __init__(self, function: Callable[..., Tensor], m: int, perturbed: Sequence[bool], adaptive: bool) -> None:
        """As `Operation`; the function is given the number of the micro-batch, its part of x, and the parameters."""
        super().__init__(m, perturbed, adaptive)
        self._function = function
        self._passes: list[tuple[GradientEdge, list[Tensor | None], tuple[int, ...]]] = []
        """Of each micro-batch, where its gradient starts, what it is wanted of, and the strides of its value."""

    def renew(self, new: Operation) -> None:
        assert isinstance(new, Each)
        self._function = new._function

    def clean(self, x: Any, *params: Any) -> Tensor:
        return self._run(x, params, [[w] * self.m for w in params])

    def ascent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> Tensor | None:
        gradients: list[list[Tensor]] = [[] for _ in params]
        dx = self._back(dy, by_x, gradients)
        self._keep(params, [own or None for own in gradients])
        return dx

    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        return self._run(x, params, self._weights(scale, params))

    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        gradients: list[list[Tensor]] = [[] for _ in params]
        dx = self._back(dy, by_x, gradients)
        return dx, *(torch.stack(own).sum(0) if own else None for own in gradients)

    def _run(self, x: Tensor | None, params: Sequence[Tensor], weights: Sequence[Sequence[Tensor]]) -> Tensor:
        wanted = [x is not None and x.requires_grad, *self.trained]
        parts = [x] * self.m if x is None else x.chunk(self.m)
        self._passes = []  # of a clean pass without a way back, if there are any

        def outputs() -> Iterator[Tensor]:
            for number, inputs in enumerate(zip(parts, *weights, strict=True)):
                leaves = [t.detach().requires_grad_() if want else t for t, want in zip(inputs, wanted, strict=True)]
                with torch.enable_grad():
                    y = self._function(number, *leaves)
                if y.requires_grad:
                    self._passes.append((get_gradient_edge(y), leaves, y.stride()))
                yield y.detach()

        return joined(outputs(), self.m)

    def _back(self, dy: Tensor, by_x: bool, gradients: Sequence[list[Tensor]]) -> Tensor | None:
        """The gradient by x, if wanted; those by the parameters are added to the lists."""
        passes, self._passes = self._passes, []

        def by_part() -> Iterator[Tensor]:
            for (edge, leaves, strides), part in zip(passes, dy.chunk(self.m), strict=True):
                if part.stride() != strides and 0 not in strides:  # torch's batch_norm mixes up layouts that differ
                    part = torch.empty_strided(part.shape, strides, dtype=part.dtype, device=part.device).copy_(part)
                wanted = [t for t in leaves if t is not None and t.requires_grad]
                found = dict(zip(map(id, wanted), torch.autograd.grad(edge, wanted, part), strict=True))
                for own, leaf in zip(gradients, leaves[1:], strict=True):
                    own += [found[id(leaf)]] if id(leaf) in found else []
                yield found.get(id(leaves[0]), part)

        if by_x:
            return joined(by_part(), self.m)
        collections.deque(by_part(), maxlen=0)
        return None


class Embedding(Operation):
    """`torch.nn.functional.embedding`: the rows that a micro-batch has looked up move, and the table stays.

    The ids of the perturbed pass may be others than those of the clean pass, where they depend on activations.
    """

    def __init__(self, m: int, perturbed: Sequence[bool], adaptive: bool, padding_idx: int) -> None:
        super().__init__(m, perturbed, adaptive)
        self._padding = padding_idx
        self._rows: Tensor | None = None
        """The rows that were looked up, in order. Those of micro-batch i count from i times the table's length."""
        self._steps: Tensor | None = None
        """For the first of each group of equal rows, T^2 g."""

    def clean(self, x: Any, *params: Any) -> Tensor:
        return F.embedding(x, params[0])

    def ascent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> None:
        (w,) = params
        row = self._counted(x, len(w))
        D = dy.reshape(len(row), -1).masked_fill((x == self._padding).reshape(-1, 1), 0)
        if self.sums[0] is not None:
            whole = torch.zeros(self.m * len(w), *w.shape[1:], dtype=D.dtype, device=D.device)
            self._keep((w,), (whole.index_add_(0, row, D).view(self.m, *w.shape),))
            return
        self._rows = row.sort().values
        place = torch.searchsorted(self._rows, row)
        g = torch.zeros_like(D).index_add_(0, place, D)
        if self._adaptive:
            g *= w[self._rows % len(w)].square()
        squares = (D.double() * g[place]).view(self.m, -1).sum(1)  # D sums to g over what looked up a row
        self.norms = squares.clamp_min(0).sqrt().to(D.dtype)
        self._steps = g

    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        (w,) = params
        if self.sums[0] is not None:
            (weights,) = self._weights(scale, params)
            return joined(map(F.embedding, x.chunk(self.m), weights), self.m)
        y = F.embedding(x, w)
        if self._steps is not None and self._rows is not None:
            row = self._counted(x, len(w))
            place = torch.searchsorted(self._rows, row).clamp_max(len(row) - 1)
            steps = self._steps[place] * (self._rows[place] == row).unsqueeze(1)
            y.view(self.m, -1).addcmul_(steps.view(self.m, -1), scale.unsqueeze(1))
            self._rows = self._steps = None
        return y

    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        return None, torch.ops.aten.embedding_dense_backward(dy, x, len(params[0]), self._padding, False)

    def _counted(self, x: Tensor, length: int) -> Tensor:
        first = length * torch.arange(self.m, device=x.device).unsqueeze(1)
        return (x.reshape(self.m, -1) + first).flatten()


class _Clean(torch.autograd.Function):
    """The clean pass of an operation. Its parameters get no gradient here; the anchor brings autograd back."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, anchor: Tensor, x: Any, *params: Any) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(x, *params, _mark())
        return _own(operation.clean(x, *params))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *params, _ = ctx.saved_tensors
        _once(ctx)
        return None, None, ctx.operation.ascent(dy, ctx.needs_input_grad[2], x, *params), *(None for _ in params)


class _Moved(torch.autograd.Function):
    """The perturbed pass of an operation."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, scale: Tensor, x: Any, *params: Any) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(x, *params, _mark())
        return _own(operation.moved(scale, x, *params))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *params, _ = ctx.saved_tensors
        _once(ctx)
        return None, None, *ctx.operation.descent(dy, ctx.needs_input_grad[2], x, *params)


def run_clean(operation: Operation, anchor: Tensor, x: Tensor | None, params: Sequence[Tensor | None]) -> Tensor:
    """The operation's value at w. Autograd comes back to it if it comes back to the anchor, a tensor of no meaning."""
    operation.trained = [p is not None and p.requires_grad for p in params]
    return _Clean.apply(operation, anchor, x, *(None if p is None else p.detach() for p in params))


def run_moved(operation: Operation, scale: Tensor, x: Tensor | None, params: Sequence[Tensor | None]) -> Tensor:
    """The operation's value at w + e_i, for autograd."""
    return _Moved.apply(operation, scale, x, *params)


def refuse(what: str) -> NoReturn:
    """Say what cannot be done in one pass.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"msam.backward(vectorized=True) cannot do {what}: use vectorized=False.")


def _mark() -> Tensor:
    """One more saved tensor, by whose shape a checkpoint knows that this is not the function that it runs again."""
    return torch.empty(0, 7, 13)


def _once(ctx: Any) -> None:
    if torch.is_grad_enabled() or getattr(ctx, "done", False):
        refuse("a gradient within loss_fn")
    ctx.done = True


def _own(y: Tensor) -> Tensor:
    """The same memory, but no view in autograd's eyes, so that it may be written to in place."""
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def stacked(tensors: Stack) -> Tensor:
    """One tensor."""
    return tensors if isinstance(tensors, Tensor) else torch.stack(list(tensors))


def joined(parts: Iterable[Tensor], m: int) -> Tensor:
    """The m parts along the first dimension. Each is copied when it is there, and its memory free for the next."""
    whole = torch.empty(0)
    for number, part in enumerate(parts):
        size = len(part)
        if not number:
            outermost = size > 1 and part.stride(0) == part[0].numel() and 0 not in part.stride()
            strides = part.stride() if outermost else part.new_empty(part.shape).stride()
            whole = part.new_empty_strided((m * size, *part.shape[1:]), strides)
        whole[number * size : (number + 1) * size] = part
    return whole
