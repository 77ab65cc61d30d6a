"""Random nets and batches: `msam.backward` against plain autograd, and one pass against the loop.

    python -m tests.msam.fuzz                          # 30,000 cases on two processes
    python -m tests.msam.fuzz --cases 1 --seed 4711    # one case again
    python -m tests.msam.fuzz --faults                 # a fault at every operation of a sample of steps

Each case must be right in a loop. In one pass it must be right too, or be refused by name with everything left as it
was. It ends with status 1 and the numbers of the cases if any is wrong.
"""

import argparse
import copy
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

import msam
from tests.msam.faults import FaultAt, Injected, Watched
from tests.msam.fuzz_cases import Case, as_pairs, case
from tests.msam.plain import Plain, error, plain_step

LOOP, ONE_PASS = 1e-9, 1e-6
WRONG_AT_MOST = 20
"""Wrong cases after which it gives up."""


class Wrong(AssertionError):
    """What is wrong with a case."""


def check(seed: int) -> list[str]:
    """Outcomes of a case, one for each way that it was tried.

    Raises:
        Wrong: with what is wrong.
    """
    this = case(seed)
    outcomes: list[str] = []
    for _ in range(this.steps):
        outcomes += _step(this)
        with torch.no_grad():
            for p in this.net.parameters():
                p -= 0.05 * p.grad if p.grad is not None else 0
    return outcomes


def _step(this: Case) -> list[str]:
    twin, plain, m = copy.deepcopy(this.net), copy.deepcopy(this.net), this.m
    parts = msam.split(this.batch, m)
    sizes = [this.examples // len(parts) + (i < this.examples % len(parts)) for i in range(len(parts))]
    torch.manual_seed(this.seed + 1)
    options = this.options | ({"shared": True} if this.shared else {})
    try:
        expected = plain_step(as_pairs(this.loss_of(plain)), parts, sizes, plain, **options)
    except (RuntimeError, ValueError, IndexError) as invalid:
        return [f"no such case: {type(invalid).__name__} {re.sub('[0-9]+', 'N', str(invalid))[:60]}"]
    after = torch.get_rng_state()
    if any(not g.isfinite().all() for g in expected.gradient.values() if g is not None):
        return ["not finite"]
    held = _held(this, this.net, twin)
    watched = Watched(this.net)
    torch.manual_seed(this.seed + 1)
    try:
        step = msam.backward(this.loss_of(this.net), this.batch, this.net, micro_batches=m, **options)
    except ValueError as refusal:
        if "depends on no" not in str(refusal) or (expected.norms and max(expected.norms) > 0):
            raise Wrong(f"loop: {refusal}") from refusal
        return ["loop: depends on no parameter"] if watched.unchanged() else _wrong("loop: refused, and left changed")
    if not torch.equal(after, torch.get_rng_state()):
        raise Wrong("loop: the generator ends elsewhere")
    _compare_loop(this, step, expected, plain, held)
    if this.shared:
        return ["shared: equal"]
    return ["loop: equal", _one_pass(this, twin)]


def _wrong(what: str) -> Any:
    raise Wrong(what)


def _held(this: Case, *nets: nn.Module) -> dict[str, Tensor | None]:
    """What `.grad` holds before."""
    held: dict[str, Tensor | None] = {}
    for name, p in nets[0].named_parameters():
        held[name] = torch.randn_like(p) if this.held and p.requires_grad else None
    for net in nets:
        for name, p in net.named_parameters():
            g = held[name]
            p.grad = None if g is None else g.clone()
    return held


def _compare_loop(this: Case, step: Any, expected: Plain, plain: nn.Module, held: dict[str, Tensor | None]) -> None:
    theirs: dict[str, Tensor | None] = {}
    for name, g in expected.gradient.items():
        before = held[name]
        theirs[name] = before if g is None else g if before is None else g + before
    _compare("loop", this, this.net, plain, theirs, LOOP)
    norms = step.gradient_norms
    if norms is not None and not this.shared and not this.empty:
        ours = torch.tensor(expected.norms, dtype=norms.dtype)
        if (norms - ours).abs().max() > 1e-6 * ours.abs().max() + 1e-12:
            raise Wrong(f"loop: norms {norms.tolist()}, not {expected.norms}")


def _one_pass(this: Case, net: nn.Module) -> str:
    watched = Watched(net)
    torch.manual_seed(this.seed + 1)
    loss_fn = this.loss_of(net)
    try:
        msam.backward(loss_fn, this.batch, net, micro_batches=this.m, vectorized=True, **this.options)
    except NotImplementedError as refusal:
        if not watched.unchanged():
            raise Wrong(f"one pass: refused, and left changed: {refusal}") from refusal
        reason = str(refusal).split("cannot do ")[-1].split(": use")[0]
        return "refused: " + re.sub(r"the parameter [\w.]+|[\w.]+\.\d[\w.]*", "...", reason)
    if this.noisy:
        return "one pass: other random numbers"
    theirs = {name: p.grad for name, p in this.net.named_parameters() if p.requires_grad}
    _compare("one pass", this, net, this.net, theirs, ONE_PASS)
    return "one pass: equal"


def _compare(
    way: str, this: Case, ours: nn.Module, theirs: nn.Module, gradient: dict[str, Tensor | None], tolerance: float
) -> None:
    """Gradient, which of it is None, weights, and buffers.

    Raises:
        Wrong: if any differs.
    """
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    missing = [name for name in found if (found[name] is None) != (gradient[name] is None)]
    if missing and not this.empty:
        raise Wrong(f"{way}: .grad is None, or not, of {missing}")
    wrong = error(found, gradient)
    if not wrong <= tolerance and not wrong <= 1e4 * _rounding(this, theirs):
        raise Wrong(f"{way}: the gradient is off by {wrong:.1e}")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if not torch.equal(p, q):
            raise Wrong(f"{way}: the weight {name} has moved")
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        if not torch.allclose(b, c, rtol=1e-7, atol=1e-9, equal_nan=True):
            raise Wrong(f"{way}: the buffer {name} differs")


def _rounding(this: Case, net: nn.Module) -> float:
    """How far the gradient moves if the weights move by a rounding: what no way of computing it can do better than."""
    results = []
    parts = msam.split(this.batch, this.m)
    sizes = [this.examples // len(parts) + (i < this.examples % len(parts)) for i in range(len(parts))]
    for number in range(3):
        moved = copy.deepcopy(case(this.seed).net if this.steps == 1 else net)
        with torch.no_grad():
            for p in moved.parameters():
                p *= 1 + (1e-15 * torch.randn_like(p) if number else 0)
        torch.manual_seed(this.seed + 1)
        options = this.options | ({"shared": True} if this.shared else {})
        results.append(plain_step(as_pairs(this.loss_of(moved)), parts, sizes, moved, **options).gradient)
    return max(error(results[1], results[0]), error(results[2], results[0]))


def faults(seed: int, every: int = 1) -> list[str]:
    """A fault at every operation of a step, or at one of so many, in each way that the case can be done.

    Raises:
        Wrong: with the number of the operation after which something is left changed.
    """
    this = case(seed)
    outcomes: list[str] = []
    ways: list[dict[str, bool]] = [{}, {"shared": True}, {"vectorized": True}]
    for way in ways[: 2 if this.examples % this.m else 3]:
        count = _fault(this, way, None)
        for number in range(seed % every, count, every):
            _fault(this, way, number)
        outcomes += [f"fault {way or 'loop'}"] * (count // every)
    return outcomes


def _fault(this: Case, way: dict[str, bool], number: int | None) -> int:
    """A step with a fault at the operation of this number, if any; how many operations it had."""
    net = copy.deepcopy(this.net)
    torch.manual_seed(this.seed + 1)
    _held(this, net)
    watched = Watched(net)
    with suppress(Injected, NotImplementedError, ValueError), FaultAt(number) as fault:
        msam.backward(this.loss_of(net), this.batch, net, micro_batches=this.m, **this.options, **way)
        number = None  # the step has caught the fault, or come to its end
    if number is not None and not watched.unchanged():
        raise Wrong(f"{way or 'loop'}: left changed by a fault at operation {number} of {fault.count}")
    return fault.count


def tried(seed: int, with_faults: bool) -> tuple[int, list[str], str]:
    """The outcomes of a case, and what is wrong with it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        return seed, faults(seed) if with_faults else check(seed), ""
    except Exception as error:
        return seed, [], f"{type(error).__name__}: {str(error)[:200]}"


def _all(seeds: range, with_faults: bool, jobs: int) -> Iterator[tuple[int, list[str], str]]:
    if jobs == 1:
        yield from (tried(seed, with_faults) for seed in seeds)
        return
    with get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_unpacked, [(seed, with_faults) for seed in seeds], chunksize=8)


def _unpacked(given: tuple[int, bool]) -> tuple[int, list[str], str]:
    return tried(*given)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=None, help="30000, or 20 with --faults")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--faults", action="store_true", help="put a fault at every operation instead")
    parser.add_argument("--most", type=int, default=WRONG_AT_MOST, help="wrong cases after which it gives up")
    return parser.parse_args()


def main() -> int:
    """Run it; the status to end with."""
    given = _arguments()
    cases = given.cases or (20 if given.faults else 30_000)
    seeds, counts, wrong = range(given.seed, given.seed + cases), Counter(), 0
    started = shown = time.monotonic()
    for done, (seed, outcomes, what) in enumerate(_all(seeds, given.faults, min(given.jobs, cases)), start=1):
        counts.update(outcomes)
        if what:
            wrong += 1
            text = case(seed).text
            print(f"WRONG, python -m tests.msam.fuzz --cases 1 --seed {seed}: {what}\n    {text}", flush=True)
            if wrong >= given.most:
                break
        if (now := time.monotonic()) - shown > 10:
            shown, left = now, (now - started) / done * (cases - done)
            print(f"{done} of {cases}, {wrong} wrong, {left / 60:.1f} minutes left", flush=True)
    for outcome, count in counts.most_common():
        print(f"{count:8} {outcome}")
    print(f"{done} cases in {time.monotonic() - started:.0f} s, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
