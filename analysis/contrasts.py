"""The claims as declarations: what each compares, on which scale, and the sign with which it would hold.

The code of the tables (`evidence`, `claims`) and the judge (`judge`) both work from these and from the catalogue, and
share nothing else.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.harness.runs import catalogue
from experiments.harness.runs.methods import ARMS

ALPHA = 0.05
"""Verdicts hold at this adjusted p value."""

FAMILIES = {
    "primary": "the primary comparison of the profile, alone",
    "accuracy": "all other claims on test scores, in Tables 1 and 2",
    "int8": "all claims on scores after int8 quantisation, in Table 2",
    "flatness": "all claims on flatness, in Table 3, by every measure",
    "cost": "all claims on the time of a step, in Table 4",
    "theory": "all claims on simulated boundaries",
}
"""By name, the comparisons over which Holm's adjustment is made."""

DIFFERENCE, RATIO, LOGARITHM, STEP = "difference", "ratio", "log of the ratio", "step"
"""How a comparison is measured: a - b; 100 (a / b - 1); ln(a / b), or a - b if a value is 0 or below; or
100 (a / b - 1) of the times of a step, which the timing run has measured within rounds."""


@dataclass(frozen=True)
class Measure:
    """What is compared of two networks."""

    words: str
    column: str
    """Its name in runs.csv; `{m}` stands for `usual_m`, also in the words."""
    scale: str


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A claim: which arms it compares, in which tables, and what would support it."""

    name: str
    """Its short name: on the command line, and of the file of its page."""
    text: str
    arms: tuple[str, ...]
    """Two arms, the first over the second; four: (first - second) - (third - fourth); three: the first over the second,
    and the second over the third."""
    isolates: str
    """What the compared runs differ in, as a part of a sentence: what the comparison isolates."""
    tables: tuple[str, ...] = ("table1", "table2")
    family: str = "accuracy"
    scale: str = DIFFERENCE
    column: str = ""
    """The column of runs.csv that is compared; by default the score of the runs."""
    measures: tuple[Measure, ...] = ()
    """Several columns that are compared, each by its own scale, instead of `column` and `scale`."""
    unit: str = "points of accuracy"
    expected: int = 1
    """The sign of the difference, compared with `line`, that supports it."""
    line: float = 0.0
    margin: float | None = None
    """The margin of equivalence; None is the profile's, in points of accuracy, NaN none."""
    least: float = 0.0
    """Smaller differences neither support nor contradict it."""
    having: Mapping[str, Any] = field(default_factory=dict)
    """Fields that the cells must have, for example {"passes": "loop"}."""
    further: bool = False
    """Whether it is about an arm that the paper does not have: such a claim is mentioned only if it has runs."""

    def margin_in(self, profile: str) -> float:
        """Its margin of equivalence in a profile; NaN if none is declared."""
        return catalogue.MARGINS.get(profile, math.nan) if self.margin is None else self.margin

    def by_measure(self, model: str, profile: str) -> tuple[Measure, ...]:
        """What is compared of two networks of a model."""
        m = usual_m(model, profile) if self.measures else 0
        several = (Measure(x.words.format(m=m), x.column.format(m=m), x.scale) for x in self.measures)
        return tuple(several) or (Measure("", self.column, self.scale),)

    def is_primary(self, profile: str, model: str, dataset: str) -> bool:
        """Whether its comparison on this network and data set is the profile's primary one."""
        primary = catalogue.primary(profile)
        return (
            primary is not None
            and self.family == "accuracy"
            and primary.table in self.tables
            and (self.arms, model, dataset) == (primary.arms, primary.model, primary.dataset)
        )


def usual_m(model: str, profile: str) -> int:
    """The number of micro-batches of mSAM on a model in Table 1; 8 if the model is not there."""
    cells = catalogue.cells("table1", profile)
    return next((cell.micro_batches for cell in cells if (cell.model, cell.method) == (model, "msam")), 8)


PERTURBATION = "the perturbations: batch, micro-batches and BatchNorm are the same"
OWN_RHO = "rho, where the grid chose another"
SPLITTING = (
    "the micro-batches' own perturbations; with BatchNorm, statistics over B/m examples instead of B; and " + OWN_RHO
)
EVERYTHING = "the perturbations, the micro-batches and, with BatchNorm, its statistics over B/m examples"
IDEA = "nothing but who shares a perturbation: the paper's idea itself"
COMPUTE = "where the same number of gradients goes: into perturbations, or into twice the epochs"

_ISOLATES = {
    ("twice", "base"): "twice the epochs",
    ("shared", "sam"): f"the micro-batches, with BatchNorm its statistics over B/m examples; and {OWN_RHO}",
    ("shared", "control"): "one perturbation for all micro-batches; BatchNorm is the same",
    ("asam", "base"): "the adaptive perturbation: batch and BatchNorm are the same",
    ("masam", "asam"): SPLITTING,
    ("masam", "control"): "the adaptive perturbations: micro-batches and BatchNorm are the same",
}


def _further() -> Iterator[Contrast]:
    """A claim for each comparison of an arm that the abstract does not mention."""
    for name, arm in ARMS.items():
        for other in arm.claimed if name not in ("control", "sam", "msam") else ():
            legends = (one.legend.format(base="plain training") for one in (arm, ARMS[other]))
            yield Contrast(
                name=f"{name}-over-{other}",
                text="(ours) Test accuracy: {} over {}".format(*legends),
                arms=(name, other),
                isolates=_ISOLATES.get((name, other), "the fields that define the two arms"),
                further=True,
            )


ACCURACY = (
    Contrast(
        name="msam-over-sam",
        text="mSAM's test accuracy is better than SAM's",
        arms=("msam", "sam"),
        isolates=SPLITTING,
    ),
    Contrast(
        name="msam-over-base",
        text="mSAM's test accuracy is better than plain training's",
        arms=("msam", "base"),
        isolates=EVERYTHING,
    ),
    Contrast(
        name="msam-over-control",
        text="(ours) ... and than that of plain gradients over the same micro-batches",
        arms=("msam", "control"),
        isolates=PERTURBATION,
    ),
    Contrast(
        name="net-of-batchnorm",
        text="(ours) Net of micro-batch BatchNorm, mSAM gains more than SAM: (mSAM - control) - (SAM - plain training)",
        arms=("msam", "control", "sam", "base"),
        isolates="the gain by perturbations over micro-batches from that over the batch, each over plain gradients "
        "with the same BatchNorm and each at the rho that its grid chose",
    ),
    Contrast(
        name="sam-over-base",
        text="SAM's test accuracy is better than plain training's",
        arms=("sam", "base"),
        isolates=PERTURBATION,
    ),
    Contrast(
        name="msam-over-shared",
        text="(ours) ... and than that of SAM on the same micro-batches, which share one perturbation",
        arms=("msam", "shared"),
        isolates=IDEA,
        further=True,
    ),
    Contrast(
        name="sam-over-twice",
        text="(ours) SAM's test accuracy is better than that of plain training for twice the epochs",
        arms=("sam", "twice"),
        isolates=COMPUTE,
        further=True,
    ),
    Contrast(
        name="msam-over-twice",
        text="(ours) mSAM's test accuracy is better than that of plain training for twice the epochs",
        arms=("msam", "twice"),
        isolates=f"{COMPUTE}; and, with BatchNorm, its statistics over B/m examples",
        further=True,
    ),
    *_further(),
)
"""The claims on test scores, in Tables 1 and 2."""

FLATNESS = (
    Measure("lambda 1", "train_lambda_1", LOGARITHM),
    Measure("lambda 1 on test data", "test_lambda_1", LOGARITHM),
    Measure("trace", "train_trace", LOGARITHM),
    Measure("sharpness by ascent", "train_ascent_sharpness", LOGARITHM),
    Measure("average sharpness", "train_average_sharpness", DIFFERENCE),  # near zero, with either sign
    Measure("sharpness of m={m} micro-batches", "train_sharpness_m{m}", LOGARITHM),
)
"""The measures of flatness that claims are tested by, all but one on training data: smaller is flatter."""

_QUANTISED: dict[str, Any] = {
    **{"tables": ("table2",), "family": "int8", "column": "test_int8_score", "further": True},
}

QUANTISED = (
    Contrast(
        name="int8-msam-over-base",
        text="(ours) mSAM's score after int8 quantisation is better than plain training's",
        arms=("msam", "base"),
        isolates=EVERYTHING,
        **_QUANTISED,
    ),
    Contrast(
        name="int8-msam-over-sam",
        text="(ours) mSAM's score after int8 quantisation is better than SAM's",
        arms=("msam", "sam"),
        isolates=SPLITTING,
        **_QUANTISED,
    ),
    Contrast(
        name="int8-sam-over-base",
        text="(ours) SAM's score after int8 quantisation is better than plain training's",
        arms=("sam", "base"),
        isolates=PERTURBATION,
        **_QUANTISED,
    ),
)
"""The claims on the scores of Table 2 after dynamic int8 quantisation."""

_MEASURED: dict[str, Any] = {
    **{"tables": ("table3",), "family": "flatness", "expected": -1, "margin": math.nan, "measures": FLATNESS},
    **{"unit": "natural logarithms of ratios (average sharpness: differences)"},
}

FLATTER = (
    Contrast(
        name="flatness-msam-over-sam",
        text="mSAM ends in flatter minima than SAM",
        arms=("msam", "sam"),
        isolates=SPLITTING,
        **_MEASURED,
    ),
    Contrast(
        name="flatness-msam-over-base",
        text="mSAM ends in flatter minima than plain training",
        arms=("msam", "base"),
        isolates=EVERYTHING,
        **_MEASURED,
    ),
    Contrast(
        name="flatness-sam-over-base",
        text="SAM ends in flatter minima than plain training",
        arms=("sam", "base"),
        isolates=PERTURBATION,
        **_MEASURED,
    ),
    Contrast(
        name="flatness-msam-over-control",
        text="(ours) mSAM ends in flatter minima than plain gradients over the same micro-batches",
        arms=("msam", "control"),
        isolates=PERTURBATION,
        **_MEASURED,
    ),
    Contrast(
        name="flatness-msam-over-shared",
        text="(ours) mSAM ends in flatter minima than SAM on the same micro-batches, which share one perturbation",
        arms=("msam", "shared"),
        isolates=IDEA,
        further=True,
        **_MEASURED,
    ),
)
"""The claims on flatness, in Table 3."""

COST_WITHIN = 10.0
"""We read "not significantly more" in the paper as at most so many percent more time than a step of SAM."""

_TIMED: dict[str, Any] = {
    **{"arms": ("msam", "sam"), "tables": ("table4",), "family": "cost", "scale": STEP, "expected": -1},
    **{"unit": "additional time of a step, percent", "line": COST_WITHIN, "margin": math.nan},
}

COST = (
    Contrast(
        name="cost",
        text="mSAM costs not significantly more than SAM",
        isolates="the time of a step on the same batch, with micro-batches one after the other",
        having={"passes": "loop"},
        **_TIMED,
    ),
    Contrast(
        name="cost-auto",
        text='(ours) ... with passes="auto", which runs micro-batches in the fastest way',
        isolates="the time of a step on the same batch, with micro-batches run in the fastest way",
        having={"passes": "auto"},
        further=True,
        **_TIMED,
    ),
)
"""The claims on cost, in Table 4."""

PREDICTED_WITHIN = 0.02
"""How far a simulated boundary may lie from an exact prediction."""

_SIMULATED: dict[str, Any] = {
    **{"tables": ("theory",), "family": "theory", "scale": RATIO, "expected": -1, "arms": ("msam", "sam", "base")},
    **{"unit": "largest stable sharpness, percent", "margin": 100 * PREDICTED_WITHIN, "least": 100 * PREDICTED_WITHIN},
    "isolates": "the perturbations in simulations with all data in each step",
}

THEORY = (
    Contrast(
        name="stability-unnormalised",
        text="In simulations with unnormalised perturbations mSAM keeps only flatter minima than SAM, and SAM than "
        "descent",
        having={"normalised": False},
        **_SIMULATED,
    ),
    Contrast(
        name="stability-normalised",
        text="(ours) The same with normalised perturbations, as both methods are used",
        having={"normalised": True},
        **_SIMULATED,
    ),
)
"""The claims of the theory: theorems checked by simulation. Each compares mSAM with SAM, and SAM with the base."""

ALL = (*ACCURACY, *QUANTISED, *FLATTER, *COST, *THEORY)
