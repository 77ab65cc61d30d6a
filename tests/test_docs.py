"""Every example of docs/ is a whole script, and runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "msam_in_your_own_loop.md"
EXAMPLES = re.findall(
    r"^## (.+?)\n(?:(?!^## ).)*?(?:<!-- (.+?) -->\n)?```python\n(.+?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL
)


def test_the_page_has_its_examples():
    assert len(EXAMPLES) == PAGE.read_text().count("```python") == 8


def needs(how):
    """The mark of an example that says `<!-- needs PACKAGE -->`."""
    return [pytest.mark.needs(how.removeprefix("needs "))] if how.startswith("needs ") else []


@pytest.mark.parametrize(
    ("how", "code"), [pytest.param(how, code, id=title, marks=needs(how)) for title, how, code in EXAMPLES]
)
def test_example_runs(how, code, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(code)
    command = [sys.executable, str(script)]
    if how == "torchrun":
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if how == "torchrun":
        weights = re.findall(r"weights (-?[0-9.]+)", done.stdout)
        assert len(weights) == 2
        assert weights[0] == weights[1], "the replicas agree"
