"""What a run asks a cluster for, by the family of its model. Standard library only.

Nothing here belongs to one site: partition, account and the like stand in the site's own file (see `site.py`).
"""

import math
from dataclasses import dataclass, replace

from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.facts import DATASETS, TextSet
from experiments.harness.runs.spec import Run, Timing

SIGNAL_SECONDS = 120
"""How long before the time limit a job is asked to write its checkpoint and queue again."""

LEAST_MINUTES = 6
"""Slurm may send that signal a minute early and looks every half minute: below this a job hardly begins."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one process of a run; a data-parallel run asks for as many of them as it has ranks."""

    gpus: int
    cpus: int
    memory_gb: float
    minutes: int
    """Where nothing comparable was measured. A run that needs longer is queued again and goes on."""
    exclusive: bool = False
    """Whether nothing else may run on the node: for runs that time something."""


SMALL = Resources(gpus=0, cpus=1, memory_gb=2, minutes=60)
"""The smoke and cpu profiles, whatever the model."""
RESNET = Resources(gpus=1, cpus=4, memory_gb=16, minutes=360)
"""ResNet-50 and smaller at 32 x 32."""
WIDE_RESNET = Resources(gpus=1, cpus=4, memory_gb=16, minutes=720)
"""WRN-28-10."""
VIT = Resources(gpus=1, cpus=4, memory_gb=16, minutes=360)
ENCODER = Resources(gpus=1, cpus=4, memory_gb=32, minutes=240)
"""BERT-base and RoBERTa-base at up to 128 tokens."""


def resources(spec: Run, estimate: Estimate | None = None, minutes: int | None = None) -> Resources:
    """What a run asks for.

    Args:
        spec: The run.
        estimate: Measured times; twice as much is requested, in steps of half an hour beyond one.
        minutes: Asked for instead.
    """
    if spec.device == "cpu":
        family = replace(SMALL, cpus=max(SMALL.cpus, spec.threads * (spec.workers if isinstance(spec, Timing) else 1)))
    elif isinstance(DATASETS[spec.dataset], TextSet):
        family = ENCODER
    else:
        family = next((r for start, r in (("wrn", WIDE_RESNET), ("vit", VIT)) if spec.model.startswith(start)), RESNET)
    family = replace(family, exclusive=isinstance(spec, Timing))
    seconds = estimate.seconds(spec) if estimate and not minutes else None
    if seconds is not None:
        needed = LEAST_MINUTES + seconds / 30
        minutes = math.ceil(needed if needed < 30 else 30 * math.ceil(needed / 30))
    return replace(family, minutes=minutes or family.minutes)
