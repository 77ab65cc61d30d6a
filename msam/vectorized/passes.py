"""All micro-batches of a step in one pass over the mini-batch, each at weights of its own.

The m ascent gradients are all taken at w, and the m perturbed passes differ in their weights alone. So the mini-batch
goes through the model once for each of the two, and only where a function of torch meets a parameter is it done by
micro-batch (`msam.vectorized.operations`). The result is that of the loop over micro-batches, up to rounding; what is
saved is time, most where micro-batches are small.

What this asks of a model, besides what is refused by name:

- Whatever lies between the batch and a parameter is done by functions of torch that `msam.vectorized.places` follows:
  it knows along which dimension the examples lie, in the batch's order, each with as many rows as the others.
- Examples meet each other in BatchNorm layers alone, which are done by micro-batch, and in the loss, which is a mean
  over them (or over what `loss_fn` counts): the loss of the mini-batch must be the mean of the micro-batches'.
  Statistics written by hand are those of the mini-batch.

Parameters may be reshaped, sliced, scaled or otherwise turned into other tensors by any function, as long as no example
is among its arguments; what comes of it may meet examples in the functions of `plans`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from msam.microbatch import tensors
from msam.parallel import compiled
from msam.passes import graph_of
from msam.state import Snapshot, State
from msam.vectorized.effects import ASKS, RANDOM, READS, averages, shown, written
from msam.vectorized.operations import Operation, Sum, refuse, run_clean, run_moved
from msam.vectorized.origins import Derived, Examples, Origins, call, is_constant, name_of, tensors_in
from msam.vectorized.plans import ARITHMETIC, ARITHMETIC_IN_PLACE, Plan, Plans, argument
from msam.vectorized.rearranged import ATTENTION, examples_first, one_for_each

OTHER_CALLS = "a loss_fn that calls other functions in its second pass than in its first"


class Vectorized(TorchFunctionMode):
    """The two passes of one step. While it is active, functions that meet a perturbed parameter act by micro-batch.

    Args:
        model: The module that holds the parameters.
        plans: How functions are done by micro-batch.
        perturbed: The parameters that are perturbed.
        rho: Radius of the perturbation, > 0.

    Raises:
        NotImplementedError: if the model is compiled or scripted, has perturbed parameters that are not of float32 or
            float64, or a BatchNorm with momentum=None.
    """

    def __init__(self, model: nn.Module, plans: Plans, perturbed: Sequence[Tensor], rho: float) -> None:
        super().__init__()
        self._plans, self._rho, self._m = plans, rho, plans.m
        self._origins: Origins = plans.origins
        self._perturbed = {id(p): p for p in perturbed}
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._counters: dict[int, Tensor] = {}
        self._statistics: set[int] = set()
        self._check(model)
        self._held = {
            t.untyped_storage()._cdata: name
            for name, t in [*model.named_buffers(), *model.named_parameters()]
            if t.layout is torch.strided and id(t) not in self._statistics and id(t) not in self._perturbed
        }
        self._versions = [(t, t._version, name) for name, t in model.named_buffers() if id(t) not in self._statistics]
        self._versions += [(p, p._version, name) for name, p in model.named_parameters()]
        self._anchor = torch.zeros((), requires_grad=True)
        """What makes autograd come back to the operations; the parameters stay out of the clean pass's graph."""
        self._scale: Tensor | None = None
        self._operations: list[tuple[Operation, Any]] = []
        """Those of the first pass in their order, each with what has to be the same in the second."""
        self._called = 0
        self._uses: dict[int, list[tuple[Operation, int]]] = {}
        """The operations that use a perturbed parameter, by its id, and its place among theirs."""
        self._sums: dict[int, Sum] = {}
        """The sums of the gradients of those parameters that several operations use."""
        self._unplanned: dict[int, Callable[..., Any]] = {}
        """What else was called with a parameter and examples, by its id."""
        self._positions: dict[int, tuple[Tensor, Tensor, dict[Any, Any]]] = {}
        """What was looked up with constants: it is one for all examples until it meets them."""

    def _check(self, model: nn.Module) -> None:
        if compiled(model):
            refuse("torch.compile")
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                refuse("torch.jit")
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
                if module.momentum is None and module.training:
                    refuse("BatchNorm with momentum=None")
                self._counters[id(module.running_mean)] = module.num_batches_tracked
                self._statistics |= {id(b) for b in module._buffers.values()}
        if (name := _overlapping(model, self._perturbed)) is not None:
            refuse(f"the parameter {name}, whose memory another tensor of the model shares")
        for p in self._perturbed.values():
            if p.dtype not in (torch.float32, torch.float64):
                refuse(f"perturbed parameters of {p.dtype}")

    def check_state(self, state: State, before: Snapshot) -> None:
        """Refuse what moves other state than BatchNorm's, which would move once a mini-batch.

        Raises:
            NotImplementedError: by its name.
        """
        for t, version, name in self._versions:
            if t._version != version:
                refuse(f"a forward pass that moves {name}")
        if (changed := state.changed(before, self._statistics)) is not None:
            refuse(f"a forward pass that moves {changed}")

    def ascend(self, loss: Tensor, empty: bool) -> None:
        """Work out the micro-batches' gradients of the clean pass's loss. They stay with the operations.

        Args:
            loss: Shape ().
            empty: Whether the loss stands in for a mean over nothing.

        Raises:
            ValueError: if the loss depends on no perturbed parameter.
            NotImplementedError: if a perturbed parameter is used in a way that cannot be done by micro-batch.
        """
        for node in graph_of(loss):
            if "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
                refuse("BatchNorm that is called past torch.nn.functional.batch_norm")
        wanted = [self._anchor, *self._perturbed.values()]
        try:
            left = torch.autograd.grad(loss, wanted, allow_unused=True)[1:]
        except CheckpointError:
            refuse("activation checkpointing")
        missed = [number for number, g in zip(self._perturbed, left, strict=True) if g is not None]
        if missed and not empty:
            refuse(f"{shown(self._unplanned.get(missed[0]))} on the parameter {self._names[missed[0]]}")
        if not missed and not empty and not self._norms():
            raise ValueError(
                "The loss depends on no perturbed parameter of the model: does loss_fn call another model?"
            )

    @contextmanager
    def moved(self) -> Iterator[Tensor]:
        """The forward pass in the block is at w + e_i for each micro-batch.

        Yields:
            ||T g_i|| for the mini-batch's mean loss. Shape (m,). Where it is not finite, neither are the weights.
        """
        norms = self._norms()
        norms = norms or [torch.zeros(self._m)]  # of a mini-batch without anything to average
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), dim=0)
        self._scale = self._rho / norm.clamp_min(1e-12 / self._m)  # of a micro-batch's own norm, which is m times this
        self._origins.begin()
        self._positions.clear()
        try:
            yield norm
            if self._called < len(self._operations):
                refuse(OTHER_CALLS)
        finally:
            self._operations.clear()
            self._uses.clear()
            self._sums.clear()

    def _norms(self) -> list[Tensor]:
        """||T g_i|| of the operations, and of the parameters that several of them use."""
        sums = [total.norms(self._perturbed[number], self._plans.adaptive) for number, total in self._sums.items()]
        return [n for n in (*(operation.norms for operation, _ in self._operations), *sums) if n is not None]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name_of(func) in ASKS:
            return func(*args, **kwargs or {})
        values = dict(enumerate(args)) | (kwargs or {})
        place = self._origins.of(values.get(0))
        if func not in ARITHMETIC_IN_PLACE or not isinstance(place, Examples) or not self._touched(values):
            return self._call(func, values)
        x = args[0].clone()
        self._origins.note(x, place)
        result = self._call(getattr(Tensor, func.__name__[:-1]), values | {0: x})
        return args[0].copy_(result)

    def _call(self, func: Callable[..., Any], values: dict[Any, Any]) -> Any:
        """The result of a function, by micro-batch if it has to be."""
        if func in ARITHMETIC:
            values = self._with_lookups(values)
        touched, averaging = self._touched(values), averages(func, values)
        if touched or averaging:
            if (plan := self._plans.plan(func, values)) is not None:
                return self._run(func, plan, touched, values)
            if averaging:
                refuse("BatchNorm of anything but the examples")
            if (result := self._rearranged(func, values)) is not NotImplemented:
                return result
            self._check_use(func, touched, values)
        else:
            self._check_write(func, values)
        writes = written(func, values)
        result = call(func, values)
        if touched:
            self._note_unplanned(func, touched, values, result)
            return result
        if writes:
            self._origins.write(func, values, writes)
        results = result if isinstance(result, list | tuple) else [result]
        new = [t for t in results if isinstance(t, Tensor) and not any(t is one for one in writes)]
        self._origins.follow(func, values, new)
        return result

    def _rearranged(self, func: Callable[..., Any], values: dict[Any, Any]) -> Any:
        """The same by other calls; NotImplemented if none are known."""
        if func is F.multi_head_attention_forward:
            with self:
                return call(ATTENTION, values)
        result = examples_first(func, values, self._origins, self._call)
        if result is NotImplemented:
            result = one_for_each(func, values, self._origins, self._plans.is_parameter, self._call)
        return result

    def _touched(self, values: dict[Any, Any]) -> list[int]:
        """Ids of the perturbed parameters among a function's arguments, or in what derives from them."""
        touched = []
        for t in tensors_in(values):
            origin = self._origins.of(t)
            numbers = origin.roots if isinstance(origin, Derived) else [id(t)]
            touched += [number for number in numbers if number in self._perturbed]
        return touched

    def _run(self, func: Callable[..., Any], plan: Plan, touched: list[int], values: dict[Any, Any]) -> Tensor:
        make, x, params = plan
        numbers = {slot: value for slot, value in values.items() if isinstance(value, int | float | str | None)}
        signature = func, [id(p) for p in params], None if x is None else x.shape, numbers
        if self._scale is not None:
            if self._called == len(self._operations) or self._operations[self._called][1] != signature:
                refuse(OTHER_CALLS)
            operation, _ = self._operations[self._called]
            operation.renew(make())
            self._called += 1
            scale = self._scale if operation.norms is None else self._scale.to(operation.norms)
            return self._noted(run_moved(operation, scale, x, params))
        if touched and not torch.is_grad_enabled():
            refuse(f"{shown(func)} on the parameter {self._names[touched[0]]} under no_grad, or a reentrant checkpoint")
        if func is F.batch_norm and argument(values, 5, "training"):
            counter = self._counters.get(id(argument(values, 1, "running_mean")))
            if counter is not None:
                counter += self._m - 1
        operation = make()
        self._note_uses(operation, params)
        self._operations.append((operation, signature))
        return self._noted(run_clean(operation, self._anchor, x, params))

    def _note_uses(self, operation: Operation, params: Sequence[Tensor | None]) -> None:
        """Where a parameter is used a second time, the gradients of its uses are to be added up."""
        for slot, p in enumerate(params):
            if id(p) not in self._perturbed:
                continue
            uses = self._uses.setdefault(id(p), [])
            uses.append((operation, slot))
            if len(uses) > 1:
                total = self._sums.setdefault(id(p), Sum())
                for user, place in uses:
                    user.sums[place] = total

    def _noted(self, y: Tensor) -> Tensor:
        self._origins.note(y, self._plans.examples_first)
        return y

    def _check_use(self, func: Callable[..., Any], touched: list[int], values: dict[Any, Any]) -> None:
        """Refuse what would write to a parameter, before it does, and what reads its values."""
        name = self._names[touched[0]]
        if name_of(func) in READS:
            refuse(f"{shown(func)} on the parameter {name}, which reads its values")
        if argument(values, 3, "max_norm") is not None and func in (F.embedding, F.embedding_bag):
            refuse(f"{shown(func)} with max_norm on the parameter {name}")
        writes = written(func, values)
        if values.get("inplace") is True:  # of what derives from a parameter, which is worked out again each time
            writes = [t for t in writes if not isinstance(self._origins.of(t), Derived)]
        if writes:
            to_it = any(self._touched({0: t}) for t in writes)
            refuse(f"{shown(func)} on the parameter {name}, which writes to {'it' if to_it else 'another tensor'}")

    def _check_write(self, func: Callable[..., Any], values: dict[Any, Any]) -> None:
        """Refuse what would move the state, before it does."""
        for t in written(func, values):
            if t.layout is torch.strided and (name := self._held.get(t.untyped_storage()._cdata)) is not None:
                refuse(f"a forward pass that moves {name}")

    def _note_unplanned(
        self, func: Callable[..., Any], touched: list[int], values: dict[Any, Any], result: Any
    ) -> None:
        """Note a call that is done at w: what it gives derives from the parameter, or is refused later, if it matters.

        Whether it matters the ascent pass shows, if autograd sees it.
        """
        results = result if isinstance(result, list | tuple) else [result]
        name = self._names[touched[0]]
        if not results or not all(isinstance(t, Tensor) and t.requires_grad for t in results):
            refuse(f"{shown(func)} on the parameter {name}, whose result has no gradient")
        inputs: dict[int, Tensor | Derived] = {}
        pure = not any(word in name_of(func) for word in RANDOM)
        for t in tensors_in(values):
            origin = self._origins.of(t)
            if isinstance(origin, Derived):
                inputs[id(t)] = origin
            elif id(t) in self._names:
                inputs[id(t)] = t
            else:
                pure &= is_constant(origin)
        if pure:
            for index, t in enumerate(results):
                self._origins.note(
                    t, Derived(func, values, inputs, index if isinstance(result, list | tuple) else None)
                )
            if func is F.embedding and isinstance(result, Tensor):
                self._positions[id(result)] = result, values[0], values
            return
        if self._scale is not None and any(number not in self._unplanned for number in touched):
            refuse(OTHER_CALLS)
        self._unplanned |= dict.fromkeys(touched, func)

    def _with_lookups(self, values: dict[Any, Any]) -> dict[Any, Any]:
        """The arguments of a function between tensors; what was looked up for all examples is so for each of them."""
        for slot, t in values.items():
            known = self._positions.get(id(t))
            other = values.get(1 - slot) if slot in (0, 1) else None
            if known is None or known[0] is not t or not self._origins.lies_first(other):
                continue
            assert isinstance(other, Tensor)
            if t.dim() > other.dim() or (t.dim() == other.dim() and len(t) not in (1, len(other))):
                continue
            _, ids, call_values = known
            ids = ids.view((1,) * (other.dim() - t.dim()) + ids.shape)
            ids = ids.expand(len(other), *ids.shape[1:])
            plan = self._plans.looked_up(call_values | {0: ids}, ids)
            if plan is not None:
                return values | {slot: self._run(F.embedding, plan, [id(plan[2][0])], call_values)}
        return values


def _overlapping(model: nn.Module, perturbed: Mapping[int, Tensor]) -> str | None:
    """The name of a perturbed parameter whose memory another parameter, buffer or attribute has too."""
    named = [*model.named_parameters(), *model.named_buffers()]
    for path, module in model.named_modules():
        named += [(f"{path}.{key}", t) for key, t in vars(module).items() if isinstance(t, Tensor)]
    spans: dict[int, list[tuple[int, int, Tensor, str]]] = {}
    for name, t in named:
        if t.layout is torch.strided and t.numel():
            size = int(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))) + 1
            start = int(t.storage_offset()) * t.element_size()
            span = (start, start + size * t.element_size(), t, name)
            spans.setdefault(t.untyped_storage()._cdata, []).append(span)
    for group in (group for group in spans.values() if len(group) > 1):
        for (start, end, t, name), (other, last, u, also) in itertools.permutations(group, 2):
            if t is not u and id(t) in perturbed and start < last and other < end:
                return f"{name} ({also})"
    return None


def together(
    model: nn.Module, perturbed: Sequence[Tensor], rho: float, adaptive: bool, sizes: Sequence[int], batch: Any
) -> Vectorized | None:
    """All micro-batches in one pass; None where there is nothing to gain, or their sizes differ."""
    if not rho or len(sizes) == 1 or min(sizes) < max(sizes):
        return None
    constants = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    for module in model.modules():
        constants += [t for t in vars(module).values() if isinstance(t, Tensor) and not t.requires_grad]
    origins = Origins(sum(sizes), tensors(batch), constants)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Vectorized(model, Plans(len(sizes), adaptive, origins, perturbed, trained), perturbed, rho)
