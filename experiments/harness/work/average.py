"""The moving average of a model's weights and buffers; a run with `ema` is scored with it."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """An exponential moving average. The first update copies the model; integer buffers are always copied.

    torch's `AveragedModel` counts its updates in a tensor and copies it to the device, which waits at every step.

    Args:
        model: On its device.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._update = get_ema_multi_avg_fn(decay)
        self._started = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the model's current weights and buffers to the average."""
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point() and self._started]
        for own, new in pairs:
            if not own.is_floating_point() or not self._started:
                own.copy_(new)
        if averaged:
            self._update([own for own, _ in averaged], [new for _, new in averaged], 0)
        self._started = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average, for a checkpoint."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the average from a checkpoint."""
        self.module.load_state_dict(state)
        self._started = True
