"""What each field of a LoRA configuration means for trained factors: read, harmless, or another method than ``s·B·A``.

A configuration may say that A and B in the file are not the factors of ``W0 + s·B·A``: a start that was taken out of
the base weight (PiSSA), blocks on a diagonal (BD-LoRA), layers that the base does not have (layer replication). Whoever
passes over such a field writes another model than the one that was trained. So every field is in one of the tables
below, and a field that is in none refuses the adapter, unless its value is one that switches nothing on.

``tests/test_lora_fields.py`` holds the tables complete against the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moslora.errors import AdapterError
from moslora.wording import did_you_mean

__all__ = [
    "CHANGED_BASE",
    "CONVERT",
    "HARMLESS",
    "MERGE_WITH_PEFT",
    "READ",
    "REFUSED",
    "STARTS",
    "TRAINING_ONLY",
    "Refused",
    "Start",
    "check_fields",
    "check_native_fields",
    "is_off",
    "start_of",
]

# Fields that this package reads: what they say is in the factors, their scale, or the tensors beside them.
READ: Mapping[str, str] = {
    "peft_type": "the format",
    "task_type": "carried on",
    "auto_mapping": "carried on",
    "base_model_name_or_path": "the base",
    "revision": "of the base",
    "r": "the rank, held against the tensors",
    "lora_alpha": "the scale",
    "rank_pattern": "ranks by module",
    "alpha_pattern": "scales by module",
    "use_rslora": "the scale",
    "target_modules": "which modules have factors; carried on",
    "exclude_modules": "the same",
    "layers_to_transform": "the same",
    "layers_pattern": "the same",
    "target_parameters": "experts in one tensor",
    "fan_in_fan_out": "how the base stores its weight",
    "bias": "biases are tensors beside the factors",
    "modules_to_save": "tensors beside the factors",
    "trainable_token_indices": "tensors beside the factors",
    "ensure_weight_tying": "a head with the embedding's factors",
    "use_dora": "the magnitude",
    "lora_bias": "the bias on B",
    "init_lora_weights": "STARTS",
}

# Fields that bear on the training or the program alone: whatever they say, the trained factors mean s·B·A.
HARMLESS: Mapping[str, str] = {
    "peft_version": "who wrote the file",
    "inference_mode": "whether a program trains further",
    "lora_dropout": "acts in training",
    "runtime_config": "PEFT neither saves nor reads it",
    "eva_config": "how a start was found that is overwritten by the file, and takes nothing out of the base",
    "loftq_config": "belongs to init_lora_weights='loftq', which is refused; PEFT drops it with any other start",
    "corda_config": "belongs to init_lora_weights='corda', which is refused; PEFT passes over it with any other start",
    "lora_ga_config": "belongs to init_lora_weights='lora_ga', which is refused; PEFT passes over it with any other",
    "qalora_group_size": "belongs to use_qalora, which is refused",
    "megatron_core": "belongs to megatron_config, which is refused",
    "velora_config": "compresses what the backward pass keeps; forward and merge are LoRA's",
    "monteclora_config": "adds noise in training; evaluation and merge are LoRA's",
    # Of other programs.
    "merge_weights": "PEFT up to 0.3: whether eval() merges",
    "lora_dtype": "ms-swift: the factors' dtype in training",
    "lorap_lr_ratio": "ms-swift: a learning rate",
    "lorap_emb_lr": "ms-swift: a learning rate",
}

# Tensors that only training uses, and that PEFT saves all the same: no part of the trained factors.
TRAINING_ONLY = (".lora_velora_embed", ".lora_monteclora_sampler")

MERGE_WITH_PEFT = "Load it on its base with PEFT, call merge_and_unload(), and save the model: full weights."
IN_PEFT_ALONE = "Run it in PEFT, beside its base; nothing else runs it, and it cannot be merged."
IF_SET_BY_MISTAKE = "If it was trained without, set the field to null in adapter_config.json."


@dataclass(frozen=True)
class Refused:
    """A field that makes another method of LoRA.

    Attributes:
        what: What the factors mean then.
        way_out: What to do with such an adapter.
        is_on_when_empty: Whether ``{}`` switches it on, since PEFT makes a configuration with its defaults of it.
    """

    what: str
    way_out: str
    is_on_when_empty: bool = False


REFUSED: Mapping[str, Refused] = {
    "layer_replication": Refused(
        "the base's layers are stacked several times, and each copy has factors of its own, so they belong to a model "
        "that the base is not",
        "Write the stacked base out once, each layer with weights of its own, set layer_replication to null in "
        "adapter_config.json, and use that base: the adapter is a plain LoRA of it.",
    ),
    "use_qalora": Refused(
        "A works on groups of inputs that are averaged before it (QA-LoRA)",
        "Run it in PEFT, beside its GPTQ base.",
    ),
    "use_bdlora": Refused(
        "A or B holds the blocks of a block-diagonal factor (BD-LoRA)", MERGE_WITH_PEFT, is_on_when_empty=True
    ),
    "kasa_config": Refused(
        "a diagonal lies between A and B, and the smallest components are cut from the base weight (KaSA)",
        MERGE_WITH_PEFT,
        is_on_when_empty=True,
    ),
    "arrow_config": Refused(
        "it routes each token to one of several adapters (Arrow)",
        "Convert the adapters that it routes between, one by one.",
        is_on_when_empty=True,
    ),
    "alora_invocation_tokens": Refused("it acts from certain tokens on, not on all (aLoRA)", IN_PEFT_ALONE),
    "megatron_config": Refused(
        "its factors are for Megatron's parallel layers",
        f"Convert it with Megatron's tools. {IF_SET_BY_MISTAKE}",
    ),
    "enable_lora": Refused(
        "parts of a joint projection have factors of their own (MergedLinear of PEFT up to 0.3)",
        f"Merge it with the PEFT that trained it. {IF_SET_BY_MISTAKE}",
    ),
    "lora_use_mixer": Refused(
        "it says that it has mixers, and the file holds none",
        "Take the file from before it was edited, or, if it was trained without, set the field to false.",
    ),
    "use_moslora": Refused(
        "it says that it has mixers, and the file holds none",
        "Take the file from before it was edited, or, if it was trained without, set the field to false.",
    ),
}

CONVERT = (
    "Convert it with PEFT where it was trained: before training, set init_lora_weights of the fresh adapter's "
    "configuration "
    "to True and save it as INITIAL; after training, model.save_pretrained(OUT, "
    "path_initial_model_for_weight_conversion=INITIAL) writes a plain LoRA."
)
CHANGED_BASE = (
    "Or, if the base was saved as the start had changed it, set init_lora_weights to true in "
    "adapter_config.json and use that "
    "base: the adapter is a plain LoRA of it."
)


@dataclass(frozen=True)
class Start:
    """What a value of ``init_lora_weights`` means for the trained adapter.

    Attributes:
        changes_base: What the start takes out of the base weight, or does to it; empty if nothing, so that the file's
            factors are all there is.
        subtracted: Whether that part can be computed again from the base, and subtracted.
        way_out: What to do where it cannot.
    """

    changes_base: str = ""
    subtracted: bool = False
    way_out: str = ""


KEPT = Start()
STARTS: Mapping[str, Start] = {
    "gaussian": KEPT,
    "eva": KEPT,
    "orthogonal": KEPT,
    "mica": KEPT,
    "pissa": Start("its principal part was taken out of the base weight", subtracted=True),
    "olora": Start("the beginning of its QR decomposition was taken out of the base weight", subtracted=True),
    "pissa_niter": Start(
        "a principal part was taken out of the base weight that a randomized decomposition found, and PEFT "
        "itself finds "
        "another each time it loads the adapter",
        way_out=f"{CONVERT} {CHANGED_BASE}",
    ),
    "corda": Start(
        "a part was taken out of the base weight that was chosen by data, which neither file nor base has",
        way_out=f"{CONVERT} {CHANGED_BASE}",
    ),
    "lora_ga": Start(
        "a part was taken out of the base weight that was chosen by gradients, which neither file nor base has",
        way_out=f"{CONVERT} {CHANGED_BASE}",
    ),
    "loftq": Start(
        "the base weight was quantized, and the factors also make up for its rounding",
        way_out=f"{MERGE_WITH_PEFT} {CHANGED_BASE}",
    ),
}


def start_of(value: Any) -> tuple[str, Start] | None:
    """Tell what a value of ``init_lora_weights`` means, as PEFT tells it.

    Args:
        value: Of the configuration.

    Returns:
        Its name, a key of ``STARTS`` (empty for LoRA's own), and what it means; None if PEFT knows no such start.
    """
    if value is None or isinstance(value, bool):
        return "", KEPT
    if not isinstance(value, str):
        return None
    if value.startswith("pissa"):  # PEFT looks at the case here, and below it does not
        parts = value.split("_niter_")
        is_fast = len(parts) == 2 and parts[1].strip().isdigit()
        name = "pissa" if value == "pissa" else "pissa_niter" if is_fast else None
    elif value.startswith("corda"):
        name = "corda"
    elif value.lower() in ("gaussian", "olora", "mica"):
        name = value.lower()
    else:
        name = value if value in ("eva", "orthogonal", "loftq", "lora_ga") else None
    return None if name is None else (name, STARTS[name])


def is_off(value: Any) -> bool:
    """Tell whether a field's value switches nothing on, whatever the field is: ``None``, ``False``, empty or "none"."""
    if isinstance(value, str | list | dict):
        return not value or value == "none"
    return value is None or value is False


def check_fields(where: str, config: Mapping[str, Any], also: Iterable[str] = ()) -> str:
    """Refuse a configuration under which trained factors are not those of ``W0 + s·B·A``.

    Args:
        where: Where it comes from, for messages.
        config: Of a LoRA adapter, as PEFT or another program wrote it.
        also: Further fields that the caller reads itself.

    Returns:
        The start that has to be computed from the base and subtracted, ``"pissa"`` or ``"olora"``; empty if none.

    Raises:
        AdapterError: With the field, what it means, and the way out.
    """
    known = {*READ, *HARMLESS, *also}
    for name, value in config.items():
        refused = None if name in known else REFUSED.get(name)
        if name in known or (is_off(value) and not (value == {} and refused and refused.is_on_when_empty)):
            continue
        if refused:
            raise AdapterError(
                f"{where} is not a plain LoRA: {name} is set, so {refused.what}. {refused.way_out}"
            )
        raise AdapterError(_unknown(where, name, value, (*READ, *HARMLESS, *REFUSED)))
    return _check_start(where, config.get("init_lora_weights"))


def check_native_fields(where: str, config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse the configuration of a MoSLoRA adapter that a newer version gave another meaning.

    Args:
        where: Where it comes from, for messages.
        config: Of the adapter.
        known: Fields of MoSLoRA's configuration.

    Raises:
        AdapterError: With the field that is unknown and set.
    """
    fields = {*known, *HARMLESS}
    for name, value in config.items():
        if name not in fields and not is_off(value):
            raise AdapterError(_unknown(where, name, value, fields))


def _unknown(where: str, name: str, value: Any, known: Iterable[str]) -> str:
    return (
        f"{where}: {name[:60]}={_short(value)} in its configuration is unknown here, and may change what the "
        "factors mean."
        f"{did_you_mean(name, known)} Update moslora; or, if the field changes nothing that the adapter "
        "computes, remove it "
        "from the configuration."
    )


def _check_start(where: str, value: Any) -> str:
    found = start_of(value)
    if found is None:
        raise AdapterError(
            f"{where}: init_lora_weights={_short(value)} is unknown here, and a start may take a part of the "
            "base weight out "
            f"of it.{did_you_mean(str(value), STARTS)} Update moslora; or, if the start left the base alone, "
            "set it to true "
            "in the configuration."
        )
    name, start = found
    if not start.changes_base or start.subtracted:
        return name if start.subtracted else ""
    raise AdapterError(
        f"{where} began with init_lora_weights={value!r}: {start.changes_base}, so on the base as it is it "
        "computes something "
        f"else than what was trained. {start.way_out}"
    )


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
