"""Checkpoints of MoSLoRA's authors and of PEFT pull request 2294: a mixer inside what calls itself LoRA.

Both say ``peft_type: LORA`` and hold the mixer beside ``lora_A`` and ``lora_B``: ``lora_AB.weight`` in the authors'
three forks of PEFT, ``lora_mixer.weight`` in the pull request, each the weight of a bias-free linear layer, so M
itself. Stock PEFT drops it and runs B·A, which is another function: such a directory is read here and never written.

Their forks put mixers into linear layers only; a convolution or an embedding is plain LoRA beside them, and so is a
linear layer that ``lora_use_mixer_pattern`` names. Without a mixer they compute B·A, so M is the identity.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslora.adapters.factors import Adapter
from moslora.adapters.formats.building import build_adapter
from moslora.adapters.formats.configuration import SHARED
from moslora.adapters.formats.directory import WEIGHTS, read_config, read_tensors
from moslora.adapters.formats.layout import group_factors
from moslora.adapters.formats.lora_fields import CONVERT, check_fields
from moslora.adapters.formats.tensors import check_tensors
from moslora.bounded import read_header
from moslora.errors import AdapterError

__all__ = ["WARNING", "carries_mixer", "check_mixers", "read"]

PICKLED = "adapter_model.bin"
PARTS = {"lora_A": "A", "lora_AB": "M", "lora_mixer": "M", "lora_B": "B"}
EMBEDDING_PARTS = {"lora_embedding_A": "A", "lora_embedding_B": "B"}
FIELDS = ("lora_use_mixer", "lora_use_mixer_pattern", "use_moslora")
MIXERS = tuple(f".{part}." for part, letter in PARTS.items() if letter == "M")
WARNING = (
    "It calls itself LORA but carries mixers: stock PEFT would drop them and run B·A, which is wrong. Use what is "
    "written from it instead."
)


def carries_mixer(folder: Path) -> bool:
    """Tell whether a directory of type LORA holds mixers, from the names of its tensors.

    Args:
        folder: The directory.

    Returns:
        Whether ``read`` is for it. A damaged file has none; reading it says what is wrong.
    """
    try:
        if (folder / WEIGHTS).is_file():
            return _any_mixer(read_header(folder / WEIGHTS).tensors)
        return (folder / PICKLED).is_file() and _any_mixer(_unpickle(folder / PICKLED))
    except (OSError, ValueError):
        return False


def _any_mixer(names: Iterable[str]) -> bool:
    return any(mark in name for name in names for mark in MIXERS)


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Read a pickle of tensors and nothing else; code in it is not run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:
        raise AdapterError(
            f"{path} is damaged, or holds more than tensors, and is not opened further: {str(error)[:200]}"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise AdapterError(f"{path} is not a table of named tensors, which an adapter's weights are.")
    return check_tensors(path, found)


def check_mixers(
    where: str, modules: Mapping[str, Mapping[str, Tensor]], wanted: Callable[[str], bool] = lambda _: True
) -> None:
    """Refuse linear layers that lost their mixer.

    Args:
        where: Where they come from, for messages.
        modules: Tensors by letter, by path, of all modules of one model but embeddings. Where none has a mixer, it is
            a plain LoRA.
        wanted: Whether a linear layer has one by the configuration.

    Raises:
        AdapterError: With the module.
    """
    if not any("M" in own for own in modules.values()):
        return
    for name, own in modules.items():
        if "M" not in own and "A" in own and own["A"].ndim == 2 and wanted(name):
            raise AdapterError(
                f"{where}: {name} has no mixer while other linear layers have one, and nothing says that it was "
                "trained without (lora_use_mixer_pattern in an adapter_config.json would). Take the file from before "
                "it was edited."
            )


def _has_mixer(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether the authors' fork puts a mixer into a linear layer; names are looked up by other patterns' keys."""
    chosen = config.get("lora_use_mixer_pattern")
    if not isinstance(chosen, dict):
        return True
    names = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    key = next((key for key in names if re.match(rf".*\.{key}$", name)), name)
    return bool(chosen.get(key, config.get("lora_use_mixer", True)))


def read(folder: Path) -> Adapter:
    """Read such a directory.

    Args:
        folder: The directory, with safetensors or a pickle of tensors.

    Returns:
        The adapter with its mixers, in the dtype of the file.

    Raises:
        AdapterError: If it is not whole, or has other variants of LoRA besides.
    """
    config = read_config(folder)
    start = check_fields(str(folder), config, also=FIELDS)
    if start:
        raise AdapterError(
            f"{folder} has mixers and began with init_lora_weights={start!r}; how the program that trained it "
            "runs both "
            f"together is not known here. {CONVERT}"
        )
    in_safetensors = (folder / WEIGHTS).is_file()
    tensors = read_tensors(folder) if in_safetensors else _unpickle(folder / PICKLED)
    found = group_factors(tensors, PARTS, EMBEDDING_PARTS, config)
    strange = [key for key in found.rest if ".lora_" in key]
    if strange:
        raise AdapterError(f"{folder} holds {strange[0]}, which is not a factor of MoSLoRA's authors.")
    linear = {name: own for name, own in found.modules.items() if name not in found.embeddings}
    check_mixers(str(folder), linear, lambda name: _has_mixer(config, name))
    kept = {name: config[name] for name in SHARED if name in config}
    return build_adapter(folder, {**kept, "mixer": "kaiming"}, found)
