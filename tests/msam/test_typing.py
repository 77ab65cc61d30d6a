"""mypy and pyright accept a user's script, and reject each line of it that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import msam
from tests import needs

SCRIPT = """
import torch
from torch import Tensor, nn

import msam

model = nn.Linear(3, 1)
scaler = torch.amp.GradScaler("cpu")


def loss_fn(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(part[0]).square().mean(), torch.tensor(len(part[1]))


batch = torch.zeros(4, 3), torch.zeros(4)
step: msam.Step = msam.backward(loss_fn, batch, model, rho=0.1, micro_batches=2, scaler=scaler)
loss = msam.loss(loss_fn, batch, model, rho=torch.tensor(0.1), micro_batches=2, shared=True, passes="loop")
scaled: Tensor = loss / 2
scaled.backward()
sharpness: Tensor = loss.step.sharpness
found: msam.Diagnosis = msam.diagnose(loss_fn, batch, model, rho=0.1, perturb=lambda name: name != "bias")
on: bool = found.on

msam.loss(loss_fn, batch, model)  # wrong: no rho
msam.loss(loss_fn, batch, model, rho="0.1")  # wrong: a string
msam.loss(loss_fn, batch, model, rho=0.1, micro_batch=2)  # wrong: no such option
msam.loss(loss_fn, batch, model, rho=0.1, shared="ranks")  # wrong: the loop reduces
msam.loss(loss_fn, batch, model, rho=0.1, passes="side by side")  # wrong: no such way
msam.loss(lambda part: "loss", batch, model, rho=0.1)  # wrong: no tensor
msam.loss(loss_fn, batch, "model", rho=0.1)  # wrong: no module
msam.diagnose(loss_fn, batch, model, rho=0.1, perturb="bias")  # wrong: no function
msam.backward(loss_fn, batch, model, rho=None)  # wrong: no number
number: int = loss.step.loss  # wrong: a tensor
"""


WRONG = {number for number, line in enumerate(SCRIPT.splitlines(), start=1) if "# wrong" in line}


@pytest.mark.rare
def test_mypy_rejects_the_wrong_lines_and_no_others(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "msam").symlink_to(Path(msam.__file__).parent)  # mypy doesn't see an editable installation
    flags = ["--strict", "--allow-untyped-calls", "--no-error-summary", "--config-file="]  # torch's backward is untyped
    done = checked([sys.executable, "-m", "mypy", *flags, "train.py"], tmp_path)
    assert not done.stderr
    errors = [line.split(":") for line in done.stdout.splitlines() if ": error:" in line]
    assert {int(number) for file, number, *_ in errors if file == "train.py"} == WRONG


@pytest.mark.rare
@pytest.mark.needs("npm")
def test_pyright_rejects_the_wrong_lines_and_no_others(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(Path(msam.__file__).parents[1])]}))
    done = checked(["npx", "--yes", "pyright", "--pythonpath", sys.executable, "--outputjson"], tmp_path)
    if not done.stdout:
        needs.unavailable("npm", f"npm could not install pyright: {done.stderr[-200:]}")
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert {one["range"]["start"]["line"] + 1 for one in found if one["severity"] == "error"} == WRONG


def checked(command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
