"""Allowed values of a spec's fields. Standard library only."""

import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.runs.command_line import Mistake
from experiments.harness.runs.facts import DATASETS
from experiments.harness.runs.methods import BASE_OPTIMIZERS
from experiments.harness.runs.parsing import not_one_of

PROFILES = ("smoke", "cpu", "gpu", "paper")

CHOICES = {
    "profile": PROFILES,
    "dataset": tuple(DATASETS),
    "augmentation": ("none", "crop-flip", "crop-flip-autoaugment", "crop-flip-randaugment"),
    "base_optimizer": tuple(BASE_OPTIMIZERS),
    "schedule": ("cosine", "linear", "step"),
    "attention": ("eager", "sdpa"),
    "decay": ("all", "matrices"),
    "precision": ("float32", "bfloat16"),
    "passes": ("loop", "vectorized", "streams", "auto"),
    "padding": ("longest", "max_length"),
    "device": ("cpu", "cuda"),
}

POSITIVE = (
    *("learning_rate", "epochs", "rounds", "batch_size", "micro_batches", "image_size", "max_length"),
    *("threads", "ranks", "workers", "recipe", "measured_examples", "measured_rho"),
)
NOT_NEGATIVE = (
    *("rho", "seed", "holdout_examples", "momentum", "weight_decay", "warmup_epochs", "curvature_every", "cutout"),
)
POSITIVE_OR_NONE = ("train_examples", "test_examples", "clip_norm")
SHARES = ("label_smoothing", "label_noise", "ema")
"""At least 0 and below 1."""


class SpecError(Mistake, ValueError):
    """A spec that cannot be run. The message says what to change."""


def unknown(kind: str, name: str, known: Sequence[str]) -> SpecError:
    """The error for a name that is not known, with the closest one that is."""
    return SpecError(not_one_of(kind, name, known))


def reject(name: str, value: Any, allowed: str) -> typing.NoReturn:
    """Raise a `SpecError`: this field's value cannot be run."""
    raise SpecError(f"{name} is {value!r}, but must be {allowed}.")


def typed(name: str, value: Any, annotation: Any) -> Any:
    """`value` as the field's type. The only conversion is from int to float.

    Raises:
        SpecError: for another type, or for a number that is not finite.
    """
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed:
        words = " or ".join("nothing" if t is type(None) else t.__name__ for t in allowed)
        reject(name, value, f"of type {words}")
    if isinstance(value, float) and not math.isfinite(value):
        reject(name, value, "a finite number")
    return value


def check_ranges(fields: Mapping[str, Any]) -> None:
    """Reject a value that its field may not have, whatever the other fields are.

    Raises:
        SpecError: with the field, its value and the allowed values.
    """
    for name, value in fields.items():
        if name in CHOICES and value not in CHOICES[name]:
            reject(name, value, f"one of {', '.join(CHOICES[name])}")
        if name in POSITIVE and not value > 0:
            reject(name, value, "greater than 0")
        if name in NOT_NEGATIVE and not value >= 0:
            reject(name, value, "0 or greater")
        if name in POSITIVE_OR_NONE and value is not None and not value > 0:
            reject(name, value, "greater than 0, or left out")
        if name in SHARES and not 0 <= value < 1:
            reject(name, value, "at least 0 and below 1")
    if not fields["seed"] < 2**32:
        reject("seed", fields["seed"], "below 2**32")


def is_callable(model: str) -> bool:
    """Whether a model is named as `"module:callable"`."""
    module, _, name = model.partition(":")
    return all(part.isidentifier() for part in module.split(".")) and name.isidentifier()


def is_start(weights: str) -> bool:
    """Whether start weights are named as `PATH.safetensors@DIGEST`."""
    return re.fullmatch(r".+\.safetensors@[0-9a-f]{12,64}", weights) is not None
