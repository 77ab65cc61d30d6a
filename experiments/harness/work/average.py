"""The moving average of a model's weights and buffers that a run with `ema` is scored by."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """Keeps `decay` of itself at each update; the first one takes the model as it is. Counts are the model's own.

    torch's `AveragedModel` counts its updates in a tensor, which it sends to the device each time: a wait a step.

    Args:
        model: On its device.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._update = get_ema_multi_avg_fn(decay)
        self._begun = False

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights and buffers in."""
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point() and self._begun]
        for own, new in pairs:
            if not own.is_floating_point() or not self._begun:
                own.copy_(new)
        if averaged:
            self._update([own for own, _ in averaged], [new for _, new in averaged], 0)
        self._begun = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The average, for a checkpoint."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint's."""
        self.module.load_state_dict(state)
        self._begun = True
