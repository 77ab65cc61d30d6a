"""The four kinds of run: one frozen value each, whose hash names the run's folder.

`Training` trains a network, `Curvature` measures the network that a training ends with, `Timing` times the steps of all
arms, `Stability` simulates a theorem. All are written as the same flat JSON. Standard library only, so that listing,
planning and analysing never wait for torch.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.harness.runs import methods
from experiments.harness.runs.checks import PROFILES, SpecError, is_callable, refuse
from experiments.harness.runs.facts import DATASETS, ImageSet, SimulatedSet, TextSet, models_of
from experiments.harness.runs.run import Run, defaults, from_dict, from_text, hints

__all__ = [
    "ON_GPU",
    "PROFILES",
    "SEEDS",
    "Curvature",
    "Network",
    "Run",
    "SpecError",
    "Stability",
    "Timing",
    "Training",
    "from_dict",
    "from_text",
]

SEEDS = {"smoke": 2, "cpu": 3, "paper": 5}
"""How many paired seeds (0, 1, ...) a profile runs unless another number is given."""

ON_GPU: dict[str, Any] = {"device": "cuda", "tf32": True, "fused": True}
"""How the `paper` profile computes. Autocast to bfloat16 would be up to twice as fast by the data sheets, but rounds
weights to so few bits that most of a small perturbation is lost, and what is left is twice as long and more
(benchmarks/results/precision.md). TensorFloat-32 loses far less. Compiling and deterministic kernels wait for a GPU
that measures what they bring and cost."""


_TEXTS_ONLY = ("dropout", "attention", "max_length")
_IMAGES_ONLY = ("augmentation", "cutout", "image_size", "label_noise", "channels_last")


@dataclass(frozen=True, kw_only=True)
class Network(Run):
    """A run that has a network: its data, model, optimizer and machine."""

    test_examples: int | None = None
    """None takes the whole test set."""
    holdout_examples: int = 0
    """If positive: the run is scored on this many training examples it never trains on, not on the test set."""
    augmentation: str = "none"
    """Of images; see `augment.py`."""
    cutout: int = 0
    """Side, in pixels, of the square that is cut out of each training image; 0 cuts none."""
    image_size: int = 32
    """Side, in pixels, that images are enlarged to: for pretrained models, which were made for larger ones."""
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    """Share of the training images whose label is replaced by a wrong one, drawn once for every run and method."""
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "cosine"
    """Of the learning rate: half a cosine or a line down to 0, or a fifth after 30, 60 and 80 % of the epochs, as Wide
    ResNets were published with (`step`)."""
    clip_norm: float | None = None
    """Largest norm of the gradient that the base optimizer is given, so after micro-batches were averaged."""
    decay: str = "all"
    """Which parameters `weight_decay` is for: all, or matrices alone, without biases and norms."""
    dropout: float | None = None
    """Of a text model; None leaves its own configuration."""
    attention: str = "eager"
    """Implementation of attention in text models."""
    max_length: int = 128
    """Tokens of a text after which it is cut off, special ones included."""
    precision: str = "float32"
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

    def check(self) -> None:
        """Refuse fields that do not go together."""
        data = DATASETS[self.dataset]
        if isinstance(data, SimulatedSet):
            refuse("dataset", self.dataset, "a set of images or texts: only stability runs simulate")
        super().check()
        images = isinstance(data, ImageSet)
        known = models_of(self.dataset)
        if self.model not in known and "/" not in self.model and not (images and is_callable(self.model)):
            own = ", or module:callable" if images else ""
            allowed = f"one of {', '.join(known)} for {self.dataset}, or the path of a checkpoint's folder{own}"
            refuse("model", self.model, allowed)
        usual = _IMAGES_ONLY if not images else _TEXTS_ONLY
        for name in usual:
            if getattr(self, name) != defaults()[name]:
                refuse(name, getattr(self, name), f"left out, except for {'text models' if images else 'images'}")
        if self.cutout > 32:
            refuse("cutout", self.cutout, "at most 32, the side of the images")
        for name in ("tf32", "deterministic"):
            if self.device != "cuda" and getattr(self, name):
                refuse(name, True, "left out on CPUs: it is for GPUs")
        if self.image_size != 32 and "/" not in self.model:
            refuse("image_size", self.image_size, "32, except for pretrained models of timm")
        if isinstance(data, TextSet) and not data.labels and self.label_smoothing:
            refuse("label_smoothing", self.label_smoothing, f"0 for {self.dataset}, a regression")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            refuse("dropout", self.dropout, "at least 0 and below 1, or left out")
        if (self.test_examples or 0) > data.test:
            refuse("test_examples", self.test_examples, f"at most {data.test}, or left out to take all")

    @property
    def available(self) -> int:
        """How many examples could be trained on: all but the held-out ones."""
        return DATASETS[self.dataset].train - self.holdout_examples


@dataclass(frozen=True, kw_only=True)
class Training(Network):
    """Trains a network and scores it."""

    kind = "train"
    module = "work.train"

    epochs: int
    warmup_epochs: float = 0.0
    ema: float = 0.0
    """If positive: the run is scored by an exponential moving average of its weights and buffers, which keeps this
    share of itself at each step; 0.999 say. Gradients are taken at the plain weights."""
    ranks: int = 1
    """Data-parallel processes, each on its share of every mini-batch; `micro_batches` counts those of all of them."""
    curvature_every: int = 0
    """Epochs between measurements of the largest Hessian eigenvalue while training; the last epoch has one too. 0
    measures none."""

    def check(self) -> None:
        """Refuse fields that do not go together."""
        super().check()
        if self.ranks > 1 and not self.divisible(self.ranks):
            allowed = (
                f"a divisor of micro_batches ({self.micro_batches}), and these one of the batch size "
                f"({self.batch_size}): each rank perturbs its own micro-batches, so SAM (m=1) stays on one"
            )
            refuse("ranks", self.ranks, allowed)
        if self.warmup_epochs >= self.epochs:
            refuse("warmup_epochs", self.warmup_epochs, f"below the {self.epochs} epochs of the run")

    def divisible(self, ranks: int) -> bool:
        """Whether so many ranks have whole micro-batches of one size each."""
        return self.micro_batches % ranks == 0 and self.batch_size % self.micro_batches == 0

    @property
    def processes(self) -> int:
        """The ranks."""
        return self.ranks

    @property
    def score(self) -> str:
        """The accuracy or score of the part that is scored; the largest eigenvalue if it is measured on the way."""
        if self.curvature_every:
            return "lambda_1"
        part = "holdout" if self.holdout_examples else "test"
        return f"{part}_accuracy" if isinstance(DATASETS[self.dataset], ImageSet) else f"{part}_score"

    @property
    def title(self) -> str:
        """Model, data set, arm, learning rate, seed."""
        how = methods.arm_of(self).described(self)
        how += f" wrong labels {self.label_noise:g}" if self.label_noise else ""
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        scored = " (held-out)" if self.holdout_examples else ""
        return f"{self.model} {self.dataset} {how} lr={self.learning_rate:g} seed {self.seed}{ranks}{scored}"


@dataclass(frozen=True, kw_only=True)
class Curvature(Training):
    """Measures the flatness of the network that a training with the same fields ends with."""

    kind = "curvature"
    module = "work.flatness"

    measured_examples: int = 0
    """How many training examples, and how many test examples, it measures on."""
    measured_rho: float = 0.0
    """The radius at which sharpness is measured, the same for every arm."""

    def check(self) -> None:
        """Refuse fields that do not go together."""
        super().check()
        fewest = min(self.examples, self.test_examples or DATASETS[self.dataset].test)
        if self.measured_examples > fewest:
            refuse("measured_examples", self.measured_examples, f"at most {fewest}, the training and test examples")
        if self.holdout_examples:
            refuse("holdout_examples", self.holdout_examples, "0 for a curvature run")
        if self.ranks > 1:
            refuse("ranks", self.ranks, "1 for a curvature run")

    @property
    def network(self) -> Training:
        """The training whose final weights are measured."""
        return Training(**{name: getattr(self, name) for name in hints(Training)})

    @property
    def score(self) -> str:
        """The largest Hessian eigenvalue on training data."""
        return "train_lambda_1"

    @property
    def title(self) -> str:
        """Like that of its training."""
        return f"curvature of {super().title}"


@dataclass(frozen=True, kw_only=True)
class Timing(Network):
    """Times the steps of every arm, with m = 2, 4, ... up to `micro_batches`, and of SAM and mSAM at `rho`."""

    kind = "cost"
    module = "work.timing"
    renamed: ClassVar = {"rounds": "epochs"}

    rounds: int
    """How often each step is timed."""
    workers: int = 1
    """Data-parallel processes that are timed after one alone."""

    def check(self) -> None:
        """Refuse fields that do not go together."""
        super().check()
        m = self.micro_batches
        if not self.rho:
            refuse("rho", self.rho, "greater than 0 for a timing")
        if self.holdout_examples:
            refuse("holdout_examples", self.holdout_examples, "0 for a timing")
        if self.compile:
            refuse("compile", True, "left out of a timing: it times models as they are")
        if m < 2 or m & (m - 1) or self.batch_size % m:
            refuse("micro_batches", m, f"a power of 2 that divides the batch size, {self.batch_size}, for a timing")
        if m % self.workers:
            refuse("workers", self.workers, f"a divisor of micro_batches, {m} here")
        if self.workers > 1 and self.device != "cpu":
            refuse("workers", self.workers, "1 on GPUs: several are timed on CPUs only")

    @property
    def score(self) -> str:
        """The time of a step of mSAM over that of the base optimizer."""
        return f"msam_m{self.micro_batches}_w1_ratio"

    @property
    def title(self) -> str:
        """Model, batch size, largest m, seed."""
        return f"cost of {self.model} batch {self.batch_size} m to {self.micro_batches} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Stability(Run):
    """Simulates gradient descent, SAM or mSAM at a minimum, to find the largest sharpness at which it stays."""

    kind = "theory"
    module = "work.stability"

    epochs: int
    momentum: float = 0.0
    normalised: bool = True
    """Whether perturbations have the length rho; if not, they are rho times the gradient."""

    def check(self) -> None:
        """Refuse fields that do not go together."""
        super().check()
        if not isinstance(DATASETS[self.dataset], SimulatedSet):
            simulated = [name for name, data in DATASETS.items() if isinstance(data, SimulatedSet)]
            refuse("dataset", self.dataset, f"{', '.join(simulated)} for a stability run")
        if self.model not in models_of(self.dataset):
            refuse("model", self.model, f"one of {', '.join(models_of(self.dataset))} for {self.dataset}")
        for name, only in (("base_optimizer", "sgd"), ("momentum", 0.0), ("device", "cpu"), ("adaptive", False)):
            if getattr(self, name) != only:
                refuse(name, getattr(self, name), f"{only!r} in a stability run")

    @property
    def score(self) -> str:
        """The largest sharpness at which the method stays."""
        return "stable_sharpness"

    @property
    def title(self) -> str:
        """Arm, model, batch size if it is a part of the data, learning rate, seed."""
        how = ("" if self.normalised else "unnormalised ") + methods.arm_of(self).described(self)
        batches = f" batches of {self.batch_size}" if self.batch_size < self.examples else ""
        return f"stability of {how} on {self.model}{batches} lr={self.learning_rate:g} seed {self.seed}"


def in_percent(score: str) -> bool:
    """Whether a number of a run's summary is shown times 100."""
    return score.endswith(("_accuracy", "_score"))
