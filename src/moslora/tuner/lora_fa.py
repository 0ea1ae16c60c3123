"""LoRA-FA (arXiv:2308.03303) with a mixer: A is frozen, and what the layers keep for backward is of rank r.

With ``A' = M·A`` the update is ``s·B·A'``, a LoRA's. The gradient of B that moves ``W0 + ΔW`` as nearly as possible
along the gradient of full fine-tuning is then LoRA-FA's, with A' in A's place:

    dB  →  dB · (A'·A'ᵀ)⁻¹ / s²

M is trained as everything else is, by AdamW, and A' follows it. Where M is fixed (``train_mixer=False``) this is
LoRA-FA of the folded adapter, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from moslora.errors import UsageError
from moslora.tuner import dora
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.linear import MoSLoRALinear

__all__ = ["create_lorafa_optimizer"]


class _LoraFAOptimizer(LoraFAOptimizer):  # type: ignore[misc]
    """PEFT's optimizer, for which A' is computed anew before every step."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], composed: list[tuple[nn.Parameter, MoSLoRALayer, str]]
    ) -> None:
        super().__init__(groups)
        self.composed = composed

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step.

        Args:
            closure: Computes the loss and its gradients anew, and returns the loss.
        """
        with torch.no_grad():
            for target, layer, name in self.composed:
                target.copy_(_composed(layer, name))
        return super().step(closure)


def _composed(layer: MoSLoRALayer, adapter_name: str) -> Tensor:
    """Return ``M·A``, shape ``(r, in)``."""
    A, M, _ = layer.held_factors(adapter_name)
    composed: Tensor = M @ A.to(M.dtype)
    return composed


def create_lorafa_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Freeze A, and make an optimizer for what is left: LoRA-FA's for B, AdamW for mixers and everything else.

    It stands for PEFT's function of this name, whose other arguments, ``r`` and ``lora_alpha``, are known from the
    layers. A stays frozen through ``set_adapter`` too.

    Args:
        model: A model with MoSLoRA adapters on linear layers, as ``get_peft_model`` returns it.
        lr: Learning rate, positive.
        weight_decay: As AdamW's; at least 0.

    Returns:
        PEFT's ``LoraFAOptimizer``.

    Raises:
        ValueError: If the model trains no such adapter, or a layer has factors for which LoRA-FA has no meaning.

    Example:
        >>> from peft import get_peft_model
        >>> from moslora import MoSLoRAConfig, create_lorafa_optimizer
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), MoSLoRAConfig(r=2, target_modules=["0"]))
        >>> optimizer = create_lorafa_optimizer(model, lr=1e-3)
        >>> sorted(name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad)
        ['moslora_B', 'moslora_M']
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoSLoRALayer)}
    pairs: dict[int, tuple[str, MoSLoRALayer, str]] = {}
    for path, layer in layers.items():
        for adapter in layer.active_here():
            if adapter in layer.tied:
                continue
            weight = layer.parameter_of(layer.adapter_layer_names[2], adapter)
            if not weight.requires_grad:
                continue
            _check(path, layer, adapter)
            pairs[id(weight)] = (path, layer, adapter)
    if not pairs:
        raise UsageError(
            "The model trains no MoSLoRA factor. Make it with get_peft_model(model, MoSLoRAConfig(...)), or "
            "load it with is_trainable=True."
        )
    for _, layer, adapter in pairs.values():
        first = layer.adapter_layer_names[0]
        frozen = layer.frozen_peft_weight_names.get(adapter, ())
        layer.frozen_peft_weight_names[adapter] = tuple(dict.fromkeys((*frozen, first)))
        getattr(layer, first)[adapter].requires_grad_(False)
    # PEFT's optimizer takes two parameters in a row for A and B where "lora" is in their names, which have to differ.
    groups: dict[float, dict[str, Any]] = {}
    composed: list[tuple[nn.Parameter, MoSLoRALayer, str]] = []
    for index, (_, parameter) in enumerate((n, p) for n, p in model.named_parameters() if p.requires_grad):
        found = pairs.get(id(parameter))
        scale = 1.0 if found is None else float(found[1].scaling[found[2]])
        group = groups.setdefault(
            scale, {"params": [], "names": [], "scaling_factors": [], "scaling_factor": scale}
        )
        if found is None:
            members = [(f"{index}", parameter)]
        else:
            A = nn.Parameter(_composed(found[1], found[2]).to(parameter.dtype), requires_grad=False)
            composed.append((A, found[1], found[2]))
            members = [(f"{index}.lora_A", A), (f"{index}.lora_B", parameter)]
        for name, member in members:
            group["params"].append(member)
            group["names"].append(name)
            group["scaling_factors"].append(scale)
    rates = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999)}
    return _LoraFAOptimizer([{**group, **rates} for group in groups.values()], composed)


def _check(path: str, layer: MoSLoRALayer, adapter_name: str) -> None:
    """Refuse a layer whose B has no such gradient.

    Raises:
        ValueError: With the reason and the way out.
    """
    reason = None
    if not isinstance(layer, MoSLoRALinear):
        reason = f"a {type(layer.get_base_layer()).__name__} has other factors than a linear layer's"
    elif dora.has_magnitude(layer, adapter_name):
        reason = "DoRA's magnitude rescales the update, so dB is not that of s·B·M·A (use_dora=False)"
    if reason:
        raise UsageError(
            f"{path}: LoRA-FA cannot be used here: {reason}. Leave the module out of target_modules, or train "
            "with moslora.param_groups and any optimizer."
        )
