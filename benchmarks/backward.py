"""The cost of a training step with `msam.backward`, against other implementations and against the bare passes.

    make bench                                                     # everything, about half an hour on two cores
    python -m benchmarks.backward --models bert --rounds 3         # a part

Every contender takes full training steps of SGD on the same model, batch and micro-batches, in one process with a fixed
number of threads. Each round runs every contender once, in a new order. The table shows the median over the rounds of
the ratio of two contenders' times within a round, with its 95 % interval, and the ratio of their shortest times, which
other load affects least. The targets ("bars") are for the median; if its interval contains the bar, the result is
undecided. The allocator keeps its memory, as in the suite's training. Otherwise the system's zeroing of fresh pages
would dominate: it takes more time than any contender's bookkeeping. The contenders:

    floor m   the forward and backward passes of mSAM with m micro-batches, without any perturbation
    msam m    msam.backward
    vectorized m  the same with vectorized=True
    two-step  SAM as a two-step optimizer, after the loop of davda54/sam, written for this benchmark
    pytorch_optimizer  the SAM of this PyPI package
    ... m     a loop over m micro-batches around either

Memory is torch's peak allocation in a step that starts without gradients, in copies of the parameters. The last table
is torch's profile of the bare passes: the operators that take longer with m micro-batches.
"""

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import msam
from experiments.harness.runs.process import ALLOCATOR
from experiments.harness.runs.provenance import cpu
from experiments.harness.work.timing import median_interval, peak_bytes

RHO = 0.05
LEARNING_RATE = 1e-4
RESULTS = Path(__file__).parent / "results"


@dataclass
class Workload:
    """A model, a batch, and a loss function for parts of the batch."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any], Tensor]
    loss_of: Callable[[nn.Module, Any], Tensor]
    """The same for any model."""


def of_images(model: nn.Module, batch: Any) -> Tensor:
    """The loss of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def of_tokens(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model of transformers."""
    return model(**batch).loss


def resnet18(batch: int) -> Workload:
    """torchvision's ResNet-18 with CIFAR's stem, 11.2 million parameters."""
    from torchvision.models import resnet18 as build

    model = build(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)
    return Workload(model, (images, torch.randint(0, 10, (batch,))), partial(of_images, model), of_images)


def vit(batch: int) -> Workload:
    """ViT-Tiny over patches of 4 of 32 x 32 images, 5.4 million parameters."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3, num_classes=10)
    data = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    return Workload(model, data, partial(of_images, model), of_images)


def bert(batch: int) -> Workload:
    """BERT of 6 layers and width 384 over 64 tokens, 22.7 million parameters, half of them word embeddings."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config)
    data = {"input_ids": torch.randint(0, config.vocab_size, (batch, 64)), "labels": torch.randint(0, 2, (batch,))}
    return Workload(model, data, partial(of_tokens, model), of_tokens)


def bert_base(batch: int) -> Workload:
    """BERT-base over 128 tokens, 109 million parameters."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig()
    model = BertForSequenceClassification(config)
    data = {"input_ids": torch.randint(0, config.vocab_size, (batch, 128)), "labels": torch.randint(0, 2, (batch,))}
    return Workload(model, data, partial(of_tokens, model), of_tokens)


WORKLOADS: dict[str, tuple[Callable[[int], Workload], int, Sequence[int]]] = {
    "resnet18": (resnet18, 64, (4, 16)),
    "vit": (vit, 64, (4, 16)),
    "bert": (bert, 32, (4, 16)),
    "resnet18-128": (resnet18, 128, (16,)),
}
"""Builder, batch size, and the numbers of micro-batches to measure in addition to 1."""


class TwoStepSAM:
    """SAM as a two-step optimizer: per-tensor norms, a copy of each weight, replacement of the weight's data."""

    def __init__(self, params: list[Tensor], base: torch.optim.Optimizer) -> None:
        self.params, self.base, self.old = params, base, {}

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm(p=2) for p in self.params if p.grad is not None]).norm(p=2)
        scale = RHO / (norm + 1e-12)
        for p in self.params:
            if p.grad is not None:
                self.old[p] = p.data.clone()
                p.add_(p.grad * scale)

    @torch.no_grad()
    def restore(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.data = self.old[p]


class PackagedSAM:
    """pytorch_optimizer's SAM; weights are restored as in its second step, without the base optimizer's step."""

    def __init__(self, params: list[Tensor], base: torch.optim.Optimizer) -> None:
        from pytorch_optimizer import SAM

        self.params = params
        self.sam = SAM(params, torch.optim.SGD, rho=RHO, lr=LEARNING_RATE)
        self.base = base

    def first_step(self) -> None:
        self.sam.first_step(zero_grad=False)

    @torch.no_grad()
    def restore(self) -> None:
        for p in self.params:
            if "old_p" in self.sam.state[p]:
                p.copy_(self.sam.state[p].pop("old_p"))


def plain(work: Workload, optimizer: torch.optim.Optimizer) -> None:
    """A step of the base optimizer alone."""
    optimizer.zero_grad()
    work.loss_fn(work.batch).backward()
    optimizer.step()


def floor(work: Workload, optimizer: torch.optim.Optimizer, m: int) -> None:
    """The passes of mSAM: for each micro-batch, one gradient that is discarded and one that is accumulated."""
    optimizer.zero_grad()
    params = list(work.model.parameters())
    for part in msam.split(work.batch, m):
        torch.autograd.grad(work.loss_fn(part), params, allow_unused=True)
        (work.loss_fn(part) / m).backward()
    optimizer.step()


def ours(work: Workload, optimizer: torch.optim.Optimizer, m: int, vectorized: bool = False) -> None:
    """msam.backward."""
    optimizer.zero_grad()
    msam.backward(work.loss_fn, work.batch, work.model, rho=RHO, micro_batches=m, vectorized=vectorized)
    optimizer.step()


def peer_sam(work: Workload, peer: TwoStepSAM | PackagedSAM) -> None:
    """A peer's SAM as in its README: two backward passes and two steps."""
    work.loss_fn(work.batch).backward()
    peer.first_step()
    peer.base.zero_grad()
    work.loss_fn(work.batch).backward()
    peer.restore()
    peer.base.step()
    peer.base.zero_grad()


def peer_loop(work: Workload, peer: TwoStepSAM | PackagedSAM, m: int) -> None:
    """m-SAM as a plain loop around a peer."""
    total: dict[Tensor, Tensor] = {}
    for part in msam.split(work.batch, m):
        work.loss_fn(part).backward()
        peer.first_step()
        peer.base.zero_grad()
        (work.loss_fn(part) / m).backward()
        peer.restore()
        for p in peer.params:
            if p.grad is not None:
                total[p] = total[p].add_(p.grad) if p in total else p.grad
        peer.base.zero_grad()
    for p, g in total.items():
        p.grad = g
    peer.base.step()
    peer.base.zero_grad()


def contenders(work: Workload, sizes: Sequence[int]) -> dict[str, Callable[[], None]]:
    """The steps to measure, by name."""
    params = list(work.model.parameters())
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE)
    peers = {
        "two-step": TwoStepSAM(params, optimizer),
        "pytorch_optimizer": PackagedSAM(params, optimizer),
    }
    steps = {"plain": lambda: plain(work, optimizer)}
    for m in (1, *sizes):
        steps[f"floor m={m}"] = lambda m=m: floor(work, optimizer, m)
        steps[f"msam m={m}"] = lambda m=m: ours(work, optimizer, m)
        if m > 1:
            steps[f"vectorized m={m}"] = lambda m=m: ours(work, optimizer, m, vectorized=True)
        for name, peer in peers.items():
            if m == 1:
                steps[f"{name} m=1"] = lambda peer=peer: peer_sam(work, peer)
            else:
                steps[f"{name} m={m}"] = lambda peer=peer, m=m: peer_loop(work, peer, m)
    return steps


def measure(steps: dict[str, Callable[[], None]], rounds: int, label: str) -> list[dict[str, float]]:
    """Seconds of each step in each round, without the first round."""
    times = []
    for number in range(rounds + 1):
        order = list(steps)
        random.Random(number).shuffle(order)
        seconds = {}
        for name in order:
            started = time.perf_counter()
            steps[name]()
            seconds[name] = time.perf_counter() - started
        if number:
            times.append(seconds)
        print(f"{label}: round {number} of {rounds} took {sum(seconds.values()):.0f} s", file=sys.stderr, flush=True)
    return times


def ratio(rounds: list[dict[str, float]], above: str, below: str) -> dict[str, float]:
    """The median of the ratios within a round, its interval, and the ratio of the shortest times over all rounds."""
    interval = median_interval("median", [seconds[above] / seconds[below] for seconds in rounds])
    return {**interval, "least": least(rounds, above) / least(rounds, below)}


def least(rounds: list[dict[str, float]], name: str) -> float:
    """The shortest time of a contender over the rounds."""
    return min(seconds[name] for seconds in rounds)


def fastest(rounds: list[dict[str, float]], m: int) -> str:
    """The peer that is faster than the other in most rounds."""
    names = f"two-step m={m}", f"pytorch_optimizer m={m}"
    return names[ratio(rounds, *names)["median"] > 1]


def rows(name: str, rounds: list[dict[str, float]], sizes: Sequence[int]) -> list[tuple[str, dict, float | None]]:
    """The rows of a workload: a description, a ratio, and its bar, if it has one."""
    text, peer = name == "bert", fastest(rounds, 1)
    table = [
        (f"m=1 over the fastest peer's SAM ({peer})", ratio(rounds, "msam m=1", peer), 1.0),
        ("the floor at m=1 over that SAM", ratio(rounds, "floor m=1", peer), None),
        ("m=1 over the floor", ratio(rounds, "msam m=1", "floor m=1"), 1.05),
        ("SAM (m=1) over the base optimizer", ratio(rounds, "msam m=1", "plain"), None),
    ]
    for m in sizes:
        peer, own = fastest(rounds, m), ratio(rounds, f"floor m={m}", "floor m=1")["median"]
        over_floor = {4: 1.08 if text else 1.03}.get(m)
        over_sam = {(name, 4): 1.03 * own, ("bert", 16): 1.40, ("resnet18-128", 16): 1.15}.get((name, m))
        table += [(f"the floor at m={m} over that loop", ratio(rounds, f"floor m={m}", peer), None)]
        for ours in ("msam", "vectorized"):
            mine = f"{ours} m={m}"
            table += [
                (f"{mine} over the fastest peer's loop ({peer})", ratio(rounds, mine, peer), 0.9 if text else 1.0),
                (f"{mine} over the floor", ratio(rounds, mine, f"floor m={m}"), over_floor),
                (f"{mine} over SAM (the floor's own: {own:.2f})", ratio(rounds, mine, "msam m=1"), over_sam),
            ]
    return table


def profiled(step: Callable[[], None]) -> Counter[str]:
    """Seconds that one step spends in each of torch's operators itself, excluding the operators that it calls."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return Counter({event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()})


def slowest_operators(name: str, steps: dict[str, Callable[[], None]], m: int, count: int = 5) -> list[str]:
    """Lines for the total, and for the operators whose time grows most in the floor from m = 1 to this m."""
    one, many = profiled(steps["floor m=1"]), profiled(steps[f"floor m={m}"])
    longest = sorted(many, key=lambda key: one[key] - many[key])[:count]
    times = [("all", one.total(), many.total()), *((key, one[key], many[key]) for key in longest)]
    return [f"| {name} | {key} | {few:.2f} | m={m}: {more:.2f} |" for key, few, more in times]


def _verdict(measured: dict[str, float], bar: float) -> str:
    """Whether a median meets its bar, with a note if the bar is within its interval."""
    met = "yes" if measured["median"] <= bar else "no"
    return f"{met}, within its interval" if measured["median_low"] <= bar < measured["median_high"] else met


def main() -> None:
    if ALLOCATOR.items() - os.environ.items():  # the allocator reads them when the process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.backward", *sys.argv[1:]], os.environ | ALLOCATOR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write the tables to benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lines = [
        f"{cpu()} ({torch.backends.cpu.get_cpu_capability()}), {arguments.threads} threads, "
        f"torch {torch.__version__}, {arguments.rounds} rounds; "
        "median of the ratios within a round (95 % interval of the median), and ratio of the least times.",
        "",
        "| model | ratio | median | of the least | bar | met |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    memory = ["", "| model | step | memory, in copies of the parameters | above plain |", "| --- | --- | --- | --- |"]
    peaks: dict[str, float] = {}
    seconds = ["", "| model | seconds a step, the least |", "| --- | --- |"]
    operators = ["", "| model | operator, in the floor | seconds at m=1 | at m |", "| --- | --- | --- | --- |"]
    for name in arguments.models:
        build, batch, sizes = WORKLOADS[name]
        torch.manual_seed(0)
        work = build(batch)
        work.model.train()
        steps = contenders(work, sizes)
        measured = measure(steps, arguments.rounds, name)
        for words, value, bar in rows(name, measured, sizes):
            verdict = "" if bar is None else _verdict(value, bar)
            shown = "" if bar is None else f"<= {bar:.2f}"
            median = f"{value['median']:.3f} ({value['median_low']:.3f} to {value['median_high']:.3f})"
            lines.append(f"| {name} | {words} | {median} | {value['least']:.3f} | {shown} | {verdict} |")
        shortest = ", ".join(f"{step} {least(measured, step):.2f}" for step in steps)
        seconds.append(f"| {name} | {shortest} |")
        copies = sum(p.numel() * p.element_size() for p in work.model.parameters())
        for m in sizes:
            operators += slowest_operators(name, steps, m)
        for step in ("plain", *(step for step in steps if step.startswith(("msam", "vectorized")))):
            work.model.zero_grad()  # otherwise a step frees gradients of the step before it and seems to need less
            peaks[step] = peak_bytes(steps[step]) / copies
            memory.append(f"| {name} | {step} | {peaks[step]:.2f} | {peaks[step] - peaks['plain']:+.2f} |")
    text = "\n".join([*lines, *memory, *seconds, *operators])
    print(text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "backward.md").write_text(f"# `python -m benchmarks.backward {' '.join(sys.argv[1:])}`\n\n{text}\n")


if __name__ == "__main__":
    main()
