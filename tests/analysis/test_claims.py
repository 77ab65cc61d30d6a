"""The summary of the claims and the report, from made-up runs."""

import base64
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from scipy import stats

from analysis.claims import claims, comparisons, document_claims
from analysis.collect import Finished
from analysis.contrasts import ALL, Contrast
from analysis.evidence import judged
from analysis.exhibit import Claim, Comparison, Target
from analysis.forest import panels
from analysis.frames import Results
from analysis.publish import documents_of, output_files, target
from analysis.statistics import Interval, bootstrap_interval, mean_interval
from experiments.harness.runs import catalogue
from experiments.harness.runs.grids import with_seeds
from experiments.harness.runs.methods import arms_of
from experiments.harness.runs.record import DEFAULT_ROOT
from tests.analysis.invented import SESSION, any_run, cost_run, curvature_run, results_of

FOUR = ("base", "control", "sam", "msam")
CELLS = [c for c, arm in arms_of(catalogue.cells("resnet_cifar", "smoke")).items() if arm.name in FOUR]
TEXT = {contrast.name: contrast.text for contrast in ALL}
OVER_SAM, OVER_BASE, OVER_CONTROL = (TEXT[f"msam-over-{name}"] for name in ("sam", "base", "control"))
SAM_OVER_BASE, NET, COST = TEXT["sam-over-base"], TEXT["net-of-batchnorm"], TEXT["cost"]
THEORY, NORMALISED = TEXT["stability-unnormalised"], TEXT["stability-normalised"]
FLATTER = TEXT["flatness-msam-over-sam"]


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
        ({"msam": -0.001}, OVER_SAM, "equivalent"),
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
    found = comparisons(results_of(flat, 8, curvature_run), {"table3": Target("table3", tuple(flat), 8)})
    verdicts = {c.claim: c.verdict for c in found if ", lambda 1, " in c.what}
    assert len(verdicts) >= 4
    assert set(verdicts.values()) == {"supported"}
    assert {c.verdict for c in found if "average sharpness" in c.what} == {"inconclusive"}, "it is the same for all"


def test_a_lower_boundary_supports_a_claim_of_the_theory():
    theory = catalogue.cells("theory", "smoke")
    runs = [boundary_run(spec) for spec in with_seeds(theory, 2)]
    verdicts = {c.what.split(",")[0]: c for c in shown(Results.of(runs), "theory", theory)}
    assert verdicts["SAM over SGD"].difference.mean == pytest.approx(-10)
    assert {(c.claim, c.verdict) for c in verdicts.values()} == {(THEORY, "supported")}
    normal = [replace(c, normalised=True) for c in theory if c.rho]
    close = [boundary_run(spec, 0.005) for spec in with_seeds([theory[0], *normal], 2)]
    used = shown(Results.of(close), "theory", [theory[0], *normal])
    assert {(c.claim, c.verdict) for c in used} == {(NORMALISED, "equivalent")}, "half a percent is below the tolerance"


def test_a_slower_step_contradicts_the_claim_on_cost():
    cost = catalogue.cells("cost", "smoke")
    slow = shown(results_of(cost, 2, cost_run), "table4", cost)
    assert all(c.adjusted_p <= len(slow) * c.p for c in slow)
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
    assert summary.claims[-1].startswith("Not run")
    assert all(claim in summary.claims[-1] for claim in (FLATTER, THEORY, COST))
    assert [note for note in summary.notes if "accuracy (all other claims" in note]
    assert summary.notes[0].endswith("msam over shared, resnet8 on cifar10: not run.")
    alone = documents_of("smoke", [replace(chosen, seeds=1)], runs)[-1]
    assert alone.claims[0] == f"{OVER_SAM}: one seed, no interval."
    assert OVER_SAM in summary.terminal()
    assert "mSAM, m=4 over SAM" in summary.markdown()
    assert "smoke" in summary.title


def one(family, p, mean=2.0, half_width=1.0, margin=1.0):
    """A claim and a comparison on it with this p value."""
    contrast = Contrast(name="a", text="a", arms=("msam", "sam"), isolates="nothing", family=family)
    interval = Interval(mean, half_width, 8)
    return Claim(contrast, None), Comparison("", "", interval, (0.0, 0.0), "", p=p, family=family, margin=margin)


def test_verdicts_go_by_the_adjusted_p_value_within_a_family():
    alone, *_ = judged([one("cost", 0.03), one("flatness", 0.03)])
    assert (alone.adjusted_p, alone.verdict) == (0.03, "supported")
    both = judged([one("cost", 0.03), one("flatness", 0.6), one("cost", 0.04)])
    assert [(c.adjusted_p, c.verdict) for c in both] == [
        (pytest.approx(0.06), "inconclusive"),
        (0.6, "inconclusive"),
        (pytest.approx(0.06), "inconclusive"),
    ]
    primary = judged([one("primary", 0.04), *[one("accuracy", 0.04)] * 20])
    assert [c.verdict for c in primary] == ["supported"] + 20 * ["inconclusive"]


@pytest.mark.parametrize(
    ("p", "mean", "half_width", "margin", "verdict"),
    [
        (0.001, -2.0, 0.5, 1.0, "contradicted"),
        (0.001, 0.3, 0.1, 1.0, "supported"),  # and smaller than the margin
        (0.2, 0.2, 0.5, 1.0, "equivalent"),
        (0.2, 0.2, 1.1, 1.0, "inconclusive"),
        (0.2, 0.2, 0.5, math.nan, "inconclusive"),
    ],
)
def test_an_effect_within_the_margin_is_equivalent_to_none(p, mean, half_width, margin, verdict):
    (judged_one,) = judged([one("accuracy", p, mean, half_width, margin)])
    assert judged_one.verdict == verdict


def test_the_primary_comparison_is_a_family_of_its_own(monkeypatch):
    cells = [cell for cell in catalogue.cells("table1", "smoke") if cell.model == "resnet8"]
    monkeypatch.setattr(
        "analysis.contrasts.catalogue.primary",
        lambda profile: catalogue.Primary("table1", "resnet8", "cifar10", ("msam", "sam")),
    )
    runs = Results.of([accuracies(spec, {"msam": 0.02}) for spec in with_seeds(cells, 3)])
    found = comparisons(runs, {"table1": Target("table1", tuple(cells), 3)})
    assert [(c.claim, c.family, c.adjusted_p == c.p) for c in found if c.primary] == [(OVER_SAM, "primary", True)]
    assert {c.family for c in found if not c.primary} == {"accuracy"}


def test_the_net_contrast_subtracts_each_methods_own_baseline_by_seed():
    def noisy(spec):
        value = 0.5 + (hash((spec.method, spec.seed)) % 97) / 1000
        return Finished(spec, {"test_accuracy": value, "wall_seconds": 1.0}, [], [SESSION])

    runs = [noisy(spec) for spec in with_seeds(CELLS, 3)]
    found = comparisons(Results.of(runs), {"table1": Target("table1", tuple(CELLS), 3)})
    (net,) = (c for c in found if c.claim == NET)
    by = {(run.spec.method, run.spec.seed): 100 * run.summary["test_accuracy"] for run in runs}
    differences = [by["msam", s] - by["control", s] - by["sam", s] + by["base", s] for s in range(3)]
    assert net.difference == pytest.approx(tuple(mean_interval(differences)))
    assert net.what == "(mSAM, m=4 - SGD, m=4 micro-batches) - (SAM - SGD)"
    assert len(net.run_ids.split()) == 12
    three = [cell for cell in CELLS if cell.method != "control"]
    assert NET not in {c.claim for c in comparisons(Results.of(runs), {"table1": Target("table1", tuple(three), 3)})}


def test_a_page_for_each_claim_says_what_the_verdict_rests_on():
    runs = Results.of([accuracies(spec, {"msam": 0.02}) for spec in with_seeds(CELLS, 3)])
    chosen = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=3)
    files = output_files("smoke", [chosen], runs)
    numbers = document_claims("smoke", runs, {"table1": chosen}).numbers
    names = {contrast.name for contrast in ALL if contrast.text in set(numbers["claim"])}
    assert {path for path in files if path.startswith("claims/")} == {f"claims/{name}.md" for name in names}
    page, row = files["claims/msam-over-sam.md"], next(numbers[numbers["claim"] == OVER_SAM].itertuples())
    assert page.startswith(f"# {OVER_SAM}\n\n**Verdict:** supported in 1 comparison.")
    steps = CELLS[0].examples // CELLS[0].batch_size * CELLS[0].epochs
    for words in (
        f"+{row.difference:.2f} ± {row.half_width:.2f} (3)",
        f"accuracy ({len(numbers)})",
        f"{CELLS[0].examples} images, {CELLS[0].epochs} epochs, {steps} steps",
        "a processor",
        "6 runs at 3 seeds",
        "`python -m experiments run table1 --profile smoke --seeds 3`",
        "`python -m analysis judge msam-over-sam --profile smoke`",
        "an adjusted p of 0.05 or more on further seeds",
        "resnet8, cifar10: the arms differ in m (4 and 1).",
        *row.run_ids.split(),
    ):
        assert words in page, words
    assert "the arms differ in rho (0.1 and 0)." in files["claims/msam-over-control.md"]


def test_a_page_says_that_arms_differ_in_no_further_setting():
    every = catalogue.cells("resnet_cifar", "smoke")
    chosen = replace(target("table1", "smoke"), cells=tuple(every), seeds=2)
    runs = Results.of([accuracies(spec, {"msam": 0.02}) for spec in with_seeds(every, 2)])
    page = output_files("smoke", [chosen], runs)["claims/msam-over-shared.md"]
    assert "resnet8, cifar10: the arms have the same rho, m, epochs and learning rate." in page


def test_a_page_on_flatness_has_the_difference_of_training_loss_beside_it():
    flat = [cell for cell in catalogue.cells("hessian", "smoke") if cell.model == "resnet8"]
    chosen = replace(target("table3", "smoke"), cells=tuple(flat), seeds=3)
    runs = [curvature_run(spec) for spec in with_seeds(flat, 3)]
    for run in runs:
        gain = (0.25, 0.5, 0.75)[run.spec.seed] if run.spec.method == "msam" and not run.spec.shared else 0.0
        run.summary["train_loss"] = 1 + gain
    page = output_files("smoke", [chosen], Results.of(runs))["claims/flatness-msam-over-sam.md"]
    paired = mean_interval([0.25, 0.5, 0.75])
    assert f"; difference of training loss +{paired.mean:.3f} ± {paired.half_width:.3f} (3)." in page
    assert "Lambda 1 is the largest eigenvalue" in page


def test_a_look_before_all_planned_seeds_have_run_is_called_interim(monkeypatch):
    """In the notes of the claims, on the page, and where the primary comparison is named; not with all seeds."""
    monkeypatch.setattr(
        "analysis.contrasts.catalogue.primary",
        lambda profile: catalogue.Primary("table1", "resnet8", "cifar10", ("msam", "sam")),
    )
    runs = Results.of([accuracies(spec, {"msam": 0.02}) for spec in with_seeds(CELLS, 3)])
    chosen = replace(target("table1", "smoke"), cells=tuple(CELLS), seeds=3)
    for planned, early in ((3, False), (4, True)):
        monkeypatch.setattr(catalogue, "PUBLISHED_SEEDS", {"smoke": {"table1": planned}})
        files = output_files("smoke", [chosen], runs)
        for path in ("tables/claims.md", "claims/msam-over-sam.md", "report.html"):
            assert ("(interim: 3 of 4 seeds)" in files[path]) == early, path
        assert ("have fewer seeds than were planned (table1 4)" in files["tables/claims.md"]) == early


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
