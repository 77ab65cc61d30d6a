"""README and docs/: every block of code is tested, every number is that of the results, every link leads on."""

import csv
import functools
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.commands import script

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
OF_LIBRARY = ROOT / "msam" / "README.md"
CHANGELOGS = [ROOT / "CHANGELOG.md", ROOT / "msam" / "CHANGELOG.md"]
COMMITTED = ROOT / "results" / "cpu"

# Code


class Block(NamedTuple):
    page: Path
    title: str
    how: str
    """What the comment before it says: "needs PACKAGE", "torchrun", "tested by FILE", or nothing."""
    language: str
    code: str


def blocks(page):
    """The fenced blocks of a page, each with the heading above it."""
    title = ""
    parts = r"^#+ ([^\n]+)$|^(?:<!-- (.+?) -->\n)?```(\S*)\n(.*?)^```$"
    for found in re.finditer(parts, page.read_text(), re.MULTILINE | re.DOTALL):
        if found[1]:
            title = found[1]
        else:
            yield Block(page, title, found[2] or "", found[3], found[4])


BLOCKS = [block for page in (README, OF_LIBRARY, *DOCS) for block in blocks(page)]
EXAMPLES = [block for block in BLOCKS if block.language == "python" and not block.how.startswith("tested by ")]


def needs(how):
    """The mark of an example that says `<!-- needs PACKAGE -->`."""
    return [pytest.mark.needs(how.removeprefix("needs "))] if how.startswith("needs ") else []


def test_no_block_is_overlooked():
    assert sum(page.read_text().count("```") for page in (README, OF_LIBRARY, *DOCS)) == 2 * len(BLOCKS)
    assert {block.language for block in BLOCKS} <= {"python", "diff", "sh", "text", "{toctree}", "{eval-rst}"}
    assert {block.page.name for block in BLOCKS if block.language == "diff"} == {"extending.md"}  # test_extending.py
    assert len(EXAMPLES) >= 12


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.how.startswith("tested by ")], ids=lambda b: b.page.name)
def test_what_tests_a_block_reads_its_page(block):
    assert block.page.name in (ROOT / block.how.removeprefix("tested by ")).read_text()


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=f"{b.page.relative_to(ROOT)}: {b.title}", marks=needs(b.how)) for b in EXAMPLES],
)
def test_example_runs(block, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(block.code)
    if block.how != "torchrun":
        done = script(path)
        assert done.returncode == 0, done.stderr
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        weights = re.findall(r"weights (-?[0-9.]+)", done.stdout)
        assert len(weights) == 2
        assert weights[0] == weights[1], "the replicas agree"


def test_recipes_are_python_that_uses_msam():
    """Their numbers are measured in tests/integrations."""
    recipes = list(blocks(ROOT / "docs/integrations.md"))
    assert len(recipes) == 11
    for recipe in recipes:
        compile(recipe.code, recipe.title, "exec")
        assert "import msam\n" in recipe.code
        assert recipe.code.count("rho=0.05") == recipe.code.count("msam.loss(") == 1


def test_the_loop_in_readme_lowers_the_loss():
    """README.md leaves out what every loop has: a model, an optimizer, a loader."""
    (code,) = [block.code for block in blocks(README)]
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 3)
    names = {
        "F": torch.nn.functional,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "loader": [(torch.randn(32, 20), torch.randint(0, 3, (32,)))] * 10,
    }
    losses = [(exec(code, names), names["step"].loss)[1] for _ in range(2)]
    assert losses[1] < losses[0]


@functools.cache
def targets():
    return re.findall(r"^([a-z][a-z0-9-]*)(%?):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [README, OF_LIBRARY, *CHANGELOGS, *DOCS], ids=lambda page: page.relative_to(ROOT))
def test_commands_exist(page):
    """Every `make TARGET` and `python -m MODULE`, in code and in the text."""
    text = page.read_text()
    for target in re.findall(r"(?:^|`| {4})make ([a-z][a-z0-9-]*)", text, re.MULTILINE):
        assert any(target == name or (many and target.startswith(name)) for name, many in targets()), target
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).exists() or importlib.util.find_spec(module), module


# Numbers

EFFECT = r"[+-]?\d+(?:\.\d+)? ± \d+(?:\.\d+)?"
CLAIMS = {
    "mSAM over SAM on the same micro-batches (primary: ResNet-8)": "(ours) ... and than that of SAM on the same "
    "micro-batches, which share one perturbation",
    "mSAM more accurate than SAM": "mSAM's test accuracy is better than SAM's",
    "the same, net of BatchNorm": "(ours) Net of micro-batch BatchNorm, mSAM gains more than SAM: (mSAM - control) - "
    "(SAM - plain training)",
    "mSAM flatter than SAM on the same micro-batches": "(ours) mSAM ends in flatter minima than SAM on the same "
    "micro-batches, which share one perturbation",
    "mSAM flatter than SAM, at a higher training loss": "mSAM ends in flatter minima than SAM",
    "mSAM at most 10 % slower than SAM": "mSAM costs not significantly more than SAM",
}
NETWORKS = {
    "ResNet-8": ("resnet8", "cifar10"),
    "WRN-10-1": ("wrn-10-1", "cifar10"),
    "ViT": ("vit-micro", "cifar10"),
    "MiniLM, SST-2": ("minilm", "sst2"),
    "MiniLM, snippets": ("minilm", "snippets"),
    "ResNet-20": ("resnet20", "cifar10"),
}


def scoreboard():
    """The rows of README's scoreboard, each with its claim."""
    claim = ""
    for line in README.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 7 and re.fullmatch(EFFECT, cells[3]):
            claim = cells[0] or claim
            yield (claim, *cells[1:])


def rows(name):
    with open(COMMITTED / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def net():
    """The output of the script of docs/statistics.md, next to what the page says it prints."""
    code, printed = re.search(
        r"```python\n(.+?)```.*?```text\n(.+?)```", (ROOT / "docs" / "statistics.md").read_text(), re.DOTALL
    ).groups()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout, printed


def test_the_net_effect_is_what_its_script_prints(net):
    assert net[0] == net[1]


def test_the_scoreboard_is_that_of_the_committed_claims():
    """Of the measures of flatness it has the largest eigenvalue."""
    claims = {
        (row["claim"], row["where"]): row
        for row in rows("tables/claims.csv")
        if row["table"] != "table3" or row["what"].endswith(", lambda 1, log of the ratio")
    }
    shown = (COMMITTED / "tables" / "claims.md").read_text().splitlines()
    runs = {row["run_id"]: row for row in rows("runs.csv")}
    board = list(scoreboard())
    assert len(board) == 13
    for claim, network, scale, effect, n, adjusted_p, verdict in board:
        model, dataset = NETWORKS[network]
        where = f"{model}, {scale if scale.startswith('batch ') else dataset}"
        row = claims[CLAIMS[claim], where]
        assert row["verdict"] == verdict
        parts = (f"| {CLAIMS[claim]} ", f"| {where} ", f"| {row['what']} ")
        line = next(line for line in shown if all(part in line for part in parts))
        assert f"| {effect} ({n}) " in line
        assert line.strip("|").split("|")[7].strip() == adjusted_p
        if not scale.startswith("batch "):
            spec = runs[row["run_ids"].split()[0]]
            steps = math.ceil(int(spec["train_examples"]) / int(spec["batch_size"])) * int(spec["epochs"])
            examples = {"cifar10": "images", "sst2": "sentences", "snippets": "snippets"}[dataset]
            assert scale == f"{int(spec['train_examples']):,} {examples}, {steps} steps"


def test_the_first_accuracies_of_readme_are_those_of_the_committed_table():
    text = " ".join(README.read_text().split())
    found = re.search(r"reaches ([\d.]+) % test accuracy by SGD, ([\d.]+) % by SAM and ([\d.]+) % by mSAM", text)
    shown = {row["method"]: row for row in rows("tables/table1.csv") if row["model"] == "resnet8"}
    by_method = [shown[method]["mean"] for method in ("base", "sam", "msam")]
    assert [f"{float(mean):.2f}" for mean in by_method] == list(found.groups())


def test_the_settings_of_the_cost_are_counted_right():
    verdicts = [
        row["verdict"]
        for row in rows("tables/claims.csv")
        if row["claim"] == CLAIMS["mSAM at most 10 % slower than SAM"]
    ]
    text = " ".join(README.read_text().split())
    counted = r"supported in (\d+) of (\d+) settings, contradicted in (\d+) and inconclusive in (\d+)"
    held, settings, slower, unclear = map(int, re.search(counted, text).groups())
    assert settings == len(verdicts)
    counts = [verdicts.count(verdict) for verdict in ("supported", "contradicted", "inconclusive")]
    assert [held, slower, unclear] == counts


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "results.md"], ids=lambda page: page.name)
def test_every_interval_stands_in_the_committed_tables(page, net):
    """But for those of a commit of the past, which the page names, and a sign that prose may leave out."""
    committed = net[0] + "".join(path.read_text() for path in (COMMITTED / "tables").glob("*.md"))
    known = {found.lstrip("+") for found in re.findall(EFFECT, committed)}
    sentences = [text for text in re.split(r"(?<=\.)\s", page.read_text()) if "`git show " not in text]
    effects = [found.lstrip("+") for text in sentences for found in re.findall(EFFECT, text)]
    assert len(effects) > 10
    assert [effect for effect in effects if effect not in known] == []


def test_readme_is_short():
    assert len(README.read_text().split()) <= 1100


@pytest.mark.parametrize("page", [README, *CHANGELOGS, *DOCS], ids=lambda page: page.relative_to(ROOT))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_index_page_of_the_library_stands_alone():
    """It is shown where no file of this repository is: no relative link, no picture."""
    targets = re.findall(r"\]\(([^)]+)\)", OF_LIBRARY.read_text())
    assert targets
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "![" not in OF_LIBRARY.read_text()


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_links_to_sections_lead_to_a_heading(page):
    for target, section in re.findall(r"\]\(([^)#]*)#([^)]*)\)", page.read_text()):
        headings = re.findall(r"^#+ (.+)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
