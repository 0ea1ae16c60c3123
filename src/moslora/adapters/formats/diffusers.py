"""diffusers' LoRA files: one ``.safetensors`` that ``pipe.load_lora_weights`` reads.

Keys are the model's name, the module's path, ``lora_A`` and ``lora_B``. Alphas are not tensors: they are in the
metadata, under ``lora_adapter_metadata``, and where there is none, diffusers takes alpha for r. Older files have
``to_q_lora.down`` and the like, which are read too; so is a mixer as MoSLoRA's authors saved it, which diffusers drops
with a warning. Their fork calls it ``lora_AB``, and diffusers, which renames ``lora_A`` wherever it stands in a name,
made ``lora.downB`` of it, in text encoders ``lora_linear_layer.downB``.

All modules are written with one rank, padded with zeros, and alpha = r: the file means the same with its metadata
and without.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslora.adapters.factors import Adapter, exact_pattern
from moslora.adapters.formats import through_diffusers
from moslora.adapters.formats.building import build_adapter, name_exactly
from moslora.adapters.formats.configuration import MOSLORA, SHARED
from moslora.adapters.formats.image_file import refuse_key, without_zeros
from moslora.adapters.formats.key_names import notes_on_wrappers
from moslora.adapters.formats.keys import split_key, unwrap
from moslora.adapters.formats.layout import Found, as_stored
from moslora.adapters.formats.lora import MAGNITUDE, flatten
from moslora.adapters.formats.lora_fields import check_fields
from moslora.adapters.formats.official import check_mixers
from moslora.adapters.formats.pipeline import (
    COMPONENTS,
    by_component,
    check_writable,
    join,
    name_clip,
    own_clip,
)
from moslora.adapters.formats.placing import families_of, has_original_names, place
from moslora.adapters.formats.tensors import load_tensors, read_whole_header, save_tensors
from moslora.adapters.formats.unet_names import in_unet
from moslora.adapters.ranks import pad
from moslora.errors import AdapterError

__all__ = ["is_diffusers", "read", "read_with_diffusers", "write"]

METADATA = "lora_adapter_metadata"
SIDES = {"down": "A", "up": "B", "downB": "M", "A": "A", "B": "B", "AB": "M", "mixer": "M", "M": "M"}
SIDES |= {"magnitude_vector": "magnitude", "alpha": "alpha"}
ENDINGS = (
    re.compile(r"(?P<path>.+)\.lora_(?P<side>A|B|AB|mixer|down|up|downB)(?:\.(?!weight\b)[^.]+)?\.weight"),
    re.compile(r"(?P<path>.+)\.(?:lora_)?(?P<side>alpha)"),
    re.compile(
        r"(?P<path>.+)\.moslora_(?P<side>A|M|B)\.weight"
    ),  # of ``unet.add_adapter``, as its scripts save
    re.compile(r"(?P<path>.+)\.(?:lora|lora_linear_layer)\.(?P<side>down|up|downB)\.weight"),
    re.compile(r"(?P<path>.+)\.lora_(?P<side>magnitude_vector)(?:\.weight)?"),
    re.compile(
        r"(?P<path>.+?)\.(?:processor\.)?(?P<what>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"
    ),
)
T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\.")
FUSE = (
    "Load it into its pipeline with load_lora_weights(…, low_cpu_mem_usage=False), call fuse_lora() and "
    "unload_lora_weights(), "
    "and save the pipeline: those full weights need no adapter."
)
IN_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _split_key(key: str) -> tuple[str, str, str] | None:
    """Return the model, the module's path in it and the letter of a key; None if it is not one of diffusers'."""
    component, _, rest = unwrap(key).partition(".")
    if component not in COMPONENTS:
        return None
    found = next((m for ending in ENDINGS if (m := ending.fullmatch(rest))), None)
    if found is None:
        return None
    path, what = found["path"], found.groupdict().get("what")
    if what:
        inner = IN_CLIP[what] if path.endswith("self_attn") else {"to_out": "to_out.0"}.get(what, what)
        path = f"{path}.{inner}"
    return component, own_clip(component, path), SIDES[found["side"]]


def is_diffusers(names: Iterable[str]) -> bool:
    """Tell diffusers' files by the names of their tensors: no factor has another program's prefix."""
    split = [_split_key(name) is not None for name in names if split_key(name) or _split_key(name)]
    return any(split) and all(split)


def _read_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration that a file carries, by ``MODEL.ARGUMENT``."""
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: its {METADATA} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{path}: its {METADATA} is not a JSON object.")
    return found


def read(path: Path, alpha: float | None = None) -> Adapter:
    """Read a diffusers file.

    Args:
        path: The ``.safetensors`` file.
        alpha: What it was trained with, where the file does not say it.

    Returns:
        The adapter, with paths below the names of the models it is for. Without metadata and ``alpha``, alpha is the
        rank, as diffusers has it.

    Raises:
        AdapterError: If it is damaged or holds anything but factors, or says its alpha itself and one is given.
    """
    about = read_whole_header(path).metadata
    metadata = _read_metadata(path, about)
    found: dict[str, Found] = {}
    tensors = without_zeros(load_tensors(path))
    notes = tuple(notes_on_wrappers(tensors))
    for key, tensor in tensors.items():
        split = _split_key(key)
        if split is None:
            raise refuse_key(path, key)
        component, module, letter = split
        own = found.setdefault(component, Found({}, {}, set(), notes)).modules.setdefault(module, {})
        if letter == "alpha" and tensor.numel() != 1:
            raise AdapterError(f"{path}: {key} has {tensor.numel()} values; an alpha is one number.")
        if letter in own or (tensor.ndim < 2 and letter not in ("magnitude", "alpha")):
            raise AdapterError(
                f"{path}: {key} is a second factor {letter} of its module, or no factor at all."
            )
        own[letter] = tensor
        if ".moslora_" in key and alpha is None and not _says_scale(component, metadata):
            raise AdapterError(
                f"{path} does not say rank and alpha of {component}, so the scale of its mixers is not known. Give the "
                "lora_alpha that it was trained with: --alpha N (with use_rslora, N times the square root of the rank)."
            )
    alphas = {name: _take_alphas(path, name, own, metadata) for name, own in found.items()}
    if alpha is not None and all(
        _says_scale(name, metadata) or alphas[name].keys() == own.modules.keys()
        for name, own in found.items()
    ):
        raise AdapterError(f"{path} says its alpha itself. Leave --alpha out.")
    parts = {
        name: _in_diffusers_names(path, name, _part(path, name, own, metadata, alpha, alphas[name]))
        for name, own in found.items()
    }
    return join(parts)


def _take_alphas(path: Path, component: str, found: Found, metadata: Mapping[str, Any]) -> dict[str, float]:
    """Take alphas that stand beside the factors, as trainers other than diffusers' scripts save them."""
    alphas = {name: float(own.pop("alpha")) for name, own in found.modules.items() if "alpha" in own}
    if alphas and _says_scale(component, metadata):
        raise AdapterError(
            f"{path} says the alphas of {component} twice, beside its factors and in its metadata. Save it again."
        )
    return alphas


def _in_diffusers_names(path: Path, component: str, part: Adapter) -> Adapter:
    """Rename modules that have the names of the model's original code behind diffusers' prefix."""
    if component == "unet":
        return _in_unet_names(path, part)
    if not component.startswith("transformer") or not has_original_names(part.modules):
        return part
    if part.has_magnitudes:
        raise AdapterError(
            f"{path}: {component} has DoRA's magnitude and names of the model's original code, and diffusers' names "
            "are for other parts of its layers. Merge it into its base in the program that trained it."
        )
    named = [(name, False, factors) for name, factors in part.modules.items()]
    mixer = {"mixer": part.config["mixer"]} if "mixer" in part.config else {}
    return Adapter(place(f"{path}: {component}", named)[0], mixer)


def _in_unet_names(path: Path, part: Adapter) -> Adapter:
    """Rename modules that have the names of the U-Net's original code."""
    names = {name: in_unet(name, False) or name for name in part.modules}
    if list(names) == list(names.values()):
        return part
    if len(set(names.values())) < len(names):
        raise AdapterError(f"{path} adapts a module of the unet twice, under two names.")
    kept = {key: value for key, value in part.config.items() if key in ("mixer", "use_dora")}
    return Adapter({names[name]: factors for name, factors in part.modules.items()}, kept, part.extra)


def _says_scale(component: str, metadata: Mapping[str, Any]) -> bool:
    return {f"{component}.r", f"{component}.lora_alpha"} <= metadata.keys()


def _part(
    path: Path,
    component: str,
    found: Found,
    metadata: Mapping[str, Any],
    alpha: float | None,
    alphas: Mapping[str, float],
) -> Adapter:
    said = {
        key.removeprefix(f"{component}."): value
        for key, value in metadata.items()
        if key.startswith(f"{component}.")
    }
    start = check_fields(f"{path}: {component}", said, also=MOSLORA)
    if start:
        raise AdapterError(
            f"{path}: {component} began with init_lora_weights={said['init_lora_weights']!r}, which took a "
            "part out of the base "
            f"weight, so its factors are not those of s·B·A. {FUSE}"
        )
    if said.get("lora_bias"):
        raise AdapterError(f"{path}: {component} has a bias on B, whose update is not s·B·A.")
    ranks = {name: own["A"].shape[0] for name, own in found.modules.items() if "A" in own}
    if not _says_scale(component, metadata):  # as diffusers: alpha = r, module by module
        r = max(ranks.values(), default=1)
        others = {exact_pattern(name): rank for name, rank in ranks.items() if rank != r}
        said = {"r": r, "lora_alpha": r, "rank_pattern": others, "alpha_pattern": others}
        if alpha is not None:
            said.update(lora_alpha=alpha, alpha_pattern={})
        said["alpha_pattern"] = said["alpha_pattern"] | {exact_pattern(n): a for n, a in alphas.items()}
    config = {key: value for key, value in said.items() if key in SHARED}
    config["target_modules"] = name_exactly(found.modules)
    if any("magnitude" in own for own in found.modules.values()):
        config["use_dora"] = True
    check_mixers(f"{path}: {component}", found.modules)
    if any("M" in own for own in found.modules.values()):
        config["mixer"] = said.get("mixer", "kaiming")
        if config.get("use_dora"):
            raise AdapterError(
                f"{path}: {component} has mixers and DoRA's magnitude. The fork that such files are from runs DoRA "
                "without the mixers, so what it learned there is not s·B·M·A."
            )
    return build_adapter(path, config, found)


def write(adapter: Adapter, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a diffusers file, folded.

    Args:
        adapter: Of a pipeline, or of one of its models.
        path: The file.
        dtype: Of its tensors.

    Raises:
        AdapterError: If it is of no pipeline, or holds more than factors of linear layers and convolutions.
        OSError: If it cannot be written.
    """
    adapter.refuse_biases("That diffusers' loader takes it rightly was not verified, so it is not written")
    whole = by_component(adapter)
    for component, part in whole.items():
        _check_names(component, part)
    _check_encoders(whole)
    parts = {name: flatten(part) for name, part in by_component(adapter).items()}
    for component, part in parts.items():
        if component.startswith("text_encoder"):
            part.refuse_magnitudes(
                f"In a {component} diffusers would load it without its magnitude (0.42.1 with transformers 5.23, which "
                "looks for another name), so it is not written"
            )
    check_writable(
        parts,
        lambda form: form.kind == "linear" or form.groups == 1 == (form.kind == "conv"),
        "a diffusers file",
    )
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for component, part in parts.items():
        r = max(factors.r for factors in part.modules.values())
        named = {name_clip(component, module): factors for module, factors in part.modules.items()}
        for module, factors in named.items():
            stored = as_stored(pad(factors, r))
            tensors[f"{component}.{module}.lora_A.weight"] = stored["A"].to(dtype)
            tensors[f"{component}.{module}.lora_B.weight"] = stored["B"].to(dtype)
            if "magnitude" in stored:
                tensors[f"{component}.{module}.{MAGNITUDE}"] = stored["magnitude"].to(dtype)
        # Suffixes, because transformers 5 takes CLIP's "text_model." away; no two modules share a whole path.
        targets = sorted(path.removeprefix("text_model.") for path in named)
        values = {"r": r, "lora_alpha": r, "target_modules": targets, "lora_dropout": 0.0, "bias": "none"}
        values.update(rank_pattern={}, alpha_pattern={})  # diffusers before 0.42 does not load a file without
        if part.has_magnitudes:
            values["use_dora"] = True
        metadata.update({f"{component}.{key}": value for key, value in values.items()})
    text = json.dumps(metadata, indent=2, sort_keys=True)
    save_tensors(path, tensors, {"format": "pt", METADATA: text})


def _check_names(component: str, part: Adapter) -> None:
    """Refuse names that diffusers' pipelines do not have."""
    if component == "transformer_2":
        raise AdapterError(
            "The adapter is of two transformers (Wan 2.2), and diffusers' file has a place for one. Export the "
            "directory of each, ADAPTER/transformer and ADAPTER/transformer_2, and load the second with "
            "load_into_transformer_2=True."
        )
    if component == "transformer" and has_original_names(part.modules):
        raise AdapterError(
            f"{component}.{next(iter(part.modules))} has the name of the model's original code, under which no "
            "pipeline of diffusers loads it. Save it as that code does (diffusion_model.PATH.lora_A.weight), and "
            "import that file."
        )


def _check_encoders(parts: Mapping[str, Adapter]) -> None:
    """Refuse text encoders for which diffusers' pipelines pass over a LoRA without a word."""
    families = families_of(parts["transformer"].modules) if "transformer" in parts else []
    loaded = {encoder for family in families for encoder in family.encoders}
    for component, part in parts.items():
        is_t5 = any(T5_LAYER.match(path) for path in part.modules)
        if component.startswith("text_encoder") and (is_t5 or (families and component not in loaded)):
            what = "a T5" if is_t5 else f"the {component} of {' or '.join(f.name for f in families)}"
            raise AdapterError(
                f"The adapter is of {what} too, for which diffusers' pipelines load no LoRA: they would pass over it "
                "without a word. Export the directories of the other models, one for each, or write --to lora, which "
                "PEFT loads onto each model."
            )


def read_with_diffusers(path: Path, like: Adapter) -> tuple[Adapter, str]:
    """Read a diffusers file as a pipeline's ``load_lora_weights`` does.

    Args:
        path: The file.
        like: What was written.

    Returns:
        What diffusers understood, with the paths of ``like``; and the name of the reader. This package's own reader
        stands in where diffusers is not installed.
    """
    if not through_diffusers.is_installed():
        return through_diffusers.with_paths_of(read(path), like), "moslora"
    from diffusers.loaders import lora_pipeline

    loader = getattr(lora_pipeline, _loader(like), lora_pipeline.FluxLoraLoaderMixin)
    options = {"return_alphas": True} if loader is lora_pipeline.FluxLoraLoaderMixin else {}
    tensors, *alphas, metadata = loader.lora_state_dict(str(path), return_lora_metadata=True, **options)
    return through_diffusers.understood(tensors, next(iter(alphas), None) or None, metadata, like)


def _loader(adapter: Adapter) -> str:
    """Return the class of diffusers that loads an adapter's file; FLUX.1's takes names as they are."""
    parts = by_component(adapter)
    if "unet" in parts or "transformer" not in parts:
        return "StableDiffusionXLLoraLoaderMixin"
    families = families_of(parts["transformer"].modules)
    return next((family.loader for family in families if family.loader), "FluxLoraLoaderMixin")
