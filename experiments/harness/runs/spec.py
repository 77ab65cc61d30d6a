"""The four kinds of run: frozen dataclasses whose hash names the run's folder.

`Training` trains a network, `Curvature` measures the final network of a training run, `Timing` times the steps of all
arms, `Stability` simulates a theorem. All are written as the same flat JSON. Standard library only, so that listing,
planning and analysis never wait for torch.
"""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from experiments.harness.runs import methods
from experiments.harness.runs.checks import PROFILES, SpecError, is_callable, is_start, reject
from experiments.harness.runs.facts import DATASETS, ImageSet, SimulatedSet, TextSet, models_of
from experiments.harness.runs.run import Run, defaults, from_dict, from_text, hints

__all__ = [
    "CAPTURED",
    "ON_GPU",
    "PROFILES",
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

ON_GPU: dict[str, Any] = {"device": "cuda", "tf32": True, "fused": True}
"""How the `gpu` and `paper` profiles compute. By the data sheets, autocast to bfloat16 would be up to twice as fast.
But it rounds weights to so few bits that most of a small perturbation is lost, and the rest is more than twice as long
(benchmarks/results/precision.md). TensorFloat-32 loses far less. Compilation and deterministic kernels stay off until
their gain and cost are measured on a GPU."""

CAPTURED: dict[str, Any] = {**ON_GPU, "capture": True}
"""How the `gpu` profile trains: the same, with each step as one CUDA graph."""


_TEXTS_ONLY = ("dropout", "attention", "max_length", "padding")
_IMAGES_ONLY = ("augmentation", "cutout", "image_size", "label_noise", "channels_last")


@dataclass(frozen=True, kw_only=True)
class Network(Run):
    """A run with a network: its data, model, optimizer and device."""

    test_examples: int | None = None
    """None takes the whole test set."""
    holdout_examples: int = 0
    """If positive, the run is scored on this many held-out training examples instead of the test set."""
    augmentation: str = "none"
    """Of images; see `augment.py`."""
    cutout: int = 0
    """Side, in pixels, of the square that is cut out of each training image; 0: no cutout."""
    image_size: int = 32
    """Side, in pixels, that images are resized to; for pretrained models, which expect larger images."""
    label_smoothing: float = 0.0
    label_noise: float = 0.0
    """Share of the training images with a wrong label, the same images and labels for every seed and method."""
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: str = "cosine"
    """The learning rate schedule: `cosine` or `linear` decay to 0, or `step`: times 0.2 after 30, 60 and 80 % of the
    epochs, as published for Wide ResNets."""
    clip_norm: float | None = None
    """Largest norm of the gradient that the base optimizer gets, clipped after micro-batches are averaged."""
    decay: str = "all"
    """The parameters that `weight_decay` applies to: all, or only matrices (no biases or norms)."""
    dropout: float | None = None
    """Dropout of a text model; None keeps the model's configuration."""
    attention: str = "eager"
    """Implementation of attention in text models."""
    max_length: int = 128
    """Texts are truncated to this many tokens, including special tokens."""
    padding: str = "longest"
    """What texts are padded to: the longest of their mini-batch, or `max_length`, so that all mini-batches have one
    shape, as a CUDA graph needs."""
    precision: str = "float32"
    channels_last: bool = True
    """Memory layout of images and convolutions."""
    fused: bool = False
    """Whether the base optimizer updates all parameters in one kernel."""
    compile: bool = False
    """Whether the model is compiled with `torch.compile`."""
    capture: bool = False
    """Whether the whole training step is one CUDA graph, `msam.capture`."""
    passes: str = "loop"
    """How the micro-batches run, see `msam.backward`: the gradient is the same up to rounding."""
    tf32: bool = False
    """Whether float32 products on a GPU may round their factors to TensorFloat-32."""
    deterministic: bool = False
    """Whether a GPU uses only deterministic kernels. On the CPU all kernels are."""

    def check(self) -> None:
        """Reject fields that do not go together."""
        data = DATASETS[self.dataset]
        if isinstance(data, SimulatedSet):
            reject("dataset", self.dataset, "a set of images or texts: only stability runs simulate data")
        super().check()
        images = isinstance(data, ImageSet)
        known = models_of(self.dataset)
        if self.model not in known and "/" not in self.model and not (images and is_callable(self.model)):
            custom = ", or module:callable" if images else ""
            allowed = f"one of {', '.join(known)} for {self.dataset}, or the path of a checkpoint's folder{custom}"
            reject("model", self.model, allowed)
        for name in _TEXTS_ONLY if images else _IMAGES_ONLY:
            if getattr(self, name) != defaults()[name]:
                reject(name, getattr(self, name), f"left out, except for {'text models' if images else 'images'}")
        if self.cutout > 32:
            reject("cutout", self.cutout, "at most 32, the side of the images")
        for name in ("tf32", "deterministic", "capture"):
            if self.device != "cuda" and getattr(self, name):
                reject(name, True, "left out on CPUs: only GPUs have it")
        if self.image_size != 32 and "/" not in self.model:
            reject("image_size", self.image_size, "32, except for timm's pretrained models")
        if isinstance(data, TextSet) and not data.labels and self.label_smoothing:
            reject("label_smoothing", self.label_smoothing, f"0 for {self.dataset}, a regression")
        if self.capture and not images and self.padding != "max_length":
            reject("padding", self.padding, '"max_length" in a captured run, whose mini-batches all have one shape')
        if self.shared and self.passes != "loop":
            reject("passes", self.passes, "loop in a run whose micro-batches share one perturbation")
        if self.deterministic and self.passes == "auto":
            reject("passes", self.passes, "loop, vectorized or streams in a deterministic run: auto depends on times")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            reject("dropout", self.dropout, "at least 0 and below 1, or left out")
        if (self.test_examples or 0) > data.test:
            reject("test_examples", self.test_examples, f"at most {data.test}, or left out to take all")

    @property
    def way(self) -> str:
        """How steps are run if not micro-batch by micro-batch, kernel by kernel: `captured`, the passes, or both."""
        return ", ".join(["captured"] * self.capture + [self.passes] * (self.passes != "loop"))

    @property
    def available(self) -> int:
        """Number of examples that could be trained on: all except the held-out ones."""
        return DATASETS[self.dataset].train - self.holdout_examples


@dataclass(frozen=True, kw_only=True)
class Training(Network):
    """Trains a network and scores it."""

    kind = "train"
    module = "work.train"

    epochs: int
    warmup_epochs: float = 0.0
    ema: float = 0.0
    """If positive, the run is scored with an exponential moving average of its weights and buffers with this decay, for
    example 0.999. Gradients are computed at the plain weights."""
    ranks: int = 1
    """Data-parallel processes, each with its share of every mini-batch; `micro_batches` counts over all of them."""
    start_weights: str | None = None
    """`PATH.safetensors@DIGEST`: training starts from the weights in this file instead of random or pretrained ones.
    DIGEST is at least 12 digits of the file's SHA-256, so that other weights make another run."""
    curvature_every: int = 0
    """Epochs between measurements of the largest Hessian eigenvalue during training; the last epoch is measured too.
    0: no measurement."""

    def check(self) -> None:
        """Reject fields that do not go together."""
        super().check()
        if self.ranks > 1 and not self.divisible(self.ranks):
            allowed = (
                f"a divisor of micro_batches ({self.micro_batches}), which must divide the batch size "
                f"({self.batch_size}): each rank perturbs its own micro-batches, so SAM (m=1) needs ranks=1"
            )
            reject("ranks", self.ranks, allowed)
        if self.ranks > 1 and (self.capture or self.passes != "loop"):
            reject("ranks", self.ranks, "1 in a captured run, and in one whose passes are not the loop")
        if self.start_weights is not None and not is_start(self.start_weights):
            allowed = "PATH.safetensors@DIGEST, with at least 12 digits of the file's SHA-256 (`sha256sum PATH`)"
            reject("start_weights", self.start_weights, allowed)
        if self.warmup_epochs >= self.epochs:
            reject("warmup_epochs", self.warmup_epochs, f"below the {self.epochs} epochs of the run")

    def divisible(self, ranks: int) -> bool:
        """Whether every rank gets the same number of micro-batches, all of equal size."""
        return self.micro_batches % ranks == 0 and self.batch_size % self.micro_batches == 0

    @property
    def processes(self) -> int:
        """The ranks."""
        return self.ranks

    @property
    def score(self) -> str:
        """Accuracy or score on the test set or held-out part; the largest eigenvalue if it is measured in training."""
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
        ranks += f" from {PurePath(self.start_weights.partition('@')[0]).name}" if self.start_weights else ""
        scored = " (held-out)" if self.holdout_examples else ""
        return f"{self.model} {self.dataset} {how} lr={self.learning_rate:g} seed {self.seed}{ranks}{scored}"


@dataclass(frozen=True, kw_only=True)
class Curvature(Training):
    """Measures the flatness of the final network of the training run with the same fields."""

    kind = "curvature"
    module = "work.flatness"

    measured_examples: int = 0
    """Number of training examples, and of test examples, that it measures on."""
    measured_rho: float = 0.0
    """The radius at which sharpness is measured, the same for every arm."""

    def check(self) -> None:
        """Reject fields that do not go together."""
        super().check()
        fewest = min(self.examples, self.test_examples or DATASETS[self.dataset].test)
        if self.measured_examples > fewest:
            reject("measured_examples", self.measured_examples, f"at most {fewest}, the training and test examples")
        if self.holdout_examples:
            reject("holdout_examples", self.holdout_examples, "0 for a curvature run")
        if self.ranks > 1:
            reject("ranks", self.ranks, "1 for a curvature run")

    @property
    def network(self) -> Training:
        """The training run whose final weights are measured."""
        return Training(**{name: getattr(self, name) for name in hints(Training)})

    @property
    def score(self) -> str:
        """The largest Hessian eigenvalue on training data."""
        return "train_lambda_1"

    @property
    def title(self) -> str:
        """The title of its training run, marked as curvature."""
        return f"curvature of {super().title}"


@dataclass(frozen=True, kw_only=True)
class Timing(Network):
    """Times the steps of every arm, with m = 2, 4, ... up to `micro_batches`; SAM and mSAM use `rho`."""

    kind = "cost"
    module = "work.timing"
    renamed: ClassVar = {"rounds": "epochs"}

    rounds: int
    """Number of times that each step is timed."""
    workers: int = 1
    """Number of data-parallel processes, which are timed after a single process."""

    def check(self) -> None:
        """Reject fields that do not go together."""
        super().check()
        m = self.micro_batches
        if not self.rho:
            reject("rho", self.rho, "greater than 0 for a timing run")
        if self.holdout_examples:
            reject("holdout_examples", self.holdout_examples, "0 for a timing run")
        for name in ("compile", "adaptive", "shared"):
            if getattr(self, name):
                reject(name, True, "left out of a timing run, which times uncompiled models and the arms of Table 1")
        if m < 2 or m & (m - 1) or self.batch_size % m:
            reject("micro_batches", m, f"a power of 2 that divides the batch size, {self.batch_size}, for a timing run")
        if m % self.workers:
            reject("workers", self.workers, f"a divisor of micro_batches, {m}")
        if self.workers > 1 and self.device != "cpu":
            reject("workers", self.workers, "1 on GPUs: several workers are timed only on CPUs")
        if self.workers > 1 and self.passes != "loop":
            reject("workers", self.workers, "1 if the passes are not the loop, which data-parallel steps take")

    @property
    def score(self) -> str:
        """The time of an mSAM step, divided by that of a base optimizer step."""
        return f"msam_m{self.micro_batches}_w1_ratio"

    @property
    def title(self) -> str:
        """Model, batch size, largest m, seed."""
        way = f" {self.way}" if self.way else ""
        return f"cost of {self.model} batch {self.batch_size} m to {self.micro_batches}{way} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Stability(Run):
    """Simulates gradient descent, SAM or mSAM at a minimum to find the largest sharpness at which it is stable."""

    kind = "theory"
    module = "work.stability"

    epochs: int
    momentum: float = 0.0
    normalised: bool = True
    """Whether perturbations have length rho; otherwise they are rho times the gradient."""

    def check(self) -> None:
        """Reject fields that do not go together."""
        super().check()
        if not isinstance(DATASETS[self.dataset], SimulatedSet):
            simulated = [name for name, data in DATASETS.items() if isinstance(data, SimulatedSet)]
            reject("dataset", self.dataset, f"{', '.join(simulated)} for a stability run")
        if self.model not in models_of(self.dataset):
            reject("model", self.model, f"one of {', '.join(models_of(self.dataset))} for {self.dataset}")
        for name, only in (
            ("base_optimizer", "sgd"),
            ("momentum", 0.0),
            ("device", "cpu"),
            ("adaptive", False),
            ("shared", False),
        ):
            if getattr(self, name) != only:
                reject(name, getattr(self, name), f"{only!r} in a stability run")

    @property
    def score(self) -> str:
        """The largest sharpness at which the method is stable."""
        return "stable_sharpness"

    @property
    def title(self) -> str:
        """Arm, model, batch size if smaller than the data, learning rate, seed."""
        how = ("" if self.normalised else "unnormalised ") + methods.arm_of(self).described(self)
        batches = f" batches of {self.batch_size}" if self.batch_size < self.examples else ""
        return f"stability of {how} on {self.model}{batches} lr={self.learning_rate:g} seed {self.seed}"


def in_percent(score: str) -> bool:
    """Whether a number of a run's summary is shown in percent."""
    return score.endswith(("_accuracy", "_score"))
