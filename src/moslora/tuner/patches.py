"""What has to be changed in PEFT for adapters of this type; each with its reason, and when it can go.

All pass every other type through untouched, and are made once, by ``register``. They are made where PEFT itself looks,
so that scripts may import its functions before or after this package; what could not be is said. What older versions
lack is in ``compat``; where a newer one has moved a function, ``patch`` warns.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import peft.utils
from peft.tuners.lora import LoraLayer
from torch import nn

from moslora import versions
from moslora.compat import peft as compat
from moslora.tuner import dora, eva, loftq, swapping
from moslora.tuner.config import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer

__all__ = ["patch"]


def _swap_own(swap: Any) -> Any:
    """Let PEFT's hot-swap put an adapter of this type into the ranks, the scale and the split mixers that are there.

    PEFT (seen 0.18 to 0.21) copies tensors of a file into the parameters of the same names, fills up A and B alone to
    a larger rank, and changes the scale. Without this, a smaller mixer fails in the middle of the copying, and a start
    would be added to the new M. It can go when PEFT hands hot-swapping to the tuner.
    """

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(config, MoSLoRAConfig):
            return swap(model, state_dict, adapter_name, config, *args, **kwargs)
        name = compat.Tuner._remove_adapter_name_from_key
        return swapping.swap(
            model, {name(key, adapter_name): t for key, t in state_dict.items()}, adapter_name, config
        )

    return hotswap_adapter_from_state_dict


def _widen_own(pad: Any) -> Any:
    """Let PEFT's ``prepare_model_for_compiled_hotswap`` raise the ranks of adapters of this type.

    It knows the layers of LoRA alone (seen 0.18 to 0.21). It can go when PEFT hands this to the tuner.
    """

    @functools.wraps(pad)
    def pad_lora_weights(model: nn.Module, target_rank: int) -> bool:
        has_own = swapping.widen(model, target_rank)
        return bool(pad(model, target_rank)) or has_own

    return pad_lora_weights


def _find_own(convert: Any) -> Any:
    """Let PEFT's ``prepare_model_for_compiled_hotswap`` find adapters of this type, whose scale stays a number.

    It makes tensors of LoRA's scales, so that they can change in a compiled model; here they never do. It can go with
    the one above.
    """

    @functools.wraps(convert)
    def convert_scalings_to_tensor(model: nn.Module) -> bool:
        has_own = any(isinstance(module, MoSLoRALayer) for module in model.modules())
        return bool(convert(model)) or has_own

    return convert_scalings_to_tensor


def _load_in_place(load: Any) -> Any:
    """Let transformers' ``load_adapter(hotswap=True)`` take adapters of this type.

    It refuses every type but LORA (seen 4.57 to 5.23), and of LoRA it goes on with the old scale, whatever the new
    adapter's is. It can go when transformers asks PEFT.
    """

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind(self, *args, **kwargs).arguments
        name, hotswap = given.get("adapter_name"), given.get("hotswap", "auto")
        config = getattr(self, "peft_config", {}).get(name) if self._hf_peft_config_loaded else None
        if hotswap == "auto":
            hotswap = getattr(self, "_hotswap_enabled", False)
        if not hotswap or not isinstance(config, MoSLoRAConfig):
            return load(self, *args, **kwargs)
        return swapping.load(self, given, config)

    return load_adapter


def _rename_magnitude_after(build: Any) -> Any:
    """Let transformers' ``load_adapter`` find the magnitude of adapters that moslora 0.1 saved.

    It reads files by the names of parameters (seen transformers 5.0 to 5.23), which are not those of then. Without this
    such an adapter keeps the magnitude that it starts with. It can go when files of 0.1 need not be read.
    """

    @functools.wraps(build)
    def build_peft_weight_mapping(*args: Any, **kwargs: Any) -> Any:
        mapping = build(*args, **kwargs)
        if not mapping:
            return mapping
        old, new = (rf"\.{name}\.weight$" for name in (dora.IN_OLD_FILES, dora.HELD))
        return [compat.conversion.WeightRenaming(old, new.replace("\\", "").removesuffix("$")), *mapping]

    return build_peft_weight_mapping


def _refuse_own(optimizer: Any) -> Any:
    """Let PEFT's ``create_lorafa_optimizer`` refuse a model with adapters of this type, and name ours.

    It takes A and B for two parameters in a row (seen 0.18 to 0.21), between which the mixer stands, and fails in the
    first step. It can go when PEFT asks the tuner.
    """

    class LoraFAOptimizer(optimizer):  # type: ignore[misc]
        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            params = list(params)
            names = [name for group in params if isinstance(group, dict) for name in group.get("names", ())]
            if any(".moslora_" in name for name in names):
                raise ValueError(
                    "PEFT's create_lorafa_optimizer pairs A with the parameter after it, which is the mixer here. Call "
                    "moslora.create_lorafa_optimizer(model, lr, weight_decay) instead."
                )
            super().__init__(params, *args, **kwargs)

    return LoraFAOptimizer


def _put_components_of_eva(load: Any) -> Any:
    """Let PEFT's ``initialize_lora_eva_weights`` fill adapters of this type.

    Its last step (seen 0.18 to 0.21) looks for LoRA's layers, finds none, and leaves a configuration without targets.
    It can go when PEFT asks the tuner.
    """

    @functools.wraps(load)
    def _load_eva_state_dict(model: nn.Module, eva_state_dict: Any, adapter_name: str) -> Any:
        configs: Any = model.peft_config
        if isinstance(configs[adapter_name], MoSLoRAConfig):
            return eva.put_components(model, eva_state_dict, adapter_name)
        return load(model, eva_state_dict, adapter_name)

    return _load_eva_state_dict


def _choose_modules_for_eva(compute: Any) -> Any:
    """Let PEFT compute components for the modules that carry the adapter.

    It takes every module with a base layer that is none of LoRA's own unsupported ones (seen 0.18 to 0.21), so also
    layers of other adapters. It can go with ``_put_components_of_eva``.
    """

    @functools.wraps(compute)
    def _get_eva_state_dict(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(compute).bind(*args, **kwargs)
        config, model = given.arguments.get("peft_config"), given.arguments.get("model")
        if (
            isinstance(config, MoSLoRAConfig)
            and isinstance(model, nn.Module)
            and hasattr(model, "peft_config")
        ):
            given.arguments["target_module_check_fn"] = eva.has_components(config, model)
        return compute(*given.args, **given.kwargs)

    return _get_eva_state_dict


def _start_with_loftq(replace: Any) -> Any:
    """Let PEFT's ``replace_lora_weights_loftq`` start adapters of this type.

    It looks for LoRA's own layers, and says that there are none (seen 0.18 to 0.21). Whoever imported it before this
    package has ``moslora.replace_lora_weights_loftq``. It can go when PEFT asks the tuner.
    """

    @functools.wraps(replace)
    def replace_lora_weights_loftq(
        peft_model: Any, model_path: Any = None, adapter_name: str = "default", callback: Any = None
    ) -> None:
        if isinstance(peft_model.peft_config[adapter_name], MoSLoRAConfig):
            return loftq.replace_lora_weights_loftq(peft_model, model_path, adapter_name, callback)
        return replace(peft_model, model_path, adapter_name, callback)  # type: ignore[no-any-return]

    return replace_lora_weights_loftq


def _refuse_to_route(check: Any) -> Any:
    """Let PEFT's ``create_arrow_model`` refuse adapters of this type, and say what to do.

    It takes what it does not find of LoRA for None (seen 0.18 to 0.21). It can go when PEFT checks the type.
    """

    @functools.wraps(check)
    def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: Any) -> Any:
        if any(isinstance(module, MoSLoRALayer) for module in model.modules()):
            raise ValueError(
                "Arrow routes tokens between plain LoRAs, and these are MoSLoRA adapters. Fold them first: "
                "moslora export ADAPTER OUT --to lora."
            )
        return check(model, adapter_names)

    return check_loaded_lora_compatibility_arrow


HOTSWAP, EVA = "peft.utils.hotswap", "peft.tuners.lora.eva"
# Where each change is made: the module or class, the name, and whether the supported version that is installed has it.
CHANGES: tuple[tuple[str, str, Any, bool], ...] = (
    (HOTSWAP, "hotswap_adapter_from_state_dict", _swap_own, True),
    (HOTSWAP, "_pad_lora_weights", _widen_own, True),
    (HOTSWAP, "_convert_scalings_to_tensor", _find_own, True),
    (
        "peft.utils.transformers_weight_conversion",
        "build_peft_weight_mapping",
        _rename_magnitude_after,
        compat.HAS_CONVERSION,
    ),
    ("transformers.integrations.peft:PeftAdapterMixin", "load_adapter", _load_in_place, True),
    ("peft.optimizers.lorafa", "LoraFAOptimizer", _refuse_own, True),
    (EVA, "_load_eva_state_dict", _put_components_of_eva, True),
    (EVA, "_get_eva_state_dict", _choose_modules_for_eva, True),
    *(
        (place, "replace_lora_weights_loftq", _start_with_loftq, True)
        for place in ("peft", "peft.utils", "peft.utils.loftq_utils")
    ),
    ("peft.tuners.lora.arrow", "check_loaded_lora_compatibility_arrow", _refuse_to_route, True),
)
# What is changed in every module that has imported it by name, for older versions: scripts import these.
CHANGES_EVERYWHERE: tuple[tuple[str, Any], ...] = (
    ()
    if compat.HAS_STATE_HOOKS
    else (
        ("get_peft_model_state_dict", compat.get_state_through_tuner),
        ("set_peft_model_state_dict", compat.set_state_through_tuner),
    )
)


def patch() -> None:
    """Make the changes; again changes nothing.

    Warns:
        UserWarning: If a function is not where the supported versions have it.
    """
    missing = []
    for where, name, change, is_there in CHANGES:
        place = compat.find(where)
        now = getattr(place, name, None)
        if now is None:
            missing += [f"{where}.{name}".replace(":", ".")] if is_there else []
        elif not getattr(now, "is_by_moslora", False):
            setattr(place, name, _marked(change(now)))
    for name, change in CHANGES_EVERYWHERE:
        now = getattr(peft.utils, name)
        if not getattr(now, "is_by_moslora", False):
            changed = _marked(change(now))
            for holder in compat.holders_of(now, name):
                setattr(holder, name, changed)
    # ``rescale_adapter_scale`` asks what is a LoraLayer, whose scales these layers have, too.
    helpers = compat.find("peft.helpers")
    if getattr(helpers, "LoraLayer", None) is LoraLayer:
        helpers.LoraLayer = (LoraLayer, MoSLoRALayer)
    if missing:
        versions.warn_once(
            f"moslora changes {', '.join(missing)} so that adapters of its type are known there, and does not find "
            f"that in peft {versions.installed('peft')} with transformers {versions.installed('transformers')}."
        )


def _marked(changed: Any) -> Any:
    changed.is_by_moslora = True
    return changed
