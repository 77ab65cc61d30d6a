"""What is shipped, what is pinned, and what `make` does before anything else runs.

The set-up script runs here in a copy of its own files. Where it must get past pip, a stand-in interpreter
plays Python: it answers questions about itself, and writes down what pip was asked to do.
"""

import ast
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.dependency_groups import resolve_dependency_groups
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = PYPROJECT["project"], PYPROJECT["dependency-groups"]
LOCKED = [name for name in GROUPS if name != "recipes"]  # which have an environment of their own
DIRECT = [Requirement(text) for text in (*PROJECT["dependencies"], *resolve_dependency_groups(GROUPS, *LOCKED))]
"""What the library and the folders of this checkout ask for."""

PINS = [
    Requirement(line.split("  #")[0])
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]

STAND_IN = """#!/bin/sh
case "$*" in
"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >>calls ;;
"-m pip "*)
    echo "pip $*" >>calls
    sleep "${PIP_SECONDS:-0}"
    [ ! -e pip-fails ] || { cat pip-fails; exit 1; } ;;
*) case "$*" in *version_info*) echo 3.11 ;; esac ;;
esac
"""


def surroundings(**variables):
    """An environment of PATH, HOME and these variables: nothing of the make that runs the tests."""
    return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | variables


def make(folder, *arguments, **variables):
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=surroundings(**variables),
        capture_output=True,
        text=True,
        timeout=60,
    )


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def copy(tmp_path):
    """A folder with what `make setup` reads, and a stand-in for Python."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock", ".ci/setup"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    executable(tmp_path / "python", STAND_IN)
    return tmp_path


def calls(folder):
    """What set-up has asked for: "venv", "pip ... -r requirements.lock", "pip ... --editable ."."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def assert_refuses(result, *words):
    """It fails with one line of our own that says `words`, and no traceback."""
    assert result.returncode != 0
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("setup: ")]
    for word in words:
        assert word in sentence
    assert "Traceback" not in result.stderr + result.stdout


# What is shipped


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built offline from a copy, so that no build folder is left here."""
    source = tmp_path_factory.mktemp("source")
    for name in ("msam", "experiments", "analysis", "slurm", "tests/msam"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*command, "--wheel-dir", "dist", "."], cwd=source, check=True, capture_output=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_wheel_holds_msam_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"msam", f"msam_torch-{PROJECT['version']}.dist-info"}
    assert {"msam/__init__.py", "msam/py.typed"} <= set(names)
    sources = {*(ROOT / "msam").rglob("*.py"), ROOT / "msam" / "py.typed"}
    assert {n for n in names if n.startswith("msam/")} == {path.relative_to(ROOT).as_posix() for path in sources}


def test_wheel_requires_torch_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    required = [Requirement(r) for r in Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")]
    assert [r.name for r in required] == ["torch"]


def test_only_msam_is_installed(tmp_path):
    code = "import importlib.util as u; print(*map(u.find_spec, ['experiments', 'analysis', 'slurm']))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["None"] * 3


@pytest.mark.parametrize("path", sorted((ROOT / "msam").rglob("*.py")), ids=lambda p: p.name)
def test_msam_imports_torch_and_the_standard_library_alone(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("msam" if node.level else node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= {"torch", "msam"}


# What is pinned


def test_lock_pins_everything_once():
    assert len(PINS) > 50
    for pin in PINS:
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
        assert pin.url is None, pin
    assert len({pin.name for pin in PINS}) == len(PINS)


def test_lock_meets_pyproject():
    pinned = {pin.name: pin for pin in PINS}
    for requirement in DIRECT:
        (version,) = pinned[requirement.name].specifier
        assert version.version in requirement.specifier, requirement


def test_lock_is_made_from_every_group():
    assert "uv pip compile pyproject.toml --group dev " in (ROOT / "Makefile").read_text()
    assert set(resolve_dependency_groups(GROUPS, "dev")) == set(resolve_dependency_groups(GROUPS, *LOCKED))


@pytest.mark.parametrize(
    ("platform", "machine", "has_cuda"),
    [("linux", "x86_64", True), ("linux", "aarch64", True), ("darwin", "arm64", False)],
)
@pytest.mark.parametrize("python", ["3.11", "3.14"])
def test_lock_asks_each_platform_for_what_it_has(platform, machine, has_cuda, python):
    markers = default_environment() | {
        "sys_platform": platform,
        "platform_machine": machine,
        "platform_system": platform.title(),
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    names = {pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate(markers)}
    assert {"torch", "torchvision"} <= names
    assert any(name.startswith("nvidia-") for name in names) == has_cuda
    assert ("triton" in names) == has_cuda


def test_lock_and_environment_name_no_registry():
    for name in ("requirements.lock", "environment.yml", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert "index-url" not in text
        assert "://" not in text


def test_environment_yml_pins_what_the_lock_pins():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (lines,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    listed = {r.name: str(r.specifier) for r in map(Requirement, (n for n in lines if not n.startswith("-")))}
    direct = {requirement.name for requirement in DIRECT}
    assert listed == {pin.name: str(pin.specifier) for pin in PINS if pin.name in direct}
    assert "python=3.11" in dependencies


# What make says


def test_help_is_the_map():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, flags=re.MULTILINE))
    assert {"help", "setup", "test", "lint", "format", "reproduce-table1", "tune-table1", "tables"} <= targets
    result = make(ROOT)
    assert result.returncode == 0
    assert set(re.findall(r"^  make (\S+) +\S", result.stdout, flags=re.MULTILINE)) == targets
    declared = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert set(declared[1].split()) == targets
    for variable in re.findall(r"^([A-Z]+) \?=", makefile, flags=re.MULTILINE):
        assert f"  {variable}=" in result.stdout


def test_variables_reach_the_commands():
    plain = make(ROOT, "-n", "reproduce-table1").stdout
    assert 'experiments run table1 --profile "cpu" ' in plain
    assert not re.search("--(seeds|jobs|results)", plain)
    variables = ["PROFILE=smoke", "SEEDS=4", "JOBS=3", "RESULTS=/my results"]
    given = make(ROOT, "-n", "reproduce-table1", *variables).stdout
    run, analysis = re.findall(r" -m ([^|]*) \|\|", given)
    shared = ["table1", "--profile", "smoke", "--seeds", "4", "--results", "/my results"]
    assert shlex.split(run) == ["experiments", "run", *shared, "--jobs", "3"]
    assert shlex.split(analysis) == ["analysis", *shared]


@pytest.mark.parametrize("failing", ["experiments", "analysis", "neither"])
def test_the_table_is_written_although_a_run_failed(copy, failing):
    assert make(copy, "setup", f"PYTHON={copy}/python").returncode == 0
    executable(copy / ".venv/bin/python", f'#!/bin/sh\necho "$2" >>calls\necho 3.11\n[ "$2" != {failing} ]\n')
    result = make(copy, "reproduce-table1")
    assert calls(copy)[-2:] == ["experiments", "analysis"]
    assert (result.returncode == 0) == (failing == "neither")


# Set-up


def processor_seconds():
    """Of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_setup_happens_once(copy):
    begun = processor_seconds()
    first = make(copy, "setup", f"PYTHON={copy}/python")
    with_stand_ins = processor_seconds() - begun
    assert first.returncode == 0, first.stderr
    venv, lock, project = calls(copy)
    assert venv == "venv"
    assert lock.endswith("-r requirements.lock")
    assert project.endswith("--no-deps --no-build-isolation --editable .")
    (copy / "Makefile").touch()
    (copy / "requirements.lock").touch()
    begun = processor_seconds()
    for arguments in [(), (f"PYTHON={copy}/python",)]:
        again = make(copy, "setup", *arguments)
        assert (again.returncode, again.stdout) == (0, "")
    assert (processor_seconds() - begun) / 2 < with_stand_ins
    assert len(calls(copy)) == 3


def test_a_changed_lock_brings_venv_up_to_date(copy):
    make(copy, "setup", f"PYTHON={copy}/python")
    with open(copy / "requirements.lock", "a") as file:
        file.write("six==1.17.0\n")
    assert make(copy, "setup").returncode == 0
    assert [call.split()[0] for call in calls(copy)] == ["venv", "pip", "pip", "pip", "pip"]


def test_an_interrupted_setup_is_begun_again(copy):
    make(copy, "setup", f"PYTHON={copy}/python")
    (copy / ".venv/.setup-hash").unlink()
    (copy / ".venv/half-installed").touch()
    assert make(copy, "setup", f"PYTHON={copy}/python").returncode == 0
    assert not (copy / ".venv/half-installed").exists()
    assert calls(copy).count("venv") == 2


def test_a_moved_checkout_is_set_up_again(copy, tmp_path_factory):
    make(copy, "setup", f"PYTHON={copy}/python")
    moved = copy.rename(tmp_path_factory.mktemp("elsewhere") / "moved")
    assert make(moved, "setup", f"PYTHON={moved}/python").returncode == 0
    assert calls(moved).count("venv") == 2


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("shared", ["link to it", "link to a third place"])
def test_a_venv_that_was_built_for_another_checkout_is_never_emptied(copy, tmp_path_factory, shared, interrupted):
    first, second = copy, tmp_path_factory.mktemp("second") / "checkout"
    shutil.copytree(first, second)
    if shared != "link to it":
        (first / ".venv").symlink_to(tmp_path_factory.mktemp("disk"))
    if interrupted:
        (first / "pip-fails").write_text("The computer was switched off.")
    make(first, "setup", f"PYTHON={first}/python")
    (first / ".venv/precious").touch()
    (second / ".venv").symlink_to(first / ".venv" if shared == "link to it" else (first / ".venv").readlink())
    before = sorted((first / ".venv").rglob("*"))
    result = make(second, "setup", f"PYTHON={second}/python")
    assert_refuses(result, f"{second}/.venv is a link to ", f"built for {first} and stays as it is", "rm .venv")
    assert sorted((first / ".venv").rglob("*")) == before
    (second / ".venv").unlink()
    assert make(second, "setup", f"PYTHON={second}/python").returncode == 0
    assert (first / ".venv/precious").exists()


def test_a_linked_venv_is_built_again_when_the_other_checkout_is_gone(copy, tmp_path_factory):
    disk, second = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("second") / "checkout"
    (copy / ".venv").symlink_to(disk)
    make(copy, "setup", f"PYTHON={copy}/python")
    copy.rename(second)
    assert make(second, "setup", f"PYTHON={second}/python").returncode == 0
    assert (disk / ".setup-hash").read_text().splitlines()[1] == str(second)


@pytest.mark.needs("mount")
def test_a_venv_mounted_into_two_checkouts_is_never_emptied_for_the_other(copy, tmp_path_factory):
    second = tmp_path_factory.mktemp("second") / "checkout"
    shutil.copytree(copy, second)
    make(copy, "setup", f"PYTHON={copy}/python")
    (copy / ".venv/precious").touch()
    (second / ".venv").mkdir()
    subprocess.run(["mount", "--bind", copy / ".venv", second / ".venv"], check=True)
    try:
        assert_refuses(make(second, "setup", f"PYTHON={second}/python"), f"also the .venv of {copy}", "does not share")
        assert (copy / ".venv/precious").exists()
    finally:
        subprocess.run(["umount", second / ".venv"], check=True)


@pytest.mark.needs("flock")
def test_two_terminals_set_up_once(copy):
    terminal = {"cwd": copy, "env": surroundings(PIP_SECONDS="0.5"), "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(["make", "setup", f"PYTHON={copy}/python"], **terminal) for _ in range(2)]
    output = "".join(process.communicate(timeout=30)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert len(calls(copy)) == 3
    assert output.count("Set up in") == 1


def test_a_venv_of_ones_own_is_left_alone(copy):
    (copy / ".venv").mkdir()
    (copy / ".venv/mine").touch()
    assert_refuses(make(copy, "setup", f"PYTHON={copy}/python"), "mv .venv", "make again")
    assert [path.name for path in (copy / ".venv").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 3.9", ["Python 3.9", "3.11"]),
        ("echo 'pyenv: python3.12: command not found' >&2; exit 127", ["no working Python"]),
        ('case "$*" in *ensurepip*) exit 1 ;; *) echo 3.11 ;; esac', ["no venv module", "python3-venv"]),
    ],
)
def test_setup_refuses_a_wrong_python(copy, script, words):
    executable(copy / "wrong", f"#!/bin/sh\n{script}\n")
    assert_refuses(make(copy, "setup", f"PYTHON={copy}/wrong"), *words, "make PYTHON=")
    assert not (copy / ".venv").exists()


def test_setup_says_when_there_is_no_python(copy):
    tools = copy / "tools"
    tools.mkdir()
    for name in ("make", "sh", "dirname", "cat", "ls"):
        (tools / name).symlink_to(shutil.which(name))
    assert_refuses(make(copy, "setup", PATH=str(tools)), "No Python 3.11", "make PYTHON=")


def test_setup_refuses_a_small_disk(copy):
    tools = copy / "tools"
    tools.mkdir()
    executable(tools / "df", "#!/bin/sh\nprintf 'Filesystem\\nd 9 9 1500000 9%% /\\n'\n")
    path = f"{tools}:{os.environ['PATH']}"
    assert_refuses(make(copy, "setup", f"PYTHON={copy}/python", PATH=path), "1 GB free", "are needed")
    assert calls(copy) == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ERROR: [Errno 28] No space left on device", ["disk was full"]),
        ("ERROR: no such option: --editable", ["end of .venv/setup.log"]),
    ],
)
def test_setup_says_why_pip_failed(copy, said, words):
    (copy / "pip-fails").write_text(said)
    assert_refuses(make(copy, "setup", f"PYTHON={copy}/python"), *words, "make again")
    assert not (copy / ".venv/.setup-hash").exists()
    (copy / "pip-fails").unlink()
    assert make(copy, "setup", f"PYTHON={copy}/python").returncode == 0


def test_setup_says_when_there_is_no_network(copy):
    # Port 9 of this machine, where nobody listens, for a registry, and none of the user's settings of pip.
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0"}
    result = make(copy, "setup", f"PYTHON={sys.executable}", **offline)
    assert_refuses(result, "connect to the network", "make again", ".venv/setup.log")
    assert not (copy / ".venv/.setup-hash").exists()


# The libraries of the recipes

LAYERED = """#!/bin/sh
case "$*" in
*"-m venv "*) mkdir -p .venv/integrations/bin && cp "$0" .venv/integrations/bin/python ;;
*"-m pip "*) echo "$@" >>calls; [ ! -e pip-fails ] || { cat pip-fails; exit 1; } ;;
"-c "*) echo . ;;
*) echo "$@" >>calls ;;
esac
"""


@pytest.fixture
def recipes(tmp_path):
    """A folder with what `make test-integrations` reads once .venv is there, and a stand-in for Python."""
    for name in ("pyproject.toml", "requirements.lock", ".ci/integrations"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    executable(tmp_path / ".venv/bin/python", LAYERED)
    return tmp_path


def integrations(folder):
    return subprocess.run([".ci/integrations"], cwd=folder, capture_output=True, text=True, timeout=60)


def test_the_recipes_libraries_are_installed_once(recipes):
    assert integrations(recipes).returncode == 0
    pip, table, tests = calls(recipes)
    assert "--constraint requirements.lock" in pip
    assert table == "-m tests.integrations"
    assert tests.startswith("-m pytest")
    assert integrations(recipes).returncode == 0
    assert calls(recipes)[3:] == [table, tests]


def test_the_recipes_are_skipped_with_the_reason_without_a_network(recipes):
    (recipes / "pip-fails").write_text("ERROR: Could not find a version (from versions: none)")
    result = integrations(recipes)
    assert result.returncode == 0
    assert "Skipped: " in result.stdout
    assert "network" in result.stdout
    assert len(calls(recipes)) == 1
    (recipes / "pip-fails").write_text("ERROR: something else")
    assert integrations(recipes).returncode == 1
