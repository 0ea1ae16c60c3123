"""Which way a base stores the weight of a linear layer: ``(out, in)``, or ``(in, out)`` as GPT-2's Conv1D does."""

from __future__ import annotations

from moslora.adapters.fit import Fit
from moslora.errors import ModelError

__all__ = ["is_transposed"]


def is_transposed(fit: Fit, module: str, shape: tuple[int, int], stored: tuple[int, ...]) -> bool:
    """Tell whether a base stores a linear layer's weight as ``(in, out)``.

    PEFT goes by the class of each layer, and so does this where the class is known. The argument ``fan_in_fan_out`` in
    a file is what the last adapted layer was, so where one adapter has both kinds it may say either.

    Args:
        fit: The adapter, held against the base.
        module: Path in the base.
        shape: ``(out, in)`` by the adapter's factors.
        stored: Shape of the base's tensor.

    Raises:
        ModelError: If the weight is square and nothing says which way it lies.
    """
    if fit.names.build is not None:  # a class that transformers has
        tensor = fit.weight(module)
        return tensor is not None and tensor.is_transposed
    if not fit.adapter.config.get("fan_in_fan_out") or stored != shape[::-1]:
        return False
    if shape[0] == shape[1]:
        raise ModelError(
            f"{module} is square, the adapter says fan_in_fan_out, and the class of {fit.base} is not in transformers, "
            "so which way the weight lies cannot be told. Load the adapter with PeftModel.from_pretrained, call "
            "merge_and_unload() and save the model."
        )
    return True
