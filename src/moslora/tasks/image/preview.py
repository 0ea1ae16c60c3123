"""What a run shows before it starts: the model, the pictures, and how many pictures it will draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moslora.errors import RecipeError

if TYPE_CHECKING:
    from moslora.recipe.schema import ImageDataSection
    from moslora.tasks.image.crops import Crop, Size
    from moslora.tasks.image.folders import Folder, Picture
    from moslora.tasks.image.pipeline import PipelineFiles
    from moslora.tasks.image.prior import ClassPictures

__all__ = ["tell_drawn_pictures", "tell_model", "tell_pictures", "tell_prior"]


def tell_model(files: PipelineFiles, parameters: int, adapted: int, text_encoders: bool) -> str:
    """Say what is trained.

    Args:
        files: The pipeline.
        parameters: Of its denoiser.
        adapted: How many of the denoiser's modules are adapted.
        text_encoders: Whether its text encoders are adapted, too.
    """
    family = files.family
    also = f", and its text encoders ({', '.join(family.clips)})." if text_encoders else "."
    return (
        f"{files.source.name}: {family.title}, its {family.denoiser} has {parameters:,} parameters; {adapted} of its "
        f"modules are adapted{also}"
    )


def tell_pictures(
    train: Folder,
    heldout: Folder | None,
    data: ImageDataSection,
    resolution: int,
    crops: Callable[[Picture], Sequence[Crop]],
    size_of: Callable[[Picture], Size],
) -> list[str]:
    """Say what is trained on, with one example.

    Args:
        train: Training pictures.
        heldout: Held-out pictures, if there are any.
        data: The recipe's section.
        resolution: Side of the crops in pixels.
        crops: Of a picture.
        size_of: The size of its crops.
    """
    held = f", held out: {len(heldout.pictures)}" if heldout else ""
    count = sum(len(crops(picture)) for picture in train.pictures)
    first = train.pictures[0]
    corner = crops(first)[0]
    sizes = Counter(_sides(size_of(picture)) for picture in train.pictures)
    if data.buckets:
        listed = ", ".join(f"{wide} × {high} ({n})" for (wide, high), n in sizes.most_common(5))
        more = f", and {len(sizes) - 5} more" if len(sizes) > 5 else ""
        shapes = f"crops of {len(sizes)} sizes: {listed}{more}"
    else:
        shapes = f"squares of {resolution} × {resolution} pixels"
    lines = [
        f"Pictures: {len(train.pictures)}{held}. They become {count} {shapes} "
        f"({data.crop} crop{', also mirrored' if data.flip else ''}).",
        f"One example: {first.path.name}, {first.width} × {first.height}, from {corner.left}, {corner.top}: "
        f"“{first.prompt}”",
    ]
    if data.caption_dropout:
        lines.append(f"{data.caption_dropout:.0%} of the training examples are learned without their words.")
    if heldout is None:
        lines.append(
            "data.heldout is not set, so the loss is measured on the training pictures, with other noise."
        )
    return lines


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def tell_prior(pictures: ClassPictures, weight: float) -> str:
    """Say what prior preservation uses.

    Args:
        pictures: The class's.
        weight: Of their loss.
    """
    made = f"{len(pictures.missing)} will be generated" if pictures.missing else "none will be generated"
    return (
        f"Prior preservation: {pictures.count} pictures of “{pictures.prompt}” in {pictures.folder}; {made}. Their "
        f"loss counts {weight:g} times."
    )


def tell_drawn_pictures(prompts: int, count: int, every: int | None, steps: int) -> str:
    """Say how many pictures will be drawn, as each takes as long as many training steps.

    Args:
        prompts: How many prompts there are.
        count: Pictures of each prompt.
        every: Pictures are also drawn after each so many steps; None for not.
        steps: Of the whole training.

    Raises:
        RecipeError: If training has no more than ``every`` steps.
    """
    if not prompts:
        return "task.prompts is empty, so no pictures will be shown side by side."
    each = prompts * count
    text = f"{each} pictures of {prompts} prompts are made before training and after it"
    if every is None:
        return f"{text}."
    between = range(every, steps, every)
    if not between:
        raise RecipeError(
            f"task.pictures_every={every}, but training has {steps} steps, after the last of which pictures are made "
            "anyway; set a smaller number, or null."
        )
    return f"{text}, and {each} more after each {every} steps: {(2 + len(between)) * each} in all."
