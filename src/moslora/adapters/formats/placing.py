"""Tell the family of a file's modules, and give them the paths that they have in diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch

from moslora.adapters.factors import Factors
from moslora.adapters.formats.families import FAMILIES
from moslora.adapters.formats.family import Entry, Family, Fit, Module
from moslora.errors import AdapterError

__all__ = ["Named", "families_of", "has_original_names", "knows", "place"]

# Blocks that no model of diffusers has with the modules of a family here; single layers, as ``img_in``, several have.
ORIGINAL = re.compile(
    r"(double_blocks|single_blocks|joint_blocks)\.\d+\.|blocks\.\d+\.(self|cross)_attn\."
    r"|(layers|(noise|context)_refiner)\.\d+\.attention\.(qkv|out)$"
)
# A module of a file: its path, whether that has underscores for dots, and its factors.
Named = tuple[str, bool, Factors]


def families_of(modules: Mapping[str, Factors]) -> list[Family]:
    """Tell which families modules may be of.

    Args:
        modules: Factors by path, in the names of any program.

    Returns:
        Every family that has all these names, with these sizes.
    """
    wanted = [_module(path, False, factors) for path, factors in modules.items()]
    return [family for family in FAMILIES if family.fit(wanted).fits]


def has_original_names(modules: Mapping[str, Factors]) -> bool:
    """Tell whether modules have the names of a known family's original code.

    Args:
        modules: Factors by path.
    """
    return any(ORIGINAL.match(path) for path in modules) and any(
        all(family.names(path, False) for path in modules) for family in FAMILIES
    )


def knows(path: str, is_flat: bool) -> bool:
    """Tell whether any family has a module of that name.

    Args:
        path: Its path.
        is_flat: Whether it has underscores for dots.
    """
    return any(family.names(path, is_flat) for family in FAMILIES)


def _module(path: str, is_flat: bool, factors: Factors) -> Module:
    return Module(path, is_flat, factors.A.shape[1], factors.B.shape[0])


def place(where: str, named: Sequence[Named]) -> tuple[dict[str, Factors], list[Family]]:
    """Give modules of a transformer their paths in diffusers.

    Args:
        where: Where they come from, for messages.
        named: The modules, all of one model.

    Returns:
        Factors by path in diffusers' model, fused projections taken apart; and the families that it may be, which call
        these modules alike.

    Raises:
        AdapterError: If no family has these names and sizes, or several that call them differently.
    """
    factors = {_module(*own): own[2] for own in named}
    fits = {family.name: (family, family.fit(list(factors))) for family in FAMILIES}
    fitting = [(family, fit) for family, fit in fits.values() if fit.fits]
    if not fitting:
        raise AdapterError(f"{where}: {_why_none([fit for _, fit in fits.values()], fits, list(factors))}")
    targets: dict[tuple[tuple[Module, tuple[str, ...]], ...], list[Family]] = {}
    for family, fit in fitting:
        targets.setdefault(_targets(fit), []).append(family)
    if len(targets) > 1:
        names = [_listed([family.name for family in own], "and") for own in targets.values()]
        one, other = (dict(pairs) for pairs in list(targets)[:2])
        module = next(module for module in one if one[module] != other[module])
        raise AdapterError(
            f"{where}: by names and sizes it may be of {_listed(names, 'or of')}, which call {module.path} "
            f"{one[module][0]} and {other[module][0]} in diffusers. The file has too few modules to tell. Load it in "
            "the program that trained it, and save it in diffusers' names (transformer.PATH.lora_A.weight)."
        )
    fit = fitting[0][1]
    placed: dict[str, Factors] = {}
    for module, (entry, indices) in fit.entries.items():
        for path, own in _apart(entry, indices, factors[module], fit.hidden).items():
            if path in placed:
                raise AdapterError(f"{where} adapts {path} twice.")
            placed[path] = own
    return placed, [family for family, _ in fitting]


def _targets(fit: Fit) -> tuple[tuple[Module, tuple[str, ...]], ...]:
    """Return what a family makes of each module."""
    return tuple(
        (module, tuple(_filled(path, indices) for path, _ in entry.targets) + ("swapped",) * entry.swaps)
        for module, (entry, indices) in fit.entries.items()
    )


def _filled(path: str, indices: Sequence[str]) -> str:
    for index in indices:
        path = path.replace("#", index, 1)
    return path


def _apart(entry: Entry, indices: Sequence[str], factors: Factors, hidden: int | None) -> dict[str, Factors]:
    """Take the rows of a fused projection apart; each part keeps the whole A."""
    B = factors.B
    if entry.swaps:
        B = torch.cat(B.chunk(2)[::-1])
    if len(entry.targets) == 1:
        return {_filled(entry.targets[0][0], indices): replace(factors, B=B)}
    assert hidden is not None, "a fused projection tells the hidden size"
    parts, start = {}, 0
    for path, share in entry.targets:
        end = start + int(Fraction(share) * hidden)
        parts[_filled(path, indices)] = replace(factors, B=B[start:end].contiguous())
        start = end
    return parts


def _listed(words: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _why_none(
    fits: Sequence[Fit], by_name: Mapping[str, tuple[Family, Fit]], modules: Sequence[Module]
) -> str:
    """Say why modules are of no family."""
    named = [(name, fit) for name, (_, fit) in by_name.items() if not fit.unknown]
    if named:
        names = _listed([name for name, _ in named], "and")
        return (
            f"its names are those of {names}, and its sizes are not: {'; '.join(fit.misfit for _, fit in named)}. It "
            "is of another model. Load it in the program that trained it, and save it in diffusers' names "
            "(transformer.PATH.lora_A.weight)."
        )
    name, nearest = min(
        ((name, fit) for name, (_, fit) in by_name.items()), key=lambda pair: len(pair[1].unknown)
    )
    stranger = nearest.unknown[0].path
    others = len(modules) - len(nearest.unknown)
    known = f", which {others} others of it are" if others else ""
    return (
        f"{stranger} is of no known model: it is not a module of {name}{known}. Known: a U-Net of Stable Diffusion, "
        f"{_listed([family.name for family in FAMILIES], 'and')}. Load the file in the program that trained it, and "
        "save it in diffusers' names (transformer.PATH.lora_A.weight)."
    )
