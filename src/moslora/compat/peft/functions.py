"""Single functions and names of PEFT that are private, or differ between versions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import merge_utils
from torch import Tensor, nn

from moslora import versions

__all__ = ["MODEL_PREFIX", "adapters_off", "prune", "sizes_of", "stored_weights"]

# Before the names of a base's modules in a ``PeftModel``, and in PEFT's files (0.18 to 0.21.2).
MODEL_PREFIX = "base_model.model."


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch a model's adapters off for a while, and change nothing else (``_disable_adapters``, PEFT 0.18 to 0.21.2).

    ``PeftModel.disable_adapter`` also takes ``requires_grad`` from the parameters and gives it back. Of a model that is
    split between processes these may be other tensors by then, and what was to be trained would get no gradient.
    It can go when PEFT leaves ``requires_grad`` alone there.

    Args:
        model: A ``PeftModel``.
    """
    switched = [module for module in model.modules() if getattr(module, "_disable_adapters", None) is False]
    for module in switched:
        cast(Any, module)._disable_adapters = True
    try:
        yield
    finally:
        for module in switched:
            cast(Any, module)._disable_adapters = False


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Return the inputs and outputs of a layer, also of a quantized one (PEFT's private function, 0.18 to 0.21.2).

    Every quantization library names them otherwise, and PEFT knows how. It can go when PEFT makes it public.

    Args:
        layer: A base layer.

    Raises:
        TypeError: If PEFT does not know the layer.
    """
    return cast("tuple[int, int]", _get_in_out_features(layer))


def stored_weights(model: nn.Module, path: str | None) -> Any:
    """Open a base's weights on disk, to be read one by one by ``get_tensor`` (PEFT's private class, 0.18 to 0.21.2).

    PEFT reads shards and files of the hub by it, for LoftQ. It can go when PEFT makes it public.

    Args:
        model: A ``PeftModel``, whose configuration names the base.
        path: The file or folder; None takes the base's own.
    """
    from peft.utils.loftq_utils import _SafetensorLoader

    return _SafetensorLoader(model, path)


def prune(tensor: Tensor, density: float, method: str | None, rescale: bool = False) -> Tensor:
    """Prune entries of a tensor, as PEFT's function of this name does since 0.19; 0.18 forgets to rescale.

    Args:
        tensor: What is pruned.
        density: Share of its entries that are kept.
        method: ``"magnitude"`` or ``"random"``.
        rescale: Divide what is left by the density, so that its mean stays.
    """
    pruned = cast(Tensor, merge_utils.prune(tensor, density, method, rescale=rescale))
    # PEFT 0.18 divides, and drops the result.
    forgets = not versions.is_at_least("peft", "0.19") and method == "random" and density < 1
    return pruned / density if rescale and forgets else pruned
