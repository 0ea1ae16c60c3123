"""Libraries that report on their own that and how they are used, kept from it. Imports none of them.

TRL's trainers tell huggingface.co of every trainer that is made, ``datasets`` and ``evaluate`` count loads there, Ray,
wandb, MLflow, vLLM and Gradio have reports of their own. A run of this package sends nothing that was not asked for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["no_telemetry"]

# Read when a library is imported, or by the processes that are started.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and through it trl, transformers, diffusers and datasets
    "DISABLE_TELEMETRY": "1",  # the same, in their older versions
    "DO_NOT_TRACK": "1",  # huggingface_hub, MLflow, vLLM
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets, evaluate
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",  # trl imports wandb where it is installed
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "VLLM_NO_USAGE_STATS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
# What libraries that are imported already have made of it: module, name, value.
CONSTANTS = (
    ("huggingface_hub.constants", "HF_HUB_DISABLE_TELEMETRY", True),
    ("diffusers.utils.hub_utils", "HF_HUB_DISABLE_TELEMETRY", True),
    ("datasets.config", "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ("evaluate.config", "HF_UPDATE_DOWNLOAD_COUNTS", False),
)
_TRUE = ("1", "ON", "YES", "TRUE")

_lock = threading.Lock()
_inside = 0  # how many blocks are under way, of all threads
_before: tuple[dict[str, str | None], dict[tuple[str, str], Any]] = {}, {}


@contextlib.contextmanager
def no_telemetry() -> Iterator[None]:
    """Keep libraries from reporting their use, in this process and those that it starts, inside the block.

    Blocks may be nested, and be under way in several threads; the end of the last restores what was.

    - Changed and put back: environment variables, and the constants of ``CONSTANTS`` where their modules are imported;
      seen in huggingface_hub 0.36 to 1.33, datasets 4 to 5.2, diffusers 0.35 to 0.42.
    - Without it: ``trl.SFTTrainer`` sends the model's architecture, device and versions to huggingface.co, unless the
      user knows the variable or is offline.
    - Can go: when they ask first.
    """
    global _inside, _before
    with _lock:
        if _inside == 0:
            constants = {
                (module, name): getattr(sys.modules[module], name)
                for module, name, _ in CONSTANTS
                if hasattr(sys.modules.get(module), name)
            }
            _before = {name: os.environ.get(name) for name in ENVIRONMENT}, constants
            os.environ.update(ENVIRONMENT)
            for (module, name), value in {(m, n): v for m, n, v in CONSTANTS}.items():
                if (module, name) in constants:
                    setattr(sys.modules[module], name, value)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore(*_before)


def _restore(environment: dict[str, str | None], constants: dict[tuple[str, str], Any]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # A module that was imported inside the block has read our environment: it gets what the user's says.
    for module, name, _ in CONSTANTS:
        if hasattr(sys.modules.get(module), name):
            setattr(sys.modules[module], name, constants.get((module, name), _as_read(name)))


def _as_read(name: str) -> bool:
    """Return what a library makes of the environment on import."""
    if name == "HF_UPDATE_DOWNLOAD_COUNTS":
        return os.environ.get(name, "AUTO").upper() in (*_TRUE, "AUTO")
    names = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    return any(os.environ.get(variable, "").upper() in _TRUE for variable in names)
