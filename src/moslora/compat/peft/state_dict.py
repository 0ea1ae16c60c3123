"""PEFT's functions that save and load adapters, made to ask this package's tuner, as PEFT does by itself since 0.21."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moslora.compat.peft.base_tuner import Tuner
from moslora.compat.peft.functions import MODEL_PREFIX
from moslora.compat.peft.state_hooks import adapted_layers, is_beside_base, modules_by_path
from moslora.compat.torch import uncompiled

__all__ = ["get_state_through_tuner", "set_state_through_tuner"]


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
        root = uncompiled(model) if unwrap_compiled else model
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
        layers = adapted_layers(root)
        held = {
            tuner._remove_adapter_name_from_key(k, adapter_name) for k in own if is_beside_base(k, layers)
        }
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
        if not any(name.startswith(MODEL_PREFIX) for name, _ in model.named_parameters()):
            named = {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in named.items()}
        in_file = {name: key for key, name in wrapped.items()}
        named = {in_file.get(key, key): tensor for key, tensor in named.items()}
        with _with_nothing_own(model, adapter_name):
            return put(model, named, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _names_of_wrapped(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Return the names in the model of what is trained whole, by those in a file."""
    return {
        f"{path}.{in_file}": f"{path}.{name}"
        for path, module in modules_by_path(model)
        if isinstance(module, AuxiliaryTrainingWrapper)
        for in_file, name in module.adapter_state_dict_load_map(adapter_name).items()
    }
