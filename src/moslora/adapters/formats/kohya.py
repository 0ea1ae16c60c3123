"""Kohya's LoRA files: what ComfyUI, A1111 and sd-scripts read, in one ``.safetensors``.

A module's path has its dots turned to underscores and a prefix for the model: ``lora_unet_``, ``lora_te1_``,
``lora_te2_``. It holds ``lora_down`` (A), ``lora_up`` (B) and ``alpha``, and in LoCon files of convolutions maybe
``lora_mid``, a core with ``ΔW = up · mid · down``. Files that MoSLoRA's authors converted have their mixers as
``lora_downB``. Three ways to name modules are read: diffusers', the original UNet's (``input_blocks``, SDXL as
sd-scripts trains it), and FLUX's with its fused projections. diffusers' names are written.

diffusers reads one alpha for a whole file: where ranks differ, its converter loses the others, and the scale of those
modules is wrong without a word (0.42.1). So all modules get one rank, padded with zeros, and alpha = r.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moslora.adapters.factors import LINEAR, Adapter, Factors, Form
from moslora.adapters.formats import through_diffusers
from moslora.adapters.formats.layout import as_stored
from moslora.adapters.formats.lora import flatten
from moslora.adapters.formats.official import check_mixers
from moslora.adapters.formats.pipeline import by_component, check_writable, join, name_clip, own_clip
from moslora.adapters.formats.tensors import load_tensors, read_whole_header, save_tensors
from moslora.adapters.ranks import pad
from moslora.errors import AdapterError

__all__ = ["is_kohya", "read", "read_with_diffusers", "write"]

PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
}
KEY = re.compile(r"(lora_unet|lora_te[12]?)_([A-Za-z0-9_]+)\.(.+)")
PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "core", "alpha": "alpha"}
PARTS["lora_downB.weight"] = "M"
OTHER_METHODS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "diff": "full weights",
}

# Names that contain underscores, or stand alone, between the dots of a path.
_WORDS = """
down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn1 attn2
to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj ff ff_context net proj proj_in proj_out proj_mlp
conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding class_embedding
linear linear_1 linear_2 cond_proj
input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op out time_embed label_emb
double_blocks single_blocks img_attn txt_attn qkv img_mlp txt_mlp img_mod txt_mod lin linear1 linear2 modulation
text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 text_projection
block layer SelfAttention q k v o DenseReluDense wi wi_0 wi_1 wo"""
WORDS = frozenset(_WORDS.split())


def is_kohya(names: list[str]) -> bool:
    """Tell kohya's files by the names of their tensors."""
    return any(KEY.fullmatch(name) for name in names)


def _path(flat: str) -> str:
    """Turn underscores back to the dots they were, by the known names, the longest first."""
    words, parts, start = flat.split("_"), [], 0
    while start < len(words):
        for end in range(min(start + 3, len(words)), start, -1):
            name = "_".join(words[start:end])
            if name in WORDS or (end == start + 1 and name.isdigit()):
                parts.append(name)
                start = end
                break
        else:
            raise AdapterError(
                f"{flat} is of no known model: {words[start]!r} is the name of no module in a UNet of Stable "
                "Diffusion, in FLUX, CLIP or T5. Export the adapter from its trainer in diffusers' format and import "
                "that."
            )
    return ".".join(parts)


RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}


def _from_original(path: str) -> str:
    """Rename a module of the original UNet to diffusers': two resnets in every block down, three up."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(.+)", path)
    if not found:
        return path
    side, rest = found.groups()
    if side == "middle_block":
        index, _, rest = rest.partition(".")
        return f"{MIDDLE[index]}.{RESNET.get(rest, rest)}" if index in MIDDLE else path
    index, inner, rest = (*rest.split(".", 2), "", "")[:3]
    if not (index.isdigit() and inner.isdigit() and rest):
        return path
    position = int(index) - (side == "input_blocks")
    block, layer = divmod(position, 3)
    if side == "input_blocks":
        if rest == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
        kind = "attentions" if inner == "1" else "resnets"
        return f"down_blocks.{block}.{kind}.{layer}.{RESNET.get(rest, rest)}"
    if rest == "conv":
        return f"up_blocks.{block}.upsamplers.0.conv"
    kind = "attentions" if inner == "1" else "resnets"
    return f"up_blocks.{block}.{kind}.{layer}.{RESNET.get(rest, rest)}"


# FLUX: of the original's module its rows, in units of the hidden size, go to these modules of diffusers.
FLUX_DOUBLE = {
    "img_attn.qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
    "txt_attn.qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
    "img_attn.proj": (("attn.to_out.0", 1),),
    "txt_attn.proj": (("attn.to_add_out", 1),),
    "img_mlp.0": (("ff.net.0.proj", 1),),
    "img_mlp.2": (("ff.net.2", 1),),
    "txt_mlp.0": (("ff_context.net.0.proj", 1),),
    "txt_mlp.2": (("ff_context.net.2", 1),),
    "img_mod.lin": (("norm1.linear", 1),),
    "txt_mod.lin": (("norm1_context.linear", 1),),
}
FLUX_SINGLE = {
    "linear1": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)),
    "linear2": (("proj_out", 1),),
    "modulation.lin": (("norm.linear", 1),),
}


def _place(component: str, path: str, factors: Factors) -> dict[str, Factors]:
    """Say where in diffusers' models the factors of a kohya module belong."""
    if component != "unet":
        return {f"{component}.{own_clip(component, path)}": factors}
    flux = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", path)
    if not flux:
        return {f"unet.{_from_original(path)}": factors}
    side, index, rest = flux.groups()
    shares = (FLUX_DOUBLE if side == "double" else FLUX_SINGLE).get(rest)
    total = sum(share for _, share in shares or ())
    if not shares or factors.B.shape[0] % total:
        raise AdapterError(f"{path} with {factors.B.shape[0]} outputs is not an adapted module of FLUX.")
    unit, start, placed = factors.B.shape[0] // total, 0, {}
    stem = f"transformer.{'single_' if side == 'single' else ''}transformer_blocks.{index}"
    for name, share in shares:
        placed[f"{stem}.{name}"] = replace(factors, B=factors.B[start : start + share * unit].contiguous())
        start += share * unit
    return placed


def _factors(where: str, parts: dict[str, Tensor], given_alpha: float | None) -> Factors:
    """Put one module together; a core is folded into A."""
    missing = {"A", "B"} - parts.keys()
    if missing:
        names = " and ".join(name for name, letter in PARTS.items() if letter in missing)
        raise AdapterError(f"{where} lacks {names}.")
    A, B = parts["A"], parts["B"]
    if A.ndim not in (2, 3, 4, 5) or B.ndim != A.ndim or B.shape[2:].numel() != 1:
        raise AdapterError(f"{where}: {tuple(A.shape)} and {tuple(B.shape)} are not factors of one module.")
    r, dtype = A.shape[0], torch.promote_types(A.dtype, torch.float32)
    alpha = float(parts["alpha"]) if "alpha" in parts else float(r if given_alpha is None else given_alpha)
    if "core" in parts:
        core = parts["core"]
        if core.ndim != A.ndim or core.shape[1] != r or A.shape[2:].numel() != 1 or "M" in parts:
            raise AdapterError(f"{where}: lora_mid {tuple(core.shape)} does not fit {tuple(A.shape)}.")
        # A' = core · A: a convolution of the core's kernel after one of kernel 1.
        A = torch.einsum("pq...,qi->pi...", core.double(), A.flatten(1).double()).to(dtype)
    try:
        form = Form("conv", tuple(A.shape[2:])) if A.ndim > 2 else LINEAR
        M = parts["M"].to(A.dtype) if "M" in parts else torch.eye(A.shape[0], dtype=A.dtype)
        return Factors(A.flatten(1), M, B.flatten(1).to(A.dtype), alpha / r, form)
    except ValueError as error:
        raise AdapterError(f"{where}: {error}") from error


def read(path: Path, alpha: float | None = None) -> Adapter:
    """Read a kohya file.

    Args:
        path: The ``.safetensors`` file.
        alpha: What modules that have none were trained with; None for their rank, as its readers have it.

    Returns:
        The adapter, with diffusers' paths below ``unet``, ``transformer``, ``text_encoder`` and ``text_encoder_2``.

    Raises:
        AdapterError: If it is damaged, of another method, or of an unknown model, or every module has its alpha and one
            is given.
    """
    names = read_whole_header(path).tensors
    grouped: dict[tuple[str, str], dict[str, Tensor]] = {}
    tensors = load_tensors(path)
    for name in names:
        found = KEY.fullmatch(name)
        if not found:
            raise AdapterError(f"{path}: {name} is not a key of a kohya file, while others are.")
        prefix, flat, part = found.groups()
        if part not in PARTS:
            method = next(
                (m for mark, m in OTHER_METHODS.items() if part.startswith(mark)), "an unknown method"
            )
            raise AdapterError(
                f"{path}: {name} is of {method}, whose update is not s·B·A. Merge it into its base in the program that "
                "trained it."
            )
        if not tensors[name].is_floating_point() and part != "alpha":
            raise AdapterError(f"{path}: {name} is {tensors[name].dtype}, which is not a factor.")
        if part == "alpha" and tensors[name].numel() != 1:
            raise AdapterError(f"{path}: {name} has {tensors[name].numel()} values; an alpha is one number.")
        grouped.setdefault((PREFIXES[prefix], flat), {})[PARTS[part]] = tensors[name]
    if alpha is not None and all("alpha" in parts for parts in grouped.values()):
        raise AdapterError(f"{path} says its alpha itself, module by module. Leave --alpha out.")
    for component in {component for component, _ in grouped}:
        check_mixers(str(path), {flat: parts for (c, flat), parts in grouped.items() if c == component})
    modules: dict[str, Factors] = {}
    for (component, flat), parts in grouped.items():
        for place, factors in _place(
            component, _path(flat), _factors(f"{path}: {flat}", parts, alpha)
        ).items():
            if place in modules:
                raise AdapterError(f"{path} adapts {place} twice.")
            modules[place] = factors
    return join_modules(modules)


def join_modules(modules: dict[str, Factors]) -> Adapter:
    """Make the adapter of a pipeline of modules whose paths start with the model's name."""
    parts: dict[str, dict[str, Factors]] = {}
    for place in sorted(modules):
        component, _, path = place.partition(".")
        parts.setdefault(component, {})[path] = modules[place]
    mixed = {
        name: {} if all(f.is_folded for f in own.values()) else {"mixer": "kaiming"}
        for name, own in parts.items()
    }
    return join({name: Adapter(own, mixed[name]) for name, own in parts.items()})


def write(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a kohya file, folded.

    Args:
        adapter: Of a Stable Diffusion pipeline with a UNet, or of one of its models.
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
    parts = {name: flatten(part) for name, part in by_component(adapter).items()}
    strange = sorted(parts.keys() - set(PREFIXES.values()))
    if strange:
        raise AdapterError(
            f"The adapter is of a {strange[0]}, as FLUX and SD3 have it, whose kohya names diffusers itself rejects. "
            "Write --to diffusers; of FLUX and SD3 ComfyUI applies that whole."
        )
    check_writable(
        parts,
        lambda form: form.kind == "linear" or (len(form.kernel) == 2 and form.groups == 1),
        "a kohya file",
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
    tensors: dict[str, Tensor] = {}
    for component, part in parts.items():
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        for module, factors in part.modules.items():
            flat = f"{prefix}_{name_clip(component, module).replace('.', '_')}"
            if f"{flat}.alpha" in tensors:
                raise AdapterError(f"{component}.{module} has the same kohya name as another module, {flat}.")
            stored = as_stored(pad(factors, r))
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
    if not through_diffusers.is_installed():
        return through_diffusers.with_paths_of(read(path), like), "moslora"
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    tensors, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(str(path))
    return through_diffusers.understood(tensors, alphas, None, like)
