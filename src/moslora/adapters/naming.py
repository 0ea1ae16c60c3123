"""Names of modules by the version of transformers that will load an adapter: ``--names``.

transformers 5, and 4 from 4.52 on, calls the modules of a vision-language model otherwise than its checkpoints do, and
holds the experts of a layer in one tensor; before, modules were called as in the checkpoints and each expert was one.
The old names are asked of the base's own files, through transformers' conversion (``models.module_names``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moslora.adapters.engines.forms import experts_as
from moslora.adapters.expert_layouts import LAYOUTS, are_apart, are_together
from moslora.adapters.factors import Adapter
from moslora.adapters.fit import Fit
from moslora.adapters.renaming import rename_modules, renamed_extra
from moslora.errors import AdapterError, UsageError
from moslora.wording import did_you_mean

__all__ = ["VERSIONS", "check_names", "named_as"]

# What is written → whether experts are together.
VERSIONS: Mapping[str, bool] = {"transformers-4": False, "transformers-5": True}


def check_names(names: str, engine: str | None) -> None:
    """Refuse names that are not known, or beside an engine, which has its own.

    Args:
        names: What was asked for.
        engine: What was asked for with ``--for``.

    Raises:
        UsageError: If there are no such names.
    """
    if names not in VERSIONS:
        raise UsageError(
            f"The names {names!r} are unknown; choose one of {', '.join(VERSIONS)}.{did_you_mean(names, VERSIONS)}"
        )
    if engine is not None:
        raise UsageError(
            f"--for {engine} says the names, so --names {names} has no place beside it. Give one."
        )


def named_as(names: str, adapter: Adapter, fit: Fit | None) -> tuple[Adapter, tuple[str, ...]]:
    """Write an adapter's modules under the names that a version of transformers has for them.

    Args:
        names: A key of ``VERSIONS``.
        adapter: With the names that the base has in memory here.
        fit: The adapter, held against its base.

    Returns:
        The adapter, of the same ΔW; and what was changed, as sentences.

    Raises:
        AdapterError: If the base is not at hand, or does not say a module's name.
        ProofError: If ΔW of an expert changed on the way.
    """
    if fit is None:
        raise AdapterError(
            f"--names {names} asks the base for its names, and no base is at hand. Give --base MODEL."
        )
    if not fit.names.is_of_class and names == "transformers-5" and fit.renamed:
        raise AdapterError(
            f"The class of {fit.base} is not in the installed transformers, so its names there are not known "
            f"({fit.names.origin})."
        )
    notes: list[str] = []
    layout = LAYOUTS.get(str(fit.config.get("model_type")))
    shaped = adapter
    if are_together(adapter) or (layout is not None and are_apart(adapter, layout)):
        shaped = experts_as(adapter, VERSIONS[names], fit.config)
        if shaped is not adapter:
            how = "in one tensor of all" if VERSIONS[names] else "each projection a module of its own"
            notes.append(f"Experts were written {how}, as {names} has them.")
    if names == "transformers-5":
        return shaped, tuple(notes)
    paths: dict[str, str] = {}
    for path in shaped.modules:
        tensor = fit.names.weight(path)
        if tensor is None:
            paths[path] = path  # an expert, which is called as in the files already
            continue
        if not tensor.stored or tensor.is_converted:
            if any(f"{path}.weight" in group for group in fit.names.shared):
                paths[path] = path  # a head that is stored as the embedding
                continue
            raise AdapterError(
                f"--names {names}: {path} is not one tensor of the files of {fit.base}, so what it was called there is "
                "not known. Name a base with its weights; or leave --names out."
            )
        paths[path] = tensor.stored[0].removesuffix(".weight")
    changed = {old: new for old, new in paths.items() if old != new}
    if changed:
        old, new = next(iter(changed.items()))
        notes.append(
            f"{len(changed)} of {len(paths)} modules got their names of {names}, as {old}, which is {new}."
        )
        shaped = replace(rename_modules(shaped, paths), extra=renamed_extra(shaped.extra, fit.names))
    return shaped, tuple(notes)
