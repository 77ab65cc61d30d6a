"""Which functions that meet a parameter can be done by micro-batch, and how."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msam.vectorized.batchnorm import BatchNorm
from msam.vectorized.operations import Each, Embedding, Operation
from msam.vectorized.origins import Derived, Examples, Origins, call, is_constant
from msam.vectorized.products import Convolution, Linear

CONVOLUTIONS = {getattr(F, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)}
ON_EXAMPLES = CONVOLUTIONS | {F.linear, F.prelu, F.layer_norm, F.group_norm, F.rms_norm, F.batch_norm}
"""Functions that take examples first, and parameters after them."""

BATCH_NORMS = {F.batch_norm, torch.batch_norm, torch.native_batch_norm}

ARITHMETIC = {getattr(of, name) for of in (torch, Tensor) for name in ("add", "sub", "mul", "div")}
ARITHMETIC |= {getattr(Tensor, f"__{name}__") for name in ("radd", "rsub", "rmul", "rdiv", "rtruediv")}
ARITHMETIC |= {torch.true_divide, torch.subtract, torch.multiply}
"""Functions of examples and a parameter, in either order, whose shapes are broadcast."""

ARITHMETIC_IN_PLACE = {getattr(Tensor, f"{name}_") for name in ("add", "sub", "mul", "div")}
"""The same in place."""

MATRICES = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.mm, Tensor.mm, torch.bmm}
"""Products of two matrices, either of which is of examples."""

JOINS = {torch.cat, torch.concat}

Plan = tuple[Callable[[], Operation], Tensor | None, list[Tensor | None]]
"""How to make an operation, and its input and parameters."""


class Plans:
    """Plans for the functions of one step.

    Args:
        m: The number of micro-batches, which divides the number of examples.
        examples: The number of examples of the mini-batch.
        adaptive: Whether the perturbation is ASAM's.
        origins: What tensors come from.
        perturbed: The parameters that are perturbed.
        trained: These and those that are not.
    """

    def __init__(
        self,
        m: int,
        adaptive: bool,
        origins: Origins,
        perturbed: Sequence[Tensor],
        trained: Sequence[Tensor],
    ) -> None:
        self.m, self.origins = m, origins
        self.examples_first = Examples(0)
        self.adaptive = adaptive
        self._perturbed = {id(p) for p in perturbed}
        self._trained = {id(p): p for p in trained}

    def plan(self, func: Callable[..., Any], values: Mapping[Any, Any]) -> Plan | None:
        """What a call is by micro-batch; None if it is nothing that is known here."""
        if func is F.embedding:
            x = values.get(0)
            return self.looked_up(values, x) if self.origins.lies_first(x) else None
        flat, slots = self._flat(func, values)
        of_examples = [slot for slot in slots if self.origins.lies_first(flat[slot])]
        params = [slot for slot in slots if self.is_parameter(flat[slot])]
        if len(of_examples) != 1 or any(
            self._stands_between(flat[slot]) for slot in {*slots} - {*of_examples, *params}
        ):
            return None
        (slot,) = of_examples
        if not self._fits(func, flat, slot, params, values):
            return None
        known = self._product(func, values, slot) or self._batch_norm(func, values, slot)
        return known or self._each(func, values, slot, params)

    def looked_up(self, values: Mapping[Any, Any], x: Any) -> Plan | None:
        """A table of which each example has looked up rows."""
        w, padding = argument(values, 1, "weight"), argument(values, 2, "padding_idx")
        if argument(values, 5, "scale_grad_by_freq") or argument(values, 6, "sparse"):
            return None
        if argument(values, 3, "max_norm") is not None:
            return None
        if isinstance(self.origins.of(w), Derived):
            return self._each(F.embedding, values, 0, [1 if 1 in values else "weight"])
        return lambda: Embedding(self.m, [True], self.adaptive, -1 if padding is None else padding % len(w)), x, [w]

    def _flat(self, func: Callable[..., Any], values: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
        """The arguments, those of a list of tensors each with a place, and the places of tensors."""
        flat = dict(values)
        listed = 1 if func is torch.einsum else 0 if func in JOINS else None
        if listed is not None and isinstance(values.get(listed), list | tuple):
            flat |= {(listed, number): t for number, t in enumerate(values[listed])}
        return flat, [slot for slot, value in flat.items() if isinstance(value, Tensor)]

    def is_parameter(self, t: Tensor) -> bool:
        """Whether it is one, or a function of some."""
        return id(t) in self._trained or isinstance(self.origins.of(t), Derived)

    def _stands_between(self, t: Tensor) -> bool:
        """Whether a tensor of neither is not the same for every example and at all weights."""
        return t.requires_grad or not is_constant(self.origins.of(t))

    def _fits(
        self,
        func: Callable[..., Any],
        flat: Mapping[Any, Any],
        slot: Any,
        params: Sequence[Any],
        values: Mapping[Any, Any],
    ) -> bool:
        x = flat[slot]
        others = [flat[place] for place in params]
        if func in ARITHMETIC:
            return all(self._broadcasts(p, x) for p in others)
        if func in ARITHMETIC_IN_PLACE:
            return slot == 0 and all(self._broadcasts(p, x) for p in others)
        if func in JOINS:
            dim = argument(values, 1, "dim", 0)
            return isinstance(dim, int) and dim % x.dim() > 0 and all(p.dim() == x.dim() for p in others)
        if any(p.dtype != x.dtype for p in others if p.is_floating_point()) and not _autocast(x):
            return False
        if func in MATRICES:
            return x.dim() > (1 if slot == 0 else 2) and all(p.dim() <= 2 or self._broadcasts(p, x) for p in others)
        if func in (torch.addmm, Tensor.addmm):
            return slot == 1 and flat[2].dim() == 2 and flat[0].dim() == 1
        if func is torch.einsum:
            return self._einsum_fits(values, slot)
        w = argument(values, 1, "weight")
        if func in CONVOLUTIONS:
            return slot == 0 and x.dim() == w.dim()
        return slot == 0 and func in ON_EXAMPLES and (func is not F.linear or w.dim() == 2)

    def _broadcasts(self, p: Tensor, x: Tensor) -> bool:
        """Whether every row of x meets all of p, or the row of p in its place."""
        return p.dim() < x.dim() or (p.dim() == x.dim() and len(p) in (1, len(x)))

    def _einsum_fits(self, values: Mapping[Any, Any], slot: Any) -> bool:
        equation = values.get(0)
        if not isinstance(equation, str) or "->" not in equation:
            return False
        terms, output = equation.replace(" ", "").split("->")
        each = terms.split(",")
        place = slot[1] if isinstance(slot, tuple) else slot - 1
        letter = each[place][:1]
        return letter.isalpha() and output[:1] == letter and "".join(each).count(letter) == 1

    def _product(self, func: Callable[..., Any], values: Mapping[Any, Any], slot: Any) -> Plan | None:
        if func is not F.linear and func is not F.conv2d:
            return None
        x, params = values[slot], [argument(values, 1, "weight"), argument(values, 2, "bias")]
        if _autocast(x) or any(p is not None and id(p) not in self._trained for p in params):
            return None
        flags = [id(p) in self._perturbed for p in params]
        stride, padding, dilation, groups = (
            argument(values, place, name, default)
            for place, (name, default) in enumerate({"stride": 1, "padding": 0, "dilation": 1, "groups": 1}.items(), 3)
        )
        if not flags[0] or isinstance(padding, str) or groups != 1:
            return None
        if func is F.linear:
            return lambda: Linear(self.m, flags, self.adaptive), x, params
        settings = [_pair(value) for value in (stride, padding, dilation)]
        return lambda: Convolution(self.m, flags, self.adaptive, *settings), x, params

    def _batch_norm(self, func: Callable[..., Any], values: Mapping[Any, Any], slot: Any) -> Plan | None:
        given = argument(values, 3, "weight"), argument(values, 4, "bias")
        params = [p for p in given if p is not None]
        if func is not F.batch_norm or not argument(values, 5, "training") or len(params) == 1:
            return None
        if any(id(p) not in self._trained for p in params):
            return None
        running = argument(values, 1, "running_mean"), argument(values, 2, "running_var")
        settings = argument(values, 6, "momentum", 0.1), argument(values, 7, "eps", 1e-5)
        flags = [id(p) in self._perturbed for p in params]
        return lambda: BatchNorm(self.m, flags, self.adaptive, running, settings), values[slot], params

    def _each(self, func: Callable[..., Any], values: Mapping[Any, Any], slot: Any, params: Sequence[Any]) -> Plan:
        """The function for one micro-batch after the other, of the parameters that its arguments come from."""
        flat, _ = self._flat(func, values)
        roots: dict[int, Tensor] = {}
        made: dict[Any, Any] = {}
        for place in params:
            origin = self.origins.of(flat[place])
            made[place] = origin if isinstance(origin, Derived) else id(flat[place])
            roots |= origin.roots if isinstance(origin, Derived) else {id(flat[place]): flat[place]}
        x, m, numbers = flat[slot], self.m, list(roots)
        rows = func in ARITHMETIC or func in ARITHMETIC_IN_PLACE or func in JOINS or (func in MATRICES and x.dim() > 2)
        whole, dims = len(x), x.dim()
        rest = {place: value for place, value in flat.items() if place not in (slot, *params)}

        def part(value: Any, number: int) -> Any:
            """Of something with a row for each of x, the micro-batch's."""
            if rows and isinstance(value, Tensor) and value.dim() == dims and len(value) == whole:
                return value[number * whole // m : (number + 1) * whole // m]
            return value

        def function(number: int, now: Tensor, *weights: Tensor) -> Any:
            by_id = dict(zip(numbers, weights, strict=True))
            arguments = {place: part(value, number) for place, value in rest.items()} | {slot: now}
            for place, value in made.items():
                arguments[place] = part(value.at(by_id) if isinstance(value, Derived) else by_id[value], number)
            listed = sorted(place for place in arguments if isinstance(place, tuple))
            if listed:
                arguments[listed[0][0]] = [arguments.pop(place) for place in listed]
            return call(func, arguments)

        flags = [number in self._perturbed for number in numbers]
        return lambda: Each(function, m, flags, self.adaptive), x, list(roots.values())


def argument(values: Mapping[Any, Any], place: int, name: str, default: Any = None) -> Any:
    """An argument, given by place or by name."""
    return values.get(place, values.get(name, default))


def _autocast(x: Tensor) -> bool:
    """Whether torch picks the types, and so converts the parameters of each micro-batch by itself."""
    return bool(torch.is_autocast_enabled(x.device.type))


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
