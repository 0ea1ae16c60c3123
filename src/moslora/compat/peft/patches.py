"""Changes of functions of PEFT and transformers, so that they know adapters of this package's type.

Each has its reason, the versions it was seen in, and when it can go. All pass every other type through untouched.
``patch`` makes them once, and they stay for the process, because scripts call these functions at any time. They are
made where PEFT itself looks, so that scripts may import its functions before or after this package. Where a newer
version has moved a function, ``patch`` warns. ``tuner/registration.py`` says what the functions do for this type
(``OwnMethods``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft.utils
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from moslora import versions
from moslora.compat.lookup import find, holders_of
from moslora.compat.peft.base_tuner import Tuner
from moslora.compat.peft.state_dict import get_state_through_tuner, set_state_through_tuner
from moslora.compat.peft.state_hooks import HAS_STATE_HOOKS
from moslora.compat.transformers import HAS_CONVERSION, weight_renaming
from moslora.errors import UsageError

__all__ = ["CHANGES", "CHANGES_EVERYWHERE", "OwnMethods", "patch"]


@dataclass(frozen=True)
class OwnMethods:
    """What the changed functions of PEFT (0.18 to 0.21.2) do for adapters of this package's type.

    Attributes:
        config_class: By which an adapter is known.
        layer_class: By which an adapted layer is known.
        swap: Puts an adapter in another's place: model, tensors by name, adapter's name, configuration.
        load_in_place: The same for transformers' ``load_adapter(hotswap=True)``: model, arguments, configuration.
        widen: Raises the ranks of a model's adapters; returns whether it has any.
        put_components: Starts an adapter from EVA's components: model, components by module, adapter's name.
        takes_components: Returns which modules take EVA's components, for a configuration and a model.
        start_from_loftq: Stands in for ``replace_lora_weights_loftq``.
        magnitude_names: The name of a magnitude in files of moslora 0.1, and today's.
    """

    config_class: type
    layer_class: type
    swap: Callable[[nn.Module, Mapping[str, Tensor], str, Any], None]
    load_in_place: Callable[[Any, Mapping[str, Any], Any], Any]
    widen: Callable[[nn.Module, int], bool]
    put_components: Callable[[nn.Module, Mapping[str, Tensor], str], None]
    takes_components: Callable[[Any, nn.Module], Callable[[str, nn.Module], bool]]
    start_from_loftq: Callable[..., None]
    magnitude_names: tuple[str, str]


def _swap_own(swap: Any, own: OwnMethods) -> Any:
    """Let PEFT's hot-swap put an adapter of this type into the ranks, the scale and the split mixers that are there.

    PEFT (seen 0.18 to 0.21.2) copies the tensors of a file into the parameters of the same names, pads A and B alone to
    a larger rank, and changes the scale. Without this, a smaller mixer fails in the middle of the copying, and a start
    would be added to the new M. It can go when PEFT asks the tuner to swap.
    """

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(config, own.config_class):
            return swap(model, state_dict, adapter_name, config, *args, **kwargs)
        name = Tuner._remove_adapter_name_from_key
        return own.swap(
            model, {name(key, adapter_name): t for key, t in state_dict.items()}, adapter_name, config
        )

    return hotswap_adapter_from_state_dict


def _widen_own(pad: Any, own: OwnMethods) -> Any:
    """Let PEFT's ``prepare_model_for_compiled_hotswap`` raise the ranks of adapters of this type.

    It looks for LoRA's layers alone (seen 0.18 to 0.21.2). Without this, only adapters of equal rank can be swapped. It
    can go when PEFT asks the tuner.
    """

    @functools.wraps(pad)
    def pad_lora_weights(model: nn.Module, target_rank: int) -> bool:
        has_own = own.widen(model, target_rank)
        return bool(pad(model, target_rank)) or has_own

    return pad_lora_weights


def _find_own(convert: Any, own: OwnMethods) -> Any:
    """Let PEFT's ``prepare_model_for_compiled_hotswap`` find adapters of this type, whose scale stays a number.

    It makes tensors of LoRA's scales (seen 0.18 to 0.21.2), so that they can change in a compiled model; here they
    never do. Without this, it raises that it found no adapter. It can go with ``_widen_own``.
    """

    @functools.wraps(convert)
    def convert_scalings_to_tensor(model: nn.Module) -> bool:
        has_own = any(isinstance(module, own.layer_class) for module in model.modules())
        return bool(convert(model)) or has_own

    return convert_scalings_to_tensor


def _load_own_in_place(load: Any, own: OwnMethods) -> Any:
    """Let transformers' ``load_adapter(hotswap=True)`` take adapters of this type.

    It refuses every type but LORA (seen transformers 4.57 to 5.23), and keeps LoRA's old scale, whatever the new
    adapter's is. It can go when transformers asks PEFT.
    """

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(load).bind(self, *args, **kwargs).arguments
        name, hotswap = arguments.get("adapter_name"), arguments.get("hotswap", "auto")
        config = getattr(self, "peft_config", {}).get(name) if self._hf_peft_config_loaded else None
        if hotswap == "auto":
            hotswap = getattr(self, "_hotswap_enabled", False)
        if not hotswap or not isinstance(config, own.config_class):
            return load(self, *args, **kwargs)
        return own.load_in_place(self, arguments, config)

    return load_adapter


def _rename_magnitude(build: Any, own: OwnMethods) -> Any:
    """Let transformers' ``load_adapter`` find the magnitude of adapters that moslora 0.1 saved.

    It reads files by the names of parameters (seen transformers 5.0 to 5.23), which have changed since. Without this,
    such an adapter keeps its initial magnitude. It can go when files of 0.1 need not be read.
    """

    @functools.wraps(build)
    def build_peft_weight_mapping(*args: Any, **kwargs: Any) -> Any:
        mapping = build(*args, **kwargs)
        if not mapping:
            return mapping
        old, new = own.magnitude_names
        return [weight_renaming(rf"\.{old}\.weight$", f".{new}.weight"), *mapping]

    return build_peft_weight_mapping


def _refuse_in_lora_fa(optimizer: Any, own: OwnMethods) -> Any:
    """Let PEFT's ``create_lorafa_optimizer`` refuse a model with adapters of this type, and name ours.

    It takes two parameters in a row for A and B (seen 0.18 to 0.21.2). Here the mixer stands between them. Without
    this, the first step fails on shapes. It can go when PEFT asks the tuner.
    """

    class LoraFAOptimizer(optimizer):  # type: ignore[misc]
        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
            params = list(params)
            names = [name for group in params if isinstance(group, dict) for name in group.get("names", ())]
            if any(".moslora_" in name for name in names):
                raise UsageError(
                    "PEFT's create_lorafa_optimizer pairs A with the parameter after it, which is the mixer here. Call "
                    "moslora.create_lorafa_optimizer(model, lr, weight_decay) instead."
                )
            super().__init__(params, *args, **kwargs)

    return LoraFAOptimizer


def _put_components_of_eva(load: Any, own: OwnMethods) -> Any:
    """Let PEFT's ``initialize_lora_eva_weights`` fill adapters of this type.

    Its last step (seen 0.18 to 0.21.2) looks for LoRA's layers. Without this, it finds none, and leaves a configuration
    without targets. It can go when PEFT asks the tuner.
    """

    @functools.wraps(load)
    def _load_eva_state_dict(model: nn.Module, eva_state_dict: Any, adapter_name: str) -> Any:
        configs: Any = model.peft_config
        if isinstance(configs[adapter_name], own.config_class):
            return own.put_components(model, eva_state_dict, adapter_name)
        return load(model, eva_state_dict, adapter_name)

    return _load_eva_state_dict


def _choose_modules_for_eva(compute: Any, own: OwnMethods) -> Any:
    """Let PEFT compute components for the modules that carry the adapter.

    It takes every module with a base layer but for a few of LoRA's (seen 0.18 to 0.21.2), so also layers of other
    adapters. Without this, components are computed for layers that have no adapter. It can go with
    ``_put_components_of_eva``.
    """

    @functools.wraps(compute)
    def _get_eva_state_dict(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(compute).bind(*args, **kwargs)
        config, model = call.arguments.get("peft_config"), call.arguments.get("model")
        if (
            isinstance(config, own.config_class)
            and isinstance(model, nn.Module)
            and hasattr(model, "peft_config")
        ):
            call.arguments["target_module_check_fn"] = own.takes_components(config, model)
        return compute(*call.args, **call.kwargs)

    return _get_eva_state_dict


def _start_own_from_loftq(replace: Any, own: OwnMethods) -> Any:
    """Let PEFT's ``replace_lora_weights_loftq`` start adapters of this type.

    It looks for LoRA's layers, and raises that there are none (seen 0.18 to 0.21.2). A script that imported it before
    this package calls ``moslora.replace_lora_weights_loftq`` instead. It can go when PEFT asks the tuner.
    """

    @functools.wraps(replace)
    def replace_lora_weights_loftq(
        peft_model: Any, model_path: Any = None, adapter_name: str = "default", callback: Any = None
    ) -> None:
        if isinstance(peft_model.peft_config[adapter_name], own.config_class):
            return own.start_from_loftq(peft_model, model_path, adapter_name, callback)
        return replace(peft_model, model_path, adapter_name, callback)  # type: ignore[no-any-return]

    return replace_lora_weights_loftq


def _refuse_to_route(check: Any, own: OwnMethods) -> Any:
    """Let PEFT's ``create_arrow_model`` refuse adapters of this type, and say what to do.

    It looks for LoRA's factors alone, and routes between none (seen 0.18 to 0.21.2). It can go when PEFT checks the
    type.
    """

    @functools.wraps(check)
    def check_loaded_lora_compatibility_arrow(model: nn.Module, adapter_names: Any) -> Any:
        if any(isinstance(module, own.layer_class) for module in model.modules()):
            raise UsageError(
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
        _rename_magnitude,
        HAS_CONVERSION,
    ),
    ("transformers.integrations.peft:PeftAdapterMixin", "load_adapter", _load_own_in_place, True),
    ("peft.optimizers.lorafa", "LoraFAOptimizer", _refuse_in_lora_fa, True),
    (EVA, "_load_eva_state_dict", _put_components_of_eva, True),
    (EVA, "_get_eva_state_dict", _choose_modules_for_eva, True),
    *(
        (place, "replace_lora_weights_loftq", _start_own_from_loftq, True)
        for place in ("peft", "peft.utils", "peft.utils.loftq_utils")
    ),
    ("peft.tuners.lora.arrow", "check_loaded_lora_compatibility_arrow", _refuse_to_route, True),
)
# What is changed in every module that has imported it by name, for older versions: scripts import these.
CHANGES_EVERYWHERE: tuple[tuple[str, Any], ...] = (
    ()
    if HAS_STATE_HOOKS
    else (
        ("get_peft_model_state_dict", get_state_through_tuner),
        ("set_peft_model_state_dict", set_state_through_tuner),
    )
)


def patch(own: OwnMethods) -> None:
    """Make the changes, of PEFT 0.18 to 0.21.2 and transformers 4.57 to 5.23. Calling it again changes nothing.

    Args:
        own: What the functions do for adapters of this package's type.

    Warns:
        UserWarning: If a function is not where the supported versions have it.
    """
    missing = []
    for where, name, change, is_expected in CHANGES:
        place = find(where)
        now = getattr(place, name, None)
        if now is None:
            missing += [f"{where}.{name}".replace(":", ".")] if is_expected else []
        elif not getattr(now, "is_by_moslora", False):
            setattr(place, name, _marked(change(now, own)))
    for name, change in CHANGES_EVERYWHERE:
        now = getattr(peft.utils, name)
        if not getattr(now, "is_by_moslora", False):
            changed = _marked(change(now))
            for holder in holders_of(now, name):
                setattr(holder, name, changed)
    # ``rescale_adapter_scale`` (PEFT 0.18 to 0.21.2) looks for LoraLayers, whose scales these layers have, too. Without
    # this it finds no layer and raises. It can go when PEFT asks the tuner.
    helpers = find("peft.helpers")
    if getattr(helpers, "LoraLayer", None) is LoraLayer:
        helpers.LoraLayer = (LoraLayer, own.layer_class)
    if missing:
        versions.warn_once(
            f"moslora changes {', '.join(missing)} so that adapters of its type are known there, and does not find "
            f"that in peft {versions.installed('peft')} with transformers {versions.installed('transformers')}."
        )


def _marked(changed: Any) -> Any:
    changed.is_by_moslora = True
    return changed
