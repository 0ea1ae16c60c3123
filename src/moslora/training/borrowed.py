"""A model of the caller's, lent to a run: whatever the run does to it, it is given back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["borrowed"]


@contextlib.contextmanager
def borrowed(model: nn.Module | None) -> Iterator[None]:
    """Give a model back as it was when the block ends, also by an error.

    What is restored: modules (an adapter is taken out), hooks and attributes of every module, a ``forward`` of an
    instance, training mode, ``requires_grad``, gradients, the device, buffers, biases (which an adapter may train), the
    configurations, and what a parameter has beside its values, such as the scales of a quantized one. The other weights
    are frozen in every training and are not copied.

    Args:
        model: The model; None lends nothing.
    """
    if model is None:
        yield
        return
    snapshot = _Snapshot(model)
    try:
        yield
    finally:
        snapshot.restore()


class _Snapshot:
    """What a model is, without a copy of its large weights."""

    def __init__(self, model: nn.Module) -> None:
        self.attributes = [(module, dict(vars(module))) for module in model.modules()]
        # Containers are restored in place: the handle of a hook knows the very dictionary that it is in.
        self.contents = [
            (value, copy.copy(value))
            for _, attributes in self.attributes
            for value in attributes.values()
            if isinstance(value, dict | list | set)
            and type(value).__name__ != "FrozenDict"  # diffusers' configuration
        ]
        self.parameters = [
            (p, p.requires_grad, p.data, p.grad, p.detach().clone() if name.endswith("bias") else None)
            for name, p in model.named_parameters()
        ]
        self.buffers = [(buffer, buffer.data, buffer.detach().clone()) for buffer in model.buffers()]
        self.beside = [(owner, dict(vars(owner))) for owner in _owners(model)]
        self.configs = [(config, _own_copy(config)) for config in _configs(model)]

    def restore(self) -> None:
        """Put everything back."""
        import torch

        for module, attributes in self.attributes:
            own = vars(module)
            for name in own.keys() - attributes.keys():
                del own[name]
            own.update(attributes)
        for container, content in self.contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        with torch.no_grad():
            for parameter, requires_grad, data, grad, values in self.parameters:
                parameter.data = data
                parameter.grad = grad
                parameter.requires_grad_(requires_grad)
                if values is not None and not torch.equal(data, values):
                    data.copy_(values)
            for buffer, data, values in self.buffers:
                buffer.data = data
                if not torch.equal(data, values):
                    data.copy_(values)
        for owner, attributes in self.beside:
            vars(owner).clear()
            vars(owner).update(attributes)
        for config, settings in self.configs:
            vars(config).clear()
            vars(config).update(settings)


def _owners(model: nn.Module) -> Iterator[Any]:
    """Yield the parameters, and objects that they hold, such as the ``quant_state`` of bitsandbytes.

    On a CPU its layers pack weight and scales in another order when they are called, in place.
    """
    from torch import Tensor, nn

    for parameter in model.parameters():
        yield parameter
        for value in vars(parameter).values():
            if hasattr(value, "__dict__") and not isinstance(value, Tensor | nn.Module | type):
                yield value


def _configs(model: nn.Module) -> list[Any]:
    """Return the configurations that modules hold, each once, with those inside them."""
    from transformers import GenerationConfig, PretrainedConfig

    kinds = (PretrainedConfig, GenerationConfig)
    waiting = [v for module in model.modules() for v in vars(module).values() if isinstance(v, kinds)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += [value for value in vars(config).values() if isinstance(value, kinds)]
    return list(found.values())


def _own_copy(config: Any) -> dict[str, Any]:
    """Copy a configuration's values; configurations inside it stay the same objects, which modules share."""
    return {
        name: value if hasattr(value, "to_diff_dict") else copy.deepcopy(value)
        for name, value in vars(config).items()
    }
