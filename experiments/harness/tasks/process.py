"""Torch's settings for this process: set from a spec, and reported for the record."""

import os
from typing import Any

import torch

from experiments.harness.runs.spec import Run


def set_torch(spec: Run) -> None:
    """Apply the spec's settings to torch; call it before any computation."""
    tf32, deterministic = spec.flat["tf32"], spec.flat["deterministic"]
    torch.set_num_threads(spec.threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it on first use
    torch.use_deterministic_algorithms(deterministic)


def torch_environment(spec: Run) -> dict[str, Any]:
    """Threads, GPU and torch's flags, for the record; call it after `set_torch`."""
    on_gpu = spec.device == "cuda"
    return {
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch_flags": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.enabled,
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "cuda": torch.version.cuda if on_gpu else None,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        },
    }
