"""The names of an adapter's tensors, read as PEFT would have written them.

Programs save the state of a model that something is wrapped around, and the wrapper's name stays in the keys. PEFT
finds no module of such a name and leaves the adapter at zero without a word. Here names are put right once, on
reading; what was put right is said, and where a base is known it decides (``adapters.fit``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moslora.errors import AdapterError

__all__ = ["KEY_PREFIX", "Names", "normalize", "notes_on_wrappers", "without_wrappers"]

KEY_PREFIX = "base_model.model."

# Parts of a path that no module of a model has by itself → what puts them there.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
    "_original_module": "Lightning",
}
WRAPPER = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")
# The same in a regular expression or a pattern's key.
WRAPPER_IN_PATTERN = re.compile(rf"(?:{'|'.join(WRAPPERS)})\\?\.")
# What DistributedDataParallel and DataParallel put before all names; a module may be called so too.
MODULE = "module."
# Classes that PEFT notes for a base which is wrapped, and so no model's own.
WRAPPING_CLASSES = {
    "DistributedDataParallel",
    "DataParallel",
    "OptimizedModule",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
}

FACTOR = r"(?:lora|moslora)_(?:embedding_)?(?:[ABM]|AB|mixer|magnitude_vector|magnitude|start_[ABM])"
# A factor's key, and the adapter's name where that was left in it.
KEY = re.compile(rf"(?P<path>.*)\.(?P<part>{FACTOR})(?P<adapter>\.[^.]+)??(?P<end>\.weight|\.bias)?")
# PEFT keeps these without .weight.
BARE = re.compile(r"(?:lora|moslora)_embedding_[ABM]|lora_magnitude_vector")
SAVED = re.compile(r"(?P<path>.*)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<end>.+)")


@dataclass(frozen=True)
class Names:
    """Tensors of an adapter by the names that PEFT would have given them.

    Attributes:
        tensors: By name, as ``base_model.model.PATH.PART.weight``.
        notes: What was put right, as sentences; empty where nothing was.
        stripped: What was taken from the beginning of every path and may be a module of the base after all.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    stripped: str = field(default="")


def normalize(tensors: Mapping[str, Tensor], config: Mapping[str, Any], marks: Iterable[str]) -> Names:
    """Name an adapter's tensors as PEFT would have named them.

    Args:
        tensors: By their names in the file.
        config: The adapter's configuration.
        marks: Parts that stand for a factor, as ``lora_A``.

    Returns:
        The tensors; as they are, where there is nothing to put right.

    Raises:
        AdapterError: If two tensors come to have one name, or the file has several adapters.
    """
    known = set(marks)
    parts = {key: match["part"] for key in tensors if (match := KEY.fullmatch(key))}
    if not known.intersection(parts.values()):
        return Names(tensors)
    factors = list(parts)
    renamed = {key: key for key in tensors}
    notes = []
    if inner := notes_on_wrappers(tensors):
        renamed = {key: WRAPPER.sub("", name) for key, name in renamed.items()}
        notes += inner
    notes += _without_adapter_name(renamed, factors)
    notes += _with_prefix(renamed, factors)
    stripped, more = _without_outer(renamed, factors, config)
    return Names(_each_once(tensors, renamed), (*notes, *more), stripped)


def notes_on_wrappers(keys: Iterable[str]) -> list[str]:
    """Say which names in keys are wrappers' and never a module's own.

    Args:
        keys: Names of tensors.

    Returns:
        A sentence, if there are such.
    """
    used = sorted({wrapper for key in keys for wrapper in WRAPPERS if f".{wrapper}." in f".{key}"})
    if not used:
        return []
    return [_say([f"{w}." for w in used], ", ".join(dict.fromkeys(WRAPPERS[w] for w in used)))]


def _each_once(tensors: Mapping[str, Tensor], renamed: Mapping[str, str]) -> dict[str, Tensor]:
    """Give tensors their new names; no two come to have one."""
    named: dict[str, Tensor] = {}
    for key, name in renamed.items():
        if name in named:
            raise AdapterError(
                f"Two tensors of the adapter are {name} once wrappers' names are taken out, {key} being one. Save the "
                "adapter again from the unwrapped model."
            )
        named[name] = tensors[key]
    return named


def _say(parts: Iterable[str], what: str) -> str:
    return f"Names in the file have {', '.join(parts)} ({what}), which PEFT does not find in a base; read without."


def _without_adapter_name(renamed: dict[str, str], factors: Iterable[str]) -> list[str]:
    """Take an adapter's name out of the keys, ``lora_A.default.weight``; only PEFT's models in memory have it."""
    matches = {key: match for key in factors if (match := KEY.fullmatch(renamed[key]))}
    names = {(match["adapter"] or "").removeprefix(".") for match in matches.values()}
    names -= {"", "weight", "bias"}
    if not names:
        return []
    if len(names) > 1:
        raise AdapterError(
            f"The file holds {len(names)} adapters, {', '.join(sorted(names))}. Save each by itself with "
            "save_pretrained(folder, selected_adapters=[name])."
        )
    for key, match in matches.items():
        if match["adapter"]:
            end = "" if BARE.fullmatch(match["part"]) else match["end"] or ""
            renamed[key] = f"{match['path']}.{match['part']}{end}"
    for key, name in renamed.items():
        if saved := SAVED.fullmatch(name):
            renamed[key] = f"{saved['path']}.{saved['end']}"
    return [_say([f".{name}." for name in names], "the adapter's name in the model")]


def _with_prefix(renamed: dict[str, str], factors: Iterable[str]) -> list[str]:
    """Let every name begin with PEFT's prefix, once."""
    notes = []
    own = [renamed[key] for key in factors]
    outer = {name.partition(KEY_PREFIX)[0] for name in own if f".{KEY_PREFIX}" in f".{name}"}
    is_all = all(f".{KEY_PREFIX}" in f".{name}" for name in own)
    if is_all and len(outer) == 1 and outer != {""}:
        (wrapper,) = outer
        for key, name in renamed.items():
            renamed[key] = name.removeprefix(wrapper)
        notes.append(_say([wrapper], "a wrapper around the PEFT model"))
    if not any(name.startswith(KEY_PREFIX) for name in renamed.values()):
        for key, name in renamed.items():
            renamed[key] = f"{KEY_PREFIX}{name}"
        notes.append(
            f"Names in the file lack {KEY_PREFIX}, without which PEFT loads none of them; read as if it stood there."
        )
    return notes


def _without_outer(
    renamed: dict[str, str], factors: Iterable[str], config: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Take away what stands before all paths: DDP's ``module.``, and PEFT's prefix a second time."""
    own = list(factors)
    stripped, notes = "", []
    mapping = config.get("auto_mapping")
    kind = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    # A base of a class of its own may have a module of this name; a wrapper's class is not such a one.
    is_wrapped = kind is None or kind in WRAPPING_CLASSES
    candidates = {
        KEY_PREFIX: "PEFT's prefix a second time",
        **({MODULE: "DistributedDataParallel"} if is_wrapped else {}),
    }
    found = True
    while found:
        found = False
        for outer, what in candidates.items():
            start = f"{KEY_PREFIX}{outer}"
            if not all(renamed[key].startswith(start) for key in own):
                continue
            for key, name in renamed.items():
                if name.startswith(start):
                    renamed[key] = KEY_PREFIX + name.removeprefix(start)
            stripped, found = stripped + outer, True
            notes.append(_say([outer], what))
    return stripped, list(dict.fromkeys(notes))


def without_wrappers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take wrappers' names out of what a configuration says of modules.

    Args:
        config: An adapter's configuration.

    Returns:
        The same with names and patterns of modules as the normalized paths have them.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return WRAPPER_IN_PATTERN.sub("", value)
        if isinstance(value, list | tuple | set):
            return [clean(one) for one in value]
        return {clean(key): one for key, one in value.items()} if isinstance(value, dict) else value

    names = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
    patterns = ("rank_pattern", "alpha_pattern")
    return {**config, **{name: clean(config[name]) for name in (*names, *patterns) if config.get(name)}}
