"""Checks of a recipe for pictures, before any weight is loaded: settings that would do nothing are refused or reported.

Each function takes the sections of the recipe that it reads, and ``warn``, which is told of what is unusual but works.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.errors import MissingPackageError, RecipeError
from moslora.tasks.image.crops import Size, has_one_crop

if TYPE_CHECKING:
    from moslora.recipe.schema import ImageDataSection, ImageTaskSection
    from moslora.tasks.image.families.family import Family
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
    faults += [
        f"task.{key} compares pictures with the photos of one subject, and data.subjects names more: leave one out."
        for key in ("dino_model", "clip_model")
        if data.subjects and getattr(task, key) is not None
    ]
    if task.negative_prompt is not None and task.guidance_scale is not None and task.guidance_scale <= 1:
        faults.append(
            f"task.negative_prompt does nothing at task.guidance_scale={task.guidance_scale:g}, which is no "
            "guidance; set one above 1."
        )
    if faults:
        raise RecipeError(faults)
    if trainer.get("max_steps", -1) > 0 and trainer.get("num_train_epochs", 1) != 1:
        warn(f"trainer.max_steps={trainer['max_steps']} decides; trainer.num_train_epochs is ignored.")


def check_family(
    task: ImageTaskSection, files: PipelineFiles, text_encoders: bool, warn: Warn = lambda text: None
) -> None:
    """Refuse settings that this kind of pipeline would ignore without a word.

    Args:
        task: The recipe's section.
        files: The pipeline.
        text_encoders: Whether the recipe wants text encoders to be adapted.
        warn: Told of a base that is not meant to be trained.

    Raises:
        RecipeError: Names the setting.
        MissingPackageError: If the pipeline's own parts need a package that is not installed.
    """
    family, name = files.family, files.source.name
    if family.is_flow:
        for key, value in (("snr_gamma", task.snr_gamma), ("noise_offset", task.noise_offset)):
            if value:
                raise RecipeError(f"task.{key} is for U-Nets; {family.title} is trained by flow matching.")
    denoiser = files.config(family.denoiser)
    if not family.takes_negative and task.negative_prompt is not None:
        raise RecipeError(f"task.negative_prompt: the pipeline of {family.title} takes none.")
    if task.guidance_scale is not None and _ignores_guidance(files, denoiser):
        raise RecipeError(f"task.guidance_scale: {name} is distilled to do without, and takes none.")
    guided = task.guidance_scale is not None and task.guidance_scale > 1
    if family.guidance == "true_cfg_scale" and guided and task.negative_prompt is None:
        raise RecipeError(
            f"task.guidance_scale: {family.title} is guided away from a negative prompt, and without one it takes "
            "no guidance. Set task.negative_prompt too, for example to ' '."
        )
    if text_encoders and not family.clips:
        raise RecipeError(
            f"scopes.text_encoders=adapter: {family.title} reads prompts with a language model, of which diffusers' "
            "pipeline loads no LoRA. Leave it frozen."
        )
    if files.index.get("is_distilled"):
        warn(
            f"{name} is distilled to a few steps, which training undoes little by little. Train its base model, and "
            "use the LoRA with this one."
        )
    reader = files.index.get("tokenizer")
    if reader and reader[1] == "PixtralProcessor" and importlib.util.find_spec("torchvision") is None:
        raise MissingPackageError(
            f"{name} reads prompts with transformers' PixtralProcessor, which needs torchvision. Run: pip install "
            "torchvision"
        )
    if denoiser.get("time_cond_proj_dim") and task.negative_prompt is not None:
        raise RecipeError(f"task.negative_prompt: {name} is distilled and takes none.")
    if family.long_text is None and task.max_sequence_length is not None:
        raise RecipeError(
            f"task.max_sequence_length is for T5 and language models, and {family.title} has none."
        )


def _ignores_guidance(files: PipelineFiles, denoiser: Mapping[str, Any]) -> bool:
    """Tell whether the pipeline would draw the same whatever its guidance is."""
    if files.kind == "FluxPipeline":
        return not denoiser.get("guidance_embeds")
    return bool(files.index.get("is_distilled"))


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


def warn_of_sizes(
    pictures: Sequence[Picture], size_of: Callable[[Picture], Size], crop: str, warn: Warn
) -> None:
    """Report pictures that are enlarged, and random crops of pictures that have one crop only.

    Args:
        pictures: Training pictures.
        size_of: The size of a picture's crops.
        crop: ``"center"`` or ``"random"``.
        warn: Told of it.
    """
    small = [
        picture.path.name
        for picture in pictures
        for size in [size_of(picture)]
        for wide, high in [(size, size) if isinstance(size, int) else size]
        if picture.width < wide or picture.height < high
    ]
    if small:
        warn(
            f"{len(small)} pictures are smaller than data.resolution asks for and are enlarged, as {small[0]}."
        )
    if crop == "random" and all(has_one_crop(p, size_of(p)) for p in pictures):
        warn("data.crop=random does nothing: every picture is a square, or of its bucket's shape, and whole.")


def warn_of_cut_prompts(
    pipeline: Any, family: Family, prompts: Iterable[str], tokens: int | None, warn: Warn
) -> None:
    """Report prompts that a text encoder does not read to their end.

    Args:
        pipeline: With its tokenizers.
        family: Its kind.
        prompts: All that are trained on or drawn; each is reported once.
        tokens: How many tokens the longest text encoder reads; None is the pipeline's default.
        warn: Told of it.
    """
    long_text = family.long_text
    for prompt in dict.fromkeys(prompts):
        if family.clips:
            limit = pipeline.tokenizer.model_max_length
            length = len(pipeline.tokenizer(prompt).input_ids)
            if length > limit:
                warn(f"“{prompt[:60]}…” has {length} tokens; CLIP reads the first {limit} and no more.")
        if long_text is not None and (long_text.count(pipeline, prompt) or 0) > (tokens or long_text.limit):
            warn(
                f"“{prompt[:60]}…” has more than {tokens or long_text.limit} {long_text.reader} tokens, and "
                f"{long_text.reader} reads no further; see task.max_sequence_length."
            )
