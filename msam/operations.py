"""Operations with parameters over all micro-batches at once, each micro-batch at weights of its own.

An operation lives for both passes of a step. Micro-batch i of m is the i-th of m equal parts along the first dimension
of what the operation is given and of what it returns. The clean pass runs at w; its backward pass (`ascent`) keeps what
makes up each micro-batch's gradient g_i, and its norm. The perturbed pass runs at w + e_i, e_i = scale_i * T^2 g_i with
T = 1 (ASAM: |w|); its backward pass (`descent`) gives the sum of the gradients over all micro-batches.
"""

import collections
import itertools
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
        norms: ||T g_i||, over the perturbed parameters together. Shape (m,); None if they have no gradient.
    """

    def __init__(self, m: int, perturbed: Sequence[bool], adaptive: bool) -> None:
        self.m, self._perturbed, self._adaptive = m, perturbed, adaptive
        self.norms: Tensor | None = None
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

    def _keep(self, params: Sequence[Tensor | None], gradients: Sequence[Stack | None]) -> None:
        """Take the micro-batches' gradients by the perturbed parameters, and their norm."""
        norms = []
        for number, (w, own) in enumerate(zip(params, gradients, strict=True)):
            if w is not None and own is not None and self._perturbed[number]:
                self._own[number] = own
                norms += [torch.stack(torch._foreach_norm([g * w if self._adaptive else g for g in own]))]
        if norms:
            self.norms = torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def _weights(self, scale: Tensor, params: Sequence[Tensor | None]) -> list[Any]:
        """Each parameter's w + e_i; w m times if it is not perturbed. A stack of gradients becomes one of weights."""
        found: list[Any] = []
        for number, w in enumerate(params):
            own, self._own[number] = self._own[number], None
            if w is None or own is None:
                found.append([w] * self.m)
                continue
            stacked = isinstance(own, Tensor)  # else autograd may have handed the same memory to others too
            moved = [
                torch.addcmul(w, g * w * w if self._adaptive else g, factor, out=g if stacked else None)
                for g, factor in zip(own, scale, strict=True)
            ]
            found.append(own if stacked else moved)
        return found


class Each(Operation):
    """Any function, one micro-batch after the other.

    For what is cheap beside the products, and for BatchNorm, which averages over a micro-batch and moves its running
    statistics with each.
    """

    def __init__(self, function: Callable[..., Tensor], m: int, perturbed: Sequence[bool], adaptive: bool) -> None:
        super().__init__(m, perturbed, adaptive)
        self._function = function
        self._passes: list[tuple[GradientEdge, list[Tensor | None]]] = []

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
        wanted = [t is not None and t.requires_grad for t in (x, *params)]
        parts = [x] * self.m if x is None else x.chunk(self.m)
        self._passes = []  # of a clean pass without a way back, if there are any

        def outputs() -> Iterator[Tensor]:
            for inputs in zip(parts, *weights, strict=True):
                leaves = [t.detach().requires_grad_() if want else t for t, want in zip(inputs, wanted, strict=True)]
                with torch.enable_grad():
                    y = self._function(*leaves)
                if y.requires_grad:
                    self._passes.append((get_gradient_edge(y), leaves))
                yield y.detach()

        return _joined(outputs(), self.m)

    def _back(self, dy: Tensor, by_x: bool, gradients: Sequence[list[Tensor]]) -> Tensor | None:
        """The gradient by x, if wanted; those by the parameters are added to the lists."""
        passes, self._passes = self._passes, []

        def by_part() -> Iterator[Tensor]:
            for (edge, leaves), part in zip(passes, dy.chunk(self.m), strict=True):
                wanted = [t for t in leaves if t is not None and t.requires_grad]
                found = dict(zip(map(id, wanted), torch.autograd.grad(edge, wanted, part), strict=True))
                for own, leaf in zip(gradients, leaves[1:], strict=True):
                    own += [found[id(leaf)]] if id(leaf) in found else []
                yield found.get(id(leaves[0]), part)

        if by_x:
            return _joined(by_part(), self.m)
        collections.deque(by_part(), maxlen=0)
        return None


class Product(Operation):
    """A product with a matrix, y = x W^T + b, or a convolution, which is one over its windows.

    The T rows of a micro-batch, X_i, and what comes back for them, D_i, make its gradient g_i = D_i^T X_i. Where T is
    small beside W it is never worked out: ||g_i||^2 is the sum over X_i X_i^T * D_i D_i^T, elementwise, and a product
    with g_i is one with D_i and one with X_i. W is then read and written once for all micro-batches, not once for each.
    """

    def __init__(self, m: int, perturbed: Sequence[bool], adaptive: bool) -> None:
        super().__init__(m, perturbed, adaptive)
        self._factors: tuple[Tensor, Tensor] | None = None
        self._scale: Any = None
        self._each: Any = None
        self._shape: Sequence[int] = ()

    def clean(self, x: Any, *params: Any) -> Tensor:
        return self.apply(x, *params)

    def ascent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> Tensor | None:
        w, b = params
        D, self._shape = self.rows(dy), dy.shape
        small = self.factorises(D.shape[1], w.shape[0], w[0].numel()) and not self._adaptive
        self._keep((w, b), (None if small else self.gradients(dy, x, w), D.sum(1)))
        if small:
            X = self.columns(x)
            self._factors = D, X
            norms = (torch.bmm(X, X.mT) * torch.bmm(D, D.mT)).sum((1, 2)).clamp_min(0).sqrt()
            self.norms = norms if self.norms is None else torch.hypot(norms, self.norms)
        return self.back(dy, x, w) if by_x else None

    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        w, b = params
        self._each, biases = self._weights(scale, params)
        if self._factors is None:
            return self.apply_each(x, self._each, biases)
        D, X = self._factors
        self._scale = scale.to(D.dtype).view(-1, 1, 1)
        y = torch.bmm(torch.bmm(self.columns(x), X.mT).mul_(self._scale), D)
        if b is not None:
            y += _stacked(biases).unsqueeze(1)
        return self.apply(x, w, None).add_(self.from_rows(y, self._shape))

    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        w, b = params
        rows = self.rows(dy)
        dx = None
        if by_x and self._factors is not None:
            D, X = self._factors
            dx = self.back(dy, x, w)
            dx += self.from_columns(torch.bmm(torch.bmm(rows, D.mT).mul_(self._scale), X), x)
        elif by_x:
            dx = self.back_each(dy, x, self._each)
        self._factors = self._each = None
        return dx, self.gradient(dy, x, w), None if b is None else rows.sum((0, 1))

    def factorises(self, T: int, n: int, k: int) -> bool:
        """Whether the two factors take fewer multiplications than g_i."""
        return 3 * T * (n + k) < n * k

    @abstractmethod
    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """y at one w."""

    @abstractmethod
    def apply_each(self, x: Tensor, w: Stack, b: Any) -> Tensor:
        """y at each micro-batch's own."""

    @abstractmethod
    def back(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The gradient by x at one w."""

    @abstractmethod
    def back_each(self, dy: Tensor, x: Tensor, w: Stack) -> Tensor:
        """The gradient by x at each micro-batch's own w."""

    @abstractmethod
    def gradient(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The gradient by w, summed over everything."""

    @abstractmethod
    def gradients(self, dy: Tensor, x: Tensor, w: Tensor) -> Stack:
        """The gradient by w, for each micro-batch."""

    @abstractmethod
    def rows(self, y: Tensor) -> Tensor:
        """What is like y, with shape (m, T, n)."""

    @abstractmethod
    def columns(self, x: Tensor) -> Tensor:
        """The rows or windows of x, with shape (m, T, k)."""

    @abstractmethod
    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows`, for this shape of y."""

    @abstractmethod
    def from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        """The transpose of `columns`, of the shape of x."""


class Linear(Product):
    """`torch.nn.functional.linear`; all dimensions of x but the last count as rows."""

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, w, b)

    def apply_each(self, x: Tensor, w: Stack, b: Any) -> Tensor:
        w = self._each = _stacked(w)
        rows = self.columns(x)
        y = torch.bmm(rows, w.mT) if b[0] is None else torch.baddbmm(_stacked(b).unsqueeze(1), rows, w.mT)
        return self.from_rows(y, (*x.shape[:-1], y.shape[-1]))

    def back(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return dy @ w

    def back_each(self, dy: Tensor, x: Tensor, w: Stack) -> Tensor:
        return torch.bmm(self.rows(dy), _stacked(w)).view(x.shape)

    def gradient(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self.rows(dy).flatten(0, 1).mT @ self.columns(x).flatten(0, 1)

    def gradients(self, dy: Tensor, x: Tensor, w: Tensor) -> Stack:
        return torch.bmm(self.rows(dy).mT, self.columns(x))

    def rows(self, y: Tensor) -> Tensor:
        return y.reshape(self.m, -1, y.shape[-1])

    def columns(self, x: Tensor) -> Tensor:
        return x.reshape(self.m, -1, x.shape[-1])

    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        return rows.view(shape)

    def from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        return columns.view(x.shape)


class Convolution(Product):
    """`torch.nn.functional.conv2d` of one group; stride, padding and dilation are pairs of numbers."""

    def __init__(
        self,
        m: int,
        perturbed: Sequence[bool],
        adaptive: bool,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        super().__init__(m, perturbed, adaptive)
        self._stride, self._padding, self._dilation = stride, padding, dilation
        self._window: Sequence[int] = ()

    def apply(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        self._window = w.shape[2:]
        return F.conv2d(x, w, b, self._stride, self._padding, self._dilation)

    def apply_each(self, x: Tensor, w: Stack, b: Any) -> Tensor:
        return _joined((self.apply(*parts) for parts in zip(x.chunk(self.m), w, b, strict=True)), self.m)

    def back(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(dy, x, w, (True, False, False))[0]

    def back_each(self, dy: Tensor, x: Tensor, w: Stack) -> Tensor:
        parts = zip(dy.chunk(self.m), x.chunk(self.m), w, strict=True)
        return _joined((self.back(*part) for part in parts), self.m)

    def gradient(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(dy, x, w, (False, True, False))[1]

    def gradients(self, dy: Tensor, x: Tensor, w: Tensor) -> Stack:
        return [self.gradient(*parts, w) for parts in zip(dy.chunk(self.m), x.chunk(self.m), strict=True)]

    def rows(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1).reshape(self.m, -1, y.shape[1])

    def columns(self, x: Tensor) -> Tensor:
        windows = torch.cat(self._windows(F.pad(x, self._margins()).movedim(1, -1)), -1)
        return windows.view(self.m, -1, windows.shape[-1])

    def from_rows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        return rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def from_columns(self, columns: Tensor, x: Tensor) -> Tensor:
        padded = F.pad(torch.zeros_like(x), self._margins()).movedim(1, -1)
        for place, part in zip(self._windows(padded), columns.split(x.shape[1], -1), strict=True):
            place += part.view(place.shape)
        (top, left), (height, width) = self._padding, x.shape[2:]
        return padded.movedim(-1, 1)[:, :, top : top + height, left : left + width]

    def _windows(self, padded: Tensor) -> list[Tensor]:
        """For each place in the window, what lies there for every output. Shape: (B, height, width, channels)."""
        height, width = self._shape[2:]
        found = []
        for down, right in itertools.product(*map(range, self._window)):
            top, left = down * self._dilation[0], right * self._dilation[1]
            rows = padded[:, top : top + (height - 1) * self._stride[0] + 1 : self._stride[0]]
            found.append(rows[:, :, left : left + (width - 1) * self._stride[1] + 1 : self._stride[1]])
        return found

    def _margins(self) -> Sequence[int]:
        (top, left) = self._padding
        return left, left, top, top

    def _backward(self, dy: Tensor, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Sequence[Tensor]:
        settings = self._stride, self._padding, self._dilation
        return torch.ops.aten.convolution_backward(dy, x, w, None, *settings, False, (0, 0), 1, wanted)


class Embedding(Operation):
    """`torch.nn.functional.embedding`: what a micro-batch looked up moves, and the table stays."""

    def __init__(self, m: int, perturbed: Sequence[bool], adaptive: bool, padding_idx: int) -> None:
        super().__init__(m, perturbed, adaptive)
        self._padding = padding_idx
        self._steps: Tensor | None = None

    def clean(self, x: Any, *params: Any) -> Tensor:
        return F.embedding(x, params[0])

    def ascent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> None:
        (w,) = params
        row = (x.reshape(self.m, -1) + len(w) * torch.arange(self.m, device=x.device).unsqueeze(1)).flatten()
        place = torch.searchsorted(row.sort().values, row)
        D = dy.reshape(len(row), -1).masked_fill((x == self._padding).view(-1, 1), 0)
        g = torch.zeros_like(D).index_add_(0, place, D)[place]
        if self._adaptive:
            g *= w[x.flatten()].square()
        self.norms = (D * g).view(self.m, -1).sum(1).clamp_min(0).sqrt()  # D sums to g over what looked up a row
        self._steps = g.view(self.m, -1)

    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        y = F.embedding(x, params[0])
        if self._steps is not None:
            y.view(self.m, -1).addcmul_(self._steps, scale.unsqueeze(1))
            self._steps = None
        return y

    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        return None, torch.ops.aten.embedding_dense_backward(dy, x, len(params[0]), self._padding, False)


class _Clean(torch.autograd.Function):
    """The clean pass of an operation. Its parameters get no gradient here."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, x: Any, *params: Any) -> Tensor:
        ctx.operation = operation
        ctx.save_for_backward(x, *params, _mark())
        return _own(operation.clean(x, *params))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *params, _ = ctx.saved_tensors
        _once(ctx)
        return None, ctx.operation.ascent(dy, ctx.needs_input_grad[1], x, *params), *(None for _ in params)


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


def run(operation: Operation, scale: Tensor | None, x: Tensor | None, params: Sequence[Tensor | None]) -> Tensor:
    """The operation's value for autograd: at w without a scale, else at w + e_i."""
    if scale is None:
        return _Clean.apply(operation, x, *params)
    return _Moved.apply(operation, scale, x, *params)


def refuse(what: str) -> NoReturn:
    """Say what cannot be done in one pass.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"msam.backward(vectorized=True) cannot do {what}: leave vectorized out, and micro-batches take their turns."
    )


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


def _stacked(tensors: Stack) -> Tensor:
    return tensors if isinstance(tensors, Tensor) else torch.stack(list(tensors))


def _joined(parts: Iterable[Tensor], m: int) -> Tensor:
    """The m parts along the first dimension. Each is copied when it is there, and its memory free for the next."""
    whole = torch.empty(0)
    for number, part in enumerate(parts):
        size = len(part)
        if not number:
            outermost = part.stride(0) == part[0].numel() and 0 not in part.stride()
            strides = part.stride() if outermost else part.contiguous().stride()
            whole = part.new_empty_strided((m * size, *part.shape[1:]), strides)
        whole[number * size : (number + 1) * size] = part
    return whole
