"""Tensors beside the factors, where an adapter is merged: what was trained whole replaces the base's own tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moslora.adapters.fit import Fit
from moslora.adapters.formats.key_names import KEY_PREFIX
from moslora.core.finite import all_finite
from moslora.errors import AdapterError
from moslora.models.shards import DTYPES, Stored, StoredWeights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Replacement", "replacements"]

WITH_PEFT = (
    "Load it with PeftModel.from_pretrained and merge_and_unload(), which puts such tensors in their places, "
    "and save the model."
)
UNTIE = (
    "Untie the base first (tie_word_embeddings=False, the embedding copied into the head), or keep the adapter "
    "beside it."
)


@dataclass(frozen=True)
class Replacement:
    """A tensor of the base that the adapter has whole.

    Attributes:
        name: In the base's files.
        stored: Where it is.
        value: What takes its place, in the base's dtype.
    """

    name: str
    stored: Stored
    value: Tensor

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.stored.start + self.value.numel() * self.value.dtype.itemsize

    def bytes(self) -> bytes:
        """Return it as a file holds it."""
        import torch

        flat: torch.Tensor = self.value.contiguous().reshape(-1).view(torch.uint8)
        return flat.numpy().tobytes()


def replacements(fit: Fit, weights: StoredWeights) -> list[Replacement]:
    """Find the place of every tensor beside the factors: trained biases, and layers of ``modules_to_save``.

    Args:
        fit: The adapter, held against the base, with nothing that has no place there or another shape.
        weights: Of the base.

    Returns:
        What takes the place of a tensor of the base; nothing for copies of the base's own.

    Raises:
        AdapterError: If a tensor has no place on disk that it could take; with the way out.
    """
    return [
        found
        for key, tensor in sorted(fit.adapter.extra.items())
        if not _is_copy_of_base(key, tensor, fit, weights) and (found := _place(key, tensor, fit, weights))
    ]


def _place(key: str, tensor: Tensor, fit: Fit, weights: StoredWeights) -> Replacement:
    import torch

    name = key.removeprefix(KEY_PREFIX).replace(".base_layer.bias", ".bias")
    about = f"The adapter also holds {key}, which is not a factor (a bias, or of modules_to_save)"
    module, place = name.rpartition(".")[0], fit.names.tensors.get(name)
    stored = None
    if place is not None and place.stored and not place.is_converted:
        stored = weights.table[place.stored[0]]
    if fit.is_shared(module):
        raise AdapterError(f"{about}, and in the base {module} shares its weight with another. {UNTIE}")
    if place is None or stored is None or stored.dtype not in DTYPES or not tensor.is_floating_point():
        raise AdapterError(f"{about}, and the base has no tensor {name} that it could replace. {WITH_PEFT}")
    value = tensor.to(getattr(torch, DTYPES[stored.dtype]))
    if not all_finite(value):
        raise AdapterError(
            f"{about}, with values that {stored.dtype} does not have. Take the base in 32 bits."
        )
    assert math.prod(stored.shape) == value.numel()
    return Replacement(place.stored[0], stored, value)


def _is_copy_of_base(key: str, tensor: Tensor, fit: Fit, weights: StoredWeights) -> bool:
    """Tell whether a tensor is the base's own: PEFT saves adapted embeddings and heads with their base weight."""
    import torch

    if ".base_layer." not in key:
        return False
    name = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
    group = next((group for group in fit.names.shared if name in group), frozenset({name}))
    places = [place for one in sorted(group) if (place := fit.names.tensors.get(one)) and place.stored]
    if not places or places[0].is_converted or weights.table[places[0].stored[0]].dtype not in DTYPES:
        return False
    name = places[0].stored[0]
    own = weights.read(name)
    return own.shape == tensor.shape and torch.equal(own, tensor.to(own.dtype))
