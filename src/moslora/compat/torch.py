"""Private names of torch: what hangs on a module's call, how FSDP and ``torch.compile`` wrap modules, fast paths.

Seen in torch 2.6 to 2.13. This file imports nothing but torch, so that ``core`` may use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = [
    "convolve",
    "is_managed_by_fsdp",
    "is_under_functorch",
    "is_wrapped_by_fsdp",
    "leave_fast_paths",
    "must_be_called",
    "path_without_wrappers",
    "plain_weight",
    "restore_fast_paths",
    "uncompiled",
    "unwrapped_by_fsdp",
]

# Tells whether ``vmap``, ``grad`` or another transform of functorch is active (torch 2.6 to 2.13). Those cannot go
# through an autograd Function without a ``setup_context``, which costs 50 µs in every call; without this they raise. An
# alias and not a function, for it is asked in every forward. It can go when ``torch.func`` has a public question.
is_under_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active

_FSDP_INNER = "_fsdp_wrapped_module"


def must_be_called(module: nn.Module) -> bool:
    """Tell whether a call of a module does more than its class's ``forward``: hooks, or a wrapper around it.

    torch (2.6 to 2.13) has no public way to ask for hooks. Without this, offloading (accelerate), sharding (FSDP1) and
    other adapter libraries, which work by hooks, by a ``forward`` of the instance or by a wrapper, would be passed by.

    Args:
        module: Any module.
    """
    return (
        bool(module._forward_pre_hooks or module._forward_hooks or module._backward_hooks)
        or "forward" in module.__dict__
        or _FSDP_INNER in module._modules
    )


def plain_weight(holder: nn.Module, *path: str) -> Tensor | None:
    """Return the weight of a plain linear layer without a bias of its own, which nothing hangs on.

    It reads what torch (2.6 to 2.13) keeps modules and parameters in, because the public ways cost a walk for each
    name, and this is asked several times in every call of a layer over few tokens. Everything is read anew each time,
    so that a hook, a wrapper or a weight that comes later is seen.

    Args:
        holder: A module.
        *path: Names of modules below it, the linear layer's the last.

    Returns:
        The weight; None where there is no such layer, where it is another class, has a bias or must be called.
    """
    module: Any = holder
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return None
    if type(module) is not nn.Linear or must_be_called(module) or module._parameters.get("bias") is not None:
        return None
    return cast("Tensor | None", module._parameters.get("weight"))


def is_wrapped_by_fsdp(module: nn.Module) -> bool:
    """Tell whether a module is the wrapper of FSDP's first version (torch 2.6 to 2.13).

    Its parameters are parts of a flat tensor, so the module must be called. It can go when FSDP1 does.

    Args:
        module: Any module.
    """
    return _FSDP_INNER in module._modules


def unwrapped_by_fsdp(module: nn.Module) -> nn.Module:
    """Return what FSDP's first version wraps (torch 2.6 to 2.13), or the module itself.

    Args:
        module: Any module.
    """
    return cast(nn.Module, getattr(module, _FSDP_INNER, module))


def path_without_wrappers(path: str) -> str:
    """Take the names of FSDP1's wrappers out of a module's path, as state dicts do (torch 2.6 to 2.13).

    Args:
        path: As ``named_modules`` has it.
    """
    return path.replace(f"{_FSDP_INNER}.", "")


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Tell whether a module lies in an FSDP1 wrapper (torch 2.6 to 2.13).

    In its forward the parameters are copies there, in 16 bits of float32 shards under mixed precision, so nothing may
    be changed in place. torch's public ``FullyShardedDataParallel.fsdp_modules`` asks the other way round.

    Args:
        module: Any module.
    """
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def uncompiled(model: Any) -> Any:
    """Return the model that ``torch.compile`` wrapped (torch 2.6 to 2.13), or the model itself.

    PEFT reads the same name. Without this, attributes that are set on a compiled model are lost.

    Args:
        model: A model, perhaps compiled.
    """
    return getattr(model, "_orig_mod", model)


def convolve(convolution: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a convolution with another weight, of its own stride, padding mode, dilation and groups.

    torch (2.6 to 2.13) has that as a private method alone; ``nn.functional`` knows no padding mode but zeros.

    Args:
        convolution: An ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
        x: Its input.
        weight: In the place of its weight.
        bias: In the place of its bias.
    """
    return cast(Tensor, cast(Any, convolution)._conv_forward(x, weight, bias))


def _be_called(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Do nothing: torch calls the modules of a layer with a hook, and does not reach around them."""


def leave_fast_paths(model: nn.Module, is_adapted: Callable[[nn.Module], bool]) -> None:
    """Make torch's encoder layers call their modules where one of them is adapted.

    In evaluation ``nn.TransformerEncoderLayer`` (torch 2.6 to 2.13) hands the weights that it finds to one kernel. It
    would find the base's, and leave the adapters out silently (as it does with PEFT 0.21's LoRA). It can go when torch
    asks its modules whether they are replaced.

    Args:
        model: The adapted model; hooks that do nothing are put on its encoder layers.
        is_adapted: Whether a module is an adapted layer.
    """
    for module in model.modules():
        if not any(is_adapted(part) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            # Only the kernel understands nested tensors. None is as good as False, and remembers the True.
            setattr(module, "use_nested_tensor", None)  # noqa: B010  declared as a bool
        hooks = module._forward_pre_hooks.values()
        if isinstance(module, nn.TransformerEncoderLayer) and _be_called not in hooks:
            module.register_forward_pre_hook(_be_called)


def restore_fast_paths(model: nn.Module) -> None:
    """Take back what ``leave_fast_paths`` did (torch 2.6 to 2.13).

    Args:
        model: The model without adapters.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor is None:
            module.use_nested_tensor = True
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _be_called:
                del module._forward_pre_hooks[key]
