"""Programs that run adapters: the format that each loads, and rules for what cannot be tried here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from moslora.adapters.factors import Adapter
from moslora.adapters.findings import Finding, some
from moslora.adapters.formats import comfyui
from moslora.errors import UsageError
from moslora.models.shards import EMBEDDINGS, HEADS
from moslora.wording import did_you_mean

__all__ = ["MERGE_BIAS", "MERGE_WHOLE", "TARGETS", "Target", "check_target", "format_for"]


MERGE_BIAS = (
    "If the base's layers have biases: moslora merge, and ship the full model. Else set lora_bias=False."
)
MERGE_WHOLE = "Load it on its base with PEFT, merge_and_unload(), and ship the full model."
# vLLM 0.22: vllm.config.lora, MaxLoRARanks, and its default.
VLLM_RANKS, DEFAULT_RANK = (1, 8, 16, 32, 64, 128, 256, 320, 512), 16


def _only_factors(adapter: Adapter) -> Iterator[Finding]:
    """Servers keep the base's own weights for all adapters."""
    if adapter.extra:
        yield Finding(
            "error",
            "beside",
            f"Servers refuse modules_to_save and biases; it holds {some(sorted(adapter.extra))}.",
            "Merge it (moslora merge BASE ADAPTER OUT), and serve the full model.",
        )


def _no_magnitude(adapter: Adapter) -> Iterator[Finding]:
    """What vLLM's PEFTHelper says: "vLLM does not yet support DoRA."; nothing in SGLang is known to read it."""
    if adapter.has_magnitudes:
        yield Finding(
            "error",
            "DoRA",
            "Servers run s·B·A and have no place for DoRA's magnitude; they refuse it, or would be wrong without.",
            MERGE_WHOLE,
        )


def _no_bias(adapter: Adapter) -> Iterator[Finding]:
    """A server's kernels take A and B; nothing in them is known to read a bias."""
    if adapter.has_biases:
        yield Finding(
            "error",
            "bias on B",
            "Servers run s·B·A and have no place for a bias on B; they refuse it, or would be wrong without.",
            MERGE_BIAS,
        )


def _served_layers(adapter: Adapter) -> Iterator[Finding]:
    odd = [name for name, f in adapter.modules.items() if f.form.kind in ("conv", "expert")]
    if odd:
        yield Finding(
            "error",
            "layers",
            f"Convolutions and experts are not served as adapters: {some(odd)}.",
            MERGE_WHOLE,
        )
    ends = [name for name in adapter.modules if name.rpartition(".")[2] in HEADS + EMBEDDINGS]
    if ends:
        yield Finding(
            "warning",
            "layers",
            f"Embeddings and heads are served for some models only: {some(ends)}.",
            "Try it, or merge it (moslora merge BASE ADAPTER OUT).",
        )
    vision = [name for name in adapter.modules if re.search(r"(^|[._])(vision|visual|projector)", name)]
    if vision:
        yield Finding(
            "warning",
            "layers",
            f"Adapters of vision towers and projectors are often left out by servers: {some(vision)}.",
            "Merge it (moslora merge BASE ADAPTER OUT), or adapt the language model alone.",
        )


def _vllm_ranks(adapter: Adapter) -> Iterator[Finding]:
    r = max(factors.r for factors in adapter.modules.values())
    room = next((rank for rank in VLLM_RANKS if rank >= r), None)
    if room is None:
        yield Finding(
            "error",
            "rank",
            f"Rank {r} is above vLLM's largest, {VLLM_RANKS[-1]}.",
            f"moslora export ADAPTER OUT --rank {VLLM_RANKS[-1]}, which says what it costs.",
        )
    elif room > DEFAULT_RANK:
        yield Finding("note", "rank", f"Rank {r} needs vLLM's option --max-lora-rank {room}.")


def _known_to_comfyui(adapter: Adapter) -> Iterator[Finding]:
    left_out = comfyui.passed_over(adapter, comfyui.best_format(adapter))
    for reason in sorted(set(left_out.values())):
        modules = sorted(name for name, why in left_out.items() if why == reason)
        yield Finding(
            "warning",
            "layers",
            f"ComfyUI is not known to apply {len(modules)} of {len(adapter.modules)} modules "
            f"({some(modules)}): {reason}.",
            'See there whether it logs "lora key not loaded", or merge the adapter into the model.',
        )


@dataclass(frozen=True)
class Target:
    """A program that runs adapters.

    Attributes:
        format: Returns the format that it loads, one of ``formats.table.WRITTEN``, of a given adapter.
        rules: What it refuses or ignores beyond its format, and cannot be tried here.
    """

    format: Callable[[Adapter], str]
    rules: tuple[Callable[[Adapter], Iterator[Finding]], ...] = ()


def _lora(_: Adapter) -> str:
    return "lora"


TARGETS: Mapping[str, Target] = {
    "peft": Target(_lora),
    "vllm": Target(_lora, (_no_magnitude, _no_bias, _only_factors, _served_layers, _vllm_ranks)),
    "sglang": Target(_lora, (_no_magnitude, _no_bias, _only_factors, _served_layers)),
    "llama.cpp": Target(lambda _: "gguf"),
    "diffusers": Target(lambda _: "diffusers"),
    "comfyui": Target(comfyui.best_format, (_known_to_comfyui,)),
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
    return TARGETS[name].format(adapter)
