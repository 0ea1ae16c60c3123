"""LoftQ's start (arXiv:2310.08659): the adapter begins as what quantization took from the weights.

With a base whose weight W is held as its quantized values Q, and the r leading singular triples of what was lost,

    W - Q ≈ U_r·diag(σ)·V_rᵀ        A = V_rᵀ    B = U_r    M = diag(σ) / s        Q + s·B·M·A ≈ W

so the model begins nearer to the one that was not quantized. (PEFT's LoRA leaves s out, so its start fits for s = 1.)
The base stays as it is, and nothing is subtracted: the adapter is one of rank r, for a base that is quantized alike.

The weights before quantization are on disk, so they are read by a call after ``get_peft_model``:

    moslora.replace_lora_weights_loftq(model, model_path)

PEFT's other way, quantized values in the place of the weights of a base that is not quantized, changes the base, which
the adapter's file cannot tell; it is refused. So are iterations, each of which quantizes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moslora.compat.peft.functions import MODEL_PREFIX, stored_weights
from moslora.core.mixers import DEFAULTS, SINGULAR_VALUES
from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner import dora
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.linear import MoSLoRALinear

__all__ = ["check_base", "replace_lora_weights_loftq"]


def check_base(model: nn.Module, config: MoSLoRAConfig) -> None:
    """Refuse a base of which nothing is quantized.

    Args:
        model: The adapted model.
        config: The configuration of the adapter that was just added.

    Raises:
        ValueError: If a new adapter must begin so.

    Warns:
        UserWarning: If a saved one did.
    """
    layers = [module for module in model.modules() if isinstance(module, MoSLoRALayer)]
    if config.init_lora_weights != "loftq" or any(layer.quantization_backend is not None for layer in layers):
        return
    if config.is_saved:
        warn(
            "This adapter began as what quantization took from its base (LoftQ), and this base is not quantized: here "
            "it adds that to weights from which nothing was taken. Load the base quantized as in training.",
            stacklevel=3,
        )
        return
    raise UsageError(
        "init_lora_weights='loftq' starts from what quantization took from the weights, and no adapted layer of this "
        "base is quantized. Load the base with quantization_config=BitsAndBytesConfig(load_in_4bit=True), and call "
        "moslora.replace_lora_weights_loftq(model) after get_peft_model; or choose another start."
    )


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Start an adapter on a quantized base from what quantization took from the weights, as PEFT's function does.

    Args:
        peft_model: A ``PeftModel`` with a new adapter on linear layers, some of them quantized; others start as LoRA's.
        model_path: The safetensors file of the weights before quantization, or the folder that holds it (in shards,
            too). None takes the base's own, if it came from the hub.
        adapter_name: The adapter's name.
        callback: Called after each module with the model and the module's path; False takes its start back.

    Raises:
        ValueError: If no layer is quantized, the weights do not fit, or the configuration asks for another start.

    Example:
        >>> from peft import LoftQConfig
        >>> from moslora import MoSLoRAConfig, replace_lora_weights_loftq
        >>> config = MoSLoRAConfig(init_lora_weights="loftq", target_modules="all-linear")
        >>> # model = get_peft_model(base_in_4_bits, config); replace_lora_weights_loftq(model, "folder/of/the/base")
    """
    config = _configuration(peft_model, adapter_name)
    whole = {
        name: module
        for name, module in peft_model.named_modules()
        if isinstance(module, MoSLoRALinear) and adapter_name in module.scaling
    }
    layers = {name: layer for name, layer in whole.items() if layer.quantization_backend is not None}
    if not layers:
        raise UsageError(f"No quantized linear layer of this model carries an adapter {adapter_name!r}.")
    if any(layer.merged for layer in layers.values()):
        raise UsageError("Adapters are merged into the model. Call unmerge_adapter() first.")
    stored = stored_weights(peft_model, model_path)
    for layer in whole.values():
        _make_real(layer, adapter_name, config)
    for name, layer in layers.items():
        path = name.removeprefix(MODEL_PREFIX)
        before = _values(layer, adapter_name)
        _put(
            layer,
            adapter_name,
            config,
            *_components(layer, adapter_name, path, stored.get_tensor(f"{path}.weight")),
        )
        if callback is not None and not callback(peft_model, path):
            _put(layer, adapter_name, config, *before)
    config.init_lora_weights, config.mixer = "loftq", SINGULAR_VALUES


def _configuration(model: nn.Module, adapter_name: str) -> MoSLoRAConfig:
    configs: Any = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise UsageError(f"The model has no adapter {adapter_name!r}; it has {sorted(configs)}.")
    config: MoSLoRAConfig = configs[adapter_name]
    asked = (config.init_lora_weights, config.mixer, config.match_scale)
    if asked not in (*((True, mixer, False) for mixer in DEFAULTS), ("loftq", SINGULAR_VALUES, False)):
        raise UsageError(
            f"The adapter's configuration says init_lora_weights={asked[0]!r}, mixer={asked[1]!r} and match_scale="
            f"{asked[2]}, and LoftQ makes M the singular values. Set init_lora_weights='loftq' and leave both out."
        )
    return config


def _make_real(layer: MoSLoRALinear, adapter_name: str, config: MoSLoRAConfig) -> None:
    """Make factors anew that are on the meta device, in their dtype."""
    held = layer.read_factor(layer.adapter_layer_names[0], adapter_name)
    if held.is_meta:
        layer.update_layer(adapter_name, layer.r[adapter_name], layer.lora_alpha[adapter_name], config)
        for name in layer.adapter_layer_names[:3]:
            getattr(layer, name)[adapter_name].to(held.dtype)


def _values(layer: MoSLoRALinear, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return what an adapter holds; as it would begin in LoRA, if it has no values yet."""
    A, B = (layer.read_factor(layer.adapter_layer_names[i], adapter_name).clone() for i in (0, 2))
    if adapter_name in layer.unfilled:
        return A, torch.eye(len(A), dtype=A.dtype, device=A.device), torch.zeros_like(B)
    return A, layer.held_factors(adapter_name)[1].clone(), B


def _components(
    layer: MoSLoRALinear, adapter_name: str, path: str, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose what quantization took: A, M and B with ``s·B·M·A`` its principal part."""
    held = layer.get_base_weight().float()
    if weight.shape != held.shape:
        raise UsageError(
            f"{path}.weight is of shape {tuple(weight.shape)} in the file, and of {tuple(held.shape)} in the model. "
            "Name the weights of this base."
        )
    r, scale = layer.r[adapter_name], layer.scaling[adapter_name]
    if r > min(held.shape) or not scale > 0:
        raise UsageError(
            f"{path}: rank {r} with a scale of {scale} cannot start from a weight of shape {tuple(held.shape)}. Set r "
            f"to {min(held.shape)} at most, and lora_alpha above 0."
        )
    lost = weight.to(held.device, torch.float32) - held
    lost = lost.T if layer.fan_in_fan_out else lost  # (out, in)
    U, values, Vh = torch.linalg.svd(lost, full_matrices=False)
    return Vh[:r], torch.diag(values[:r] / scale), U[:, :r]


def _put(
    layer: MoSLoRALinear, adapter_name: str, config: MoSLoRAConfig, A: Tensor, M: Tensor, B: Tensor
) -> None:
    held_A, held_B = (layer.read_factor(layer.adapter_layer_names[i], adapter_name) for i in (0, 2))
    layer.set_factors(adapter_name, A.to(held_A.dtype), M.to(held_A.dtype), B.to(held_B.dtype))
    dora.begin(layer, adapter_name, config)
    layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
