"""An adapter at rest: the factors of every module, without a model.

Folding, exporting, comparing and arithmetic work on this one value. ``formats/`` is about files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moslora.core import functional
from moslora.core.finite import all_finite
from moslora.errors import AdapterError

__all__ = [
    "Adapter",
    "Begun",
    "Factors",
    "Form",
    "exact_pattern",
    "product_norm",
]


@dataclass(frozen=True)
class Form:
    """How files store the factors of a module; at rest they are matrices for every kind of module.

    Attributes:
        kind: ``"linear"``, ``"conv"``, ``"embedding"``, or ``"expert"`` for one of several in a tensor.
        kernel: Of a convolution; its A is ``(r, in, *kernel)`` in files and ``(r, in · kernel)`` here.
        groups: Of a convolution; its B is ``(out, r / groups, 1, …)`` in files and filled up with zeros here.
    """

    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1


LINEAR = Form()
CANCELED = 1e-10  # of the largest terms of a sum; what is smaller may be their rounding


@dataclass(frozen=True)
class Factors:
    """The factors of one module.

    Attributes:
        A: Shape ``(r, in)``; of an embedding, in is the vocabulary.
        M: Shape ``(r, r)``; the identity in a plain LoRA.
        B: Shape ``(out, r)``.
        scale: s of ``ΔW = s·B·M·A``, unitless.
        form: How files store them.
        magnitude: DoRA's, shape ``(out,)``: the length of each row of the adapted weight, which the factors then only
            turn. None in an adapter without. With it the change of the weight is the base's matter too, so what
            would be ΔW alone is refused.
        bias: On B, shape ``(out,)``, scaled as B is: ``s·(B·M·A·x + b)``. None in an adapter without.

    Raises:
        ValueError: If the sizes disagree.
    """

    A: Tensor
    M: Tensor
    B: Tensor
    scale: float
    form: Form = LINEAR
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        functional.check_factors(self.A, self.M, self.B)
        if self.bias is not None and self.bias.shape != (self.B.shape[0],):
            raise ValueError(
                f"The bias on B is of shape {tuple(self.bias.shape)}, for {self.B.shape[0]} outputs."
            )
        if self.magnitude is not None and self.magnitude.shape != (self.B.shape[0],):
            raise ValueError(
                f"The magnitude is of shape {tuple(self.magnitude.shape)}, for {self.B.shape[0]} outputs."
            )

    @property
    def r(self) -> int:
        """Rank."""
        return self.A.shape[0]

    @property
    def is_folded(self) -> bool:
        """Whether M is exactly the identity."""
        return torch.equal(self.M, torch.eye(self.r, dtype=self.M.dtype))

    def at_least(self, dtype: torch.dtype) -> Factors:
        """Widen the factors to ``dtype``, unless they are wider already; a magnitude stays as it is.

        Args:
            dtype: A float dtype.

        Returns:
            Factors of exactly the same ΔW.
        """
        A, M, B = (t.to(torch.promote_types(t.dtype, dtype)) for t in (self.A, self.M, self.B))
        bias = self.bias if self.bias is None else self.bias.to(torch.promote_types(self.bias.dtype, dtype))
        return replace(self, A=A, M=M, B=B, bias=bias)

    def fold(self) -> Factors:
        """Fold M into A; B and the scale unchanged.

        Returns:
            Factors of the same ΔW with M the identity. Already folded ones come back bit for bit.
        """
        if self.is_folded:
            return self
        return replace(self, A=functional.fold(self.A, self.M), M=torch.eye(self.r, dtype=self.M.dtype))

    def unscaled(self) -> Factors:
        """Move the scale into B, the one form that every reader of LoRA files reads correctly.

        Some take alpha to be r, some ignore rsLoRA or per-module alphas; with a scale of 1 all agree.

        Returns:
            Factors of the same ΔW, and bias, with a scale of 1.
        """
        if self.scale == 1:
            return self
        return replace(
            self, B=(self.B.double() * self.scale).to(self.B.dtype), bias=self.scaled_bias(), scale=1.0
        )

    def scaled_bias(self) -> Tensor | None:
        """Return what the bias on B adds to the output.

        Returns:
            ``s·b``, shape ``(out,)``, in its own dtype; None if there is none.
        """
        return None if self.bias is None else (self.bias.double() * self.scale).to(self.bias.dtype)

    def delta_weight(self) -> Tensor:
        """Build ΔW.

        Returns:
            Shape ``(out, in)``, float64.

        Raises:
            AdapterError: If there is a magnitude.
        """
        self.require_no_magnitude()
        return functional.delta_weight(self.A.double(), self.M.double(), self.B.double(), self.scale)

    def require_no_magnitude(self) -> None:
        """Refuse what the factors alone do not tell.

        Raises:
            AdapterError: If there is a magnitude.
        """
        if self.magnitude is not None:
            raise AdapterError(
                "The adapter has DoRA's magnitude, so what it changes depends on the base's weights. Load it on its "
                "base with PEFT, where merge_and_unload() gives the changed weights."
            )

    def norm(self) -> float:
        """Return the Frobenius norm of ``s·B·M·A``, without building it; that is ΔW where there is no magnitude."""
        return product_norm(self.scale * self.B.double(), self.M.double() @ self.A.double())

    def is_zero(self) -> bool:
        """Tell whether ``s·B·M·A`` is zero, without building it; NaN is not.

        One row of it tells, that of B's largest entry, unless it is so small that rounding may have made it.
        """
        row = self.B[int(self.B.abs().amax(1).argmax())].double() @ self.M.double()
        right = self.A.double()
        largest = float((row @ right).abs().max())
        if self.scale != 0 and largest > CANCELED * float(row.abs().sum()) * float(right.abs().max()):
            return False
        return self.norm() == 0

    def singular_values(self) -> Tensor:
        """Return the singular values of ΔW, without building it.

        Returns:
            Shape ``(min(r, in, out),)``, float64, largest first.
        """
        core = _core(self.scale * self.B.double(), self.M.double() @ self.A.double())
        values: Tensor = torch.linalg.svdvals(core)
        return values[: min(self.r, self.A.shape[1], self.B.shape[0])]


@dataclass(frozen=True)
class Begun:
    """How the start of an adapter was found that its file does not hold.

    Attributes:
        name: Of the start: ``"PiSSA"`` or ``"OLoRA"``.
        base: The base from whose weights it was computed.
        is_named: Whether the adapter named that base, rather than the user.
        unsure: Largest share of a module's ΔW that the rounding of the decomposition leaves open.
        moved: Median over the modules of ``‖ΔW‖`` over the start's own norm.
    """

    name: str
    base: str
    is_named: bool
    unsure: float
    moved: float

    def __str__(self) -> str:
        named = ", which it names" if self.is_named else ""
        return f"{self.name}, its start computed from {self.base}{named}, and subtracted"


@dataclass(frozen=True)
class Adapter:
    """The factors of every module, and what a loader must know beside them.

    Attributes:
        modules: Factors by the module's path in the base model, as ``model.layers.0.self_attn.q_proj``.
        config: Arguments that LoRA and MoSLoRA share, and the mixer's, as in ``adapter_config.json``.
        extra: Other tensors that were trained (biases, ``modules_to_save``), by their name in the file.
        notes: What was put right in the names of the file, as sentences; empty where nothing was.
        stripped: What was taken from the beginning of every path and may be a module of the base after all.
        begun: How its start was computed from its base, where it was; the modules are without it then.
    """

    modules: Mapping[str, Factors]
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stripped: str = ""
    begun: Begun | None = None

    @property
    def is_folded(self) -> bool:
        """Whether every M is the identity, so that the adapter is a plain LoRA."""
        return all(factors.is_folded for factors in self.modules.values())

    @property
    def parameters(self) -> int:
        """How many numbers A, M and B hold, and magnitudes and biases where there are any."""
        beside = [t for f in self.modules.values() for t in (f.magnitude, f.bias) if t is not None]
        return sum(t.numel() for t in beside) + sum(
            f.A.numel() + f.M.numel() + f.B.numel() for f in self.modules.values()
        )

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA adapter: a module has a magnitude."""
        return any(f.magnitude is not None for f in self.modules.values())

    def refuse_magnitudes(self, what: str) -> None:
        """Refuse what is not done, or would be wrong, with DoRA's magnitude.

        Args:
            what: What was asked for, as the beginning of a sentence: ``"A GGUF file cannot hold it"``.

        Raises:
            AdapterError: If a module has one; with the way out.
        """
        if self.has_magnitudes:
            raise AdapterError(
                f"The adapter has DoRA's magnitude (use_dora=True). {what}. Export it --to lora, a DoRA adapter that "
                "PEFT loads; or load it on its base with PEFT and merge_and_unload(), and ship the full weights."
            )

    @property
    def has_biases(self) -> bool:
        """Whether a module has a bias on B."""
        return any(f.bias is not None for f in self.modules.values())

    def refuse_biases(self, what: str) -> None:
        """Refuse what is not done, or would be wrong, with a bias on B.

        Args:
            what: What was asked for, as the beginning of a sentence: ``"A GGUF file cannot hold it"``.

        Raises:
            AdapterError: If a module has one; with the way out.
        """
        if self.has_biases:
            raise AdapterError(
                f"The adapter has a bias on B (lora_bias=True). {what}. Export it --to lora, which PEFT loads; or, if "
                "the base's layers have biases, merge it (moslora merge), and ship the full weights."
            )

    def fold(self) -> Adapter:
        """Fold every mixer.

        Returns:
            A plain LoRA with the same ΔW, ranks and scales.
        """
        return replace(self, modules={name: f.fold() for name, f in self.modules.items()})

    def delta_weight(self, module: str) -> Tensor:
        """Build ΔW of one module.

        Args:
            module: Its path in the base model.

        Returns:
            Shape ``(out, in)``, float64.

        Raises:
            KeyError: If the adapter has no such module.
        """
        return self.modules[module].delta_weight()


def exact_pattern(name: str) -> str:
    """Return a key of ``rank_pattern`` and ``alpha_pattern`` that fits one module only.

    Args:
        name: The module's path.

    Returns:
        A regular expression as PEFT reads it there.
    """
    return f"^{re.escape(name)}"


def product_norm(left: Tensor, right: Tensor) -> float:
    """Return ``‖left · right‖_F`` for ``(out, k)`` and ``(k, in)``, float64, k small."""
    if not (all_finite(left) and all_finite(right)):
        return float("nan")
    return float(_core(left, right).norm())


def _core(left: Tensor, right: Tensor) -> Tensor:
    """Return a small matrix with the singular values of ``left · right``: the product of their R factors."""
    R_left = torch.linalg.qr(left, mode="r").R  # (min(out, k), k)
    R_right = torch.linalg.qr(right.T, mode="r").R  # (min(in, k), k)
    core: Tensor = R_left @ R_right.T
    return core
