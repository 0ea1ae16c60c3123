"""Which modules ComfyUI applies of the LoRA files that are written here.

Its reader looks for a file's names in a table that it makes of the model (``comfy/lora.py``, ``comfy/utils.py``; seen
in 0.3.64 and at commit 17358c8), logs what it does not find as "lora key not loaded", and continues without. In that
table:

- a **U-Net's** modules have kohya's names, and diffusers' with ``.to_`` turned to ``.processor.to_``, as diffusers
  called them in 2023. Of a file with today's names every attention projection is left out, without an error;
- **every model's** modules have the names of its own code, after ``diffusion_model.`` and, flat, after ``lora_unet_``;
- **FLUX.1's, SD3's, Qwen-Image's and Z-Image's** modules have diffusers' names too; of FLUX.2 its blocks alone, and of
  Lumina 2 none (the last three by the code of mid-2026);
- **CLIP's** modules have both; T5's have none of diffusers'.

So files for it are kohya's for U-Nets, diffusers' for families that it knows whole, and else in the original's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from moslora.adapters.factors import Adapter
from moslora.adapters.formats.families import FAMILIES
from moslora.adapters.formats.pipeline import by_component
from moslora.adapters.formats.placing import families_of
from moslora.errors import AdapterError

__all__ = ["best_format", "has_own_names", "passed_over"]

_ATTENTION = (
    r"attentions\.\d+\.(proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))"
)
_RESNET = r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
_UNET = re.compile(
    rf"((down|up)_blocks\.\d+|mid_block)\.({_ATTENTION}|{_RESNET})|down_blocks\.\d+\.downsamplers\.0\.conv"
    r"|up_blocks\.\d+\.upsamplers\.0\.conv|conv_in|conv_out|(time|add|class)_embedding\.linear_[12]"
)
_CLIP = re.compile(r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])")
_BLOCK = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj)|attn2\.(to_[qkv]|to_out\.0)"
    r"|norm1\.linear|norm1_context\.linear|ff(_context)?\.net\.(0\.proj|2))"
)
_SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|norm\.linear|proj_mlp|proj_out)"
_EMBEDDERS = (
    r"time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]|x_embedder|context_embedder|proj_out"
    r"|norm_out\.linear|pos_embed\.proj"
)
_FLUX2 = (
    r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
_FLUX_OR_SD3 = re.compile(rf"{_BLOCK}|{_SINGLE}|{_EMBEDDERS}|{_FLUX2}")


def best_format(adapter: Adapter) -> str:
    """Return the format of which ComfyUI applies most.

    Args:
        adapter: Of a pipeline, or of one of its models.

    Returns:
        ``"kohya"``, ``"diffusers"`` or ``"original"``.

    Raises:
        AdapterError: If the modules are not those of a diffusers pipeline, or of a transformer whose names in ComfyUI
            are not known.
    """
    parts = by_component(adapter)
    if "unet" in parts:
        return "kohya"
    for component in parts.keys() & {"transformer", "transformer_2"}:
        families = families_of(parts[component].modules)
        if families and all(f.native is not None and not f.in_comfyui for f in families):
            return "original"
        if not any(family.in_comfyui for family in families):
            what = " or ".join(family.name for family in families) or "no known family, by names and sizes"
            known = ", ".join(
                family.name for family in FAMILIES if family.in_comfyui or family.native is not None
            )
            raise AdapterError(
                f"The {component} that the adapter is of is {what}, and ComfyUI's names were looked up for U-Nets, "
                f"{known} "
                'alone. Write --to diffusers, and see there whether it logs "lora key not loaded"; or merge the '
                "adapter."
            )
    return "diffusers"


def has_own_names(adapter: Adapter, format_: str) -> bool:
    """Tell whether a file has names that ComfyUI looks up without a table: those of the model's own code.

    Args:
        adapter: What the file holds.
        format_: How it is named, a key of ``table.FORMATS``.
    """
    return format_ == "original" or (format_ == "kohya" and "transformer" in by_component(adapter))


# Families whose modules have diffusers' names in it, all of them.
_WHOLE = tuple(
    family for family in FAMILIES if family.in_comfyui and family.name in ("Qwen-Image", "Z-Image")
)


def passed_over(adapter: Adapter, format_: str) -> Mapping[str, str]:
    """Say which modules ComfyUI does not apply, or is not known to apply.

    Args:
        adapter: Of a pipeline, or of one of its models.
        format_: ``"kohya"``, ``"diffusers"`` or ``"original"``: how the file has it.

    Returns:
        By the path of such a module, why.

    Raises:
        AdapterError: If the modules are not those of a diffusers pipeline.
    """
    found: dict[str, str] = {}
    for component, part in by_component(adapter).items():
        families = families_of(part.modules) if component.startswith("transformer") else []
        unknown = bool(families) and not any(f.in_comfyui or f.name == "FLUX.2" for f in families)
        for path in part.modules:
            reason = _reason(component, path, format_)
            if unknown and format_ == "diffusers":
                reason = f"it has none of diffusers' names of {families[0].name}"
            if reason:
                found[f"{component}.{path}"] = reason
    return found


def _reason(component: str, path: str, format_: str) -> str:
    if component == "unet":
        if format_ == "diffusers" and ".to_" in path:
            return "it looks for attention projections of a U-Net under names that diffusers had in 2023"
        return "" if _UNET.fullmatch(path) else "it has no name for this module of a U-Net"
    if component.startswith("text_encoder"):
        return "" if _CLIP.fullmatch(path) else "of text encoders it has names for CLIP's layers alone"
    if format_ != "diffusers":
        return ""  # names of the model's own code
    if _FLUX_OR_SD3.fullmatch(path) or any(family.names(path, False) for family in _WHOLE):
        return ""
    return "no module of FLUX.1, SD3, Qwen-Image or Z-Image, for which its names were looked up"
