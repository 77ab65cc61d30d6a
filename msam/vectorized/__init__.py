"""All micro-batches of a step in one pass over the mini-batch."""

from msam.vectorized.passes import Vectorized, together

__all__ = ["Vectorized", "together"]
