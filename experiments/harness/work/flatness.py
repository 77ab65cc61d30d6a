"""A curvature run: how flat the loss is around the network that a training ended with.

Everything is measured in float32 and eval mode: BatchNorm with the running statistics that the network is used with
(in train mode the loss of a batch is not a mean over its examples, and has another Hessian), and no dropout. The loss
is the training loss, label smoothing included, without weight decay; the examples are the first of the training set
and of the test set, without augmentation. The random draws are the same for all networks.

The network is also scored on the whole test set; where there is BatchNorm, once more with its running statistics
estimated again: they average the last micro-batches of training, m of them a step, so those of methods with another m
have seen other numbers of images.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim.swa_utils import update_bn

import msam
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.record import Record, record_of
from experiments.harness.runs.spec import Curvature
from experiments.harness.tasks.build import build_task
from experiments.harness.tasks.process import set_torch, torch_environment
from experiments.harness.tasks.task import Task
from experiments.harness.work import hessian, sharpness
from experiments.harness.work.checkpoint import load_weights
from experiments.harness.work.session import Session
from msam.microbatch import examples

CHUNK = 32
"""Examples that pass together in a Hessian-vector product: few enough to stay in a processor's cache."""
EIGENVALUES = 5
TOLERANCE = 1e-3
"""Of the eigenvalues, relative to the largest."""
TRACE_PROBES = 20
DENSITY_PROBES = 2
DENSITY_NODES = 30
DIRECTIONS = 20
"""Random ones, for the average sharpness."""
ASCENT_STEPS = 10
SLICE = tuple(round(x, 3) for x in np.linspace(-1, 1, 21))
"""Positions along a filter-normalised direction, in lengths of the weights; every other one in two dimensions."""


def measure(spec: Curvature, record: Record, session: Session) -> None:
    """Measure the network of `spec.network`; what an earlier session has written down is not measured again.

    Each line of metrics.jsonl is one measurement. The summary holds the numbers of all of them, by the part of the
    data and their own names: `train_lambda_1`, `test_trace`, ...

    Raises:
        Interrupted: if `session.stop` says so; the measurement it was at is started over the next time.
        RecordError: if the network's weights are not there.
    """
    set_torch(replace(spec, tf32=False))
    torch.manual_seed(spec.seed)
    task, origin = trained_task(spec, record, session.data_root)
    record.add_environment({**session.environment, **task.data, **origin, **torch_environment(spec)})
    lines = record.metrics()
    done = {(line["part"], line["measure"]): line for line in lines}
    seconds = lines[-1]["seconds"] if lines else 0.0
    since = time.monotonic()
    measurements = {part: measured_on(part, spec.seed) for part in ("train", "test")}
    count = sum(map(len, measurements.values()))

    def check() -> None:
        session.leave_if_asked(f"Stopped after {len(done)} of {count} measurements.")

    with hessian.evaluating(task.model):
        for part, names in measurements.items():
            look = _Look(spec, task, part, check)
            for name in names:
                if (part, name) in done:
                    continue
                check()
                found = MEASUREMENTS[name](look)
                now = round(seconds + time.monotonic() - since, 3)
                line = {"part": part, "measure": name, "step": len(done) + 1, "steps": count, "seconds": now, **found}
                record.append(line)
                done[part, name] = line
                session.report(len(done), count)
    scalars = {
        f"{part}_{name}": value
        for (part, _), line in done.items()
        for name, value in line.items()
        if name not in ("part", "measure", "step", "steps", "seconds") and not isinstance(value, list | dict)
    }
    record.finish({**scalars, "wall_seconds": round(seconds + time.monotonic() - since, 3)})


def trained_task(spec: Curvature, record: Record, data_root: Path | None) -> tuple[Task, dict[str, Any]]:
    """The task with its network trained, and for the record the code that trained it.

    Raises:
        RecordError: if the final weights are missing or do not fit.
    """
    assert spec.network is not None
    source = record_of(spec.network, record.root)
    task = build_task(replace(spec.network, precision="float32"), data_root)
    try:
        task.model.load_state_dict(load_weights(source))
    except (RecordError, RuntimeError) as error:
        raise RecordError(
            f"{source.checkpoint} does not hold the final weights of {spec.network.title} ({type(error).__name__}): "
            f"delete {source.folder}, and it is trained again."
        ) from error
    sessions = source.environments()
    origin = {
        f"network_{name}": "+".join(dict.fromkeys(str(session.get(name)) for session in sessions))
        for name in ("commit", "code")
    }
    unclean = [session.get("dirty") for session in sessions]
    dirty = True if True in unclean else None if None in unclean else False
    return task, {"network": source.run_id, **origin, "network_dirty": dirty}


def measured_on(part: str, seed: int) -> list[str]:
    """Which measurements a part of the data has, in their order."""
    names = [name for name in MEASUREMENTS if name not in PICTURES or (part == "train" and seed == 0)]
    return [name for name in names if name != "scores" or part == "test"]


class _Look:
    """What all measurements on one part of the data share."""

    def __init__(self, spec: Curvature, task: Task, part: str, check: Callable[[], None]) -> None:
        self.spec, self.task, self.model = spec, task, task.model
        self.batch = task.sample(part, spec.measured_examples)
        self.loss_fn = partial(task.loss_fn, task.model)
        parts = msam.split(self.batch, -(-spec.measured_examples // CHUNK))
        self.hessian = hessian.Hessian(
            self.loss_fn,
            sharpness.trained(task.model),
            [(chunk, examples(chunk)) for chunk in parts],
            keep=spec.device == "cpu",
            before_each=check,
        )

    @cached_property
    def spectrum(self) -> hessian.Spectrum:
        return hessian.largest_eigenvalues(self.hessian, EIGENVALUES, tolerance=TOLERANCE)


def _loss(look: _Look) -> dict[str, Any]:
    with torch.no_grad():
        return {"loss": look.loss_fn(look.batch).item()}


def _eigenvalues(look: _Look) -> dict[str, Any]:
    before = look.hessian.products
    found = look.spectrum
    return {
        **{f"lambda_{i}": float(value) for i, value in enumerate(found.values, start=1)},
        "lambda_ratio": float(found.values[0] / found.values[-1]),
        "residual": found.residual,
        "tolerance": TOLERANCE,
        "products": look.hessian.products - before,
    }


def _trace(look: _Look) -> dict[str, Any]:
    probes = hessian.rademacher(look.hessian.shape[0], TRACE_PROBES)
    estimate, error = hessian.trace(look.hessian, probes, beside=look.spectrum)
    return {"trace": estimate, "trace_standard_error": error}


def _density(look: _Look) -> dict[str, Any]:
    nodes, weights = hessian.density(look.hessian, nodes=DENSITY_NODES, probes=DENSITY_PROBES)
    return {"density_nodes": nodes.tolist(), "density_weights": weights.tolist()}


def _sharpness(look: _Look) -> dict[str, Any]:
    rho = look.spec.measured_rho
    rises = sharpness.random_sharpness(look.loss_fn, look.batch, look.model, rho=rho, directions=DIRECTIONS)
    return {
        "average_sharpness": float(rises.mean()),
        "average_sharpness_standard_error": float(rises.std(ddof=1) / len(rises) ** 0.5),
        "greatest_random_sharpness": float(rises.max()),
        "ascent_sharpness": sharpness.ascent_sharpness(
            look.loss_fn, look.batch, look.model, rho=rho, steps=ASCENT_STEPS
        ),
    }


def _micro_batches(look: _Look) -> dict[str, Any]:
    found: dict[str, float] = {}
    for m in halvings(look.spec.measured_examples):
        rise = sharpness.micro_batch_sharpness(
            look.loss_fn, look.batch, look.model, rho=look.spec.measured_rho, micro_batches=m
        )
        found |= {f"sharpness_m{m}": rise.sharpness, f"penalty_m{m}": rise.penalty, f"squared_m{m}": rise.squared}
    return found


def _slices(look: _Look) -> dict[str, Any]:
    first, second = (sharpness.filter_normalised(look.model, seed) for seed in (1, 2))
    coarse = SLICE[::2]
    line = sharpness.loss_slice(look.loss_fn, look.batch, look.model, [first], [(a,) for a in SLICE])
    plane = sharpness.loss_slice(
        look.loss_fn, look.batch, look.model, [first, second], [(a, b) for a in coarse for b in coarse]
    )
    return {"slice_positions": list(SLICE), "slice_losses": line, "plane_losses": plane}


def _scores(look: _Look) -> dict[str, Any]:
    """Of the whole test set; and once more with BatchNorm's statistics averaged over one epoch more of mini-batches."""
    trained, model = look.spec.network, look.model
    assert trained is not None
    score = replace(trained, curvature_every=0).score
    name = score.partition("_")[2]
    found = {name: look.task.evaluate()[score]}
    if any(isinstance(module, BatchNorm) for module in model.modules()):
        before = copy.deepcopy(model.state_dict())
        update_bn((inputs for inputs, _ in look.task.batches(trained.epochs, 0)), model)
        found[f"reestimated_{name}"] = look.task.evaluate()[score]
        model.load_state_dict(before)
    return found


MEASUREMENTS: dict[str, Callable[[_Look], dict[str, Any]]] = {
    "loss": _loss,
    "eigenvalues": _eigenvalues,
    "trace": _trace,
    "density": _density,
    "sharpness": _sharpness,
    "micro-batches": _micro_batches,
    "slices": _slices,
    "scores": _scores,  # the last one: it writes to the model, if only to put it back
}


PICTURES = ("density", "slices")
"""Measured on training data at seed 0 alone: figures show one network of each cell."""


def halvings(examples: int) -> list[int]:
    """m = 1, 2, 4, ... as long as it divides the examples into equal parts: each split refines the one before."""
    counts = [1]
    while examples % (2 * counts[-1]) == 0:
        counts.append(2 * counts[-1])
    return counts
