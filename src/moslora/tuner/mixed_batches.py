"""Mixed batches: ``adapter_names`` names an adapter for each row of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moslora.errors import UsageError
from moslora.tuner.layer import MoSLoRALayer

__all__ = ["check_names", "handing_over"]


def check_names(model: nn.Module, names: Any) -> None:
    """Refuse a mixed batch that some layer would run wrongly.

    Args:
        model: The adapted model.
        names: What was passed as ``adapter_names``.

    Raises:
        UsageError: With the reason and the way out.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"adapter_names must be a list of names, one per row of the batch; got {names!r}.")
    if model.training:
        raise UsageError("adapter_names is for inference; call eval(), or train one adapter at a time.")
    layers = [module for module in model.modules() if isinstance(module, MoSLoRALayer)]
    known = {name for layer in layers for name in layer.scaling}
    unknown = sorted(set(names) - known - {"__base__"})
    if unknown:
        raise UsageError(
            f"adapter_names has {unknown[0]!r}; the model has {sorted(known)}, and '__base__' for none."
        )
    whole = [layer for layer in layers if not layer.is_rowwise and set(names) & set(layer.scaling)]
    if whole:
        raise UsageError(
            f"adapter_names cannot be served: the weight of a {type(whole[0].get_base_layer()).__name__} is "
            "adapted as a whole, for all rows alike. Split the batch and call set_adapter for each part."
        )


@contextlib.contextmanager
def handing_over(tuner: nn.Module, model: Any, names: list[str], beams: int) -> Iterator[None]:
    """Hand the adapter of each row to every layer, for as long as the model runs.

    Args:
        tuner: The adapted model with its tuner around it.
        model: The model inside.
        names: One for each row.
        beams: How often a decoder sees each row.

    Yields:
        Nothing.
    """
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else None
    # An encoder sees each row once, its decoder once per beam. Some models without one name themselves.
    once = set(encoder.modules()) if encoder is not None and encoder is not model else set()
    repeated = [name for name in names for _ in range(beams)]

    def hand_over(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {**kwargs, "adapter_names": names if module in once else repeated}

    handles = [
        module.register_forward_pre_hook(hand_over, with_kwargs=True)
        for module in tuner.modules()
        if isinstance(module, MoSLoRALayer | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
