"""The committed results: what may be published, and the tables that follow from what was."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from analysis.cells import run_ids
from analysis.claims import document_claims
from analysis.document import Document, table_files
from analysis.exhibit import Shown, Target
from analysis.exhibits import exhibit_of, pages, tables
from analysis.frames import UNKNOWN, Results, write_files
from analysis.report import report
from experiments.harness.runs import catalogue
from experiments.harness.runs.command_line import Mistake
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_ranks, with_seeds
from experiments.harness.runs.record import DEFAULT_ROOT
from experiments.harness.runs.spec import Run


class Refused(Mistake):
    """A table that may not be published. The message has a sentence for each reason, with its mend."""


def target(name: str, profile: str, root: Path = DEFAULT_ROOT, seeds: int | None = None, ranks: int = 1) -> Target:
    """A table, an experiment or one of their grids, looked up in the catalogue.

    Raises:
        SpecError: for an unknown name, or one that has no cells in this profile.
    """
    runs = with_ranks(catalogue.runs(name, profile, seeds), ranks)
    used = catalogue.cells(name.removesuffix("-tuning"), profile) if name.endswith("-tuning") else []
    cells = tuple(dict.fromkeys(replace(run, seed=0) for run in runs))
    return Target(name, cells, 1 + max(run.seed for run in runs), tuple(used), root, catalogue.varies(name))


def publishable(profile: str) -> list[Target]:
    """The tables and grids that have cells in this profile, with the profile's own number of seeds."""
    names = [name + end for name in tables() for end in ("", "-tuning") if name + end in catalogue.targets()]
    return [target(name, profile) for name in names if catalogue.cells(name, profile)]


def publish(folder: Path, profile: str, chosen: Sequence[Target], results: Results) -> list[Path]:
    """Write the chosen tables and their runs into the committed folder of a profile, all or nothing.

    Rows of other tables that are committed already stay, and so do those of the chosen ones that are not among the
    results: a block of a table can be trained anew alone. Other rows of the chosen tables go. Every committed table is
    then drawn again from the committed files, as `redraw` does.

    Args:
        folder: `results/<profile>`.
        profile: the profile.
        chosen: the tables to publish.
        results: all finished runs.

    Returns:
        The files written.

    Raises:
        Refused: if a run is missing, or the runs of a model come from several versions of the training code, of torch
            or of the data, or any from an unknown commit or (a grid's may) an unclean tree.
        RecordError: if the committed files are damaged, or the folder cannot be written.
    """
    before = Results.read(folder) if (folder / "runs.csv").exists() else Results.of([])
    wanted = {run.run_id for t in chosen for run in t.runs}
    fresh = results.only(wanted).joined(before.only(wanted - set(results.runs["run_id"])))
    reasons = [reason for t in chosen for reason in [*_not_a_table(t), *_missing(t, fresh), *mixed(t, fresh)]]
    if reasons:
        raise Refused("\n".join(reasons))
    after = before.only(_kept(folder, before, profile, chosen)).joined(fresh)
    tables_now = drawn(folder, profile, after)
    for other in tables_now:
        if mixed(other, after) and not mixed(other, before):
            reasons.append(f"{other.name} shares runs with these tables: publish it together with them.")
    if reasons:
        raise Refused("\n".join(reasons))
    files = {**after.texts(), **everything(profile, tables_now, after)}
    write_files(folder, files)
    return [folder / name for name in files]


def redraw(folder: Path, profile: str) -> list[Path]:
    """Write the committed tables again, from the committed runs alone.

    Returns:
        The files written.

    Raises:
        RecordError: if nothing is committed, or it is damaged.
    """
    if not (folder / "runs.csv").exists():
        raise RecordError(
            f"There is no {folder / 'runs.csv'} yet: `python -m analysis --profile {profile} --publish` writes it."
        )
    results = Results.read(folder)
    found = drawn(folder, profile, results)
    files = everything(profile, found, results)
    write_files(folder, files)
    return [folder / name for name in files]


def documents(
    profile: str, targets: Sequence[Target], results: Results, failures: Mapping[str, str] | None = None
) -> list[Document]:
    """The tables, and behind them what they say of the abstract's claims, if one of them says anything."""
    found = [exhibit_of(t.name).document(t, results.runs, failures) for t in targets]
    claims = document_claims(profile, results, _shown(targets))
    return [*found, claims] if len(claims.numbers) else found


def everything(
    profile: str, targets: Sequence[Target], results: Results, told: Sequence[Document] | None = None
) -> dict[str, str | bytes]:
    """Tables, claims, figures and the report, by their path below a results folder; `told` if `documents` is known."""
    told = documents(profile, targets, results) if told is None else told
    pictures = pages(results, _shown(targets))
    shown = results.only({run.run_id for t in targets for run in t.runs})
    page = report(profile, told, pictures, [cell for t in targets for cell in t.cells], shown)
    drawings = {path: picture for one in pictures for path, picture in one.files.items()}
    return {**table_files(told), **drawings, "report.html": page}


def _shown(targets: Sequence[Target]) -> Shown:
    return {t.name: t for t in targets if not t.tuning}


def drawn(folder: Path, profile: str, results: Results) -> list[Target]:
    """The tables of a committed folder: those it has files of, and those whose every cell has a run.

    A table's number of seeds is that of its cell with the fewest, for cells may be shared with larger tables.
    """
    ids = set(results.runs["run_id"])
    found = []
    for t in publishable(profile):
        counts = [_seeds(cell, ids) for cell in t.cells]
        if any(counts) and (all(counts) or (folder / "tables" / f"{t.name}.csv").exists()):
            found.append(replace(t, seeds=min(filter(None, counts))))
    return found


def mixed(t: Target, results: Results) -> list[str]:
    """Why a table's runs may not stand together in one committed table."""
    rows = results.runs[results.runs["run_id"].isin({run.run_id for run in t.runs})]
    # What is compared are the runs of a model, and what must be one is the code that trained them, known by a hash of
    # its content: a study that shares Table 1's baselines is added later, at a commit that differs in a list of runs. A
    # grid's second stage needs the outcome of its first to be written down, so its tree may be unclean.
    redo = f"commit your changes and train them again with `{_command(t)} --redo`"
    reasons = []
    # The times of Table 4 are compared across models too.
    whole = any(cell.kind == "cost" for cell in t.cells)
    for model, block in [("all", rows)] if whole else rows.groupby("model"):
        several = [("training code", "code", block), ("torch", "torch", block)]
        several += [(f"{dataset}'s data", "data_checksum", part) for dataset, part in block.groupby("dataset")]
        for word, column, part in several:
            said = sorted({one for cell in part[column].dropna() for one in cell.split("+")} - {UNKNOWN})
            if len(said) > 1:
                told = ", ".join(one[:12] for one in said)
                reasons.append(f"{t.name} ({model}) has runs from several versions of {word} ({told}): {redo}.")
    if unknown := sum(UNKNOWN in f"{a}+{b}".split("+") for a, b in zip(rows["commit"], rows["code"], strict=True)):
        reasons.append(f"{t.name} has {unknown} runs from an unknown commit, made outside git: {redo}.")
    if not t.tuning and (unclean := int((rows["dirty"].fillna(True) & (rows["commit"] != UNKNOWN)).sum())):
        reasons.append(f"{t.name} has {unclean} runs from a tree with uncommitted changes: {redo}.")
    return reasons


def missing(t: Target, results: Results) -> list[Run]:
    """The runs that a table expects and has no score of."""
    rows = results.runs.set_index("run_id")
    known = {run_id for cell in t.cells for run_id in run_ids(cell, rows, t.seeds)}
    return [run for run in t.runs if run.run_id not in known]


def missing_line(t: Target, gaps: Sequence[Run]) -> str:
    """A sentence that counts the missing runs and says how to make them."""
    count = f"{len(gaps)} of its {len(t.runs)} runs"
    return f"{t.name} lacks {count}, first {gaps[0].title}: `{_command(t)}` makes them."


def _missing(t: Target, results: Results) -> list[str]:
    gaps = missing(t, results)
    return [missing_line(t, gaps)] if gaps else []


def _not_a_table(t: Target) -> list[str]:
    if t.name.removesuffix("-tuning") in tables():
        return []
    return [f"{t.name} is an experiment, a part of a table: publish the table itself ({', '.join(tables())})."]


def _kept(folder: Path, before: Results, profile: str, chosen: Sequence[Target]) -> set[str]:
    """The committed runs of committed tables that are not published now."""
    names = {t.name for t in chosen}
    others = [t.cells for t in drawn(folder, profile, before) if t.name not in names]
    fresh = {run.run_id for t in chosen for run in t.runs}
    seeds = 1 + int(before.runs["seed"].max()) if len(before.runs) else 0
    return {run.run_id for cells in others for run in with_seeds(cells, seeds)} - fresh


def _seeds(cell: Run, ids: set[str]) -> int:
    """How many of seeds 0, 1, ... a cell has runs of, up to the first gap."""
    seeds = 0
    while replace(cell, seed=seeds).run_id in ids:
        seeds += 1
    return seeds


def _command(t: Target) -> str:
    profile = t.cells[0].profile
    usual = catalogue.TUNING_SEEDS if t.tuning else catalogue.SEEDS.get(profile)
    seeds = "" if t.seeds == usual else f" --seeds {t.seeds}"
    where = "" if t.root == DEFAULT_ROOT else f" --results {shlex.quote(str(t.root))}"
    return f"python -m experiments run {t.name} --profile {profile}{seeds}{where}"
