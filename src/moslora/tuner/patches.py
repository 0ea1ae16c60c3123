"""What has to be changed in PEFT for adapters of this type; each with its reason, and when it can go.

Both changes pass every other type through untouched, and are made once, by ``register``.
"""

from __future__ import annotations

import functools
from typing import Any

import peft.utils.hotswap
import torch
from peft.utils import transformers_weight_conversion as conversion
from torch import nn

from moslora.tuner import dora
from moslora.tuner.held_mixer import MixerStart

__all__ = ["patch"]


def _clear_starts_after(swap: Any) -> Any:
    """Let PEFT's hot-swap put a file's M into a split mixer.

    PEFT (seen 0.18 to 0.21) copies tensors of a file into the parameters of the same names and leaves all others
    alone: a start would be added to the new M. Without this, a hot-swapped adapter that is held in 16 bits is wrong. It
    can go when PEFT hands hot-swapping to the tuner.
    """

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module, state_dict: Any, adapter_name: str, *args: Any, **kw: Any
    ) -> Any:
        out = swap(model, state_dict, adapter_name, *args, **kw)
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, MixerStart) and name.endswith(f".{adapter_name}"):
                    module.weight.zero_()
        return out

    return hotswap_adapter_from_state_dict


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
        return [conversion.WeightRenaming(old, new.replace("\\", "").removesuffix("$")), *mapping]

    return build_peft_weight_mapping


def patch() -> None:
    """Make the changes; again changes nothing."""
    hotswap: Any = peft.utils.hotswap
    if not hasattr(hotswap.hotswap_adapter_from_state_dict, "__wrapped__"):
        hotswap.hotswap_adapter_from_state_dict = _clear_starts_after(hotswap.hotswap_adapter_from_state_dict)
    if not hasattr(conversion.build_peft_weight_mapping, "__wrapped__"):
        conversion.build_peft_weight_mapping = _rename_magnitude_after(conversion.build_peft_weight_mapping)
