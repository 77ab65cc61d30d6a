"""What `make package` has built, used as a stranger uses it: without this checkout, and without the suite's packages.

A virtual environment of these tests is new. It finds some packages of .venv in a folder of links: torch and what it
needs, so that they are not downloaded again, and what else a test names. The folder is not inside the environment, so
pip never removes what it holds; and pip gets no index and no settings, so it installs nothing but the wheel.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_docs import blocks

pytestmark = pytest.mark.own_target

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME = f"msam_torch-{PYPROJECT['project']['version']}"
SDIST, WHEEL = DIST / f"{NAME}.tar.gz", DIST / f"{NAME}-py3-none-any.whl"


def needed(requirements):
    """The installed distributions that meet some requirements, with all that these require in turn."""
    found, queue = {}, [Requirement(text) for text in requirements]
    seen = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if (name, frozenset(extras)) not in seen:
            seen.add((name, frozenset(extras)))
            found[name] = metadata.distribution(name)
            more = map(Requirement, found[name].requires or ())
            queue += [r for r in more if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return found.values()


def environment(folder, *requirements):
    """A virtual environment that finds torch and what meets the requirements, and holds the wheel. Its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "setuptools", cwd=folder)  # older than torch's, on 3.11
    links = folder.with_name("links")
    links.mkdir()
    for distribution in needed(["torch", *requirements]):
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(distribution.locate_file(top))
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "links.pth").write_text(f"{links}\n")
    run(python, "-m", "pip", "install", "--no-index", "--quiet", WHEEL, cwd=folder)
    return python


def run(*command, cwd):
    """A command outside this checkout, on one core, with nothing of the environment that could lead back to it."""
    ours = ("PIP_", "PYTHON", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    kept |= {"OMP_NUM_THREADS": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder, with the environment of the site's first page in venv/."""
    folder = tmp_path_factory.mktemp("home")
    environment(folder / "venv", "scikit-learn")
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution in a new folder."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(SDIST) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


def of_checkout(*folders):
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_source_distribution_is_the_library_with_its_tests(unpacked):
    held = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    written = {name for name in held if name.startswith("msam_torch.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    others = {"LICENSE", "MANIFEST.in", "pyproject.toml", "tests/conftest.py", "tests/needs.py"}
    assert held - written == of_checkout("msam", "tests/msam") | others


def test_the_wheel_says_what_it_is():
    with zipfile.ZipFile(WHEEL) as archive:
        said = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
    assert said.get_payload().strip() == (ROOT / "msam" / "README.md").read_text().strip()
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_all("Requires-Dist") == ["torch>=2.6"]
    assert said.get_all("Provides-Extra") is None
    supported = re.findall(r"3\.\d+", (ROOT / ".ci" / "setup").read_text().split("supported()")[1].split("}")[0])
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(said.get_all("Classifier")))
    assert claimed == supported


def test_its_tests_pass_without_this_checkout_and_the_suites_packages(unpacked, tmp_path):
    python = environment(tmp_path / "venv", *PYPROJECT["dependency-groups"]["test"])
    for name in ("experiments", "timm", "transformers", "scipy"):
        assert run(python, "-c", f"import importlib.util as u; print(u.find_spec({name!r}))", cwd=unpacked) == "None\n"
    which = ("-q", "-m", "not slow and not rare", "-k", "not a_fault_", "--numprocesses", "4", "--dist", "worksteal")
    printed = run(python, "-m", "pytest", *which, cwd=unpacked)
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert passed > 1000, printed


def test_first_steps(home):
    """Those of the site's first page, but for the downloads: its commands and its script, word for word."""
    page = {}
    for block in blocks(ROOT / "docs" / "index.md"):
        page.setdefault(block.language, []).append(block.code)
    (install, start), (script,) = page["sh"], page["python"]
    create, install = install.splitlines()
    assert create == "python3 -m venv venv"
    assert install.split() == ["venv/bin/pip", "install", f"./{WHEEL.name}", "scikit-learn"]
    (home / WHEEL.name).symlink_to(WHEEL)
    run(*install.split(), "--no-index", cwd=home)  # again, and scikit-learn, which is there
    (home / "first.py").write_text(script)
    printed = run(*start.split(), cwd=home)
    shares = re.findall(r"^(SGD|SAM|mSAM): ([0-9.]+)% of the test digits are right$", printed, re.MULTILINE)
    assert [name for name, _ in shares] == ["SGD", "SAM", "mSAM"]
    assert all(float(share) > 90 for _, share in shares)


# Types

SCRIPT = """\
import torch
from torch import Tensor, nn

import msam


class Net(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batch = {"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.long)}


def loss_fn(part: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(part["x"]), part["y"])


def counted(part: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return loss_fn(part), (part["y"] > 0).sum()


def with_aux(part: dict[str, Tensor]) -> msam.Output:
    return msam.Output(loss_fn(part), weight=2.0, aux={"n": 1})


step = msam.backward(loss_fn, batch, model, rho=0.05, micro_batches=4)
msam.backward(counted, batch, model, rho=0.05, adaptive=True, shared="ranks", scaler=None)
msam.backward(with_aux, None, model, rho=0.05, micro_batches=[batch, batch], passes="auto", state=[model])
loss: float = step.loss.item()
norms: Tensor | None = step.gradient_norms
rise: Tensor = step.sharpness
parts = msam.split(batch, 2)
taken = msam.capture(loss_fn, batch, model, optimizer, rho=0.05, micro_batches=2, eager=True)
after: msam.Step = taken(batch)
"""

WRONG = [
    "msam.backward(loss_fn, batch, model)",
    "msam.backward(loss_fn, batch, model, rho='0.05')",
    "msam.backward(loss_fn, batch, model, 0.05)",
    "msam.backward(loss_fn(batch), batch, model, rho=0.05)",
    "msam.backward(lambda part: 'loss', batch, model, rho=0.05)",
    "msam.backward(loss_fn, batch, model.parameters(), rho=0.05)",
    "msam.backward(loss_fn, batch, model, rho=0.05, micro_batches=2.5)",
    "msam.backward(loss_fn, batch, model, rho=0.05, passes='fast')",
    "msam.backward(loss_fn, batch, model, rho=0.05, shared='rank')",
    "msam.backward(loss_fn, batch, model, rho=0.05, microbatches=2)",
    "step.sharpnes",
    "step.loss = torch.zeros(())",
    "msam.split(batch, '2')",
    "msam.capture(loss_fn, batch, model, model, rho=0.05)",
]
"""Each is one line that a type checker must reject."""


@pytest.fixture(scope="module")
def scripts(home):
    """The user's script, right and with mistakes."""
    (home / "right.py").write_text(SCRIPT)
    (home / "wrong.py").write_text(SCRIPT + "".join(f"{line}\n" for line in WRONG))
    return ("right.py", "wrong.py")


def rejected(printed):
    """The lines of wrong.py in which a checker found an error; none may be in right.py."""
    assert "right.py" not in printed
    first = SCRIPT.count("\n") + 1
    lines = {int(number) - first for number in re.findall(r"wrong\.py:(\d+)(?::\d+)?(?: -|:) error", printed)}
    return [WRONG[line] for line in sorted(lines) if line >= 0] if min(lines) >= 0 else printed


def checked(*command, cwd):
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_mypy_accepts_a_users_script_and_rejects_mistakes(home, scripts):
    python = home / "venv" / "bin" / "python"
    command = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python, *scripts)
    assert rejected(checked(*command, cwd=home)) == WRONG


@pytest.mark.needs("npm")
def test_pyright_accepts_a_users_script_and_rejects_mistakes(home, scripts):
    run("npm", "install", "--silent", "--no-audit", "--no-fund", "pyright@1.1.414", cwd=home)
    command = ("node_modules/.bin/pyright", "--pythonpath", home / "venv" / "bin" / "python", *scripts)
    assert rejected(checked(*command, cwd=home)) == WRONG
