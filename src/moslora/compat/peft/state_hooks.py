"""Names of tensors in files: PEFT asks the tuner since 0.21; what stands in for that with 0.18 to 0.20."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from moslora.compat.peft.base_layer import TunerLayer
from moslora.compat.peft.functions import MODEL_PREFIX
from moslora.compat.torch import path_without_wrappers

__all__ = ["HAS_STATE_HOOKS", "StateHooks", "adapted_layers", "is_beside_base", "modules_by_path"]

HAS_STATE_HOOKS = hasattr(BaseTuner, "_get_adapter_state_dict")


class StateHooks:
    """What ``BaseTuner`` of PEFT 0.21 knows about names in files, for 0.18 to 0.20. Nothing is lost."""

    @staticmethod
    def _remove_adapter_name_from_key(key: str, adapter_name: str) -> str:
        """Return a tensor's name in a file; the adapter's name is its last part or the one before."""
        if key.endswith(f".{adapter_name}"):
            return key.removesuffix(f".{adapter_name}")
        path, dot, last = key.rpartition(".")
        return f"{path.removesuffix(f'.{adapter_name}')}{dot}{last}"

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """Select the tensors of adapted layers that are not their bases', and the biases that are trained."""
        layers = adapted_layers(model)
        selected = {key: state_dict[key] for key in state_dict if is_beside_base(key, layers)}
        if config.bias == "all":
            selected |= {key: t for key, t in state_dict.items() if key == "bias" or key.endswith(".bias")}
        elif config.bias.endswith("_only"):
            names = [f"{path}.base_layer.bias" for path in layers]
            selected |= {name: state_dict[name] for name in names if name in state_dict}
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the adapter's name into the names of tensors of adapted layers; leave the others."""
        layers, in_model = adapted_layers(model), {}
        for key in model.state_dict():
            if not is_beside_base(key, layers, adapter_name):
                continue
            in_file = cls._remove_adapter_name_from_key(key, adapter_name)
            in_model[in_file] = key
            if not key.startswith(MODEL_PREFIX):  # put straight into a model, without a PeftModel around it
                in_model[MODEL_PREFIX + in_file] = key
        return {in_model.get(key, key): tensor for key, tensor in state_dict.items()}


_CONTAINERS = (nn.ModuleDict, nn.ParameterDict)


def modules_by_path(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with the paths that state dicts have, without FSDP's wrappers, for PEFT 0.18 to 0.20.

    Args:
        model: The adapted model.
    """
    for name, module in model.named_modules():
        yield path_without_wrappers(name), module


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted layers by path, for PEFT 0.18 to 0.20.

    Args:
        model: The adapted model.
    """
    return {path: module for path, module in modules_by_path(model) if isinstance(module, TunerLayer)}


def is_beside_base(key: str, layers: Mapping[str, nn.Module], adapter_name: str | None = None) -> bool:
    """Tell whether a tensor belongs to the innermost adapted layer that it lies in, not to its base; PEFT 0.18 to 0.20.

    Args:
        key: Its name in a state dict.
        layers: Adapted layers by path.
        adapter_name: The adapter to which it must belong; None takes every adapter's.
    """
    path, inside = key, ""
    while path:
        path, _, last = path.rpartition(".")
        inside = f"{last}.{inside}" if inside else last
        if path in layers:
            break
    else:
        return False
    first, _, rest = inside.partition(".")
    if first == "base_layer":
        return False
    is_named = isinstance(getattr(layers[path], first, None), _CONTAINERS)
    return adapter_name is None or not is_named or rest.split(".")[0] == adapter_name
