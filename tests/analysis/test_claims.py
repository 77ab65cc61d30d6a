"""The summary of the claims and the report, from made-up runs."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from scipy import stats

from analysis.claims import claims, comparisons, document_claims
from analysis.collect import Finished
from analysis.exhibit import Target
from analysis.forest import panels
from analysis.frames import Results
from analysis.publish import documents_of, output_files, target
from analysis.statistics import bootstrap_interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.record import DEFAULT_ROOT
from tests.analysis.invented import SESSION, any_run, cost_run, curvature_run, results_of

CELLS = [cell for cell in catalogue.cells("table1", "smoke") if cell.model == "resnet8"]
OVER_SAM, OVER_BASE, OVER_CONTROL, SAM_OVER_BASE, *CURVATURE, THEORY, NORMALISED, COST = (
    claim
    for claim in claims()
    if not claim.startswith(("(ours) Test accuracy", "(ours) ... and than that of SAM", "(ours) ... with"))
)
FLATTER, FLATTER_THAN_BASE, SAM_FLATTER, FLATTER_CONTROL = CURVATURE


def accuracies(spec, shifts):
    """50 % plus the method's shift; seeds spread all methods alike, and mSAM a little more."""
    spread = {0: 0.0, 1: 0.01, 2: 0.05}[spec.seed] + (0.001 * spec.seed if spec.method == "msam" else 0)
    summary = {"test_accuracy": 0.5 + shifts.get(spec.method, 0.0) + spread, "wall_seconds": 1.0}
    return Finished(spec, summary, [{"epoch": 1, "train_loss": 1.0, "sharpness": 0.1}], [SESSION])


def by_claim(shifts, seeds=3):
    """The comparison of each claim about accuracy, with these shifts of the methods."""
    runs = Results.of([accuracies(spec, shifts) for spec in with_seeds(CELLS, seeds)])
    return {c.claim: c for c in comparisons(runs, {"table1": Target("table1", tuple(CELLS), seeds)})}


def test_bootstrap_is_the_percentiles_of_the_means_of_resamples():
    low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    means = stats.bootstrap(([1.0, 2.0, 3.0, 4.0, 10.0],), lambda x, axis: x.mean(axis), method="percentile", rng=7)
    assert (low, high) == pytest.approx(tuple(means.confidence_interval), abs=0.1)
    assert bootstrap_interval([1.0, 2.0]) == (1.0, 2.0)
    assert bootstrap_interval([1.0, 2.0, 5.0]) == bootstrap_interval([1.0, 2.0, 5.0])
    assert all(x != x for x in bootstrap_interval([1.0]))


def test_a_comparison_has_both_intervals_of_the_paired_difference():
    better = by_claim({"msam": 0.02})[OVER_SAM]
    assert better.difference.mean == pytest.approx(2.1)
    assert better.difference.half_width == pytest.approx(4.302653 * 0.1 / 3**0.5)
    assert better.bootstrap == pytest.approx((2.0, 2.2))
    assert by_claim({"msam": 0.02, "sam": 0.04})[SAM_OVER_BASE].difference.mean == pytest.approx(4.0)
    assert by_claim({"msam": 0.02, "sam": -0.04})[SAM_OVER_BASE].difference.mean == pytest.approx(-4.0)


@pytest.mark.parametrize(
    ("shifts", "claim", "verdict"),
    [
        ({"msam": 0.02}, OVER_SAM, "supported"),
        ({"msam": -0.02}, OVER_SAM, "contradicted"),
        ({"msam": -0.001}, OVER_SAM, "not significant"),
        ({"msam": 0.02, "control": 0.03}, OVER_CONTROL, "contradicted"),
        ({"msam": 0.02, "sam": 0.04}, OVER_BASE, "supported"),
        ({"msam": 0.02, "sam": 0.04}, OVER_SAM, "contradicted"),
    ],
)
def test_verdict(shifts, claim, verdict):
    assert by_claim(shifts)[claim].verdict == verdict


def test_claims_without_comparisons_do_not_count_in_the_numbers_of_the_others():
    """An arm without runs has claims; the numbers of flatness, which come after them, do not depend on it."""
    cells = {"table1": CELLS, "table3": catalogue.cells("hessian", "smoke")}
    runs = [any_run(spec) for one in cells.values() for spec in with_seeds(one, 2)]
    targets = {name: Target(name, tuple(one), 2) for name, one in cells.items()}
    numbers = document_claims("smoke", Results.of(runs), targets).numbers
    blocks = dict(zip(numbers["claim"], numbers["block"], strict=True))
    assert list(blocks.values()) == list(range(len(blocks)))
    assert claims().index(FLATTER) > blocks[FLATTER], "some claims have no comparison"


def test_one_seed_has_no_verdict():
    assert by_claim({"msam": 0.02}, seeds=1)[OVER_SAM].verdict == "one seed"


def test_each_comparison_names_the_runs_of_both_sides():
    ids = by_claim({})[OVER_SAM].run_ids.split()
    sides = [cell for cell in CELLS if cell.method in ("sam", "msam")]
    assert sorted(ids) == sorted(spec.run_id for spec in with_seeds(sides, 3))


def shown(results, name, cells):
    return comparisons(results, {name: Target(name, tuple(cells), 2)})


def test_a_smaller_eigenvalue_supports_a_claim_on_flatness():
    flat = catalogue.cells("hessian", "smoke")
    verdicts = {}
    for c in shown(results_of(flat, 2, curvature_run), "table3", flat):
        verdicts.setdefault(c.claim, set()).add(c.verdict)
    assert verdicts == {claim: {"supported"} for claim in CURVATURE}


def test_a_lower_boundary_supports_a_claim_of_the_theory():
    theory = catalogue.cells("theory", "smoke")
    runs = [boundary_run(spec) for spec in with_seeds(theory, 2)]
    verdicts = {c.what.split(",")[0]: c for c in shown(Results.of(runs), "theory", theory)}
    assert verdicts["SAM over SGD"].difference.mean == pytest.approx(-10)
    assert {(c.claim, c.verdict) for c in verdicts.values()} == {(THEORY, "supported")}
    normal = [replace(c, normalised=True) for c in theory if c.rho]
    close = [boundary_run(spec, 0.005) for spec in with_seeds([theory[0], *normal], 2)]
    used = shown(Results.of(close), "theory", [theory[0], *normal])
    assert {(c.claim, c.verdict) for c in used} == {(NORMALISED, "not significant")}, (
        "half a percent is below the tolerance"
    )


def test_a_slower_step_contradicts_the_claim_on_cost():
    cost = catalogue.cells("cost", "smoke")
    slow = shown(results_of(cost, 2, cost_run), "table4", cost)
    assert {(c.claim, c.verdict) for c in slow} == {(COST, "contradicted")}, "m = 4 takes 24/18 of SAM's time"
    assert slow[0].difference.mean == pytest.approx(100 / 3 + 0.05)
    assert [c.where for c in slow[:2]] == ["resnet8, batch 32", "resnet8, batch 32, 2 workers"]


def boundary_run(spec, step=0.1):
    """A boundary of 20 with descent, lower by `step` with SAM and by twice `step` with mSAM, times 1 + seed."""
    value = 20 * (1 - step * ("base", "sam", "msam").index(spec.method)) * (1 + spec.seed)
    return Finished(spec, {"stable_sharpness": value, "relative_error": 0.0, "wall_seconds": 1.0}, [], [SESSION])


def test_the_summary_has_a_sentence_on_each_claim_and_lists_those_not_run():
    runs = Results.of([accuracies(spec, {"msam": 0.02}) for spec in with_seeds(CELLS, 3)])
    chosen = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=3)
    summary = documents_of("smoke", [chosen], runs)[-1]
    assert summary.name == "claims"
    assert summary.claims[0] == f"{OVER_SAM}: supported in 1 comparison."
    assert summary.claims[4].startswith("Not run")
    assert all(claim in summary.claims[4] for claim in (FLATTER, THEORY, COST))
    alone = documents_of("smoke", [replace(chosen, seeds=1)], runs)[-1]
    assert alone.claims[0] == f"{OVER_SAM}: one seed, no interval."
    assert OVER_SAM in summary.terminal()
    assert "mSAM, m=4 over SAM" in summary.markdown()
    assert "smoke" in summary.title


# The report


class Page(HTMLParser):
    """Collects ids, links, and resources that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.fetched, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset") and tag != "a"]
        if tag not in ("meta", "input", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(run=accuracies, shifts=None):
    runs = Results.of([run(spec, shifts or {}) for spec in with_seeds(CELLS, 2)])
    chosen = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=2)
    return output_files("smoke", [chosen], runs)["report.html"], runs


def test_every_score_links_to_its_runs_and_nothing_is_fetched():
    text, runs = page()
    parsed = Page(text)
    assert not parsed.open, "every element is closed"
    assert len(parsed.ids) == len(set(parsed.ids))
    targets = {link.removeprefix("#") for link in parsed.links}
    assert targets <= set(parsed.ids)
    assert {f"run-{run_id}" for run_id in runs.runs["run_id"]} <= targets
    assert all(source.startswith("data:image/png;base64,") for source in parsed.fetched)
    assert base64.b64decode(parsed.fetched[0].split(",")[1]).startswith(b"\x89PNG")
    table = text[text.index('id="table-table1"') :]
    row = next(line for line in table.splitlines() if "<td>mSAM, m=4" in line)
    assert set(re.findall(r"#run-(\w+)", row)) == {s.run_id for s in with_seeds(CELLS, 2) if s.method == "msam"}


def test_text_of_records_is_escaped(sketches):
    def run(spec, shifts):
        made = accuracies(spec, shifts)
        return replace(made, sessions=[{**SESSION, "cpu": "<script>alert(1)</script>"}])

    text, _ = page(run)
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_forest_has_each_comparison_in_its_place_with_effect_n_and_scale(sketches):
    _, runs = page()
    t = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=2)
    numbers = document_claims("smoke", runs, {"table1": t}).numbers
    drawn = panels(numbers, runs.runs)
    assert [panel.claim for panel in drawn] == list(dict.fromkeys(numbers["claim"]))
    rows = [row for panel in drawn for row in panel.rows]
    for row, number in zip(rows, numbers.itertuples(), strict=True):
        assert (row.where, row.what, row.n, row.verdict) == (number.where, number.what, number.n, number.verdict)
        cell = CELLS[0]
        assert row.scale == f"{cell.examples} images, {cell.examples // cell.batch_size * cell.epochs} steps"
        assert row.effect.startswith(f"{number.difference:+.2f}"[:3])
    for panel in drawn:
        of = numbers[numbers["claim"] == panel.claim]
        for row, number in zip(panel.rows, of.itertuples(), strict=True):
            assert row.low <= row.middle <= row.high
            assert (row.middle > panel.line) == (number.difference > 0)
            assert (row.low > panel.line) == (number.difference - number.half_width > 0)
        assert "right of the line at 0 supports" in panel.axis


def test_the_committed_report_is_below_three_megabytes():
    assert (DEFAULT_ROOT / "cpu" / "report.html").stat().st_size < 3e6
