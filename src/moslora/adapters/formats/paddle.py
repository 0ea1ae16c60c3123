"""PaddleNLP's LoRA directories, with or without a mixer (``lora_use_mixer``).

Paddle stores a weight as ``(in, out)``: ``lora_A (in, r)``, ``lora_AB (r, r)`` and ``lora_B (r, out)``, with
``ΔW = s·A·AB·B`` in that layout (PaddleNLP pull request 9331). Everything is transposed here. Only safetensors are
read; Paddle's own ``.pdparams`` are pickles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moslora.adapters.factors import Adapter
from moslora.adapters.formats.building import build_adapter
from moslora.adapters.formats.layout import Found
from moslora.adapters.formats.lora_fields import is_off
from moslora.adapters.formats.tensors import load_tensors
from moslora.bounded import read_json
from moslora.errors import AdapterError

__all__ = ["CONFIG", "read"]

CONFIG = "lora_config.json"
# PaddleNLP's LoRAConfig. What is neither read nor harmless refuses the directory, unless its value switches nothing on.
READ = ("r", "lora_alpha", "rslora", "scaling", "lora_dropout", "lora_use_mixer", "base_model_name_or_path")
HARMLESS = (
    "target_modules",  # each has its factors in the file
    "trainable_modules",  # what was trained whole is in the file, which is then refused for it
    "trainable_bias",
    "merge_weights",  # how it is run or trained
    "tensor_parallel_degree",
    "dtype",
    "head_dim",
    "lora_plus_scale",
    "use_quick_lora",
    "lorapro",
)
REFUSED = {
    "pissa": "PiSSA took its start out of the base weight",
    "loraga": "LoRA-GA took its start out of the base weight",
    "use_mora": "MoRA has a square matrix in the place of B·A",
    "do_qat": "the factors were trained on a weight that is quantized",
    "enable_lora_list": "parts of a joint projection have factors of their own",
}
PARTS = {"lora_A": "A", "lora_AB": "M", "lora_B": "B"}


def read(folder: Path) -> Adapter:
    """Read a directory that PaddleNLP saved with ``safetensors``.

    Args:
        folder: The directory, with ``lora_config.json`` and one ``.safetensors`` file.

    Returns:
        The adapter. A first ``llama.`` of a module's path, or another family's name before ``layers.``, becomes
        transformers' ``model.``.

    Raises:
        AdapterError: If it is not whole.
    """
    try:
        config: Any = read_json(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int):
        raise AdapterError(
            f"{folder / CONFIG} has no rank r, so it is not a LoRA configuration of PaddleNLP."
        )
    _check_fields(folder / CONFIG, config)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise AdapterError(
            f"{folder} has {len(files)} .safetensors files, one is needed. PaddleNLP writes one where it saves with "
            "safe_serialization; .pdparams files are pickles, which are not opened."
        )
    found = Found({}, {}, set())
    for key, tensor in load_tensors(files[0]).items():
        path, _, part = key.rpartition(".")
        if part not in PARTS or tensor.ndim != 2:
            raise AdapterError(
                f"{files[0]}: {key} {tuple(tensor.shape)} is not a factor of PaddleNLP's LoRA."
            )
        module = re.sub(r"^[a-z0-9_]+\.(?=layers\.)", "model.", path)
        found.modules.setdefault(module, {})[PARTS[part]] = tensor.T.contiguous()
    without = [name for name, factors in found.modules.items() if "M" not in factors]
    if without and config.get("lora_use_mixer"):
        raise AdapterError(f"{files[0]}: {without[0]} lacks its mixer, lora_AB.")
    shared = {
        "r": config["r"],
        "lora_alpha": config.get("lora_alpha", 8),
        "use_rslora": bool(config.get("rslora")),
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in found.modules}),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
    }
    adapter = build_adapter(folder, {**shared, "mixer": "kaiming"}, found)
    said, scale = config.get("scaling"), next(iter(adapter.modules.values())).scale
    if isinstance(said, int | float) and not math.isclose(said, scale, rel_tol=1e-6):
        raise AdapterError(
            f"{folder / CONFIG} says that the scale is {said:g}; by r, lora_alpha and rslora it is {scale:g}. "
            "Save the adapter again, or correct the one that is wrong."
        )
    return adapter


def _check_fields(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration under which the factors are not those of ``s·A·AB·B`` on the base."""
    for name, value in config.items():
        if name in READ or name in HARMLESS or is_off(value):
            continue
        reason = REFUSED.get(name, "it is unknown here, and may change what the factors mean")
        raise AdapterError(
            f"{path}: {name} is set: {reason}. Merge the adapter into its base with PaddleNLP"
            + (
                "."
                if name in REFUSED
                else "; or, if it changes nothing that is computed, remove it from the file."
            )
        )
