"""What PEFT's LoRA takes and MoSLoRA does not: one row each, with the reason and the way out.

A script that sets such an argument is told so before anything is built, and is never half-obeyed. A value that
changes nothing (None, False, an empty or untouched sub-configuration) is accepted, because scripts and files of LoRA
carry every field. ``docs/matrix.md`` prints the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from peft.tuners.lora import config as lora
from torch import nn

from moslora.errors import UsageError

__all__ = ["REFUSED_ARGUMENTS", "REFUSED_STARTS", "Refused", "check_arguments", "refuse_in_layer"]


def _is_unset(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, dict | list | tuple | set) and not value)


def _is_untouched(kind: str) -> Callable[[Any], bool]:
    """Accept a sub-configuration at its defaults: as an object, or as the dictionary that a file has of it."""

    def is_neutral(value: Any) -> bool:
        known = getattr(lora, kind, None)  # newer than the oldest PEFT
        if _is_unset(value) or known is None:
            return _is_unset(value)
        default = known()
        return bool(value == default or value == dataclasses.asdict(default))

    return is_neutral


def _is_unused(value: Any) -> bool:
    """Accept any value of what another argument, refused itself, would have to switch on."""
    return True


@dataclass(frozen=True)
class Refused:
    """An argument of LoRA's that cannot be used.

    Attributes:
        reason: Why, in a sentence.
        instead: What to do.
        is_neutral: Whether a value changes nothing in LoRA either, and is accepted.
    """

    reason: str
    instead: str
    is_neutral: Callable[[Any], bool] = _is_unset


REFUSED_ARGUMENTS: dict[str, Refused] = {
    "layer_replication": Refused(
        "Layer replication is not supported: it changes the base model, not the adapter.",
        "Replicate the layers of the model before adapting it.",
    ),
    "corda_config": Refused(
        "CorDA starts are not supported, and this configures one.",
        'Leave it out, and start with init_lora_weights=True, "orthogonal" or "pissa".',
        _is_untouched("CordaConfig"),
    ),
    "lora_ga_config": Refused(
        "LoRA-GA starts are not supported, and this configures one.",
        'Leave it out, and start with init_lora_weights=True, "orthogonal" or "pissa".',
        _is_untouched("LoraGAConfig"),
    ),
    "runtime_config": Refused(
        "ephemeral_gpu_offload moves base weights for DoRA's start, which MoSLoRA computes where they lie.",
        "Leave it out; the result is the same.",
        _is_untouched("LoraRuntimeConfig"),
    ),
    "velora_config": Refused(
        "VeLoRA compresses the input of A for the backward pass, and M's gradient needs it exactly.",
        "Leave it out; to save memory use gradient checkpointing.",
    ),
    "alora_invocation_tokens": Refused(
        "Activated LoRA runs the update on the tokens after an invocation string only, which MoSLoRA does not do.",
        "Leave it out, or use PEFT's LoraConfig.",
    ),
    "use_qalora": Refused(
        "QALoRA pools the input of A, so its update is not B·M·A.",
        "Leave it out; quantized bases are adapted as they are.",
    ),
    "qalora_group_size": Refused(
        "It belongs to use_qalora=True.", "Set it as you like: it is ignored, as in LoRA.", _is_unused
    ),
    "monteclora_config": Refused(
        "MonteCLoRA draws LoRA's factors anew at every step, and its sampler does not know M.",
        "Leave it out, or use PEFT's LoraConfig.",
    ),
    "use_bdlora": Refused(
        "BD-LoRA makes A or B block-diagonal, and M mixes the blocks.",
        "Leave it out, or use PEFT's LoraConfig.",
    ),
    "arrow_config": Refused(
        "Arrow routes tokens between LoRAs by the directions of A alone.",
        "Export the adapters as plain LoRA (moslora export) and route those.",
    ),
    "kasa_config": Refused(
        "KaSA learns a diagonal between A and B, which M has in it, and cuts the base weight.",
        'Leave it out; init_lora_weights="pissa" starts M as singular values and leaves the base alone.',
    ),
    "megatron_config": Refused(
        "Megatron's parallel linear layers are not supported.",
        "Leave it out; models of several processes are trained under FSDP or DeepSpeed.",
    ),
    "megatron_core": Refused(
        "It belongs to megatron_config.", "Set it as you like: it is ignored, as in LoRA.", _is_unused
    ),
}

# Values of init_lora_weights that LoRA has and MoSLoRA does not.
REFUSED_STARTS: dict[str, Refused] = {
    "corda": Refused(
        "CorDA takes a part of the base weight out of it, chosen by the data.",
        'Start with "pissa", which leaves the base alone.',
    ),
    "lora_ga": Refused(
        "LoRA-GA starts B·A from a gradient of the base weight and takes it out of the base.",
        'Start with "pissa", which leaves the base alone.',
    ),
    "mica": Refused(
        "MiCA starts B from the smallest singular values and freezes it.",
        'Start with "pissa", or with True.',
    ),
}


def check_arguments(values: Callable[[str], Any]) -> None:
    """Refuse what is set and cannot be used.

    Args:
        values: Returns an argument by its name.

    Raises:
        UsageError: With the argument, the reason and the way out.
    """
    for name, refused in REFUSED_ARGUMENTS.items():
        value = values(name)
        if not refused.is_neutral(value):
            raise UsageError(
                f"{name}={value!r} cannot be used with MoSLoRA. {refused.reason} {refused.instead}"
            )


def refuse_in_layer(base_layer: nn.Module, setting: str, reason: str, instead: str) -> NoReturn:
    """Refuse a setting that a kind of layer cannot have.

    Args:
        base_layer: The layer.
        setting: The argument as it is set, such as ``"use_dora=True"``.
        reason: Why not, as the end of a sentence.
        instead: What to set instead, as the end of a sentence.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        f"{setting} cannot be used with this {type(base_layer).__name__}: {reason}. Leave the module out of "
        f"target_modules (or name it in exclude_modules), or {instead}."
    )
