"""EVA's start (arXiv:2410.07170): A begins as the principal components of what each layer sees of some data.

PEFT computes them, by the same call as for LoRA, after ``get_peft_model``:

    peft.initialize_lora_eva_weights(model, dataloader)

Here they are put into the adapter. B starts at zero, so the adapter begins at the base model whatever M is, and M
starts as the configuration says. The components are shared out by the variance that they explain: a layer may get up to
rho times its rank, or none, and is then left without the adapter. What it came to is kept in the configuration.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moslora.adapters.factors import exact_pattern
from moslora.compat.peft.functions import MODEL_PREFIX
from moslora.core.mixers import forked_generator
from moslora.errors import UsageError
from moslora.terminal import warn
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.linear import MoSLoRALinear

__all__ = ["has_components", "put_components"]


def has_components(config: MoSLoRAConfig, model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Tell which modules of a model take part.

    Args:
        config: The configuration of one of its adapters.
        model: A ``PeftModel``.

    Returns:
        Whether a module, told by its name and itself, carries that adapter.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config")  # noqa: B009  no Module has it
    names = [name for name, other in configs.items() if other is config] or list(configs)
    return lambda _, module: isinstance(module, MoSLoRALinear) and any(n in module.scaling for n in names)


@torch.no_grad()
def put_components(model: nn.Module, components: Mapping[str, Tensor], adapter_name: str) -> None:
    """Start an adapter from principal components, with the ranks that they have.

    Args:
        model: A ``PeftModel``.
        components: A of each module, shape ``(rank, in)``, by the module's path in the model or in its base. A rank of
            0 takes the adapter out of the module.
        adapter_name: The adapter's name.

    Raises:
        ValueError: If components do not fit the model, or the mixer does not exist for their ranks. The model is as
            before then.

    Warns:
        UserWarning: If a module has none, so that it starts as with ``init_lora_weights=True``.
    """
    config: MoSLoRAConfig = getattr(model, "peft_config")[adapter_name]  # noqa: B009
    layers = {
        name.removeprefix(MODEL_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, MoSLoRALayer) and adapter_name in module.scaling
    }
    found = {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in components.items()}
    _check(layers, found, config)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in layers.items():
        A = found.get(path)
        r, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
        if A is not None and not len(A):
            _take_out(model, f"{MODEL_PREFIX}{path}", layer, adapter_name)
            continue
        if A is not None:
            adjusts = config.eva_config is not None and config.eva_config.adjust_scaling_factors
            r, alpha = len(A), alpha * len(A) / r if adjusts and len(A) != r else alpha
        _start(layer, adapter_name, r, alpha, A, config)
        ranks[path], alphas[path] = r, int(alpha) if float(alpha).is_integer() else alpha
    config.rank_pattern = {exact_pattern(path): r for path, r in ranks.items() if r != config.r}
    config.alpha_pattern = {exact_pattern(path): a for path, a in alphas.items() if a != config.lora_alpha}
    if len(ranks) < len(layers):
        _name_targets(config, list(ranks))
    missing = sorted(layers.keys() - found.keys())
    if missing:
        warn(
            f"{len(missing)} modules have no components of their own and start as with init_lora_weights=True: "
            f"{missing[:3]}.",
            stacklevel=2,
        )


def _check(layers: Mapping[str, MoSLoRALayer], found: Mapping[str, Tensor], config: MoSLoRAConfig) -> None:
    strange = sorted(found.keys() - layers.keys())
    if strange:
        raise UsageError(
            f"{len(strange)} components fit no adapted module of this model, as {strange[0]}. Compute them on the same "
            "model with the same target_modules."
        )
    for path, A in found.items():
        wanted = layers[path].in_features
        if A.ndim != 2 or A.shape[1] != wanted or not torch.isfinite(A).all():
            raise UsageError(
                f"The components of {path} are of shape {tuple(A.shape)}, or not finite; they must be finite numbers "
                f"of shape (rank, {wanted}). Compute them on the same model."
            )
    for r in sorted({len(A) for A in found.values() if len(A)}):
        try:
            config.start_mixer(r, forked_generator())
        except ValueError as error:
            raise UsageError(
                f"EVA gave a module rank {r}, for which this mixer does not exist: {error} With EvaConfig(rho=1.0) "
                "every module keeps its rank."
            ) from error


def _start(
    layer: MoSLoRALayer, adapter_name: str, r: int, alpha: float, A: Tensor | None, config: MoSLoRAConfig
) -> None:
    """Start an adapter anew in a layer, in the dtype that it was held in."""
    dtype = layer.read_factor(layer.adapter_layer_names[0], adapter_name).dtype
    own = copy.copy(config)
    own.init_lora_weights = True
    layer.update_layer(adapter_name, r, alpha, own, components=A)
    for name in layer.adapter_layer_names[:3]:
        getattr(layer, name)[adapter_name].to(dtype)


def _take_out(model: nn.Module, name: str, layer: MoSLoRALayer, adapter_name: str) -> None:
    """Take an adapter out of a layer, and the layer out of the model if it has no other."""
    active = [other for other in layer.active_adapters if other != adapter_name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another adapter that is made active, which is undone here
        layer.delete_adapter(adapter_name)
    layer.set_adapter(active)
    if not layer.scaling:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _name_targets(config: MoSLoRAConfig, paths: list[str]) -> None:
    """Let a configuration name these modules and no others."""
    config.target_modules = set(paths)
    if not all("." in path for path in paths):  # such a name may end another module's path
        config.target_modules = "(" + "|".join(map(re.escape, sorted(paths))) + ")"
        config.layers_to_transform = config.layers_pattern = None
