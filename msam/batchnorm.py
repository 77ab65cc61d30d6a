"""Running statistics move in the clean passes only.

The policy: the clean pass over each micro-batch moves them, as plain training over that micro-batch would, so m small
updates a step; the perturbed pass moves nothing. After training, the statistics are those of the weights w at
micro-batches of the trained size, the ones that evaluation uses. Layers in eval mode are nobody's to move.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Statistics:
    """The buffers of all modules in train mode: BatchNorm's, and those of any other layer that counts or averages.

    A buffer's version counter does not tell whether a pass has moved it (batch_norm writes past it), so every buffer
    is copied.
    """

    def __init__(self, network: nn.Module) -> None:
        self._names = [(m, name) for m in network.modules() if m.training for name in m._buffers]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put them back when the block ends, however it ends."""
        before = self.copied()
        try:
            yield
        finally:
            self.put_back(before)

    def copied(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Each buffer as the object it is, and a copy of its values."""
        buffers = [module._buffers[name] for module, name in self._names]
        return [(buffer, None if buffer is None else buffer.detach().clone()) for buffer in buffers]

    @torch.no_grad()
    def put_back(self, before: list[tuple[Tensor | None, Tensor | None]]) -> None:
        """The inverse of `copied`: the same objects, with the same values."""
        for (module, name), (buffer, values) in zip(self._names, before, strict=True):
            if buffer is not None:
                buffer.copy_(values)
            module._buffers[name] = buffer
