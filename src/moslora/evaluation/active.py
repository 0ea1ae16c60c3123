"""The proof that an adapter changes the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moslora.errors import AdapterError, ProofError, UsageError
from moslora.evaluation.results import Activity
from moslora.patterns import check_patterns

# Prompts on which the adapter has to show itself, and tokens of each.
PROBES, PROBE_TOKENS = 4, 128


def with_adapter(base: Any, adapter: Path, name: str = "default") -> Any:
    """Put an adapter into a model, as PEFT does, under a name; every tensor of its file has to find its place."""
    from moslora.adapters.formats.directory import read_config
    from moslora.compat.peft.loading import load_whole

    if not (adapter / "adapter_config.json").is_file():
        raise UsageError(
            f"{adapter} is not an adapter directory that PEFT loads. Convert other formats "
            f"with: moslora import {adapter} OUT"
        )
    names = [module for module, _ in base.named_modules()]
    check_patterns(read_config(adapter), names, str(adapter), AdapterError)
    return load_whole(base, adapter, name)


def prove_active(adapted: Any, adapter: Path, inputs: Sequence[Any], device: str) -> Activity:
    """Prove that logits with the adapter differ from those without; tell "learned nothing" from "not felt".

    Inputs are token ids ``(1, length)``, or all arguments by name, each.

    Raises:
        ProofError: If its ΔW is not zero and the logits do not move.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    effect = 0.0
    chosen = [i if isinstance(i, Mapping) else {"input_ids": i} for i in inputs[:PROBES]]
    with torch.inference_mode():
        for given in chosen:
            arguments = {name: value.to(device) for name, value in given.items()}
            active = adapted(**arguments).logits
            with adapted.disable_adapter():
                plain = adapted(**arguments).logits
            effect = max(effect, float((active.float() - plain.float()).abs().max()))
    learned = learned_anything(adapter)
    if effect == 0 and learned is not False:
        raise ProofError(
            f"{adapter} changes no logit of this model on {len(chosen)} prompts"
            + (", though its ΔW is not zero" if learned else "")
            + ": it was not applied. Is it for this base? (moslora doctor ADAPTER --base MODEL)"
        )
    modules = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    return Activity(effect, learned, modules)


def as_inputs(prompts: Sequence[Sequence[int]]) -> list[Any]:
    """Return prompts as tensors of token ids, ``(1, length)`` each."""
    import torch

    return [torch.tensor([list(ids)[:PROBE_TOKENS]]) for ids in prompts if ids][:PROBES]


def learned_anything(adapter: Path) -> bool | None:
    """Return whether any update of the adapter differs from zero; None if this package cannot read it."""
    from moslora.adapters.formats.reading import read_adapter
    from moslora.errors import AdapterError

    try:
        found = read_adapter(adapter)
    except (AdapterError, ValueError):
        return None  # another method's: it has no factors that are read here
    return any(factors.norm() > 0 for factors in found.modules.values())
