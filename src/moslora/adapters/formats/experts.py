"""Experts at rest: each is a module of its own, ``PATH[e]``, whatever one tensor PEFT's files hold them in.

PEFT adapts parameters (``target_parameters``) with factors of all E experts together: A ``(E·r, in)`` and the mixers
``(E·r, r)`` expert after expert, B ``(out, r·E)`` rank after rank. Where a module has several adapted parameters, their
layers nest, and a path ends in ``.base_layer`` once for each layer around.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moslora.adapters.factors import Factors, Form
from moslora.errors import AdapterError

__all__ = ["EXPERT", "count", "gather", "owner", "separate"]

EXPERT = Form("expert")
PLACE = re.compile(r"(.+)\[(\d+)\]")


def owner(path: str) -> str:
    """Return the path as files have it: that of an expert is its module's."""
    found = PLACE.fullmatch(path)
    return found[1] if found else path


def count(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ranks: set[Any]) -> int:
    """Tell how many experts a file's factors are of.

    Args:
        tensors: ``A``, ``B`` and maybe ``M`` of one module, matrices.
        config: The adapter's configuration.
        ranks: What it may mean to be the module's rank.

    Returns:
        Their number; 1 for anything that is not of experts.

    Raises:
        AdapterError: If the number cannot be told.
    """
    rows = tensors["A"].shape[0]
    if "M" in tensors:
        r = tensors["M"].shape[1]
        return rows // r if tensors["M"].shape[0] == rows and rows % r == 0 else 1
    if not config.get("target_parameters") or rows in ranks:
        return 1
    numbers = {rows // r for r in ranks if isinstance(r, int) and r > 0 and rows % r == 0}
    if len(numbers) > 1:
        raise AdapterError(
            f"its parameters have different ranks, {sorted(map(str, ranks))}, and the file does not say which this "
            "one has. Give all parameters of a module one rank."
        )
    return numbers.pop() if numbers else 1


def separate(path: str, tensors: Mapping[str, Tensor], experts: int) -> dict[str, dict[str, Tensor]]:
    """Take the factors of experts apart.

    Args:
        path: Their module.
        tensors: ``A``, ``B`` and maybe ``M``, as a file stores them.
        experts: Their number, above 1.

    Returns:
        Tensors by expert, under its own path.

    Raises:
        AdapterError: If they do not fit together.
    """
    A, B = tensors["A"], tensors["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are not factors of {experts} experts.")
    columns = B.view(B.shape[0], -1, experts)  # (out, r, E)
    found = {}
    for e in range(experts):
        own = {name: torch.chunk(tensors[name], experts)[e] for name in ("A", "M") if name in tensors}
        found[f"{path}[{e}]"] = {**own, "B": columns[:, :, e].contiguous()}
    return found


def gather(modules: Mapping[str, Factors]) -> dict[str, dict[str, Tensor]]:
    """Put experts together as PEFT's files hold them: the inverse of ``separate``.

    Args:
        modules: Factors by path; those that are not experts are left out.

    Returns:
        ``A``, ``M`` and ``B`` by the path of the module.

    Raises:
        AdapterError: If an expert is missing, or they have different ranks or scales.
    """
    together: dict[str, dict[int, Factors]] = {}
    for path, factors in modules.items():
        found = PLACE.fullmatch(path)
        if factors.form == EXPERT and found:
            together.setdefault(found[1], {})[int(found[2])] = factors
    stored = {}
    for path, numbered in together.items():
        experts = [numbered[e] for e in sorted(numbered)]
        shapes = {(f.A.shape, f.B.shape, f.scale) for f in experts}
        if sorted(numbered) != list(range(len(numbered))) or len(shapes) > 1:
            raise AdapterError(
                f"{path}: experts are missing, or differ in rank or scale, which files cannot say."
            )
        stored[path] = {
            "A": torch.cat([f.A for f in experts]),
            "M": torch.cat([f.M for f in experts]),
            "B": torch.stack([f.B for f in experts], dim=2).flatten(1),  # (out, r·E)
        }
    return stored
