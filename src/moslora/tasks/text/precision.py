"""Training in float32 on a base of lower precision: factors, and modules that are trained in full."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.tasks.text.loss import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["train_in_float32"]


def train_in_float32(model: nn.Module, fields: Sequence[str] = ()) -> None:
    """Keep the trained parameters in float32, whatever the base's dtype.

    A bfloat16 has 8 significant bits, so a step of 2e-5 is silently lost on it. Factors convert their inputs
    themselves. Modules that are trained in full get hooks that do; so does TRL's loss, which reads the head's weight
    without calling the head.

    Args:
        model: An adapted model; changed in place.
        fields: What the trainer reads from TRL's fused head, where it isn't ``SFTTrainer``.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    from moslora.compat.trl import fuse_head_in_float32

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            original = next((p.dtype for p in wrapper.original_module.parameters()), torch.float32)
            for module in wrapper.modules_to_save.values():
                if original in (torch.bfloat16, torch.float16):
                    module.float()
                    module.register_forward_pre_hook(_inputs_to_float32)
                    module.register_forward_hook(functools.partial(_output_to, original))
    base = unwrapped(model)
    head = base.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and head.weight.dtype != head.original_module.weight.dtype:
        fuse_head_in_float32(base, **({"fields": fields} if fields else {}))


def _inputs_to_float32(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    half = (torch.bfloat16, torch.float16)
    return tuple(x.float() if torch.is_tensor(x) and x.dtype in half else x for x in inputs)


def _output_to(dtype: torch.dtype, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    import torch

    return output.to(dtype) if torch.is_tensor(output) else output
