"""What ``compare`` asks of the task: which pictures rates are chosen on, and the loss of each picture."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.errors import DataError, UsageError
from moslora.tasks.image.scoring import measure_losses
from moslora.tasks.task import Task

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from moslora.recipe.schema import ImageRecipe
    from moslora.tasks.image.denoising import Denoising
    from moslora.tasks.image.folders import Folder, Picture

__all__ = ["ComparedTask", "aside"]


class ComparedTask(Task):
    """The part of the task that a comparison of methods talks to; examples are numbers of the model's.

    Attributes:
        validation_pictures: Those that rates are chosen on, taken out of the training pictures.
        adapter_settings: The recipe's ``adapter`` section, with the modules that are adapted.
        noise_seed: Of the noise that losses are measured on: one for all cells, whose own seeds differ.
    """

    recipe: ImageRecipe
    train_folder: Folder
    heldout_folder: Folder | None
    prompts: list[str]
    model: Denoising
    validation_pictures: tuple[Picture, ...] = ()
    noise_seed: int

    also: Sequence[Any] = ()  # what a comparison of language models measures beside its data
    asked: Sequence[Any] = ()

    @property
    def train_set(self) -> range:
        """Numbers of the examples that are trained on."""
        return range(len(self.train_folder.pictures))

    @property
    def validation_set(self) -> range:
        """Numbers of the examples that learning rates are chosen on."""
        trained = len(self.train_folder.pictures)
        return range(trained, trained + len(self.validation_pictures))

    @property
    def heldout_set(self) -> range:
        """Numbers of the examples that methods are judged on."""
        start = self.validation_set.stop
        return range(start, start + (len(self.heldout_folder.pictures) if self.heldout_folder else 0))

    def check_method(self, name: str, adapter: PeftConfig | None) -> None:
        """Refuse a method that is no adapter, and text encoders that would have another."""
        _check_scopes(self.recipe)
        if adapter is None:
            raise UsageError(f"task=image trains adapters, and {name} is none. Choose other --methods.")

    def set_aside(self, count: int, heldout: int | None) -> int:
        """Take pictures out of the training data to choose a learning rate by; call it before ``prepare``.

        Args:
            count: About how many; at most a quarter of the training pictures.
            heldout: How many held-out pictures to use, the first by name; None for all.

        Returns:
            How many were set aside.
        """
        self.noise_seed = (
            self.recipe.seed
        )  # each cell has a seed of its own, and all are measured on one noise
        self.prompts = []
        self.train_folder, self.validation_pictures = aside(self.train_folder, count, self.recipe.seed)
        if heldout is not None and self.heldout_folder is not None:
            few = self.heldout_folder.pictures[:heldout]
            self.heldout_folder = dataclasses.replace(self.heldout_folder, pictures=few)
        return len(self.validation_pictures)

    @property
    def adapter_settings(self) -> dict[str, Any]:
        """The recipe's ``adapter`` section, with the modules that are adapted."""
        raise NotImplementedError

    def adapter_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the adapter's arguments: the recipe's, with the family's targets."""
        return self.adapter_settings

    def completed(self, config: PeftConfig | None, model: nn.Module) -> PeftConfig | None:
        """Return a method's configuration as a model of diffusers takes it."""
        settings: Any = config
        if settings is not None:
            settings.task_type = None  # of language models
        return config

    def score(self, model: nn.Module, examples: Sequence[int], label: str) -> list[float]:
        """Return each picture's denoising loss, in the order of ``examples``."""
        self.model.eval()
        found = []
        with self.display.progress(f"Loss, {label}", len(examples)) as progress:
            for index in examples:
                losses = measure_losses(self.model, index, self.recipe.task.loss_draws, self.noise_seed)
                found.append(sum(losses) / len(losses))
                progress.advance(1)
                self.raise_if_stopped()
        return found


def aside(folder: Folder, count: int, seed: int) -> tuple[Folder, tuple[Picture, ...]]:
    """Take pictures out of those that are trained on, to choose a learning rate by.

    Args:
        folder: The training pictures.
        count: About how many; at most a quarter of them, and at least one.
        seed: Which ones depends on it and on their content alone.

    Returns:
        The others, and those that were taken out.

    Raises:
        DataError: If there are fewer than two.
    """
    pictures = folder.pictures
    if len(pictures) < 2:
        raise DataError(
            "data.train",
            ["it has one picture"],
            "A comparison chooses learning rates on pictures that it takes out of these; give at least 2.",
        )
    wanted = max(1, min(count, len(pictures) // 4))
    order = sorted(pictures, key=lambda picture: (picture.sha256, picture.prompt))
    chosen = {id(picture) for picture in random.Random(seed).sample(order, wanted)}
    rest = tuple(picture for picture in pictures if id(picture) not in chosen)
    taken = tuple(picture for picture in pictures if id(picture) in chosen)
    return dataclasses.replace(folder, pictures=rest), taken


def _check_scopes(recipe: ImageRecipe) -> None:
    """Refuse what methods cannot be compared on.

    Args:
        recipe: Of the task.

    Raises:
        UsageError: Names it.
    """
    if recipe.scopes.text_encoders == "adapter":
        raise UsageError(
            "scopes.text_encoders=adapter cannot be compared: methods are put into the denoiser alone. Leave it out."
        )
    if recipe.data.heldout is None:
        raise UsageError(
            "A comparison of task=image judges methods on pictures that none has learned: set data.heldout, a folder."
        )
