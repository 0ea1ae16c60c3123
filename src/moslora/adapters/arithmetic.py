"""Arithmetic of adapters at rest: their weighted sum, and how far two are apart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moslora.adapters.factors import LINEAR, Adapter, Factors, exact_pattern, product_norm
from moslora.core import functional
from moslora.errors import AdapterError

__all__ = ["FOLD_TOLERANCE", "Distance", "add", "distance", "relative", "sum_error", "tied_heads"]


# Relative error of ΔW that folding in float32 may cost. A and B are each rounded once, by 6e-8 of an entry at most, and
# what they lose may add up. A dropped mixer or scale costs about 1.
FOLD_TOLERANCE = 1e-6


def tied_heads(modules: Mapping[str, Factors], sharing: Iterable[str]) -> set[str]:
    """Find the heads whose ΔW is that of the embedding with which they share their weight.

    Args:
        modules: Factors by path.
        sharing: Paths of those that share one weight in the base.

    Returns:
        Their paths. None of them, if the adapter changes the two uses of the weight differently.
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
            error = distance(source, Adapter({"": turned})).max_relative_error
        except ValueError:  # of other sizes
            return set()
        if not error < FOLD_TOLERANCE:
            return set()
    return heads


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
    _check_summands(adapters, weights)
    _check_spelling(adapters)
    base, revision = _common_base(adapters)
    modules = {
        name: _sum_of_module(name, adapters, weights)
        for name in sorted({name for adapter in adapters for name in adapter.modules})
    }
    parameters = {tuple(sorted(a.config.get("target_parameters") or ())) for a in adapters}
    has_experts = any(factors.form.kind == "expert" for factors in modules.values())
    if has_experts and len(parameters) > 1:
        raise AdapterError(
            f"The adapters adapt different parameters, {sorted(map(list, parameters))}, which files store "
            "differently. Combine adapters of the same target_parameters."
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


def _check_spelling(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that name one module in two ways, as transformers did before and after a version."""
    names: dict[str, str] = {}
    for path in (path for adapter in adapters for path in adapter.modules):
        end = re.sub(r"^(?:(?:model|language_model)\.)+", "", path)
        end = end.replace("vision_tower.vision_model.", "vision_tower.")
        if names.setdefault(end, path) != path:
            raise AdapterError(
                f"{names[end]} and {path} may be one module under an old and a new name of transformers, and "
                "then their ΔW would not add. Name the base (moslora combine … --base MODEL); or take what "
                "moslora export ADAPTER OUT --base MODEL writes of each, which has the base's names."
            )


def _check_summands(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise AdapterError(
            f"{len(adapters)} adapters and {len(weights)} weights; give a weight for each, and some."
        )
    bad = [weight for weight in weights if not math.isfinite(weight) or weight == 0]
    if bad:
        raise AdapterError(
            f"{bad[0]!r} is not a weight: it must be finite and not 0 (leave such an adapter out)."
        )
    for adapter in adapters:
        adapter.refuse_magnitudes(
            "Its change of the weight is not a product of factors, so there is no weighted sum"
        )
        if adapter.extra:
            raise AdapterError(
                f"An adapter also holds {sorted(adapter.extra)[0]}, which is not a factor (a bias, or of "
                "modules_to_save), and of which a weighted sum has no meaning. Combine adapters without."
            )


def _common_base(adapters: Sequence[Adapter]) -> tuple[str | None, str | None]:
    """Return the base that adapters name, and its revision."""
    bases = {
        (str(a.config["base_model_name_or_path"]), a.config.get("revision"))
        for a in adapters
        if a.config.get("base_model_name_or_path")
    }
    if len(bases) > 1:
        names = sorted(f"{name} at {revision}" if revision else name for name, revision in bases)
        raise AdapterError(f"The adapters were trained on different bases, {names}, so their ΔW do not add.")
    return next(iter(bases), (None, None))


def _sum_of_module(name: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> Factors:
    """Concatenate the factors of one module."""
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
    return Factors(A, M, B, 1.0, parts[0][1].form, bias=bias)


@dataclass(frozen=True)
class Distance:
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


def distance(before: Adapter, after: Adapter) -> Distance:
    """Compare the ΔW of two adapters, module by module, in float64.

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
            sum_error(name, two, [(1.0, one)]),
            _magnitude_error(name, one, two),
            _bias_error(name, one, two),
        )
        for error in errors:
            if not (error <= worst or math.isnan(worst)):  # NaN counts as worse than anything
                worst, worst_module = error, name
    return Distance(worst, worst_module, len(before.modules))


def sum_error(name: str, written: Factors, summands: Sequence[tuple[float, Factors]]) -> float:
    """Return how far the ΔW of factors is from a weighted sum, in float64.

    No ΔW is built: the norm of a product of thin matrices is that of the product of their R factors. It is off by the
    rounding of float64 relative to the factors' norms, as a difference of dense ΔW is.

    Args:
        name: Of the module, for messages.
        written: The factors.
        summands: Weight and factors of each part of the sum.

    Returns:
        ``‖ΔW - Σ w·ΔW‖ / Σ ‖w·ΔW‖``, Frobenius. Infinite if only the sum is zero; NaN if a value is not finite.

    Raises:
        AdapterError: If shapes or forms differ.
    """
    left, right = [written.scale * written.B.double()], [written.M.double() @ written.A.double()]
    for weight, part in summands:
        if part.A.shape[1] != written.A.shape[1] or part.B.shape[0] != written.B.shape[0]:
            raise AdapterError(
                f"{name} changed its shape: A {tuple(part.A.shape)} became {tuple(written.A.shape)}."
            )
        if part.form != written.form:
            raise AdapterError(f"{name} changed its form: {part.form} became {written.form}.")
        left.append(-weight * part.scale * part.B.double())
        right.append(part.M.double() @ part.A.double())
    difference = product_norm(torch.cat(left, dim=1), torch.cat(right))  # (out, Σ r), (Σ r, in)
    return relative(difference, sum(abs(weight) * part.norm() for weight, part in summands))


def relative(difference: float, size: float) -> float:
    """Return ``difference / size``; of a size of zero 0 if the difference is zero too, else infinity."""
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _magnitude_error(name: str, one: Factors, two: Factors) -> float:
    if (one.magnitude is None) != (two.magnitude is None):
        raise AdapterError(f"{name} lost or got DoRA's magnitude.")
    if one.magnitude is None or two.magnitude is None:
        return 0.0
    return _vector_error(one.magnitude.double(), two.magnitude.double())


def _bias_error(name: str, one: Factors, two: Factors) -> float:
    if (one.bias is None) != (two.bias is None):
        raise AdapterError(f"{name} lost or got a bias on B.")
    if one.bias is None or two.bias is None:
        return 0.0
    return _vector_error(one.scale * one.bias.double(), two.scale * two.bias.double())


def _vector_error(one: Tensor, two: Tensor) -> float:
    """Return ``‖one - two‖ / ‖one‖``."""
    return relative(float((one - two).norm()), float(one.norm()))
