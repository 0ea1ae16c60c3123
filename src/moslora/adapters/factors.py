"""An adapter at rest: the factors of every module, without a model.

Folding, exporting, comparing and (later) arithmetic work on this one value. How it lies on disk is the
business of ``formats/``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moslora.core import functional
from moslora.errors import AdapterError

__all__ = [
    "FOLD_TOLERANCE",
    "Adapter",
    "Comparison",
    "Factors",
    "Form",
    "add",
    "compare",
    "exact_pattern",
    "tied_heads",
]

# Relative error of ΔW that folding in float32 may cost. A and B are each rounded once, by 6e-8 of an entry at most, and
# what they lose may add up. A dropped mixer or scale costs about 1.
FOLD_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Form:
    """How the factors of a module lie in files; at rest they are matrices whatever the module is.

    Attributes:
        kind: ``"linear"``, ``"conv"``, ``"embedding"``, or ``"expert"`` for one of several in a tensor.
        kernel: Of a convolution; its A is ``(r, in, *kernel)`` in files and ``(r, in · kernel)`` here.
        groups: Of a convolution; its B is ``(out, r / groups, 1, …)`` in files and filled up with zeros here.
    """

    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    groups: int = 1


LINEAR = Form()


@dataclass(frozen=True)
class Factors:
    """The factors of one module.

    Attributes:
        A: Shape ``(r, in)``; of an embedding, in is the vocabulary.
        M: Shape ``(r, r)``; the identity in a plain LoRA.
        B: Shape ``(out, r)``.
        scale: s of ``ΔW = s·B·M·A``, unitless.
        form: How they lie in files.
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
        """Move the scale into B, the one form that every reader of LoRA files takes rightly.

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
        return _product_norm(self.scale * self.B.double(), self.M.double() @ self.A.double())

    def singular_values(self) -> Tensor:
        """Return the singular values of ΔW, without building it.

        Returns:
            Shape ``(min(r, in, out),)``, float64, largest first.
        """
        core = _core(self.scale * self.B.double(), self.M.double() @ self.A.double())
        values: Tensor = torch.linalg.svdvals(core)
        return values[: min(self.r, self.A.shape[1], self.B.shape[0])]


@dataclass(frozen=True)
class Adapter:
    """The factors of every module, and what a loader must know beside them.

    Attributes:
        modules: Factors by the module's path in the base model, as ``model.layers.0.self_attn.q_proj``.
        config: Arguments that LoRA and MoSLoRA share, and the mixer's, as in ``adapter_config.json``.
        extra: Other tensors that were trained (biases, ``modules_to_save``), by their name in the file.
    """

    modules: Mapping[str, Factors]
    config: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

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
        return Adapter({name: f.fold() for name, f in self.modules.items()}, self.config, self.extra)

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


def tied_heads(modules: Mapping[str, Factors], sharing: Iterable[str]) -> set[str]:
    """Find the heads whose ΔW is that of the embedding with which they share their weight.

    Args:
        modules: Factors by path.
        sharing: Paths of those that share one weight in the base.

    Returns:
        Their paths. None of them, if the adapter changes one use of the weight otherwise than another.
    """
    shared = list(sharing)
    sources = [name for name in shared if modules[name].form.kind == "embedding"]
    heads = {name for name in shared if modules[name].form == LINEAR}
    if len(sources) != 1 or not heads or len(heads) + 1 != len(shared):
        return set()
    source = Adapter({"": modules[sources[0]]})
    for name in heads:
        head = modules[name]
        turned = replace(head, A=head.B.T, M=head.M.T, B=head.A.T, form=modules[sources[0]].form)
        try:
            error = compare(source, Adapter({"": turned})).max_relative_error
        except ValueError:  # of other sizes
            return set()
        if not error < FOLD_TOLERANCE:
            return set()
    return heads


def exact_pattern(name: str) -> str:
    """Return a key of ``rank_pattern`` and ``alpha_pattern`` that fits one module only.

    Args:
        name: The module's path.

    Returns:
        A regular expression as PEFT reads it there.
    """
    return f"^{re.escape(name)}"


def add(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Take the weighted sum of adapters, exact on ΔW: the ranks of a module add up, its mixer is block-diagonal.

    Args:
        adapters: Of one base; a module may be missing in some.
        weights: A factor for each, unitless; may be negative.

    Returns:
        The sum, with scales of 1.

    Raises:
        AdapterError: If the numbers make no sense, the adapters are of different bases, train more than factors, or
            a module differs in shape or form.
    """
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights; give a weight for each, and some."
        )
    bad = [weight for weight in weights if not math.isfinite(weight) or weight == 0]
    if bad:
        raise AdapterError(
            f"{bad[0]!r} is no weight: it must be finite and not 0 (leave such an adapter out)."
        )
    bases = {
        (str(a.config["base_model_name_or_path"]), a.config.get("revision"))
        for a in adapters
        if a.config.get("base_model_name_or_path")
    }
    if len(bases) > 1:
        names = sorted(f"{name} at {revision}" if revision else name for name, revision in bases)
        raise AdapterError(f"The adapters were trained on different bases, {names}, so their ΔW do not add.")
    base, revision = next(iter(bases), (None, None))
    for adapter in adapters:
        adapter.refuse_magnitudes("What it changes is no product of factors, so a weighted sum has none")
        if adapter.extra:
            raise AdapterError(
                f"An adapter also holds {sorted(adapter.extra)[0]}, which is no factor (a bias, or of "
                "modules_to_save), and of which a weighted sum has no meaning. Combine adapters without."
            )
    modules: dict[str, Factors] = {}
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        parts = [(w, a.modules[name]) for w, a in zip(weights, adapters, strict=True) if name in a.modules]
        shapes = {(f.A.shape[1], f.B.shape[0], f.form) for _, f in parts}
        if len(shapes) > 1:
            raise AdapterError(
                f"{name} differs between the adapters: (in, out, form) {sorted(map(str, shapes))}."
            )
        wide = [(w * f.scale, f.at_least(torch.float32)) for w, f in parts]
        A, M, B = functional.concatenate([(w, f.A, f.M, f.B) for w, f in wide])
        biases = [w * f.bias for w, f in wide if f.bias is not None]
        bias = torch.stack(biases).sum(0) if biases else None
        if bias is None and any(adapter.has_biases for adapter in adapters):
            bias = B.new_zeros(len(B))  # all of its modules have one, or none
        modules[name] = Factors(A, M, B, 1.0, parts[0][1].form, bias=bias)
    parameters = {tuple(sorted(a.config.get("target_parameters") or ())) for a in adapters}
    has_experts = any(factors.form.kind == "expert" for factors in modules.values())
    if has_experts and len(parameters) > 1:
        raise AdapterError(
            f"The adapters adapt different parameters, {sorted(map(list, parameters))}, which lie differently in their "
            "files. Combine adapters of the same target_parameters."
        )
    r = max(factors.r for factors in modules.values())
    others = {exact_pattern(name): factors.r for name, factors in modules.items() if factors.r != r}
    config = {
        "base_model_name_or_path": base,
        "revision": revision,
        "task_type": adapters[0].config.get("task_type"),
        "fan_in_fan_out": any(a.config.get("fan_in_fan_out") for a in adapters),
        "unlike_lora": {n: why for a in adapters for n, why in (a.config.get("unlike_lora") or {}).items()},
        "target_modules": sorted(name for name, f in modules.items() if f.form.kind != "expert"),
        "target_parameters": list(parameters.pop()) if has_experts else None,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "bias": "none",
        "mixer": "identity",
    }
    return Adapter(modules, config)


@dataclass(frozen=True)
class Comparison:
    """How far two adapters are apart.

    Attributes:
        max_relative_error: Largest ``‖ΔW1 - ΔW2‖ / ‖ΔW1‖`` over all modules, Frobenius norms in float64. Where there
            are magnitudes or biases, of ``s·B·M·A`` or of these, whichever is larger: equal in all, two adapters do
            the same to any base.
        worst_module: Where it was found.
        modules: How many modules were compared.
    """

    max_relative_error: float
    worst_module: str
    modules: int


def compare(before: Adapter, after: Adapter) -> Comparison:
    """Compare the ΔW of two adapters, module by module, in float64.

    ΔW is never built: the norm of a product of thin matrices is that of the product of their R factors.

    Args:
        before: The reference.
        after: What was made of it.

    Returns:
        The largest relative error and where it is. A module that is zero in both counts as equal; zero in
        one only, as infinitely wrong.

    Raises:
        AdapterError: If the two do not have the same modules, or a module changed its shape.
    """
    if before.modules.keys() != after.modules.keys():
        lost = sorted(before.modules.keys() - after.modules.keys())
        added = sorted(after.modules.keys() - before.modules.keys())
        raise AdapterError(
            f"The adapters do not have the same modules. Lost: {lost[:5]}. Added: {added[:5]}."
        )
    if not before.modules:
        raise AdapterError("The adapter has no modules, so there is nothing to compare.")
    worst, worst_module = -1.0, ""
    for name, one in before.modules.items():
        two = after.modules[name]
        errors = (
            _relative_error(name, one, two),
            _magnitude_error(name, one, two),
            _bias_error(name, one, two),
        )
        for error in errors:
            if not (error <= worst or math.isnan(worst)):  # NaN counts as worse than anything
                worst, worst_module = error, name
    return Comparison(worst, worst_module, len(before.modules))


def _relative_error(name: str, one: Factors, two: Factors) -> float:
    if one.A.shape[1] != two.A.shape[1] or one.B.shape[0] != two.B.shape[0]:
        raise AdapterError(f"{name} changed its shape: A {tuple(one.A.shape)} became {tuple(two.A.shape)}.")
    if one.form != two.form:
        raise AdapterError(f"{name} changed its form: {one.form} became {two.form}.")
    left = torch.cat([one.scale * one.B.double(), -two.scale * two.B.double()], dim=1)  # (out, r1 + r2)
    right = torch.cat([one.M.double() @ one.A.double(), two.M.double() @ two.A.double()])  # (r1 + r2, in)
    difference, size = _product_norm(left, right), one.norm()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def _magnitude_error(name: str, one: Factors, two: Factors) -> float:
    if (one.magnitude is None) != (two.magnitude is None):
        raise AdapterError(f"{name} lost or got DoRA's magnitude.")
    if one.magnitude is None or two.magnitude is None:
        return 0.0
    return _distance(one.magnitude.double(), two.magnitude.double())


def _bias_error(name: str, one: Factors, two: Factors) -> float:
    if (one.bias is None) != (two.bias is None):
        raise AdapterError(f"{name} lost or got a bias on B.")
    if one.bias is None or two.bias is None:
        return 0.0
    return _distance(one.scale * one.bias.double(), two.scale * two.bias.double())


def _distance(one: Tensor, two: Tensor) -> float:
    """Return ``‖one - two‖ / ‖one‖``; zero twice is equal, once is infinitely wrong."""
    difference, size = float((one - two).norm()), float(one.norm())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Return ``‖left · right‖_F`` for ``(out, k)`` and ``(k, in)``, float64, k small."""
    if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
        return float("nan")
    return float(_core(left, right).norm())


def _core(left: Tensor, right: Tensor) -> Tensor:
    """Return a small matrix with the singular values of ``left · right``: the product of their R factors."""
    R_left = torch.linalg.qr(left, mode="r").R  # (min(out, k), k)
    R_right = torch.linalg.qr(right.T, mode="r").R  # (min(in, k), k)
    core: Tensor = R_left @ R_right.T
    return core
