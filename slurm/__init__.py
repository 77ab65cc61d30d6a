"""The suite's runs on a Slurm cluster, through submitit."""

import experiments  # noqa: F401  rejects a Python that is too old
