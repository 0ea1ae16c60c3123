"""Adapters of models that several processes hold together: whole tensors go out, and come in as shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch.distributed
from torch import Tensor, nn

from moslora.terminal import warn
from moslora.tuner.names import factor_in

__all__ = [
    "check_mergeable_when_sharded",
    "check_whole",
    "gather",
    "gathered",
    "shard_like",
    "sharded_parameters",
    "warn_of_whole_factors",
    "whole_size",
]


def sharded_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Find the parameters of which each process holds a part (``fully_shard``, tensor parallelism).

    Args:
        model: The model.

    Returns:
        Its ``DTensor`` parameters by name; none where torch was built without ``torch.distributed``.
    """
    if not torch.distributed.is_available():
        return {}
    from torch.distributed.tensor import DTensor

    return {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}


def gather(state_dict: dict[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Make whole tensors of shards. Every process must call it, with the same keys.

    Args:
        state_dict: Tensors by name.
        keys: Names of those to make whole; what is not a shard is left out.

    Returns:
        The whole tensors by name.
    """
    from torch.distributed.tensor import DTensor

    found = {key: state_dict[key] for key in keys if key in state_dict}
    return {key: tensor.full_tensor() for key, tensor in found.items() if isinstance(tensor, DTensor)}


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Make parameters whole that DeepSpeed's ZeRO-3 has split and training changes. Every process must enter it.

    Args:
        model: Its frozen parameters, and those of other engines, stay as they are.
    """
    split = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


def whole_size(parameter: Tensor) -> int:
    """Return the number of a parameter's entries, in all processes together.

    Args:
        parameter: Maybe split: DeepSpeed's ZeRO-3 leaves none of it in its place.
    """
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shard_like(state_dict: dict[str, Tensor], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split whole tensors as the parameters are that they will be loaded into. Every process must call it.

    Args:
        state_dict: Whole tensors by name, the same in every process.
        parameters: What ``sharded_parameters`` found.

    Returns:
        The shards by name, for the names that both have.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    return {
        key: distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        for key, tensor in state_dict.items()
        if isinstance(like := parameters.get(key), DTensor) and not isinstance(tensor, DTensor)
    }


def check_whole(state_dict: dict[str, Tensor]) -> None:
    """Refuse to hand out factors that are parts of factors.

    FSDP's first version and DeepSpeed's ZeRO-3 leave flattened parts, many of them empty, in the parameters'
    places. PEFT would write them as they are.

    Args:
        state_dict: Tensors by name; a process that got none from a gathering has nothing to refuse.

    Raises:
        RuntimeError: If a factor is empty or not a matrix.
    """
    for name, tensor in state_dict.items():
        least = 1 if name.endswith(".bias") else 2
        if factor_in(name) and (tensor.ndim < least or tensor.numel() == 0):
            raise RuntimeError(
                f"{name} is {tuple(tensor.shape)}: a part of a sharded parameter, so a saved adapter would be empty or "
                "incomplete; nothing was saved. Gather first: under FSDP pass "
                "state_dict=accelerator.get_state_dict(model), or save inside "
                "FullyShardedDataParallel.summon_full_params(model), on every process; under DeepSpeed ZeRO-3 save "
                "inside deepspeed.zero.GatheredParameters(list(model.parameters())). FSDP2 (fully_shard) needs neither."
            )


def check_mergeable_when_sharded(module: nn.Module) -> None:
    """Refuse to merge into weights of which each process holds a part: what is put there does not arrive.

    Args:
        module: A base layer, or a model.

    Raises:
        RuntimeError: If a parameter is sharded.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    module.state_dict()  # ``fully_shard`` keeps whole copies for a while after a forward, and parts with them here
    for name in sharded_parameters(module):
        raise RuntimeError(
            f"Cannot merge: {name} is sharded between processes; nothing was changed. Save the adapter (on every "
            "process) and merge it in one, with merge_and_unload() on a base that is whole, or with moslora merge."
        )


def warn_of_whole_factors(model: nn.Module, adapter_name: str) -> None:
    """Say that an adapter which was added to a sharded model is in no shard.

    Args:
        model: The adapted model.
        adapter_name: The adapter that was just added.

    Warns:
        UserWarning: If ``fully_shard`` was there before the adapter.
    """
    sharded = sharded_parameters(model)
    named = [
        name for name, _ in model.named_parameters() if factor_in(name) and adapter_name in name.split(".")
    ]
    if sharded and named and not set(named) & set(sharded):
        warn(
            f"Adapter {adapter_name!r} was added to a model that is sharded between processes already: its factors are "
            "whole in each of them, and their gradients are not averaged. It runs, but to train it make or load "
            "the adapter first and call fully_shard after that.",
            stacklevel=3,
        )
