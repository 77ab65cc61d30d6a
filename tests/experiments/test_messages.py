"""What a user reads after a mistake, word for word, and nothing is set up, fetched or written first."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.harness.runs import catalogue
from experiments.harness.runs.checks import PROFILES
from experiments.harness.runs.run import names
from tests.commands import command

ROOT = Path(__file__).parents[2]
COMMANDS = "list, plan, fetch, run, status, check, show, verify, export, import, tensorboard, clean"


def call(*words):
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "experiments plan tabel1",
            "Unknown experiment or table 'tabel1': did you mean table1? All of them: "
            f"{', '.join(catalogue.targets())}.",
        ),
        (
            "experiments plan table1 --profile smoek",
            f"Unknown profile 'smoek': did you mean smoke? All of them: {', '.join(PROFILES)}.",
        ),
        (
            "experiments plan table1 --set epoch=3",
            f"Unknown field 'epoch': did you mean epochs? All of them: {', '.join(names())}.",
        ),
        ("experiments plann table1", f"Unknown command 'plann': did you mean plan? All of them: {COMMANDS}."),
        ("experiments", f"Say what to do: python -m experiments COMMAND, with one of the commands {COMMANDS}."),
        (
            "experiments plan",
            "TARGET is missing: python -m experiments plan TARGET, as in python -m experiments plan table1.",
        ),
        (
            "experiments plan table1 --seeds abc",
            "--seeds is 'abc', but must be a whole number. `python -m experiments plan --help` lists the options.",
        ),
        (
            "experiments run table1 --profil smoke",
            "Unknown option --profil: did you mean --profile? `python -m experiments run --help` lists the options.",
        ),
        (
            "experiments run table1 smoke",
            "'smoke' is one word too many: a value follows the name of its option, as in --profile smoke. "
            "`python -m experiments run --help` lists the options.",
        ),
        (
            "experiments run table1 --data-root",
            "--data-root needs a value. `python -m experiments run --help` lists the options.",
        ),
        (
            "slurm submit table1 --cluster pbs",
            "--cluster is 'pbs', but must be one of slurm, local. `python -m slurm submit --help` lists the options.",
        ),
        (
            "slurm submit table1 --sit x",
            "Unknown option --sit: did you mean --site? `python -m slurm submit --help` lists the options.",
        ),
        (
            "analysis --seeds abc",
            "--seeds is 'abc', but must be a whole number. `python -m analysis --help` lists the options.",
        ),
        (
            "analysis --publsh",
            "Unknown option --publsh: did you mean --publish? `python -m analysis --help` lists the options.",
        ),
        (
            "experiments run linear_cifar --data-root /no/where",
            "The folder /no/where, given by --data-root, does not exist; it was searched for cifar10 as "
            "cifar-10-batches-py/ or cifar-10-python.tar.gz or data_batch_1 or cifar10.npz. Correct it, or leave it "
            "out.",
        ),
    ],
)
def test_a_wrong_command_line_is_answered_in_the_projects_words(words, message):
    done = command(*words.split())
    assert (done.stderr, done.stdout, done.returncode) == (f"{message}\n", "", 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("PROFILE=big", f"PROFILE is 'big', but must be one of: {' '.join(PROFILES)}"),
        ("SEEDS=x", "SEEDS is 'x', but must be a whole number of 1 or more"),
        ("SEEDS=0", "SEEDS is '0', but must be a whole number of 1 or more"),
        ("JOBS=-2", "JOBS is '-2', but must be a whole number of 1 or more"),
    ],
)
def test_make_rejects_a_setting_before_any_set_up(setting, message):
    done = call("make", "--no-print-directory", "reproduce-table1", setting)
    assert done.returncode == 2
    assert done.stderr.partition("*** ")[2] == f"{message}.  Stop.\n"
    assert done.stdout == ""
    good = call("make", "-n", "reproduce-table1", f"PROFILE={PROFILES[-1]}", "SEEDS=12", "JOBS=1")
    assert good.returncode == 0, good.stderr


def test_a_data_root_without_any_of_the_sets_says_what_was_looked_for(tmp_path):
    (tmp_path / "mnist").mkdir()
    done = command("experiments", "fetch", "table1", "--profile", "smoke", "--data-root", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        f"The folder {tmp_path}, given by --data-root, has none of the data sets. It was searched for cifar10 as "
        "cifar-10-batches-py/ or cifar-10-python.tar.gz or data_batch_1 or cifar10.npz. Correct it, or leave it out to "
        "use the cache or a download.\n"
    )


def test_an_msam_data_that_does_not_exist_is_an_error_and_one_that_lacks_the_set_is_one_line(tmp_path):
    words = ("experiments", "fetch", "linear_cifar", "--profile", "smoke")
    absent = command(*words, MSAM_DATA="/no/where")
    assert absent.returncode == 2
    assert absent.stderr == (
        "The folder /no/where, given by MSAM_DATA, does not exist; it was searched for cifar10 as cifar-10-batches-py/ "
        "or cifar-10-python.tar.gz or data_batch_1 or cifar10.npz. Correct it, or leave it out.\n"
    )
    lacking = command(*words, MSAM_DATA=str(tmp_path))
    assert lacking.returncode == 0
    assert lacking.stderr == f"{tmp_path} does not have CIFAR-10: trying the cache, then the network.\n"


@pytest.mark.parametrize("package", ["experiments", "analysis", "slurm"])
def test_a_python_that_is_too_old_says_what_is_needed(package):
    done = call(sys.executable, "-c", f"import sys; sys.version_info = (3, 10, 4); import {package}")
    assert done.returncode == 2
    assert done.stderr == (
        "Python 3.11 or newer is needed, but this is Python 3.10: use .venv/bin/python, which `make setup` builds.\n"
    )
