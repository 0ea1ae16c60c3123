"""In which order pictures are learned, and in how many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moslora.tasks.image.randomness import seed_of

__all__ = ["TrainingOrder", "planned_steps", "step_count"]


def planned_steps(arguments: Mapping[str, Any], pictures: int, processes: int = 1) -> int:
    """Return how many optimizer steps a run will take.

    Args:
        arguments: Of the trainer, from ``resolve_trainer_arguments``.
        pictures: Training pictures.
        processes: How many train together.
    """
    if arguments.get("max_steps", -1) > 0:
        return int(arguments["max_steps"])
    rows = arguments["per_device_train_batch_size"] * arguments.get("gradient_accumulation_steps", 1)
    return step_count(pictures, arguments["num_train_epochs"], rows * processes)


def step_count(pictures: int, epochs: float, at_once: int) -> int:
    """Return how many optimizer steps some epochs take.

    Args:
        pictures: Training pictures; an epoch sees each once.
        epochs: How many, also a fraction.
        at_once: Pictures of one optimizer step, of all processes together.
    """
    return max(1, round(pictures * epochs / at_once))


class TrainingOrder:
    """A data set for transformers' Trainer: every picture once in random order, then again in another, to the end.

    Item ``k`` is the picture's number and the seed of its noise; both follow from ``k`` and the seed, so that an
    interrupted run continues with the same examples.

    Args:
        pictures: How many there are.
        length: How many items the whole run takes.
        seed: Of order and noise.
    """

    def __init__(self, pictures: int, length: int, seed: int) -> None:
        self.pictures, self.length, self.seed = pictures, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: int) -> dict[str, int]:
        import torch

        epoch, place = divmod(at, self.pictures)
        generator = torch.Generator().manual_seed(seed_of("order", self.seed, epoch))
        picture = int(torch.randperm(self.pictures, generator=generator)[place])
        return {"picture": picture, "seed": seed_of("train", self.seed, at)}
