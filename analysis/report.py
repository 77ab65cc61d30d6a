"""One self-contained page: claims, tables, figures, hyper-parameters, and the runs behind every number."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from analysis.arms import method_name
from analysis.claim_pages import ClaimPage
from analysis.columns import PROVENANCE
from analysis.document import Document
from analysis.exhibit import Target
from analysis.exhibits import Page
from analysis.forest import opening, panels
from analysis.frames import Results
from experiments.harness.runs.catalogue import catalogue
from experiments.harness.runs.run import defaults, in_order
from experiments.harness.runs.spec import Run, in_percent

OF_A_SESSION = (
    *("started", "ended", "wall_seconds", "cpu_seconds", "peak_memory_bytes", "peak_gpu_bytes", "first_step"),
    *("slurm_job", "slurm_nodes", "requeues"),
)
"""The entries of a session that differ from one to the next; the others are shown once for all that share them."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text and the ids of its runs."""

    text: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A table of the page."""

    name: str
    title: str
    origin: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    claims: tuple[str, ...]
    notes: tuple[str, ...]


def report(
    profile: str,
    documents: Sequence[Document],
    figures: Sequence[Page],
    targets: Sequence[Target],
    results: Results,
    pages: Sequence[ClaimPage] = (),
) -> str:
    """The page as HTML; equal contents give equal bytes.

    Args:
        profile: the profile of the results.
        documents: the tables and the claims.
        figures: the figures, shown as PNG.
        targets: the tables, for the hyper-parameters and the runs that are not finished.
        results: the runs, with their provenance.
        pages: the pages of the claims, folded below their comparisons.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    sections = [section(document, results.runs) for document in documents]
    pictures: dict[str, list[dict[str, str]]] = {}
    names = [s.name for s in sections]
    for page in figures:
        (picture,) = (picture for path, picture in page.files.items() if path.endswith(".png"))
        entry = {"name": page.name, "caption": page.caption, "data": _small(picture)}
        pictures.setdefault(page.exhibit if page.exhibit in names else names[0], []).append(entry)
    numbers = next((d.numbers for d in documents if d.name == "claims"), None)
    environments: list[str] = []
    runs = _runs(results, environments)
    choices = [line for d in documents if d.name.endswith("-tuning") for line in d.claims]
    return environment.get_template("report.html.j2").render(
        profile=profile,
        claims=next((s for s in sections if s.name == "claims"), None),
        sections=[s for s in sections if s.name != "claims"],
        figures=pictures,
        hyper_parameters=_hyper_parameters([cell for target in targets for cell in target.cells]),
        under_way=_under_way(targets, results.under_way),
        choices=choices,
        runs=runs,
        environments=environments,
        panels=[] if numbers is None else panels(numbers, results.runs),
        opening=[] if numbers is None else opening(numbers, results.runs, profile),
        pages={page.name: page for page in pages},
    )


def section(document: Document, runs: pd.DataFrame) -> Section:
    """A document's table, with the finished runs behind each row or score."""
    finished, used = set(runs["run_id"]), document.run_ids()
    extra = [name for name in dict.fromkeys(name for row in used for name in row) if name not in document.cells]
    rows = []
    for row, ids in zip(document.cells.to_dict("records"), used, strict=True):
        line = [Cell(str(text), _known(ids.get(str(name)), finished)) for name, text in row.items()]
        rows.append((*line, *(Cell("", _known(ids.get(name), finished)) for name in extra)))
    columns = (*document.cells.columns, *extra)
    about = (document.name, document.title, document.origin)
    return Section(*about, tuple(map(str, columns)), tuple(rows), document.claims, document.notes)


def _known(ids: Any, known: set[str]) -> tuple[str, ...]:
    return tuple(run_id for run_id in ("" if ids is None or pd.isna(ids) else str(ids)).split() if run_id in known)


def _under_way(targets: Sequence[Target], curves: pd.DataFrame) -> Section:
    """A row for each run of the tables that has epochs but no result yet."""
    runs = {run.run_id: run for target in targets for run in target.runs}
    rows = []
    for run_id, lines in curves.groupby("run_id", sort=False):
        if run := runs.get(str(run_id)):
            last = {str(name): value for name, value in lines.ffill().iloc[-1].items() if not pd.isna(value)}
            reached = f"{last['epoch']} of {run.flat['epochs']}" if "epoch" in last else f"{len(lines)} measurements"
            loss = f"{last['train_loss']:.3f}" if isinstance(last.get("train_loss"), float) else ""
            score = f"{100 * last[run.score]:.1f}" if run.score in last and in_percent(run.score) else ""
            rows.append(tuple(map(Cell, (run.title, reached, loss, score))))
    origin = "These runs count in no table yet. Accuracy is on the first 1,000 examples, at the last epoch scored."
    columns = ("run", "epoch", "training loss", "accuracy %")
    return Section("under-way", "Runs under way", origin, columns, tuple(rows), (), ())


def _hyper_parameters(cells: Sequence[Run]) -> Section:
    """A row for each distinct training run of the tables, in their order."""
    trained = [
        c
        for c in dict.fromkeys(cells)
        if c.kind == "train" and not (c.flat["holdout_examples"] or c.flat["curvature_every"])
    ]
    varied = [name for name in in_order() if len({c.flat[name] for c in trained}) > 1]
    listed = {cell: name for name, e in catalogue().items() for cell in e.runs.get(_profile(trained), ())}
    rows = tuple(
        (
            Cell(method_name(cell)),
            *(Cell(_plain(cell.flat[name])) for name in varied),
            Cell(f"experiments/{listed[cell]}.py" if cell in listed else ""),
        )
        for cell in trained
    )
    columns = ("method", *(name.replace("_", " ") for name in varied), "listed with its sources in")
    origin = (
        "The fields in which the training runs of these tables differ. The other fields are listed with each run below."
    )
    return Section("hyper-parameters", "Hyper-parameters", origin, columns, rows, (), ())


def _profile(cells: Sequence[Run]) -> str:
    return cells[0].profile if cells else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _runs(results: Results, environments: list[str]) -> list[dict[str, Any]]:
    """Every run: its fields, its numbers and its sessions, whose environments are collected in `environments`."""
    runs = []
    default = defaults()
    for row in results.runs.to_dict("records"):
        left_out = ("run_id", "seed", *PROVENANCE)
        shown = {str(k): v for k, v in row.items() if not pd.isna(v) and k not in left_out}
        fields = {k: _plain(v) for k, v in shown.items() if k not in default or v != default[k]}
        title = f"{row['model']} {row['dataset']} {row['method']} m={row['micro_batches']} rho={_plain(row['rho'])}"
        title += f" batch {row['batch_size']}"
        if row["label_noise"]:
            title += f" wrong labels {_plain(row['label_noise'])}"
        what = "" if row["kind"] == "train" else f"{row['kind']}: "
        runs.append(
            {
                "id": row["run_id"],
                "title": f"{what}{title}",
                "seed": row["seed"],
                "fields": "\n".join(f"{name} {value}" for name, value in fields.items()),
                "sessions": [_session(s, environments) for s in results.provenance.get(row["run_id"], [])],
            }
        )
    return runs


def _session(session: Mapping[str, Any], environments: list[str]) -> dict[str, Any]:
    """What is peculiar to a session, and the number of its environment, which many sessions share."""
    own = ", ".join(f"{name} {_plain(session[name])}" for name in OF_A_SESSION if session.get(name) is not None)
    shared = {name: value for name, value in session.items() if name not in OF_A_SESSION}
    text = json.dumps(shared, indent=1, sort_keys=True)
    if text not in environments:
        environments.append(text)
    return {"own": own, "environment": environments.index(text) + 1}


def _small(picture: bytes) -> str:
    """A figure as base64 of a PNG with at most 256 colours, which is a third of the size."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(256).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
