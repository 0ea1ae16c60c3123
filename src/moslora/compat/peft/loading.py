"""Loading an adapter whole or not at all: what PEFT only warns of, or says nothing of, is an error here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from moslora.errors import ProofError
from moslora.wording import first_line

__all__ = ["load_whole"]

# Methods all of whose tensors are loaded into modules; of others, as prompts, PEFT loads some apart.
STRICT = ("LORA", "MOSLORA")


def load_whole(base: nn.Module, adapter: Path, name: str = "default") -> Any:
    """Put an adapter of any method of PEFT into a model; every tensor finds its place, and no factor is without one.

    PEFT 0.18 to 0.21.2 warns of factors that the file lacks, and drops what fits no module of the base: its
    ``from_pretrained`` throws away what ``load_adapter`` returns. Without this, an adapter of another base is the bare
    base in part or whole. It can go when ``from_pretrained`` can be told to be strict.

    Args:
        base: The model, or a ``PeftModel`` that has other adapters of the same type already; changed in place.
        adapter: Directory that PEFT loads.
        name: What PEFT calls it.

    Returns:
        The ``PeftModel``, in evaluation mode.

    Raises:
        ProofError: If a tensor is missing, left over or of another shape; with what to do.
    """
    with warnings.catch_warnings(record=True) as said, _keeping_results() as results:
        warnings.simplefilter("always")
        try:
            if isinstance(base, PeftModel):
                base.load_adapter(str(adapter), name)
                model = base.eval()
            else:
                model = PeftModel.from_pretrained(base, str(adapter), name).eval()
        except (RuntimeError, KeyError) as error:
            if "size mismatch" not in str(error) and not isinstance(error, KeyError):
                raise
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise _misfit(
                adapter,
                lines or [f"{first_line(error)} is trained in full by its configuration and not in its file"],
            ) from error
    problems = []
    if all(str(getattr(c.peft_type, "value", c.peft_type)) in STRICT for c in model.peft_config.values()):
        problems += [f"{key} has no place in the base" for r in results for key in r.unexpected_keys]
    problems += [f"{key} is missing from the file" for r in results for key in r.missing_keys]
    problems += [str(w.message).splitlines()[0] for w in said if "missing adapter keys" in str(w.message)]
    if problems:
        raise _misfit(adapter, problems)
    for warning in said:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


@contextlib.contextmanager
def _keeping_results() -> Iterator[list[Any]]:
    """Keep what ``load_adapter`` returns inside the block; it lists what was missing and what was left over."""
    results: list[Any] = []
    load: Any = PeftModel.load_adapter

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        results.append(load(self, *args, **kwargs))
        return results[-1]

    PeftModel.load_adapter = load_adapter
    try:
        yield results
    finally:
        PeftModel.load_adapter = load


def _misfit(adapter: Path, problems: list[str]) -> ProofError:
    more = f" ({len(problems)} in all)" if len(problems) > 1 else ""
    return ProofError(
        f"{adapter} does not fit this base: {problems[0][:300]}{more}. Name the base that it was trained on; moslora "
        "doctor ADAPTER --base MODEL says what differs, and moslora export ADAPTER OUT --base MODEL writes the base's "
        "names where only those differ."
    )
