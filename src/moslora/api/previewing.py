"""What a recipe would train on, looked at before anything is trained: rows, lengths, and one example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moslora.display import Display, find_display
from moslora.failures import verb
from moslora.recipe.building import RecipeSource, build_recipe

__all__ = ["DataPreview", "preview"]


@dataclass(frozen=True)
class DataPreview:
    """What a recipe would train on.

    Attributes:
        kind: Of the task.
        rows: Examples to train on.
        heldout: Examples to measure on.
        lengths: Tokens of each example to train on, before any cut; empty for pictures. Of a pair, of each answer with
            its prompt.
        limit: Where longer ones are cut; None for nowhere.
        remarks: What to know about the data before numbers are believed.
    """

    kind: str
    rows: int
    heldout: int
    lengths: tuple[int, ...]
    limit: int | None
    remarks: tuple[str, ...]


@verb("check")
def preview(
    recipe: RecipeSource, *, settings: Sequence[str] = (), progress: str | Display | None = None
) -> DataPreview:
    """Read and encode a recipe's data as training would, and show one example with its trained tokens marked.

    No weights are loaded and nothing is kept; of the model its tokenizer and configuration are enough.

    Args:
        recipe, settings: As for ``train``.
        progress: Shows sizes, warnings and the example; None for silence.

    Raises:
        RecipeError, DataError, ModelError, UsageError: If something cannot be used; bad lines are named by number.
    """
    from moslora.models.loading import default_device
    from moslora.recipe.trainer_arguments import resolve_trainer_arguments
    from moslora.tasks import find_task

    built = build_recipe(recipe, settings=settings)
    task: Any = find_task(built.task.kind)(built, find_display(progress), lambda: None)
    task.needs_weights = False
    task.read()
    task.prepare()
    train: Any = getattr(task, "train_set", None)
    examples = list(getattr(task, "train_examples", ())) if train is None else train
    heldout: Any = getattr(task, "heldout_set", None)
    limit = resolve_trainer_arguments(built, default_device()).get("max_length")
    return DataPreview(
        kind=built.task.kind,
        rows=len(examples),
        heldout=len(heldout if heldout is not None else getattr(task, "heldout_examples", ())),
        lengths=tuple(length for example in train or () for length in _lengths(example)),
        limit=limit if isinstance(limit, int) else None,
        remarks=tuple(task.remarks),
    )


def _lengths(example: Any) -> Iterator[int]:
    """Yield the tokens of an encoded example, or of both answers of a pair."""
    parts = [getattr(example, name, None) for name in ("chosen", "rejected")]
    found = [part for part in parts if part is not None] or [example]
    for part in found:
        ids = getattr(part, "input_ids", None)
        if ids is not None:
            yield int(getattr(part, "full_length", 0) or len(ids))
