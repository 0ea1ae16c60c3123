"""What a result depends on: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

__all__ = ["collect_hardware", "collect_versions"]


VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "diffusers",
    "tokenizers",
    "safetensors",
    "numpy",
    "moslora",
)


def collect_versions() -> dict[str, str | None]:
    """Return the versions a result depends on: Python's and those of the packages; None if not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def collect_hardware() -> dict[str, Any]:
    """Return what the run has to work with.

    Returns:
        ``machine`` and ``cpu`` (names), ``cores`` (this process may use), ``memory_bytes`` (of the machine),
        ``gpus`` (names), ``torch_threads``.
    """
    import psutil
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": usable,
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()
