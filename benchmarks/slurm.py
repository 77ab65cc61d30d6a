"""The cost of `python -m slurm`: submit and status of a thousand runs, and the time to a run's first epoch.

    python -m benchmarks.slurm --rounds 3

This uses the loopback Slurm of the tests (as root, with slurm-wlm and munge installed). The time to the first epoch is
measured from the command to the first line of metrics.jsonl, and compared with a bare `srun` of the same training. The
bars are 10 s for submit and cancel, 3 s for status, and 3 s more than srun.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.harness.runs import catalogue
from experiments.harness.runs.provenance import ROOT, cpu
from experiments.harness.runs.record import record_of
from tests.slurm.loopback import Loopback, missing

TABLE = ("table1", "--profile", "smoke", "--seeds", "77")
ONE = ("linear_cifar", "--profile", "smoke", "--seeds", "1")
BARE = (
    "import sys; from pathlib import Path; from experiments.harness.runs import catalogue; "
    "from experiments.harness.work.session import Session; from experiments.harness.work.train import train; "
    "train(catalogue.runs('linear_cifar', 'smoke', 1)[0], Session(Path(sys.argv[1])))"
)


def timed(cluster: Loopback, *command: str) -> float:
    """Seconds of a command that uses the cluster."""
    started = time.perf_counter()
    environment = {**os.environ, **cluster.environment}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def to_first_epoch(cluster: Loopback, bare: bool) -> float:
    """Seconds from the command to the first epoch's line."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        (spec,) = catalogue.runs("linear_cifar", "smoke", 1)
        record = record_of(spec, results)
        srun = ("srun", "-n1", sys.executable, "-c", BARE, folder)
        submit = (sys.executable, "-m", "slurm", "submit", *ONE, "--results", folder)
        started = time.perf_counter()
        process = subprocess.Popen(
            srun if bare else submit,
            cwd=ROOT,
            env={**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        while not record.metrics():
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        process.wait()
        while not record.done or cluster("squeue", "-h").strip():
            time.sleep(0.2)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    if why := missing():
        sys.exit(f"No loopback Slurm: {why}.")
    cluster = Loopback()
    try:
        print(f"{cpu()}, {os.cpu_count()} cores\n\n| what | seconds | bar | met |\n| --- | --- | --- | --- |")
        cluster("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=timing")
        with tempfile.TemporaryDirectory() as folder:
            slurm = (sys.executable, "-m", "slurm")
            for name, bar in (("submit", 10), ("status", 3), ("submit", 10), ("cancel", 10)):
                seconds = timed(cluster, *slurm, name, *TABLE, "--results", folder)
                print(f"| {name} of 1,001 runs | {seconds:.2f} | {bar} | {'yes' if seconds < bar else 'no'} |")
        cluster("scontrol", "update", "nodename=n[1-2]", "state=resume")
        to_first_epoch(cluster, bare=True)  # warm up the file cache
        pairs = [(to_first_epoch(cluster, bare=False), to_first_epoch(cluster, bare=True)) for _ in range(rounds)]
        more = sorted(ours - bare for ours, bare in pairs)
        shown = ", ".join(f"{ours:.2f} - {bare:.2f}" for ours, bare in pairs)
        median = more[len(more) // 2]
        print(f"| to the first epoch, over srun: {shown} | {median:.2f} | 3 | {'yes' if median < 3 else 'no'} |")
    finally:
        cluster.stop()


if __name__ == "__main__":
    main()
