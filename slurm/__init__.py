"""The suite's runs on a Slurm cluster, through submitit."""

from experiments.harness import runs as _runs  # noqa: F401  experiments rejects a Python that is too old
