"""The suite on a real Slurm: slurmctld, two slurmd and munge on this machine, real training of the smoke profile."""

import copy
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.harness.runs import catalogue
from experiments.harness.runs.provenance import ROOT, code_hash
from tests.slurm.conftest import LONG, Command, numbers, train_locally

pytestmark = pytest.mark.slow

TABLE = ("table1", "--profile", "smoke", "--seeds", "1")
TWELVE = ("linear_cifar", "--profile", "smoke", "--seeds", "12")
ONE = ("linear_cifar", "--profile", "smoke", "--seeds", "1")


@pytest.mark.rare
def test_a_table_trained_by_slurm_matches_one_trained_locally(slurm, tmp_path):
    """A job for each run, four at a time; one of them fails at first."""
    specs = catalogue.runs("table1", "smoke", 1)
    assert len(specs) > 12
    bad = specs[5]
    folder = slurm.root / "runs" / bad.run_id
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").write_bytes(b"no checkpoint")
    output = slurm("submit", *TABLE, "--parallelism", "4")
    assert "To stop: scancel" in output
    assert "nothing to submit" in slurm("submit", *TABLE), "queued runs were submitted again"
    running = []

    def ended() -> bool:
        states = slurm.cluster("squeue", "-h", "-r", "-j", slurm.job(), "-t", "all", "-o", "%T").split()
        running.append(states.count("RUNNING"))
        return len(states) == len(specs) and not {"RUNNING", "PENDING", "COMPLETING"} & set(states)

    slurm.until(ended, 240)
    assert max(running) == 4
    output = slurm("status", *TABLE)
    assert f"{len(specs) - 1} done, 1 failed." in output
    line = next(line for line in output.splitlines() if line.startswith(bad.run_id))
    assert "checkpoint.pt cannot be read" in line
    log = Path(re.search(rf"{bad.run_id}.*\n\s+log: (.*)", output).group(1))
    assert "Traceback" in log.read_text()

    (folder / "checkpoint.pt").unlink()
    assert f"Submitted 1 of {len(specs)} runs" in slurm("submit", *TABLE)
    slurm.wait(*TABLE)
    train_locally(TABLE, tmp_path / "local")
    local = numbers(tmp_path / "local")
    assert numbers(slurm.root) == {spec.run_id: local[spec.run_id] for spec in specs}
    assert "nothing to submit" in slurm("submit", *TABLE)
    command = [sys.executable, "-m", "analysis", *TABLE, "--results", str(slurm.root)]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "not run" not in table
    for sessions in slurm.sessions():
        assert sessions[-1]["command"].startswith("python -m slurm submit table1")
        assert sessions[-1]["slurm_job"]


def test_small_runs_share_a_job(slurm):
    target = ("linear_cifar", "--profile", "smoke", "--seeds", "3")
    slurm("submit", *target, "--runs-per-job", "3")
    slurm.wait(*target)
    assert len({session["slurm_job"] for (session,) in slurm.sessions()}) == 1


def test_a_job_is_requeued_before_its_time_limit_and_matches(slurm, uninterrupted):
    slurm("submit", *LONG)
    slurm.until_it_trains()
    slurm.cluster("scancel", "--signal=USR2", slurm.job())
    slurm.assert_resumed([0, 1], uninterrupted)


@pytest.mark.rare
def test_a_preempted_job_resumes_and_matches(slurm, uninterrupted):
    slurm("submit", *LONG, "--partition", "low")
    slurm.until_it_trains()
    slurm.cluster("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.assert_resumed([0, 1], uninterrupted)


@pytest.mark.rare
def test_a_job_resumes_after_a_requeue_and_a_node_failure_and_matches(slurm, uninterrupted):
    """First an administrator requeues it, then its node fails."""
    slurm("submit", *LONG)
    slurm.until_it_trains()
    slurm.cluster("scontrol", "requeue", slurm.job(), check=True)
    slurm.until(lambda: len(slurm.sessions()[0]) == 2)
    node = slurm.sessions()[0][1]["slurm_nodes"]
    slurm.cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test", check=True)
    slurm.cluster("scontrol", "update", f"nodename={node}", "state=resume")  # if it has not come back by itself
    slurm.assert_resumed([0, 1, 2], uninterrupted)


def test_many_runs_become_several_arrays_one_after_the_other(loopback, tmp_path):
    """On a cluster with at most four jobs per array and no available node."""
    small = loopback(largest_array=4)
    small("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test", check=True)
    slurm = Command(small, tmp_path)
    slurm("submit", *TWELVE, "--parallelism", "2")
    arrays = small("squeue", "-h", "-o", "%i %E").splitlines()
    ids = sorted(int(line.split("_")[0]) for line in arrays)
    assert [line.split()[0] for line in sorted(arrays)] == [f"{i}_[0-3%2]" for i in ids]
    for earlier, later in itertools.pairwise(ids):
        assert any(line.startswith(f"{later}_") and f"afterany:{earlier}_" in line for line in arrays)
    assert "12 queued." in slurm("status", *TWELVE)
    slurm("cancel", *TWELVE)
    assert "12 cancelled." in slurm("status", *TWELVE)


@pytest.mark.rare
def test_a_killed_job_is_lost_and_can_be_submitted_again(slurm, uninterrupted):
    slurm("submit", *LONG)
    slurm.until_it_trains()
    os.kill(_python_of(slurm), signal.SIGKILL)
    output = slurm.wait(*LONG, code=1)
    assert "lost" in output
    assert "Submit again" in output
    assert "Submitted 1 of 1 runs" in slurm("submit", *LONG)
    slurm.wait(*LONG)
    slurm.assert_uninterrupted(uninterrupted)


@pytest.mark.rare
def test_cancelled_runs_leave_the_queue_with_their_checkpoints(slurm):
    target = ("vit_cifar", "--profile", "smoke", "--set", "epochs=2000")
    slurm("submit", *target, "--parallelism", "2")
    slurm.until(lambda: len(slurm.epochs()) == 2 and min(slurm.epochs()) > 1)
    assert "Asked Slurm to cancel 8 jobs" in slurm("cancel", *target)
    output = slurm.wait(*target, code=1)
    assert output.count("  cancelled ") == 8
    assert len(list(slurm.root.glob("runs/*/checkpoint.pt"))) == 2
    assert "No run" in slurm("cancel", *target)


@pytest.mark.rare
def test_two_ranks_on_two_nodes_train_the_same_network_as_one(slurm, tmp_path):
    mean = ("linear_cifar", "--profile", "smoke", "--seeds", "1", "--set", "micro_batches=4", "--set", "rho=0.05")
    slurm("submit", *mean, "--set", "ranks=2", "--nodes", "2")
    slurm.wait(*mean, "--set", "ranks=2")
    train_locally(mean, tmp_path / "one")
    (two,), (one,) = numbers(slurm.root).values(), numbers(tmp_path / "one").values()
    for name, value in one[0].items():
        assert two[0][name] == pytest.approx(value, abs=1e-5), name
    for line, other in zip(one[1], two[1], strict=True):
        assert other == pytest.approx(line, abs=1e-5)
    for name, weights in one[2].items():
        torch.testing.assert_close(torch.tensor(two[2][name]), torch.tensor(weights), rtol=0, atol=1e-5)
    ((session,),) = slurm.sessions()
    assert (session["ranks"], session["micro_batches_per_rank"]) == (2, 2)
    assert session["slurm_nodes"] == "n[1-2]"


@pytest.mark.rare
def test_ranks_are_requeued_together_and_a_dead_rank_ends_its_job(slurm):
    target = (*LONG, "--set", "ranks=2")
    slurm("submit", *target)
    slurm.until_it_trains()
    slurm.cluster("scancel", "--signal=USR2", slurm.job())
    slurm.until(lambda: len(slurm.sessions()[0]) == 2)
    os.kill(_python_of(slurm, rank="1"), signal.SIGKILL)
    slurm.wait(*target, code=1)
    slurm("submit", *target)
    slurm.wait(*target)
    (sessions,) = slurm.sessions()
    assert [session["requeues"] for session in sessions] == [0, 1, 0]
    assert sessions[1]["first_step"] > 4, "restarted instead of resumed"


def test_submitting_from_inside_a_job(slurm):
    command = f"cd {ROOT} && {sys.executable} -m slurm submit {' '.join(ONE)} --results {slurm.root}"
    outer = (
        "-n2",
        "--mem-per-cpu=300",
        "-o",
        f"{slurm.root}.log",
    )  # srun rejects it together with the inner job's --mem
    slurm.cluster("sbatch", "--wait", *outer, "--wrap", command, check=True)
    slurm.wait(*ONE)


def test_queued_jobs_run_the_code_that_was_submitted(slurm):
    slurm("submit", *ONE)
    (code,) = (slurm.root / "slurm" / "code").iterdir()
    slurm.wait(*ONE)
    ((session,),) = slurm.sessions()
    assert session["code"] == code_hash()
    changed = code / "experiments" / "harness" / "work" / "train.py"
    whole = changed.read_text()
    two = ("linear_cifar", "--profile", "smoke", "--seeds", "2")
    slurm.cluster("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test", check=True)
    slurm("submit", *two)
    changed.write_text(whole + "# another line\n")
    slurm.cluster("scontrol", "update", "nodename=n[1-2]", "state=resume", check=True)
    output = slurm.wait(*two, code=1)
    assert "1 done, 1 lost" in output
    assert "has changed since it was submitted" in slurm.logs()
    slurm("submit", *two)
    slurm.wait(*two)


def test_a_submission_interrupted_before_its_ids_are_written_is_found_by_name(slurm):
    slurm("submit", "linear_cifar", "--profile", "smoke")
    (path,) = slurm.root.glob("slurm/*/submission.json")
    submission = json.loads(path.read_text())
    submission["arrays"][0]["ids"] = None
    path.write_text(json.dumps(submission))
    assert "nothing to submit" in slurm("submit", "linear_cifar", "--profile", "smoke")
    slurm.wait("linear_cifar", "--profile", "smoke")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*ONE, "--partition", "nowhere"), "invalid partition"),
        (("table1", "--profile", "paper", "--gpus", "8"), "node configuration is not available"),
    ],
)
def test_sbatchs_message_is_printed_if_it_rejects_a_job(slurm, arguments, words):
    output = slurm("submit", *arguments, code=2)
    assert words in output
    assert "Nothing was submitted" in output
    assert not list(slurm.root.glob("slurm/*/submission.json"))
    assert words in slurm("submit", *arguments, "--dry-run", code=2)


def test_a_dry_run_shows_the_jobs_and_lets_sbatch_check_them_but_submits_nothing(slurm):
    before = slurm.cluster("squeue", "-h", "-t", "all")
    output = slurm("submit", "resnet_cifar", "--profile", "paper", "--dry-run")
    assert "#SBATCH --gpus-per-node=1" in output
    assert "to start at" in output
    assert re.search(r"about [1-9][0-9.]* GPU-hours", output)
    assert slurm.cluster("squeue", "-h", "-t", "all") == before
    assert not (slurm.root / "runs").exists()


@pytest.mark.needs("mount")
@pytest.mark.parametrize(
    ("options", "words"), [("size=1m", "No space left"), ("size=50m", "MB free"), ("ro", "cannot be written")]
)
def test_a_full_or_read_only_results_folder_is_rejected_before_sbatch(slurm, options, words):
    slurm.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(slurm.root)], check=True)
    try:
        output = slurm("submit", *ONE, code=2)
    finally:
        subprocess.run(["umount", str(slurm.root)], check=True)
    assert words in output
    assert "--results" in output


WRAPPED = """#!/bin/sh
echo "*** Welcome | the scratch disk is 90% full | call 100|RUNNING|1 ***"
[ ! -e {folder}/down ] || {{ echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }}
echo "CLUSTER: loopback"
exec {squeue} "$@"
"""


def test_a_squeue_with_a_banner_that_cannot_be_asked_for_a_while(slurm, uninterrupted, tmp_path):
    """Also in the job, which is asked to end while squeue does not answer; times are in an unusual format."""
    wrapped = tmp_path / "squeue"
    wrapped.write_text(WRAPPED.format(folder=tmp_path, squeue=shutil.which("squeue")))
    wrapped.chmod(0o755)
    plain, odd = slurm.cluster, copy.copy(slurm.cluster)
    changes = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_TIME_FORMAT": "%s|%A", "SQUEUE_FORMAT": "%T"}
    odd.environment = {**plain.environment, **changes}
    slurm.cluster = odd
    slurm("submit", *LONG)
    slurm.until_it_trains()
    (tmp_path / "down").touch()
    plain("scancel", "--signal=USR2", slurm.job())
    slurm.until(lambda: len(slurm.sessions()[0]) == 2)
    assert "Unable to contact" in slurm("status", *LONG)
    (tmp_path / "down").unlink()
    shown = slurm("status", *LONG)
    assert "1 running." in shown or "1 done." in shown
    assert "squeue printed a line that is no job, which is ignored: *** Welcome | the scratch disk" in shown
    slurm.assert_resumed([0, 1], uninterrupted)


def _python_of(slurm: Command, rank: str = "0") -> int:
    """The training process of the last submission's first task; SLURM_CONF excludes other clusters' equal job ids."""
    job, conf = slurm.job(), slurm.cluster.environment["SLURM_CONF"]
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
            command = (folder / "cmdline").read_bytes() if environment else b""
        except OSError:
            continue
        variables = (f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", f"SLURM_CONF={conf}")
        mine = {text.encode() for text in variables} <= set(environment)
        if mine and b"submitit.core._submit" in command and b"srun" not in command:
            return int(folder.name)
    raise AssertionError(f"no process of job {job}")
