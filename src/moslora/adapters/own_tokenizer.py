"""A tokenizer that lies beside an adapter, held against the base's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moslora.adapters.findings import Finding, some
from moslora.errors import AdapterError
from moslora.models.shards import EMBEDDINGS, StoredWeights
from moslora.models.tokenizer_files import TokenizerFiles, read_tokenizer

__all__ = ["check_rows", "differences", "tokenizer_findings"]


def differences(own: TokenizerFiles, folder: Path) -> tuple[str, ...]:
    """Say in what the adapter's tokenizer differs from the base's.

    Args:
        own: The adapter's.
        folder: Of the base.

    Raises:
        ModelError: If a file of the base's is damaged.
    """
    base = read_tokenizer(folder)
    if base is None:
        return ("the base has none",)
    return tuple(own.differences(base))


def _without_row(own: TokenizerFiles, weights: StoredWeights) -> str:
    """Say which tokens the base's embedding has no row for; empty if it has all."""
    rows = {
        stored.shape[0]
        for name, stored in weights.table.items()
        if name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS and len(stored.shape) == 2
    }
    lost = own.beyond(max(rows)) if rows else []
    if not lost:
        return ""
    return (
        f"{len(lost)} tokens of the tokenizer beside it ({some([repr(token) for token in lost])}) have no row "
        "in the base's "
        f"embedding, which has {max(rows)}."
    )


FIX = (
    "Name the base as it was in the training, its embedding resized "
    "(model.resize_token_embeddings(len(tokenizer))) and saved; "
    "or, if those tokens are never used, move the tokenizer's files out of the adapter's directory."
)


def check_rows(own: TokenizerFiles, weights: StoredWeights) -> None:
    """Refuse a tokenizer with tokens that the base has no row for.

    Args:
        own: The adapter's.
        weights: Of the base.

    Raises:
        AdapterError: With the tokens, and what to do.
    """
    text = _without_row(own, weights)
    if text:
        raise AdapterError(f"{own.folder}: {text} {FIX}")


def tokenizer_findings(folder: Path, weights: StoredWeights) -> Iterator[Finding]:
    """Compare the tokenizer beside an adapter with the base's.

    Args:
        folder: The adapter's.
        weights: Of the base.

    Yields:
        What was found; nothing where the adapter has none.

    Raises:
        ModelError: If a file is damaged.
    """
    own = read_tokenizer(folder)
    if own is None:
        return
    text = _without_row(own, weights)
    if text:
        yield Finding("error", "tokenizer", text, FIX)
        return
    found = differences(own, weights.folder)
    if found:
        yield Finding(
            "warning",
            "tokenizer",
            f"The tokenizer beside it is not the base's: {'; '.join(found)}.",
            "Load the tokenizer from the adapter's directory, or moslora merge BASE ADAPTER OUT, which carries it.",
        )
    else:
        yield Finding("ok", "tokenizer", "The tokenizer and chat template beside it are the base's.")
