"""What all kinds of run share: fields, the hash that names the folder, and flat JSON. Standard library only."""

import dataclasses
import functools
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from experiments.harness.runs import methods
from experiments.harness.runs.checks import SpecError, check_ranges, reject, typed
from experiments.harness.runs.facts import DATASETS

if TYPE_CHECKING:
    from experiments.harness.runs.spec import Training

RECIPE = 1
"""Increased whenever the meaning of training changes, so that old runs are not taken for new ones."""

ORDER = (
    *("profile", "dataset", "model", "base_optimizer", "learning_rate", "epochs", "batch_size", "rho"),
    *("micro_batches", "seed", "kind", "train_examples", "test_examples", "holdout_examples", "augmentation", "cutout"),
    *("image_size", "label_smoothing", "label_noise", "momentum", "nesterov", "weight_decay", "schedule"),
    *("warmup_epochs", "clip_norm", "ema", "decay", "dropout", "attention", "max_length", "precision", "device"),
    *("channels_last", "fused", "compile", "tf32", "deterministic", "threads", "ranks", "curvature_every"),
    *("measured_examples", "measured_rho", "workers", "normalised", "recipe"),
)
"""The order of the fields in records and CSV files; fields of a later version come after these."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The spec of a run: exactly the fields that can change its numbers.

    A field at its default is left out of the hash. So a field that a later version adds, with a default that means
    "as before", leaves the ids of finished runs unchanged.
    """

    kind: ClassVar[str]
    """The kind's name in records."""
    module: ClassVar[str]
    """The module of the harness that executes this kind."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields with a different name in records."""

    profile: str
    dataset: str
    model: str
    base_optimizer: str
    learning_rate: float
    batch_size: int
    rho: float = 0.0
    """Radius of the perturbation: its L2 norm over all parameters together."""
    micro_batches: int = 1
    """m, the number of micro-batches that a mini-batch is split into (not their size)."""
    adaptive: bool = False
    """Whether the perturbation is ASAM's, elementwise; its rho is not comparable with SAM's."""
    shared: bool = False
    """Whether all micro-batches, over all ranks, share one perturbation, from the mean of their gradients."""
    seed: int = 0
    train_examples: int | None = None
    """Size of the training subset, which is the same for every seed; None takes all."""
    momentum: float = 0.9
    """SGD's momentum; AdamW keeps torch's betas."""
    device: str = "cpu"
    threads: int = 1
    """Threads of one worker process; runs match bit for bit only at an equal number of threads."""
    recipe: int = RECIPE

    def __post_init__(self) -> None:
        """Reject a spec that cannot be run, before anything expensive starts.

        Raises:
            SpecError: with a sentence that names the field, its value and the allowed values.
        """
        for name, annotation in hints(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), annotation))
        check_ranges({name: getattr(self, name) for name in hints(type(self))})
        self.check()

    def check(self) -> None:
        """Reject fields that do not go together."""
        if self.micro_batches > self.batch_size:
            allowed = f"at most the batch size, {self.batch_size}: every micro-batch needs an example"
            reject("micro_batches", self.micro_batches, allowed)
        if self.adaptive and not self.rho:
            reject("adaptive", True, "left out if rho is 0: there is no perturbation to scale")
        if self.shared and not (self.rho and self.micro_batches > 1):
            reject("shared", True, "left out unless rho is greater than 0 and micro_batches greater than 1")
        available = DATASETS[self.dataset].train
        if (self.train_examples or 0) > self.available:
            reject("train_examples", self.train_examples, f"at most {available}, including held-out examples")
        if self.examples < self.batch_size:
            reject("batch_size", self.batch_size, f"at most the {self.examples} training examples")

    @property
    def method(self) -> str:
        """The name of the run's arm: `base`, `control`, `sam`, `msam` or another entry of `methods.ARMS`."""
        return methods.arm_of(self).name

    @property
    def available(self) -> int:
        """Number of examples that could be trained on."""
        return DATASETS[self.dataset].train

    @property
    def examples(self) -> int:
        """Number of examples that are trained on."""
        return self.train_examples or self.available

    @property
    def processes(self) -> int:
        """Number of data-parallel processes that train the run."""
        return 1

    @property
    def network(self) -> "Training | None":
        """The training run whose final weights this run measures; None if it measures none."""
        return None

    @property
    def score(self) -> str:
        """The name of the summary number that the run's table shows and compares."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """One line that describes the run: what, how, and which seed."""
        raise NotImplementedError

    @functools.cached_property
    def flat(self) -> Mapping[str, Any]:
        """All fields of all kinds by their names in records; fields that this kind lacks have their defaults."""
        own = {self.renamed.get(name, name): getattr(self, name) for name in hints(type(self))}
        known = {**defaults(), "kind": self.kind, **own}
        return {name: known[name] for name in in_order()}

    def to_dict(self) -> dict[str, Any]:
        """`flat`, ready for JSON; a field that is not in `ORDER` is left out at its default."""
        default = defaults()
        return {name: value for name, value in self.flat.items() if name in ORDER or value != default[name]}

    @functools.cached_property
    def run_id(self) -> str:
        """Twelve hexadecimal digits of a SHA-256 over the fields that differ from their defaults."""
        default = defaults()
        fields = {k: v for k, v in self.flat.items() if k == "recipe" or k not in default or v != default[k]}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def from_dict(fields: Mapping[str, Any]) -> Run:
    """The inverse of `Run.to_dict`: a run of the kind given in the fields.

    Raises:
        SpecError: for unknown or missing fields, or values that cannot be run.
    """
    cls = kinds().get(fields.get("kind", "train"))
    if cls is None:
        reject("kind", fields["kind"], f"one of {', '.join(kinds())}")
    known, default = {**dict.fromkeys(names()), "kind": None}, defaults()
    own = {cls.renamed.get(f.name, f.name): f for f in dataclasses.fields(cls)}
    for name, value in fields.items():
        if name not in known:
            raise SpecError(f"Unknown field {name!r} in a spec; the fields are: {', '.join(known)}.")
        if name not in own and name != "kind" and value != default.get(name):
            reject(name, value, f"{default.get(name)!r}, or left out, in a {cls.__name__} run")
    required = [name for name, f in own.items() if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise SpecError(f"A spec lacks the field {missing[0]!r}; it needs {', '.join(required)}.")
    return cls(**{f.name: fields[name] for name, f in own.items() if name in fields})


def from_text(fields: Mapping[str, str]) -> Run:
    """A run from a row of `runs.csv`: other columns are skipped, and empty ones get their default.

    Raises:
        SpecError: as in `from_dict`.
        ValueError: for a text that its field cannot hold.
    """
    values: dict[str, Any] = {}
    for name, annotation in {**names(), "kind": str}.items():
        if text := fields.get(name):
            kind = next(t for t in (bool, int, float, str) if t in (annotation, *typing.get_args(annotation)))
            values[name] = text == "True" if kind is bool else kind(text)
    return from_dict(values)


@functools.cache
def kinds() -> dict[str, type[Run]]:
    """Every kind of run by its name in records, training first."""

    def below(cls: type[Run]) -> Iterator[type[Run]]:
        for kind in cls.__subclasses__():
            yield kind
            yield from below(kind)

    return {cls.kind: cls for cls in below(Run) if "kind" in vars(cls)}


def hints(cls: type[Run]) -> dict[str, Any]:
    """The types of a kind's fields by name; cached, since this takes longer than all other checks of a spec."""
    if cls not in _HINTS:
        known = typing.get_type_hints(cls)
        _HINTS[cls] = {f.name: known[f.name] for f in dataclasses.fields(cls)}
    return _HINTS[cls]


_HINTS: dict[type[Run], dict[str, Any]] = {}


@functools.cache
def names() -> dict[str, Any]:
    """The types of all fields of all kinds by their names in records."""
    known: dict[str, Any] = {}
    for cls in kinds().values():
        for name, hint in hints(cls).items():
            known.setdefault(cls.renamed.get(name, name), hint)
    return known


@functools.cache
def in_order() -> tuple[str, ...]:
    """All field names in records: those in `ORDER`, then those of later versions."""
    return tuple(dict.fromkeys((*ORDER, *names())))


@functools.cache
def defaults() -> dict[str, Any]:
    """The defaults of all fields that have one, by their names in records; training's defaults take precedence."""
    known = [(cls.renamed.get(f.name, f.name), f) for cls in kinds().values() for f in dataclasses.fields(cls)]
    fields = {name: f.default for name, f in reversed(known)}
    return {"kind": "train", **{k: v for k, v in fields.items() if v is not dataclasses.MISSING}}
