"""Proof, before a GPU night, that a target's cells can be built, trained, stopped, resumed and scored at full size.

Models are whole; inputs are made up (what `fetch` gets is not checked here), batches small, m is 2 at most, and the
training loop is the one that the runs will go through, on whatever device is there. Cells that differ in nothing that a
check could see (learning rate, rho, epochs, data of as many labels) are checked once.
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
from experiments.harness.runs.provenance import used
from experiments.harness.runs.record import record_of
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
"""Of the peak that trainings of this size reach, a guess: less with narrow convolutions, more with encoders."""


@dataclass(frozen=True)
class Cell:
    """A cell to check: the spec that stands for it, and the one that is trained in its place."""

    spec: Training
    reduced: Training


@dataclass(frozen=True)
class Report:
    """What a check found. Of an estimate there is the lower and the upper end; none of them was measured."""

    failure: str | None = None
    parameters: int = 0
    seconds: float = 0.0
    """That the check took."""
    memory: int = 0
    """Peak of bytes, resident here or allocated on the GPU that is here."""
    step_flops: float = 0.0
    """Of a training step at the spec's own batch size."""
    gpu_memory: tuple[float, float] = (0.0, 0.0)
    """Bytes at the spec's own batch size and m, with activations of half precision and of single precision."""
    run_seconds: tuple[float, float] = (0.0, 0.0)
    """Of the whole run on the named GPU."""


def distinct(specs: Iterable[Run]) -> list[Cell]:
    """The cells that a check can distinguish, in order."""
    cells: dict[Any, Cell] = {}
    for spec in specs:
        trainings = timed_steps(spec) if isinstance(spec, Timing) else [spec]
        for one in trainings:
            if not isinstance(one, Training):
                continue  # a simulation: solved on the CPU, in full, by its own run
            reduced = _reduced(one)
            key = replace(reduced, learning_rate=1.0, weight_decay=float(reduced.weight_decay > 0))
            blind = {**key.to_dict(), "dataset": _outputs(key)}
            cells.setdefault(tuple(blind.items()), Cell(one, reduced))
    return list(cells.values())


def prove(cells: Sequence[Cell], jobs: int, gpu: str) -> Iterator[tuple[Cell, Report]]:
    """Check the cells, `jobs` at a time and each in its own process, in order.

    Raises:
        SpecError: for an unknown GPU.
    """
    if gpu not in PEAKS:
        raise SpecError(f"The peak of {gpu!r} is not known: name one of {', '.join(PEAKS)}.")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.harness.machine.worker"])

    def apart(cell: Cell) -> Report:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            try:
                return process.submit(prove_one, cell, gpu).result()
            except Exception as error:  # the process was killed, possibly out of memory
                return Report(failure=f"{type(error).__name__}: {error}")

    with ThreadPoolExecutor(jobs) as threads:
        yield from zip(cells, threads.map(apart, cells), strict=True)


def prove_one(cell: Cell, gpu: str) -> Report:
    """Build, train, stop, resume and score one cell; for a curvature run, multiply once with the Hessian."""
    begun = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="msam-check-") as folder:
            parameters = _carried_out(cell.reduced, Path(folder))
        wanted = published(cell.spec)
        if wanted and abs(parameters - wanted[0]) > 0.005 * wanted[0]:
            raise RuntimeError(f"{parameters} parameters, but {wanted[0]:.0f} were published ({wanted[1]})")
        flops, saved = costs(cell.spec)
    except Exception as error:
        return Report(failure=f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    spec, memory = cell.spec, used()
    step, whole = flops * spec.batch_size * (1 if spec.rho == 0 else 2), flops * work(spec) * spec.ranks
    peak = PEAKS[gpu]["bfloat16" if spec.precision == "bfloat16" else "tf32" if spec.tf32 else "float32"]
    copies = 2 + (2 if spec.base_optimizer == "adamw" else 1) + (2 if spec.rho else 0) + (spec.ema > 0)
    weights, activations = 4.0 * parameters * copies, saved * -(-spec.batch_size // spec.micro_batches)
    return Report(
        parameters=parameters,
        seconds=time.monotonic() - begun,
        memory=memory.get("peak_gpu_bytes", memory["peak_memory_bytes"]),
        step_flops=step,
        gpu_memory=(weights + activations / 2, weights + activations),
        run_seconds=(whole / peak / UTILISATION[1], whole / peak / UTILISATION[0]),
    )


def published(spec: Training) -> tuple[float, str] | None:
    """How many parameters the spec's model has by its source, and that; None for our own small ones."""
    if spec.model == "resnet50":
        stem, head = 7 * 7 * 3 * 64 - 3 * 3 * 3 * 64, 2049 * (1000 - _outputs(spec))
        return 25_557_032 - stem - head, "torchvision's, with CIFAR's stem and head"
    known = MODELS.get(spec.model)
    return (known.parameters, known.source) if known and known.parameters else None


def _outputs(spec: Training) -> int:
    """Of the spec's network: one for each label, and one for a regression."""
    return image_set(spec.dataset).classes if is_images(spec.dataset) else text_set(spec.dataset).outputs


def _reduced(spec: Training) -> Training:
    """What is trained in a spec's place: the same model and method, two small batches."""
    several = spec.micro_batches > 1
    if isinstance(spec, Curvature):
        spec = replace(spec, measured_examples=BATCH, measured_rho=0.01)
    return replace(
        spec,
        seed=0,
        micro_batches=2 if several else 1,
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


def _carried_out(spec: Training, root: Path) -> int:
    """Train the spec in two goes, with a checkpoint between them; returns the number of parameters."""
    import torch

    from experiments.harness.work.train import train

    if not torch.cuda.is_available():
        spec = replace(spec, device="cpu", tf32=False, deterministic=False)
    training = spec.network or spec
    asked = iter([False] * (STEPS - 1) + [True])
    with contextlib.suppress(Interrupted):
        train(training, Session(root, stop=lambda: next(asked)), build=made_up)
    record = record_of(training, root)
    if not record.checkpoint.exists() or record.done:
        raise RecordError("The run did not stop for its checkpoint.")
    train(training, Session(root), build=made_up)
    if [session["first_step"] for session in record.environments()] != [1, STEPS]:
        raise RecordError("The run did not go on from its checkpoint.")
    if isinstance(spec, Curvature):
        _multiplied(spec, training)
    return int(record.summary()["parameters"])


def _multiplied(spec: Curvature, training: Training) -> None:
    """One product with the Hessian."""
    import torch

    from experiments.harness.work.hessian import Hessian

    task = made_up(replace(training, precision="float32", tf32=False))
    task.model.eval()
    batch = task.sample("train", spec.measured_examples)
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    hessian = Hessian(partial(task.loss_fn, task.model), parameters, [(batch, spec.measured_examples)], keep=False)
    product = hessian @ [torch.randn_like(p) for p in parameters]
    if not all(part.isfinite().all() for part in product):
        raise RuntimeError("A product with the Hessian is not finite.")


def made_up(spec: Training, data_root: Path | None = None) -> Any:
    """The spec's task with new weights, on random pixels or random tokens of the greatest length."""
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
    """A text model of the spec's architecture with random weights; nothing is fetched for those of the hub."""
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
    """Made-up texts, all of the greatest length, with the face of `glue._Examples`."""

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
    """Of one forward and backward pass of one example: FLOP, and bytes kept in between if all are float32.

    Counted on torch's meta device, without computing anything.
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
            kept[storage_of(tensor)] = tensor  # alive, so that no other one takes its storage's address
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = model(*inputs)
            loss = getattr(outputs, "logits", outputs).float().square().mean()
        loss.backward()
    return counter.get_total_flops() / 2, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2


def storage_of(tensor: Any) -> int:
    """Identifies a tensor's memory, on the meta device too, where no tensor has an address."""
    return tensor.untyped_storage()._cdata
