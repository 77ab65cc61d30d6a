"""The suite's runs on a Slurm cluster, through submitit."""
