"""What differs between the versions of PEFT and transformers, in one place.

Everything that one of the supported versions lacks is imported here, with what stands in for it and what is lost; the
other modules import it from here. Each part says which versions lack it, so that it can go with them.
``docs/versions.md`` has the table for users.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, cast

import peft.tuners.tuners_utils as tuners_utils
import peft.utils
import peft.utils.integrations
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import merge_utils
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moslora import versions

__all__ = [
    "HAS_CONVERSION",
    "HAS_STATE_HOOKS",
    "HAS_TIES",
    "ReadOnlyBackend",
    "Tuner",
    "TunerLayer",
    "conversion",
    "convert_targets",
    "find",
    "get_quantization_kwargs",
    "get_state_through_tuner",
    "holders_of",
    "prune",
    "resolve_quantization_backend",
    "set_state_through_tuner",
]

# --- Names in files: PEFT asks the tuner since 0.21 ----------

HAS_STATE_HOOKS = hasattr(BaseTuner, "_get_adapter_state_dict")


class _StateHooks:
    """What ``BaseTuner`` of PEFT 0.21 knows of names in files, for 0.18 to 0.20. Nothing is lost."""

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
        """Select what lies in adapted layers beside their bases, and the biases that are trained."""
        layers = _layers(model)
        selected = {key: state_dict[key] for key in state_dict if _is_beside(key, layers)}
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
        """Put the adapter's name into the names of what lies in adapted layers; leave the others."""
        layers, in_model = _layers(model), {}
        for key in model.state_dict():
            if not _is_beside(key, layers, adapter_name):
                continue
            in_file = cls._remove_adapter_name_from_key(key, adapter_name)
            in_model[in_file] = key
            if not key.startswith(_PREFIX):  # put straight into a model, without a PeftModel around it
                in_model[_PREFIX + in_file] = key
        return {in_model.get(key, key): tensor for key, tensor in state_dict.items()}


_PREFIX = "base_model.model."
_CONTAINERS = (nn.ModuleDict, nn.ParameterDict)


def _paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules with the paths that state dicts have; FSDP takes its wrappers' names out there."""
    for name, module in model.named_modules():
        yield name.replace("_fsdp_wrapped_module.", ""), module


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted layers by path."""
    return {path: module for path, module in _paths(model) if isinstance(module, TunerLayer)}


def _is_beside(key: str, layers: Mapping[str, nn.Module], adapter_name: str | None = None) -> bool:
    """Tell whether a tensor belongs to the innermost adapted layer that it lies in, and not to its base.

    Args:
        key: Its name in a state dict.
        layers: Adapted layers by path.
        adapter_name: The adapter whose it has to be, if it is one's.
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


def _own_tuner(config: Any) -> Any:
    """Return the tuner of a configuration, if it is this package's; None for every other type."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(getattr(config, "peft_type", None))
    return tuner if isinstance(tuner, type) and issubclass(tuner, Tuner) else None


@contextlib.contextmanager
def _with_nothing_own(model: Any, adapter_name: str) -> Iterator[None]:
    """Let PEFT 0.18 to 0.20 see an adapter that has no tensors of a tuner's, so that it does the rest alone.

    The rest: modules that are trained whole, tokens, embeddings, casting and loading. X-LoRA is the type of which it
    takes nothing but a classifier of its own name, and whose names it leaves as they are.
    """
    config = model.peft_config[adapter_name]
    model.peft_config[adapter_name] = stand_in = copy.copy(config)
    stand_in.peft_type = PeftType.XLORA
    try:
        yield
    finally:
        model.peft_config[adapter_name] = config


def get_state_through_tuner(get: Any) -> Any:
    """Let PEFT's ``get_peft_model_state_dict`` ask this package's tuner, as PEFT does by itself since 0.21.

    0.18 to 0.20 raise "Unknown PEFT type" for a type that is not in their enum.
    """

    @functools.wraps(get)
    def get_peft_model_state_dict(
        model: Any,
        state_dict: Any = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        save_embedding_layers: Any = "auto",
    ) -> Any:
        root = getattr(model, "_orig_mod", model) if unwrap_compiled else model
        config = root.peft_config[adapter_name]
        tuner = _own_tuner(config)
        if tuner is None:
            return get(model, state_dict, adapter_name, unwrap_compiled, save_embedding_layers)
        state_dict = root.state_dict() if state_dict is None else state_dict
        others = [name for name in root.peft_config if name != adapter_name]
        own = {
            key: tensor
            for key, tensor in state_dict.items()
            if not any(f".{name}." in key or key.endswith(f".{name}") for name in others)
        }
        selected = tuner._get_adapter_state_dict(
            root, config, adapter_name, own, unwanted_adapter_names=others
        )
        with _with_nothing_own(root, adapter_name):
            beside = get(root, own, adapter_name, save_embedding_layers=save_embedding_layers)
        named = {tuner._remove_adapter_name_from_key(key, adapter_name): t for key, t in selected.items()}
        # A target that is an embedding is saved with its base by some, and with its factors as they are held.
        layers = _layers(root)
        held = {tuner._remove_adapter_name_from_key(k, adapter_name) for k in own if _is_beside(k, layers)}
        return {**{key: t for key, t in beside.items() if key not in held}, **named}

    return get_peft_model_state_dict


def set_state_through_tuner(put: Any) -> Any:
    """Let PEFT's ``set_peft_model_state_dict`` ask this package's tuner, as PEFT does by itself since 0.21.

    0.18 to 0.20 put the adapter's name behind the first part after the method's prefix, wherever that is, and load
    what fits; nothing is checked.
    """

    @functools.wraps(put)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]
        tuner = _own_tuner(config)
        if tuner is None:
            return put(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        # The tuner sees what is trained whole by its names in the model, as with 0.21, and PEFT renames it again.
        wrapped = _names_of_wrapped(model, adapter_name)
        named = {wrapped.get(key, key): tensor for key, tensor in peft_model_state_dict.items()}
        named = tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, named)
        if not any(name.startswith(_PREFIX) for name, _ in model.named_parameters()):
            named = {key.removeprefix(_PREFIX): tensor for key, tensor in named.items()}
        in_file = {name: key for key, name in wrapped.items()}
        named = {in_file.get(key, key): tensor for key, tensor in named.items()}
        with _with_nothing_own(model, adapter_name):
            return put(model, named, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _names_of_wrapped(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the names in the model of what is trained whole, by those in a file."""
    return {
        f"{path}.{in_file}": f"{path}.{name}"
        for path, module in _paths(model)
        if isinstance(module, AuxiliaryTrainingWrapper)
        for in_file, name in module.adapter_state_dict_load_map(adapter_name).items()
    }


def holders_of(function: Any, name: str) -> Iterable[ModuleType]:
    """Return the modules that have imported a function by name, wherever they are.

    Args:
        function: What they hold.
        name: As what.
    """
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and module.__dict__.get(name) is function
    ]


# --- Tuners ----------

# Ties of the adapters of an embedding and a head: PEFT 0.18 knows ties of modules that are trained whole alone.
HAS_TIES = hasattr(BaseTuner, "_add_targets_to_tie")


class _Ties:
    """What PEFT 0.18 has of ``ensure_weight_tying``. Lost there: tying the adapters of an embedding and a head."""

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Refuse what would be left untied with a warning about something else.

        Raises:
            ValueError: If the embedding or what shares its weight is a target.
        """
        tuner: Any = self
        if peft_config.ensure_weight_tying and not HAS_TIES:
            tied = list(tuner._get_module_names_tied_with_embedding())
            embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
            names = [*tied, *(name for name, module in model.named_modules() if module is embedding)]
            found = [n for n in names if tuner._check_target_module_exists(peft_config, n)] if tied else []
            if found:
                raise ValueError(
                    versions.need(
                        "peft",
                        "0.19",
                        f"ensure_weight_tying=True with {found[0]!r} in target_modules",
                        "Or leave it out of target_modules, or set ensure_weight_tying=False.",
                    )
                )
        super()._check_tied_modules(model, peft_config)  # type: ignore[misc]


class _OneOfParameters:
    """Refuses a second adapter with ``target_parameters``, for PEFT 0.18 and 0.19: they nest another layer for it."""

    def _check_new_adapter_config(self, config: Any) -> None:
        """Check an adapter that is added.

        Raises:
            ValueError: If it is the second that targets parameters.
        """
        super()._check_new_adapter_config(config)  # type: ignore[misc]
        configs: dict[str, Any] = cast(Any, self).peft_config
        if sum(bool(getattr(other, "target_parameters", None)) for other in configs.values()) > 1:
            raise ValueError(
                versions.need(
                    "peft",
                    "0.20",
                    "A second adapter with target_parameters",
                    "Or load the adapters one at a time.",
                )
            )


class _Deleting:
    """Refuses to delete an adapter that is merged, as PEFT does since 0.21: what it added would stay for good."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        Args:
            adapter_name: Its name.

        Raises:
            ValueError: If it is merged.
        """
        tuner: Any = self
        layers = [module for module in tuner.model.modules() if isinstance(module, BaseTunerLayer)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)  # type: ignore[misc]


_TUNER_BASES: tuple[type, ...] = (
    *(() if HAS_TIES else (_Ties,)),
    *(() if versions.is_at_least("peft", "0.20") else (_OneOfParameters,)),
    *(() if hasattr(tuners_utils, "_check_adapters_not_merged") else (_Deleting,)),
    *(() if HAS_STATE_HOOKS else (_StateHooks,)),
    BaseTuner,
)
# As LoRA has them: what is trained whole stays tied, for the factors have no part in it (0.18 calls that by the second
# name); and BaseTuner's _replace_module takes every unloaded module to have a weight, and an 8-bit one's adapter to be
# loaded already.
_OF_LORA = ("_add_modules_to_save_to_tie", "_add_modules_to_tie", "_add_targets_to_tie", "_replace_module")
Tuner: Any = type(
    "Tuner",
    _TUNER_BASES,
    {
        "__doc__": "PEFT's ``BaseTuner``, with what 0.21 has and the installed one lacks.",
        "__module__": __name__,
        **{name: getattr(LoraModel, name) for name in _OF_LORA if hasattr(LoraModel, name)},
    },
)


# --- Layers: what is frozen, and the base's weight ----------


class _Frozen:
    """Factors that stay frozen whatever is activated, for PEFT 0.18 and 0.19. Nothing is lost."""

    frozen_peft_weight_names: Mapping[str, tuple[str, ...]] = {}

    def _freeze_non_trainable_peft_weights(self, adapter_names: Any = None) -> None:
        layer: Any = self
        names = self.frozen_peft_weight_names if adapter_names is None else adapter_names
        for name in [names] if isinstance(names, str) else names:
            for dictionary in self.frozen_peft_weight_names.get(name, ()):
                held = getattr(layer, dictionary, {})
                if name in held:
                    held[name].requires_grad_(False)

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        """Choose the active adapters, and what of them is trained.

        Args:
            adapter_names: A name, or several.
            inference_mode: Train nothing of them.
        """
        super().set_adapter(adapter_names, inference_mode=inference_mode)  # type: ignore[misc]
        self._freeze_non_trainable_peft_weights(adapter_names)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Train adapters, or stop that.

        Args:
            adapter_names: A name, or several.
            requires_grad: Whether they are trained.
        """
        super().set_requires_grad(adapter_names, requires_grad)  # type: ignore[misc]
        if requires_grad:
            self._freeze_non_trainable_peft_weights(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter.

        Args:
            adapter_name: Its name.
        """
        cast(dict[str, Any], self.frozen_peft_weight_names).pop(adapter_name, None)
        super().delete_adapter(adapter_name)  # type: ignore[misc]


class _BaseWeight:
    """The base's weight, for PEFT 0.18 and 0.19. Lost there: writing a quantized one, so merging into it."""

    def get_base_weight(self) -> Tensor:
        """Return the base weight, dequantised if it is quantised."""
        layer: Any = self
        base = layer.get_base_layer()
        if layer.quantization_backend is None:
            return cast(Tensor, base.weight.data)
        return cast(Tensor, layer.quantization_backend.get_base_weight(base))

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put a base weight in place."""
        layer: Any = self
        if layer.quantization_backend is not None:
            layer.quantization_backend.set_base_weight(layer, weight_data)
        else:
            layer.get_base_layer().weight.data = weight_data


_LAYER_BASES: tuple[type, ...] = (
    *(() if hasattr(BaseTunerLayer, "frozen_peft_weight_names") else (_Frozen,)),
    *(() if hasattr(BaseTunerLayer, "get_base_weight") else (_BaseWeight,)),
    BaseTunerLayer,
)
TunerLayer: Any = type(
    "TunerLayer",
    _LAYER_BASES,
    {
        "__doc__": "PEFT's ``BaseTunerLayer``, with what 0.21 has and the installed one lacks.",
        "__module__": __name__,
    },
)


# --- Pruning ----------


def prune(tensor: Tensor, density: float, method: str | None, rescale: bool = False) -> Tensor:
    """Prune entries of a tensor, as PEFT's function of this name does.

    Args:
        tensor: What is pruned.
        density: Share of its entries that are kept.
        method: ``"magnitude"`` or ``"random"``.
        rescale: Divide what is left by the density, so that its mean stays.
    """
    pruned = cast(Tensor, merge_utils.prune(tensor, density, method, rescale=rescale))
    # PEFT 0.18 divides, and drops the result.
    forgets = not versions.is_at_least("peft", "0.19") and method == "random" and density < 1
    return pruned / density if rescale and forgets else pruned


# --- Quantized bases: PEFT has backends since 0.20 ----------

# Packages whose layers hold quantized weights, and those whose weights are quantized tensors.
_QUANTIZERS = ("bitsandbytes", "hqq", "aqlm", "eetq", "gptqmodel", "auto_gptq", "awq", "neural_compressor")
_QUANTIZED_TENSORS = ("bitsandbytes", "torchao")


class ReadOnlyBackend:
    """Stands for PEFT's backend of a quantized layer, for 0.18 and 0.19: it is run, and read where PEFT can.

    Lost there: merging into such a layer, which is refused, and unmerging.
    """

    layer_type = "linear"
    supports_merge = False

    def __init__(self, package: str) -> None:
        self.backend_name = package

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        """Return the base weight, dequantised.

        Raises:
            TypeError: If PEFT cannot.
        """
        if self.backend_name not in (*_QUANTIZED_TENSORS, "hqq"):
            raise TypeError(
                versions.need("peft", "0.20", f"Reading the weight of a {type(base_layer).__name__}")
            )
        return cast(Tensor, peft.utils.integrations.dequantize_module_weight(base_layer)).data

    def set_base_weight(self, peft_layer: Any, weight_data: Tensor) -> None:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self.why_not_merged(peft_layer.get_base_layer()))

    def why_not_merged(self, base_layer: nn.Module) -> str:
        """Say why nothing is merged into a layer, and what to do."""
        return versions.need(
            "peft",
            "0.20",
            f"Merging into a {type(base_layer).__name__} of {self.backend_name}",
            "Or leave the adapter beside the base, export it as a plain LoRA, or load the base in 16 or 32 bits and "
            "merge there.",
        )


def _quantizer_of(base_layer: nn.Module) -> str | None:
    """Return the package that quantized a layer; None if its weight is as it was."""
    weight = getattr(base_layer, "weight", None)
    of_layer = {kind.__module__.split(".")[0] for kind in type(base_layer).__mro__} & set(_QUANTIZERS)
    of_weight = {kind.__module__.split(".")[0] for kind in type(weight).__mro__} & set(_QUANTIZED_TENSORS)
    return next(iter(of_layer | of_weight), None)


def _resolve_read_only(base_layer: nn.Module, **_: Any) -> Any:
    """Tell how a layer is quantized, as PEFT's function of 0.20 does; None if it is not."""
    package = _quantizer_of(base_layer)
    return None if package is None else ReadOnlyBackend(package)


resolve_quantization_backend: Callable[..., Any] = getattr(
    peft.utils, "resolve_quantization_backend", _resolve_read_only
)
get_quantization_kwargs: Callable[..., dict[str, Any]] = getattr(
    peft.utils, "get_quantization_kwargs", lambda model: {}
)


# --- Names of a model's parts that changed with transformers 5 ----------


def find(where: str) -> Any:
    """Return a module, or a class in one.

    Args:
        where: As ``"peft.utils.hotswap"`` or ``"transformers.integrations.peft:PeftAdapterMixin"``.

    Returns:
        It; None if what is installed does not have it.
    """
    module, _, name = where.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return None
    return getattr(found, name, None) if name else found


# PEFT has it since 0.19, and it needs transformers 5. Lost elsewhere: the old names of experts in target_modules (there
# are no new ones in transformers 4), and adapters of 0.1 with a magnitude in transformers' load_adapter.
HAS_CONVERSION = versions.is_at_least("peft", "0.19") and versions.is_at_least("transformers", "5")
conversion = find("peft.utils.transformers_weight_conversion")
_conversions = find("transformers.conversion_mapping")


def convert_targets(config: Any, model: nn.Module, model_type: Any) -> None:
    """Name targets as the installed transformers does, where it holds experts as parameters that were modules.

    Args:
        config: An adapter's configuration, changed in place.
        model: The base model.
        model_type: As its configuration has it.
    """
    if _conversions is None or _conversions.get_checkpoint_conversion_mapping(model_type) is None:
        return
    if conversion is None:
        return  # PEFT says which target is not found
    convert = conversion._convert_peft_config_moe
    is_by_type = "model_type" in convert.__code__.co_varnames[: convert.__code__.co_argcount]  # 0.19
    convert(config, model_type if is_by_type else model)
