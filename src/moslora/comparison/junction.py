"""Modules that run a joint batch: the base layer once over all rows, each lane's adapter over its own rows.

Import this module inside functions: it needs torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moslora.comparison.joint_batch import Layout
from moslora.comparison.lanes import CannotShare

__all__ = ["Junction", "Precomputed", "replaced_modules"]


class _Delegating(nn.Module):
    """Has the attributes of another module, where it has none of its own."""

    delegate = ""  # the attribute that holds it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.delegate), name)


class Precomputed(_Delegating):
    """Replaces a base layer whose output is known already.

    For the input that the output was computed from, the output is returned; for any other input the layer runs.

    Args:
        layer: The base layer.
    """

    delegate = "base_layer"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer  # the name under which PEFT looks for the base layer
        self.known: tuple[Any, Any] | None = None  # input and output

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the known output for the known input, otherwise the layer's."""
        if self.known is not None and self.known[0] is x:
            return self.known[1]
        return self.base_layer(x, *args, **kwargs)


class Junction(_Delegating):
    """Runs the base's module over all rows of a joint batch, and each lane's module over that lane's rows.

    Args:
        path: The module's path in the model, for messages.
        base: The base's module.
        lane_modules: The modules that replace it in the lanes' models, by the ``id`` of the lane. A lane without one
            keeps the base's output.
        layout: Returns the layout of the current joint batch.
    """

    delegate = "base"

    def __init__(
        self, path: str, base: nn.Module, lane_modules: Mapping[int, nn.Module], layout: Callable[[], Layout]
    ) -> None:
        super().__init__()
        self.path = path
        self.base = base
        self.layout = layout
        # A plain mapping is not registered as a submodule: these parameters belong to the lanes.
        self.lane_modules = dict(lane_modules)
        self.uses_dropout = {
            key: any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
            for key, module in lane_modules.items()
        }

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run base and lanes.

        Args:
            x: Activations ``(rows of all lanes, positions, features)``.
            *args: Passed on.
            **kwargs: Passed on.

        Raises:
            CannotShare: If the input does not have the rows and positions of the joint batch.
        """
        base_out = self.base(x, *args, **kwargs)
        layout = self.layout()
        if tuple(x.shape[:2]) != layout.shape or tuple(base_out.shape[:2]) != layout.shape:
            raise CannotShare(f"{self.path} does not see whole rows (its input is {tuple(x.shape)})")
        rows = [span.rows for span in layout.spans]
        outputs = []
        for span, lane_x, lane_base_out in zip(
            layout.spans, x.split(rows), base_out.split(rows), strict=True
        ):
            module = self.lane_modules.get(id(span.lane))
            if module is None:
                outputs.append(lane_base_out)
                continue
            # The shape that the lane's batch has alone.
            inputs, base_outputs = lane_x[:, : span.length], lane_base_out[:, : span.length]
            precomputed = getattr(module, "base_layer", None)
            if not isinstance(precomputed, Precomputed):
                precomputed = None
            random = span.lane.surroundings.stream(x.device) if self.uses_dropout[id(span.lane)] else None
            try:
                if precomputed is not None:
                    precomputed.known = (inputs, base_outputs)
                with random or contextlib.nullcontext():
                    output = module(inputs, *args, **kwargs)
            finally:
                if precomputed is not None:
                    precomputed.known = None
            if span.length < x.shape[1]:  # padding keeps the base's output, which no loss counts
                output = torch.cat([output, lane_base_out[:, span.length :]], dim=1)
            outputs.append(output)
        return torch.cat(outputs)


def replaced_modules(base: nn.Module, own: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the paths at which ``own`` has another kind of module than ``base``."""
    if type(base) is not type(own):
        yield prefix
        return
    theirs = dict(own.named_children())
    for name, child in base.named_children():
        yield from replaced_modules(child, theirs[name], f"{prefix}.{name}" if prefix else name)
