"""What the pool's fork server imports once for all workers: torch and the training loop. Nothing is computed.

`torch._dynamo` is part of it: torch loads it with the first optimizer, otherwise once in every worker.
"""

import torch._dynamo  # noqa: F401
