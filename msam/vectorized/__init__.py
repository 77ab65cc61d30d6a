"""All micro-batches of a step in one pass over the mini-batch."""

from msam.vectorized.passes import Vectorized

__all__ = ["Vectorized"]
