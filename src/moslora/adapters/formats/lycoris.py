"""LoHa and LoKr of LyCORIS, as LoRA: both are products of small matrices, so each is a LoRA of a higher rank, exactly.

LoHa is an entrywise product of two LoRAs of rank r, ``(w1_a·w1_b) ∘ (w2_a·w2_b)``, and so a LoRA of rank r². LoKr is a
Kronecker product ``w1 ⊗ w2`` of matrices that may themselves be products, and so ``(a1 ⊗ a2)·(b1 ⊗ b2)``; where both
are whole its rank is that of the layer. ``--rank`` brings either down, with the error said.

Source: github.com/KohakuBlueleaf/LyCORIS, ``lycoris/modules/loha.py`` and ``lokr.py``: the scale is alpha ÷ r, and 1
where both matrices of a LoKr are whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moslora.adapters.factors import Factors
from moslora.errors import AdapterError

__all__ = ["is_lycoris", "split_lycoris", "to_factors"]

_PART = re.compile(r"(?P<path>.+)\.(?P<part>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)")


def split_lycoris(name: str) -> tuple[str, str] | None:
    """Take the name of a tensor apart.

    Args:
        name: Without the layout's prefix.

    Returns:
        The module's path and the part, as ``lokr_w1_a``; None if it is neither LoHa's nor LoKr's.
    """
    found = _PART.fullmatch(name)
    return (found["path"], found["part"]) if found else None


def is_lycoris(parts: Mapping[str, Tensor]) -> bool:
    """Tell whether parts of a module are LoHa's or LoKr's."""
    return any(part.startswith(("hada_", "lokr_")) for part in parts)


def to_factors(where: str, parts: Mapping[str, Tensor]) -> Factors:
    """Turn a linear module of LoHa or LoKr into LoRA of the same ΔW.

    Args:
        where: The module, for messages.
        parts: By name, as ``lokr_w1_a``; and ``alpha``, if there is one.

    Returns:
        Factors in float32 at least.

    Raises:
        AdapterError: If parts are missing, do not fit, or are of a convolution.
    """
    wide = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in parts.items()}
    if any(t.ndim != 2 for name, t in wide.items() if name != "alpha"):
        raise AdapterError(
            f"{where}: LoHa or LoKr of a convolution, which is not turned into LoRA. Merge it into its base in the "
            "program that trained it."
        )
    r: int | None
    if {name[:4] for name in wide if name != "alpha"} == {"hada"}:
        A, B, r = _loha(where, wide)
    elif {name[:4] for name in wide if name != "alpha"} == {"lokr"}:
        A, B, r = _lokr(where, wide)
    else:
        raise AdapterError(f"{where} has parts of several methods: {', '.join(sorted(wide))}.")
    scale = 1.0 if r is None or "alpha" not in wide else float(wide["alpha"]) / r
    return Factors(A, torch.eye(A.shape[0], dtype=A.dtype), B, scale)


def _loha(where: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(f"{where} lacks {', '.join(missing)}.")
    w1_a, w1_b, w2_a, w2_b = (parts[name] for name in names)
    if (
        w1_a.shape[1] != w1_b.shape[0]
        or w2_a.shape[1] != w2_b.shape[0]
        or w1_a.shape[0] != w2_a.shape[0]
        or w1_b.shape[1] != w2_b.shape[1]
    ):
        raise AdapterError(f"{where}: its four matrices do not fit together.")
    A = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
    B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    return A, B, w1_b.shape[0]


def _lokr(where: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    sides, rank = [], None
    for side in ("lokr_w1", "lokr_w2"):
        whole, a, b = (parts.get(f"{side}{end}") for end in ("", "_a", "_b"))
        if whole is not None and a is None and b is None:
            eye = torch.eye(min(whole.shape), dtype=whole.dtype)
            sides.append((whole, eye) if whole.shape[0] >= whole.shape[1] else (eye, whole))
        elif whole is None and a is not None and b is not None and a.shape[1] == b.shape[0]:
            sides.append((a, b))
            rank = b.shape[0]
        else:
            raise AdapterError(f"{where} lacks a part of {side}, or its parts do not fit together.")
    (a1, b1), (a2, b2) = sides
    return torch.kron(b1.contiguous(), b2.contiguous()), torch.kron(a1.contiguous(), a2.contiguous()), rank
