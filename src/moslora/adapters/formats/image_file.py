"""Read a LoRA file of an image tool, in whatever layout it is: to the paths that its modules have in diffusers.

Layouts are in ``keys``, the names of U-Nets and text encoders in ``unet_names``, those of transformers in ``families``.
diffusers' own files, which may say ranks and alphas in their metadata, are read in ``diffusers``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moslora.adapters.factors import LINEAR, Adapter, Factors, Form
from moslora.adapters.formats.family import Family
from moslora.adapters.formats.keys import (
    BARE,
    DENOISER,
    T5,
    Key,
    layout_of,
    other_method,
    split_key,
    unwrap,
    writers,
)
from moslora.adapters.formats.lycoris import is_lycoris, split_lycoris, to_factors
from moslora.adapters.formats.official import check_mixers
from moslora.adapters.formats.pipeline import join, own_clip
from moslora.adapters.formats.placing import Named, knows, place
from moslora.adapters.formats.tensors import load_tensors, read_whole_header
from moslora.adapters.formats.unet_names import dotted, in_unet
from moslora.errors import AdapterError

__all__ = ["is_flat", "is_image_file", "read", "refuse_key", "without_zeros"]

LETTERS = {"A": "lora_down.weight", "B": "lora_up.weight"}
BUNDLED = ("bundle_emb.", "emb_params", "text_encoders.embeddings")
KEEP_FACTORS = (
    "Save the LoRA alone, in Python: from safetensors.torch import load_file, save_file; "
    "save_file({name: t for name, t in load_file(FILE).items() if 'lora' in name or name.endswith('.alpha')}, OUT)."
)
# A full-rank difference that is zero adds nothing, so it can be left out; several trainers save such.
DIFFERENCES = ("diff", "diff_b", "w_norm", "b_norm")


def is_image_file(names: Iterable[str]) -> bool:
    """Tell whether names are of a LoRA file of an image tool, or of another method in such a file.

    Args:
        names: Of its tensors.
    """
    names = list(names)
    bare = [key.path for key in map(split_key, names) if key is not None and key.layout is BARE]
    known = [path for path in bare if knows(path, False) or in_unet(path, False) is not None]
    return 2 * len(known) > len(bare) or any(_has_prefix(name) for name in names)


def _has_prefix(name: str) -> bool:
    """Tell whether a name begins as a layout's do and ends as a factor does."""
    return layout_of(unwrap(name)) is not BARE and bool(split_key(name) or other_method(name))


def is_flat(names: Iterable[str]) -> bool:
    """Tell whether names have underscores for dots, as kohya's trainers write them.

    Args:
        names: Of the tensors of a file.
    """
    return any(layout_of(unwrap(name)).is_flat for name in names)


def refuse_key(path: Path, name: str) -> AdapterError:
    """Make the error of a tensor that is not a factor of LoRA.

    Args:
        path: The file.
        name: Of the tensor.
    """
    method = other_method(name)
    if any(mark in name for mark in BUNDLED):
        return AdapterError(
            f"{path}: {name} is the vector of a trained word (a textual inversion), which kohya's trainers and "
            f"OneTrainer bundle with a LoRA and which no format here has a place for. {KEEP_FACTORS} Prompts with that "
            "word then need the vector from elsewhere."
        )
    if "norm.query_norm" in name or "norm.key_norm" in name:
        return AdapterError(
            f"{path}: {name} belongs to a control LoRA of Black Forest Labs (FLUX.1 Canny or Depth), which also "
            "replaces norms and widens the input. Its update is not s·B·A alone. Load it with diffusers' "
            "FluxControlPipeline."
        )
    if not method and _is_base(name):
        return AdapterError(
            f"{path}: {name} is a weight of the model itself: the file is a trainer's checkpoint of model and LoRA. "
            f"{KEEP_FACTORS}"
        )
    if not method and layout_of(unwrap(name)) is BARE and ".lora" not in name:
        return AdapterError(
            f"{path}: {name} is not a factor of LoRA, while other tensors of the file are. {KEEP_FACTORS}"
        )
    return AdapterError(
        f"{path}: {name} is of {method or 'an unknown method'}, whose update is not s·B·A. Merge it into its base in "
        "the program that trained it."
    )


def _is_base(name: str) -> bool:
    return ".base_layer." in name or (name.endswith((".weight", ".bias")) and "lora" not in name)


def without_zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out full-rank differences that are zero.

    Args:
        tensors: Of a file, by name.

    Returns:
        The others.
    """
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] not in DIFFERENCES or bool(tensor.any())
    }


def read(path: Path, alpha: float | None = None) -> Adapter:
    """Read a LoRA file of an image tool.

    Args:
        path: The ``.safetensors`` file.
        alpha: What modules that have none were trained with; None for their rank, as its readers have it.

    Returns:
        The adapter, with diffusers' paths below the names of the pipeline's models.

    Raises:
        AdapterError: If it is damaged, of another method, or of a model that cannot be told, or every module has its
            alpha and one is given.
    """
    _refuse_metadata(path)
    grouped = _group(path)
    if alpha is not None and all("alpha" in parts for parts in grouped.values()):
        raise AdapterError(f"{path} says its alpha itself, module by module. Leave --alpha out.")
    models: dict[str, list[Named]] = {}
    for component in dict.fromkeys(key[0] for key in grouped):
        own = {(flat, name): parts for (c, flat, name), parts in grouped.items() if c == component}
        check_mixers(str(path), {name: parts for (_, name), parts in own.items()})
        models[component] = [
            (name, flat, _factors(f"{path}: {name}", parts, alpha)) for (flat, name), parts in own.items()
        ]
    modules: dict[str, Factors] = {}
    families: list[Family] = []
    for component in sorted(models, key=lambda name: name == T5):  # the T5 after what tells whose it is
        placed, told = _place(path, component, models[component], families)
        families += told
        kinds = {name for name, own in grouped.items() if name[0] == component and is_lycoris(own)}
        if kinds and not all(place_.startswith("transformer") for place_ in placed):
            name = next(iter(kinds))[2]
            raise AdapterError(
                f"{path}: {name} is of LoHa or LoKr in a {next(iter(placed)).partition('.')[0]}, whose convolutions "
                "such files do not tell from its linear layers. Merge it into its base in the program that trained it."
            )
        for place_, factors in placed.items():
            if place_ in modules:
                raise AdapterError(f"{path} adapts {place_} twice.")
            modules[place_] = factors
    return join_modules(modules)


def _refuse_metadata(path: Path) -> None:
    """Refuse alphas in metadata, which belong to names in diffusers' layout."""
    if "lora_adapter_metadata" in (header := read_whole_header(path)).metadata:
        raise AdapterError(
            f"{path} has diffusers' metadata, and names of {writers(header.tensors)}. Whoever renamed its tensors left "
            "the ranks and alphas of the old names. Take the file from before."
        )


def _group(path: Path) -> dict[tuple[str, bool, str], dict[str, Tensor]]:
    """Sort the tensors of a file by model, way of writing and path."""
    grouped: dict[tuple[str, bool, str], dict[str, Tensor]] = {}
    for name, tensor in without_zeros(load_tensors(path)).items():
        key = split_key(name) or _lycoris_key(name)
        if key is None:
            raise refuse_key(path, name)
        _check(path, name, key, tensor)
        parts = grouped.setdefault((key.layout.component, key.layout.is_flat, key.path), {})
        if key.letter in parts:
            raise AdapterError(
                f"{path}: {name} is a second {key.letter} of {key.path}; the file holds more than one adapter. Save "
                "them one by one."
            )
        parts[key.letter] = tensor
    if not grouped:
        raise AdapterError(f"{path} holds no factors of LoRA that are not zero.")
    return grouped


def _lycoris_key(name: str) -> Key | None:
    """Take the name of a part of LoHa or LoKr apart."""
    inner = unwrap(name)
    layout = layout_of(inner)
    found = split_lycoris(inner.removeprefix(layout.prefix))
    return None if found is None else Key(layout, *found)


def _check(path: Path, name: str, key: Key, tensor: Tensor) -> None:
    if not tensor.is_floating_point() and key.letter != "alpha":
        raise AdapterError(f"{path}: {name} is {tensor.dtype}, which is not a factor.")
    if key.letter == "alpha" and tensor.numel() != 1:
        raise AdapterError(f"{path}: {name} has {tensor.numel()} values; an alpha is one number.")


def _factors(where: str, parts: dict[str, Tensor], given_alpha: float | None) -> Factors:
    """Put one module together; a core is folded into A."""
    if is_lycoris(parts):
        given = {} if given_alpha is None else {"alpha": torch.tensor(float(given_alpha))}
        return to_factors(where, {**given, **parts})
    missing = {"A", "B"} - parts.keys()
    if missing:
        names = " and ".join(LETTERS[letter] for letter in sorted(missing))
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


def _place(
    path: Path, component: str, named: Sequence[Named], families: Sequence[Family]
) -> tuple[dict[str, Factors], list[Family]]:
    """Give the modules of one model their paths in a pipeline of diffusers, the model's name before them."""
    told: list[Family] = []
    if component in (DENOISER, "unet"):
        component, placed, told = _denoiser(path, named)
    elif component.startswith("transformer"):
        placed, told = place(str(path), named)
    else:
        component = _t5(path, families) if component == T5 else component
        placed = {own_clip(component, _in_text_encoder(path, *own[:2])): own[2] for own in named}
    return {f"{component}.{name}": factors for name, factors in placed.items()}, told


def _denoiser(path: Path, named: Sequence[Named]) -> tuple[str, dict[str, Factors], list[Family]]:
    """Tell a U-Net from a transformer by the names of all modules."""
    paths = {(name, flat): in_unet(name, flat) for name, flat, _ in named}
    strange = [name for (name, _), found in paths.items() if found is None]
    if not strange:
        placed = {str(paths[name, flat]): factors for name, flat, factors in named}
        if len(placed) < len(named):
            raise AdapterError(f"{path} adapts a module twice, under two names.")
        return "unet", placed, []
    if any(re.match(r"(down|up)_blocks\.\d|mid_block\.", path or "") for path in paths.values()):
        raise AdapterError(
            f"{path}: {strange[0]} is not a module of a U-Net of Stable Diffusion, while others of the file are. "
            "Export the adapter from its trainer in diffusers' format and import that."
        )
    placed, told = place(str(path), named)
    return "transformer", placed, told


def _t5(path: Path, families: Sequence[Family]) -> str:
    """Tell which text encoder of its pipeline a T5 is."""
    found = {family.t5 for family in families if family.t5}
    if len(found) != 1:
        raise AdapterError(
            f"{path} adapts a T5 (lora_te3), which is text_encoder_2 of FLUX.1's pipeline and text_encoder_3 of SD3's, "
            "and by its other modules it may be either. Train or export it with modules of the transformer that tell "
            "them apart."
        )
    return found.pop()


def _in_text_encoder(path: Path, name: str, flat: bool) -> str:
    try:
        return dotted(name) if flat else name
    except ValueError as error:
        raise AdapterError(
            f"{path}: {name} is of no known text encoder: {str(error)!r} is the name of no module in CLIP or T5. "
            "Export the adapter from its trainer in diffusers' format and import that."
        ) from error


def join_modules(modules: dict[str, Factors]) -> Adapter:
    """Make the adapter of a pipeline of modules whose paths start with the model's name."""
    parts: dict[str, dict[str, Factors]] = {}
    for place_ in sorted(modules):
        component, _, path = place_.partition(".")
        parts.setdefault(component, {})[path] = modules[place_]
    mixed = {
        name: {} if all(f.is_folded for f in own.values()) else {"mixer": "kaiming"}
        for name, own in parts.items()
    }
    return join({name: Adapter(own, mixed[name]) for name, own in parts.items()})
