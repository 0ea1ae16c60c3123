"""Whether weights in memory are what they were, to the last bit, told where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["sums_of_bits"]

WORDS = 1 << 16  # of 8 bytes, in hand at once: half a megabyte
ODD = 6364136223846793005  # multiplies what was summed before; of the generator in Knuth, 3.3.4


def sums_of_bits(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Sum the bits of tensors, each twice: as they are, and each word times its place. Nothing is copied to the CPU.

    The sums are of 64 bits. A change of one word changes the first, an exchange of two in one piece the second; changes
    at random leave both as they are once in 2⁶⁴ at most. It is no hash that withstands somebody's intention.

    Args:
        tensors: By name, on any device.

    Returns:
        Name, dtype, shape and both sums of every tensor.
    """
    found = _brought([_sums(tensor) for tensor in tensors.values()])
    return [
        (name, str(tensor.dtype), tuple(tensor.shape), pair[0], pair[1])
        for (name, tensor), pair in zip(tensors.items(), found, strict=True)
    ]


def _brought(sums: list[Tensor]) -> list[list[int]]:
    """Bring pairs of sums to the CPU, with one transfer from each device."""
    import torch

    found: list[list[int]] = [[]] * len(sums)
    for device in {pair.device for pair in sums}:
        here = [number for number, pair in enumerate(sums) if pair.device == device]
        for number, pair in zip(here, torch.stack([sums[n] for n in here]).tolist(), strict=True):
            found[number] = pair
    return found


def _sums(tensor: Tensor) -> Tensor:
    """Return both sums, shape ``(2,)``, on the tensor's device."""
    import torch

    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if octets.data_ptr() % 8 or octets.storage_offset() % 8:
        octets = octets.clone()
    whole = len(octets) // 8 * 8
    words, rest = octets[:whole].view(torch.int64), octets[whole:]
    places = torch.arange(1, 2 * max(8, min(len(words), WORDS)), 2, device=octets.device)
    sums = torch.zeros(2, dtype=torch.int64, device=octets.device)
    for piece in (*torch.split(words, WORDS), rest.long()):
        sums = sums * ODD + torch.stack([piece.sum(), (piece * places[: len(piece)]).sum()])
    return sums
