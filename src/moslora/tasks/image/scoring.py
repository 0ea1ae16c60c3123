"""Scores of a model: its denoising loss on fixed noise, and the fidelity of its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moslora.data.pictures import open_image
from moslora.tasks.image.fidelity import SCORES, ScoreModel, about, judge_pictures, open_made
from moslora.tasks.image.randomness import seed_of

if TYPE_CHECKING:
    from moslora.tasks.image.denoising import Denoising, Draw
    from moslora.tasks.image.folders import Picture
    from moslora.tasks.task import Shown

__all__ = ["measure_fidelity", "measure_loss", "measure_losses"]

LATENT_BATCH = 4  # draws whose loss is measured at once


def measure_loss(
    model: Denoising,
    examples: Sequence[int],
    count: int,
    seed: int,
    advance: Callable[[float], None] = lambda mean: None,
) -> float:
    """Measure the mean denoising loss, with the same noise at every call.

    Args:
        model: In evaluation mode.
        examples: Which of its examples.
        count: Draws of each example, at timesteps from all parts of the schedule.
        seed: Of the noise.
        advance: Called after each example, with the mean so far.
    """
    losses: list[float] = []
    for index in examples:
        losses += measure_losses(model, index, count, seed)
        advance(sum(losses) / len(losses))
    return sum(losses) / len(losses)


def measure_losses(model: Denoising, index: int, count: int, seed: int) -> list[float]:
    """Return the losses of one example's draws, with the same noise at every call.

    Args:
        model: In evaluation mode.
        index: Which of its examples.
        count: How many draws, at timesteps from all parts of the schedule.
        seed: Of the noise.
    """
    import torch

    draws = _fixed_draws(model, index, count, seed)
    losses: list[float] = []
    with torch.no_grad():
        for start in range(0, len(draws), LATENT_BATCH):
            losses += model.losses(draws[start : start + LATENT_BATCH]).tolist()
    return losses


def _fixed_draws(model: Denoising, index: int, count: int, seed: int) -> list[Draw]:
    """Return draws of an example that depend on their number and the seed alone."""
    import torch

    return [
        model.draw(
            model.examples[index],
            torch.Generator().manual_seed(seed_of("measure", seed, index, k)),
            (k, count),
        )
        for k in range(count)
    ]


def measure_fidelity(
    judges: Sequence[ScoreModel],
    shown: Sequence[Shown],
    photos: Sequence[Picture],
    max_pixels: int,
    device: str,
    token: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
    checkpoint: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score pictures with the models that the recipe names.

    Args:
        judges: The models.
        shown: Pictures that were just drawn.
        photos: The pictures that were trained on.
        max_pixels: The most pixels that a photo may have.
        device: Where the judges run.
        token: Names the subject in prompts; pictures of prompts without it are not compared with photos.
        warn: Told of prompts that CLIP does not read to their end.
        checkpoint: Called after each picture of each judge.

    Returns:
        By the score's name, ready for JSON: its model and what ``summarize`` gives. Under ``absent``, why a score is
        not there, by its name.
    """
    keys = {judge.key for judge in judges}
    absent = {
        name: f"task.{score.key} names no model" for name, score in SCORES.items() if score.key not in keys
    }
    scores: dict[str, Any] = {"absent": absent}
    if not judges:
        return scores
    made = open_made(shown)
    real = [(photo.path.name, open_image(photo.path, max_pixels)) for photo in photos]
    for judge in judges:
        judged = judge_pictures(
            judge, device, made, real, lambda prompt: about(prompt, token), warn, checkpoint
        )
        for name, score in judged.items():
            if score:
                count = score["pairs"] // max(1, len(score["real"]))
                model = {"model": judge.source.name, "title": judge.title}
                scores[name] = {**model, "pictures": count, **score}
            else:
                absent[name] = f"no prompt names the subject, data.token={token}"
    return scores
