"""Programs that run adapters, and the format that each loads; what each applies of it is in ``engines``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moslora.adapters.engines.rules import read_engine
from moslora.adapters.factors import Adapter
from moslora.adapters.formats import comfyui
from moslora.errors import UsageError
from moslora.wording import did_you_mean

__all__ = ["TARGETS", "Target", "check_target", "format_for"]


@dataclass(frozen=True)
class Target:
    """A program that runs adapters.

    Attributes:
        format: Returns the format that it loads, one of ``formats.table.WRITTEN``, of a given adapter; None for the
            one that its file of rules says.
    """

    format: Callable[[Adapter], str] | None = None


# The order is that of messages. Each has a file of rules, ``engines/NAME.yaml``.
TARGETS: Mapping[str, Target] = {
    "peft": Target(),
    "transformers": Target(),
    "vllm": Target(),
    "sglang": Target(),
    "llama.cpp": Target(),
    "ollama": Target(),
    "diffusers": Target(),
    "comfyui": Target(comfyui.best_format),
}


def check_target(name: str) -> None:
    """Refuse a program that is not known.

    Args:
        name: Its name.

    Raises:
        UsageError: If it is unknown; the nearest name is in the message.
    """
    if name not in TARGETS:
        raise UsageError(
            f"The engine {name!r} is unknown; choose from {', '.join(sorted(TARGETS))}.{did_you_mean(name, TARGETS)}"
        )


def format_for(name: str, adapter: Adapter) -> str:
    """Return the format that a program loads.

    Args:
        name: A key of ``TARGETS``.
        adapter: What it should run.

    Returns:
        One of ``formats.table.WRITTEN``.

    Raises:
        AdapterError: If it runs nothing of this adapter's kind.
        UsageError: If the program is unknown; the nearest name is in the message.
    """
    check_target(name)
    own = TARGETS[name].format
    return read_engine(name).format if own is None else own(adapter)
