"""The judge: a second way to every verdict, which agrees with the tables' on committed and on invented results."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest

from analysis import judge
from analysis.claims import claims, comparisons
from analysis.collect import Finished
from analysis.contrasts import ALL
from analysis.frames import Results, write_files
from analysis.publish import drawn, target
from experiments.harness.runs import catalogue
from experiments.harness.runs.checks import SpecError
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import DEFAULT_ROOT
from tests.analysis.invented import SESSION, any_run

ANALYSIS = Path(judge.__file__).parent
TABLES = ("table1", "table2", "table3", "table4", "theory")


def imported(path):
    """The modules of the analysis that a file imports."""
    tree = ast.parse(path.read_text())
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {node.module for node in froms} | {f"{node.module}.{one.name}" for node in froms for one in node.names}
    names |= {one.name for node in ast.walk(tree) if isinstance(node, ast.Import) for one in node.names}
    modules = {path.stem for path in ANALYSIS.glob("*.py")} | {"exhibits"}
    return {name.split(".")[1] for name in names if name.startswith("analysis.") and name.split(".")[1] in modules}


def test_it_shares_only_the_declarations_with_the_tables():
    assert imported(ANALYSIS / "judge.py") == {"contrasts"}
    assert imported(ANALYSIS / "contrasts.py") == set()


def of_tables(found):
    """The comparisons of the tables by claim, in an order that does not depend on their words."""
    return sorted(
        (
            *(c.claim, c.table, c.family, sorted(c.run_ids.split()), c.difference.n, c.verdict),
            *(None if math.isnan(x) else x for x in (c.difference.mean, c.p, c.adjusted_p, c.margin)),
        )
        for c in found
    )


def of_judge(found):
    return sorted(
        (
            *(c.contrast.text, c.table, c.family, sorted(c.run_ids), len(c.differences), c.word),
            *(None if math.isnan(x) else x for x in (c.mean, c.p, c.adjusted_p, c.margin)),
        )
        for c in found
    )


def agree(results, profile, targets, folder):
    """The verdicts on which both agree; the test fails if they do not."""
    first = of_tables(comparisons(results, {t.name: t for t in targets if not t.tuning}))
    _, rows = judge.read(folder, profile)
    second = of_judge(judge.verdicts(rows, profile))
    assert [line[:6] for line in first] == [line[:6] for line in second]
    for mine, theirs in zip(first, second, strict=True):
        for a, b in zip(mine[6:], theirs[6:], strict=True):
            assert a == b or a == pytest.approx(b, rel=1e-6, abs=1e-9), (mine, theirs)
    return [line[5] for line in first]


def test_both_agree_on_the_committed_results():
    folder = DEFAULT_ROOT / "cpu"
    results = Results.read(folder)
    assert len(agree(results, "cpu", drawn(folder, "cpu", results), DEFAULT_ROOT)) > 50


def noisy(spec, seed):
    """A run with the numbers of its kind, each times a random factor near 1; on the WRN all methods are equal."""
    run = any_run(spec)
    random = np.random.default_rng([seed, int(spec.run_id, 16) % 2**32])
    spread = 0.05 if spec.model.startswith("vit") else 0.001
    if "test_accuracy" in run.summary and spec.model.startswith("wrn"):
        run.summary["test_accuracy"] = 0.5
    summary = {k: v * float(random.normal(1, spread)) if isinstance(v, float) else v for k, v in run.summary.items()}
    return Finished(spec, summary, [], [SESSION])


@pytest.mark.parametrize("seed", [0, 1])
def test_both_agree_on_invented_results(tmp_path, seed):
    targets = [target(name, "smoke", tmp_path, 4) for name in TABLES]
    runs = [noisy(run, seed) for run in dict.fromkeys(run for t in targets for run in t.runs)]
    results = Results.of(runs)
    write_files(tmp_path / "smoke", {"runs.csv": results.texts()["runs.csv"]})
    words = agree(results, "smoke", targets, tmp_path)
    assert {"supported", "equivalent", "inconclusive"} <= set(words)
    assert judge.read(tmp_path / "smoke", "smoke")[0] == judge.read(tmp_path, "smoke")[0], "both folders will do"


def test_it_sees_a_number_that_was_changed(tmp_path):
    """What runs.csv says is all that it goes by."""
    t = target("table1", "smoke", tmp_path, 4)
    results = Results.of([noisy(run, 0) for run in t.runs])
    text = results.texts()["runs.csv"]
    write_files(tmp_path / "smoke", {"runs.csv": text})
    before = judge.run(judge.Arguments("msam-over-sam", "smoke", tmp_path))
    changed = next(run for run in results.runs.itertuples() if run.method == "msam" and run.model == "resnet8")
    write_files(tmp_path / "smoke", {"runs.csv": text.replace(repr(float(changed.test_accuracy)), "0.999")})
    after = judge.run(judge.Arguments("msam-over-sam", "smoke", tmp_path))
    assert before != after
    assert "n=4" in before
    assert "n=3" in judge.run(judge.Arguments("msam-over-sam", "smoke", tmp_path, 3))


def test_mistakes_end_in_a_sentence(tmp_path):
    with pytest.raises(SpecError, match="Unknown claim 'msam-ovr-sam': did you mean msam-over-sam"):
        judge.run(judge.Arguments("msam-ovr-sam"))
    with pytest.raises(SpecError, match="Unknown profile 'cpus': did you mean cpu"):
        judge.run(judge.Arguments("all", "cpus"))
    with pytest.raises(SpecError, match="seeds is 0, but must be 1 or more"):
        judge.run(judge.Arguments("all", seeds=0))
    with pytest.raises(RecordError, match=r"runs\.csv does not exist: .* --publish` writes it; or give the folder"):
        judge.run(judge.Arguments("all", "smoke", tmp_path))
    (tmp_path / "runs.csv").write_text("seed\n1\n")
    with pytest.raises(RecordError, match="has no column run_id: restore it with git"):
        judge.run(judge.Arguments("all", "smoke", tmp_path))


def test_all_lists_every_claim_by_its_short_name(tmp_path):
    run = target("table1", "smoke", tmp_path, 1).runs[0]
    write_files(tmp_path / "smoke", {"runs.csv": Results.of([any_run(run)]).texts()["runs.csv"]})
    text = judge.run(judge.Arguments("all", "smoke", tmp_path))
    assert all(f"({contrast.name})" in text for contrast in ALL)
    assert len({contrast.name for contrast in ALL}) == len({contrast.text for contrast in ALL}) == len(ALL)
    assert set(claims()) == {contrast.text for contrast in ALL}, "and the tables have no other claim"
    assert {name for contrast in ALL for name in contrast.tables} == set(TABLES)
    assert set(TABLES) <= {experiment.table for experiment in catalogue.catalogue().values()}


def test_it_says_how_many_of_the_planned_seeds_have_run(monkeypatch):
    def line(planned):
        monkeypatch.setattr(catalogue, "PUBLISHED_SEEDS", {"cpu": {"table1": planned}})
        text = judge.run(judge.Arguments("msam-over-sam"))
        return next(line for line in text.splitlines() if "resnet8, cifar10" in line)

    assert "interim" not in line(8)
    assert "interim: " in line(99)
    assert " of 99 seeds. +" in line(99)
