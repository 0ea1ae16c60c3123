"""A PEFT adapter directory: ``adapter_config.json`` beside ``adapter_model.safetensors``.

Both of PEFT's formats, native and lora, lie on disk like this. What is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moslora.adapters.factors import LINEAR, Adapter, Factors, Form, exact_pattern
from moslora.adapters.formats import experts
from moslora.adapters.formats.experts import owner
from moslora.core.functional import scaling
from moslora.errors import AdapterError

__all__ = ["CONFIG", "WEIGHTS", "read_config", "read_tensors", "staged", "write_files"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

# What LoRA's and MoSLoRA's configurations have in common, and an adapter carries from one to the other.
SHARED = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "lora_dropout",
    "bias",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
)


def _near(path: Path) -> str:
    """Suggest the sibling whose name is nearest."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Args:
        folder: The adapter directory.

    Returns:
        Its JSON object.

    Raises:
        AdapterError: If it is not there, or no JSON object with a ``peft_type``.
    """
    if not folder.exists():
        raise AdapterError(f"{folder} does not exist.{_near(folder)}")
    if not folder.is_dir():
        raise AdapterError(f"{folder} is a file; give the adapter's directory, which holds {CONFIG}.")
    path = folder / CONFIG
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        nested = [p.parent for p in sorted(folder.glob(f"*/{CONFIG}"))]
        hint = f" Did you mean {nested[0]}?" if nested else ""
        raise AdapterError(f"{folder} is no adapter directory: it has no {CONFIG} (found: {inside}).{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}. Take it from a backup, or save the adapter again."
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{path} has no peft_type, so it does not say which method it belongs to.")
    check_config(path, config)
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(fits(item) for item in value)


def _dict_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(_is_pattern(key) and fits(item) for key, item in value.items())
    )


def _either(*ways: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: any(fits(value) for fits in ways)


_NAMES = (_either(_is_pattern, _list_of(_is_text)), "names in a list, or one regular expression")
_INDICES = (_either(_is_whole, _list_of(_is_whole)), "indices in a list")
# What an argument may be when it is there and not null, and how to say so.
ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_model_name_or_path": (_is_text, "a name"),
    "revision": (_is_text, "a name"),
    "task_type": (lambda value: value in list(TaskType), f"one of {', '.join(TaskType)}"),
    "auto_mapping": (lambda value: isinstance(value, dict), "an object"),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": _INDICES,
    "layers_pattern": _NAMES,
    "modules_to_save": (_list_of(_is_text), "names in a list"),
    "target_parameters": (_list_of(_is_text), "names in a list"),
    "trainable_token_indices": (
        _either(
            _list_of(_is_whole), lambda v: isinstance(v, dict) and all(map(_list_of(_is_whole), v.values()))
        ),
        "indices in a list, or by the layer's name",
    ),
    "ensure_weight_tying": (_is_flag, "true or false"),
    "fan_in_fan_out": (_is_flag, "true or false"),
    "lora_dropout": (_is_number, "a number"),
    "bias": (_is_text, "a word"),
    "r": (_is_whole, "a whole number"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_dict_of(_is_whole), "whole numbers by regular expression"),
    "alpha_pattern": (_dict_of(_is_number), "numbers by regular expression"),
    "use_rslora": (_is_flag, "true or false"),
    "use_dora": (_is_flag, "true or false"),
    "lora_bias": (_is_flag, "true or false"),
    "mixer": (_is_text, "a name"),
    "unlike_lora": (
        lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
        "reasons by module",
    ),
}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration whose arguments are not what they can be.

    Args:
        path: Where it comes from, for messages.
        config: The arguments; those that are not known are left to who uses them.

    Raises:
        AdapterError: With the argument, what it is and what it can be.
    """
    for name, (fits, wanted) in ARGUMENTS.items():
        value = config.get(name)
        if value is not None and not fits(value):
            shown = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:57]}..."
            raise AdapterError(
                f"{path}: {name} is {shown}; it must be {wanted}. Mend it, or save the adapter again."
            )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read ``adapter_model.safetensors``.

    Args:
        folder: The adapter directory.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        AdapterError: If the file is missing, damaged, or holds empty or non-finite tensors. Pickled
            weights (``.bin``) are not opened.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"{folder} holds its weights as a pickle (adapter_model.bin), which can run code when "
                "opened. Load the adapter in PEFT and save it again; PEFT writes safetensors."
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}.")
    return load_tensors(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        AdapterError: If the file is damaged, or holds empty or non-finite tensors.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path} is damaged or cut off: {error}. Copy it again, or take an earlier checkpoint."
        ) from error
    return check_tensors(path, tensors)


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Read what a safetensors file says of itself, without its tensors.

    Args:
        path: The file.

    Returns:
        The names of its tensors, and its metadata.

    Raises:
        AdapterError: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path} is damaged or cut off: {error}. Copy it again, or take an earlier checkpoint."
        ) from error


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Refuse tensors that no adapter can be made of.

    Args:
        path: Where they come from, for messages.
        tensors: Tensors by name.

    Returns:
        The same tensors.

    Raises:
        AdapterError: If there are none, or one is empty or has NaN or infinite values.
    """
    if not tensors:
        raise AdapterError(f"{path} holds no tensors.")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"{path}: {name} is empty, shape {tuple(tensor.shape)}. It was saved under sharding (ZeRO-3, "
                "FSDP) without gathering; gather the parameters and save again."
            )
        if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 16:
            raise AdapterError(
                f"{path}: {name} is {tensor.dtype}, and factors of 8 bits are not read. Convert the file to float16 "
                "in the program that wrote it; that loses nothing."
            )
        if tensor.is_complex():
            raise AdapterError(f"{path}: {name} is {tensor.dtype}, which no adapter has.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{path}: {name} has NaN or infinite values: the training diverged, or the file is "
                "damaged. Take an earlier checkpoint."
            )
    return tensors


@dataclass(frozen=True)
class Found:
    """Tensors of a file, sorted.

    Attributes:
        modules: Per module path, tensors by ``A``, ``M``, ``B``, ``magnitude`` and ``bias`` (on B), as they lie in the
            file.
        rest: All other tensors, by their full name.
        embeddings: Paths of the modules whose names said that they are embeddings.
    """

    modules: dict[str, dict[str, Tensor]]
    rest: dict[str, Tensor]
    embeddings: set[str]


def group_factors(
    tensors: Mapping[str, Tensor], parts: Mapping[str, str], embedding_parts: Mapping[str, str] | None = None
) -> Found:
    """Sort tensors into modules.

    Args:
        tensors: Tensors by name, as ``base_model.model.PATH.PART.weight``; of embeddings without ``.weight``.
        parts: ``A``, ``M`` or ``B`` by the PART that stands for it.
        embedding_parts: The same for embeddings.

    Returns:
        Modules, their kind, and everything else.
    """
    found = Found({}, {}, set())
    for key, tensor in tensors.items():
        stem = key.removesuffix(".weight")
        is_bias = key.endswith(".bias")
        path, _, part = (key.removesuffix(".bias") if is_bias else stem).rpartition(".")
        module = path.removeprefix(KEY_PREFIX)
        if path == module:
            found.rest[key] = tensor
        elif is_bias and parts.get(part) == "B":
            found.modules.setdefault(module, {})["bias"] = tensor
        elif stem != key and part in parts:
            found.modules.setdefault(module, {})[parts[part]] = tensor
        elif stem == key and not is_bias and part in (embedding_parts or {}):
            found.modules.setdefault(module, {})[(embedding_parts or {})[part]] = tensor
            found.embeddings.add(module)
        else:
            found.rest[key] = tensor
    return found


def as_matrices(tensors: Mapping[str, Tensor], is_embedding: bool) -> tuple[dict[str, Tensor], Form]:
    """Lay factors as matrices.

    Args:
        tensors: ``A``, ``B`` and maybe ``M``, ``magnitude`` and ``bias``, as they lie in a file.
        is_embedding: Whether they adapt an embedding.

    Returns:
        A ``(r, in)``, M ``(r, r)``, B ``(out, r)``, a magnitude and a bias ``(out,)``, and how they lay.

    Raises:
        ValueError: If a convolution's factors do not fit each other.
    """
    A, B = tensors["A"], tensors["B"]
    flat = dict(tensors)
    if "magnitude" in flat:  # (out,), of a convolution (1, out, 1, …)
        magnitude = flat["magnitude"]
        shape = (B.shape[0],) if A.ndim < 3 else (1, B.shape[0], *(1,) * (A.ndim - 2))
        if tuple(magnitude.shape) != shape:
            raise ValueError(
                f"a magnitude of shape {tuple(magnitude.shape)} does not fit B {tuple(B.shape)}."
            )
        flat["magnitude"] = magnitude.flatten()
    if is_embedding:
        return flat, Form("embedding")
    if A.ndim < 3:
        return flat, LINEAR
    r, kernel = A.shape[0], tuple(A.shape[2:])
    if (
        B.ndim != A.ndim
        or any(n != 1 for n in B.shape[2:])
        or r % B.shape[1]
        or B.shape[0] % (r // B.shape[1])
    ):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no factors of one convolution.")
    groups = r // B.shape[1]
    vectors = ("magnitude", "bias")
    flat.update({name: tensor.flatten(1) for name, tensor in tensors.items() if name not in vectors})
    if groups > 1:
        flat["B"] = torch.block_diag(*flat["B"].chunk(groups))  # type: ignore[no-untyped-call]  # (out, r)
    return flat, Form("conv", kernel, groups)


def as_stored(factors: Factors) -> dict[str, Tensor]:
    """Lay factors as files hold them: the inverse of ``as_matrices``.

    Args:
        factors: Of one module.

    Returns:
        ``A``, ``M`` and ``B``, and ``magnitude`` and ``bias`` where there are such.
    """
    A, M, B, form = factors.A, factors.M, factors.B, factors.form
    beside = {} if factors.magnitude is None else {"magnitude": factors.magnitude}
    bias = {} if factors.bias is None else {"bias": factors.bias}
    if form.kind != "conv":
        return {"A": A, "M": M, "B": B, **beside, **bias}
    beside = {name: m.view(1, -1, *(1,) * len(form.kernel)) for name, m in beside.items()} | bias
    ones = (1,) * len(form.kernel)
    if form.groups > 1:
        rows, columns = B.shape[0] // form.groups, B.shape[1] // form.groups
        blocks = B.view(form.groups, rows, form.groups, columns)
        B = torch.cat([blocks[g, :, g] for g in range(form.groups)])  # (out, r / groups)
    return {
        "A": A.view(A.shape[0], -1, *form.kernel),
        "M": M.view(*M.shape, *ones),
        "B": B.view(*B.shape, *ones),
        **beside,
    }


def name_all(
    modules: Mapping[str, Factors],
    parts: Mapping[str, str],
    embedding_parts: Mapping[str, str],
    magnitude_part: str = "",
) -> dict[str, Tensor]:
    """Name the factors of all modules as a file does, experts put together.

    Args:
        modules: Factors by path.
        parts: ``A``, ``M`` or ``B`` by the PART that stands for it; letters that are not there are left out.
        embedding_parts: The same for embeddings.
        magnitude_part: What a magnitude is called, ``.weight`` included where it has that.

    Returns:
        Tensors by name.
    """
    named: dict[str, Tensor] = {}
    for module, factors in modules.items():
        if factors.form != experts.EXPERT:
            named.update(name_tensors(module, factors, parts, embedding_parts, magnitude_part))
    for module, stored in experts.gather(modules).items():
        named.update(
            {f"{KEY_PREFIX}{module}.{part}.weight": stored[letter] for part, letter in parts.items()}
        )
    return named


def name_tensors(
    module: str,
    factors: Factors,
    parts: Mapping[str, str],
    embedding_parts: Mapping[str, str],
    magnitude_part: str = "",
) -> dict[str, Tensor]:
    """Name the factors of a module as a file does.

    Args:
        module: Path in the base model.
        factors: Its factors.
        parts: ``A``, ``M`` or ``B`` by the PART that stands for it; letters that are not there are left out.
        embedding_parts: The same for embeddings.
        magnitude_part: What a magnitude is called, ``.weight`` included where it has that.

    Returns:
        Tensors by name.
    """
    stored = as_stored(factors)
    if factors.form.kind == "embedding":
        named = {f"{KEY_PREFIX}{module}.{part}": stored[letter] for part, letter in embedding_parts.items()}
    else:
        named = {f"{KEY_PREFIX}{module}.{part}.weight": stored[letter] for part, letter in parts.items()}
    if "bias" in stored:
        (part,) = (part for part, letter in parts.items() if letter == "B")
        named[f"{KEY_PREFIX}{module}.{part}.bias"] = stored["bias"]
    if "magnitude" in stored:
        named[f"{KEY_PREFIX}{module}.{magnitude_part}"] = stored["magnitude"]
    return named


def _said(config: Mapping[str, Any], module: str) -> set[tuple[Any, Any]]:
    """Return which ranks and alphas a configuration may mean for a module.

    PEFT looks a parameter's up by the parameter's name, which its files do not tell; so all that may lie in the
    module are tried.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    path = owner(module).replace(".base_layer", "")
    parameters = [name.rpartition(".")[2] for name in config.get("target_parameters") or ()]
    return {
        (
            ranks.get(get_pattern_key(ranks.keys(), name), config.get("r")),
            alphas.get(get_pattern_key(alphas.keys(), name), config.get("lora_alpha")),
        )
        for name in (path, *(f"{path}.{parameter}" for parameter in parameters))
    }


def module_scale(config: Mapping[str, Any], module: str, r: int) -> float:
    """Return the scale that PEFT would use for a module, checking its rank on the way.

    Args:
        config: The adapter's configuration.
        module: Path in the base model.
        r: Rank of its tensors.

    Returns:
        The scale, unitless.

    Raises:
        AdapterError: If the configuration says another rank.
    """
    said = _said(config, module)
    alphas = {str(alpha): alpha for rank, alpha in said if rank == r}
    if not alphas:
        ranks = " or ".join(sorted({str(rank) for rank, _ in said}))
        raise AdapterError(f"{module}: the configuration says rank {ranks}, its tensors have rank {r}.")
    if len(alphas) > 1:
        raise AdapterError(
            f"{module}: its parameters have different alphas, {sorted(alphas)}, and the file does not say which this "
            "one has. Give all parameters of a module one alpha."
        )
    alpha = next(iter(alphas.values()))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise AdapterError(f"{module}: lora_alpha={alpha!r} is no number.")
    return scaling(alpha, r, bool(config.get("use_rslora")))


def build_adapter(folder: Path, config: Mapping[str, Any], found: Found) -> Adapter:
    """Put factors together, checking that none is missing and that they fit.

    Args:
        folder: Where they come from, for messages.
        config: What the adapter carries beside its factors.
        found: Its tensors. Without M a module is plain LoRA.

    Returns:
        The adapter.

    Raises:
        AdapterError: If a factor is missing or of the wrong shape.
    """
    if not found.modules:
        raise AdapterError(f"{folder} holds no factors of a known name.")
    built: dict[str, Factors] = {}
    modules: dict[str, tuple[dict[str, Tensor], Form | None]] = {}
    for name in sorted(found.modules):
        missing = {"A", "B"} - found.modules[name].keys()
        if missing:
            raise AdapterError(f"{folder}: {name} lacks its factor {' and '.join(sorted(missing))}.")
        for letter, tensor in found.modules[name].items():
            is_vector = letter in ("magnitude", "bias")
            if (tensor.ndim < 2 and not is_vector) or not tensor.is_floating_point():
                raise AdapterError(
                    f"{folder}: {letter} of {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; a factor is a "
                    "matrix of floats. The file is damaged, or of another method."
                )
        own = found.modules[name]
        try:
            ranks = {rank for rank, _ in _said(config, name)}
            number = 1 if name in found.embeddings or own["A"].ndim > 2 else experts.count(own, config, ranks)
            if number > 1:
                apart = experts.separate(name, own, number)
                modules.update({path: (tensors, experts.EXPERT) for path, tensors in apart.items()})
            else:
                modules[name] = (own, None)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {name}: {error}") from error
    for name, (own, form) in modules.items():
        try:
            tensors = own
            if form is None:
                tensors, form = as_matrices(own, name in found.embeddings)
            A, r = tensors["A"], tensors["A"].shape[0]
            M = tensors["M"] if "M" in tensors else torch.eye(r, dtype=A.dtype)
            scale, magnitude = module_scale(config, name, r), tensors.get("magnitude")
            built[name] = Factors(A, M, tensors["B"], scale, form, magnitude, tensors.get("bias"))
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}") from error
        except ValueError as error:
            raise AdapterError(f"{folder}: {name}: {error}") from error
    for argument, what, having in (
        ("use_dora", "a magnitude", sum(f.magnitude is not None for f in built.values())),
        ("lora_bias", "a bias on B", sum(f.bias is not None for f in built.values())),
    ):
        if having != (len(built) if config.get(argument) else 0):
            raise AdapterError(
                f"{folder}: its configuration says {argument}={bool(config.get(argument))}, and {having} of "
                f"{len(built)} modules have {what}. All must have one, or none. Save the adapter again."
            )
    return Adapter(built, _untie(config, built, found.embeddings), dict(found.rest))


def _untie(config: Mapping[str, Any], modules: Iterable[str], embeddings: set[str]) -> dict[str, Any]:
    """Say of a head whose factors are the embedding's that it has its own, as it has in files.

    Folding and scaling leave both the same ΔW, but other factors, which a loader that ties them again would mix up.
    """
    config = dict(config)
    targets = config.get("target_modules")
    if not config.get("ensure_weight_tying") or not embeddings or not targets:
        return config
    is_pattern = isinstance(targets, str)
    beside = [
        name
        for name in modules
        if not (
            re.fullmatch(targets, name)
            if is_pattern
            else any(name == target or name.endswith(f".{target}") for target in targets)
        )
    ]
    config["ensure_weight_tying"] = False
    if is_pattern and beside:
        config["target_modules"] = "|".join(f"(?:{part})" for part in (targets, *map(re.escape, beside)))
    elif beside:
        config["target_modules"] = sorted({*targets, *beside})
    return config


def settle(adapter: Adapter) -> dict[str, Any]:
    """Make a configuration whose modules, ranks and alphas are those of the factors.

    Args:
        adapter: The adapter. If its configuration says the same already, that comes back.

    Returns:
        The configuration.
    """
    config = copy.deepcopy(dict(adapter.config))
    if adapter.has_magnitudes:
        config["use_dora"] = True
    if adapter.has_biases:
        config["lora_bias"] = True
    if not config.get("target_modules") and not config.get("target_parameters"):
        config["target_modules"] = name_exactly(adapter.modules)
    if any(f.form == experts.EXPERT for f in adapter.modules.values()) and not config.get(
        "target_parameters"
    ):
        raise AdapterError(
            "The adapter has experts, and its configuration no target_parameters, so PEFT would not find them. Take "
            "the adapter from where it was saved with PEFT."
        )
    with contextlib.suppress(AdapterError):
        if all(module_scale(config, n, f.r) == f.scale for n, f in adapter.modules.items()):
            return config
    ranks = {name: f.r for name, f in adapter.modules.items()}
    alphas = {name: _whole(f.scale * f.r) for name, f in adapter.modules.items()}
    # Patterns name modules; experts are looked up by their parameters, so what they have is the rule.
    rule = [name for name, f in adapter.modules.items() if f.form == experts.EXPERT] or list(ranks)
    r = Counter(ranks[name] for name in rule).most_common(1)[0][0]
    alpha = Counter(alphas[name] for name in rule).most_common(1)[0][0]
    if len(rule) < len(ranks) and {(ranks[name], alphas[name]) for name in rule} != {(r, alpha)}:
        raise AdapterError(
            "Experts have different ranks or scales, which PEFT's files cannot say. Give them one with --rank."
        )
    config.update(r=r, lora_alpha=alpha, use_rslora=False)
    config["rank_pattern"] = {exact_pattern(name): rank for name, rank in ranks.items() if rank != r}
    config["alpha_pattern"] = {exact_pattern(name): a for name, a in alphas.items() if a != alpha}
    return config


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha


def name_exactly(modules: Iterable[str]) -> list[str] | str:
    """Return ``target_modules`` that name these modules and no others.

    Args:
        modules: Paths in the base model.

    Returns:
        Their paths; or a regular expression, if one is so short that it could end another module's path.
    """
    names = sorted(modules)
    return names if all("." in name for name in names) else "(" + "|".join(map(re.escape, names)) + ")"


def write_files(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files of an adapter directory.

    Args:
        folder: An existing directory, as ``staged`` gives it.
        config: JSON object; sets are written as sorted lists.
        tensors: Tensors by name.

    Raises:
        OSError: If the disk is full or the folder not writable.
    """
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; the same tensors always give the same bytes.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Text by key.

    Raises:
        OSError: If the disk is full or the place not writable.
    """
    # Sorted, and each its own memory.
    ready = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    try:
        save_file(ready, path, metadata=metadata)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    if len(metadata) > 1:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order; its writer leaves that to chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length)
        if len(text) != length:
            raise OSError(f"{path}: its header of {length} bytes came out as {len(text)} when put in order.")
        file.seek(8)
        file.write(text)


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Write a directory beside its place and move it there when everything inside the block went well.

    Args:
        out: Where it shall appear; must not exist, or be an empty directory.

    Yields:
        A temporary directory beside ``out``. If the block raises, it is removed and ``out`` stays as it was.

    Raises:
        FileExistsError: If something lies at ``out`` already.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists already. Name a new directory, or remove that one first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[Path]:
    """Write a file beside its place and move it there when everything inside the block went well.

    Args:
        out: Where it shall appear; must not exist.

    Yields:
        A path in a temporary directory beside ``out``. If the block raises, nothing is left of it.

    Raises:
        FileExistsError: If something lies at ``out`` already.
    """
    out = Path(out)
    if out.is_symlink() or out.exists():
        raise FileExistsError(f"{out} exists already. Name a new file, or remove that one first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield temporary / out.name
        (temporary / out.name).replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """Read the process's umask, which only setting it reveals."""
    value = os.umask(0)
    os.umask(value)
    return value
