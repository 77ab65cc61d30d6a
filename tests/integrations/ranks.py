"""Recipes under DistributedDataParallel, as their frameworks set it up: two processes that talk through gloo.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.integrations.ranks FOLDER NAME...

runs the named settings for every rho, and writes what each rank's optimizer steps on. `cases` starts that once.
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tests.integrations import hugging_face, lightnings, loops
from tests.integrations.problems import RHO, Case, Recorder, mean_and_count, recipe, reference, tagger, token_batches
from tests.needs import reason

WORLD = 2
ROOT = Path(__file__).parents[2]


def own(accumulate: int, rank: int) -> list:
    """A rank's batches."""
    return token_batches(WORLD * accumulate)[rank::WORLD]


def lightning(accumulate: int, rho: float | None) -> list[Tensor]:
    model = lightnings.module(rho)
    batches = own(accumulate, int(os.environ["RANK"]))
    lightnings.fit(model, 2 * batches, accumulate_grad_batches=accumulate, strategy="ddp", devices=WORLD)
    return model.recorder.gradients


def accelerate(accumulate: int, rho: float | None) -> list[Tensor]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = tagger()
    recorder = Recorder(model.parameters())
    model, optimizer = accelerator.prepare(model, recorder)
    loader = 2 * own(accumulate, accelerator.process_index)
    if rho is None:
        loops.plain_accelerate(accelerator, model, optimizer, loader, mean_and_count)
    else:
        recipe("Accelerate", rho)["train"](accelerator, model, optimizer, loader, mean_and_count)
    return recorder.gradients


def trainer(accumulate: int, rho: float | None) -> list[Tensor]:
    return hugging_face.trainer(hugging_face.causal_model, "words", accumulate, rho, world=WORLD, ddp_backend="gloo")


def averaged(accumulate: int, rho: float) -> Tensor:
    """A mean over batches and ranks, each over its tokens."""
    batches = token_batches(WORLD * accumulate)
    return reference(tagger(), mean_and_count, batches, [1 / len(batches)] * len(batches), rho)


def by_tokens(accumulate: int, rho: float) -> Tensor:
    return hugging_face.expected(hugging_face.causal_model, "words", WORLD * accumulate, rho)


SETTINGS: dict[str, tuple[Callable[[int, float | None], list[Tensor]], Callable[[int, float], Tensor], tuple[str, ...]]]
SETTINGS = {
    "Accelerate": (accelerate, averaged, ("accelerate",)),
    "Hugging Face Trainer": (trainer, by_tokens, ("accelerate",)),
    "Lightning": (lightning, averaged, ("lightning",)),  # last: it tears the processes' group down
}


@functools.cache
def found() -> dict[tuple[str, int, float | None], list[Tensor]]:
    """What all settings that can run here gave, by framework, accumulation and rho; the same on both ranks."""
    names = [name for name, (_, _, needs) in SETTINGS.items() if not any(map(reason, needs))]
    command = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(WORLD),
        "-m",
        "tests.integrations.ranks",
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", *command, folder, *names], cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-4000:]
        first, second = (torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD))
    assert all(torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))
    return first


def cases() -> Iterator[Case]:
    for name, (_, expected, needs) in SETTINGS.items():
        for n in (1, 4):
            times = "accumulation 4" if n == 4 else "plain"
            run = lambda rho, name=name, n=n: found()[name, n, rho]  # noqa: E731
            yield Case(name, f"two ranks, {times}", needs, run, functools.partial(expected, n))


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    gave = {(name, n, rho): SETTINGS[name][0](n, rho) for name in names for n in (1, 4) for rho in (RHO, 0.0, None)}
    torch.save(gave, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
