"""What a run is: one frozen value whose hash names the run's folder.

Standard library only, so that listing, planning and analysing never wait for torch.
"""

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.harness.runs.command_line import Mistake
from experiments.harness.runs.facts import IMAGE_MODELS, IMAGES, SIMULATED, SIMULATED_MODELS, TEXT_MODELS, TEXTS

PROFILES = ("smoke", "cpu", "paper")

SEEDS = {"smoke": 2, "cpu": 3, "paper": 5}
"""How many paired seeds (0, 1, ...) a profile runs unless told otherwise."""

METHODS = ("base", "control", "sam", "msam")
"""In the order of the tables' rows."""

RECIPE = 1
"""Raised whenever the meaning of training changes, so that old runs are no longer taken for new ones."""


KINDS = {"train": "train", "curvature": "flatness", "theory": "stability", "cost": "timing"}
"""What a run is, and the module of `work/` that carries it out."""

CHOICES = {
    "profile": PROFILES,
    "kind": tuple(KINDS),
    "dataset": (*IMAGES, *TEXTS, *SIMULATED),
    "augmentation": ("none", "crop-flip", "crop-flip-autoaugment", "crop-flip-randaugment"),
    "base_optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "linear", "step"),
    "attention": ("eager", "sdpa"),
    "decay": ("all", "matrices"),
    "precision": ("float32", "bfloat16"),
    "device": ("cpu", "cuda"),
}

ON_GPU: dict[str, Any] = {"device": "cuda", "tf32": True, "fused": True}
"""How the `paper` profile computes. Autocast to bfloat16 would be up to twice as fast by the data sheets, but rounds
weights to so few bits that most of a small perturbation is lost, and what is left is twice as long and more
(benchmarks/results/precision.md). TensorFloat-32 loses far less. Compiling, and kernels that are deterministic, wait
for a GPU that measures what they bring and cost."""

_SIZES = IMAGES | TEXTS | SIMULATED


class SpecError(Mistake, ValueError):
    """A spec that cannot be run. The message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run. Every field that can change its numbers is here, and nothing else is.

    A field equal to its default is left out of the hash: a field that a later version adds, with the
    default that means "as before", leaves the names of finished runs alone.
    """

    profile: str
    dataset: str
    model: str
    base_optimizer: str
    learning_rate: float
    epochs: int
    batch_size: int
    rho: float = 0.0
    """Radius of the perturbation: its L2 norm over all parameters together."""
    micro_batches: int = 1
    """m, the number of micro-batches a mini-batch is split into (not the examples in one)."""
    seed: int = 0
    kind: str = "train"
    """`curvature` measures the network that the same spec of kind `train` ends with; `theory` simulates; `cost` times
    the steps of all methods, `epochs` times each, with m up to `micro_batches`."""
    train_examples: int | None = None
    """Size of the training subset, drawn once per data set whatever the seed; None takes all."""
    test_examples: int | None = None
    """None takes the whole test set."""
    holdout_examples: int = 0
    """If positive: the run is scored on this many training images it never trains on, not on the test set."""
    augmentation: str = "none"
    """Of images; see `augment.py`."""
    cutout: int = 0
    """Side, in pixels, of the square that is cut out of each training image; 0 cuts none."""
    image_size: int = 32
    """Side, in pixels, that images are enlarged to: for pretrained models, which were made for larger ones."""
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    """Share of the training images whose label is replaced by a wrong one, drawn once for every run and method."""
    momentum: float = 0.9
    """Of SGD; AdamW keeps torch's betas."""
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "cosine"
    """Of the learning rate: half a cosine or a line down to 0, or a fifth after 30, 60 and 80 % of the epochs, as Wide
    ResNets were published with (`step`)."""
    warmup_epochs: float = 0.0
    clip_norm: float | None = None
    """Largest norm of the gradient that the base optimizer is given, so after micro-batches were averaged."""
    ema: float = 0.0
    """If positive: the run is scored by an exponential moving average of its weights and buffers, which keeps this
    share of itself at each step; 0.999 say. Gradients are taken at the plain weights."""
    decay: str = "all"
    """Which parameters `weight_decay` is for: all, or matrices alone, without biases and norms."""
    dropout: float | None = None
    """Of a text model; None leaves its own configuration."""
    attention: str = "eager"
    """Implementation of attention in text models."""
    max_length: int = 128
    """Tokens of a text after which it is cut off, special ones included."""
    precision: str = "float32"
    device: str = "cpu"
    channels_last: bool = True
    """Memory layout of images and convolutions."""
    fused: bool = False
    """Whether the base optimizer updates all parameters in one kernel."""
    compile: bool = False
    """Whether the model goes through `torch.compile`."""
    tf32: bool = False
    """Whether float32 products on a GPU may round their factors to TensorFloat-32."""
    deterministic: bool = False
    """Of a GPU: whether only kernels are used that give the same bits each time. On the CPU all are."""
    threads: int = 1
    """Of one worker process: bit-for-bit equality holds for equal threads only."""
    ranks: int = 1
    """Data-parallel processes, each on its share of every mini-batch; `micro_batches` counts those of all of them."""
    curvature_every: int = 0
    """Epochs between measurements of the largest Hessian eigenvalue while training; the last epoch has one too. 0
    measures none."""
    measured_examples: int = 0
    """Of a curvature run: how many training examples, and how many test examples, it looks at."""
    measured_rho: float = 0.0
    """Of a curvature run: the radius at which sharpness is measured, the same for every method."""
    workers: int = 1
    """Of a cost run: data-parallel processes that are timed after one alone."""
    normalised: bool = True
    """Whether perturbations have the length rho; if not, they are rho times the gradient, as in some theory runs."""
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before anything expensive starts.

        Raises:
            SpecError: with a sentence that names the field, its value and what is allowed.
        """
        for name, annotation in _hints().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), annotation))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                _refuse(name, getattr(self, name), f"one of {', '.join(allowed)}")
        counts = ("epochs", "batch_size", "micro_batches", "threads", "ranks", "workers", "recipe", "max_length")
        for name in ("learning_rate", "image_size", *counts):
            if not getattr(self, name) > 0:
                _refuse(name, getattr(self, name), "greater than 0")
        for name in (
            *("rho", "seed", "holdout_examples", "momentum", "weight_decay", "warmup_epochs"),
            *("curvature_every", "measured_examples", "measured_rho", "cutout"),
        ):
            if not getattr(self, name) >= 0:
                _refuse(name, getattr(self, name), "0 or greater")
        for name in ("train_examples", "test_examples", "clip_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                _refuse(name, getattr(self, name), "greater than 0, or left out")
        if not self.seed < 2**32:
            _refuse("seed", self.seed, "below 2**32")
        if not 0 <= self.label_smoothing < 1:
            _refuse("label_smoothing", self.label_smoothing, "at least 0 and below 1")
        for name in ("label_noise", "ema"):
            if not 0 <= getattr(self, name) < 1:
                _refuse(name, getattr(self, name), "at least 0 and below 1")
        if self.ema and self.kind not in ("train", "curvature"):
            _refuse("ema", self.ema, "0 but for trainings")
        for name, default in (("label_noise", 0.0), ("cutout", 0), ("image_size", 32), ("channels_last", True)):
            if self.dataset not in IMAGES and getattr(self, name) != default:
                _refuse(name, getattr(self, name), f"left out but for {', '.join(IMAGES)}")
        if self.cutout > 32:
            _refuse("cutout", self.cutout, "at most 32, the side of the images")
        for name in ("tf32", "deterministic"):
            if self.device != "cuda" and getattr(self, name):
                _refuse(name, True, "left out on CPUs: it is for GPUs")
        if self.micro_batches > self.batch_size:
            _refuse(
                "micro_batches",
                self.micro_batches,
                f"at most the batch size, {self.batch_size} here: every micro-batch needs an example",
            )
        if self.ranks > 1 and not shareable(self, self.ranks):
            _refuse(
                "ranks",
                self.ranks,
                f"a divisor of micro_batches ({self.micro_batches}), and these one of the batch size "
                f"({self.batch_size}): each rank perturbs its own micro-batches, so SAM (m=1) stays on one",
            )
        models: tuple[str, ...] = SIMULATED_MODELS if self.dataset in SIMULATED else TEXT_MODELS
        models = IMAGE_MODELS if self.dataset in IMAGES else models
        if self.model not in models and not (self.dataset not in SIMULATED and "/" in self.model):
            folder = ", or the path of a checkpoint's folder" if self.dataset not in SIMULATED else ""
            _refuse("model", self.model, f"one of {', '.join(models)} for {self.dataset}{folder}")
        if self.image_size != 32 and "/" not in self.model:
            _refuse("image_size", self.image_size, "32, but for pretrained models of timm")
        if self.dataset in TEXTS and self.augmentation != "none":
            _refuse("augmentation", self.augmentation, "none for texts")
        for name, usual in (("dropout", None), ("attention", "eager"), ("max_length", 128)):
            if self.dataset not in TEXTS and getattr(self, name) != usual:
                _refuse(name, getattr(self, name), "left out but for text models")
        if self.dataset == "stsb" and self.label_smoothing:
            _refuse("label_smoothing", self.label_smoothing, "0 for stsb, a regression")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            _refuse("dropout", self.dropout, "at least 0 and below 1, or left out")
        available, test = _SIZES[self.dataset]
        if (self.train_examples or 0) + self.holdout_examples > available:
            _refuse("train_examples", self.train_examples, f"at most {available}, held-out examples included")
        if (self.test_examples or 0) > test:
            _refuse("test_examples", self.test_examples, f"at most {test}, or left out to take all")
        if self.examples < self.batch_size:
            _refuse("batch_size", self.batch_size, f"at most the {self.examples} training examples")
        if self.warmup_epochs >= self.epochs:
            _refuse("warmup_epochs", self.warmup_epochs, f"below the {self.epochs} epochs of the run")
        self._check_measured()

    def _check_measured(self) -> None:
        if (self.kind == "theory") != (self.dataset in SIMULATED):
            _refuse("kind", self.kind, f"theory for {', '.join(SIMULATED)}, and for nothing else")
        if not self.normalised and self.kind != "theory":
            _refuse("normalised", self.normalised, "True for networks: their perturbations have the length rho")
        for name in ("measured_examples", "measured_rho"):
            if (getattr(self, name) > 0) != (self.kind == "curvature"):
                allowed = "greater than 0" if self.kind == "curvature" else "0 but for curvature runs"
                _refuse(name, getattr(self, name), allowed)
        fewest = min(self.examples, self.test_examples or _SIZES[self.dataset][1])
        if self.kind == "curvature" and self.measured_examples > fewest:
            _refuse("measured_examples", self.measured_examples, f"at most {fewest}, the training and test examples")
        if self.kind == "curvature" and self.holdout_examples:
            _refuse("holdout_examples", self.holdout_examples, "0 for a curvature run")
        if self.kind == "cost":
            self._check_timed()
        elif self.workers > 1:
            _refuse("workers", self.workers, "1 but for cost runs")

    def _check_timed(self) -> None:
        if not self.rho:
            _refuse("rho", self.rho, "greater than 0 for a cost run")
        if self.compile:
            _refuse("compile", True, "left out for a cost run: it times models as they are")
        m = self.micro_batches
        if m < 2 or m & (m - 1) or self.batch_size % m:
            _refuse("micro_batches", m, f"a power of 2 that divides the batch size, {self.batch_size}, for a cost run")
        if m % self.workers:
            _refuse("workers", self.workers, f"a divisor of micro_batches, {m} here")
        if self.workers > 1 and self.device != "cpu":
            _refuse("workers", self.workers, "1 on GPUs: several are timed on CPUs only")

    @property
    def method(self) -> str:
        """`base`, `control` (plain gradients over the same micro-batches), `sam` or `msam`."""
        if self.rho == 0:
            return "base" if self.micro_batches == 1 else "control"
        return "sam" if self.micro_batches == 1 else "msam"

    @property
    def examples(self) -> int:
        """How many examples are trained on."""
        return self.train_examples or _SIZES[self.dataset][0] - self.holdout_examples

    @property
    def trained(self) -> "Spec | None":
        """The training whose final weights a curvature run measures; None for other runs."""
        if self.kind != "curvature":
            return None
        return replace(self, kind="train", measured_examples=0, measured_rho=0.0)

    @functools.cached_property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of a SHA-256 over the fields that differ from their defaults."""
        text = json.dumps(self._told(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """One line for people: what is trained, how, and with which seed."""
        how = {
            "base": self.base_optimizer,
            "control": f"{self.base_optimizer} over m={self.micro_batches}",
            "sam": f"SAM rho={self.rho:g}",
            "msam": f"mSAM m={self.micro_batches} rho={self.rho:g}",
        }[self.method]
        scored = " (held-out)" if self.holdout_examples else ""
        together = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        if self.kind == "cost":
            return f"cost of {self.model} batch {self.batch_size} m to {self.micro_batches} seed {self.seed}"
        if self.kind == "theory":
            kind = "" if self.normalised else "unnormalised "
            batches = f" batches of {self.batch_size}" if self.batch_size < self.examples else ""
            return f"stability of {kind}{how} on {self.model}{batches} lr={self.learning_rate:g} seed {self.seed}"
        what = "" if self.kind == "train" else f"{self.kind} of "
        how += f" wrong labels {self.label_noise:g}" if self.label_noise else ""
        return f"{what}{self.model} {self.dataset} {how} lr={self.learning_rate:g} seed {self.seed}{together}{scored}"

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Spec":
        """The inverse of `to_dict`.

        Raises:
            SpecError: for unknown or missing fields, and for values that `__post_init__` refuses.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise SpecError(f"Unknown field {unknown[0]!r} in a spec; the fields are: {', '.join(known)}.")
        required = [n for n, f in known.items() if f.default is dataclasses.MISSING]
        if missing := [n for n in required if n not in fields]:
            raise SpecError(f"A spec lacks the field {missing[0]!r}; it needs {', '.join(required)}.")
        return cls(**fields)

    @classmethod
    def from_text(cls, fields: Mapping[str, str]) -> "Spec":
        """A spec from a row of `runs.csv`: columns that are no fields are left alone, and empty ones are the default.

        Raises:
            SpecError: as `from_dict` does.
            ValueError: for a text that is no value of its field.
        """
        found: dict[str, Any] = {}
        for name, annotation in _hints().items():
            if text := fields.get(name):
                kind = next(t for t in (bool, int, float, str) if t in (annotation, *typing.get_args(annotation)))
                found[name] = text == "True" if kind is bool else kind(text)
        return cls.from_dict(found)

    def _told(self) -> dict[str, Any]:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {k: v for k, v in self.to_dict().items() if k == "recipe" or v != defaults[k]}


def score_name(spec: Spec) -> str:
    """Which number of a run's summary its table shows: what it is compared by."""
    if spec.kind == "curvature":
        return "train_lambda_1"
    if spec.kind == "cost":
        return f"msam_m{spec.micro_batches}_w1_ratio"
    if spec.curvature_every:
        return "lambda_1"
    if spec.kind == "theory":
        return "stable_sharpness"
    part = "holdout" if spec.holdout_examples else "test"
    return f"{part}_accuracy" if spec.dataset in IMAGES else f"{part}_score"


def in_percent(score: str) -> bool:
    """Whether a number of a run's summary is shown times 100."""
    return score.endswith(("_accuracy", "_score"))


def shareable(spec: Spec, ranks: int) -> bool:
    """Whether so many ranks divide the micro-batches of a training, and these its mini-batches."""
    return spec.kind == "train" and spec.micro_batches % ranks == 0 and spec.batch_size % spec.micro_batches == 0


@functools.cache
def _hints() -> dict[str, Any]:
    """The fields' types; asking for them takes longer than all the rest of a spec's checks."""
    return typing.get_type_hints(Spec)


def _typed(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the field's type: an int may stand for a float, and nothing else for anything."""
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed:
        words = " or ".join("nothing" if t is type(None) else t.__name__ for t in allowed)
        _refuse(name, value, f"of type {words}")
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(name, value, "a finite number")
    return value


def _refuse(name: str, value: Any, allowed: str) -> typing.NoReturn:
    raise SpecError(f"{name} is {value!r}, but must be {allowed}.")
