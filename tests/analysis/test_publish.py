"""Publishing: which runs may be committed, and that committed tables follow from committed runs."""

import sys
from dataclasses import replace

import pandas as pd
import pytest

from analysis import publish as publishing
from analysis.__main__ import main
from analysis.collect import collect
from analysis.columns import csv_text
from analysis.frames import Results
from analysis.publish import Refused, drawn, mixed, publish, redraw, target
from experiments.harness.runs import catalogue
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import timing_of, with_seeds
from experiments.harness.runs.spec import SpecError
from tests.fixtures.make_runs import CONTROL, LINEAR, MSAM, SAM, SGD, write_run

GRID = [replace(SGD, holdout_examples=50, learning_rate=rate) for rate in (0.05, 0.1, 0.2)]
OTHER = replace(SGD, model="wrn-10-1")
pytestmark = pytest.mark.usefixtures("sketches")  # rendered ones: exhibits/test_exhibits.py
FILES = {"runs.csv", "curves.csv", "provenance.jsonl"}
TABLE = {
    *(f"claims/{name}.md" for name in ("msam-over-sam", "msam-over-base", "sam-over-base")),
    "tables/table1.md",
    "tables/table1.csv",
    "tables/table1.tex",
    "tables/published.md",
    "figures/contrasts.pdf",
    "figures/contrasts.png",
    "figures/curves.pdf",
    "figures/curves.png",
    *(f"tables/claims.{form}" for form in ("md", "csv", "tex")),
    "report.html",
}


def experiment(name, table, cells, tuning=()):
    runs, grid = {"smoke": list(cells)}, {"smoke": list(tuning)}
    return catalogue.Experiment(name=name, table=table, summary="", runs=runs, tuning=grid if tuning else {})


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """A catalogue for these tests, so that they do not depend on the experiments."""
    content = {"one": experiment("one", "table1", [SGD, SAM, MSAM], GRID)}
    monkeypatch.setattr(catalogue, "catalogue", lambda: content)
    return content


@pytest.fixture
def two_tables(known):
    """A second table that shares its baseline with the first."""
    known["two"] = experiment("two", "widths", [SGD, OTHER])


def fill(root, cells, seeds=2, **session):
    for number, run in enumerate(with_seeds(cells, seeds)):
        write_run(root, run, 0.5 + number / 100, **session)


def published(root, *names, seeds=None):
    results = Results.of(collect(root).finished)
    publish(root / "smoke", "smoke", [target(name, "smoke", root, seeds) for name in names], results)
    return files(root / "smoke")


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ids(folder):
    return set(Results.read(folder).runs["run_id"])


def test_publishing_writes_exactly_the_expected_runs(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM, CONTROL, LINEAR], seeds=3)
    assert set(published(tmp_path, "table1")) == FILES | TABLE
    expected = {run.run_id for run in with_seeds([SGD, SAM, MSAM], 2)}
    results = Results.read(tmp_path / "smoke")
    assert set(results.runs["run_id"]) == set(results.curves["run_id"]) == set(results.provenance) == expected
    table = (tmp_path / "smoke/tables/table1.md").read_text()
    assert "not run" not in table
    assert "(2)" in table


def test_publishing_twice_changes_no_byte(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM])
    assert published(tmp_path, "table1") == published(tmp_path, "table1")


def test_redraw_gives_the_same_bytes_from_only_the_committed_runs(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM], seeds=3)
    fill(tmp_path, GRID)
    before = published(tmp_path, "table1", seeds=3) | published(tmp_path, "table1-tuning")
    assert {"tables/table1-tuning.md", "tables/table1.csv"} <= set(before)
    assert b"3 seeds per cell" in before["tables/table1.md"]
    for path in (tmp_path / "smoke/tables").iterdir():
        path.unlink()
    (tmp_path / "runs").rename(tmp_path / "away")
    redraw(tmp_path / "smoke", "smoke")
    assert files(tmp_path / "smoke") == before


def test_redraw_without_committed_runs_names_the_command_that_writes_them(tmp_path):
    with pytest.raises(RecordError, match="--publish"):
        redraw(tmp_path / "smoke", "smoke")


def test_grid_and_table_share_the_files_and_keep_each_others_rows(tmp_path):
    fill(tmp_path, GRID)
    published(tmp_path, "table1-tuning")
    grid = ids(tmp_path / "smoke")
    fill(tmp_path, [SGD, SAM, MSAM])
    (tmp_path / "runs" / GRID[0].run_id / "summary.json").unlink()  # only its committed row remains
    published(tmp_path, "table1")
    assert ids(tmp_path / "smoke") == grid | {run.run_id for run in with_seeds([SGD, SAM, MSAM], 2)}


def test_the_blocks_of_a_grid_may_begin_at_different_seeds(known):
    grid = [*GRID, replace(OTHER, holdout_examples=50, seed=100)]
    known["one"] = experiment("one", "table1", [SGD], grid)
    assert target("table1-tuning", "smoke").runs == with_seeds(grid, catalogue.TUNING_SEEDS)


def test_stale_rows_of_the_table_are_removed(tmp_path, known):
    fill(tmp_path, [SGD, SAM, MSAM], seeds=3)
    published(tmp_path, "table1", seeds=3)
    known["one"] = experiment("one", "table1", [SGD, MSAM], GRID)
    published(tmp_path, "table1")
    assert ids(tmp_path / "smoke") == {run.run_id for run in with_seeds([SGD, MSAM], 2)}
    assert set(Results.read(tmp_path / "smoke").provenance) == ids(tmp_path / "smoke")


def test_shared_baseline_belongs_to_both_tables(tmp_path, two_tables):
    fill(tmp_path, [SGD, SAM, MSAM], seeds=3)
    fill(tmp_path, [OTHER])
    published(tmp_path, "table1", seeds=3)
    published(tmp_path, "widths")
    assert replace(SGD, seed=2).run_id in ids(tmp_path / "smoke")
    seeds = {t.name: t.seeds for t in drawn(tmp_path / "smoke", "smoke", Results.read(tmp_path / "smoke"))}
    assert seeds == {"table1": 3, "widths": 2}


def test_table_that_only_shares_a_published_run_is_not_drawn(tmp_path, two_tables):
    fill(tmp_path, [SGD, SAM, MSAM])
    assert set(published(tmp_path, "table1")) == FILES | TABLE


def test_publishing_one_table_may_not_mix_versions_in_another(tmp_path, two_tables):
    fill(tmp_path, [SGD, SAM, MSAM])
    before = published(tmp_path, "table1")
    fill(tmp_path / "later", [SGD, OTHER], code="0ther")
    results = Results.of(collect(tmp_path / "later").finished)
    with pytest.raises(Refused, match="table1 shares runs with these tables"):
        publish(tmp_path / "smoke", "smoke", [target("widths", "smoke")], results)
    assert files(tmp_path / "smoke") == before


def test_missing_run_is_rejected_with_the_command_that_makes_it(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM])
    (tmp_path / "runs" / replace(MSAM, seed=1).run_id / "summary.json").unlink()
    with pytest.raises(Refused) as refusal:
        published(tmp_path, "table1")
    assert "table1 lacks 1 of its 6 runs, first resnet8 cifar10 mSAM m=4" in str(refusal.value)
    assert f"make them with `python -m experiments run table1 --profile smoke --results {tmp_path}`." in str(
        refusal.value
    )
    assert not (tmp_path / "smoke").exists()
    with pytest.raises(Refused, match=r"lacks 7 of its 12 runs.*--seeds 4"):
        published(tmp_path, "table1", seeds=4)


def test_a_table_can_be_published_block_by_block_and_seed_by_seed(tmp_path, known, monkeypatch, capsys):
    """The seeds of each row are counted in it, up to those that the table is to have."""
    known["one"] = experiment("one", "table1", [SGD, SAM, MSAM, OTHER])
    monkeypatch.setattr(catalogue, "PUBLISHED_SEEDS", {"smoke": {"table1": 4}})
    fill(tmp_path, [SGD], seeds=5)
    fill(tmp_path, [SAM], seeds=3)
    where = ("--results", tmp_path, "--profile", "smoke", "table1", "--publish")
    status, _, error = command(monkeypatch, capsys, *where)
    assert (status, "table1 lacks 9 of its 16 runs" in error) == (2, True)
    status, out, _ = command(monkeypatch, capsys, *where, "--partial")
    assert (status, "table1 lacks 9 of its 16 runs" in out) == (0, True)
    table = pd.read_csv(tmp_path / "smoke/tables/table1.csv")
    rows = {row.method: row for row in table[table.model == SGD.model].itertuples()}
    assert [rows[name].n for name in ("base", "sam", "msam")] == [4, 3, 0]
    assert rows["sam"].over_base_n == 3
    assert (tmp_path / "smoke/tables/table1.md").read_text().count("not run") >= 2
    before = files(tmp_path / "smoke")
    redraw(tmp_path / "smoke", "smoke")
    assert files(tmp_path / "smoke") == before


def test_run_without_a_score_is_missing(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM])
    write_run(tmp_path, MSAM, 0.5).finish({"test_accuracy": float("nan")})
    with pytest.raises(Refused, match="lacks 1 of its 6 runs"):
        published(tmp_path, "table1")


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        ({"code": "0ther"}, r"table1 \(resnet8\) has runs from several versions of training code \(0ther, "),
        ({"packages": {"torch": "9.9"}}, r"several versions of torch \(0.0-invented, 9.9\)"),
        ({"data_checksum": "other"}, "several versions of cifar10's data"),
        ({"dirty": True}, "1 runs from a tree with uncommitted changes"),
        ({"dirty": None}, "1 runs from a tree with uncommitted changes"),
        ({"commit": None}, "1 runs from an unknown commit"),
    ],
)
def test_runs_of_mixed_or_unknown_provenance_are_rejected_and_nothing_is_written(tmp_path, session, reason):
    fill(tmp_path, [SGD, SAM])
    fill(tmp_path, [MSAM], seeds=2)
    before = published(tmp_path, "table1")
    for path in (tmp_path / "runs" / MSAM.run_id).iterdir():
        path.unlink()
    write_run(tmp_path, MSAM, 0.9, **session)
    with pytest.raises(Refused, match=reason) as refusal:
        published(tmp_path, "table1")
    assert "retrain them with" in str(refusal.value)
    assert files(tmp_path / "smoke") == before


def test_run_resumed_with_other_code_is_rejected(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM])
    write_run(tmp_path, MSAM, 0.5, code="0ther")  # a second session of the same run
    with pytest.raises(Refused, match="several versions of training code"):
        published(tmp_path, "table1")


def test_table_may_span_clean_commits_of_the_same_training_code_and_says_so(tmp_path):
    fill(tmp_path, [SGD, SAM])
    fill(tmp_path, [MSAM], commit="fedcba9")
    table = published(tmp_path, "table1")["tables/table1.md"]
    assert b"These runs have the same training code, at several commits" in table


def test_a_block_of_a_table_can_be_retrained_alone(tmp_path, known):
    known["one"] = experiment("one", "table1", [SGD, SAM, MSAM, OTHER])
    fill(tmp_path, [SGD, SAM, MSAM, OTHER], seeds=3)
    published(tmp_path, "table1", seeds=3)
    later = tmp_path / "later"
    fill(later, [SGD, SAM], seeds=3, code="0ther")
    results = Results.of(collect(later).finished)
    chosen = [target("table1", "smoke", seeds=3)]
    with pytest.raises(Refused, match=r"table1 \(resnet8\) has runs from several versions of training code"):
        publish(tmp_path / "smoke", "smoke", chosen, results)
    fill(later, [MSAM], seeds=3, code="0ther")
    publish(tmp_path / "smoke", "smoke", chosen, Results.of(collect(later).finished))
    runs = Results.read(tmp_path / "smoke").runs
    assert {(row.model, row.code) for row in runs.itertuples()} == {
        ("resnet8", "0ther"),
        ("wrn-10-1", "c0dec0dec0dec0de"),
    }
    assert len(runs) == 12


AVX2, AVX512 = ({"cpu": "EPYC", "torch_flags": {"cpu_capability": name}} for name in ("AVX2", "AVX512"))


def test_a_model_whose_runs_come_from_several_types_of_processor_is_rejected_unless_it_was_so(tmp_path, known):
    known["one"] = experiment("one", "table1", [SGD, SAM, MSAM, OTHER])
    fill(tmp_path, [SGD, SAM, OTHER], **AVX2)
    fill(tmp_path, [MSAM], **AVX512)
    with pytest.raises(Refused) as refusal:
        published(tmp_path, "table1")
    words = "several types of processor (EPYC (AVX2) (4 runs), EPYC (AVX512) (2 runs))"
    assert f"table1 (resnet8) has runs from {words}" in str(refusal.value)
    assert "train all runs of resnet8 on one type with `python -m experiments run table1" in str(refusal.value)
    assert "wrn-10-1" not in str(refusal.value)
    another = tmp_path / "another"
    fill(another, [SGD, SAM, MSAM], **AVX512)
    fill(another, [OTHER], **AVX2)  # another model may come from another type
    assert "tables/table1.md" in published(another, "table1")


def test_what_was_committed_from_several_types_of_processor_may_stay_so(tmp_path, monkeypatch):
    fill(tmp_path, [SGD, SAM], **AVX2)
    fill(tmp_path, [MSAM], **AVX512)
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "_processors", lambda *_: [])
        before = published(tmp_path, "table1")
    assert published(tmp_path, "table1") == before
    write_run(tmp_path, SGD, 0.5, cpu="Xeon")  # its second session, on a third type
    with pytest.raises(Refused, match=r"Xeon \(1 runs\)"):
        published(tmp_path, "table1")


def test_seeds_are_published_one_machine_after_another(tmp_path):
    """The first four are only in the committed files when the next four come, and all eight stand in the table."""
    cells, folder = [SGD, SAM, MSAM], tmp_path / "results/smoke"
    fill(tmp_path / "first", cells, seeds=4, **AVX2)
    publish(folder, "smoke", [target("table1", "smoke", seeds=4)], Results.of(collect(tmp_path / "first").finished))
    first = Results.read(folder).runs
    later = [replace(cell, seed=4) for cell in cells]
    for root, session in (("other", AVX512), ("second", AVX2)):
        fill(tmp_path / root, later, seeds=4, **session)
    eight = [target("table1", "smoke", seeds=8)]
    with pytest.raises(Refused, match="several types of processor"):
        publish(folder, "smoke", eight, Results.of(collect(tmp_path / "other").finished))
    publish(folder, "smoke", eight, Results.of(collect(tmp_path / "second").finished))
    assert "(8)" in (folder / "tables/table1.md").read_text()
    assert ids(folder) == {run.run_id for run in with_seeds(cells, 8)}
    after = Results.read(folder).runs
    pd.testing.assert_frame_equal(
        after[after["seed"] < 4].reset_index(drop=True), first.reset_index(drop=True), check_dtype=False
    )
    assert [t.seeds for t in drawn(folder, "smoke", Results.read(folder))] == [8]


def test_models_of_a_table_may_come_from_different_training_code(tmp_path, two_tables):
    fill(tmp_path, [SGD, SAM, MSAM])
    published(tmp_path, "table1")
    fill(tmp_path / "later", [OTHER], code="0ther")
    results = Results.of([*collect(tmp_path / "later").finished, *collect(tmp_path).finished])
    publish(tmp_path / "smoke", "smoke", [target("widths", "smoke")], results)
    assert {run.run_id for run in with_seeds([SAM, OTHER], 2)} <= ids(tmp_path / "smoke")


def test_table_4_compares_models_and_needs_one_version_of_the_training_code(tmp_path, known):
    networks = [replace(SGD, model=model) for model in ("resnet8", "wrn-10-1")]
    costs = [timing_of(network, rho=0.1, micro_batches=4, rounds=2) for network in networks]
    known["cost"] = experiment("cost", "table4", costs)
    fill(tmp_path, costs[:1])
    fill(tmp_path, costs[1:], code="0ther")
    results = Results.of(collect(tmp_path).finished)
    assert "several versions of training code" in " ".join(mixed(target("table4", "smoke"), results))


def test_rows_from_before_a_column_get_it_from_their_sessions(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM])
    published(tmp_path, "table1")
    path = tmp_path / "smoke/runs.csv"
    whole = Results.read(tmp_path / "smoke").runs
    path.write_text(csv_text(whole.drop(columns=["torch", "cpu_capability"])))
    again = Results.read(tmp_path / "smoke").runs
    assert set(again["torch"]) == {"0.0-invented"}
    pd.testing.assert_frame_equal(again[whole.columns], whole)


def test_grid_may_span_commits_and_unclean_trees_but_not_versions_of_the_training_code(tmp_path):
    fill(tmp_path, GRID[:2])
    fill(tmp_path, GRID[2:], commit="fedcba9", dirty=True)
    assert b"chosen" in published(tmp_path, "table1-tuning")["tables/table1-tuning.md"]
    for run in with_seeds(GRID[2:], 2):
        (tmp_path / "runs" / run.run_id / "env.json").unlink()
        write_run(tmp_path, run, 0.5, commit="fedcba9", code="0ther")
    with pytest.raises(Refused, match="several versions of training code"):
        published(tmp_path, "table1-tuning")


def test_all_reasons_are_reported_at_once(tmp_path):
    fill(tmp_path, [SGD], dirty=True)
    with pytest.raises(Refused) as refusal:
        published(tmp_path, "table1", "table1-tuning")
    assert len(str(refusal.value).splitlines()) == 3


def test_an_experiment_cannot_be_published(tmp_path):
    fill(tmp_path, [SGD, SAM, MSAM])
    with pytest.raises(Refused, match=r"one is an experiment.*\(table1\)"):
        published(tmp_path, "one")


def test_target_without_cells_in_the_profile_is_rejected():
    with pytest.raises(SpecError, match="table1 has no runs in the profile 'paper'"):
        target("table1", "paper")


def command(monkeypatch, capsys, *arguments):
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["analysis", *map(str, arguments)])
    try:
        main()
        status = 0
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_command_line_from_runs_to_committed_table(tmp_path, monkeypatch, capsys):
    fill(tmp_path, [SGD, SAM, MSAM])
    common = ("--results", tmp_path, "--profile", "smoke")
    status, out, _ = command(monkeypatch, capsys, *common)
    assert status == 0
    assert set(files(tmp_path / "local/smoke")) == FILES | TABLE | {"unchanged.json"}
    assert not (tmp_path / "smoke").exists()
    assert "committed" not in out.split("Published elsewhere")[0]
    assert "grid" not in out  # none of its runs exist

    status, _, _ = command(monkeypatch, capsys, *common, "--publish")
    assert status == 0
    write_run(tmp_path, SGD, 0.9)
    fill(tmp_path, GRID[:1])
    status, out, _ = command(monkeypatch, capsys, *common)
    row = next(line for line in out.splitlines() if line.startswith("SGD"))
    assert row.split("  ")[-1].strip() == "51.50 ± 19.06 (2)"  # as published, 50 and 53
    assert "71.50" in row  # now, 90 and 53
    assert "Foret et al. 2021" not in out  # rows for a ResNet, not for a WRN
    assert "RW-SAM 96.24" in out
    assert "The grid of Table 1" in out
    assert "table1-tuning lacks 4 of its 6 runs" in out


def test_command_line_reports_seeds_left_out_and_problems(tmp_path, monkeypatch, capsys):
    fill(tmp_path, [SGD, SAM, MSAM], seeds=3)
    (tmp_path / "runs" / "foreign").mkdir()
    (tmp_path / "runs" / "foreign" / "x").touch()
    common = ("table1", "--results", tmp_path, "--profile", "smoke")
    _, out, _ = command(monkeypatch, capsys, *common)
    assert "table1 leaves out 3 runs with higher seeds: add them with --seeds." in out
    assert "Warning: " in out
    _, out, _ = command(monkeypatch, capsys, *common, "--seeds", "3")
    assert "higher seeds" not in out
    assert "(3)" in out


def test_damaged_committed_table_is_reported(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, SGD, 0.5)
    (tmp_path / "smoke/tables").mkdir(parents=True)
    (tmp_path / "smoke/tables/table1.csv").write_text("a,b\n1,2\n")
    status, _, error = command(monkeypatch, capsys, "--results", tmp_path, "--profile", "smoke")
    assert status == 2
    assert "restore it with git" in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["no-such-table"], "Unknown experiment or table"),
        (["--profile", "huge"], "choose one of smoke, cpu, gpu, paper"),
        (["--results", "/nowhere/at/all"], "does not exist"),
        (["table1", "--seeds", "0"], "must be 1 or more"),
        (["table1:x"], "'x' is not a number of seeds"),
        (["table1", "--from-committed"], "leave out targets"),
        (["--from-committed", "--partial"], "leave out targets"),
        (["table1", "--partial"], "--partial is for --publish"),
        (["table1", "--publish", "--partial", "--profile", "smoke"], "table1 lacks 6 of its 6 runs"),
        (["--seeds", "two"], "two"),
        (["--no-such-flag"], "no-such-flag"),
    ],
)
def test_mistakes_exit_with_status_2(tmp_path, monkeypatch, capsys, arguments, word):
    where = [] if "--results" in arguments else ["--results", tmp_path]
    status, out, error = command(monkeypatch, capsys, *arguments, *where)
    assert (status, out) == (2, "")
    assert word in error


def test_unwritable_results_are_reported(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, SGD, 0.5)
    (tmp_path / "local").write_text("a file where a folder should be")
    status, _, error = command(monkeypatch, capsys, "--results", tmp_path, "--profile", "smoke")
    assert status == 2
    assert "cannot be written" in error


def test_runs_made_outside_git_by_this_checkouts_code_may_be_published(tmp_path, monkeypatch):
    """Their commit is unknown, but the hash of the training code names it, unless this checkout has changes."""
    fill(tmp_path, [SGD, SAM])
    fill(tmp_path, [MSAM], seeds=2)
    for path in (tmp_path / "runs" / MSAM.run_id).iterdir():
        path.unlink()
    record = write_run(tmp_path, MSAM, 0.9, commit=None, dirty=None)
    code = record.environments()[-1]["code"]
    clean = {"dirty": False}
    monkeypatch.setattr(publishing, "checkout", lambda command: clean)
    monkeypatch.setattr(publishing, "code_hash", lambda: "0ther")
    with pytest.raises(Refused, match="by training code that is not this checkout's"):
        published(tmp_path, "table1")
    monkeypatch.setattr(publishing, "code_hash", lambda: code)
    published(tmp_path, "table1")
    clean["dirty"] = True
    with pytest.raises(Refused, match="uncommitted changes here"):
        published(tmp_path, "table1")
