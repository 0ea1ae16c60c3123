"""Kohya's LoRA files: what ComfyUI, A1111 and sd-scripts read, in one ``.safetensors``.

A module's path has its dots turned to underscores and a prefix for the model: ``lora_unet_``, ``lora_te1_``,
``lora_te2_``. It holds ``lora_down`` (A), ``lora_up`` (B) and ``alpha``, and in LoCon files of convolutions maybe
``lora_mid``, a core with ``ΔW = up · mid · down``. Files that MoSLoRA's authors converted have their mixers as
``lora_downB``. Files of many models are read (``image_file``). Written are U-Nets', with diffusers' names, and
transformers', with those of the model's original code (``original_names``), which sd-scripts and ComfyUI know.

diffusers reads one alpha for a whole file: where ranks differ, its converter loses the others, and the scale of those
modules is wrong without a word (0.42.1). So all modules get one rank, padded with zeros, and alpha = r.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import original, through_diffusers
from moslora.adapters.formats.image_file import read
from moslora.adapters.formats.layout import as_stored
from moslora.adapters.formats.lora import flatten
from moslora.adapters.formats.pipeline import by_component, check_writable, name_clip
from moslora.adapters.formats.tensors import save_tensors
from moslora.adapters.formats.unet_names import in_unet
from moslora.adapters.ranks import pad
from moslora.errors import AdapterError

__all__ = ["read", "read_with_diffusers", "write"]

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def write(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a kohya file, folded.

    Args:
        adapter: Of a Stable Diffusion pipeline with a UNet, or of one of its models; or of a transformer alone.
        path: The file.
        dtype: Of its tensors.

    Raises:
        AdapterError: If programs that read kohya files would refuse it or read it wrongly.
        OSError: If it cannot be written.
    """
    adapter.refuse_magnitudes(
        "This file would be read by programs that do not agree on it, so it is not written"
    )
    adapter.refuse_biases("A kohya file has no place for it")
    if by_component(adapter).keys() == {"transformer"}:
        modules, _ = original.renamed_transformer(adapter, "a kohya file", is_flat=True)
        _save(path, {f"lora_unet_{_flat(name)}": factors for name, factors in modules.items()}, dtype)
        return
    parts = {name: flatten(part) for name, part in by_component(adapter).items()}
    strange = sorted(parts.keys() - PREFIXES.keys())
    if strange:
        raise AdapterError(
            f"The adapter is of a {strange[0]} among others, and a kohya file is written for a U-Net with its text "
            "encoders, or for a transformer alone. Export ADAPTER/transformer by itself, or write --to diffusers."
        )
    check_writable(
        parts,
        lambda form: form.kind == "linear" or (len(form.kernel) == 2 and form.groups == 1),
        "a kohya file",
    )
    for module in parts["unet"].modules if "unet" in parts else ():
        if in_unet(module, False) != module:
            raise AdapterError(
                f"unet.{module} is not a module of a U-Net of Stable Diffusion as diffusers names it, and programs "
                "that read kohya files look for those alone. Write --to diffusers, or train without it."
            )
    for component, part in parts.items():
        attention = {path.rpartition(".")[2] for path in part.modules if ".self_attn." in path}
        if component != "unet" and attention and "out_proj" not in attention:
            raise AdapterError(
                f"{component} has {', '.join(sorted(attention))} adapted and no out_proj. diffusers' reader of "
                "kohya files then passes over them without a word (0.42.1). Adapt out_proj too; or write the text "
                "encoder's adapter alone --to diffusers, which ComfyUI applies whole, beside a kohya file of the U-Net."
            )
    r = max(factors.r for part in parts.values() for factors in part.modules.values())
    named: dict[str, Factors] = {}
    for component, part in parts.items():
        prefix = PREFIXES[component]
        for module, factors in part.modules.items():
            flat = f"{prefix}_{_flat(name_clip(component, module))}"
            if flat in named:
                raise AdapterError(f"{component}.{module} has the same kohya name as another module, {flat}.")
            named[flat] = pad(factors, r)
    _save(path, named, dtype)


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _save(path: Path, modules: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Write factors, all of one rank, under their kohya names."""
    r = next(iter(modules.values())).r
    tensors: dict[str, Tensor] = {}
    for flat, factors in modules.items():
        stored = as_stored(factors)
        tensors[f"{flat}.lora_down.weight"] = stored["A"].to(dtype)
        tensors[f"{flat}.lora_up.weight"] = stored["B"].to(dtype)
        tensors[f"{flat}.alpha"] = torch.tensor(float(r))
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(r),
        "ss_network_alpha": str(r),
    }
    save_tensors(path, tensors, metadata)


def read_with_diffusers(path: Path, like: Adapter) -> tuple[Adapter, str]:
    """Read a kohya file as diffusers does: its converter, its configuration, its scale of every module.

    Args:
        path: The file.
        like: What was written.

    Returns:
        What diffusers understood, with the paths of ``like``; and the name of the reader. This package's own reader
        stands in where diffusers is not installed.
    """
    if by_component(like).keys() == {"transformer"}:
        return original.through_loader(path, like, "kohya")
    if not through_diffusers.is_installed():
        return through_diffusers.with_paths_of(read(path), like), "moslora"
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    tensors, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(str(path))
    return through_diffusers.understood(tensors, alphas, None, like)
