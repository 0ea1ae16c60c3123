"""Processors of vision-language models, and what their families want beside token ids and pictures.

A family is in ``FAMILIES`` when its batches were compared with what its own processor gives for each conversation
alone. Several processors hold a part for videos that needs torchvision; where that is missing they are made without it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.models.loading import call_loader

if TYPE_CHECKING:
    from moslora.models.names import ModelSource

__all__ = [
    "FAMILIES",
    "IMAGE",
    "Family",
    "Renderer",
    "load_processor",
    "parts_of",
    "picture_ids",
    "pixels",
    "token_types",
]

IMAGE = "<image>"  # where a picture stands in a text, whatever the model's own token is
# What a processor gives for texts; the rest is the pictures'.
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


@dataclass(frozen=True)
class Family:
    """What a family of models takes beside token ids and pictures.

    Attributes:
        types: The argument that says of each token what it is; empty where there is none.
        prefix: Whether prompts are seen in both directions and come without a chat template: one question, one answer,
            and ``types`` says which is which. Otherwise ``types`` says which tokens stand for a picture.
    """

    types: str = ""
    prefix: bool = False


# By model_type of the configuration.
FAMILIES = {
    "llava": Family(),
    "llava_next": Family(),
    "idefics3": Family(),
    "smolvlm": Family(),
    "internvl": Family(),
    "qwen2_vl": Family("mm_token_type_ids"),
    "qwen2_5_vl": Family("mm_token_type_ids"),
    "qwen3_vl": Family("mm_token_type_ids"),
    "gemma3": Family("token_type_ids"),
    "paligemma": Family("token_type_ids", prefix=True),
}


# --- Loading ------------------------------------------------------------------------------------------------


def load_processor(source: ModelSource, options: Mapping[str, Any]) -> Any:
    """Load a model's processor: transformers' own, less the part for videos where torchvision is not installed.

    Args:
        source: From ``resolve_model`` or ``materialize``.
        options: Of ``from_pretrained``: ``revision``, ``trust_remote_code``.

    Returns:
        The processor.

    Raises:
        ModelError: If it cannot be loaded, or needs a package that is not installed.
    """
    from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor

    if importlib.util.find_spec("torchvision") is None:
        config = call_loader(source, AutoConfig.from_pretrained, dict(options))
        kind = PROCESSOR_MAPPING.get(type(config), None)
        if kind is not None and "video_processor" in kind.get_attributes():
            return call_loader(source, _pictures_only(kind).from_pretrained, dict(options))
    return call_loader(source, AutoProcessor.from_pretrained, dict(options))


class _NoVideos:
    """Stands where a processor looks for its part for videos."""

    num_frames = fps = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ValueError("Videos are not read here; give pictures.")


def _pictures_only(kind: Any) -> Any:
    """Return a class of processors like ``kind`` that neither loads nor holds a part for videos.

    Everything about text and pictures is ``kind``'s own.
    """

    class PicturesOnly(kind):  # type: ignore[misc]
        video_processor = _NoVideos()

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(
            cls, args: Sequence[Any], processor_dict: dict[str, Any], **options: Any
        ) -> Any:
            # The constructor wants its parts by place. The one for videos comes last, and None is not kept.
            settings = {key: value for key, value in processor_dict.items() if key != "video_processor"}
            return super().from_args_and_dict([*args, None], settings, **options)

    PicturesOnly.__name__ = kind.__name__
    return PicturesOnly


# --- Rendering ----------------------------------------------------------------------------------------------


class Renderer:
    """A processor that stands for a tokenizer, with the pictures of one example at a time.

    Args:
        processor: The model's.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._images = copy.copy(processor), []  # type: ignore[var-annotated]
        # A conversation is rendered several times to find its answers; its pictures are prepared once.
        self._memory = _Remembering(processor.image_processor)
        self._processor.image_processor = self._memory

    @contextmanager
    def showing(self, images: Sequence[Any]) -> Iterator[None]:
        """Have pictures for what is rendered inside the block, in their order."""
        self._images = list(images)
        try:
            yield
        finally:
            self._images = []
            self._memory.forget()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._processor.tokenizer, name)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Control tokens but the picture's, whose places in the text were counted when it was read."""
        added: dict[int, Any] = self._processor.tokenizer.added_tokens_decoder
        return {at: token for at, token in added.items() if str(token) != IMAGE}

    def get_chat_template(self) -> str:
        """Return the processor's."""
        return str(self._processor.chat_template)

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
        """Render turns to token ids, pictures included."""
        images = iter(self._images)
        asked = {"add_generation_prompt": bool(options.get("add_generation_prompt"))}
        output = self._processor.apply_chat_template(
            [{"role": t["role"], "content": parts_of(t["content"], images)} for t in turns],
            tokenize=True,
            return_dict=True,
            **asked,
        )
        return {**output, "input_ids": _row(output["input_ids"])}

    def pair(self, question: str, answer: str | None = None) -> list[int]:
        """Return the token ids of a question behind its pictures, and of an answer, as the processor joins them."""
        if not self._images:
            raise ValueError("this family of models reads no question without a picture")
        text = IMAGE * len(self._images) + question.replace(IMAGE, "").strip()
        more = {} if answer is None else {"suffix": [answer]}
        return _row(self._processor(text=[text], images=[self._images], **more)["input_ids"])


class _Remembering:
    """An image processor that knows what it made of pictures it has seen."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._seen: dict[str, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forget(self) -> None:
        self._seen.clear()

    def __call__(self, images: Any, **options: Any) -> Any:
        key = repr([_identities(images), sorted(options.items())])
        if key not in self._seen:
            # Kept with the pictures, so that no other object takes their identity.
            self._seen[key] = images, self._inner(images, **options)
        return copy.copy(self._seen[key][1])  # whose entries the processor may take out


def _identities(images: Any) -> Any:
    return [_identities(image) for image in images] if isinstance(images, list | tuple) else id(images)


def _row(ids: Any) -> list[int]:
    """Return the ids of the only row."""
    return [int(token) for token in (ids if isinstance(ids[0], int) else ids[0])]


def parts_of(content: str, images: Iterator[Any]) -> list[dict[str, Any]]:
    """Split a turn's text at its pictures.

    Args:
        content: With ``<image>`` where they stand.
        images: The pictures, in their order.

    Returns:
        Parts of type ``image`` and ``text``, as chat templates take them.
    """
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(content.split(IMAGE)):
        if index:
            parts.append({"type": "image", "image": next(images, None)})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


# --- Batches ------------------------------------------------------------------------------------------------


def picture_ids(processor: Any) -> set[int]:
    """Return the tokens that stand for a part of a picture, or open and close one.

    Args:
        processor: The model's.
    """
    found = {*getattr(processor, "image_token_ids", ()), getattr(processor, "image_token_id", None)}
    return {int(token) for token in found if token is not None}


def pixels(processor: Any, images: Sequence[Any]) -> dict[str, Any]:
    """Prepare pictures as the processor does for a conversation that has them.

    Args:
        processor: The model's. Its image processor alone will not do: some processors set it otherwise (InternVL's cuts
            pictures to tiles) or take out what the model does not read.
        images: PIL images, at least one.

    Returns:
        Tensors by the names of the model's arguments.
    """
    text = "".join([processor.image_token] * len(images))
    output = processor(text=[text], images=[list(images)], return_tensors="pt")
    return {name: value for name, value in output.items() if name not in OF_TEXT}


def token_types(processor: Any, family: Family, ids: Sequence[int], prompt: int) -> list[int]:
    """Say of each token what it is, as the processor does.

    Args:
        processor: The model's.
        family: Of the model; its ``types`` is not empty.
        ids: Token ids of a row.
        prompt: How many of them come before the answer.

    Returns:
        One number each.
    """
    if family.prefix:
        return [int(at >= prompt) for at in range(len(ids))]
    types: list[int] = processor.create_mm_token_type_ids([list(ids)])[0]
    return types
