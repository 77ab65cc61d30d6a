"""Checks, before a night of GPU time, that cells can be built, trained, stopped, resumed and scored at full size.

Models have full size and use the real training loop, on whatever device is there. Inputs are random (downloads are
checked by `fetch`), batches are small and m is at most 2. Cells that differ only in what a check cannot see (learning
rate, rho, epochs, data with as many labels) are checked once.
"""

import contextlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments.harness.runs.estimate import work
from experiments.harness.runs.facts import MODELS, image_set, is_images, text_set
from experiments.harness.runs.files import RecordError
from experiments.harness.runs.grids import timed_steps
from experiments.harness.runs.provenance import resources_used
from experiments.harness.runs.record import duration, record_of
from experiments.harness.runs.spec import Curvature, Run, SpecError, Timing, Training
from experiments.harness.tasks.data import ImageData
from experiments.harness.work.session import Interrupted, Session

BATCH, STEPS = 4, 2

PEAKS = {
    "a100": {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
    "h100": {"bfloat16": 989e12, "tf32": 495e12, "float32": 67e12},
}
"""FLOP/s of dense products by NVIDIA's data sheets (A100 80 GB, 2021; H100 SXM, 2023)."""

UTILISATION = (0.05, 0.4)
"""Share of the peak that training reaches at this size. A guess: lower for narrow convolutions, higher for encoders."""


@dataclass(frozen=True)
class Cell:
    """A cell to check: a spec, and the reduced spec that is trained instead."""

    spec: Training
    reduced: Training


@dataclass(frozen=True)
class Report:
    """The result of a check. Estimates are pairs of a lower and an upper bound; they are not measured."""

    failure: str | None = None
    parameters: int = 0
    seconds: float = 0.0
    """Duration of the check."""
    memory: int = 0
    """Peak bytes of the check: allocated if this machine has a GPU, otherwise resident."""
    step_flops: float = 0.0
    """FLOP of a training step at the spec's batch size."""
    gpu_memory: tuple[float, float] = (0.0, 0.0)
    """Estimated bytes at the spec's batch size and m, with half-precision and with single-precision activations."""
    run_seconds: tuple[float, float] = (0.0, 0.0)
    """Estimated seconds of the whole run on the given GPU."""


def distinct(specs: Iterable[Run]) -> list[Cell]:
    """The cells that a check can distinguish, in order."""
    cells: dict[Any, Cell] = {}
    for spec in specs:
        trainings = timed_steps(spec) if isinstance(spec, Timing) else [spec]
        for one in trainings:
            if not isinstance(one, Training):
                continue  # a simulation: its run is short and needs no GPU
            reduced = _reduced(one)
            key = replace(reduced, learning_rate=1.0, weight_decay=float(reduced.weight_decay > 0))
            visible = {**key.to_dict(), "dataset": _outputs(key)}
            cells.setdefault(tuple(visible.items()), Cell(one, reduced))
    return list(cells.values())


def check_cells(cells: Sequence[Cell], jobs: int, gpu: str) -> Iterator[tuple[Cell, Report]]:
    """Check the cells in order, `jobs` at a time, each in a separate process.

    Raises:
        SpecError: for an unknown GPU.
    """
    if gpu not in PEAKS:
        raise SpecError(f"Unknown GPU {gpu!r}: choose one of {', '.join(PEAKS)}.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.harness.machine.worker"])

    def in_own_process(cell: Cell) -> Report:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                return process.submit(check_cell, cell, gpu).result()
            except Exception as error:  # the process was killed, possibly out of memory
                return Report(failure=f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(jobs) as threads:
        yield from zip(cells, threads.map(in_own_process, cells), strict=True)


def check_cell(cell: Cell, gpu: str) -> Report:
    """Build, train, stop, resume and score one cell; for a curvature run, multiply the Hessian with one vector."""
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="msam-check-") as folder:
            parameters = _train_and_resume(cell.reduced, Path(folder))
        expected = published(cell.spec)
        if expected and abs(parameters - expected[0]) > 0.005 * expected[0]:
            raise RuntimeError(f"{parameters} parameters, but the published count is {expected[0]:.0f} ({expected[1]})")
        flops, saved = costs(cell.spec)
    except Exception as error:
        return Report(failure=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    spec, memory = cell.spec, resources_used()
    step, whole = flops * spec.batch_size * (1 if spec.rho == 0 else 2), flops * work(spec) * spec.ranks
    peak = PEAKS[gpu]["bfloat16" if spec.precision == "bfloat16" else "tf32" if spec.tf32 else "float32"]
    copies = 2 + (2 if spec.base_optimizer == "adamw" else 1) + (2 if spec.rho else 0) + (spec.ema > 0)
    weights, activations = 4.0 * parameters * copies, saved * -(-spec.batch_size // spec.micro_batches)
    return Report(
        parameters=parameters,
        seconds=time.monotonic() - started,
        memory=memory.get("peak_gpu_bytes", memory["peak_memory_bytes"]),
        step_flops=step,
        gpu_memory=(weights + activations / 2, weights + activations),
        run_seconds=(whole / peak / UTILISATION[1], whole / peak / UTILISATION[0]),
    )


def published(spec: Training) -> tuple[float, str] | None:
    """The published parameter count of the spec's model and its source; None for our own small models."""
    if spec.model == "resnet50":
        stem, head = 7 * 7 * 3 * 64 - 3 * 3 * 3 * 64, 2049 * (1000 - _outputs(spec))
        return 25_557_032 - stem - head, "torchvision's, with CIFAR's stem and head"
    known = MODELS.get(spec.model)
    return (known.parameters, known.source) if known and known.parameters else None


def _outputs(spec: Training) -> int:
    """The outputs of the spec's network: one per label, or one for a regression."""
    return image_set(spec.dataset).classes if is_images(spec.dataset) else text_set(spec.dataset).outputs


def _reduced(spec: Training) -> Training:
    """The spec that is trained instead: the same model and method, two small batches."""
    if isinstance(spec, Curvature):
        spec = replace(spec, measured_examples=BATCH, measured_rho=0.01)
    return replace(
        spec,
        seed=0,
        micro_batches=2 if spec.micro_batches > 1 else 1,
        rho=0.01 if spec.rho else 0.0,
        ranks=1,
        batch_size=BATCH,
        train_examples=BATCH * STEPS,
        test_examples=BATCH * STEPS,
        holdout_examples=0,
        label_noise=0.5 if spec.label_noise else 0.0,
        epochs=1,
        warmup_epochs=0.5 if spec.warmup_epochs else 0.0,
        curvature_every=1 if spec.curvature_every else 0,
    )


def _train_and_resume(spec: Training, root: Path) -> int:
    """Train the spec in two sessions with a checkpoint between them; returns the number of parameters."""
    import torch

    from experiments.harness.work.train import train

    if not torch.cuda.is_available():
        spec = replace(spec, device="cpu", tf32=False, deterministic=False, capture=False)
    training = spec.network or spec
    stop = iter([False] * (STEPS - 1) + [True])
    with contextlib.suppress(Interrupted):
        train(training, Session(root, stop=lambda: next(stop)), build=synthetic_task)
    record = record_of(training, root)
    if not record.checkpoint.exists() or record.done:
        raise RecordError("The run did not stop at its checkpoint.")
    train(training, Session(root), build=synthetic_task)
    if [session["first_step"] for session in record.environments()] != [1, STEPS]:
        raise RecordError("The run did not resume from its checkpoint.")
    if isinstance(spec, Curvature):
        _check_hessian(spec, training)
    return int(record.summary()["parameters"])


def _check_hessian(spec: Curvature, training: Training) -> None:
    """Multiply the Hessian with one vector and check that the product is finite."""
    import torch

    from experiments.harness.work.hessian import Hessian

    task = synthetic_task(replace(training, precision="float32", tf32=False))
    task.model.eval()
    batch = task.sample("train", spec.measured_examples)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    hessian = Hessian(partial(task.loss_fn, task.model), parameters, [(batch, spec.measured_examples)], keep=False)
    product = hessian @ [torch.randn_like(p) for p in parameters]
    if not all(part.isfinite().all() for part in product):
        raise RuntimeError("A Hessian-vector product is not finite.")


def synthetic_task(spec: Training, data_root: Path | None = None) -> Any:
    """The spec's task with new weights, on random images or on random tokens of the maximum length."""
    import numpy as np
    import torch

    draws = np.random.default_rng(0)
    count = spec.examples
    if is_images(spec.dataset):
        from experiments.harness.tasks.images import task_of

        images = draws.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels: np.ndarray = draws.integers(0, _outputs(spec), count)
        return task_of(spec, ImageData(images, labels, images, labels, "made up", "none"), loaders=0)
    from experiments.harness.tasks import texts

    model = encoder(spec)
    tokens = torch.from_numpy(draws.integers(5, model.config.vocab_size, (count, spec.max_length)))
    outputs = _outputs(spec)
    labels = draws.integers(0, outputs, count) if outputs > 1 else draws.random(count, dtype=np.float32)
    examples = _Tokens(tokens, labels)
    data = {"data_checksum": "none", "data_source": "made up"}
    return texts.task_of(spec, model, examples, {"test": examples}, data)


def encoder(spec: Training) -> Any:
    """A text model of the spec's architecture with random weights; models of the hub are not downloaded."""
    import transformers

    from experiments.harness.tasks import texts

    configs: dict[str, Callable[..., Any]] = {
        "bert-base-uncased": transformers.BertConfig,
        "roberta-base": partial(
            transformers.RobertaConfig, vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1
        ),
    }
    if spec.model not in configs:
        return texts.encoder(spec, text_set(spec.dataset))[1]
    config = configs[spec.model](num_labels=_outputs(spec))
    return transformers.AutoModelForSequenceClassification.from_config(
        texts.with_dropout(config, spec), attn_implementation=spec.attention
    )


class _Tokens:
    """Random tokens, all of the maximum length, with the interface of `texts._Examples`."""

    def __init__(self, tokens: Any, labels: Any) -> None:
        self.tokens, self.labels = tokens, labels
        self.targets = labels

    def __len__(self) -> int:
        return len(self.labels)

    def by_length(self) -> list[int]:
        return list(range(len(self)))

    def batch(self, chosen: Sequence[int], device: Any) -> dict[str, Any]:
        import torch

        tokens, labels = self.tokens[list(chosen)], torch.from_numpy(self.targets[list(chosen)])
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        return {name: tensor.to(device) for name, tensor in batch.items()}


def costs(spec: Training) -> tuple[float, float]:
    """The cost of one forward and backward pass of one example: FLOP, and bytes of saved activations in float32.

    Counted on torch's meta device, without any computation.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    if is_images(spec.dataset):
        from experiments.harness.tasks.image_models import build

        model = build(spec.model, _outputs(spec), spec.image_size).to("meta")
        inputs: Any = (torch.empty(2, 3, spec.image_size, spec.image_size, device="meta"),)
    else:
        model = encoder(spec).to("meta")
        inputs = (torch.zeros(2, spec.max_length, dtype=torch.long, device="meta"),)
    weights, kept = {storage_of(p) for p in model.parameters()}, {}

    def keep(tensor: Any) -> Any:
        if storage_of(tensor) not in weights:
            kept[storage_of(tensor)] = tensor  # kept alive, so that no other tensor reuses its storage's address
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(*inputs)
            loss = getattr(outputs, "logits", outputs).float().square().mean()
        loss.backward()
    return counter.get_total_flops() / 2, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2


def storage_of(tensor: Any) -> int:
    """Identifies a tensor's storage, including on the meta device, where tensors have no address."""
    return tensor.untyped_storage()._cdata


def line(spec: Run, report: Report) -> str:
    """The outcome of a check in one line."""
    cell = f"{spec.model} {spec.dataset} {spec.method}{' curvature' if spec.network else ''}"
    if report.failure:
        return f"{cell}: FAILED: {report.failure}"
    shortest, longest = (duration(seconds) for seconds in report.run_seconds)
    low, high = (bytes_ / 1e9 for bytes_ in report.gpu_memory)
    return (
        f"{cell}: {report.parameters / 1e6:.1f} M parameters, passed in {report.seconds:.0f} s with "
        f"{report.memory / 1e9:.1f} GB here; on the GPU {report.step_flops / 1e12:.3g} TFLOP per step of "
        f"{spec.batch_size}, {shortest} to {longest} per run, {low:.1f} to {high:.1f} GB"
    )
