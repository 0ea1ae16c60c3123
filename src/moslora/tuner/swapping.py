"""Hot-swapping: one adapter's values in the place of another's, in the tensors that are there.

A compiled model is bound to the shapes of its tensors and to the scale, so both stay:

- a lower rank is filled up with zeros, in A, M and B alike, which adds nothing to ``B·M·A``;
- another scale goes into the mixer, ``s'·B·M·A = s·B·(s'/s·M)·A``, and into a bias on B;
- modules that the new adapter leaves alone get zeros.

The model's own configuration stays true of what it holds, so what is swapped in can be saved and merged. A higher rank
has no place; ``widen`` makes one, before the model is compiled (PEFT's ``prepare_model_for_compiled_hotswap``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights, set_peft_model_state_dict
from peft.utils.hotswap import check_hotswap_configs_compatible
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from moslora.adapters.factors import exact_pattern
from moslora.compat.peft.functions import MODEL_PREFIX
from moslora.compat.torch import uncompiled
from moslora.compat.transformers import empty_loading_report
from moslora.core import functional
from moslora.errors import UsageError
from moslora.tuner import dora, kept_start
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.experts import ParamWrapper
from moslora.tuner.layer import MoSLoRALayer

__all__ = ["CHECKED", "load", "swap", "widen"]

# What must be the same in both configurations; ranks, alphas and rsLoRA are converted.
CHECKED = ("lora_dropout", "use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices")


def _layers(model: nn.Module, adapter_name: str | None = None) -> dict[str, MoSLoRALayer]:
    """Return the adapted layers by path, or those that have an adapter."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, MoSLoRALayer) and (adapter_name is None or adapter_name in module.scaling)
    }


def _own_key(path: str, layer: MoSLoRALayer) -> str:
    """Return what patterns of a configuration know a layer as."""
    key = path.removeprefix(MODEL_PREFIX)
    if isinstance(layer, ParamWrapper):
        key = f"{key.replace('.base_layer', '')}.{layer.parameter_name}"
    return key


def _scale(config: MoSLoRAConfig, key: str) -> float:
    """Return the scale that a configuration means for a module."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)
    return functional.scaling(alpha, rank, config.use_rslora)


def _why_not_widened(layer: MoSLoRALayer) -> str | None:
    """Tell why zeros cannot raise the rank of a layer; None if they can."""
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return f"{type(base).__name__}.{layer.parameter_name} holds its experts' ranks one after another"
    if getattr(base, "groups", 1) != 1:
        return f"a convolution of {base.groups} groups holds its groups' ranks one after another"
    return None


def _taller(tensor: Tensor, rows: int) -> Tensor:
    """Add rows of zeros."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _raised(A: Tensor, M: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill factors up with zeros, as they are held: ``(r, in, …)``, ``(r, r, …)``, ``(out, r, …)``."""

    def wider(tensor: Tensor) -> Tensor:
        return _taller(tensor.transpose(0, 1), r).transpose(0, 1).contiguous()

    return _taller(A, r), wider(_taller(M, r)), wider(B)


def _fit(
    path: str, layer: MoSLoRALayer, adapter_name: str, tensors: Mapping[str, Tensor], config: MoSLoRAConfig
) -> dict[str, Tensor]:
    """Return a layer's new tensors, of the rank and for the scale that are there.

    Raises:
        ValueError: With what hinders it.
    """
    groups = [layer.adapter_layer_names[:3]]
    groups += [kept_start.HELD] if kept_start.has_start(layer, adapter_name) else []
    suffix = "" if layer.container is nn.ParameterDict else ".weight"
    of_bias = f"{path}.{layer.adapter_layer_names[2]}.bias"
    out: dict[str, Tensor] = {}
    if not any(key.startswith(f"{path}.moslora_") for key in tensors):
        if dora.has_magnitude(layer, adapter_name):
            raise UsageError("the new adapter leaves it alone, and no magnitude stands for that")
        for group in groups:
            for name, held in zip(group, layer.held_factors(adapter_name), strict=True):
                out[f"{path}.{name}{suffix}"] = torch.zeros_like(held)
        own_bias = layer.bias_on_B(adapter_name)
        return out if own_bias is None else {**out, of_bias: torch.zeros_like(own_bias)}
    own, new = layer.unscaled[adapter_name], _scale(config, _own_key(path, layer))
    if own == 0 and new != 0:
        raise UsageError(f"its scale is 0, of which no mixer makes {new:g}")
    r = layer.r[adapter_name]
    for group in groups:
        keys = [f"{path}.{name}{suffix}" for name in group]
        if any(key not in tensors or tensors[key].ndim < 2 for key in keys):
            continue  # what is missing or damaged is named when it is loaded
        A, M, B = (tensors[key] for key in keys)
        rank, reason = M.shape[1], _why_not_widened(layer)
        if rank < r and reason:
            raise UsageError(f"rank {rank} does not fit into rank {r}, for {reason}")
        if rank > r:
            raise UsageError(
                f"rank {rank} does not fit into rank {r}; before the model is compiled call "
                f"peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank={rank})"
            )
        A, M, B = _raised(A, M, B, r) if rank < r else (A, M, B)
        if new != own:
            M = M.to(torch.promote_types(M.dtype, torch.float32)) * (new / own)
        out |= dict(zip(keys, (A, M, B), strict=True))
    if of_bias in tensors and new != own:
        b = tensors[of_bias]
        out[of_bias] = b.to(torch.promote_types(b.dtype, torch.float32)) * (new / own)
    return out


@torch.no_grad()
def swap(model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str, config: MoSLoRAConfig) -> None:
    """Put an adapter's values in the place of another's.

    Args:
        model: A model with adapters, as ``get_peft_model`` or transformers' ``add_adapter`` makes it; may be compiled.
        tensors: What a file has of the new adapter, by the model's names without the adapter's.
        adapter_name: The adapter whose place it takes.
        config: The new adapter's configuration.

    Raises:
        ValueError: If it does not fit into the other's place; nothing is changed then.
    """
    root: Any = uncompiled(model)
    layers = _layers(root, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise UsageError(
            f"Adapter {adapter_name!r} is merged into the base weights, so no other can take its place. Call "
            "unmerge_adapter() first."
        )
    fitted, problems = dict(tensors), list[str]()
    for path, layer in layers.items():
        if adapter_name in layer.tied:  # its source has the same factors in the file
            fitted = {key: t for key, t in fitted.items() if not key.startswith(f"{path}.moslora_")}
            continue
        try:
            fitted |= _fit(path, layer, adapter_name, tensors, config)
        except ValueError as error:
            problems.append(f"{path}: {error}")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(
            f"The adapter cannot take the place of {adapter_name!r}; nothing was changed.\n  "
            + "\n  ".join(problems[:5])
            + more
        )
    set_peft_model_state_dict(root, fitted, adapter_name)


def load(model: Any, arguments: Mapping[str, Any], config: MoSLoRAConfig) -> Any:
    """Do what transformers' ``load_adapter(hotswap=True)`` is asked for.

    Args:
        model: A transformers model with the adapter.
        arguments: Its arguments by name.
        config: The configuration of the adapter that gives up its place.

    Returns:
        What ``load_adapter`` returns, with nothing missing.

    Raises:
        ValueError: If the new adapter does not fit into the other's place; nothing is changed then.
    """
    path = arguments.get("peft_model_id")
    options = dict(arguments.get("adapter_kwargs") or {})
    if arguments.get("local_files_only"):
        options["local_files_only"] = True
    new, tensors = arguments.get("peft_config"), arguments.get("adapter_state_dict")
    if path is None and (new is None or tensors is None):
        raise UsageError("Give load_adapter a peft_model_id, or a peft_config and an adapter_state_dict.")
    new = PeftConfig.from_pretrained(path, **options) if new is None else new
    check_hotswap_configs_compatible(config, new)
    if tensors is None:
        device = next((p.device.type for p in model.parameters() if not p.is_meta), "cpu")
        tensors = load_peft_weights(path, device=device, **options)
    swap(
        model,
        {key.removeprefix(MODEL_PREFIX): t for key, t in tensors.items()},
        arguments["adapter_name"],
        new,
    )
    if not arguments.get("is_trainable"):
        model.eval()
    return empty_loading_report()


@torch.no_grad()
def widen(model: nn.Module, target_rank: int) -> bool:
    """Raise the rank of every adapter with zeros, so that adapters of up to that rank can be swapped in.

    Args:
        model: A model with adapters, not compiled yet.
        target_rank: Rank, not below theirs.

    Returns:
        Whether the model has any MoSLoRA layer.

    Raises:
        ValueError: If a layer's rank is above it, or cannot be raised; nothing is changed then.
    """
    layers = _layers(model)
    for path, layer in layers.items():
        for name, r in layer.r.items():
            reason = _why_not_widened(layer)
            if r > target_rank or (r < target_rank and reason):
                because = f", for {reason}" if reason else ""
                raise UsageError(
                    f"{path}: rank {r} of adapter {name!r} cannot be made {target_rank}{because}. Choose a target_rank "
                    f"{'equal to it' if reason else 'of at least that'}, or leave such modules out of the adapter."
                )
    for layer in layers.values():
        for name in [name for name, r in layer.r.items() if r < target_rank]:
            if name in layer.tied:
                layer.r[name] = target_rank
            else:
                _widen_layer(layer, name, target_rank)
    for name, config in getattr(model, "peft_config", {}).items():
        if isinstance(config, MoSLoRAConfig):
            _describe(config, name, layers)
    return bool(layers)


def _widen_layer(layer: MoSLoRALayer, adapter_name: str, r: int) -> None:
    """Raise the rank of an adapter in a layer."""
    factors = [factor.detach().clone() for factor in layer.held_factors(adapter_name)]
    dictionaries = layer.adapter_layer_names[:3]
    before = [layer.parameter_of(dictionary, adapter_name) for dictionary in dictionaries]
    own_bias = layer.bias_on_B(adapter_name)
    with torch.random.fork_rng(devices=[]):
        layer.make_factors(adapter_name, r, own_bias is not None)
    if own_bias is not None:
        cast(Any, layer.moslora_B[adapter_name]).bias = own_bias
    raised = _raised(*cast(tuple[Tensor, Tensor, Tensor], factors), r)
    for dictionary, old, value in zip(dictionaries, before, raised, strict=True):
        parameter = layer.parameter_of(dictionary, adapter_name)
        parameter.data = value.to(old.device, old.dtype)
        parameter.requires_grad_(old.requires_grad)
    if kept_start.has_start(layer, adapter_name):
        held = [cast(Any, layer._modules[name])[adapter_name].weight for name in kept_start.HELD]
        for start, value in zip(held, _raised(held[0], held[1], held[2], r), strict=True):
            start.data = value.data
    layer.r[adapter_name] = r


def _describe(config: MoSLoRAConfig, adapter_name: str, layers: Mapping[str, MoSLoRALayer]) -> None:
    """Make a configuration say the ranks and scales that an adapter has in its layers."""
    ranks, alphas = {}, {}
    for path, layer in layers.items():
        if adapter_name not in layer.scaling:
            continue
        r = layer.r[adapter_name]
        alpha = layer.unscaled[adapter_name] * (r**0.5 if config.use_rslora else r)
        layer.lora_alpha[adapter_name] = alpha
        if not path.endswith(".base_layer.out_proj"):  # inside an attention, and adapted with it
            ranks[_own_key(path, layer)], alphas[_own_key(path, layer)] = r, alpha
    if not ranks:
        return
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.rank_pattern = {exact_pattern(key): r for key, r in ranks.items() if r != config.r}
    config.alpha_pattern = {exact_pattern(key): a for key, a in alphas.items() if a != config.lora_alpha}
