"""The resources that a run requests, by model family. Standard library only.

Nothing here depends on the cluster: partition, account and the like are in the site's file (see `site.py`).
"""

import math
from dataclasses import dataclass, replace

from experiments.harness.runs.estimate import Estimate
from experiments.harness.runs.facts import DATASETS, TextSet
from experiments.harness.runs.spec import Run, Timing

SIGNAL_SECONDS = 120
"""How long before the time limit a job is asked to write its checkpoint and requeue."""

LEAST_MINUTES = 6
"""Shortest time limit: Slurm may send that signal a minute early, so a shorter job would hardly train."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of one process; a data-parallel run requests them once per rank."""

    gpus: int
    cpus: int
    memory_gb: float
    minutes: int
    """Time limit if nothing comparable was measured. A run that needs longer is requeued and resumes."""
    exclusive: bool = False
    """Whether the run needs the node to itself, as timing runs do."""


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
    """The resources that a run requests.

    Args:
        spec: The run.
        estimate: Measured times; the limit is twice as long, and from half an hour on rounded up to half hours.
        minutes: A time limit to use instead.
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
