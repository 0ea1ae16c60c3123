"""Fidelity as DreamBooth measures it (arXiv:2208.12242): is it this subject, and is it what the prompt says?

    DINO-I   mean cosine of the class tokens that DINO ViT-S/16 gives a generated and a real picture, over all pairs
    CLIP-I   the same of the embeddings that CLIP ViT-B/32 gives them
    CLIP-T   mean cosine of CLIP's embeddings of a generated picture and of its prompt

The user names the models. A score is computed by the model that it is named after, or not at all. Pictures go through
the model one by one and sums are exact, so a score depends neither on their order nor on the batch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.errors import ModelError
from moslora.metrics.intervals import mean_interval
from moslora.models.fingerprint import fingerprint
from moslora.models.loading import call_loader, check_loaded
from moslora.models.names import HUB_ID, ModelSource, not_found_message, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from moslora.tasks.task import Shown

__all__ = ["SCORES", "ScoreModel", "about", "find_judge", "judge_pictures", "paired_change", "summarize"]


@dataclass(frozen=True)
class Score:
    """A score of the field.

    Attributes:
        key: Of the recipe's ``task`` section, that names its model.
        model: Model type in transformers.
        published: The model that the paper used.
    """

    key: str
    model: str
    published: str


SCORES = {
    "DINO-I": Score("dino_model", "vit", "ViT-S/16"),
    "CLIP-I": Score("clip_model", "clip", "ViT-B/32"),
    "CLIP-T": Score("clip_model", "clip", "ViT-B/32"),
}

# What each key should name; for messages.
WANTED = {
    "clip_model": "a CLIPModel of transformers, picture and text encoder together, as openai/clip-vit-base-patch32",
    "dino_model": "a ViT trained by DINO, as facebook/dino-vits16",
}
CLASSES = {"clip_model": "CLIPModel", "dino_model": "ViTModel"}
WIDTHS = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H"}
PREPARATIONS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class ScoreModel:
    """A model that scores are computed with.

    Attributes:
        key: The recipe's, as ``clip_model``.
        source: Where it is.
        title: What it is, as ``ViT-B/32``.
    """

    key: str
    source: ModelSource
    title: str

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the model: the hub's commit, or hashes of its files."""
        return fingerprint(self.source)


def find_judge(key: str, name: str) -> ScoreModel:
    """Find a model by its name, and check that the score is named after it. Reads no weights.

    Args:
        key: ``"clip_model"`` or ``"dino_model"``.
        name: A folder, or a hub id ``org/name`` or ``org/name@revision``.

    Returns:
        The model.

    Raises:
        ModelError: If it does not exist, or is of another kind.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for a user that does not exist
    bare, _, revision = name.partition("@")
    if path.is_dir():
        source = ModelSource(name, "folder", str(path.absolute()))
        folder = path
        if not (path / "config.json").is_file():
            raise ModelError(f"task.{key}: {path} has no config.json. Name {WANTED[key]}.")
        if not any((path / file).is_file() for file in PREPARATIONS):
            raise ModelError(
                f"task.{key}: {path} has no {PREPARATIONS[0]}, which says how pictures are prepared for the "
                "model. Put the model's own beside its config.json."
            )
        config = read_json(folder / "config.json")
    elif HUB_ID.fullmatch(bare):
        source = ModelSource(name, "hub", bare, revision=revision or None)
        config = _hub_config(source)
    else:
        raise ModelError(f"task.{key}: {not_found_message(name, path)}")
    _check_kind(key, name, config)
    vision = config.get("vision_config") or {} if key == "clip_model" else config
    # A field that is the class's default may be left out of the file.
    width, patch = vision.get("hidden_size", 768), vision.get("patch_size", 32 if key == "clip_model" else 16)
    known = WIDTHS.get(width)
    title = f"ViT-{known}/{patch}" if known else f"ViT of width {width} on patches of {patch}"
    return ScoreModel(key, source, title)


def _hub_config(source: ModelSource) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    def load(path: str, **options: Any) -> dict[str, Any]:
        return read_json(Path(hf_hub_download(path, "config.json", **options)))

    found: dict[str, Any] = call_loader(
        source, load, {"revision": source.revision} if source.revision else {}
    )
    return found


def _check_kind(key: str, name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    classes = config.get("architectures") or []
    wanted = next(score.model for score in SCORES.values() if score.key == key)
    also = {
        "dinov2": " DINOv2 is another model, whose cosines are not DINO-I's.",
        "dinov3_vit": " DINOv3 is another model, whose cosines are not DINO-I's.",
        "siglip": " SigLIP's cosines are not CLIP's.",
        "clip_text_model": " It is CLIP's text half alone.",
        "clip_vision_model": " It is CLIP's picture half alone.",
    }.get(str(kind), "")
    if kind != wanted:
        raise ModelError(
            f"task.{key}={name} is of model_type {kind!r}, not {wanted!r}, and its scores would not be what they are "
            f"called.{also} Name {WANTED[key]}, or leave task.{key} out."
        )
    if classes and CLASSES[key] not in classes:
        raise ModelError(
            f"task.{key}={name} is a {', '.join(classes)}, not a {CLASSES[key]}, and its scores would not be what they "
            f"are called. Name {WANTED[key]}, or leave task.{key} out."
        )


@dataclass(frozen=True)
class _Loaded:
    """A loaded judge. Its vectors are of unit length, on the CPU, float64, ``(size,)``.

    Attributes:
        picture: Returns the vector of a PIL image.
        words: Returns the vector of a text; None for DINO.
        longest: How many tokens of a text CLIP reads.
        count: Returns how many tokens a text has.
    """

    picture: Callable[[Any], Tensor]
    words: Callable[[str], Tensor] | None = None
    longest: int | None = None
    count: Callable[[str], int] | None = None


def _load(judge: ScoreModel, device: str) -> _Loaded:
    import torch
    import transformers

    kind = getattr(transformers, CLASSES[judge.key])
    options: dict[str, Any] = {"revision": judge.source.revision} if judge.source.revision else {}
    unpooled = {"add_pooling_layer": False} if judge.key == "dino_model" else {}
    weights = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        model, info = call_loader(judge.source, kind.from_pretrained, {**options, **unpooled, **weights})
    except ModelError as error:
        if "safetensors" not in str(error):
            raise
        raise ModelError(
            f"{error} Only safetensors are supported. Convert other weights to a folder: "
            f"{kind.__name__}.from_pretrained(…).save_pretrained(FOLDER), with its preprocessor and tokenizer."
        ) from error
    pooler = [key for key in info.get("unexpected_keys") or () if "pooler" in key]
    if judge.key == "dino_model" and pooler:
        raise ModelError(
            f"task.dino_model={judge.source.name} is a ViT, but not one of DINO's, which have no pooler ({pooler[0]} "
            f"is one); a ViT trained on labels has. Name {WANTED['dino_model']}, or leave it out."
        )
    check_loaded(judge.source, info)
    model = model.to(device).eval()
    # Always the PIL version, so that a score does not depend on whether torchvision is installed.
    name = "CLIPImageProcessor" if judge.key == "clip_model" else "ViTImageProcessor"
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    prepare = call_loader(judge.source, processor.from_pretrained, options)

    def unit(batch: Tensor) -> Tensor:
        vector: Tensor = batch[0].double().cpu()
        if not vector.isfinite().all() or not vector.any():
            raise ModelError(f"{judge.source.name} returned a vector that is zero or not finite.")
        return vector.div(vector.norm())  # (size,)

    def pixels(image: Any) -> Tensor:
        values: Tensor = prepare(images=image, return_tensors="pt")["pixel_values"]
        return values.to(device)  # (1, 3, height, width)

    @torch.inference_mode()
    def class_token(image: Any) -> Tensor:
        return unit(model(pixel_values=pixels(image)).last_hidden_state[:, 0])

    @torch.inference_mode()
    def embed_picture(image: Any) -> Tensor:
        return unit(model.visual_projection(model.vision_model(pixel_values=pixels(image)).pooler_output))

    if judge.key == "dino_model":
        return _Loaded(class_token)
    tokenizer = call_loader(judge.source, transformers.AutoTokenizer.from_pretrained, options)
    longest = int(model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def embed_text(text: str) -> Tensor:
        inputs = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(device)
        pooled = model.text_model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).pooler_output
        return unit(model.text_projection(pooled))

    return _Loaded(embed_picture, embed_text, longest, lambda text: len(tokenizer(text).input_ids))


def judge_pictures(
    judge: ScoreModel,
    device: str,
    made: Sequence[tuple[str, Any]],
    real: Sequence[tuple[str, Any]],
    about_subject: Callable[[str], bool] = lambda prompt: True,
    warn: Callable[[str], None] = lambda text: None,
    checkpoint: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Compute the scores of one model.

    Args:
        judge: The model.
        device: Where it runs.
        made: Prompt and PIL image of every generated picture.
        real: Name and PIL image of every real one.
        about_subject: Whether a prompt is about the subject; pictures of others are not compared with real ones.
        warn: Told of prompts that CLIP does not read to their end.
        checkpoint: Called after each picture.

    Returns:
        The result of ``summarize`` by the score's name.
    """
    loaded = _load(judge, device)
    originals = [(name, loaded.picture(image)) for name, image in real]
    subject: list[tuple[str, str, float]] = []
    text: list[tuple[str, str, float]] = []
    words: dict[str, Tensor] = {}
    for prompt, image in made:
        seen = loaded.picture(image)
        if about_subject(prompt):
            subject += [(prompt, name, float(seen @ other)) for name, other in originals]
        if loaded.words is not None:
            if prompt not in words:
                words[prompt] = loaded.words(prompt)
                assert loaded.count is not None and loaded.longest is not None
                if loaded.count(prompt) > loaded.longest:
                    warn(f"CLIP-T: “{prompt[:60]}…” is cut: CLIP reads the first {loaded.longest} tokens.")
            text.append((prompt, "", float(seen @ words[prompt])))
        checkpoint()
    if loaded.words is None:
        return {"DINO-I": summarize(subject)}
    return {"CLIP-I": summarize(subject), "CLIP-T": summarize(text)}


def summarize(cosines: Sequence[tuple[str, str, float]]) -> dict[str, Any]:
    """Summarise cosines of pictures.

    Args:
        cosines: Prompt, real picture (empty for words) and cosine, one per pair.

    Returns:
        ``mean``; ``interval``, Student's 95 % interval over the prompts' means, None with one prompt; ``prompts`` and
        ``real``, means by prompt and by real picture; ``pairs``, their number. Empty if there is no pair.
    """
    if not cosines:
        return {}
    by_prompt: dict[str, list[float]] = {}
    by_real: dict[str, list[float]] = {}
    for prompt, name, value in cosines:
        by_prompt.setdefault(prompt, []).append(value)
        if name:
            by_real.setdefault(name, []).append(value)
    prompts = {prompt: _mean(values) for prompt, values in by_prompt.items()}
    interval = list(mean_interval(sorted(prompts.values()))) if len(prompts) > 1 else None
    return {
        "mean": _mean([value for _, _, value in cosines]),
        "interval": interval,
        "pairs": len(cosines),
        "prompts": [{"prompt": prompt, "mean": mean} for prompt, mean in prompts.items()],
        "real": [{"picture": name, "mean": _mean(values)} for name, values in by_real.items()],
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)  # exact before it is divided, so the order does not matter


def paired_change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a score changed on the same prompts and seeds.

    Args:
        before, after: From ``summarize``.

    Returns:
        ``mean`` of the prompts' differences, its 95 % ``interval`` (None with one prompt) and the number of
        ``prompts``. Empty if one of the two is.
    """
    one, two = ({row["prompt"]: row["mean"] for row in score.get("prompts", ())} for score in (before, after))
    differences = [two[prompt] - one[prompt] for prompt in one if prompt in two]
    if not differences:
        return {}
    interval = list(mean_interval(sorted(differences))) if len(differences) > 1 else None
    return {"mean": _mean(differences), "interval": interval, "prompts": len(differences)}


def about(prompt: str, token: str | None) -> bool:
    """Return whether a prompt names the subject; every prompt does if the subject has no token."""
    return token is None or re.search(rf"(?<!\w){re.escape(token)}(?!\w)", prompt) is not None


def open_made(shown: Sequence[Shown]) -> list[tuple[str, Any]]:
    """Return prompt and PIL image of pictures that were just drawn."""
    import io

    from PIL import Image

    return [(one.prompt, Image.open(io.BytesIO(one.data), formats=("PNG",)).convert("RGB")) for one in shown]
