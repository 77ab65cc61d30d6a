"""Time and memory of `python -m analysis` with many run folders, for a first and a second call.

    python -m benchmarks.analysis --save        # a few minutes, mostly to create the folders

The runs are Table 1's cells of the `cpu` profile, with as many seeds as needed, invented numbers and 100 logged epochs
each. Two tables are built from them: one with the usual number of seeds, which must find its runs among all the others,
and one with all runs. Targets at 10,000 runs: 15 s and 1 GiB, and 2 s for a second call without new runs.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from experiments.harness.runs import catalogue
from experiments.harness.runs.provenance import ROOT, cpu
from tests.fixtures.make_runs import write_run

RESULTS = Path(__file__).parent / "results"
MEASURE = """
import os, resource, subprocess, sys, time
begun = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def make(root: Path, count: int, lines: int) -> int:
    """Write the missing ones of `count` runs and return the number of seeds that all cells have."""
    cells = catalogue.cells("table1", "cpu")
    for number in range(count):
        seed, place = divmod(number, len(cells))
        spec = replace(cells[place], seed=seed)
        if not (root / "runs" / spec.run_id).exists():
            write_run(root, spec, 0.4 + place / 100 + seed % 7 / 1000, lines=lines)
    return count // len(cells)


def timed(root: Path, target: str) -> tuple[float, float]:
    """Seconds of one call in a separate process, and its peak memory in MiB."""
    command = [sys.executable, "-m", "analysis", target, "--results", str(root)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds, kilobytes = map(float, done.stdout.split())
    return seconds, kilobytes / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[2500, 5000, 10_000])
    parser.add_argument("--lines", type=int, default=100, help="logged epochs of a run")
    parser.add_argument("--save", action="store_true", help="write the table to benchmarks/results/")
    arguments = parser.parse_args()
    lines = [
        f"{cpu()}; {arguments.lines} logged epochs a run",
        "",
        "| run folders | in the table | first call | peak | second call | peak |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(arguments.runs):
            seeds = make(Path(folder), count, arguments.lines)
            for shown in (3, seeds):
                first, again = (timed(Path(folder), f"table1:{shown}") for _ in range(2))
                columns = " | ".join(f"{seconds:.1f} s | {size:.0f} MiB" for seconds, size in (first, again))
                lines.append(f"| {count} | {shown * len(catalogue.cells('table1', 'cpu'))} | {columns} |")
                print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines)
    print(text)
    if arguments.save:
        (RESULTS / "analysis.md").write_text(f"# `python -m benchmarks.analysis {' '.join(sys.argv[1:])}`\n\n{text}\n")


if __name__ == "__main__":
    main()
