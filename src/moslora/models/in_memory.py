"""Whether a model in memory is one that a folder or the hub holds, weight for weight."""

from __future__ import annotations

from typing import Any

from moslora.compat.checkpoint_names import names_in_memory
from moslora.errors import ModelError
from moslora.models.shards import StoredWeights, open_weights

__all__ = ["stored_name"]


def stored_name(model: Any) -> str | None:
    """Return the folder or hub id that a model was loaded from, if that still holds the same weights.

    A fresh process has to load the same model, so its name alone is not enough: weights may have been changed since.

    Args:
        model: A model of transformers.

    Returns:
        The name; None if the model has none, or if not every weight could be compared and found equal.
    """
    name = getattr(model, "name_or_path", None) or getattr(model.config, "_name_or_path", None)
    if not name:
        return None
    try:
        stored = open_weights(name)
    except (ModelError, OSError):
        return None
    return name if _same_weights(model, stored) else None


def _same_weights(model: Any, stored: StoredWeights) -> bool:
    """Compare every floating-point weight with the stored one, rounded to the model's dtype."""
    import torch
    from safetensors import safe_open

    live = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    named = names_in_memory(model, stored.table)
    places = {names[0]: key for key, (names, is_converted) in named.items() if not is_converted}
    storages = {tensor.data_ptr() for name, tensor in live.items() if name in places}
    tied = {n for n, t in live.items() if n not in places and t.data_ptr() in storages}
    if not live or any(name not in places and name not in tied for name in live):
        return False
    by_shard: dict[str, list[str]] = {}
    for name in live.keys() - tied:
        by_shard.setdefault(stored.table[places[name]].shard, []).append(name)
    for shard, names in by_shard.items():
        with safe_open(stored.folder / shard, "pt") as file:
            for name in names:
                weight, one = file.get_tensor(places[name]), live[name]
                if weight.shape != one.shape or not torch.equal(weight.to(one.dtype), one.cpu()):
                    return False
    return True
