"""Scopes of a vision-language model (language model, vision tower, projector), and what is adapted in each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError
from moslora.patterns import check_patterns

if TYPE_CHECKING:
    from torch import nn

    from moslora.recipe.schema import ScopesSection

__all__ = ["UNQUANTIZED", "scope_of", "scoped_arguments"]

# Vision tower and projector keep their precision, as in the recipes that the paper builds on.
UNQUANTIZED = (r".*(?:vision|visual|image_tower|projector|connector|merger|aligner)[^.]*", "lm_head")


def scope_of(module: str) -> str:
    """Return the scope that a module of a vision-language model belongs to.

    Args:
        module: Its name, such as ``model.vision_tower.encoder.layers.0.mlp.fc1``.

    Returns:
        ``"projector"``, ``"vision"`` or ``"language"``.
    """
    if re.search(r"projector|connector|\.merger\b|merger_list|aligner", module):
        return "projector"
    return "vision" if re.search(r"vision|visual|image_tower", module) else "language"


def scoped_arguments(
    model: nn.Module, name: str, scopes: ScopesSection, adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """Turn scopes into target modules, with ranks and alphas of their own.

    Args:
        model: The base model.
        name: Its name, for messages.
        scopes: The recipe's ``scopes`` section.
        adapter: The recipe's ``adapter`` section.

    Returns:
        Arguments of the adapter's configuration.

    Raises:
        UsageError: If a scope has no module of the kind that it is given, or no scope is adapted.
    """
    from peft.utils.other import get_pattern_key
    from torch import nn

    arguments = {key: value for key, value in adapter.items() if key != "target_modules"}
    check_patterns(adapter, (n for n, _ in model.named_modules()), "adapter")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    targets = [n for n in linear if getattr(scopes, scope_of(n)) == "adapter"]
    for scope in ("language", "vision", "projector"):
        if getattr(scopes, scope) == "adapter" and not any(scope_of(n) == scope for n in targets):
            other = "full or frozen" if scope == "projector" else "frozen"
            raise UsageError(
                f"scopes.{scope}=adapter, but {name} has no linear module there; set it to {other}."
            )
    if scopes.projector == "full":
        projector = _projector_of(model)
        if not projector:
            raise UsageError(f"scopes.projector=full, but {name} has no projector.")
        arguments["modules_to_save"] = [*(arguments.get("modules_to_save") or []), *projector]
    if not targets:
        raise UsageError("scopes adapts no module; set one of language, vision, projector=adapter.")
    names = {"r": "rank_pattern", "alpha": "alpha_pattern", "mixer": "mixer_pattern"}
    own = {key: list(arguments.get(name) or {}) for key, name in names.items()}
    ranks, alphas, mixers = (dict(arguments.pop(name, None) or {}) for name in names.values())
    for target in targets:
        for key, patterns in (("r", ranks), ("alpha", alphas), ("mixer", mixers)):
            value = getattr(scopes, f"{scope_of(target)}_{key}")
            # Of two keys that fit one module the order decides, and saving sorts them.
            if value is not None and get_pattern_key(own[key], target) not in own[key]:
                patterns.setdefault(f"^{re.escape(target)}", value)
    patterns = {
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        **({"mixer_pattern": mixers} if mixers else {}),
    }
    return {**arguments, "target_modules": targets, **patterns}


def _projector_of(model: nn.Module) -> list[str]:
    """Return the projector's outermost modules; PEFT trains modules in full, but not lists of modules."""
    from torch import nn

    lists = (nn.ModuleList, nn.ModuleDict)
    modules = [n for n, m in model.named_modules() if scope_of(n) == "projector" and not isinstance(m, lists)]
    return [n for n in modules if not any(n.startswith(f"{outer}.") for outer in modules)]
