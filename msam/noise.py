"""The same random numbers in both passes over a micro-batch.

The generators are put back for the second pass. On the CPU, where drawing dropout's masks takes as long as a matrix
product, most masks of the first pass are kept as well: the second takes one where its generator stands as the first
one's did, and goes on where that one's then stood. The same bits, and the generator ends where it would have.
"""

import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from msam.parallel import compiled

KEPT = (torch.float32, torch.float64)
"""Types whose dropout is done here; what is left to torch is drawn again."""


_seconds: dict[torch.device, tuple[torch.Generator, torch.Generator]] = {}

Generator = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How to get a generator's state, and how to set it."""


class Noise:
    """The generators whose numbers both passes over a micro-batch share: torch's, NumPy's, Python's, and those named.

    Args:
        model: The module that draws.
        params: Its parameters, whose devices have generators.
        own: Further generators: of torch, NumPy or Python's `random`.

    Raises:
        ValueError: if one of them is nothing of the kind.
    """

    def __init__(self, model: nn.Module, params: Sequence[Tensor], own: Iterable[Any] = ()) -> None:
        self._generators: list[Generator] = [(torch.get_rng_state, torch.set_rng_state)]
        self._twins: list[tuple[torch.Generator, torch.Generator]] = []
        for gpu in {p.device for p in params if p.device.type == "cuda"}:
            if torch.cuda.is_current_stream_capturing():
                self._twins += twins(gpu)
            else:
                self._generators.append((partial(torch.cuda.get_rng_state, gpu), partial(_set_gpu, gpu)))
        self._generators.append((random.getstate, random.setstate))
        if (numpy := sys.modules.get("numpy")) is not None:
            self._generators.append((partial(numpy.random.get_state, legacy=False), numpy.random.set_state))
        self._generators += [_access(generator) for generator in own]
        self._masks = _Masks() if _drops_on_the_cpu(model) else None

    def draws(self, keep: bool = True) -> "Draws":
        """The numbers of one micro-batch, about to be drawn.

        Args:
            keep: Whether masks may be kept. Not if other micro-batches are drawn for before the second pass.
        """
        return Draws(self._generators, self._masks if keep else None, self._twins)


class Draws:
    """The random numbers of one micro-batch."""

    def __init__(
        self,
        generators: Sequence[Generator],
        masks: "_Masks | None",
        twins: Sequence[tuple[torch.Generator, torch.Generator]] = (),
    ) -> None:
        self._masks, self._twins = masks, twins
        self._states = [(set_state, get_state()) for get_state, set_state in generators]

    @contextmanager
    def first(self) -> Iterator[None]:
        """The forward pass in the block draws them."""
        with self._kept(again=False):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """The forward pass in the block gets the same."""
        self.rewind()
        firsts = [(generator, generator.graphsafe_get_state()) for generator, _ in self._twins]
        try:
            for generator, second in self._twins:
                generator.graphsafe_set_state(second)
            with self._kept(again=True):
                yield
        finally:
            for generator, first in firsts:
                generator.graphsafe_set_state(first)

    def rewind(self) -> None:
        """The generators stand as they did before the first."""
        for set_state, state in self._states:
            set_state(state)

    @contextmanager
    def _kept(self, again: bool) -> Iterator[None]:
        if self._masks is None:
            yield
            return
        self._masks.again = again
        if not again:
            self._masks.drawn.clear()
        with self._masks:
            yield


class _Masks(TorchFunctionMode):
    """Dropout on the CPU as torch does it, with masks that are kept, or those that were."""

    def __init__(self) -> None:
        super().__init__()
        self.again = False
        self.drawn: deque[tuple[float, Tensor, Tensor, Tensor]] = deque()
        """Of each dropout: its probability, its mask, and the generator's states before and after it was drawn."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout:
            return self._dropout(*args, **kwargs or {})
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or inplace or not self._ours(input, p):
            return F.dropout(input, p, training, inplace)
        return input * self._mask(input, p)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        scale = kwargs.pop("scale", None)
        negative = scale is not None and scale < 0
        if is_causal or negative or kwargs.get("enable_gqa") or not self._ours(query, dropout_p):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs
            )
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = (query * root) @ (key.mT * root)
        if attn_mask is not None:
            if attn_mask.dtype is torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
            scores = scores + attn_mask
        attention = torch.ops.aten._safe_softmax(scores, -1)
        return (attention * self._mask(attention, dropout_p)) @ value

    def _ours(self, x: Tensor, p: float) -> bool:
        plain = x.device.type == "cpu" and x.dtype in KEPT and not x.is_nested
        return plain and 0 < p < 1 and not torch.is_autocast_enabled("cpu") and not _checkpointed()

    def _mask(self, like: Tensor, p: float) -> Tensor:
        before = torch.get_rng_state()
        if self.again and self.drawn:
            drawn_p, mask, expected, after = self.drawn.popleft()
            same = drawn_p == p and mask.shape == like.shape and mask.dtype == like.dtype
            if same and torch.equal(before, expected):
                torch.set_rng_state(after)
                return mask
        mask = torch.empty_like(like, requires_grad=False).bernoulli_(1 - p).div_(1 - p)
        if not self.again:
            self.drawn.append((p, mask, before, torch.get_rng_state()))
        return mask


def twins(gpu: torch.device) -> list[tuple[torch.Generator, torch.Generator]]:
    """A GPU's generator, and a second state for it: a graph cannot put a state back, but can go on from another.

    The first passes draw from one, the second passes from the other. Both begin alike and draw as much.
    """
    if gpu not in _seconds:
        generator = torch.cuda.default_generators[torch.device(gpu).index or 0]
        _seconds[gpu] = generator, generator.clone_state()
    return [_seconds[gpu]]


def _set_gpu(gpu: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, gpu)


def _access(generator: Any) -> Generator:
    """A generator's state: of torch.Generator, numpy.random.Generator or RandomState, or random.Random."""
    bits = getattr(generator, "bit_generator", generator)
    if isinstance(getattr(type(bits), "state", None), property) or hasattr(bits, "jumped"):  # NumPy's
        return partial(getattr, bits, "state"), partial(setattr, bits, "state")
    for get_state, set_state in (("get_state", "set_state"), ("getstate", "setstate")):
        if hasattr(generator, get_state) and hasattr(generator, set_state):
            return getattr(generator, get_state), getattr(generator, set_state)
    raise ValueError(
        f"generators holds a {type(generator).__name__}; it takes those of torch, numpy.random and random.Random."
    )


def _checkpointed() -> bool:
    """Whether what is computed now is to be computed again rather than kept, masks too."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return not torch.is_grad_enabled() or (hooks is not None and hooks(False) is not None)


def _drops_on_the_cpu(model: nn.Module) -> bool:
    """Whether dropout layers are in use, and nothing is compiled."""
    cpu = any(p.device.type == "cpu" for p in model.parameters())
    drops = any(isinstance(m, nn.Dropout) and m.training and 0 < m.p < 1 for m in model.modules())
    return cpu and drops and not compiled(model)
