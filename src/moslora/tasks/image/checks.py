"""Checks of a recipe for pictures, before any weight is loaded: settings that would do nothing are refused or reported.

Each function takes the sections of the recipe that it reads, and ``warn``, which is told of what is unusual but works.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.errors import MissingPackageError, RecipeError
from moslora.tasks.image.crops import is_square

if TYPE_CHECKING:
    from moslora.recipe.schema import ImageDataSection, ImageTaskSection
    from moslora.tasks.image.families import Family
    from moslora.tasks.image.folders import Folder, Picture
    from moslora.tasks.image.pipeline import PipelineFiles

__all__ = [
    "check_family",
    "check_idle_keys",
    "check_packages",
    "check_prior",
    "warn_of_cut_prompts",
    "warn_of_idle_words",
    "warn_of_overlap",
    "warn_of_sizes",
]

Warn = Callable[[str], None]


def check_packages() -> None:
    """Refuse to start without the packages that pictures need.

    Raises:
        MissingPackageError: If one is not installed.
    """
    for package in ("diffusers", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"task=image needs {package}. Run: pip install 'moslora[image]'")


def check_prior(data: ImageDataSection) -> None:
    """Refuse half of the settings of prior preservation.

    Args:
        data: The recipe's section.

    Raises:
        RecipeError: If one key is set without the other.
    """
    if (data.class_images is None) != (data.class_prompt is None):
        raise RecipeError(
            "Prior preservation needs both data.class_images, a folder, and data.class_prompt; set both or none."
        )


def check_idle_keys(
    task: ImageTaskSection,
    data: ImageDataSection,
    trainer: Mapping[str, Any],
    prompts: Sequence[str],
    warn: Warn,
) -> None:
    """Refuse settings that would do nothing beside the others, as whoever made them expects something of them.

    Args:
        task: The recipe's section.
        data: The recipe's section.
        trainer: The recipe's section, as written.
        prompts: Of the pictures that are made.
        warn: Told of settings without effect that do no harm.

    Raises:
        RecipeError: Names all of them.
    """
    defaults = {name: field.default for name, field in type(task).model_fields.items()}
    data_defaults = {name: field.default for name, field in type(data).model_fields.items()}
    faults = []
    if data.class_images is None:
        if task.prior_weight != 1.0:
            faults.append(
                "task.prior_weight weighs the class's pictures; set data.class_prompt and .class_images."
            )
        if data.class_count != data_defaults["class_count"]:
            faults.append(
                "data.class_count counts the class's pictures; set data.class_prompt and .class_images."
            )
    if data.crop == "center" and data.crops != data_defaults["crops"]:
        faults.append(
            f"data.crops={data.crops} counts random squares, and with data.crop=center there is one; set "
            "data.crop=random."
        )
    if not prompts:
        faults += [
            f"task.{key} is about pictures of prompts, and there are none: set task.prompts, "
            "task.published_prompts or task.prompts_file."
            for key in ("pictures_every", "dino_model", "clip_model")
            if getattr(task, key) is not None
        ]
        drawing = (
            ("inference_steps", "guidance_scale", "negative_prompt") if data.class_images is None else ()
        )
        idle = [key for key in ("pictures_per_prompt", *drawing) if getattr(task, key) != defaults[key]]
        if idle:
            warn(f"task.{', .'.join(idle)}: no pictures will be made, as there are no prompts.")
    if task.negative_prompt is not None and task.guidance_scale is not None and task.guidance_scale <= 1:
        faults.append(
            f"task.negative_prompt does nothing at task.guidance_scale={task.guidance_scale:g}, which is no "
            "guidance; set one above 1."
        )
    if faults:
        raise RecipeError(faults)
    if trainer.get("max_steps", -1) > 0 and trainer.get("num_train_epochs", 1) != 1:
        warn(f"trainer.max_steps={trainer['max_steps']} decides; trainer.num_train_epochs is ignored.")


def check_family(task: ImageTaskSection, files: PipelineFiles) -> None:
    """Refuse settings that this kind of pipeline would ignore without a word.

    Args:
        task: The recipe's section.
        files: The pipeline.

    Raises:
        RecipeError: Names the setting.
    """
    family, name = files.family, files.source.name
    if family.is_flow:
        for key, value in (("snr_gamma", task.snr_gamma), ("noise_offset", task.noise_offset)):
            if value:
                raise RecipeError(f"task.{key} is for U-Nets; {family.title} is trained by flow matching.")
    denoiser = files.config(family.denoiser)
    if family.title == "FLUX":
        if task.negative_prompt is not None:
            raise RecipeError("task.negative_prompt: FLUX is distilled and takes none.")
        if task.guidance_scale is not None and not denoiser.get("guidance_embeds"):
            raise RecipeError(f"task.guidance_scale: {name} is distilled to do without, and takes none.")
    if denoiser.get("time_cond_proj_dim") and task.negative_prompt is not None:
        raise RecipeError(f"task.negative_prompt: {name} is distilled and takes none.")
    if family.t5 is None and task.max_sequence_length is not None:
        raise RecipeError(f"task.max_sequence_length is T5's, and {family.title} has none.")


def warn_of_idle_words(
    data: ImageDataSection, used: Collection[str], token_is_scored: bool, warn: Warn
) -> None:
    """Report a token or class that no prompt or caption has a place for.

    Args:
        data: The recipe's section.
        used: Which of ``"token"`` and ``"class_name"`` had a place.
        token_is_scored: Whether fidelity looks for the token in prompts, so that it has a use without a place.
        warn: Told of it.
    """
    for name in ("token", "class_name"):
        value = getattr(data, name)
        if value is not None and name not in used and not (name == "token" and token_is_scored):
            warn(f"data.{name}={value} fills no place: no prompt or caption has {{}} or {{{name}}} for it.")


def warn_of_overlap(train: Folder, heldout: Folder | None, warn: Warn) -> None:
    """Report held-out pictures that are also trained on.

    Args:
        train: Training pictures.
        heldout: Held-out pictures, if there are any.
        warn: Told of it.
    """
    if heldout is None:
        return
    trained = {p.sha256 for p in train.pictures}
    both = sum(p.sha256 in trained for p in heldout.pictures)
    if both:
        warn(
            f"{both} of {len(heldout.pictures)} held-out pictures are also trained on, so the held-out loss is too "
            "good. Take them out of one of the two folders."
        )


def warn_of_sizes(pictures: Sequence[Picture], resolution: int, crop: str, warn: Warn) -> None:
    """Report pictures that are enlarged, and random crops of pictures that have one crop only.

    Args:
        pictures: Training pictures.
        resolution: Side of the crops in pixels.
        crop: ``"center"`` or ``"random"``.
        warn: Told of it.
    """
    small = [p.path.name for p in pictures if min(p.width, p.height) < resolution]
    if small:
        warn(
            f"{len(small)} pictures are smaller than data.resolution={resolution} and are enlarged, as {small[0]}."
        )
    if crop == "random" and all(is_square(p, resolution) for p in pictures):
        warn("data.crop=random does nothing: every picture is a square, and is learned whole.")


def warn_of_cut_prompts(
    pipeline: Any, family: Family, prompts: Iterable[str], tokens: int | None, warn: Warn
) -> None:
    """Report prompts that a text encoder does not read to their end.

    Args:
        pipeline: With its tokenizers.
        family: Its kind.
        prompts: All that are trained on or drawn; each is reported once.
        tokens: How many tokens T5 reads; None is the pipeline's default.
        warn: Told of it.
    """
    limit = pipeline.tokenizer.model_max_length
    t5_name, t5_default = family.t5 or ("", 0)
    t5_limit = tokens or t5_default
    t5 = getattr(pipeline, t5_name, None) if t5_name else None
    for prompt in dict.fromkeys(prompts):
        length = len(pipeline.tokenizer(prompt).input_ids)
        if length > limit:
            warn(f"“{prompt[:60]}…” has {length} tokens; CLIP reads the first {limit} and no more.")
        if t5 is not None and len(t5(prompt).input_ids) > t5_limit:
            warn(
                f"“{prompt[:60]}…” has more than {t5_limit} T5 tokens, and T5 reads no further; see "
                "task.max_sequence_length."
            )
