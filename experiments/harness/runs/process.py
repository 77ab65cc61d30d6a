"""What a process may use and is asked to do: cores, the libraries' settings, a wish to stop."""

import os
from collections.abc import Sequence

from experiments.harness.runs.spec import Run


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Flag:
    """Set by a signal handler. A threading.Event will not do: its lock is not for handlers that interrupt it."""

    def __init__(self) -> None:
        self.value = False

    def set(self, *_: object) -> None:
        """Set it; takes what a signal handler is given."""
        self.value = True

    def is_set(self) -> bool:
        """Whether it has been set."""
        return self.value


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Environment in which glibc keeps large blocks instead of returning them to the system after each batch, which took
about a sixth off a step of the `cpu` ResNet at batch 128."""


def library_settings(specs: Sequence[Run]) -> dict[str, str]:
    """Environment variables for the processes that train these runs; libraries read them when they are loaded.

    Threads: no more than a run is allowed. Memory: see `ALLOCATOR`. Torch's profiler, by which cost runs count memory,
    does not print when it begins and ends, or that there is no GPU.
    """
    threads = str(max((s.threads for s in specs), default=1))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "KINETO_LOG_LEVEL": "6",
        **ALLOCATOR,
    }
