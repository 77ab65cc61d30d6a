"""The committed results: which runs may be published, and the tables drawn from them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis import forest_figure
from analysis.cells import run_ids
from analysis.claim_pages import claim_pages, page_files
from analysis.claims import document_claims
from analysis.document import Document, table_files
from analysis.exhibit import Shown, Target
from analysis.exhibits import exhibit_of, pages, tables
from analysis.frames import UNKNOWN, Results, write_files
from analysis.predictions import LARGEST_PUBLISHED, NAME
from analysis.report import report
from experiments.harness.runs import catalogue
from experiments.harness.runs.command_line import Mistake
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import with_ranks, with_seeds
from experiments.harness.runs.provenance import checkout, code_hash
from experiments.harness.runs.record import DEFAULT_ROOT, in_bytes
from experiments.harness.runs.spec import Run


class Refused(Mistake):
    """A table that cannot be published. The message has a sentence for each reason and how to fix it."""


def target(name: str, profile: str, root: Path = DEFAULT_ROOT, seeds: int | None = None, ranks: int = 1) -> Target:
    """Look up a table, an experiment or the grid of either in the catalogue.

    Raises:
        SpecError: for an unknown name, or one without cells in this profile.
    """
    catalogue.runs(name, profile, seeds)  # which rejects names and numbers
    cells = tuple(with_ranks(catalogue.cells(name, profile), ranks))
    used = catalogue.cells(name.removesuffix("-tuning"), profile) if name.endswith("-tuning") else []
    count = catalogue.usual_seeds(name, profile) if seeds is None else seeds
    return Target(name, cells, count, tuple(used), root, catalogue.varies(name))


def publishable(profile: str) -> list[Target]:
    """The tables and grids with cells in this profile, at the number of seeds that they are to have."""
    names = [name + end for name in tables() for end in ("", "-tuning") if name + end in catalogue.targets()]
    wanted = {name: catalogue.published_seeds(name, profile) for name in names if catalogue.cells(name, profile)}
    return [target(name, profile, seeds=seeds) for name, seeds in wanted.items()]


def publish(
    folder: Path, profile: str, chosen: Sequence[Target], results: Results, partial: bool = False
) -> list[Path]:
    """Write the chosen tables and their runs into the committed folder of a profile, all or nothing.

    Committed rows of other tables stay. So do committed rows of the chosen tables whose runs are not among the results,
    so that one block of a table can be retrained alone. Other rows of the chosen tables are removed. Every committed
    table is then redrawn from the committed files, as by `redraw`.

    Args:
        folder: `results/<profile>`.
        profile: the profile.
        chosen: the tables to publish.
        results: all finished runs. Runs whose predictions cannot be published are reported in its `predictions`.
        partial: whether runs may be missing, so that blocks and seeds are published as they are trained.

    Returns:
        The files written.

    Raises:
        Refused: if a run is missing and `partial` is False, or if all are; if the runs of a model come from several
            versions of the training code, of torch or of the data, or from several types of processor unless the
            committed ones do; if a run comes from an unknown commit or, except for grids, an unclean tree; or if the
            predictions are too large.
        RecordError: if the committed files are damaged, or the folder cannot be written.
    """
    before = Results.read(folder) if (folder / "runs.csv").exists() else Results.of([])
    wanted = {run.run_id for t in chosen for run in t.runs}
    fresh = results.only(wanted).joined(before.only(wanted - set(results.runs["run_id"])))
    reasons = [reason for t in chosen for reason in [*_not_a_table(t), *mixed(t, fresh)]]
    reasons += [reason for t in chosen for reason in _missing(t, fresh, partial)]
    reasons += [reason for t in chosen for reason in _processors(t, fresh, before)]
    if reasons:
        raise Refused("\n".join(reasons))
    after = before.only(_kept(folder, before, profile, chosen)).joined(fresh)
    tables_now = drawn(folder, profile, after, {t.name for t in chosen})
    for other in tables_now:
        if mixed(other, after) and not mixed(other, before):
            reasons.append(f"{other.name} shares runs with these tables: publish it together with them.")
        if other.name not in {t.name for t in chosen}:
            reasons += _processors(other, after, before)
    predictions = after.predicted() if after.predictions.sources or (folder / NAME).exists() else b""
    results.predictions.problems.update(after.predictions.problems)
    if len(predictions) > LARGEST_PUBLISHED:
        reasons.append(
            f"{folder / NAME} would have {in_bytes(len(predictions))}, more than {in_bytes(LARGEST_PUBLISHED)}: "
            "publish fewer seeds or fewer tables."
        )
    if reasons:
        raise Refused("\n".join(reasons))
    files = {**after.texts(), **output_files(profile, tables_now, after)}
    files |= {NAME: predictions} if predictions else {}
    write_files(folder, files)
    return [folder / name for name in files]


def redraw(folder: Path, profile: str) -> list[Path]:
    """Write the committed tables again, from the committed runs only.

    Returns:
        The files written.

    Raises:
        RecordError: if the committed files are missing or damaged.
    """
    if not (folder / "runs.csv").exists():
        raise RecordError(
            f"{folder / 'runs.csv'} does not exist: `python -m analysis --profile {profile} --publish` writes it."
        )
    results = Results.read(folder)
    targets = drawn(folder, profile, results)
    files = output_files(profile, targets, results)
    write_files(folder, files)
    return [folder / name for name in files]


def documents_of(
    profile: str, targets: Sequence[Target], results: Results, states: Mapping[str, str] | None = None
) -> list[Document]:
    """The tables, followed by the summary of the claims if they have any evidence."""
    documents = [exhibit_of(t.name).document(t, results.runs, states, results.predictions) for t in targets]
    claims = document_claims(profile, results, _shown(targets))
    return [*documents, claims] if len(claims.numbers) else documents


def output_files(
    profile: str, targets: Sequence[Target], results: Results, documents: Sequence[Document] | None = None
) -> dict[str, str | bytes]:
    """Tables, claims, figures and the report, by path below a results folder; the documents are made if not given."""
    documents = documents_of(profile, targets, results) if documents is None else documents
    pictures = pages(results, _shown(targets))
    shown = results.only({run.run_id for t in targets for run in t.runs})
    image_files = {path: picture for one in pictures for path, picture in one.files.items()}
    claims = next((d.numbers for d in documents if d.name == "claims"), None)
    about = [] if claims is None else claim_pages(claims, results.runs, targets)
    claimed = page_files(about) | ({} if claims is None else forest_figure.files(claims, results.runs, profile))
    page = report(profile, documents, pictures, targets, shown, about)
    return {**table_files(documents), **claimed, **image_files, "report.html": page}


def _shown(targets: Sequence[Target]) -> Shown:
    return {t.name: t for t in targets if not t.tuning}


def drawn(folder: Path, profile: str, results: Results, named: Collection[str] = ()) -> list[Target]:
    """The tables of a committed folder: those `named`, those that have files, and those with a run for every cell.

    A table has as many seeds as it is to have or, if none of its cells has so many, as the cell with the most. It has
    more if all cells do; cells may be shared with tables of more seeds.
    """
    ids = set(results.runs["run_id"])
    targets = []
    for t in publishable(profile):
        counts = [_seeds(cell, ids) for cell in t.cells]
        known = t.name in named or (folder / "tables" / f"{t.name}.csv").exists()
        if any(counts) and (all(counts) or known):
            targets.append(replace(t, seeds=max(min(filter(None, counts)), min(max(counts), t.seeds))))
    return targets


def mixed(t: Target, results: Results) -> list[str]:
    """The reasons why a table's runs may not be published together."""
    rows = results.runs[results.runs["run_id"].isin({run.run_id for run in t.runs})]
    # The runs of a model are compared, so they must come from the same training code. It is identified by a hash, not
    # by the commit: a study that shares Table 1's baselines is added by a later commit that only changes a list of
    # runs. The tree of a grid may be unclean, because its second stage needs the result of its first in the source.
    remedy = f"commit your changes and retrain them with `{t.command} --redo`"
    reasons = []
    # Table 4 also compares times between models.
    one_block = any(cell.kind == "cost" for cell in t.cells)
    for model, block in [("all", rows)] if one_block else rows.groupby("model"):
        several = [("training code", "code", block), ("torch", "torch", block)]
        several += [(f"{dataset}'s data", "data_checksum", part) for dataset, part in block.groupby("dataset")]
        for word, column, part in several:
            versions = sorted({one for cell in part[column].dropna() for one in cell.split("+")} - {UNKNOWN})
            if len(versions) > 1:
                shown = ", ".join(one[:12] for one in versions)
                reasons.append(f"{t.name} ({model}) has runs from several versions of {word} ({shown}): {remedy}.")
    for model, block in rows.groupby("model"):
        sessions = [session for run_id in block["run_id"] for session in results.provenance.get(run_id, [])]
        if len(sources := {str(session["model_code"]) for session in sessions if "model_code" in session}) > 1:
            shown = ", ".join(sorted(sources))
            reasons.append(
                f"{t.name} ({model}) has runs from several versions of the model's source ({shown}): {remedy}."
            )
    origins = zip(rows["commit"], rows["code"], strict=True)
    outside = [code for commit, code in origins if UNKNOWN in f"{commit}+{code}".split("+")]
    committed = _committed_code() if outside else None
    if unknown := sum(code != committed for code in outside):
        reasons.append(
            f"{t.name} has {unknown} runs from an unknown commit, made outside git by training code that is not this "
            f"checkout's, or with uncommitted changes here: {remedy}."
        )
    if not t.tuning and (unclean := int((rows["dirty"].fillna(True) & (rows["commit"] != UNKNOWN)).sum())):
        reasons.append(f"{t.name} has {unclean} runs from a tree with uncommitted changes: {remedy}.")
    return reasons


def _processors(t: Target, results: Results, before: Results) -> list[str]:
    """The reasons why a table's runs may not be published together: the types of machine that made a model's runs.

    The same spec gives other networks on other processors, so the rows that are compared must come from one type. A
    table whose committed runs come from several types may stay so.
    """
    ids = {run.run_id for run in t.runs}
    types, known = (_machine_types(t, one.only(ids)) for one in (results, before))
    reasons = []
    for model, counts in types.items():
        if len(counts) > 1 and not (len(known.get(model, {})) > 1 and counts.keys() <= known[model].keys()):
            shown = ", ".join(f"{name} ({count} runs)" for name, count in sorted(counts.items()))
            reasons.append(
                f"{t.name} ({model}) has runs from several types of processor ({shown}), whose networks cannot be "
                f"compared: train all runs of {model} on one type with `{t.command} --redo`."
            )
    return reasons


def _machine_types(t: Target, results: Results) -> dict[str, Counter[str]]:
    """For each model, the number of runs with a session on each type of GPU or processor; `all` for timing runs."""
    types: dict[str, Counter[str]] = defaultdict(Counter)
    one_block = any(cell.kind == "cost" for cell in t.cells)
    for row in results.runs.itertuples():
        sessions = results.provenance.get(row.run_id, [])
        types["all" if one_block else row.model].update({_machine_type(session) for session in sessions} - {""})
    return types


def _machine_type(session: Mapping[str, Any]) -> str:
    """The GPU of a session, or its processor with the instruction set that torch used; empty if unknown."""
    flags = session.get("torch_flags")
    capability = flags.get("cpu_capability") if isinstance(flags, Mapping) else None
    processor = f"{session.get('cpu') or ''}{f' ({capability})' if capability else ''}"
    return str(session.get("gpu") or processor)


def _committed_code() -> str | None:
    """The hash of this checkout's training code, which names its commit; None if it has uncommitted changes."""
    return code_hash() if checkout("")["dirty"] is False else None


def missing(t: Target, results: Results) -> list[Run]:
    """The expected runs of a table that have no score."""
    rows = results.runs.set_index("run_id")
    known = {run_id for cell in t.cells for run_id in run_ids(cell, rows, t.seeds)}
    return [run for run in t.runs if run.run_id not in known]


def missing_line(t: Target, gaps: Sequence[Run]) -> str:
    """A sentence with the number of missing runs and the command that makes them."""
    count = f"{len(gaps)} of its {len(t.runs)} runs"
    return f"{t.name} lacks {count}, first {gaps[0].title}: make them with `{t.command}`."


def _missing(t: Target, results: Results, partial: bool) -> list[str]:
    gaps = missing(t, results)
    return [missing_line(t, gaps)] if len(gaps) > (len(t.runs) - 1 if partial else 0) else []


def _not_a_table(t: Target) -> list[str]:
    if t.name.removesuffix("-tuning") in tables():
        return []
    return [
        f"{t.name} is an experiment, which fills only a part of a table: publish the table ({', '.join(tables())})."
    ]


def _kept(folder: Path, before: Results, profile: str, chosen: Sequence[Target]) -> set[str]:
    """The committed runs of the tables that are not being published."""
    names = {t.name for t in chosen}
    others = [t.cells for t in drawn(folder, profile, before) if t.name not in names]
    fresh = {run.run_id for t in chosen for run in t.runs}
    seeds = 1 + int(before.runs["seed"].max()) if len(before.runs) else 0
    return {run.run_id for cells in others for run in with_seeds(cells, seeds)} - fresh


def _seeds(cell: Run, ids: set[str]) -> int:
    """The number of a cell's seeds that have runs, up to the first gap."""
    seeds = 0
    while replace(cell, seed=cell.seed + seeds).run_id in ids:
        seeds += 1
    return seeds
