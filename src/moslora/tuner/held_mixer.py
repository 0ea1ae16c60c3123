"""How a layer holds its mixer, and how M keeps learning where parameters are held in 16 bits.

    M = weight                  in float32
    M = start + weight          in 16 bits, once it is trained

An entry of M is about 0.25 when training begins, a step 1e-4 to 1e-3. In bfloat16 the neighbors of 0.25 are 1e-3 away,
so most steps would round to nothing; and trainers do hold what they train in bfloat16 (TRL over a quantized base,
``model.to(torch.bfloat16)``, sharding with one dtype for each group). Near 0 the same dtype resolves every step, as it
does for B. So a mixer that is found in 16 bits is *split* before it is trained: its value moves into the frozen start,
and ``weight`` continues from 0 as the change since. Splitting changes neither M nor the dtype of any parameter.

It is done in place, at whichever comes first of the casts that a module sees (``.to(torch.bfloat16)``, DeepSpeed's),
``train()`` (which Trainer calls before it shards), and the first forward with gradients (after ``param.data = …``).
``docs/maths.md`` has the alternatives, and what follows for weight decay, resuming and files. Files hold M itself, in
float32 (``for_file``, ``from_file``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moslora.terminal import warn

__all__ = [
    "STARTS",
    "MixerStart",
    "MixerStarts",
    "apply_matrix",
    "for_file",
    "from_file",
    "is_narrow",
    "matrix",
    "split",
    "take_state",
]

# What a layer holds its starts in.
STARTS = "mixer_start"


def apply_matrix(h: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a matrix along the last dimension, or convolve with a 1×1 kernel, in the wider of the two dtypes.

    Args:
        h: Shape ``(..., r)``, or ``(n, r, *positions)``.
        weight: Shape ``(out, r)``, or ``(out, r, 1, …)``.

    Returns:
        Shape ``(..., out)``, or ``(n, out, *positions)``.
    """
    dtype = torch.promote_types(h.dtype, weight.dtype)
    h, weight = h.to(dtype), weight.to(dtype)
    if weight.ndim == 2:
        return F.linear(h, weight)
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.ndim](h, weight)


def is_narrow(dtype: torch.dtype) -> bool:
    """Tell whether a dtype is too coarse to learn M in."""
    return torch.finfo(dtype).bits < 32


def _at_least_float32(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class MixerStart(nn.Module):
    """The part of a split mixer that is not trained.

    Args:
        values: Shape ``(r, r)``, of a convolution ``(r, r, 1, …)``, of E experts ``(E·r, r)``.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        # A parameter, not a buffer: what shards, offloads or broadcasts parameters takes it along.
        self.weight = nn.Parameter(values, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """Apply it to ``h``, shape ``(..., r)`` or ``(n, r, *positions)``."""
        return apply_matrix(h, self.weight)


class MixerStarts(nn.Module):
    """The starts of a layer's split mixers, by adapter name.

    Not an ``nn.ModuleDict``, which PEFT would cast to float32 with what is trained: a start keeps the dtype of the base
    weight, so that it may lie in one sharded group with it.
    """

    def get(self, adapter: str) -> MixerStart | None:
        """Return an adapter's start; None if its mixer is not split."""
        return self._modules.get(adapter)  # type: ignore[return-value]

    def pop(self, adapter: str) -> None:
        """Forget an adapter's start, if there is one."""
        self._modules.pop(adapter, None)

    def begin(self, adapter: str, weight: Tensor, beside: Tensor | None) -> MixerStart:
        """Give an adapter a start of zeros.

        Args:
            adapter: Its name.
            weight: What its mixer is trained as.
            beside: The base weight, whose dtype it takes if that has 16 bits or more.
        """
        has_dtype = beside is not None and beside.is_floating_point() and beside.element_size() > 1
        dtype = beside.dtype if beside is not None and has_dtype else torch.float32
        start = MixerStart(torch.zeros_like(weight, dtype=dtype, requires_grad=False))
        self.add_module(adapter, start)
        return start


def matrix(weight: Tensor, start: MixerStart | None) -> Tensor:
    """Return M.

    Args:
        weight: What is trained of it.
        start: Its start, if it is split.

    Returns:
        ``weight`` itself, or start and weight together in float32 at least, with the gradient of ``weight``.
    """
    if start is None:
        return weight
    dtype = _at_least_float32(start.weight, weight)
    return start.weight.detach().to(dtype) + weight  # which widens the second as it adds


@torch.no_grad()
def split(weight: Tensor, starts: MixerStarts, adapter: str, beside: Tensor | None) -> None:
    """Move M into a start, if it is held too coarsely to learn there. Its value stays what it is.

    Args:
        weight: What is trained of it, changed in place.
        starts: The layer's starts.
        adapter: The adapter's name.
        beside: The base weight.
    """
    if not is_narrow(weight.dtype) or weight.ndim < 2 or not weight.numel():  # or a part of a flattened one
        return
    start = starts.begin(adapter, weight, beside).weight
    if not weight.is_meta:
        M = weight.float()
        start.copy_(M)
        weight.copy_(M - start.float())


def take_state(
    state_dict: dict[str, Any],
    prefix: str,
    held: Mapping[str, Tensor],
    starts: MixerStarts,
    beside: Tensor | None,
) -> None:
    """Prepare a layer's mixers for a state dict that is loaded into them.

    Args:
        state_dict: Tensors of a model. Without a start, a mixer there is in one piece.
        prefix: The layer's, with its dot.
        held: What its mixers are trained as, by their names after the prefix.
        starts: The layer's starts; changed to be those of the state dict.
        beside: The base weight.

    Warns:
        UserWarning: If that cannot be known, because the mixer here is split and the state dict may be of the trained
            parameters alone.
    """
    for name, weight in held.items():
        adapter = name.removesuffix(".weight").rpartition(".")[2]
        key, start_key = f"{prefix}{name}", f"{prefix}{STARTS}.{adapter}.weight"
        start = starts.get(adapter)
        if start_key in state_dict and start is None:
            starts.begin(adapter, weight, beside)
        elif key in state_dict and start_key not in state_dict and start is not None:
            warn(
                f"{key} was loaded without {start_key}. This mixer is trained in {weight.dtype}, as the change since "
                "its start, so what was loaded is taken for such a change, which is right only if it started from the "
                "same values. Load the adapter's own files (PeftModel.load_adapter) or a whole state dict instead.",
                stacklevel=2,
            )


def for_file(tensors: Mapping[str, Tensor], starts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put M itself, in float32, in the place of what a split mixer is trained as.

    Args:
        tensors: An adapter's tensors by their names in the model, the adapter's name included.
        starts: The starts by their names in the model.

    Returns:
        The tensors as a file has them, the adapter's name still included.

    Raises:
        RuntimeError: If a start is a part of one.
    """
    out = {key: tensor for key, tensor in tensors.items() if f".{STARTS}." not in key}
    for key, start in starts.items():
        path, adapter = key.removesuffix(".weight").split(f".{STARTS}.")
        for name in (f"{path}.moslora_M.{adapter}.weight", f"{path}.moslora_embedding_M.{adapter}"):
            weight = out.get(name)
            if weight is None:
                continue
            if start.shape != weight.shape:
                raise RuntimeError(
                    f"{key}, which the mixer is added to, is of shape {tuple(start.shape)}, the mixer "
                    f"{tuple(weight.shape)}: one is a part. Nothing was saved. Save with the state dict of the whole "
                    "model, gathered: state_dict=accelerator.get_state_dict(model), on every process."
                )
            out[name] = matrix(weight.detach(), MixerStart(start.detach().to(weight.device)))
    return out


def from_file(
    tensors: Mapping[str, Tensor], starts: Mapping[str, MixerStart], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put what a split mixer is trained as, and its start, in the place of M: the opposite of ``for_file``.

    Args:
        tensors: An adapter's tensors as a file has them, without the adapter's name.
        starts: The model's starts, by their names in the model without the adapter's.
        weights: What its mixers are trained as, likewise.

    Returns:
        The tensors by the model's names, without the adapter's. Where the mixer is held in 16 bits, M is in the start,
        so that training can continue; else the start is zero.
    """
    out = dict(tensors)
    for key, start in starts.items():
        path = key.removesuffix(f".{STARTS}.weight")
        for name in (f"{path}.moslora_M.weight", f"{path}.moslora_embedding_M"):
            if name not in tensors:
                continue
            M = tensors[name] if tensors[name].dtype == torch.float64 else tensors[name].float()
            begun = M.to(start.weight.dtype)
            if not is_narrow(weights[name].dtype):
                begun = torch.zeros_like(begun)
            out[key], out[name] = begun, M - begun.to(M.dtype)
    return out
