"""Imported once by the pool's fork server, for all workers. Nothing is computed.

torch imports `torch._dynamo` with the first optimizer; without this line, every worker would import it.
"""

import torch._dynamo  # noqa: F401
