"""All micro-batches of a step in one pass over the mini-batch, each at weights of its own.

The m ascent gradients are all taken at w, and the m perturbed passes differ in their weights alone. So the mini-batch
goes through the model once for each of the two, and only where a function of torch meets a parameter is it done by
micro-batch (`msam.vectorized.operations`). The result is that of the loop over micro-batches, up to rounding; what is
saved is time, most where micro-batches are small.

What this asks of a model, besides what is refused by name:

- The examples lie along the first dimension of everything that meets a parameter, in the batch's order. Should another
  dimension come first there and happen to be as long, it is taken for the examples.
- Examples meet each other in BatchNorm layers alone, which are done by micro-batch, and in the loss, which is a mean
  over them (or over what `loss_fn` counts): the loss of the mini-batch must be the mean of the micro-batches'.
  Statistics written by hand, and buffers that the forward pass both moves and reads, are those of the mini-batch.
- Parameters are read by functions that autograd sees; so no norms for logging within `loss_fn`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from msam.parallel import compiled
from msam.vectorized.operations import Each, Embedding, Operation, refuse, run
from msam.vectorized.products import Convolution, Linear

CONVOLUTIONS = {getattr(F, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)}
ON_EXAMPLES = CONVOLUTIONS | {F.linear, F.prelu, F.layer_norm, F.group_norm, F.rms_norm, F.batch_norm}
"""Functions that take examples first, and parameters after them."""

BETWEEN = {getattr(of, name) for of in (torch, Tensor) for name in ("add", "sub", "mul", "div")}
"""Functions of examples and a parameter, in either order, whose shapes are broadcast."""

INTO = {getattr(Tensor, f"{name}_") for name in ("add", "sub", "mul", "div")}
"""The same in place."""

DIFFERENT = "a loss_fn that calls other functions in its second pass than in its first"

Plan = tuple[Callable[[], Operation], Tensor | None, list[Tensor | None]]
"""How to make an operation, and its input and parameters."""


class Vectorized(TorchFunctionMode):
    """The two passes of one step. While it is active, functions that meet a perturbed parameter act by micro-batch.

    Args:
        model: The module that holds the parameters.
        perturbed: Those that are perturbed.
        rho: Radius of the perturbation, > 0.
        adaptive: Whether it is ASAM's.
        m: The number of micro-batches, which divides the number of examples.
        examples: The number of examples of the mini-batch.

    Raises:
        NotImplementedError: if the model is compiled, has perturbed parameters that are not of float32 or float64, or
            a BatchNorm with momentum=None.
    """

    def __init__(
        self, model: nn.Module, perturbed: Sequence[Tensor], rho: float, adaptive: bool, m: int, examples: int
    ) -> None:
        super().__init__()
        self._rho, self._adaptive, self._m, self._examples = rho, adaptive, m, examples
        self._perturbed = {id(p): p for p in perturbed}
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._counters: dict[int, Tensor] = {}
        if compiled(model):
            refuse("torch.compile")
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
                if module.momentum is None and module.training:
                    refuse("BatchNorm with momentum=None")
                self._counters[id(module.running_mean)] = module.num_batches_tracked
        for p in perturbed:
            if p.dtype not in (torch.float32, torch.float64):
                refuse(f"perturbed parameters of {p.dtype}")
        self._scale: Tensor | None = None
        self._operations: list[tuple[Operation, Any]] = []
        """Those of the first pass in their order, each with what has to be the same in the second."""
        self._called = 0
        self._used: set[int] = set()
        self._elsewhere: dict[int, Callable[..., Any]] = {}
        """What else was called with a parameter, by its id."""
        self._constants = {id(b): ref(b) for b in model.buffers()}
        """Tensors that do not come of the examples, as far as tables are looked up with them."""
        self._positions: dict[int, tuple[ref[Tensor], Tensor, dict[Any, Any]]] = {}
        """What was looked up with constants: it is one for all examples until it meets them."""

    def ascend(self, loss: Tensor, empty: bool) -> None:
        """Work out the micro-batches' gradients of the clean pass's loss. They stay with the operations.

        Args:
            loss: Shape ().
            empty: Whether the loss stands in for a mean over nothing.

        Raises:
            ValueError: if the loss depends on no perturbed parameter.
            NotImplementedError: if a perturbed parameter is used in a way that cannot be done by micro-batch.
        """
        try:
            left = torch.autograd.grad(loss, list(self._perturbed.values()), allow_unused=True)
        except CheckpointError:
            refuse("activation checkpointing")
        missed = [number for number, g in zip(self._perturbed, left, strict=True) if g is not None]
        if missed and not empty:
            refuse(f"{_name(self._elsewhere.get(missed[0]))} on the parameter {self._names[missed[0]]}")
        if not missed and all(operation.norms is None for operation, _ in self._operations):
            raise ValueError(
                "The loss depends on no perturbed parameter of the model: does loss_fn call another model?"
            )

    @contextmanager
    def moved(self) -> Iterator[Tensor]:
        """The forward pass in the block is at w + e_i for each micro-batch.

        Yields:
            ||T g_i|| for the mini-batch's mean loss. Shape (m,). Where it is not finite, neither are the weights.
        """
        norms = [operation.norms for operation, _ in self._operations if operation.norms is not None]
        norms = norms or [torch.zeros(self._m)]  # of a mini-batch without anything to average
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), dim=0)
        self._scale = self._rho / norm.clamp_min(1e-12 / self._m)  # of a micro-batch's own norm, which is m times this
        try:
            yield norm
            if self._called < len(self._operations):
                refuse(DIFFERENT)
        finally:
            self._operations.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = dict(enumerate(args)) | (kwargs or {})
        if func in BETWEEN or func in INTO:
            values = self._met(values)
        listed = [t for value in values.values() if isinstance(value, list | tuple) for t in value]
        touched = [id(t) for t in (*values.values(), *listed) if id(t) in self._perturbed]
        averages = func is F.batch_norm and _argument(values, 5, "training")
        plan = self._plan(func, values) if touched or averages else None
        if plan is not None:
            return self._run(func, plan, touched, values)
        if averages or (func is torch.batch_norm and values[5]):
            refuse(f"BatchNorm of anything but the {self._examples} examples")
        result = func(*(values[slot] for slot in range(len(args))), **{name: values[name] for name in kwargs or {}})
        results = result if isinstance(result, list | tuple) else [result]
        if touched:
            self._other(func, touched, results)
            if func is F.embedding and isinstance(ids := values.get(0), Tensor) and self._constant(ids):
                self._positions[id(result)] = ref(result), ids, values
        elif all(self._constant(t) for t in (*values.values(), *listed) if isinstance(t, Tensor)):
            self._constants |= {id(t): ref(t) for t in results if isinstance(t, Tensor)}
        return result

    def _run(self, func: Callable[..., Any], plan: Plan, touched: list[int], values: dict[Any, Any]) -> Tensor:
        make, x, params = plan
        signature = func, [id(p) for p in params], None if x is None else x.shape
        if any(t is not None and torch.is_autocast_enabled(t.device.type) for t in (x, *params)):
            refuse("torch.autocast")
        if self._scale is not None:
            if self._called == len(self._operations) or self._operations[self._called][1] != signature:
                refuse(DIFFERENT)
            operation, _ = self._operations[self._called]
            self._called += 1
            scale = self._scale if operation.norms is None else self._scale.to(operation.norms)
            return run(operation, scale, x, params)
        if touched and not torch.is_grad_enabled():
            refuse(f"{_name(func)} on the parameter {self._names[touched[0]]} under no_grad, or a reentrant checkpoint")
        for number in touched:
            if number in self._used:
                refuse(f"a second use of the parameter {self._names[number]} in one pass")
            self._used.add(number)
        if func is F.batch_norm and _argument(values, 5, "training"):
            counter = self._counters.get(id(_argument(values, 1, "running_mean")))
            if counter is not None:
                counter += self._m - 1
        operation = make()
        self._operations.append((operation, signature))
        return run(operation, None, x, params)

    def _other(self, func: Callable[..., Any], touched: list[int], results: Sequence[Any]) -> None:
        """Note a call that is done at w. The ascent pass shows whether it matters, if autograd sees it."""
        tensors = [t for t in results if isinstance(t, Tensor)]
        name = self._names[touched[0]]
        if any(t.is_floating_point() and not t.requires_grad for t in tensors):
            refuse(f"{_name(func)} on the parameter {name}, whose result has no gradient")
        if self._scale is not None and tensors and any(number not in self._elsewhere for number in touched):
            refuse(DIFFERENT)
        if tensors:
            self._elsewhere |= dict.fromkeys(touched, func)

    def _constant(self, t: Tensor) -> bool:
        """Whether a tensor of whole numbers is the same for every batch, as positions are."""
        known = self._constants.get(id(t))
        return known is not None and known() is t and not t.is_floating_point()

    def _met(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """The arguments of a function between tensors; what was looked up for all examples is so for each of them."""
        for slot, t in values.items():
            known = self._positions.get(id(t))
            other = values.get(1 - slot) if slot in (0, 1) else None
            if known is None or known[0]() is not t or not isinstance(t, Tensor) or not isinstance(other, Tensor):
                continue
            if not other.dim() or len(other) != self._examples:
                continue
            _, ids, call = known
            if t.dim() > other.dim() or (t.dim() == other.dim() and len(t) not in (1, self._examples)):
                continue
            ids = ids.view((1,) * (other.dim() - t.dim()) + ids.shape)
            call = call | {0: ids.expand(self._examples, *ids.shape[1:])}
            plan = self._looked_up(call, call[0])
            if plan is not None:
                return values | {slot: self._run(F.embedding, plan, [id(plan[2][0])], call)}
        return values

    def _plan(self, func: Callable[..., Any], values: dict[Any, Any]) -> Plan | None:
        """What a call is by micro-batch; None if it is nothing that is known here."""
        params = {slot: value for slot, value in values.items() if id(value) in self._names}
        if func is Tensor.expand:
            return self._expanded(values)
        slot = 1 if func in BETWEEN and 0 in params else 0
        x = values.get(slot)
        if not isinstance(x, Tensor) or slot in params or not x.dim():
            return None
        if any(isinstance(v, Tensor) and v.requires_grad for s, v in values.items() if s != slot and s not in params):
            return None
        if func is F.embedding:
            return None if self._constant(x) else self._looked_up(values, x)
        if len(x) != self._examples or any(p.dtype != x.dtype for p in params.values()):
            return None
        w = _argument(values, 1, "weight")
        if func in BETWEEN:
            known = all(p.dim() < x.dim() or (p.dim() == x.dim() and len(p) == 1) for p in params.values())
        elif func in CONVOLUTIONS:
            known = x.dim() == w.dim()
        else:
            known = func in ON_EXAMPLES and (func is not F.linear or w.dim() == 2)
        if not known:
            return None
        plan = self._product(func, values, x)
        if plan is not None:
            return plan
        flags = [id(p) in self._perturbed for p in params.values()]
        function = _of(func, values, [slot, *params])
        return lambda: Each(function, self._m, flags, self._adaptive), x, list(params.values())

    def _product(self, func: Callable[..., Any], values: dict[Any, Any], x: Tensor) -> Plan | None:
        if func is not F.linear and func is not F.conv2d:
            return None
        params = [_argument(values, 1, "weight"), _argument(values, 2, "bias")]
        flags = [id(p) in self._perturbed for p in params]
        stride, padding, dilation, groups = (
            _argument(values, place, name, default)
            for place, (name, default) in enumerate({"stride": 1, "padding": 0, "dilation": 1, "groups": 1}.items(), 3)
        )
        if not flags[0] or isinstance(padding, str) or groups != 1:
            return None
        if func is F.linear:
            return lambda: Linear(self._m, flags, self._adaptive), x, params
        settings = [_pair(value) for value in (stride, padding, dilation)]
        return lambda: Convolution(self._m, flags, self._adaptive, *settings), x, params

    def _looked_up(self, values: dict[Any, Any], x: Tensor) -> Plan | None:
        w, padding = _argument(values, 1, "weight"), _argument(values, 2, "padding_idx")
        if len(x) != self._examples or _argument(values, 5, "scale_grad_by_freq") or _argument(values, 6, "sparse"):
            return None
        return lambda: Embedding(self._m, [True], self._adaptive, -1 if padding is None else padding % len(w)), x, [w]

    def _expanded(self, values: dict[Any, Any]) -> Plan | None:
        """A parameter that stands for one example, made as many."""
        p, *sizes = values.values()
        sizes = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if len(sizes) != p.dim() or sizes[:1] != [self._examples] or len(p) != 1:
            return None
        sizes[0] //= self._m
        return lambda: Each(lambda _, w: w.expand(sizes), self._m, [True], self._adaptive), None, [p]


def _of(func: Callable[..., Any], values: dict[Any, Any], slots: Sequence[Any]) -> Callable[..., Tensor]:
    """The call as a function of what is in the slots. What is there now is not kept."""
    rest = {slot: value for slot, value in values.items() if slot not in slots}

    def called(*given: Any) -> Any:
        now = rest | dict(zip(slots, given, strict=True))
        named = {slot: value for slot, value in now.items() if isinstance(slot, str)}
        return func(*(now[slot] for slot in sorted(now.keys() - named)), **named)

    return called


def _argument(values: dict[Any, Any], place: int, name: str, default: Any = None) -> Any:
    return values.get(place, values.get(name, default))


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _name(func: Callable[..., Any] | None) -> str:
    """How a reader knows a function; what reads an attribute of a tensor has no name of its own."""
    name = getattr(func, "__name__", "a function of your own")
    return ".data or another attribute" if name == "__get__" else name
