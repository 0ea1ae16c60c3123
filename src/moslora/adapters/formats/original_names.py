"""Give a transformer's modules the names of the code that it was published with: the inverse of ``placing``.

Projections that are one layer there (``qkv``, ``linear1``) are put together: their As one below the other, their Bs in
blocks, so the rank is the sum and ΔW the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats.families import FAMILIES
from moslora.adapters.formats.family import Entry, Family, Module
from moslora.adapters.formats.placing import families_of
from moslora.errors import AdapterError

__all__ = ["family_of", "in_original_names"]


def family_of(part: Adapter) -> Family:
    """Tell the one family whose original names a transformer's modules have.

    Args:
        part: Adapter of a transformer, in diffusers' names. If its configuration says the model's class
            (``auto_mapping``, which PEFT writes), that decides between families whose modules look alike.

    Raises:
        AdapterError: If it is of no family, of one whose original names are not written, or may be of several.
    """
    kind = _class_of(part.config)
    families = families_of(part.modules)
    told = next((family for family in FAMILIES if kind in family.classes), None)
    if told is not None:
        if told not in families:
            raise AdapterError(
                f"The adapter says that it is of a {kind} ({told.name}), and its modules are not: "
                f"{told.fit(_modules(part)).misfit or _stranger(told, part)}. Give it to the program that trained it."
            )
        families = [told]
    if not families:
        raise AdapterError(
            f"{next(iter(part.modules))} and the other modules are of no family that is known by names and sizes. "
            "Write --to diffusers."
        )
    without = [family.name for family in families if family.native is None]
    if len(families) > 1 and (without or len({_names(family, part) for family in families}) > 1):
        listed = ", ".join(family.name for family in families)
        raise AdapterError(
            f"By names and sizes the modules may be of {listed}, whose original code calls them differently. The "
            "adapter directory that PEFT saved says which (auto_mapping in adapter_config.json): export that, or write "
            "--to diffusers, whose names are the same."
        )
    if without:
        raise AdapterError(
            f"The adapter is of {without[0]}, whose original names are not written. Write --to diffusers."
        )
    return families[0]


def in_original_names(part: Adapter, family: Family) -> dict[str, Factors]:
    """Rename modules, and put together those that are one layer in the original.

    Args:
        part: Folded, in diffusers' names; every scale is 1.
        family: Its family, from ``family_of``.

    Returns:
        Factors by original path.

    Raises:
        AdapterError: If a module has no name there.
    """
    fit = family.fit(_modules(part))
    renamed: dict[str, Factors] = {}
    fused: dict[str, tuple[Entry, dict[int, Factors]]] = {}
    for module, (own, indices) in fit.entries.items():
        factors = part.modules[module.path]
        entry = _original_entry(family, own, module, fit.hidden)
        if entry is None:
            raise AdapterError(
                f"{module.path} has no name in {family.name}'s original code that its readers take alike. Write --to "
                "diffusers, or train without it."
            )
        name = _filled(entry.source, indices)
        if len(entry.targets) > 1:
            position = [path for path, _ in entry.targets].index(own.source)
            fused.setdefault(name, (entry, {}))[1][position] = factors
            continue
        if entry.swaps:
            factors = replace(factors, B=torch.cat(factors.B.chunk(2)[::-1]))
        renamed[name] = factors
    for name, (entry, parts) in fused.items():
        assert fit.hidden is not None, "a part of a fused projection tells the hidden size"
        sizes = [int(Fraction(share) * fit.hidden) for _, share in entry.targets]
        renamed[name] = _together(parts, sizes)
    return {name: renamed[name] for name in sorted(renamed)}


def _class_of(config: Mapping[str, Any]) -> str:
    mapping = config.get("auto_mapping")
    return str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""


def _modules(part: Adapter) -> list[Module]:
    return [Module(path, False, f.A.shape[1], f.B.shape[0]) for path, f in part.modules.items()]


def _stranger(family: Family, part: Adapter) -> str:
    unknown = family.fit(_modules(part)).unknown
    return f"it has no {unknown[0].path}" if unknown else "their sizes differ"


def _names(family: Family, part: Adapter) -> tuple[str, ...]:
    """Return the original names of modules, for a comparison between families."""
    fit = family.fit(_modules(part))
    found = []
    for module, (own, indices) in fit.entries.items():
        entry = _original_entry(family, own, module, fit.hidden)
        found.append("" if entry is None else _filled(entry.source, indices))
    return tuple(found)


def _original_entry(family: Family, own: Entry, module: Module, hidden: int | None) -> Entry | None:
    """Return the original's name of a module; its own where both codes have the same."""
    for entry in family.entries:
        if entry.source == own.source or own.source not in [path for path, _ in entry.targets]:
            continue
        sized = len(entry.targets) > 1 or hidden is None or not entry.outputs.isdigit()
        if sized or int(entry.outputs) * hidden == module.outputs:  # type: ignore[operator]
            return entry
    return own if family.native == "*" or own.source in family.native_paths else None


def _filled(path: str, indices: Sequence[str]) -> str:
    for index in indices:
        path = path.replace("#", index, 1)
    return path


def _together(parts: Mapping[int, Factors], sizes: Sequence[int]) -> Factors:
    """Make one layer's factors of those of its rows; rows without any stay as they are in the base."""
    present = [parts[position] for position in sorted(parts)]
    A = torch.cat([factors.A for factors in present])
    B = A.new_zeros(sum(sizes), A.shape[0])
    column = 0
    for position in sorted(parts):
        factors, row = parts[position], sum(sizes[:position])
        B[row : row + sizes[position], column : column + factors.r] = factors.B
        column += factors.r
    return Factors(A, torch.eye(A.shape[0], dtype=A.dtype), B, 1.0, present[0].form)
