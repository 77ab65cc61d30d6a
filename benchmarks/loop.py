"""The overhead of the suite's training loop (loader, tokens, records, progress) over a bare loop, per step.

    python -m benchmarks.loop --rounds 5

Both train the same model on the same batches in the same order with one thread, one after the other in each round. The
bare loop has its batches prepared in advance and does only zero_grad, msam.backward, clipping and the optimizer step.
The table shows the median over the rounds of the ratio of their times per step, with the smallest and the largest
ratio. The bar is 1.03.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import msam
from experiments import bert_glue, resnet_cifar
from experiments.harness.runs.provenance import cpu
from experiments.harness.runs.record import record_of
from experiments.harness.runs.spec import Training
from experiments.harness.tasks.build import build_task
from experiments.harness.work.session import Session
from experiments.harness.work.train import build_optimizer, schedule, train

RUNS = {
    "MiniLM on movie snippets": replace(bert_glue.CPU, train_examples=320, test_examples=16, epochs=1),
    "ResNet-8 on CIFAR-10": replace(resnet_cifar.CPU, test_examples=250, epochs=2),
}
METHODS = {"base": {}, "mSAM, m=4": {"rho": 0.01, "micro_batches": 4}}


def suite(spec: Training) -> float:
    """Seconds of a step, from the suite's record."""
    with tempfile.TemporaryDirectory() as folder:
        train(spec, Session(Path(folder)))
        return record_of(spec, Path(folder)).summary()["step_seconds"]


def bare(spec: Training) -> float:
    """Seconds of a step in a hand-written loop."""
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    task = build_task(spec)
    batches = [batch for epoch in range(spec.epochs) for batch in task.batches(epoch, 0)]
    optimizer = build_optimizer(spec, task.model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(spec, task.steps_per_epoch))
    loss_fn = partial(task.loss_fn, task.model)
    task.model.train()
    started = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad()
        msam.backward(loss_fn, batch, task.model, rho=spec.rho, micro_batches=spec.micro_batches)
        if spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), spec.clip_norm)
        optimizer.step()
        scheduler.step()
    return (time.perf_counter() - started) / len(batches)


def ratio(spec: Training, first: Callable[[Training], float]) -> float:
    """One round with both loops; rounds alternate which is first, so that drift of the machine favours neither."""
    second = bare if first is suite else suite
    seconds = {first: first(spec), second: second(spec)}
    return seconds[suite] / seconds[bare]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{cpu()} ({torch.backends.cpu.get_cpu_capability()}), 1 thread, {rounds} rounds\n")
    print("| run | step in the suite over a bare one | bar | met |\n| --- | --- | --- | --- |")
    for name, spec in RUNS.items():
        for method, changes in METHODS.items():
            run = replace(spec, **changes)
            suite(run), bare(run)  # warm up files and kernels
            ratios = sorted(ratio(run, first=(suite, bare)[number % 2]) for number in range(rounds))
            median = statistics.median(ratios)
            shown = f"{median:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            print(f"| {name}, {method} | {shown} | <= 1.03 | {'yes' if median <= 1.03 else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
