"""README and docs/: every example is a whole script and runs, every number stands in the committed results."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
COMMITTED = ROOT / "results" / "cpu"

PAGES = {"msam_in_your_own_loop.md": 10, "migration.md": 2}
"""Pages of examples that are whole scripts, and how many each has."""


def examples(page):
    """The scripts of a page: its section, what a comment before it says, and the code."""
    found = r"^## ([^\n]+)\n(?:(?!^## ).)*?(?:<!-- (.+?) -->\n)?```python\n(.+?)```"
    return re.findall(found, (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)


EXAMPLES = [example for page in PAGES for example in examples(page)]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_has_its_examples(page):
    assert len(examples(page)) == (ROOT / "docs" / page).read_text().count("```python") == PAGES[page]


def test_recipes_are_python_that_uses_msam():
    """Their numbers are measured in tests/integrations."""
    page = "integrations.md"
    assert len(examples(page)) == (ROOT / "docs" / page).read_text().count("```python") == 11
    for title, _, code in examples(page):
        compile(code, title, "exec")
        assert "import msam\n" in code
        assert code.count("rho=0.05") == code.count("msam.loss(") == 1


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


# Numbers

EFFECT = r"[+-]?\d+(?:\.\d+)? ± \d+(?:\.\d+)?"
CLAIMS = {
    "mSAM more accurate than SAM": "mSAM's test accuracy is better than SAM's",
    "mSAM flatter than SAM": "mSAM ends in flatter minima than SAM",
    "mSAM at most 10 % slower than SAM": "mSAM costs not significantly more than SAM",
}
NET = "the same, net of BatchNorm"
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
        if line.startswith("|") and len(cells) == 6 and re.fullmatch(EFFECT, cells[3]):
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


def test_the_scoreboard_is_that_of_the_committed_claims(net):
    claims = {(row["claim"], row["where"]): row for row in rows("tables/claims.csv")}
    shown = (COMMITTED / "tables" / "claims.md").read_text().splitlines()
    runs = {row["run_id"]: row for row in rows("runs.csv")}
    board = list(scoreboard())
    assert len(board) == 14
    for claim, network, scale, effect, n, verdict in board:
        model, dataset = NETWORKS[network]
        if claim == NET:
            assert f"{model}, net of BatchNorm: {effect} ({n});" in net[0]
            difference, half = (float(number) for number in effect.split(" ± "))
            assert verdict == ("supported" if difference > half else "not significant")
            claim = next(iter(CLAIMS))
        else:
            where = f"{model}, {scale if scale.startswith('batch ') else dataset}"
            row = claims[CLAIMS[claim], where]
            assert row["verdict"] == verdict
            line = next(line for line in shown if f"| {CLAIMS[claim]} " in line and f"| {where} " in line)
            assert f"| {effect} ({n}) " in line
        if not scale.startswith("batch "):
            spec = runs[claims[CLAIMS[claim], f"{model}, {dataset}"]["run_ids"].split()[0]]
            steps = math.ceil(int(spec["train_examples"]) / int(spec["batch_size"])) * int(spec["epochs"])
            examples = {"cifar10": "images", "sst2": "sentences", "snippets": "snippets"}[dataset]
            assert scale == f"{int(spec['train_examples']):,} {examples}, {steps} steps"


def test_the_settings_of_the_cost_are_counted_right():
    verdicts = [
        row["verdict"]
        for row in rows("tables/claims.csv")
        if row["claim"] == CLAIMS["mSAM at most 10 % slower than SAM"]
    ]
    held, settings, slower, unclear = map(
        int,
        re.search(r"in (\d+) of (\d+)\s+settings, slower in (\d+), and (\d+) are open", README.read_text()).groups(),
    )
    assert settings == len(verdicts)
    counts = [verdicts.count(verdict) for verdict in ("supported", "contradicted", "not significant")]
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


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_links_to_sections_lead_to_a_heading(page):
    for target, section in re.findall(r"\]\(([^)#]*)#([^)]*)\)", page.read_text()):
        headings = re.findall(r"^#+ (.+)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
