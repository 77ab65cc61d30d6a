"""Settings of a process: its cores, the libraries' environment variables, a flag that asks it to stop."""

import os
from collections.abc import Sequence

from experiments.harness.runs.spec import Run


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Flag:
    """A flag that a signal handler sets. threading.Event does not work: its lock is not safe in signal handlers."""

    def __init__(self) -> None:
        self.value = False

    def set(self, *_: object) -> None:
        """Set the flag; takes the arguments of a signal handler."""
        self.value = True

    def is_set(self) -> bool:
        """Whether it has been set."""
        return self.value


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Environment variables that make glibc keep large blocks instead of returning them to the system after each batch.
This made a step of the `cpu` ResNet at batch 128 about a sixth faster."""


def library_settings(specs: Sequence[Run]) -> dict[str, str]:
    """Environment variables for the processes that train these runs; libraries read them when they are loaded.

    They limit the threads to what the specs allow, set `ALLOCATOR`, and silence torch's profiler, which timing runs use
    to count memory and which otherwise logs its start and end, and a missing GPU.
    """
    threads = str(max((s.threads for s in specs), default=1))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "KINETO_LOG_LEVEL": "6",
        **ALLOCATOR,
    }
