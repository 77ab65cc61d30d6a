"""How much of a perturbation is left when products round the weights to fewer bits, as GPUs do for speed.

    python -m benchmarks.precision [--save]

Before a product, autocast to bfloat16 rounds each weight to 8 significant bits; TensorFloat-32 and float16 round to 11.
Perturbed and unperturbed weights are both rounded, and a perturbation of length rho over millions of weights is much
smaller than their last bit. So most weights do not move, and some move by a whole bit. The rounding is emulated on the
CPU, only for weights: matrices and kernels are rounded, everything else is float32. It takes seconds per model; the
batch is small.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from experiments import bert_glue, resnet_cifar, vit_cifar, wrn_cifar
from experiments.harness.runs.spec import Training
from experiments.harness.tasks.build import build_task

SIZES = {"test_examples": 4, "device": "cpu", "precision": "float32", "tf32": False, "label_smoothing": 0.0}
SPECS = {
    "ResNet-50, new": replace(resnet_cifar.PAPER, train_examples=16, batch_size=16, **SIZES),
    "WRN-28-10, new": replace(wrn_cifar.PAPER, train_examples=8, batch_size=8, **SIZES),
    "ViT, new": replace(vit_cifar.PAPER, train_examples=16, batch_size=16, **SIZES),
    "MiniLM, pretrained": replace(bert_glue.SETS["snippets"], train_examples=64, batch_size=64, test_examples=4),
}
RHOS = {
    "ResNet-50, new": (0.05, 0.2),
    "WRN-28-10, new": (0.05, 0.1),
    "ViT, new": (0.05, 0.2),
    "MiniLM, pretrained": (1e-3, 1e-2),
}
KEPT_BITS = {"bfloat16": 8, "TF32, float16": 11, "float32": 24}


def main() -> None:
    """Print the table and, with --save, write it to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/precision.md")
    arguments = parser.parse_args()
    rows = [row for name, spec in SPECS.items() for rho in RHOS[name] for row in left_of(name, spec, rho)]
    head = (
        "model",
        "rho",
        "weights rounded to",
        "length / rho",
        "cosine",
        "share that moved",
        "rise / that of float32",
    )
    table = tabulate(rows, headers=head, tablefmt="github", floatfmt=("", "g", "", ".2f", ".2f", ".2f", ".2f"))
    text = f"# `python -m benchmarks.precision --save`\n\n{table}\n"
    print(text)
    if arguments.save:
        (Path(__file__).parent / "results" / "precision.md").write_text(text)


def left_of(name: str, spec: Training, rho: float) -> list[tuple[str | float, ...]]:
    """For each format, length, direction and loss rise of the rounded perturbation, relative to the exact one."""
    torch.manual_seed(0)
    task = build_task(spec)
    task.model.eval() if name.startswith("MiniLM") else task.model.train()  # no dropout; BatchNorm in train mode
    batch, parameters = task.sample("train", spec.batch_size), list(task.model.parameters())
    loss = task.loss_fn(task.model, batch)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    length = torch.nn.utils.get_total_norm(gradients)
    weights = [p.detach().clone() for p in parameters]
    perturbation = [rho * g / length for g in gradients]

    def rise(to: Callable[[Tensor], Tensor]) -> float:
        losses = [
            _loss(task, batch, parameters, [to(w + s * e) for w, e in zip(weights, perturbation, strict=True)])
            for s in (0, 1)
        ]
        return losses[1] - losses[0]

    rows, exact = [], rise(lambda weight: weight)
    for words, bits in KEPT_BITS.items():
        to = partial(rounded, bits=bits)
        left = [to(w + e) - to(w) for w, e in zip(weights, perturbation, strict=True)]
        norm = torch.nn.utils.get_total_norm(left).item()
        cosine = sum((a * b).sum().item() for a, b in zip(left, perturbation, strict=True)) / norm / rho
        matrices = [e for e in left if e.ndim > 1]
        moved = sum(e.count_nonzero().item() for e in matrices) / sum(e.numel() for e in matrices)
        rows.append((name, rho, words, norm / rho, cosine, moved, rise(to) / exact))
    return rows


@torch.no_grad()
def _loss(task: object, batch: object, parameters: list[Tensor], values: list[Tensor]) -> float:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
    return task.loss_fn(task.model, batch).item()


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round a float32 matrix or kernel to `bits` significant bits, half up; vectors are unchanged."""
    if weight.ndim < 2 or bits == 24:
        return weight
    dropped = 24 - bits
    return (weight.view(torch.int32) + (1 << dropped - 1) & ~((1 << dropped) - 1)).view(torch.float32)


if __name__ == "__main__":
    main()
