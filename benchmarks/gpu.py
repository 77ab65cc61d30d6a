"""The cost of a training step on a GPU: eager and captured, and each way of running micro-batches.

    make bench DEVICE=cuda                                        # everything
    python -m benchmarks.gpu --models bert --rounds 5             # a part
    python -m benchmarks.gpu --device cpu --models bert --rounds 1 # shows that it runs; eager steps only

Every contender takes full training steps (SGD with momentum, fused) on its own copy of one model and on the same batch,
in one process. Each round runs every contender in a new order; a contender's time is that of `STEPS` steps between two
synchronisations. The tables show medians over the rounds of milliseconds, of ratios within a round with their 95 %
interval, and peak memory. The contenders, each eager and captured as one CUDA graph:

    plain            the base optimizer
    floor m          forward and backward passes of mSAM with m micro-batches, without any perturbation
    two-step         SAM as an optimizer of two steps, as of benchmarks.backward
    loop m, vectorized m, streams m, auto m   `msam.backward` with `passes`; loop m=1 is SAM

It needs torch, torchvision, timm, transformers and numpy, and no network: models have random weights.
"""

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch

import msam
from benchmarks import backward
from benchmarks.backward import RHO, Workload
from benchmarks.device import facts
from experiments.harness.work.timing import median_interval

STEPS = 5
"""Steps that are timed together."""

MODELS: dict[str, tuple[Callable[[int], Workload], int]] = {
    "resnet18-128": (backward.resnet18, 128),
    "resnet18-512": (backward.resnet18, 512),
    "vit-128": (backward.vit, 128),
    "bert": (backward.bert, 32),
    "bert-base": (backward.bert_base, 32),
}
"""Builder and batch size."""

BARS = {"vit-128": 1.35, "bert-base": 1.30, "bert": 1.35, "resnet18-128": 1.8, "resnet18-512": 1.35}
"""Captured m=8 over captured SAM, at most, for the fastest way."""

PRECISIONS = ("tf32", "bf16")


def on(device: torch.device, work: Workload, precision: str) -> Workload:
    """The workload on a device, in a precision."""
    model = work.model.to(device)
    batch = {k: v.to(device) for k, v in work.batch.items()} if isinstance(work.batch, dict) else None
    batch = batch or tuple(t.to(device) for t in work.batch)

    def loss_fn(part: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
            return work.loss_of(model, part)

    return Workload(model, batch, loss_fn, work.loss_of)


def optimizer_of(work: Workload) -> torch.optim.Optimizer:
    return torch.optim.SGD(work.model.parameters(), lr=1e-4, momentum=0.9, fused=True)


def twin(work: Workload, precision: str) -> Workload:
    """The same with a model of its own."""
    fresh = Workload(copy.deepcopy(work.model), work.batch, work.loss_fn, work.loss_of)
    return on(next(work.model.parameters()).device, fresh, precision)


def contenders(
    work: Workload, precision: str, sizes: list[int], graphs: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Steps by name. What cannot be done raises as it is made."""
    plain = twin(work, precision)
    yield "plain", partial(backward.plain, plain, optimizer_of(plain))
    for m in [1, *sizes]:
        bare = twin(work, precision)
        yield f"floor m={m}", partial(backward.floor, bare, optimizer_of(bare), m)
    peer = twin(work, precision)
    yield (
        "two-step m=1",
        partial(backward.peer_sam, peer, backward.TwoStepSAM(list(peer.model.parameters()), optimizer_of(peer))),
    )
    for eager in (True, False) if graphs else (True,):
        for m, passes in [(1, "loop"), *((m, way) for m in sizes for way in ("loop", "vectorized", "streams", "auto"))]:
            yield (
                f"{passes} m={m}{'' if eager else ', captured'}",
                partial(_captured, work, precision, m, passes, eager),
            )


def _captured(work: Workload, precision: str, m: int, passes: str, eager: bool) -> Callable[[], Any]:
    own = twin(work, precision)
    options = {"rho": RHO, "micro_batches": m, "passes": passes}
    step = msam.capture(own.loss_fn, own.batch, own.model, optimizer_of(own), eager=eager, **options)
    return partial(step, own.batch)


def prepared(steps: Iterator[tuple[str, Callable[[], Any]]], device: torch.device) -> dict[str, Callable[[], Any]]:
    """The steps that can be taken; a line on stderr for each that cannot."""
    ready = {}
    for name, make in steps:
        try:
            step = make() if make.func is _captured else make  # type: ignore[attr-defined]
            for _ in range(2):
                step()
            _wait(device)
            ready[name] = step
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            print(f"{name}: not run: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    return ready


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Milliseconds of a step, in each round."""
    times = []
    for number in range(rounds):
        order = list(steps)
        random.Random(number).shuffle(order)
        seconds = {}
        for name in order:
            _wait(device)
            started = time.perf_counter()
            for _ in range(STEPS):
                steps[name]()
            _wait(device)
            seconds[name] = 1000 * (time.perf_counter() - started) / STEPS
        times.append({name: seconds[name] for name in steps})
    return times


def peak(step: Callable[[], Any], device: torch.device) -> str:
    """Peak memory of a step in MiB, what lies on the device besides included."""
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _wait(device)
    return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f}"


def lines_of(name: str, precision: str, times: list[dict[str, float]], memory: dict[str, str]) -> Iterator[str]:
    """Rows: contender, milliseconds, over SAM of its kind (eager or captured), over the floor, memory."""
    for step in times[0]:
        captured = step.endswith(", captured")
        sam = "loop m=1, captured" if captured else "loop m=1"
        floor = "floor " + step.removesuffix(", captured").rpartition(" ")[2]
        over = {below: _ratio(times, step, below) for below in (sam, floor, "two-step m=1") if below in times[0]}
        cells = [over.get(sam, ""), over.get(floor, "") if not captured else "", over.get("two-step m=1", "")]
        milliseconds = median(seconds[step] for seconds in times)
        yield f"| {name} | {precision} | {step} | {milliseconds:.1f} | {' | '.join(cells)} | {memory[step]} |"


def _ratio(times: list[dict[str, float]], above: str, below: str) -> str:
    found = median_interval("r", [seconds[above] / seconds[below] for seconds in times])
    return f"{found['r']:.2f} ({found['r_low']:.2f} to {found['r_high']:.2f})"


def verdict(name: str, times: list[dict[str, float]]) -> str:
    """The bar of a model: the fastest captured way at m=8 over captured SAM."""
    sam = "loop m=1, captured"
    ways = [step for step in times[0] if step.endswith("m=8, captured")]
    if sam not in times[0] or not ways:
        return f"{name}: not run: no captured steps at m=8"
    best = min(ways, key=lambda step: median(seconds[step] for seconds in times))
    ratio = median(seconds[best] / seconds[sam] for seconds in times)
    met = "yes" if ratio <= BARS[name] else "no"
    return f"{name}: {best} takes {ratio:.2f} of SAM's time; at most {BARS[name]:.2f}: {met}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("not run on a GPU: torch finds none here. --device cpu shows that the benchmark runs.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for fact in facts():
        print(*fact, sep=": ")
    print("\n| model | precision | step | ms | over SAM | over the floor | over two-step | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    verdicts = []
    for name in arguments.models:
        build, size = MODELS[name]
        for precision in arguments.precisions:
            torch.manual_seed(0)
            work = on(device, build(size), precision)
            work.model.train()
            steps = prepared(contenders(work, precision, arguments.sizes, device.type == "cuda"), device)
            times = measure(steps, arguments.rounds, device)
            memory = {step: peak(steps[step], device) for step in steps}
            print("\n".join(lines_of(name, precision, times, memory)), flush=True)
            verdicts.append(f"{precision}: {verdict(name, times)}")
    print("\n" + "\n".join(verdicts))


if __name__ == "__main__":
    main()
