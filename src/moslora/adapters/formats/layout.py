"""How the factors of a module are named and laid out in files, and as matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moslora.adapters.convolutions import join_groups, split_groups
from moslora.adapters.factors import LINEAR, Factors, Form
from moslora.adapters.formats import experts
from moslora.adapters.formats.key_names import KEY_PREFIX, normalize

__all__ = ["KEY_PREFIX", "Found", "as_matrices", "as_stored", "group_factors", "name_all", "name_tensors"]


@dataclass(frozen=True)
class Found:
    """Tensors of a file, sorted.

    Attributes:
        modules: Per module path, tensors by ``A``, ``M``, ``B``, ``magnitude`` and ``bias`` (on B), as the file
            stores them.
        rest: All other tensors, by their full name.
        embeddings: Paths of the modules whose names said that they are embeddings.
        notes: What was put right in names, as sentences.
        stripped: What was taken from the beginning of every path (``key_names.Names``).
    """

    modules: dict[str, dict[str, Tensor]]
    rest: dict[str, Tensor]
    embeddings: set[str]
    notes: tuple[str, ...] = ()
    stripped: str = ""


def group_factors(
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, str],
    embedding_parts: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Found:
    """Sort tensors into modules.

    Args:
        tensors: Tensors by name, as ``base_model.model.PATH.PART.weight``; of embeddings without ``.weight``.
        parts: ``A``, ``M`` or ``B`` by the PART that stands for it.
        embedding_parts: The same for embeddings.
        config: The adapter's configuration, which helps to tell a wrapper's name from a module's.

    Returns:
        Modules, their kind, and everything else.

    Raises:
        AdapterError: If names cannot be put right.
    """
    names = normalize(tensors, config or {}, (*parts, *(embedding_parts or {})))
    found = Found({}, {}, set(), names.notes, names.stripped)
    for key, tensor in names.tensors.items():
        stem = key.removesuffix(".weight")
        is_bias = key.endswith(".bias")
        path, _, part = (key.removesuffix(".bias") if is_bias else stem).rpartition(".")
        module = path.removeprefix(KEY_PREFIX)
        if path == module:
            found.rest[key] = tensor
        elif is_bias and parts.get(part) == "B":
            found.modules.setdefault(module, {})["bias"] = tensor
        elif stem != key and part in parts:
            found.modules.setdefault(module, {})[parts[part]] = tensor
        elif stem == key and not is_bias and part in (embedding_parts or {}):
            found.modules.setdefault(module, {})[(embedding_parts or {})[part]] = tensor
            found.embeddings.add(module)
        else:
            found.rest[key] = tensor
    return found


def as_matrices(tensors: Mapping[str, Tensor], is_embedding: bool) -> tuple[dict[str, Tensor], Form]:
    """Lay factors as matrices.

    Args:
        tensors: ``A``, ``B`` and maybe ``M``, ``magnitude`` and ``bias``, as a file stores them.
        is_embedding: Whether they adapt an embedding.

    Returns:
        A ``(r, in)``, M ``(r, r)``, B ``(out, r)``, a magnitude and a bias ``(out,)``, and how they lay.

    Raises:
        ValueError: If a convolution's factors do not fit each other.
    """
    A, B = tensors["A"], tensors["B"]
    flat = dict(tensors)
    if "magnitude" in flat:  # (out,), of a convolution (1, out, 1, …)
        magnitude = flat["magnitude"]
        shape = (B.shape[0],) if A.ndim < 3 else (1, B.shape[0], *(1,) * (A.ndim - 2))
        if tuple(magnitude.shape) != shape:
            raise ValueError(
                f"a magnitude of shape {tuple(magnitude.shape)} does not fit B {tuple(B.shape)}."
            )
        flat["magnitude"] = magnitude.flatten()
    if is_embedding:
        return flat, Form("embedding")
    if A.ndim < 3:
        return flat, LINEAR
    r, kernel = A.shape[0], tuple(A.shape[2:])
    if (
        B.ndim != A.ndim
        or any(n != 1 for n in B.shape[2:])
        or r % B.shape[1]
        or B.shape[0] % (r // B.shape[1])
    ):
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not factors of one convolution.")
    groups = r // B.shape[1]
    vectors = ("magnitude", "bias")
    flat.update({name: tensor.flatten(1) for name, tensor in tensors.items() if name not in vectors})
    flat["B"] = join_groups(flat["B"], groups)  # (out, r)
    return flat, Form("conv", kernel, groups)


def as_stored(factors: Factors) -> dict[str, Tensor]:
    """Lay factors as files hold them: the inverse of ``as_matrices``.

    Args:
        factors: Of one module.

    Returns:
        ``A``, ``M`` and ``B``, and ``magnitude`` and ``bias`` where there are such.
    """
    A, M, B, form = factors.A, factors.M, factors.B, factors.form
    beside = {} if factors.magnitude is None else {"magnitude": factors.magnitude}
    bias = {} if factors.bias is None else {"bias": factors.bias}
    if form.kind != "conv":
        return {"A": A, "M": M, "B": B, **beside, **bias}
    beside = {name: m.view(1, -1, *(1,) * len(form.kernel)) for name, m in beside.items()} | bias
    ones = (1,) * len(form.kernel)
    B = split_groups(B, form.groups)  # (out, r / groups)
    return {
        "A": A.view(A.shape[0], -1, *form.kernel),
        "M": M.view(*M.shape, *ones),
        "B": B.view(*B.shape, *ones),
        **beside,
    }


def name_all(
    modules: Mapping[str, Factors],
    parts: Mapping[str, str],
    embedding_parts: Mapping[str, str],
    magnitude_part: str = "",
) -> dict[str, Tensor]:
    """Name the factors of all modules as a file does, experts put together.

    Args:
        modules: Factors by path.
        parts: ``A``, ``M`` or ``B`` by the PART that stands for it; letters that are not there are left out.
        embedding_parts: The same for embeddings.
        magnitude_part: What a magnitude is called, ``.weight`` included where it has that.

    Returns:
        Tensors by name.
    """
    named: dict[str, Tensor] = {}
    for module, factors in modules.items():
        if factors.form != experts.EXPERT:
            named.update(name_tensors(module, factors, parts, embedding_parts, magnitude_part))
    for module, stored in experts.gather(modules).items():
        named.update(
            {f"{KEY_PREFIX}{module}.{part}.weight": stored[letter] for part, letter in parts.items()}
        )
    return named


def name_tensors(
    module: str,
    factors: Factors,
    parts: Mapping[str, str],
    embedding_parts: Mapping[str, str],
    magnitude_part: str = "",
) -> dict[str, Tensor]:
    """Name the factors of a module as a file does.

    Args:
        module: Path in the base model.
        factors: Its factors.
        parts: ``A``, ``M`` or ``B`` by the PART that stands for it; letters that are not there are left out.
        embedding_parts: The same for embeddings.
        magnitude_part: What a magnitude is called, ``.weight`` included where it has that.

    Returns:
        Tensors by name.
    """
    stored = as_stored(factors)
    if factors.form.kind == "embedding":
        named = {f"{KEY_PREFIX}{module}.{part}": stored[letter] for part, letter in embedding_parts.items()}
    else:
        named = {f"{KEY_PREFIX}{module}.{part}.weight": stored[letter] for part, letter in parts.items()}
    if "bias" in stored:
        (part,) = (part for part, letter in parts.items() if letter == "B")
        named[f"{KEY_PREFIX}{module}.{part}.bias"] = stored["bias"]
    if "magnitude" in stored:
        named[f"{KEY_PREFIX}{module}.{magnitude_part}"] = stored["magnitude"]
    return named
