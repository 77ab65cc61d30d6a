"""Running statistics move in the clean passes only.

The policy: the clean pass over each micro-batch moves them, as plain training over that micro-batch would, so m small
updates a step; the perturbed pass moves nothing. After training, the statistics are those of the weights w at
micro-batches of the trained size, the ones that evaluation uses. Layers in eval mode are nobody's to move.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Copies = list[tuple[Tensor | None, Tensor | None]]


class Statistics:
    """The buffers of all modules in train mode: BatchNorm's, and those of any other layer that counts or averages.

    A buffer's version counter does not tell whether a pass has moved it (batch_norm writes past it), so every buffer
    is copied: once before the call, and once a perturbed pass into memory that is used again.
    """

    def __init__(self, network: nn.Module) -> None:
        self._names = [(m, name) for m in network.modules() if m.training for name in m._buffers]
        self._memory: dict[int, Tensor] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put them back when the block ends, however it ends."""
        before = self._copied(self._memory)
        try:
            yield
        finally:
            self.put_back(before)

    def copied(self) -> Copies:
        """Each buffer as the object it is, and a copy of its values (None if nothing can be written to it)."""
        return self._copied({})

    @torch.no_grad()
    def put_back(self, before: Copies) -> None:
        """The inverse of `copied`: the same objects, with the same values."""
        for (module, name), (buffer, values) in zip(self._names, before, strict=True):
            if buffer is not None and values is not None:
                buffer.copy_(values)
            module._buffers[name] = buffer

    @torch.no_grad()
    def _copied(self, memory: dict[int, Tensor]) -> Copies:
        found: Copies = []
        for index, (module, name) in enumerate(self._names):
            buffer = module._buffers[name]
            if buffer is None or _expanded(buffer):
                found.append((buffer, None))
                continue
            values = memory.get(index)
            if values is None or values.shape != buffer.shape or values.dtype != buffer.dtype:
                values = memory[index] = buffer.detach().clone()
            else:
                values.copy_(buffer)
            found.append((buffer, values))
        return found


def _expanded(buffer: Tensor) -> bool:
    """Whether several elements share one place, so that torch writes to none of them."""
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True)
    )
