"""What a function of torch does with a tensor besides computing: it may ask for its shape, read it or write to it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from msam.vectorized.plans import BATCH_NORMS, argument

ASKS = frozenset(
    [
        "shape",
        "size",
        "dim",
        "ndim",
        "ndimension",
        "numel",
        "nelement",
        "dtype",
        "device",
        "layout",
        "names",
        "stride",
        "storage_offset",
        "element_size",
        "itemsize",
        "nbytes",
        "get_device",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "retains_grad",
        "output_nr",
        "is_cuda",
        "is_cpu",
        "is_mps",
        "is_xpu",
        "is_meta",
        "is_sparse",
        "is_nested",
        "is_quantized",
        "is_complex",
        "is_floating_point",
        "is_contiguous",
        "is_tensor",
        "is_neg",
        "is_inference",
        "is_same_size",
        "is_conj",
        "is_signed",
        "result_type",
        "can_cast",
        "_version",
        "_base",
        "_is_view",
        "__len__",
        "__hash__",
    ]
)
"""What reads no values of a tensor."""


READS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "__float__",
        "__int__",
        "__index__",
        "__bool__",
        "__complex__",
        "__array__",
        "__dlpack__",
    ]
)
"""What makes a number of Python, or memory of another library, out of a tensor."""

RANDOM = ("dropout", "bernoulli", "rand", "multinomial", "poisson", "rrelu", "gumbel")
"""Parts of the names of functions that draw, and so give something else when they are called again."""


def averages(func: Callable[..., Any], values: Mapping[Any, Any]) -> bool:
    """Whether it is BatchNorm in train mode."""
    return func in BATCH_NORMS and bool(argument(values, 5, "training"))


def written(func: Callable[..., Any], values: Mapping[Any, Any]) -> list[Tensor]:
    """The tensors that a function writes to, as its name and arguments say."""
    name = getattr(func, "__name__", "")
    out = values.get("out")
    found = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, list | tuple) else []
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in ("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"):
        first = values.get(0, values.get("input"))
        found += list(first) if isinstance(first, list | tuple) else [first]
    if values.get("inplace") is True:
        found.append(values.get(0))
    return [t for t in found if isinstance(t, Tensor)]


def shown(func: Callable[..., Any] | None) -> str:
    """How a reader knows a function; what reads an attribute of a tensor has none."""
    name = getattr(func, "__name__", "a function of your own")
    return ".data or another attribute" if name == "__get__" else name
