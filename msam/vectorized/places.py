"""Where a function of torch puts the examples: along which dimension of its result they lie."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

Place = tuple[int, int]
"""The dimension of the examples, and how many times over they lie there."""

SWAPS = {"transpose", "transpose_", "swapaxes", "swapdims"}
RESHAPES = {"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "unsafe_view", "ravel"}
REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "prod", "std", "var", "norm", "vector_norm", "logsumexp", "any", "all",
    "argmax", "argmin", "median", "nansum", "nanmean",
}  # fmt: skip
BROADCASTS = {
    "add", "sub", "mul", "div", "true_divide", "subtract", "multiply", "divide", "pow", "where", "maximum", "minimum",
    "eq", "ne", "lt", "gt", "le", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "addcmul", "addcdiv",
    "lerp", "masked_fill", "atan2", "fmod", "remainder", "radd", "rsub", "rmul", "rdiv", "rtruediv", "and", "or", "xor",
    "rpow", "floor_divide",
}  # fmt: skip
"""Pointwise functions of several tensors, whose dimensions are aligned at the last one."""

MATRICES = {"matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm"}

BY_DIM = {
    "flip", "roll", "sort", "argsort", "topk", "index_select", "gather", "cumsum", "index_add", "index_copy", "narrow",
    "scatter", "scatter_add", "unfold", "take_along_dim", "softmax", "log_softmax", "chunk", "split", "tensor_split",
    "cat", "concat", "concatenate", "normalize", "glu", "cumprod", "logcumsumexp", "repeat_interleave",
}  # fmt: skip
"""Functions that act along one dimension and leave the order of the others."""

REMOVES = {"select", "unbind"}
"""Functions that take one dimension away."""

MIXES = {
    "take", "flipud", "rot90", "msort", "unique", "nonzero", "masked_select", "repeat", "tile", "as_strided", "kron",
    "scatter_reduce", "cdist", "block_diag", "outer", "tensordot", "meshgrid", "vstack", "broadcast_tensors",
    "broadcast_to", "index_put", "diag", "diagonal", "tril_indices", "combinations", "cartesian_prod", "fliplr",
}  # fmt: skip
"""Functions that may change the order of the examples, or make others of them."""

DIMS: dict[str, tuple[int, int | None]] = dict.fromkeys(("chunk", "split", "tensor_split"), (2, 0))
DIMS |= {"sort": (1, -1), "argsort": (1, -1), "topk": (2, -1), "normalize": (2, 1), "glu": (1, -1), "roll": (2, None)}
DIMS |= {"take_along_dim": (2, None), "repeat_interleave": (2, None), "sum": (1, None), "mean": (1, None)}
DIMS |= {"norm": (2, None), "vector_norm": (2, None)}
"""Where a function's dim stands among its arguments, and what it is if it is left out; (1, 0) for others."""


def place(
    name: str, values: Mapping[Any, Any], inputs: Sequence[tuple[Tensor, Place]], result: Tensor, count: int
) -> Place | None:
    """Where the examples lie in a result; None if it is not known.

    Args:
        name: The function's.
        values: Its arguments by place or name.
        inputs: Its arguments that come from examples, and where they lie there.
        result: What it returned.
        count: How many examples there are.
    """
    name = name.strip("_")
    aligned = {(t.dim() - d if name in BROADCASTS else d, outer) for t, (d, outer) in inputs}
    if len(aligned) > 1 or not result.dim():
        return None
    t, (d, outer) = inputs[0]
    found = _dimension(name, values, t, (d, outer), result, count)
    if isinstance(found, tuple):
        return found
    if found is None or not 0 <= found < result.dim() or result.shape[found] % (outer * count):
        return None
    return found, outer


def _dimension(
    name: str, values: Mapping[Any, Any], t: Tensor, at: Place, result: Tensor, count: int
) -> int | Place | None:
    """The dimension of the examples in a result, or the whole place."""
    n, (d, outer) = t.dim(), at
    if name in RESHAPES:
        return _reshaped(prod(t.shape[:d]) * outer, result.shape, count)
    if name in MOVES:
        return MOVES[name](values, n, d)
    if name in SWAPS:
        a, b = (_number(values, slot, f"dim{slot - 1}") % n for slot in (1, 2))
        return {a: b, b: a}.get(d, d)
    if name == "getitem":
        return _indexed(values.get(1), n, d)
    if name == "squeeze":
        dims = _dims(values, 1, None, n)
        gone = [k for k in (range(n) if dims is None else dims) if t.shape[k] == 1]
        return d - sum(k < d for k in gone)
    if name in ("expand", "expand_as") or name in BROADCASTS:
        return d + result.dim() - n
    if name in REDUCTIONS and not any(isinstance(values.get(slot), Tensor) for slot in (1, "other")):
        slot, usual = DIMS.get(name, (1, None))
        dims = _dims(values, slot, usual, n)
        if dims is None or d in dims:
            return None
        return d if result.dim() == n else d - sum(k < d for k in dims)
    if name == "stack":
        return d + (_number(values, 1, "dim") % (n + 1) <= d)
    if name in BY_DIM | REMOVES:
        slot, usual = DIMS.get(name, (1, 0))
        dims = _dims(values, slot, usual, n)
        if name == "flip" and isinstance(values.get(2), int):
            return None  # further dimensions follow
        if name == "repeat_interleave" and dims == [d] and isinstance(values.get(1), int):
            return d
        if dims is None or d in dims:
            return None
        return d - sum(k < d for k in dims) if name in REMOVES else d
    return _other(name, values, t, d, result, outer)


def _other(name: str, values: Mapping[Any, Any], t: Tensor, d: int, result: Tensor, outer: int) -> int | None:
    """Functions that keep the leading dimensions, as most do."""
    if name in MIXES:
        return None
    if name == "einsum":
        return 0 if d == 0 and outer == 1 and _einsum_keeps_first(values) else None
    if name in MATRICES:
        first = values.get(1 if name in ("addmm", "baddbmm") else 0) is t
        if d >= t.dim() - (1 if first else 2):
            return None
        return d + result.dim() - t.dim() if result.dim() >= t.dim() > 2 else d
    if (name == "linear" and d == t.dim() - 1) or (name.startswith("conv") and d):
        return None
    if name == "scaled_dot_product_attention" and d >= t.dim() - 2:
        return None
    if result.shape == t.shape:
        return d
    kept = result.dim() >= t.dim() if d == 0 else result.dim() == t.dim()
    return d if kept and result.shape[: d + 1] == t.shape[: d + 1] and (d == 0 or name == "linear") else None


def _reshaped(before: int, shape: Sequence[int], count: int) -> Place | None:
    """The place of the examples, of which there are `before` rounds in the order of the elements."""
    passed = 1
    for d, size in enumerate(shape):
        outer = before // passed
        if before % passed == 0 and size % (outer * count) == 0:
            return d, outer
        passed *= size
    return None


def _indexed(index: Any, n: int, d: int) -> int | None:
    """Where dimension d of n goes under an index; None if the index meets it, or more than one list is in it."""
    entries = list(index) if isinstance(index, tuple) else [index]
    simple = [entry for entry in entries if isinstance(entry, slice | int | type(None) | type(Ellipsis))]
    if len(entries) - len(simple) > 1 or any(isinstance(entry, bool) for entry in entries):
        return None
    if Ellipsis not in [entry for entry in simple if not isinstance(entry, slice)]:
        entries.append(Ellipsis)
    taken = sum(1 if isinstance(entry, slice | int) else 0 for entry in simple)
    listed = [entry for entry in entries if not isinstance(entry, slice | int | type(None) | type(Ellipsis))]
    taken += sum(max(getattr(entry, "ndim", 1), 1) if _is_mask(entry) else 1 for entry in listed)
    before, after = 0, 0
    for entry in entries:
        if entry is None:
            after += 1
            continue
        width = n - taken if entry is Ellipsis else max(getattr(entry, "ndim", 1), 1) if _is_mask(entry) else 1
        if before <= d < before + width:
            if entry is Ellipsis:
                return after + d - before
            return after if isinstance(entry, slice) and entry == slice(None) else None
        before += width
        if entry is Ellipsis:
            after += width
        elif isinstance(entry, slice):
            after += 1
        elif not isinstance(entry, int):
            after += 1 if _is_mask(entry) else getattr(entry, "ndim", 1)
    return None


def _is_mask(entry: Any) -> bool:
    return isinstance(entry, Tensor) and not entry.dtype.is_floating_point and str(entry.dtype) == "torch.bool"


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
    "T": lambda values, n, d: n - 1 - d,
    "H": lambda values, n, d: n - 1 - d,
    "t": lambda values, n, d: n - 1 - d,
    "permute": _permuted,
    "movedim": _moved,
    "moveaxis": _moved,
    "unsqueeze": lambda values, n, d: d + (_number(values, 1, "dim") % (n + 1) <= d),
} | dict.fromkeys(("mT", "mH", "adjoint"), lambda values, n, d: {n - 1: n - 2, n - 2: n - 1}.get(d, d))


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
