"""mypy accepts a user's script, and rejects each line of it that is wrong."""

import subprocess
import sys

import pytest

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


@pytest.mark.rare
def test_mypy_rejects_the_wrong_lines_and_no_others(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--allow-untyped-calls",
        "--no-error-summary",
        "--config-file=",
        "train.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    rejected = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert not done.stderr
    assert rejected == {number for number, line in enumerate(SCRIPT.splitlines(), start=1) if "# wrong" in line}
