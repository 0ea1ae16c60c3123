"""What is changed in diffusers, so that its own training scripts save and resume adapters of this type.

A script names ``MoSLoRAConfig`` where it named ``LoraConfig``, and otherwise stays as it is. Its tensors go this way::

    get_peft_model_state_dict(unet) → convert_state_dict_to_diffusers → PIPELINE.save_lora_weights → a file
    a file → PIPELINE.lora_state_dict → convert_…_to_peft → set_peft_model_state_dict(unet, …)

On the way out the names ``moslora_A``, ``_M``, ``_B`` are strange to diffusers, which does not save them, or saves what
its loaders then refuse, or run without the mixers. On the way back a fold cannot resume a training. Three functions of
diffusers are given another beginning, each with its reason below. All do for other adapters what they did before.

Scripts import two of them by name before any adapter is made, so the functions are changed where they are
(``__code__``), not replaced in their modules. It is done when an adapter is put on one of diffusers' models; importing
this package changes nothing in diffusers.

Seen in diffusers 0.38 to 0.42. All of it can go when diffusers asks PEFT how an adapter is saved.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from moslora.adapters.formats import pipeline_checkpoint
from moslora.adapters.formats.pipeline_checkpoint import Part
from moslora.adapters.formats.tensors import save_tensors
from moslora.errors import AdapterError
from moslora.terminal import warn
from moslora.tuner.config import MoSLoRAConfig

__all__ = ["install", "is_of_diffusers", "remember", "restore_mixers"]

MARK = ".moslora_"
# What a script holds between two calls are tensors: whose adapter's they are, and what a file's were folded from.
_configs: Any = WeakTensorKeyDictionary()
_checkpoints: Any = WeakTensorKeyDictionary()
_originals: dict[str, Callable[..., Any]] = {}


def is_of_diffusers(model: nn.Module) -> bool:
    """Tell whether a model is one of diffusers' (0.38 to 0.42), so that its adapter may be saved by a pipeline."""
    return any(kind.__module__.partition(".")[0] == "diffusers" for kind in type(model).__mro__)


def remember(tensors: Mapping[str, Tensor], config: MoSLoRAConfig) -> None:
    """Remember whose adapter's tensors these are, for when a pipeline of diffusers (0.38 to 0.42) saves them.

    Args:
        tensors: An adapter's state dict.
        config: Its configuration.
    """
    for tensor in tensors.values():
        _configs[tensor] = config


def restore_mixers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put an adapter with its mixers in the place of its fold, which ``lora_state_dict`` read (diffusers 0.38 to 0.42).

    Args:
        tensors: What is to be loaded into a model.

    Returns:
        What the fold was made of, as it lay beside it; other tensors as they are.

    Raises:
        AdapterError: If the checkpoint is damaged, or factors are a plain LoRA's.
    """
    factors = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    if not factors or any(MARK in key for key in tensors):
        return dict(tensors)
    places: set[Path | None] = {_checkpoints.get(tensor) for tensor in factors.values()}
    place = places.pop()
    if place is None or places:
        raise AdapterError(
            f"{next(iter(factors))} is a factor of a plain LoRA, in which the mixers are folded, and this model trains "
            f"an adapter with mixers. What it was folded from lies in {pipeline_checkpoint.FOLDER}/ beside the file; "
            "keep the two together, and load them by the pipeline's lora_state_dict(folder), as diffusers' scripts "
            "do, or with moslora.resume_for_diffusers(folder, unet=unet)."
        )
    return pipeline_checkpoint.native_tensors(place)


# --- What diffusers' functions do now -----------------------------------------------------------------------


def _convert(call: inspect.BoundArguments, original: Callable[..., Any]) -> Any:
    """Hand on the tensors of an adapter with mixers.

    diffusers looks for names that it knows (``lora_A``) and else says "Could not automatically infer state dict type",
    at the first checkpoint or after the last step.
    """
    if any(MARK in key for key in call.arguments["state_dict"]):
        return call.arguments["state_dict"]
    return original(*call.args, **call.kwargs)


def _write(call: inspect.BoundArguments, original: Callable[..., Any]) -> Any:
    """Write the fold where the adapter itself would be written, and the adapter beside it.

    A file with ``moslora_`` names is refused by stock loaders if it carries the configuration, and else loaded without
    its mixers, with a warning. Scripts load what they saved at their end.
    """
    given: dict[str, Tensor] = call.arguments["state_dict"]
    ours = sorted({key.partition(".")[0] for key in given if MARK in key})
    if not ours:
        return original(*call.args, **call.kwargs)
    folder, name = Path(call.arguments["save_directory"]), call.arguments["weight_name"]
    said: dict[str, Any] = call.arguments["lora_adapter_metadata"] or {}
    parts = {component: _part(component, given, said) for component in ours}
    unknown = [component for component, part in parts.items() if part is None]
    if unknown:
        _keep_all(folder, name, given, unknown[0])
    others = {key: tensor for key, tensor in given.items() if key.partition(".")[0] not in ours}
    names = {key.partition(".")[0] for key in others}
    kept = {key: value for key, value in said.items() if key.partition(".")[0] in names}
    # A loader that finds metadata expects every model's there; without any it takes alpha for r, as the fold has it.
    tells = names == {key.partition(".")[0] for key in kept} and call.arguments["safe_serialization"]

    def write_file(tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        call.arguments["state_dict"] = tensors
        call.arguments["lora_adapter_metadata"] = {**kept, **metadata} if tells else None
        original(*call.args, **call.kwargs)

    own = {component: part for component, part in parts.items() if part is not None}
    pipeline_checkpoint.save(folder, own, others, write_file, name)
    return None


def _part(component: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Part | None:
    """Find the configuration of what is to be saved: of the live adapter, or in the metadata that a script gives."""
    prefix = f"{component}."
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    config = next((_configs[t] for key, t in own.items() if MARK in f".{key}" and t in _configs), None)
    said = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
    if config is None and {"r", "lora_alpha"} <= said.keys():
        known = inspect.signature(MoSLoRAConfig).parameters
        config = MoSLoRAConfig(**{key: value for key, value in said.items() if key in known})
    return None if config is None else Part(config, own)


def _keep_all(folder: Path, name: str | None, tensors: Mapping[str, Tensor], component: str) -> None:
    """Keep tensors whose scale is not known, and say so."""
    place = pipeline_checkpoint.place_of(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    file = place / "tensors.safetensors"
    save_tensors(file, tensors, {"format": "pt"})
    raise AdapterError(
        f"{component}: these are copies of an adapter's tensors, and with them comes no configuration, so the scale is "
        f"not known and no plain LoRA was written. The tensors are in {file}; make one with moslora export {file} "
        "OUT.safetensors --to diffusers --alpha N. To save it here, give save_lora_weights what "
        "get_peft_model_state_dict returned, unchanged, or **_collate_lora_metadata({...}) besides."
    )


def _fetch(call: inspect.BoundArguments, original: Callable[..., Any]) -> Any:
    """Remember what the tensors of a file were folded from, for when they are loaded into a model that has mixers."""
    result = original(*call.args, **call.kwargs)
    source = call.arguments["pretrained_model_name_or_path_or_dict"]
    if isinstance(source, Mapping) or not Path(source).exists():
        return result
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    tensors: dict[str, Tensor] = result[0]
    place = pipeline_checkpoint.find(folder / (call.arguments["subfolder"] or ""), tensors)
    for key, tensor in tensors.items() if place is not None else ():
        if (own := place / key.partition(".")[0]).is_dir():  # type: ignore[operator]
            _checkpoints[tensor] = own
    return result


# --- How they are changed -----------------------------------------------------------------------------------


# What stands in the place of a function's code may name nothing but its arguments and what it imports itself.
def _code_of_convert(*args: Any, **kwargs: Any) -> Any:
    from importlib import import_module

    return import_module("moslora.compat.diffusers")._call("convert_state_dict_to_diffusers", args, kwargs)


def _code_of_write(*args: Any, **kwargs: Any) -> Any:
    from importlib import import_module

    return import_module("moslora.compat.diffusers")._call("LoraBaseMixin.write_lora_layers", args, kwargs)


def _code_of_fetch(*args: Any, **kwargs: Any) -> Any:
    from importlib import import_module

    return import_module("moslora.compat.diffusers")._call("_fetch_state_dict", args, kwargs)


# By function: where it is, the arguments that are read, what it does now, and its code.
_CHANGES: dict[str, tuple[str, set[str], Callable[..., Any], FunctionType]] = {
    "convert_state_dict_to_diffusers": (
        "diffusers.utils.state_dict_utils",
        {"state_dict"},
        _convert,
        _code_of_convert,  # type: ignore[dict-item]
    ),
    "LoraBaseMixin.write_lora_layers": (
        "diffusers.loaders.lora_base",
        {"state_dict", "save_directory", "weight_name", "safe_serialization", "lora_adapter_metadata"},
        _write,
        _code_of_write,  # type: ignore[dict-item]
    ),
    "_fetch_state_dict": (
        "diffusers.loaders.lora_base",
        {"pretrained_model_name_or_path_or_dict", "subfolder"},
        _fetch,
        _code_of_fetch,  # type: ignore[dict-item]
    ),
}


def _call(name: str, args: Any, kwargs: Any) -> Any:
    """Call what a function of diffusers does now."""
    original = _originals[name]
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    return _CHANGES[name][2](call, original)


def _find(name: str) -> FunctionType | None:
    """Find a function of diffusers; None if it is not there as it is known here."""
    place, arguments, _, _ = _CHANGES[name]
    try:
        found: Any = importlib.import_module(place)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    plain = isinstance(found, FunctionType) and found.__closure__ is None
    return found if plain and arguments <= inspect.signature(found).parameters.keys() else None


def install() -> None:
    """Change diffusers (0.38 to 0.42), if it is not changed yet.

    Warns:
        UserWarning: If this version of diffusers is not one that is known here; nothing is changed then.
    """
    if _originals:
        return
    functions = {name: _find(name) for name in _CHANGES}
    strange = [name for name, function in functions.items() if function is None]
    if strange:
        warn(
            f"diffusers {importlib.metadata.version('diffusers')} has no {strange[0]} as moslora knows it (seen in "
            "0.38 to 0.42), so its save_lora_weights cannot save this adapter for its loaders. Save it with "
            "moslora.save_for_diffusers(folder, unet=unet), and load checkpoints with "
            "moslora.resume_for_diffusers(folder, unet=unet).",
            stacklevel=2,
        )
        return
    for name, function in functions.items():
        assert function is not None, "it was found"
        original = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__
        )
        original.__kwdefaults__ = function.__kwdefaults__
        function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        _originals[name] = original
        function.__code__ = _CHANGES[name][3].__code__
        function.__kwdefaults__ = None
        function.__defaults__ = None
