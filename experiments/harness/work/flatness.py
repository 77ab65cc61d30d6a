"""A curvature run: how flat the loss is around a training run's final network.

Everything is measured in float32 and eval mode, without dropout. BatchNorm uses its running statistics: in train mode
the loss of a batch is not a mean over its examples and has a different Hessian. The loss is the training loss with
label smoothing, without weight decay. The examples are the first of the training set and of the test set, without
augmentation. Random draws are the same for all networks.

The network is also scored on the whole test set. A network with BatchNorm is scored a second time with re-estimated
running statistics. They average over the last micro-batches of training, m per step, so with a different m they cover
a different number of images.
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
"""Examples per pass of a Hessian-vector product: few enough to stay in a processor's cache."""
EIGENVALUES = 5
TOLERANCE = 1e-3
"""Relative accuracy of the eigenvalues."""
TRACE_PROBES = 20
DENSITY_PROBES = 2
DENSITY_NODES = 30
DIRECTIONS = 20
"""Number of random directions for the average sharpness."""
ASCENT_STEPS = 10
SLICE = tuple(round(x, 3) for x in np.linspace(-1, 1, 21))
"""Positions along a filter-normalised direction, in lengths of the weights; the plane uses every other one."""


def measure(spec: Curvature, record: Record, session: Session) -> None:
    """Measure the network of `spec.network`; measurements of earlier sessions are not repeated.

    Each line of metrics.jsonl is one measurement. The summary has the numbers of all of them, named by the part of the
    data and the measurement: `train_lambda_1`, `test_trace`, ...

    Raises:
        Interrupted: if `session.stop` returns True; the current measurement starts over when the run resumes.
        RecordError: if the network's weights are missing.
    """
    set_torch(replace(spec, tf32=False))
    torch.manual_seed(spec.seed)
    task, origin = trained_task(spec, record, session.data_root)
    record.add_environment({**session.environment, **task.data, **origin, **torch_environment(spec)})
    lines = record.metrics()
    done = {(line["part"], line["measure"]): line for line in lines}
    seconds = lines[-1]["seconds"] if lines else 0.0
    since = time.monotonic()
    measurements = {part: measurements_of(part, spec.seed) for part in ("train", "test")}
    count = sum(map(len, measurements.values()))

    def check() -> None:
        session.stop_if_asked(f"Stopped after {len(done)} of {count} measurements.")

    with hessian.eval_mode(task.model):
        for part, names in measurements.items():
            context = _Context(spec, task, part, check)
            for name in names:
                if (part, name) in done:
                    continue
                check()
                values = MEASUREMENTS[name](context)
                now = round(seconds + time.monotonic() - since, 3)
                line = {"part": part, "measure": name, "step": len(done) + 1, "steps": count, "seconds": now, **values}
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
    """The task with its trained network, and the provenance of the training for the record.

    Raises:
        RecordError: if the final weights are missing or do not match the model.
    """
    assert spec.network is not None
    source = record_of(spec.network, record.root)
    task = build_task(replace(spec.network, precision="float32"), data_root)
    try:
        task.model.load_state_dict(load_weights(source))
    except (RecordError, RuntimeError) as error:
        raise RecordError(
            f"{source.checkpoint} does not have the final weights of {spec.network.title} ({type(error).__name__}): "
            f"delete {source.folder}, and the network is retrained."
        ) from error
    sessions = source.environments()
    origin = {
        f"network_{name}": "+".join(dict.fromkeys(str(session.get(name)) for session in sessions))
        for name in ("commit", "code")
    }
    unclean = [session.get("dirty") for session in sessions]
    dirty = True if True in unclean else None if None in unclean else False
    return task, {"network": source.run_id, **origin, "network_dirty": dirty}


def measurements_of(part: str, seed: int) -> list[str]:
    """The names of the measurements on a part of the data, in order."""
    names = [name for name in MEASUREMENTS if name not in PICTURES or (part == "train" and seed == 0)]
    return [name for name in names if name != "scores" or part == "test"]


class _Context:
    """The data, model and Hessian that all measurements on one part of the data share."""

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


def _loss(context: _Context) -> dict[str, Any]:
    with torch.no_grad():
        return {"loss": context.loss_fn(context.batch).item()}


def _eigenvalues(context: _Context) -> dict[str, Any]:
    before = context.hessian.products
    spectrum = context.spectrum
    return {
        **{f"lambda_{i}": float(value) for i, value in enumerate(spectrum.values, start=1)},
        **({"lambda_ratio": float(spectrum.values[0] / spectrum.values[-1])} if spectrum.values[-1] else {}),
        "residual": spectrum.residual,
        "tolerance": TOLERANCE,
        "products": context.hessian.products - before,
    }


def _trace(context: _Context) -> dict[str, Any]:
    probes = hessian.rademacher(context.hessian.shape[0], TRACE_PROBES)
    estimate, error = hessian.trace(context.hessian, probes, known=context.spectrum)
    return {"trace": estimate, "trace_standard_error": error}


def _density(context: _Context) -> dict[str, Any]:
    nodes, weights = hessian.density(context.hessian, nodes=DENSITY_NODES, probes=DENSITY_PROBES)
    return {"density_nodes": nodes.tolist(), "density_weights": weights.tolist()}


def _sharpness(context: _Context) -> dict[str, Any]:
    rho = context.spec.measured_rho
    rises = sharpness.random_sharpness(context.loss_fn, context.batch, context.model, rho=rho, directions=DIRECTIONS)
    return {
        "average_sharpness": float(rises.mean()),
        "average_sharpness_standard_error": float(rises.std(ddof=1) / len(rises) ** 0.5),
        "greatest_random_sharpness": float(rises.max()),
        "ascent_sharpness": sharpness.ascent_sharpness(
            context.loss_fn, context.batch, context.model, rho=rho, steps=ASCENT_STEPS
        ),
    }


def _micro_batches(context: _Context) -> dict[str, Any]:
    values: dict[str, float] = {}
    for m in halvings(context.spec.measured_examples):
        rise = sharpness.micro_batch_sharpness(
            context.loss_fn, context.batch, context.model, rho=context.spec.measured_rho, micro_batches=m
        )
        values |= {f"sharpness_m{m}": rise.sharpness, f"penalty_m{m}": rise.penalty, f"squared_m{m}": rise.squared}
    return values


def _slices(context: _Context) -> dict[str, Any]:
    first, second = (sharpness.filter_normalised(context.model, seed) for seed in (1, 2))
    coarse = SLICE[::2]
    line = sharpness.loss_slice(context.loss_fn, context.batch, context.model, [first], [(a,) for a in SLICE])
    plane = sharpness.loss_slice(
        context.loss_fn, context.batch, context.model, [first, second], [(a, b) for a in coarse for b in coarse]
    )
    return {"slice_positions": list(SLICE), "slice_losses": line, "plane_losses": plane}


def _scores(context: _Context) -> dict[str, Any]:
    """The score on the whole test set; with BatchNorm, again with statistics re-estimated over one more epoch."""
    trained, model = context.spec.network, context.model
    assert trained is not None
    score = replace(trained, curvature_every=0).score
    name = score.partition("_")[2]
    values = {name: context.task.evaluate().scores[score]}
    if any(isinstance(module, BatchNorm) for module in model.modules()):
        before = copy.deepcopy(model.state_dict())
        update_bn((inputs for inputs, _ in context.task.batches(trained.epochs, 0)), model)
        values[f"reestimated_{name}"] = context.task.evaluate().scores[score]
        model.load_state_dict(before)
    return values


MEASUREMENTS: dict[str, Callable[[_Context], dict[str, Any]]] = {
    "loss": _loss,
    "eigenvalues": _eigenvalues,
    "trace": _trace,
    "density": _density,
    "sharpness": _sharpness,
    "micro-batches": _micro_batches,
    "slices": _slices,
    "scores": _scores,  # last, because it changes the model and restores it
}


PICTURES = ("density", "slices")
"""Measured only on training data at seed 0: figures show one network of each cell."""


def halvings(examples: int) -> list[int]:
    """m = 1, 2, 4, ... as long as m divides the examples equally; each split refines the previous one."""
    counts = [1]
    while examples % (2 * counts[-1]) == 0:
        counts.append(2 * counts[-1])
    return counts
