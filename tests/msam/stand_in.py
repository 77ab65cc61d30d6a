"""A stand-in for a CUDA graph, with which the bookkeeping around one is tested on a CPU."""

import torch
from torch.utils import _pytree


class StandIn:
    """A graph on the CPU: a replay runs the recorded function again and writes to what the record returned."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.warmed = model, optimizer, 0

    def warm(self, step):
        self.warmed += 1
        step()

    def record(self, step):
        """As of a real capture, nothing has run afterwards."""
        tensors = [*self.model.state_dict().values()]
        tensors += [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        random = torch.get_rng_state()
        self.step, self.result = step, step()
        self.grads = [p.grad for p in self.model.parameters()]
        with torch.no_grad():
            for t, values in zip(tensors, before, strict=True):
                t.copy_(values)
            for t in _pytree.tree_leaves(self._values(self.result)):
                t.fill_(float("nan"))
        torch.set_rng_state(random)
        return self.result

    def replay(self):
        new = self.step()
        with torch.no_grad():
            pairs = zip(self._values(self.result), self._values(new), strict=True)
            for t, values in pairs:
                t.copy_(values)
            for p, g in zip(self.model.parameters(), self.grads, strict=True):
                if g is not None:
                    g.copy_(p.grad)

    @staticmethod
    def _values(step):
        values = [step.loss, step.perturbed_loss, step.gradient_norms, *_pytree.tree_leaves(step.aux)]
        return [t for t in values if isinstance(t, torch.Tensor)]
