"""Adapters of a diffusers pipeline: several models, each with a part of the adapter.

In one file (``diffusers``, ``kohya``) the parts stand beside each other. As PEFT directories they are one directory
for each model, ``OUT/unet``, ``OUT/text_encoder``, which PEFT loads onto that model. At rest the modules' paths start
with the model's name, and ``config["components"]`` holds the configuration of each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from moslora.adapters.factors import Adapter, Form
from moslora.errors import AdapterError

__all__ = [
    "BEGINNINGS",
    "COMPONENTS",
    "by_component",
    "check_writable",
    "folders",
    "join",
    "name_clip",
    "own_clip",
    "split",
]

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")

# Which model of a pipeline a path without its name belongs to: how its modules begin, and no language model's do.
BEGINNINGS = {
    "unet": r"(down_blocks|up_blocks|mid_block)\.|(conv_in|conv_out|time_embedding|add_embedding)\b",
    "transformer": r"(single_|joint_)?transformer_blocks\.|(blocks|layers|(noise|context)_refiner)\.\d+\.(attn\d?"
    r"|attention)\.to_(q|k|v|out)\b|blocks\.\d+\.ffn\.net\.",
    "text_encoder": r"(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.",
}


def split(adapter: Adapter) -> dict[str, Adapter]:
    """Take the adapter of a pipeline apart.

    Args:
        adapter: One that ``join`` made.

    Returns:
        By model, its part, with the paths it has in that model.
    """
    parts: dict[str, Adapter] = {}
    for name, config in adapter.config["components"].items():
        own = {
            path.removeprefix(f"{name}."): factors
            for path, factors in adapter.modules.items()
            if path.startswith(f"{name}.")
        }
        extra = {
            key.removeprefix(f"{name}:"): t for key, t in adapter.extra.items() if key.startswith(f"{name}:")
        }
        parts[name] = Adapter(own, config, extra, adapter.notes)
    return parts


def join(parts: Mapping[str, Adapter]) -> Adapter:
    """Put the parts of a pipeline's adapter together: the inverse of ``split``.

    Args:
        parts: By model, its part.

    Returns:
        One adapter. Other tensors are kept under ``MODEL:NAME``.
    """
    return Adapter(
        {f"{name}.{path}": f for name, part in parts.items() for path, f in part.modules.items()},
        {"components": {name: dict(part.config) for name, part in parts.items()}},
        {f"{name}:{key}": tensor for name, part in parts.items() for key, tensor in part.extra.items()},
        tuple(dict.fromkeys(note for part in parts.values() for note in part.notes)),
    )


def by_component(adapter: Adapter) -> dict[str, Adapter]:
    """Tell which models of a pipeline an adapter belongs to.

    Args:
        adapter: Of a pipeline, or of one of its models alone.

    Returns:
        By model, its part.

    Raises:
        AdapterError: If the modules are not those of a diffusers pipeline.
    """
    if "components" in adapter.config:
        return split(adapter)
    for name, beginning in BEGINNINGS.items():
        if any(re.match(beginning, path) for path in adapter.modules):
            return {name: adapter}
    raise AdapterError(
        f"{next(iter(adapter.modules), 'The adapter')} is not a module of a diffusers pipeline, and this format is for "
        "those alone. For a language model, choose --to lora or --to gguf."
    )


def folders(path: Path) -> dict[str, Path]:
    """Find the directories of a pipeline's adapter.

    Args:
        path: The directory around them.

    Returns:
        By model, its directory; empty if there is none.
    """
    found = {name: path / name for name in COMPONENTS}
    return {name: folder for name, folder in found.items() if (folder / "adapter_config.json").is_file()}


def name_clip(component: str, path: str) -> str:
    """Put back the ``text_model.`` that CLIP's paths have in files and had before transformers 5.

    Args:
        component: A model of a pipeline.
        path: Path in it.

    Returns:
        The path as files have it.
    """
    clip = component.startswith("text_encoder") and re.match(r"encoder\.layers\.", path)
    return f"text_model.{path}" if clip else path


def own_clip(component: str, path: str) -> str:
    """Remove ``text_model.`` from the first text encoder's paths, where transformers 5 no longer has it.

    Args:
        component: A model of a pipeline.
        path: Path in it, as a file has it.

    Returns:
        The path in the model. (SD3's first encoder still has the prefix; its files name three encoders.)
    """
    return path.removeprefix("text_model.") if component == "text_encoder" else path


def check_writable(parts: dict[str, Adapter], allowed: Callable[[Form], bool], where: str) -> None:
    """Refuse what a file of factors alone has no place for.

    Args:
        parts: The adapter, by model.
        allowed: Which forms its readers know.
        where: The format, for messages.

    Raises:
        AdapterError: If there is anything of the kind.
    """
    for component, part in parts.items():
        for key in part.extra:
            raise AdapterError(
                f"{component} also has {key}, which is not a factor (a bias, or of modules_to_save) and has no place "
                f"in {where}. Write --to lora, or train without it."
            )
        for path, factors in part.modules.items():
            if not allowed(factors.form):
                raise AdapterError(
                    f"{component}.{path} is of a form ({factors.form.kind}, {factors.form.groups} groups) that readers "
                    f"of {where} do not know. Write --to lora, or train without it."
                )
