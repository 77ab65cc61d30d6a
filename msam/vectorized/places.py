"""Where a function of torch puts the examples: along which dimension of its result they lie.

Only functions that are listed here are followed. What any other returns is of unknown origin.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int]
"""The dimension of the examples, and how many times over they lie there."""

Input = tuple[Tensor, Place]

POINTWISE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign", "hardtanh",
    "hardswish", "hardsigmoid", "sigmoid", "tanh", "logsigmoid", "tanhshrink", "softshrink", "hardshrink",
    "threshold", "rrelu", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal",
    "square", "abs", "neg", "sign", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "erf", "erfc",
    "erfinv", "logit", "floor", "ceil", "round", "trunc", "frac", "clamp", "clip", "clamp_min", "clamp_max",
    "nan_to_num", "isnan", "isinf", "isfinite", "logical_not", "bitwise_not", "invert", "positive", "to", "type",
    "type_as", "float", "double", "half", "bfloat16", "int", "long", "bool", "byte", "short", "cpu", "cuda",
    "contiguous", "clone", "detach", "requires_grad", "data", "real", "imag", "conj", "alias", "zeros_like",
    "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "dropout", "dropout1d", "dropout2d",
    "dropout3d", "alpha_dropout", "feature_alpha_dropout", "bernoulli", "zero", "fill", "normal", "uniform", "sinc",
    "prelu",
}  # fmt: skip
"""Functions of one tensor, element by element, or by row of what is not an example."""

BROADCASTS = {
    "add", "sub", "mul", "div", "true_divide", "subtract", "multiply", "divide", "pow", "where", "maximum", "minimum",
    "eq", "ne", "lt", "gt", "le", "ge", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or",
    "addcmul", "addcdiv", "lerp", "masked_fill", "atan2", "fmod", "remainder", "radd", "rsub", "rmul", "rdiv",
    "rtruediv", "truediv", "and", "or", "xor", "rpow", "floor_divide", "copysign", "hypot", "complex", "polar", "iadd",
    "isub", "imul", "itruediv", "logaddexp", "xlogy", "copy",
}  # fmt: skip
"""Pointwise functions of several tensors, whose dimensions are aligned at the last one."""

MATRICES = {"matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "mv"}

SWAPS = {"transpose", "swapaxes", "swapdims"}
RESHAPES = {"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "unsafe_view", "ravel"}
EXPANDS = {"expand", "expand_as", "broadcast_to"}
LIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Functions that take only the type or shape of a second tensor."""

JOINS = {"cat", "concat", "concatenate"}

REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "prod", "std", "var", "norm", "vector_norm", "logsumexp", "any", "all",
    "argmax", "argmin", "median", "nansum", "nanmean", "var_mean", "std_mean",
}  # fmt: skip

BY_DIM = JOINS | {
    "flip", "roll", "sort", "argsort", "topk", "index_select", "gather", "cumsum", "index_add", "index_copy", "narrow",
    "scatter", "scatter_add", "unfold", "take_along_dim", "softmax", "log_softmax", "chunk", "split", "tensor_split",
    "normalize", "glu", "cumprod", "logcumsumexp", "repeat_interleave",
}  # fmt: skip
"""Functions that act along one dimension and leave the order of the others."""

REMOVES = {"select", "unbind"}
"""Functions that take one dimension away."""

BATCHED = {
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg") for n in (1, 2, 3)),
    "boolean_dispatch", "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "fold",
    "group_norm", "instance_norm", "batch_norm", "local_response_norm", "embedding", "one_hot", "grid_sample",
    "affine_grid", "cross_entropy", "nll_loss",
}  # fmt: skip
"""Functions of a batch of examples, along its first dimension."""

TRAILING = {
    "linear": 1,
    "scaled_dot_product_attention": 2,
    "tril": 2,
    "triu": 2,
    "view_as_real": 0,
    "view_as_complex": 1,
}
"""How many of the last dimensions a function acts along."""

DIMS: dict[str, tuple[int, int | None]] = dict.fromkeys(("chunk", "split", "tensor_split"), (2, 0))
DIMS |= {"sort": (1, -1), "argsort": (1, -1), "topk": (2, -1), "normalize": (2, 1), "glu": (1, -1), "roll": (2, None)}
DIMS |= {"take_along_dim": (2, None), "repeat_interleave": (2, None), "sum": (1, None), "mean": (1, None)}
DIMS |= {"norm": (2, None), "vector_norm": (2, None)}
"""Where a function's dim stands among its arguments, and what it is if it is left out; (1, 0) for others."""


def place(
    name: str,
    values: Mapping[Any, Any],
    inputs: Sequence[Input],
    result: Tensor,
    count: int,
    counts: Sequence[Input] = (),
) -> Place | None:
    """Where the examples lie in a result; None if it is not known.

    Args:
        name: The function's.
        values: Its arguments by place or name.
        inputs: Its arguments that come from examples, and where they lie there.
        result: What it returned.
        count: How many examples there are.
        counts: Its arguments that hold the numbers of the examples, and where they lie there.
    """
    name = name.strip("_")
    if len({outer for _, (_, outer) in inputs}) > 1 or not result.dim():
        return None
    if name in BROADCASTS:
        alone = name == "where" and sum(isinstance(value, Tensor) for value in values.values()) == 1
        dims: set[int | None] = {result.dim() - t.dim() + d for t, (d, _) in inputs} if not alone else set()
    elif name in MATRICES:
        dims = {_of_product(name, values, t, d, result) for t, (d, _) in inputs}
    elif name == "getitem":
        return _of_item(values, inputs, counts)
    else:
        return _of_one(name, values, inputs, result, count)
    found = dims.pop() if len(dims) == 1 else None
    return _checked(found, inputs[0][1][1], result, count)


def _checked(d: int | None, outer: int, result: Tensor, count: int) -> Place | None:
    if d is None or not 0 <= d < result.dim() or result.shape[d] % (outer * count):
        return None
    return d, outer


def _of_one(name: str, values: Mapping[Any, Any], inputs: Sequence[Input], result: Tensor, count: int) -> Place | None:
    """Of a function whose first argument is what it acts on."""
    subject = values.get(0, values.get("input"))
    if name in LIKE:
        inputs = [(t, at) for t, at in inputs if t is subject]
    if len({(t.dim(), at) for t, at in inputs}) != 1:
        return None
    t, at = inputs[0]
    if isinstance(subject, Tensor) and not any(t is subject for t, _ in inputs):
        repeated = name == "gather" and subject.dim() == t.dim() and subject.stride(at[0]) == 0
        return at if repeated and at[0] not in (_dims(values, 1, None, t.dim()) or at) else None
    if name in RESHAPES:
        return _reshaped(prod(t.shape[: at[0]]) * at[1], result.shape, count)
    return _checked(_dimension(name, values, t, at, result), at[1], result, count)


def _dimension(name: str, values: Mapping[Any, Any], t: Tensor, at: Place, result: Tensor) -> int | None:
    """The dimension of the examples in a result."""
    n, (d, outer) = t.dim(), at
    if name in POINTWISE:
        return d if result.shape == t.shape else None
    if name in MOVES:
        return MOVES[name](values, n, d)
    if name in SWAPS:
        a, b = (_number(values, slot, f"dim{slot - 1}") % n for slot in (1, 2))
        return {a: b, b: a}.get(d, d)
    if name == "squeeze":
        dims = _dims(values, 1, None, n)
        return d - sum(k < d for k in (range(n) if dims is None else dims) if t.shape[k] == 1)
    if name in EXPANDS:
        return d + result.dim() - n if result.shape[d + result.dim() - n] == t.shape[d] else None
    if name == "stack":
        return d + (_number(values, 1, "dim") % (n + 1) <= d)
    if name in REDUCTIONS | BY_DIM | REMOVES:
        return _along(name, values, t, d, result)
    if name in ("layer_norm", "rms_norm"):
        return d if d < n - len(values.get(1, values.get("normalized_shape", ()))) else None
    if name in TRAILING:
        return d if d < n - TRAILING[name] else None
    if name == "pad":
        return d if d < n - len(values.get(1, values.get("pad", ()))) // 2 else None
    if name == "einsum":
        return 0 if d == 0 and outer == 1 and _einsum_keeps_first(values) else None
    return d if name in BATCHED and d == 0 and outer == 1 and result.shape[0] == t.shape[0] else None


def _along(name: str, values: Mapping[Any, Any], t: Tensor, d: int, result: Tensor) -> int | None:
    """Of a function that acts along some dimensions."""
    n = t.dim()
    if name in REDUCTIONS and any(isinstance(values.get(slot), Tensor) for slot in (1, "other")):
        return d if name in ("max", "min") and result.shape == t.shape else None
    slot, usual = DIMS.get(name, (1, None if name in REDUCTIONS else 0))
    dims = _dims(values, slot, usual, n)
    if name == "repeat_interleave" and dims == [d] and isinstance(values.get(1), int):
        return d
    if dims is None or d in dims or (name == "flip" and isinstance(values.get(2), int)):  # more dims of flip follow
        return None
    gone = name in REMOVES or (name in REDUCTIONS and result.dim() < n)
    return d - sum(k < d for k in dims) if gone else d


def _of_product(name: str, values: Mapping[Any, Any], t: Tensor, d: int, result: Tensor) -> int | None:
    """Of a product of matrices, where t is one of the factors, or what is added."""
    slots = {FACTORS.get(slot, slot) for slot, value in values.items() if value is t}
    first, second = {"rmatmul": (1, 0), "addmm": (1, 2), "baddbmm": (1, 2)}.get(name, (0, 1))
    if slots == {first} and d < t.dim() - 1:
        return d if values.get(second) is not None and values[second].dim() == 1 else result.dim() - t.dim() + d
    if slots == {second} and d < t.dim() - 2:
        return result.dim() - t.dim() + d
    return result.dim() - t.dim() + d if slots == {0} and first == 1 and name != "rmatmul" else None


def _of_item(values: Mapping[Any, Any], inputs: Sequence[Input], counts: Sequence[Input]) -> Place | None:
    """Of `t[index]`."""
    t, index = values.get(0), values.get(1)
    of_t = [at for one, at in inputs if one is t]
    if not of_t:  # constants, looked up with one tensor
        return inputs[0][1] if len(inputs) == 1 and inputs[0][0] is index and index.dtype in INDEX else None
    if t is None:
        return None
    d, outer = of_t[0]
    if isinstance(index, tuple) and of_t[0] == (0, 1) and len(index) > 1 and all(map(_is_index, index)):
        numbers = [one.dim() - k for one, (k, rounds) in counts if one is index[0] and rounds == 1]
        others = [one.dim() - k for one, (k, rounds) in inputs if one is not t and rounds == 1]
        if numbers and len(others) == len(inputs) - 1 and set(others) <= set(numbers):
            return max(entry.dim() for entry in index) - numbers[0], 1
    if len(inputs) > 1:
        return None
    moved = indexed(index, t.dim(), d)
    return None if moved is None else (moved, outer)


FACTORS = {"mat1": 1, "mat2": 2, "batch1": 1, "batch2": 2, "other": 1}
INDEX = (torch.int64, torch.int32)


def _is_index(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype in INDEX


def _reshaped(before: int, shape: Sequence[int], count: int) -> Place | None:
    """The place of the examples, of which there are `before` rounds in the order of the elements."""
    passed = 1
    for d, size in enumerate(shape):
        outer = before // passed
        if before % passed == 0 and size % (outer * count) == 0:
            return d, outer
        passed *= size
    return None


def indexed(index: Any, n: int, d: int) -> int | None:
    """Where dimension d of n goes under an index; None if the index meets it, or more than one list is in it."""
    entries = list(index) if isinstance(index, tuple) else [index]
    listed = [entry for entry in entries if not isinstance(entry, slice | int | type(None) | type(Ellipsis))]
    if len(listed) > 1 or any(isinstance(entry, bool) for entry in entries):
        return None
    if not any(entry is Ellipsis for entry in entries):
        entries.append(Ellipsis)
    rest = n - sum(_width(entry) for entry in entries if entry is not Ellipsis)
    before, after = 0, 0
    for entry in entries:
        width = rest if entry is Ellipsis else _width(entry)
        if before <= d < before + width:
            if entry is Ellipsis:
                return after + d - before
            return after if isinstance(entry, slice) and entry == slice(None) else None
        before += width
        if entry is None or isinstance(entry, slice):
            after += 1
        elif entry is Ellipsis:
            after += width
        elif not isinstance(entry, int):
            after += 1 if _is_mask(entry) else getattr(entry, "ndim", 1)
    return None


def _width(entry: Any) -> int:
    """How many dimensions an entry of an index takes."""
    return 0 if entry is None else entry.dim() if _is_mask(entry) else 1


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dtype is torch.bool


def _einsum_keeps_first(values: Mapping[Any, Any]) -> bool:
    equation = values.get(0)
    if not isinstance(equation, str) or "->" not in equation:
        return False
    terms, output = equation.replace(" ", "").split("->")
    return bool(output) and all(term[:1] == output[0] for term in terms.split(","))


def _permuted(values: Mapping[Any, Any], n: int, d: int) -> int | None:
    order = values.get(1, values.get("dims"))
    order = list(order) if isinstance(order, Sequence) else [values[slot] for slot in range(1, n + 1)]
    return [k % n for k in order].index(d)


def _moved(values: Mapping[Any, Any], n: int, d: int) -> int | None:
    source, target = values.get(1, values.get("source")), values.get(2, values.get("destination"))
    if not isinstance(source, int) or not isinstance(target, int):
        return None
    order = [k for k in range(n) if k != source % n]
    order.insert(target % n, source % n)
    return order.index(d)


MOVES: dict[str, Callable[[Mapping[Any, Any], int, int], int | None]] = {
    "permute": _permuted,
    "movedim": _moved,
    "moveaxis": _moved,
    "unsqueeze": lambda values, n, d: d + (_number(values, 1, "dim") % (n + 1) <= d),
}
MOVES |= dict.fromkeys(("T", "t", "H"), lambda values, n, d: n - 1 - d)
MOVES |= dict.fromkeys(("mT", "mH", "adjoint"), lambda values, n, d: {n - 1: n - 2, n - 2: n - 1}.get(d, d))


def _number(values: Mapping[Any, Any], slot: int, name: str) -> int:
    value = values.get(slot, values.get(name, values.get(f"axis{name[3:]}", 0)))
    return value if isinstance(value, int) else 0


def _dims(values: Mapping[Any, Any], slot: int, usual: int | None, n: int) -> list[int] | None:
    """The dimensions that a function acts along, counted from 0; None if it acts along all of them, or that is open."""
    dims = values.get("dim", values.get("dims", values.get("axis", values.get(slot, usual))))
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, Sequence) or not all(isinstance(k, int) for k in dims):
        return None
    return [k % n for k in dims]
