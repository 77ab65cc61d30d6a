"""What the machine is: its accelerator, processor, memory and software, one fact a line.

python -m benchmarks.device
"""

import os
import platform
from collections.abc import Iterator

import torch

from experiments.harness.runs.provenance import cpu


def facts() -> Iterator[tuple[str, str]]:
    """Names and values."""
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "system", platform.platform()
    yield "cpu", f"{cpu()}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield "gpu", "none that torch can use"
        return
    yield "cuda", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        yield "gpu", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors"
    yield "bfloat16", "yes" if torch.cuda.is_bf16_supported() else "no"


def main() -> None:
    for name, value in facts():
        print(f"{name:9} {value}")


if __name__ == "__main__":
    main()
