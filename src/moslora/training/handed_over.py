"""Objects that a script hands to a run: a model, a tokenizer or processor, rows, callbacks and metrics.

What a fresh process needs again (for the proof, to resume, to check hashes) is written into the run directory; the
recipe names the files, so that from there on the run is like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.writing import write_rows
from moslora.errors import UsageError
from moslora.models.in_memory import stored_name
from moslora.tasks.language import LanguageTask

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.recipe.schema import Recipe
    from moslora.tasks.task import Task

__all__ = ["HandedOver", "save_processor"]


def save_processor(processor: Any, model: Any, place: Path) -> None:
    """Save a tokenizer or processor so that transformers' Auto classes find its own class again.

    Args:
        processor: What was handed over.
        model: The model that it belongs to, whose configuration names the family; None if it is not at hand.
        place: The folder.
    """
    processor.save_pretrained(place)
    if model is not None and hasattr(processor, "image_processor"):
        model.config.save_pretrained(place)


@dataclass(frozen=True)
class HandedOver:
    """Objects that a script hands to a run.

    Attributes:
        model: A base model of transformers.
        processor: Its tokenizer or processor.
        rows: ``train`` and ``heldout`` examples, dicts each.
        callbacks: Callbacks of transformers' trainer, beside the run's own.
        metrics: By name, functions of an answer and its reference, beside the recipe's own metric.
    """

    model: Any = None
    processor: Any = None
    rows: Mapping[str, Iterable[Any]] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    metrics: Mapping[str, Callable[[str, str], Any]] = field(default_factory=dict)

    @property
    def needs_files(self) -> bool:
        """Whether anything is written into the run directory."""
        return self.model is not None or self.processor is not None or bool(self.rows)

    def check(self, kind: str, processes: int) -> None:
        """Refuse objects where they have no use.

        Args:
            kind: The task's.
            processes: How many train together.

        Raises:
            UsageError: If the task is not one of language models, or several processes were launched.
        """
        if kind == "image" and (self.needs_files or self.metrics):
            raise UsageError(
                "task=image takes paths: of the pipeline as model, of folders of pictures as data and heldout. It has "
                "no answers for metrics. Write the objects to disk, and name the paths."
            )
        if processes > 1 and self.needs_files:
            raise UsageError(
                f"{processes} processes were launched, and each would hand over objects of its own. Save the model, "
                "the tokenizer and the data, and give their paths."
            )

    def write(self, folder: Path, recipe: Recipe, display: Display, weights: bool = True) -> Recipe:
        """Write what a fresh process needs, and name it in the recipe.

        Args:
            folder: The run directory.
            recipe: Has placeholders where objects were given.
            display: Told what takes room on the disk.
            weights: Whether a fresh process loads the model; if not, its configuration is enough.

        Returns:
            The recipe with names of files.

        Raises:
            DataError: If a row cannot be written.
            UsageError: If there is no tokenizer.
        """
        data, model = {}, {}
        for part, rows in self.rows.items():
            path = folder / "data" / f"{part}.jsonl"
            write_rows(rows, path, part if part == "heldout" else "data")
            data[part] = str(path.absolute())
        if self.model is not None:
            model["name"] = self._place_of_model(folder, display, weights)
        if self.processor is not None:
            place = folder / "tokenizer"
            save_processor(self.processor, self.model, place)
            model["tokenizer"] = str(place.absolute())
        elif self.model is not None and recipe.model.tokenizer is None:
            original = getattr(self.model, "name_or_path", None) or ""
            if not original:
                raise UsageError(
                    "The model was not loaded from a folder that has its tokenizer; hand it over too: tokenizer=…, or "
                    "processor=… of a vision-language model."
                )
            if original != model["name"]:
                model["tokenizer"] = str(Path(original).absolute()) if Path(original).is_dir() else original
        return recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update=data),
                "model": recipe.model.model_copy(update=model),
            }
        )

    def _place_of_model(self, folder: Path, display: Display, weights: bool) -> str:
        """Return where a fresh process finds the model; it is saved if it is nowhere yet."""
        name = stored_name(self.model)
        if name is not None:
            return str(Path(name).absolute()) if Path(name).is_dir() else name
        place = folder / "base"
        if not weights:
            self.model.config.save_pretrained(place)
            return str(place.absolute())
        display.say(
            f"Saving the model to {place}: no folder holds these weights, and a proof has to load them."
        )
        self.model.save_pretrained(place)
        return str(place.absolute())

    def put_into(self, task: Task) -> None:
        """Let a task use the objects.

        Args:
            task: Freshly made.
        """
        if isinstance(task, LanguageTask):
            task.answer_metrics = dict(self.metrics)
            task.base_model.handed_over = self.model
