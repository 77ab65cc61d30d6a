"""What the pool's fork server imports once for all workers: torch and the training loop. Nothing is computed.

`torch._dynamo` among it: torch loads it with the first optimizer, which would be in every worker anew.
"""

import torch._dynamo  # noqa: F401
