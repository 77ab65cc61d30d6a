"""What the pool's fork server imports once for all workers: torch and the training loop. Nothing is computed."""

import experiments.harness.train
import experiments.harness.vision  # noqa: F401
