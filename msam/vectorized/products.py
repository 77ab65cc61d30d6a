"""Operations that are products with a matrix, whose gradients have two factors."""

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msam.vectorized.operations import Operation, Stack, joined, stacked


class Product(Operation):
    """A product with a matrix, y = x W^T + b, or a convolution, which is one over its windows.

    The T rows of a micro-batch, X_i, and what comes back for them, D_i, make its gradient g_i = D_i^T X_i. Where T is
    small beside W it is never worked out: ||g_i||^2 is the sum over X_i X_i^T * D_i D_i^T, elementwise, and a product
    with g_i is one with D_i and one with X_i. W is then read and written once for all micro-batches, not once for each.
    The factors are used in float64: rows that cancel leave a small sum of large products.
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
        alone = not self._adaptive and self.sums[0] is None
        small = alone and self.factorises(D.shape[1], w.shape[0], w[0].numel())
        self._keep((w, b), (None if small else self.gradients(dy, x, w), D.sum(1)))
        if small:
            self._factors = D.double(), self.columns(x).double()
            norms = self._norms().to(D.dtype)
            self.norms = norms if self.norms is None else torch.hypot(norms, self.norms)
        return self.back(dy, x, w) if by_x else None

    def moved(self, scale: Tensor, x: Any, *params: Any) -> Tensor:
        w, b = params
        self._each, biases = self._weights(scale, params)
        if self._factors is None:
            return self.apply_each(x, self._each, biases)
        D, X = self._factors
        self._scale = scale.double().view(-1, 1, 1)
        y = torch.bmm(torch.bmm(self.columns(x).double(), X.mT).mul_(self._scale), D).to(x.dtype)
        if b is not None:
            y += stacked(biases).unsqueeze(1)
        return self.apply(x, w, None).add_(self.from_rows(y, self._shape))

    def descent(self, dy: Tensor, by_x: bool, x: Any, *params: Any) -> tuple[Tensor | None, ...]:
        w, b = params
        rows = self.rows(dy)
        dx = None
        if by_x and self._factors is not None:
            D, X = self._factors
            dx = self.back(dy, x, w)
            back = torch.bmm(torch.bmm(rows.double(), D.mT).mul_(self._scale), X)
            dx += self.from_columns(back.to(x.dtype), x)
        elif by_x:
            dx = self.back_each(dy, x, self._each)
        self._factors = self._each = None
        return dx, self.gradient(dy, x, w), None if b is None else rows.sum((0, 1))

    def _norms(self) -> Tensor:
        """||D_i^T X_i|| without D_i^T X_i."""
        assert self._factors
        D, X = self._factors
        return (torch.bmm(X, X.mT) * torch.bmm(D, D.mT)).sum((1, 2)).clamp_min(0).sqrt()

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
        w = self._each = stacked(w)
        rows = self.columns(x)
        y = torch.bmm(rows, w.mT) if b[0] is None else torch.baddbmm(stacked(b).unsqueeze(1), rows, w.mT)
        return self.from_rows(y, (*x.shape[:-1], y.shape[-1]))

    def back(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return dy @ w

    def back_each(self, dy: Tensor, x: Tensor, w: Stack) -> Tensor:
        return torch.bmm(self.rows(dy), stacked(w)).view(x.shape)

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
        return joined((self.apply(*parts) for parts in zip(x.chunk(self.m), w, b, strict=True)), self.m)

    def back(self, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(dy, x, w, (True, False, False))[0]

    def back_each(self, dy: Tensor, x: Tensor, w: Stack) -> Tensor:
        parts = zip(dy.chunk(self.m), x.chunk(self.m), w, strict=True)
        return joined((self.back(*part) for part in parts), self.m)

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
