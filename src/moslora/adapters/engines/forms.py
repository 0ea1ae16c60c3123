"""The form of an adapter that an engine applies whole: experts together or apart, gaps filled; or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from moslora.adapters.engines.predict import predict
from moslora.adapters.engines.rules import read_engine
from moslora.adapters.expert_layouts import (
    LAYOUTS,
    are_apart,
    are_together,
    expert_count,
    layout_error,
    layout_of,
    put_together,
    take_apart,
)
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats.experts import EXPERT
from moslora.adapters.formats.lora import flatten
from moslora.adapters.ranks import to_rank
from moslora.errors import AdapterError, ProofError

__all__ = ["applied_form", "experts_as"]

# Of one projection's ΔW, as for a fold: the factors are moved, not computed anew.
MOVED = 1e-6
SIZES = Callable[[str], "tuple[int, ...] | None"]


def applied_form(
    key: str, adapter: Adapter, config: Mapping[str, Any] | None = None, sizes: SIZES = lambda _: None
) -> tuple[Adapter, tuple[str, ...]]:
    """Write an adapter in the form that an engine applies whole.

    Args:
        key: The engine's name on the command line.
        adapter: With the names of the base.
        config: The base's ``config.json``; None where it is not known.
        sizes: Returns the shape of a module's weight in the base; None where it is not known.

    Returns:
        The adapter, of the same ΔW; and what was changed, as sentences.

    Raises:
        AdapterError: If there is no such form; the message has the engine's reason and the way out.
        ProofError: If ΔW of an expert changed on the way.
    """
    engine = read_engine(key)
    if engine.format != "lora" or adapter.has_magnitudes:
        _refuse(key, adapter, config)
        return adapter, ()
    notes: list[str] = []
    shaped = adapter
    together = _wants_together(key, config)
    if together is not None and _has_experts(adapter, config):
        called = (
            ("gate_proj", "up_proj", "down_proj") if key == "sglang" else None
        )  # the option takes no others
        shaped = experts_as(adapter, together, config, True, called)
        if shaped is not adapter:
            how = "in one tensor of all" if together else "each projection a module of its own"
            notes.append(f"Experts were written {how}, as {engine.name} {engine.version} reads them.")
    if key == "sglang":
        shaped, said = _for_sglang(shaped, sizes)
        notes += said
    _refuse(key, shaped, config)
    return shaped, tuple(notes)


def experts_as(
    adapter: Adapter,
    together: bool,
    config: Mapping[str, Any] | None,
    complete: bool = False,
    called: tuple[str, str, str] | None = None,
) -> Adapter:
    """Write experts in one tensor of all, or apart, and compare every ΔW.

    Args:
        adapter: With experts.
        together: Whether in one tensor of all.
        config: The base's ``config.json``.
        complete: Whether all projections get factors, those that were not adapted zeros.
        called: What to call gate, up and down where each is a module; None for the names of the family.

    Returns:
        The adapter; the same object where nothing has to be changed.

    Raises:
        AdapterError: If the family of the base is not known.
        ProofError: If ΔW of an expert changed.
    """
    layout = layout_of(config)
    number = expert_count(config)
    done = (
        put_together(adapter, layout, number)
        if together
        else take_apart(adapter, layout, complete, number, called)
    )
    error = layout_error(adapter, done, layout)
    if not error <= MOVED:
        raise ProofError(
            f"The proof failed: ΔW of an expert changed by {error:.1e} as its factors were moved."
        )
    same = done.modules.keys() == adapter.modules.keys()
    return adapter if same else done


def _has_experts(adapter: Adapter, config: Mapping[str, Any] | None) -> bool:
    known = LAYOUTS.get(str((config or {}).get("model_type")))
    return are_together(adapter) or (known is not None and are_apart(adapter, known))


def _wants_together(key: str, config: Mapping[str, Any] | None) -> bool | None:
    """Tell in which form an engine reads a base's experts; None where it takes both or that is not known."""
    if key == "sglang":
        return False
    if key in ("peft", "transformers"):
        return None
    named = (config or {}).get("architectures")
    model = read_engine(key).models.get(str(named[0])) if isinstance(named, list) and named else None
    return None if model is None else model.experts == "together"


def _refuse(key: str, adapter: Adapter, config: Mapping[str, Any] | None) -> None:
    found = predict(key, _written(adapter), config)
    if found.faults:
        first = found.faults[0]
        fix = "" if "--for" in first.fix else f" {first.fix}"
        raise AdapterError(f"{read_engine(key).name} would not apply it whole. {first.what}{fix}")


def _written(adapter: Adapter) -> Adapter:
    """Return the adapter as its file will say it: no scale but 1."""
    if adapter.has_magnitudes or "components" in adapter.config:
        return adapter
    return flatten(adapter)


# --- SGLang -------------------------------------------------------------------------------------------------


def _for_sglang(adapter: Adapter, sizes: SIZES) -> tuple[Adapter, list[str]]:
    """Give every layer what SGLang cannot do without, all modules one rank, and the targets as a list."""
    notes = []
    modules = dict(adapter.modules)
    for path in list(modules):
        before, _, last = path.rpartition(".")
        if last in ("q_proj", "k_proj", "v_proj"):
            for needed in ("q_proj", "v_proj"):
                _fill(modules, f"{before}.{needed}", modules[path], sizes)
        elif last == "up_proj":
            own = (modules[path].B.shape[0], modules[path].A.shape[1])
            _fill(modules, f"{before}.gate_proj", modules[path], lambda _, own=own: own)  # type: ignore[misc]
    if len(modules) > len(adapter.modules):
        notes.append(
            f"{len(modules) - len(adapter.modules)} projections that were not adapted got factors of zero, without "
            "which SGLang fails (q and v beside each other, gate beside up)."
        )
    config = dict(adapter.config)
    plain = [path for path, factors in modules.items() if factors.form != EXPERT]
    if len(modules) > len(adapter.modules) or isinstance(config.get("target_modules"), str):
        config |= {"target_modules": sorted(plain), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    filled = replace(adapter, modules=modules, config=config)
    ranks = {factors.r for factors in modules.values()}
    if len(ranks) > 1:
        filled = to_rank(flatten(filled), max(ranks)).adapter
        notes.append(
            f"All modules were brought to rank {max(ranks)}, padded with zeros, as SGLang knows one rank."
        )
    return filled, notes


def _fill(modules: dict[str, Factors], path: str, like: Factors, sizes: SIZES) -> None:
    if path in modules:
        return
    shape = sizes(path)
    if shape is None or len(shape) != 2:
        raise AdapterError(
            f"SGLang would not apply it whole: it puts q, k and v into one tensor, and {path} is not adapted. Its "
            "size is known by the base alone. Give --base MODEL."
        )
    A, B = like.A.new_zeros(like.r, shape[1]), like.B.new_zeros(shape[0], like.r)
    modules[path] = replace(like, A=A, M=torch.eye(like.r, dtype=A.dtype), B=B, bias=None)
