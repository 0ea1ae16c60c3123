"""From the tensors and the configuration of a file to an adapter, and back."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moslora.adapters.factors import Adapter, Factors, Form, exact_pattern
from moslora.adapters.formats import experts
from moslora.adapters.formats.configuration import pattern_key
from moslora.adapters.formats.experts import owner
from moslora.adapters.formats.key_names import without_wrappers
from moslora.adapters.formats.layout import Found, as_matrices
from moslora.core.functional import scaling
from moslora.errors import AdapterError
from moslora.patterns import check_patterns

__all__ = ["build_adapter", "module_scale", "name_exactly", "settle"]


def _said(config: Mapping[str, Any], module: str) -> set[tuple[Any, Any]]:
    """Return which ranks and alphas a configuration may mean for a module.

    PEFT looks a parameter's up by the parameter's name, which its files do not tell; so all that may be in the
    module are tried.
    """
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    path = owner(module).replace(".base_layer", "")
    parameters = [name.rpartition(".")[2] for name in config.get("target_parameters") or ()]
    return {
        (
            ranks.get(pattern_key(ranks, name), config.get("r")),
            alphas.get(pattern_key(alphas, name), config.get("lora_alpha")),
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
        raise AdapterError(f"{module}: lora_alpha={alpha!r} is not a number.")
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
    if found.notes:
        config = without_wrappers(config)
    check_patterns(config, found.modules, str(folder), AdapterError)
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
    settled = _untie(config, built, found.embeddings)
    return Adapter(built, settled, dict(found.rest), found.notes, found.stripped)


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
