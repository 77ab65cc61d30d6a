"""Where functions of torch put the examples: every element of a tensor is the number of its example."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from msam.vectorized.origins import Examples, Origins

B = 4
START = {
    "rows": torch.arange(B).repeat_interleave(3).view(3 * B, 1).expand(-1, 5).clone(),
    "first": torch.arange(B).view(B, 1, 1, 1).expand(B, 3, 1, 5).clone(),
    "third": torch.arange(B).view(1, 1, B, 1).expand(3, 2, B, 5).clone(),
    "batch-sized": torch.arange(B).view(1, B, 1).expand(B, B, B).clone(),
}
DIM = {"rows": 0, "first": 0, "third": 2, "batch-sized": 1}

FUNCTIONS = {
    "transpose": [lambda x, i=i: torch.transpose(x, *i) for i in ((0, 1), (-1, 0), (1, -2))],
    "swapaxes": [lambda x: x.swapaxes(0, -1)],
    "T": [lambda x: x.mT, lambda x: x.permute(*reversed(range(x.dim())))],
    "permute": [
        lambda x: x.permute([x.dim() - 1, *range(x.dim() - 1)]),
        lambda x: torch.permute(x, (1, 0, *range(2, x.dim()))),
    ],
    "movedim": [lambda x: x.movedim(0, -1), lambda x: torch.movedim(x, -1, 1)],
    "unsqueeze": [lambda x, k=k: x.unsqueeze(k) for k in (0, 1, -1)],
    "squeeze": [lambda x: x.squeeze(), lambda x: x.squeeze(1), lambda x: x.squeeze((0, -2))],
    "reshape": [
        lambda x: x.reshape(-1),
        lambda x: x.flatten(1),
        lambda x: x.flatten(0, 1),
        lambda x: x.reshape(x.shape[0] * x.shape[1], -1),
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.unflatten(-1, (x.shape[-1], 1)),
        lambda x: x.reshape(1, *x.shape, 1),
    ],
    "index": [
        lambda x: x[0],
        lambda x: x[:, 0],
        lambda x: x[..., 0],
        lambda x: x[None],
        lambda x: x[:, None],
        lambda x: x[..., None, :1],
        lambda x: x[:, [0, 0]],
        lambda x: x[..., torch.tensor([0, 0])],
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x[::2],
        lambda x: x[:, :1],
        lambda x: x[[0, 1], :, [0, 0]] if x.dim() > 2 else x,
        lambda x: x[:, [0, 0], :, [0, 0]] if x.dim() > 3 else x,
    ],
    "expand": [lambda x: x.expand(2, *x.shape), lambda x: x[:, :1].expand(-1, 7, *x.shape[2:])],
    "reduce": [
        lambda x: x.amax(1),
        lambda x: x.amax(-1, keepdim=True),
        lambda x: x.max(0)[0],
        lambda x: x.max(1).values,
        lambda x: x.amin((0, -1)),
        lambda x: x.max(torch.zeros_like(x)),
    ],
    "join": [
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.cat([x, x]),
        lambda x: torch.stack([x, x]),
        lambda x: torch.stack([x, x], -1),
        lambda x: x.chunk(2, 1)[0],
        lambda x: x.split(1, -1)[0],
        lambda x: x.unbind(1)[0],
        lambda x: x.unbind()[0],
    ],
    "order": [
        lambda x: x.flip(0),
        lambda x: x.flip(-1),
        lambda x: x.flip(1, 0),
        lambda x: x.roll(1),
        lambda x: x.roll(1, 0),
        lambda x: x.roll(1, -1),
        lambda x: x.sort(-1).values,
        lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
        lambda x: x.repeat_interleave(2, 0),
        lambda x: x.repeat_interleave(2),
        lambda x: x.index_select(1, torch.zeros(2, dtype=torch.long)),
        lambda x: x.narrow(1, 0, 1),
        lambda x: x.select(0, 0),
    ],
    "broadcast": [
        lambda x: x + torch.zeros(x.shape[-1], dtype=torch.long),
        lambda x: x + torch.zeros(2, *x.shape, dtype=torch.long),
        lambda x: torch.where(x > 1, x, x),
        lambda x: x[:, :1] * torch.ones_like(x),
        lambda x: x.float().masked_fill(x < 0, 0.0),
        lambda x: x.contiguous().clone(),
    ],
    "products": [
        lambda x: F.linear(x.double(), torch.eye(x.shape[-1]).double()),
        lambda x: x.double() @ torch.eye(x.shape[-1]).double(),
        lambda x: torch.eye(x.shape[-2]).double() @ x.double(),
    ],
}  # fmt: skip
ALL = [(name, number) for name, functions in FUNCTIONS.items() for number in range(len(functions))]


class Following(torch.overrides.TorchFunctionMode):
    """Follows the examples through every function that is called."""

    def __init__(self, origins):
        super().__init__()
        self.origins = origins

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, list | tuple) else [result]
        values = dict(enumerate(args)) | (kwargs or {})
        self.origins.follow(func, values, [t for t in results if isinstance(t, torch.Tensor)])
        return result


def check(t, origin):
    """Whether the examples lie where it is said."""
    d, outer = origin.dim, origin.outer
    k = t.shape[d] // (outer * B)
    assert t.shape[d] == k * outer * B
    expected = torch.arange(B).repeat_interleave(k).repeat(outer).view(-1, *[1] * (t.dim() - d - 1))
    assert (t == expected).all()


@pytest.mark.parametrize("start", START)
def test_the_examples_lie_where_it_is_said(start):
    """After any two functions, one after the other. Where it is not known, nothing is claimed."""
    known = 0
    for first, second in itertools.product(ALL, ALL):
        x = START[start].clone()
        origins = Origins(B, [], [])
        origins.note(x, Examples(DIM[start]))
        held = [x]  # origins are known by the tensors' ids
        with Following(origins):
            try:
                for name, number in (first, second):
                    x = FUNCTIONS[name][number](x)
                    held.append(x)
            except (RuntimeError, IndexError, ValueError, TypeError, UserWarning):
                continue  # no such dimension
        origin = origins.of(x)
        if origin is not None and origin.dim is not None:
            known += 1
            try:
                check(x, origin)
            except AssertionError:
                raise AssertionError(f"after {first} and {second}: {origin} of {tuple(x.shape)}") from None
    assert known > 0.3 * len(ALL) ** 2, "most of these functions are followed"
