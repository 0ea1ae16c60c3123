"""An adapter's tensors on their way to a file and back: gathered, renamed, and checked against the model.

PEFT only warns of factors that are missing and says nothing of ones that fit no module; both leave a model that runs
and is wrong. Here nothing is loaded then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moslora.core.finite import all_finite
from moslora.errors import AdapterError
from moslora.tuner.embedding import MoSLoRAEmbedding
from moslora.tuner.held_mixer import STARTS, MixerStart, for_file, from_file
from moslora.tuner.names import MAGNITUDE, MAGNITUDE_IN_OLD_FILES, PREFIX, belongs_to, is_bias_of_another
from moslora.tuner.sharding import check_whole, gather, shard_like, sharded_parameters
from moslora.tuner.tying import take_out, tied_tensors
from moslora.wording import nearest

__all__ = ["check_fit", "gather_beside", "tensors_for_file", "tensors_from_file"]


def gather_beside(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Make whole tensors of what a sharded model has beside factors: modules trained whole, adapted embeddings.

    Args:
        model: The adapted model.
        state_dict: Its tensors, changed in place.
    """
    if sharded_parameters(model):
        beside = tuple(
            f"{name}."
            for name, module in model.named_modules()
            if isinstance(module, AuxiliaryTrainingWrapper | MoSLoRAEmbedding)
        )
        state_dict.update(gather(state_dict, [key for key in state_dict if key.startswith(beside)]))


def tensors_for_file(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor], selected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Turn what PEFT selected of an adapter into what a file has: whole tensors, M itself, tied factors twice.

    Args:
        model: The adapted model.
        adapter_name: The adapter's name.
        state_dict: The model's tensors.
        selected: The adapter's, by their names in the model.

    Raises:
        RuntimeError: If factors are parts of factors, which cannot be gathered here.
    """
    if sharded_parameters(model):
        selected.update(gather(selected, selected))
    # With bias="all" PEFT takes every bias along, also those on other adapters' B.
    selected = {key: t for key, t in selected.items() if not is_bias_of_another(key, adapter_name)}
    live = {name: start.weight for name, start in _mixer_starts(model).items()}
    selected = for_file(selected, {name: {**live, **state_dict, **selected}[name] for name in live})
    check_whole(selected)
    for name, source_name, transposed in tied_tensors(model, adapter_name):
        value = selected[source_name]
        selected[name] = (value.T if transposed else value).clone(memory_format=torch.contiguous_format)
    return selected


def tensors_from_file(
    model: nn.Module,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    name_in_file: Callable[[str, str], str],
) -> tuple[dict[str, Tensor], list[str]]:
    """Turn what a file has of an adapter into what the model has: today's names, split mixers, tied factors once.

    Args:
        model: The adapted model.
        adapter_name: The adapter's name.
        tensors: The file's.
        name_in_file: Returns a tensor's name in a file, of its name in the model and the adapter's name.

    Returns:
        The tensors by the model's names without the adapter's, and what is wrong with tied ones.
    """
    state_dict = {
        key.replace(f".{MAGNITUDE_IN_OLD_FILES}.", f".{MAGNITUDE}."): tensor
        for key, tensor in tensors.items()
    }
    differing = take_out(
        state_dict,
        [
            (*(name_in_file(name, adapter_name) for name in names), transposed)
            for *names, transposed in tied_tensors(model, adapter_name)
        ],
    )
    starts = {name_in_file(name, adapter_name): start for name, start in _mixer_starts(model).items()}
    starts = {name: start for name, start in starts.items() if name.endswith(f".{STARTS}.weight")}
    weights = {name_in_file(n, adapter_name): p for n, p in model.named_parameters()} if starts else {}
    return from_file(state_dict, starts, weights), differing


def check_fit(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], problems: list[str]
) -> dict[str, Tensor]:
    """Check an adapter's tensors against the model before anything is loaded, and shard them as it is sharded.

    Args:
        model: The adapted model.
        adapter_name: The adapter's name.
        tensors: What is to be loaded, by the model's names.
        problems: What is known to be wrong.

    Returns:
        The tensors; shards of them where the model has shards.

    Raises:
        AdapterError: If a factor is missing, left over, of the wrong shape, or not finite. A wrong shape is refused
            when it is loaded, because PEFT takes such tensors out in between for ``ignore_mismatched_sizes=True``,
            and warns of them.
    """
    expected = {key: value for key, value in model.state_dict().items() if belongs_to(key, adapter_name)}
    factors = {key: value for key, value in tensors.items() if f".{PREFIX}" in key}
    problems = [f"{key}: missing from the checkpoint" for key in expected.keys() - factors.keys()] + problems
    mismatched: dict[str, str] = {}
    for key, tensor in factors.items():
        if key not in expected:
            near = nearest(key, expected)
            problems.append(f"{key}: fits no adapted module" + (f" (nearest: {near})" if near else ""))
        elif tensor.shape != expected[key].shape:
            mismatched[key] = f"{key}: is {tuple(tensor.shape)}, the model needs {tuple(expected[key].shape)}"
        elif not tensor.is_meta and not all_finite(tensor):
            problems.append(f"{key}: has NaN or infinite values")
    if problems:
        raise _misfit([*problems, *mismatched.values()])
    if mismatched:
        _refuse_to_load(model, mismatched)
    sharded = sharded_parameters(model)
    return {**tensors, **shard_like(tensors, sharded)} if sharded else tensors


def _misfit(problems: list[str]) -> AdapterError:
    """Make the error of an adapter that does not fit its model."""
    shown = "\n  ".join(sorted(problems)[:5])
    rest = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    return AdapterError(
        f"The adapter does not fit this model; nothing was loaded.\n  {shown}{rest}\n"
        "Load it on the base model that its adapter_config.json names."
    )


def _refuse_to_load(model: nn.Module, mismatched: dict[str, str]) -> None:
    """Let the next state dict that is loaded fail, before anything is copied, if it has one of these tensors."""

    def refuse(_: nn.Module, state_dict: dict[str, Any], *__: Any) -> None:
        handle.remove()
        left = [
            reason
            for key, reason in mismatched.items()
            if key in state_dict or key.removeprefix("base_model.model.") in state_dict
        ]
        if left:
            raise _misfit(left)

    root: Any = model
    handle = root.register_load_state_dict_pre_hook(refuse)


def _mixer_starts(model: nn.Module) -> dict[str, MixerStart]:
    """Return the starts of split mixers by the names of their tensors."""
    return {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, MixerStart)
    }
