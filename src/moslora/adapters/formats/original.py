"""Files with the names of a model's own code: what ComfyUI applies of every model, and ai-toolkit and others write.

Keys are ``diffusion_model.``, the module's path in the code that the model was published with (of Z-Image in
diffusers, as ai-toolkit has it: both ComfyUI and diffusers look for that), ``lora_A`` and ``lora_B``, without an alpha,
which readers take for the rank. Some take one rank for the whole file (diffusers 0.42.1: the scale of modules of
another would be wrong), so all modules get one, padded with zeros.

Files of many programs in these names are read (``image_file``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import through_diffusers
from moslora.adapters.formats.family import Family
from moslora.adapters.formats.image_file import read
from moslora.adapters.formats.layout import as_stored
from moslora.adapters.formats.lora import flatten
from moslora.adapters.formats.original_names import family_of, in_original_names
from moslora.adapters.formats.pipeline import by_component, check_writable
from moslora.adapters.formats.tensors import save_tensors
from moslora.adapters.ranks import pad
from moslora.errors import AdapterError

__all__ = ["read", "read_with_diffusers", "renamed_transformer", "through_loader", "write"]


def renamed_transformer(adapter: Adapter, where: str, *, is_flat: bool) -> tuple[dict[str, Factors], Family]:
    """Fold the adapter of a transformer, and give its modules their original names.

    Args:
        adapter: Of a transformer alone.
        where: The format, for messages.
        is_flat: Whether paths will have underscores for dots.

    Returns:
        Factors of one rank by original path, and the model's family.

    Raises:
        AdapterError: If there are other models, or a module has no name in the original.
    """
    adapter.refuse_magnitudes(
        f"In {where} a magnitude would be of layers that the original has in one, so it is not written"
    )
    adapter.refuse_biases(f"{where[0].upper()}{where[1:]} has no place for it")
    parts = by_component(adapter)
    others = sorted(parts.keys() - {"transformer"})
    if others:
        raise AdapterError(
            f"The adapter is of {', '.join(others)}, and {where} is written for a transformer alone. Export "
            "ADAPTER/transformer by itself, and the text encoders --to diffusers."
        )
    check_writable(parts, lambda form: form.kind == "linear", where)
    family = family_of(parts["transformer"])
    folded = flatten(parts["transformer"])
    is_split = family.is_split and not is_flat
    modules = dict(folded.modules) if is_split else in_original_names(folded, family)
    r = max(factors.r for factors in modules.values())
    return {name: pad(factors, r) for name, factors in modules.items()}, family


def write(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a file in the original's names, folded.

    Args:
        adapter: Of a transformer.
        path: The file.
        dtype: Of its tensors.

    Raises:
        AdapterError: If its modules have no names there, or it holds more than factors of linear layers.
        OSError: If it cannot be written.
    """
    modules, _ = renamed_transformer(adapter, "a file of original names", is_flat=False)
    tensors = {}
    for name, factors in modules.items():
        stored = as_stored(factors)
        for letter in ("A", "B"):
            tensors[f"diffusion_model.{name}.lora_{letter}.weight"] = stored[letter].to(dtype)
    save_tensors(path, tensors, {"format": "pt"})


def read_with_diffusers(path: Path, like: Adapter) -> tuple[Adapter, str]:
    """Read such a file as the family's pipeline in diffusers does, where that knows these names.

    Args:
        path: The file.
        like: What was written.

    Returns:
        What was understood, with the paths of ``like``; and the name of the reader. This package's own reader stands
        in where diffusers is not installed or does not read the family's original names.
    """
    return through_loader(path, like, "original")


def through_loader(path: Path, like: Adapter, format_: str) -> tuple[Adapter, str]:
    """Read a transformer's file through its family's loader in diffusers; see ``read_with_diffusers``.

    Args:
        path: The file.
        like: What was written.
        format_: ``"original"`` or ``"kohya"``.
    """
    found, reader = _understood(path, like, format_)
    # The rest of a fused projection of which only a part was adapted: zero, and no module of the adapter.
    modules = {name: f for name, f in found.modules.items() if name in like.modules or not f.is_zero()}
    return replace(found, modules=modules), reader


def _understood(path: Path, like: Adapter, format_: str) -> tuple[Adapter, str]:
    family = family_of(by_component(like)["transformer"])
    if format_ not in family.converted or not through_diffusers.is_installed():
        return through_diffusers.with_paths_of(read(path), like), "moslora"
    from diffusers.loaders import lora_pipeline

    loader = getattr(lora_pipeline, family.loader)
    options: dict[str, Any] = {"return_alphas": True} if loader is lora_pipeline.FluxLoraLoaderMixin else {}
    tensors, *alphas, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True, **options)
    return through_diffusers.understood(tensors, next(iter(alphas), None) or None, metadata, like)
