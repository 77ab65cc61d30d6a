"""The claims' summary and the report: from made-up runs, by hand."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from scipy import stats

from analysis.claims import claims, comparisons
from analysis.collect import Finished
from analysis.exhibit import Target
from analysis.frames import Results
from analysis.publish import documents, everything, target
from analysis.statistics import bootstrap_interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from tests.analysis.invented import SESSION, cost_run, curvature_run, published_twice, results_of

CELLS = [cell for cell in catalogue.cells("table1", "smoke") if cell.model == "resnet8"]
OVER_SAM, OVER_BASE, OVER_CONTROL, SAM_OVER_BASE, *CURVATURE, THEORY, NORMALISED, COST = (
    claim for claim in claims() if not claim.startswith("(ours) Test accuracy")
)
FLATTER, FLATTER_THAN_BASE, SAM_FLATTER, FLATTER_CONTROL = CURVATURE


def accuracies(spec, shifts):
    """50 % plus the method's shift; seeds spread all methods alike, and mSAM a little more."""
    spread = {0: 0.0, 1: 0.01, 2: 0.05}[spec.seed] + (0.001 * spec.seed if spec.method == "msam" else 0)
    summary = {"test_accuracy": 0.5 + shifts.get(spec.method, 0.0) + spread, "wall_seconds": 1.0}
    return Finished(spec, summary, [{"epoch": 1, "train_loss": 1.0, "sharpness": 0.1}], [SESSION])


def found(shifts, seeds=3):
    runs = Results.of([accuracies(spec, shifts) for spec in with_seeds(CELLS, seeds)])
    return {c.claim: c for c in comparisons(runs, {"table1": Target("table1", tuple(CELLS), seeds)})}


def test_bootstrap_is_the_percentiles_of_the_means_of_resamples():
    low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    means = stats.bootstrap(([1.0, 2.0, 3.0, 4.0, 10.0],), lambda x, axis: x.mean(axis), method="percentile", rng=7)
    assert (low, high) == pytest.approx(tuple(means.confidence_interval), abs=0.1)
    assert bootstrap_interval([1.0, 2.0]) == (1.0, 2.0)
    assert bootstrap_interval([1.0, 2.0, 5.0]) == bootstrap_interval([1.0, 2.0, 5.0])
    assert all(x != x for x in bootstrap_interval([1.0]))


def test_a_paired_difference_supports_contradicts_or_does_not_separate():
    better = found({"msam": 0.02})[OVER_SAM]
    assert better.verdict == "supported"
    assert better.difference.mean == pytest.approx(2.1)
    assert better.difference.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert better.bootstrap == pytest.approx((2.0, 2.2))
    assert found({"msam": -0.02})[OVER_SAM].verdict == "contradicted"
    assert found({"msam": -0.001})[OVER_SAM].verdict == "not separated"
    assert found({"msam": 0.02}, seeds=1)[OVER_SAM].verdict == "one seed"
    assert found({"msam": 0.02, "control": 0.03})[OVER_CONTROL].verdict == "contradicted"
    assert found({"msam": 0.02, "sam": 0.04})[OVER_BASE].verdict == "supported"
    assert found({"msam": 0.02, "sam": 0.04})[OVER_SAM].verdict == "contradicted"
    assert found({"msam": 0.02, "sam": 0.04})[SAM_OVER_BASE].difference.mean == pytest.approx(4.0)
    assert found({"msam": 0.02, "sam": -0.04})[SAM_OVER_BASE].difference.mean == pytest.approx(-4.0)


def test_each_comparison_names_the_runs_of_both_sides():
    ids = found({})[OVER_SAM].run_ids.split()
    sides = [cell for cell in CELLS if cell.method in ("sam", "msam")]
    assert sorted(ids) == sorted(spec.run_id for spec in with_seeds(sides, 3))


def shown(results, name, cells):
    return comparisons(results, {name: Target(name, tuple(cells), 2)})


def test_flatness_and_theory_and_cost_have_their_own_direction():
    flat, cost = catalogue.cells("hessian", "smoke"), catalogue.cells("cost", "smoke")
    table3 = results_of(flat, 2, curvature_run)
    by_claim = {}
    for c in shown(table3, "table3", flat):
        by_claim.setdefault(c.claim, set()).add(c.verdict)
    assert by_claim == {claim: {"supported"} for claim in CURVATURE}

    theory = catalogue.cells("theory", "smoke")
    runs = [replaced(spec) for spec in with_seeds(theory, 2)]
    verdicts = {c.what.split(",")[0]: c for c in shown(Results.of(runs), "theory", theory)}
    assert verdicts["SAM over SGD"].difference.mean == pytest.approx(-10)
    assert {(c.claim, c.verdict) for c in verdicts.values()} == {(THEORY, "supported")}
    normal = [replace(c, normalised=True) for c in theory if c.rho]
    close = [replaced(spec, 0.005) for spec in with_seeds([theory[0], *normal], 2)]
    used = shown(Results.of(close), "theory", [theory[0], *normal])
    assert {(c.claim, c.verdict) for c in used} == {(NORMALISED, "not separated")}, "half a percent is no difference"

    slow = shown(results_of(cost, 2, cost_run), "table4", cost)
    assert {(c.claim, c.verdict) for c in slow} == {(COST, "contradicted")}, "m = 4 takes 24/18 of SAM's time"
    assert slow[0].difference.mean == pytest.approx(100 / 3 + 0.05)
    assert [c.where for c in slow[:2]] == ["resnet8, batch 32", "resnet8, batch 32, 2 workers"]


def replaced(spec, step=0.1):
    """A boundary of 20 with descent, `step` of it less with SAM, and twice that with mSAM; a factor for each seed."""
    value = 20 * (1 - step * ("base", "sam", "msam").index(spec.method)) * (1 + spec.seed)
    return Finished(spec, {"stable_sharpness": value, "relative_error": 0.0, "wall_seconds": 1.0}, [], [SESSION])


def test_the_summary_says_of_each_claim_what_holds_and_what_was_not_run():
    runs = Results.of([accuracies(spec, {"msam": 0.02}) for spec in with_seeds(CELLS, 3)])
    chosen = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=3)
    summary = documents("smoke", [chosen], runs)[-1]
    assert summary.name == "claims"
    assert summary.claims[0] == f"{OVER_SAM}: supported in 1 comparison."
    assert summary.claims[4].startswith("Not run")
    assert all(claim in summary.claims[4] for claim in (FLATTER, THEORY, COST))
    alone = documents("smoke", [replace(chosen, seeds=1)], runs)[-1]
    assert alone.claims[0] == f"{OVER_SAM}: one seed, no interval."
    assert OVER_SAM in summary.terminal()
    assert "mSAM, m=4 over SAM" in summary.markdown()
    assert "smoke" in summary.title


# The report


class Page(HTMLParser):
    """Collects ids, links, and what would be fetched from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset") and tag != "a"]
        if tag not in ("meta", "input", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(run=accuracies, shifts=None):
    runs = Results.of([run(spec, shifts or {}) for spec in with_seeds(CELLS, 2)])
    chosen = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=2)
    return everything("smoke", [chosen], runs)["report.html"], runs


def test_every_score_leads_to_its_runs_and_nothing_is_fetched():
    text, runs = page()
    found = Page(text)
    assert not found.open, "every element is closed"
    assert len(found.ids) == len(set(found.ids))
    targets = {link.removeprefix("#") for link in found.links}
    assert targets <= set(found.ids)
    assert {f"run-{run_id}" for run_id in runs.runs["run_id"]} <= targets
    assert all(source.startswith("data:image/png;base64,") for source in found.fetched)
    assert base64.b64decode(found.fetched[0].split(",")[1]).startswith(b"\x89PNG")
    table = text[text.index('id="table-table1"') :]
    row = next(line for line in table.splitlines() if "<td>mSAM, m=4" in line)
    assert set(re.findall(r"#run-(\w+)", row)) == {s.run_id for s in with_seeds(CELLS, 2) if s.method == "msam"}


def test_text_of_records_is_escaped():
    def run(spec, shifts):
        made = accuracies(spec, shifts)
        return replace(made, sessions=[{**SESSION, "cpu": "<script>alert(1)</script>"}])

    text, _ = page(run)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_report_is_published_and_drawn_again_to_the_byte(tmp_path):
    runs = Results.of([accuracies(spec, {}) for spec in catalogue.runs("table1", "smoke")])
    before, after = published_twice(tmp_path, ["table1"], runs)
    assert after == before
    assert b"claims" in before[tmp_path / "smoke" / "report.html"]
