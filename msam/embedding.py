"""Embedding tables, of which one micro-batch reads a few rows.

The gradient of a table is zero but for the rows that were looked up. torch computes it for all rows all the same,
once for each micro-batch and pass, and for a BERT of 6 layers the table is half of the weights. While a layer's
`sparse` flag is set its backward pass gives the rows that were read, and no others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from msam.parallel import compiled

SMALLEST = 2**16
"""Weights of a table for which the rows are worth their sorting."""


def tables(network: nn.Module) -> list[nn.Embedding]:
    """The embedding layers whose flag may be borrowed: stock ones on the CPU that do not use it themselves.

    Not on a GPU, where sorting the rows would wait for the device and memory is fast; not in a compiled model,
    which would be compiled anew; not under a hook, which would see gradients of another form.
    """
    if compiled(network):
        return []
    return [m for m in network.modules() if type(m) is nn.Embedding and _free(m)]


def _free(layer: nn.Embedding) -> bool:
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and weight.requires_grad
        and weight.device.type == "cpu"
        and weight.numel() >= SMALLEST
        and not (layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None)
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
    )


@contextmanager
def rows_only(layers: Sequence[nn.Embedding]) -> Iterator[None]:
    """Forward passes in the block give gradients of the rows they read, as sparse tensors."""
    if not layers:
        yield
        return
    try:
        for layer in layers:
            layer.sparse = True
        yield
    finally:
        dense_again(layers)


def dense_again(layers: Sequence[nn.Embedding]) -> None:
    """Their own flag, which is what `tables` has asked for."""
    for layer in layers:
        layer.sparse = False
