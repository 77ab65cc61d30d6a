"""Submissions without Slurm: resources, packing, scripts, the site's file, and errors."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from experiments import bert_glue, resnet_cifar, wrn_cifar
from experiments.harness.runs import catalogue
from experiments.harness.runs.estimate import Estimate, gpu_hours, load_estimate
from experiments.harness.runs.provenance import ROOT, code_hash
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import SpecError
from slurm import scheduler, site
from slurm.__main__ import Runs
from slurm.resources import ENCODER, SIGNAL_SECONDS, WIDE_RESNET, resources
from slurm.scheduler import SlurmError
from slurm.standings import standings
from slurm.submission import alone, arrays, script, snapshot
from tests.commands import command

NOTHING = Estimate({}, {})


def call(*arguments, path="/"):
    return command("slurm", *arguments, PATH=path, HOME="/nowhere")


@pytest.mark.parametrize("profile", ["smoke", "cpu"])
@pytest.mark.parametrize("table", ["table1", "table2"])
def test_small_profiles_request_one_core_and_two_gigabytes(table, profile):
    for spec in catalogue.runs(table, profile):
        requested = resources(spec, NOTHING)
        assert (requested.gpus, requested.cpus) == (0, 1)
        assert requested.memory_gb <= 2


def test_paper_runs_request_a_gpu_and_have_an_estimate():
    for table in ("table1", "table2"):
        for spec in catalogue.runs(table, "paper"):
            assert resources(spec, NOTHING).gpus == 1
            assert gpu_hours(spec, NOTHING) > 0
    assert resources(wrn_cifar.PAPER, NOTHING) == WIDE_RESNET
    assert resources(bert_glue.PAPER, NOTHING) == ENCODER


def test_measured_times_set_the_time_limit(tmp_path):
    spec = resnet_cifar.SMOKE
    record = record_of(spec, tmp_path)
    record.create(spec)
    record.finish({"wall_seconds": 1200.0})
    assert resources(spec, load_estimate(tmp_path)).minutes == 60  # twice 20 minutes plus the minimum, rounded up
    assert resources(spec, load_estimate(tmp_path), minutes=7).minutes == 7


def test_runs_are_packed_into_arrays_of_limited_size():
    specs = catalogue.runs("linear_cifar", "smoke", 25)
    packed = arrays(specs, NOTHING, largest=4, runs_per_job=3)
    assert [len(array.jobs) for array in packed] == [4, 4, 1]
    assert [spec for array in packed for job in array.jobs for spec in job] == specs
    assert all(len(job) <= 3 for array in packed for job in array.jobs)
    assert packed[0].size.minutes == 3 * resources(specs[0], NOTHING).minutes


def test_runs_with_different_resources_are_in_different_arrays():
    specs = [resnet_cifar.PAPER, bert_glue.PAPER, replace(resnet_cifar.PAPER, seed=1)]
    assert [array.jobs for array in arrays(specs, NOTHING)] == [((specs[0],), (specs[2],)), ((specs[1],),)]


def test_ranks_are_processes_with_a_gpu_each(tmp_path):
    spec = replace(resnet_cifar.PAPER, rho=0.1, micro_batches=8, ranks=8)
    (array,) = arrays([spec], NOTHING, nodes=2)
    text = script(array, tmp_path, site.Site())
    for flag in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", f"signal=USR2@{SIGNAL_SECONDS}", "requeue"):
        assert f"#SBATCH --{flag}\n" in text
    assert "--kill-on-bad-exit=1" in text
    assert f"#SBATCH --mem={4 * 16 * 1024}MB\n" in text
    with pytest.raises(SlurmError, match="nodes is 3"):
        arrays([spec], NOTHING, nodes=3)


def test_only_the_sites_file_puts_site_options_into_a_script(tmp_path):
    (array,) = arrays([resnet_cifar.PAPER], NOTHING)
    bare = script(array, tmp_path, site.Site())
    for word in ("partition", "account", "qos", "constraint", "wckey", "module", "gres"):
        assert word not in bare
    (tmp_path / "site.toml").write_text(
        'partition = "gpu"\naccount = "mine"\nconstraint = "a100"\ngpus_through = "gres"\n'
        'modules = ["python/3.11"]\nsetup = ["export NCCL_DEBUG=WARN"]\n'
    )
    text = script(array, tmp_path, site.read(tmp_path / "site.toml", partition="other"))
    for line in (
        "#SBATCH --partition=other",
        "#SBATCH --account=mine",
        "#SBATCH --gres=gpu:1",
        "module load python/3.11",
    ):
        assert f"{line}\n" in text
    assert text.index("module load") < text.index("NCCL_DEBUG") < text.index("srun")
    assert "gpus-per-node" not in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("partitoin = 'gpu'", "unknown setting 'partitoin'"),
        ("modules = 'python'", "modules must be a list of strings"),
        ("partition = 3", "partition must be a string"),
        ("gpus_through = 'magic'", "gpus_through must be"),
        ("partition = ", "cannot be read"),
    ],
)
def test_a_wrong_site_file_is_rejected_with_the_reason(tmp_path, content, words):
    (tmp_path / "site.toml").write_text(content)
    with pytest.raises(SpecError, match=words):
        site.read(tmp_path / "site.toml")


def test_a_missing_site_file_is_an_error_only_if_it_was_named(tmp_path, monkeypatch):
    with pytest.raises(SpecError, match="cannot be read"):
        site.read(tmp_path / "site.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert site.read() == site.Site()
    (tmp_path / ".config" / "msam").mkdir(parents=True)
    (tmp_path / ".config" / "msam" / "slurm.toml").write_text('qos = "long"')
    assert site.read().flags == {"qos": "long"}
    monkeypatch.setenv("MSAM_SLURM_SITE", str(tmp_path / "other.toml"))
    (tmp_path / "other.toml").write_text('qos = "short"')
    assert site.read().flags == {"qos": "short"}


def test_without_slurm_the_error_names_the_local_command(tmp_path):
    done = call("submit", "table1", "--profile", "smoke", "--results", tmp_path)
    assert done.returncode == 2
    assert "no Slurm" in done.stderr
    assert f"python -m slurm submit table1 --profile smoke --results {tmp_path} --cluster local" in done.stderr
    assert not list(tmp_path.iterdir())
    assert "use a machine of the cluster" in call("cancel", "table1", "--results", tmp_path).stderr


def test_cluster_local_trains_like_the_main_command(tmp_path):
    words = ("submit", "linear_cifar", "--profile", "smoke", "--seeds", "1")
    done = command("slurm", *words, "--cluster", "local", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Training 1 runs" in done.stdout
    assert record_of(catalogue.runs("linear_cifar", "smoke", 1)[0], tmp_path).done


def test_a_dry_run_needs_no_slurm_and_writes_nothing(tmp_path):
    done = call("submit", "table1", "--profile", "paper", "--dry-run", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GPU-hours" in done.stdout
    assert not list(tmp_path.iterdir())
    assert "#SBATCH --exclusive" not in done.stdout


def test_timing_runs_request_a_whole_node(tmp_path):
    done = call("submit", "table4", "--profile", "cpu", "--dry-run", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --exclusive") == done.stdout.count("#SBATCH --array") > 0
    assert "#SBATCH --cpus-per-task=2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "2"), "use no GPU"),
        (("--gpus", "0"), "gpus is 0"),
        (("--runs-per-job", "0"), "runs-per-job is 0"),
        (("--parallelism", "-1"), "parallelism is -1"),
        (("--minutes", "2"), "minutes is 2"),
        (("--profile", "huge"), "Unknown profile"),
        (("--set", "rho=-1"), "rho is -1"),
    ],
)
def test_mistakes_end_in_a_sentence_and_status_2(tmp_path, arguments, words):
    done = call("submit", "table1", *arguments, "--results", tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("words", [["submit", "table1", "--dry-run"], ["status", "table1"]], ids=" ".join)
def test_submitting_and_status_do_not_import_torch(tmp_path, words):
    code = (
        "import sys\n"
        "from slurm.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'pandas'} & set(sys.modules), 'imported'"
    )
    options = [*words, "--profile", "paper", "--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], cwd=ROOT, env={"PATH": "/"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_snapshot_is_the_training_code_and_is_copied_once(tmp_path):
    folder = snapshot(tmp_path)
    code = "from experiments.harness.runs.provenance import code_hash; print(code_hash())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code_hash()
    before = (folder / "msam" / "gradient.py").stat().st_mtime_ns, folder.stat().st_ino
    assert snapshot(tmp_path) == folder
    assert ((folder / "msam" / "gradient.py").stat().st_mtime_ns, folder.stat().st_ino) == before
    assert list(folder.parent.iterdir()) == [folder]
    (folder / "slurm" / "job.py").unlink()
    assert snapshot(tmp_path) == folder
    assert (folder / "slurm" / "job.py").exists()


def submitted(root, specs, ids):
    folder = root / "slurm" / "20260101-000000-abcd"
    folder.mkdir(parents=True)
    submission = {"arrays": [{"name": "msam-x", "ids": ids, "runs": [[s.run_id] for s in specs]}]}
    (folder / "submission.json").write_text(json.dumps(submission))


def test_no_run_is_lost_if_the_queue_cannot_be_queried(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    specs = catalogue.runs("linear_cifar", "smoke", 3)
    submitted(tmp_path, specs[:2], ["7_0", "7_1"])
    record = record_of(specs[0], tmp_path)
    record.create(specs[0])
    record.finish({})
    assert [run.state for run in standings(specs, tmp_path)] == ["done", "submitted", "not started"]


def test_the_queue_determines_the_states_of_runs(tmp_path, monkeypatch):
    specs = catalogue.runs("linear_cifar", "smoke", 6)
    submitted(tmp_path, specs, [f"7_{i}" for i in range(6)])
    for spec in (specs[0], specs[3]):
        record_of(spec, tmp_path).create(spec)
        record_of(spec, tmp_path).fail("ValueError: no\nsuch luck")
    states = [("PENDING", "Priority"), ("RUNNING", "None"), ("OUT_OF_MEMORY", "None"), ("FAILED", "None")]
    queue = {f"7_{i}": scheduler.Job(f"7_{i}", *state) for i, state in enumerate([(s, "msam-x", r) for s, r in states])}
    monkeypatch.setattr(scheduler, "queue", lambda users: queue)
    monkeypatch.setattr(scheduler, "final_states", lambda ids: {"7_4": "NODE_FAIL"})
    runs = standings(specs, tmp_path)
    assert [run.state for run in runs] == ["queued", "running", "lost", "failed", "lost", "lost"]
    assert "Priority" in runs[0].words
    assert "OUT_OF_MEMORY" in runs[2].words
    assert runs[3].words == ": ValueError: no such luck"
    assert "NODE_FAIL" in runs[4].words
    assert "its final state is unknown" in runs[5].words


ODD_QUEUE = """\
*** Welcome to the cluster | scratch is purged | on Fridays | 100% full ***
CLUSTER: north
|msam-job|7_[0,2-3,8-12:2%4]|PENDING|msam-x-0|Priority
|msam-job|7_1|RUNNING|msam-x-0|None
|msam-job|8|RUNNING|msam-x-1|None

CLUSTER: south
|msam-job|8|PENDING|of another cluster|Resources
  |msam-job|9|COMPLETED|a|name|of|bars
|msam-job|9_[1,3,...]|PENDING|msam-x-2|Priority
|msam-job|no job
12|RUNNING|msam-x-3|None
"""
ODD_STATES = """\
Last login: Mon 1 | COMPLETED
7_0|msam-job|CANCELLED by 1000
7_0.batch|msam-job|CANCELLED
7_[1-2,4]|msam-job|COMPLETED
8|msam-job|NODE_FAIL+
9|msam-job|
10|FAILED
"""


def stand_in(folder, name, output):
    (folder / f"{name}.txt").write_text(output)
    (folder / name).write_text(f'#!/bin/sh\necho "$@" >{folder}/{name}.asked\nexec cat {folder}/{name}.txt\n')
    (folder / name).chmod(0o755)


def test_banners_clusters_and_brackets_are_read_and_the_rest_is_shown(tmp_path, monkeypatch, caplog):
    stand_in(tmp_path, "squeue", ODD_QUEUE)
    stand_in(tmp_path, "sacct", ODD_STATES)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = scheduler.queue(["me"])
    waiting = {f"7_{i}": ("PENDING", "Priority") for i in (0, 2, 3, 8, 10, 12)}
    assert {id_: (job.state, job.reason) for id_, job in jobs.items()} == {
        **waiting,
        "7_1": ("RUNNING", "None"),
        "8": ("RUNNING", "None"),
        "9": ("COMPLETED", "name|of|bars"),
    }
    assert scheduler.final_states(["7_0", "8"]) == {
        "7_0": "CANCELLED",
        **dict.fromkeys(("7_1", "7_2", "7_4"), "COMPLETED"),
        "8": "NODE_FAIL",
    }
    assert "--format=|msam-job|%i|%T|%j|%r" in (tmp_path / "squeue.asked").read_text()
    assert "--delimiter=|msam-job|" in (tmp_path / "sacct.asked").read_text()
    shown = [
        record.getMessage().partition(" printed a line that is no job, which is ignored: ") for record in caplog.records
    ]
    assert [(command, line) for command, _, line in shown] == [
        ("squeue", "*** Welcome to the cluster | scratch is purged | on Fridays | 100% full ***"),
        ("squeue", "|msam-job|9_[1,3,...]|PENDING|msam-x-2|Priority"),
        ("squeue", "|msam-job|no job"),
        ("squeue", "12|RUNNING|msam-x-3|None"),
        ("sacct", "Last login: Mon 1 | COMPLETED"),
        ("sacct", "9|msam-job|"),
        ("sacct", "10|FAILED"),
    ]


def test_one_job_is_found_below_a_banner_and_no_answer_is_not_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stand_in(tmp_path, "squeue", "*** RUNNING ***\nCLUSTER: north\n|msam-job|COMPLETING\n")
    assert scheduler.state_of_job("7") == "COMPLETING"
    stand_in(tmp_path, "squeue", "*** RUNNING ***\nCLUSTER: north\n")
    assert scheduler.state_of_job("7") == ""
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert scheduler.state_of_job("7") is None


def test_the_largest_array_is_read_from_whatever_is_around_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    stand_in(tmp_path, "sbatch", "")
    stand_in(tmp_path, "scontrol", "Welcome\nMaxArraySize of all\nMaxArraySize            = 501\nMaxArraySize = 1001\n")
    assert scheduler.largest_array() == 501


def test_submissions_exclude_each_other_and_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlurmError, match="--results"), alone(tmp_path / "file"):
        pass
    with alone(tmp_path):
        code = (
            "import sys; from pathlib import Path; from slurm.submission import alone\n"
            "print('ready', flush=True)\n"
            "with alone(Path(sys.argv[1])): print('in', flush=True)"
        )
        words = [sys.executable, "-c", code, str(tmp_path)]
        other = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
    assert other.communicate(timeout=120)[0] == "in\n"


def test_the_command_that_is_shown_selects_the_same_runs(tmp_path):
    chosen = {"set": ("epochs=2",), "where": ("model=resnet8", "method='a b'"), "unpublished": True}
    words = Runs("table1", "smoke", seeds=1, results=tmp_path, **chosen).command("status")
    shown = "--set epochs=2 --where model=resnet8 --where 'method='\"'\"'a b'\"'\"'' --unpublished"
    assert words == f"python -m slurm status table1 --profile smoke --seeds 1 {shown} --results {tmp_path}"
