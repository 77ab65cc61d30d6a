"""Published results close to the paper's settings, each with its source and a grade.

The mSAM paper's tables were not available, so no row comes from them. The "SAM" of Foret et al. is already m-SAM: each
of 8 devices computes a perturbation from its 32 of the batch's 256 examples.

Grade A: read in the text, a table or a run log of the source, or in an excerpt of it. Grade B: read in a third party's
note on the source. Spreads are printed as in the source, with the source's kind of interval.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

DISCLAIMER = (
    "The mSAM paper's tables were not available to us: none of these numbers come from them. The "
    "settings differ from ours; spreads are as printed in the sources."
)
FORET_NOTE = (
    "The SAM of Foret et al. is already m-SAM: each of 8 devices computes a perturbation from its 32 of the batch's "
    "256 examples."
)
NA_LONG = "best checkpoint of 10"
ERROR_NOTE = "printed as an error; shown as 100 minus the error"


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """One row of another paper's table: accuracies in percent, with spreads as printed."""

    family: str
    """Model family: ResNet, WRN, ViT or encoder."""
    dataset: str
    setting: str
    base: str = ""
    sam: str = ""
    other: str = ""
    """Accuracies of other methods, with their names."""
    source: str
    grade: str
    from_error: bool = False
    """Whether the source prints errors, which are shown as 100 minus the error."""


def accuracy(error: str) -> str:
    """Convert a printed error such as `3.5±0.1` to an accuracy with the same spread: `96.5±0.1`."""
    value, mark, spread = error.partition("±")
    return f"{100 - Decimal(value)}{mark}{spread}"


DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "qqp": "QQP",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "rte": "RTE",
}
"""Our names of data sets, and the names in the sources."""


def _foret(setting: str, cifar10: tuple[str, str], cifar100: tuple[str, str]) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(
            family="WRN",
            dataset=dataset,
            setting=f"WRN-28-10, {setting}",
            base=accuracy(base),
            sam=accuracy(sam),
            source="Foret et al. 2021, Table 1",
            grade="A",
            from_error=True,
        )
        for dataset, (base, sam) in (("CIFAR-10", cifar10), ("CIFAR-100", cifar100))
    )


def _rw_sam(
    family: str, setting: str, table: str, cifar10: tuple[str, str, str], cifar100: tuple[str, str, str]
) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(
            family=family,
            dataset=dataset,
            setting=setting,
            base=base,
            sam=sam,
            other=f"RW-SAM {other}",
            source=f"RW-SAM, {table}",
            grade="B",
        )
        for dataset, (base, sam, other) in (("CIFAR-10", cifar10), ("CIFAR-100", cifar100))
    )


def _momentum_sam(family: str, setting: str, base: str, sam: str, asam: str) -> Neighbour:
    return Neighbour(
        family=family,
        dataset="CIFAR-100",
        setting=f"{setting}, rho tuned, 68% intervals",
        base=base,
        sam=sam,
        other=f"ASAM {asam}",
        source="Momentum-SAM (Becker et al.), Table 1",
        grade="A",
    )


NEIGHBOURS = (
    *_rw_sam("ResNet", "ResNet-18", "Table 1", ("95.62", "95.99", "96.24"), ("78.91", "78.90", "79.31")),
    *_rw_sam("ResNet", "ResNet-50", "Table 1", ("95.64", "96.06", "96.34"), ("79.55", "80.31", "80.83")),
    _momentum_sam("ResNet", "ResNet-50 (CIFAR variant), lr 0.1, wd 1e-3", "81.46±0.13", "83.36±0.17", "83.30±0.06"),
    Neighbour(
        family="ResNet",
        dataset="CIFAR-100",
        setting="ResNet-18, 200 epochs, batch 128, lr 0.05 cosine, wd 1e-3, cutout, rho 0.2, seed 1, last epoch",
        sam="80.78",
        other="Friendly-SAM 81.19 (lambda 0.6), 81.32 (lambda 0.95)",
        source="nblt/F-SAM@2e2f989, run logs",
        grade="A",
    ),
    Neighbour(
        family="ResNet",
        dataset="CIFAR-100",
        setting="ResNet-18, 200 epochs, batch 256, lr 0.1, wd 5e-4, rho 0.1, seed 1, last epoch",
        sam="78.07",
        other="Eigen-SAM 78.51",
        source="RitianLuo/EigenSAM@d541077, run log",
        grade="A",
    ),
    *(
        Neighbour(
            family="ResNet",
            dataset=dataset,
            setting='"R20x4-BN-ReLU", 200 epochs, batch 256, seed 42, tuned per method (SAM rho 0.3)',
            base=base,
            sam=sam,
            source="cs-giung/giung2-dev, projects/sam/README.md (search excerpt)",
            grade="A",
        )
        for dataset, base, sam in (("CIFAR-10", "95.35", "96.20"), ("CIFAR-100", "76.57", "78.96"))
    ),
    Neighbour(
        family="ResNet",
        dataset="CIFAR-10",
        setting="ResNet-32, 0% label noise, 3 runs",
        base="94.50±0.11",
        sam="94.80±0.12",
        other="ASAM 94.88±0.12",
        source="ASAM, Table 6",
        grade="B",
    ),
    *_foret(
        "200 epochs, basic augmentation, batch 256, lr 0.1, wd 5e-4, rho 0.05 (CIFAR-10) or 0.1 (CIFAR-100), "
        "5 runs, 95% intervals; SGD: the better of the same and twice the epochs",
        ("3.5±0.1", "2.7±0.1"),
        ("18.8±0.2", "16.5±0.2"),
    ),
    *_foret("200 epochs, basic setting with cutout", ("2.6±0.1", "2.3±0.1"), ("16.9±0.1", "14.9±0.2")),
    *_foret("200 epochs, basic setting with AutoAugment", ("2.3±0.1", "2.1±<0.1"), ("15.8±0.2", "13.6±0.2")),
    *_foret("1800 epochs, basic augmentation, lr 0.05, wd 1e-3", ("3.5±0.1", "2.4±0.1"), ("19.1±0.1", "16.3±0.2")),
    *_rw_sam("WRN", "WRN-28-10", "Table 1", ("96.47", "96.91", "97.11"), ("81.55", "83.25", "83.52")),
    _momentum_sam(
        "WRN",
        "WRN-28-10, 200 epochs, batch 256, lr 0.5 cosine, wd 5e-4, label smoothing 0.1, flip, crop, cutout",
        "81.51±0.09",
        "84.16±0.12",
        "84.74±0.13",
    ),
    _momentum_sam("WRN", "WRN-16-4", "76.90±0.15", "79.25±0.10", "79.96±0.13"),
    Neighbour(
        family="WRN",
        dataset="CIFAR-10",
        setting="WRN-28-10 replication, 200 epochs, batch 128, rho 0.05",
        sam="96.74",
        source="S-Sairam/sam-optimizer, README",
        grade="A",
    ),
    *(
        Neighbour(
            family="encoder",
            dataset=dataset,
            setting=f"BERT-base uncased, rho 0.05, batch 32, lr 2e-5, {epochs} epochs, development set, 3 seeds, sd",
            base=base,
            sam=sam,
            source="Na et al. 2022 (arXiv 2205.12694), Table 5",
            grade="A",
        )
        for dataset, epochs, base, sam in (
            ("CoLA", NA_LONG, "58.1±.4", "59.5±.4"),
            ("SST-2", "3", "92.7±.1", "93.1±.6"),
            ("MRPC", f"accuracy, {NA_LONG}", "85.5±1.7", "87.0±.7"),
            ("STS-B", NA_LONG, "89.0±.1", "89.4±.2"),
            ("QQP", "3", "91.0±.1", "91.1±.1"),
            ("MNLI", "matched part, 3", "84.7±.4", "85.3±.2"),
            ("QNLI", "3", "91.5±.1", "91.3±.6"),
            ("RTE", NA_LONG, "67.6±1.5", "67.0±.8"),
        )
    ),
    *(
        Neighbour(
            family="encoder",
            dataset=dataset,
            setting="BERT-base uncased as in their Table 5, after dynamic int8 quantisation, sd",
            base=base,
            sam=sam,
            source="Na et al. 2022 (arXiv 2205.12694), Table 8",
            grade="A",
        )
        for dataset, base, sam in (("MNLI", "78.24±4.00", "83.47±.11"), ("RTE", "56.80±4.51", "65.70±1.65"))
    ),
    *(
        Neighbour(
            family="encoder",
            dataset=dataset,
            setting="RoBERTa-base, GLUE's development set, metric of the task",
            other=f"SAM over Adam {difference}",
            source="Kaddour et al. 2022, Figure 4a",
            grade="B",
        )
        for dataset, difference in (
            ("CoLA", "+1.57±1.20"),
            ("SST-2", "-0.23±0.40"),
            ("MRPC", "+0.73±0.43"),
            ("STS-B", "+0.38±0.17"),
            ("QQP", "+0.08±0.07"),
            ("MNLI", "+0.39±0.02"),
            ("QNLI", "+0.09±0.01"),
            ("RTE", "+0.70±0.65"),
        )
    ),
    *_rw_sam("ViT", "ViT-B/16, fine-tuned", "Table 2b", ("98.24", "98.40", "98.58"), ("88.71", "89.63", "89.89")),
)


FAMILIES = {
    "resnet": "ResNet",
    "wrn": "WRN",
    "vit": "ViT",
    "bert": "encoder",
    "roberta": "encoder",
    "minilm": "encoder",
}
"""Families by the prefix of our model names. All text encoders are one family."""


def family(model: str) -> str | None:
    """The family of one of our models, or None."""
    return next((name for begin, name in FAMILIES.items() if model.startswith(begin)), None)


def neighbours(models: Iterable[str], datasets: Iterable[str]) -> list[Neighbour]:
    """The published rows of the same model families on the same data sets."""
    families = {family(model) for model in models}
    names = {DATASETS.get(dataset) for dataset in datasets}
    return [n for n in NEIGHBOURS if n.family in families and n.dataset in names]


def lines(rows: Iterable[Neighbour]) -> list[str]:
    """The rows as text, one line each, after the remarks on them."""
    rows = list(rows)
    if not rows:
        return []
    return [*_remarks(rows), *(_line(row) for row in rows)]


def markdown(rows: Iterable[Neighbour]) -> str:
    """The rows as a Markdown table with a heading."""
    from tabulate import tabulate

    rows = list(rows)
    body = [[r.dataset, _setting(r), r.base, r.sam, r.other, f"{r.source} ({r.grade})"] for r in rows]
    headers = ["dataset", "setting", "base", "SAM", "other", "source (grade)"]
    table = tabulate(body, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n\n".join(["### Published elsewhere: test scores in percent", *_remarks(rows), table]) + "\n"


def _remarks(rows: list[Neighbour]) -> list[str]:
    return [DISCLAIMER, *([FORET_NOTE] if any("Foret" in row.source for row in rows) else [])]


def _setting(row: Neighbour) -> str:
    return f"{row.setting} ({ERROR_NOTE})" if row.from_error else row.setting


def _line(row: Neighbour) -> str:
    numbers = [f"base {row.base}" if row.base else "", f"SAM {row.sam}" if row.sam else "", row.other]
    scores = ", ".join(filter(None, numbers))
    return f"{row.dataset}, {_setting(row)}: {scores}. {row.source} (grade {row.grade})."
