"""One real Slurm for all tests, and the same runs trained without Slurm for comparison."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.harness.runs.provenance import ROOT
from tests.slurm.loopback import Loopback

LONG = ("vit_cifar", "--profile", "smoke", "--seeds", "1", "--set", "epochs=24")
LONG = (*LONG, "--set", "micro_batches=4", "--set", "rho=0.1")
"""One mSAM run of several seconds."""


def pytest_collection_modifyitems(items):
    """Run the cluster's tests first, in one process: they mostly wait, while other processes compute."""
    items.sort(key=lambda item: not item.path.is_relative_to(Path(__file__).parent))


@pytest.fixture(scope="session")
def loopback():
    """A function that starts a cluster with the given options; all clusters end with the session."""
    with contextlib.ExitStack() as started:

        def start(**options) -> Loopback:
            cluster = Loopback(**options)
            started.callback(cluster.stop)
            return cluster

        yield start


@pytest.fixture(scope="session")
def cluster(loopback):
    """The cluster that most tests use."""
    return loopback()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The results root of LONG, trained on this machine."""
    root = tmp_path_factory.mktemp("uninterrupted")
    train_locally(LONG, root)
    return root


def train_locally(target: tuple[str, ...], root: Path) -> None:
    """Train with the main command, without Slurm."""
    command = [sys.executable, "-m", "experiments", "run", *target, "--results", str(root)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def slurm(cluster, tmp_path):
    return Command(cluster, tmp_path / "results")


class Command:
    """`python -m slurm` on the loopback cluster, with a separate results root."""

    def __init__(self, cluster: Loopback, root: Path) -> None:
        self.cluster, self.root = cluster, root

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run the command, check that it exits with `code`, and return its output."""
        command = [sys.executable, "-m", "slurm", *arguments, "--results", str(self.root)]
        environment = {**os.environ, **self.cluster.environment}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == code, f"{done.stdout}\n{done.stderr}\n{self.logs()}"
        return done.stdout + done.stderr

    def wait(self, *target: str, code: int = 0) -> str:
        return self("wait", *target, "--every", "0.5", code=code)

    def until(self, ready, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"{self.cluster('squeue', '-t', 'all', '-r')}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in self.root.glob("slurm/*/*.out"))

    def job(self) -> str:
        """The id of the last submission's first array."""
        submission = json.loads(max(self.root.glob("slurm/*/submission.json")).read_text())
        return submission["arrays"][0]["ids"][0].split("_")[0]

    def epochs(self) -> list[int]:
        """Number of epochs that each run has recorded."""
        return [len(path.read_text().splitlines()) for path in self.root.glob("runs/*/metrics.jsonl")]

    def until_it_trains(self) -> None:
        """Wait until every started run has recorded some epochs."""
        self.until(lambda: self.epochs() and min(self.epochs()) > 2)

    def assert_uninterrupted(self, uninterrupted: Path) -> None:
        """Check that the runs match those trained without Slurm bit for bit."""
        actual, expected = numbers(self.root), numbers(uninterrupted)
        assert actual
        assert actual == {run: expected[run] for run in actual}

    def assert_resumed(self, requeues: list[int], uninterrupted: Path) -> None:
        """Check that LONG succeeds with these requeues, and that each session after the first resumed."""
        self.wait(*LONG)
        (sessions,) = self.sessions()
        assert [session["requeues"] for session in sessions] == requeues
        assert all(session["first_step"] > 4 for session in sessions[1:]), "restarted instead of resumed"
        self.assert_uninterrupted(uninterrupted)

    def sessions(self) -> list[list[dict]]:
        """The provenance of each run."""
        return [json.loads(path.read_text())["sessions"] for path in self.root.glob("runs/*/env.json")]


def numbers(root: Path) -> dict[str, tuple]:
    """The results of training by run: scores, curves and weights, without times."""
    results = {}
    for path in root.glob("runs/*/summary.json"):
        summary = json.loads(path.read_text())
        summary = {name: value for name, value in summary.items() if not name.endswith("_seconds")}
        lines = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["seconds"]
        weights = torch.load(path.parent / "checkpoint.pt", weights_only=True)["model"]
        results[path.parent.name] = (summary, lines, {name: tensor.tolist() for name, tensor in weights.items()})
    return results
