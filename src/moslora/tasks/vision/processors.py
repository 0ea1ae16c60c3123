"""Processors of vision-language models, and what their families take besides token ids and pixel values.

A family is in ``PROCESSOR_FAMILIES`` if its batches were compared with the output of its own processor for each
conversation alone.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.compat.processors import multimodal_token_types
from moslora.errors import UsageError
from moslora.models.loading import call_loader

if TYPE_CHECKING:
    from moslora.models.names import ModelSource

__all__ = [
    "IMAGE",
    "PROCESSOR_FAMILIES",
    "ProcessorFamily",
    "Renderer",
    "load_processor",
    "parts_of",
    "picture_ids",
    "pixels",
    "token_types",
]

IMAGE = "<image>"  # the placeholder of a picture in a text, whatever the model's own token is
# A processor's outputs for texts; the others are for pictures.
OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"}


@dataclass(frozen=True)
class ProcessorFamily:
    """What a family of models takes besides token ids and pixel values.

    Attributes:
        types: Name of the argument with each token's type; empty if there is none.
        prefix: Whether attention to prompts is bidirectional and there is no chat template: one question and one
            answer, and ``types`` tells them apart. Otherwise ``types`` tells which tokens stand for a picture.
    """

    types: str = ""
    prefix: bool = False


# By model_type of the configuration.
PROCESSOR_FAMILIES = {
    "llava": ProcessorFamily(),
    "llava_next": ProcessorFamily(),
    "idefics3": ProcessorFamily(),
    "smolvlm": ProcessorFamily(),
    "internvl": ProcessorFamily(),
    "qwen2_vl": ProcessorFamily("mm_token_type_ids"),
    "qwen2_5_vl": ProcessorFamily("mm_token_type_ids"),
    "qwen3_vl": ProcessorFamily("mm_token_type_ids"),
    "gemma3": ProcessorFamily("token_type_ids"),
    "paligemma": ProcessorFamily("token_type_ids", prefix=True),
}


# --- Loading ------------------------------------------------------------------------------------------------


def load_processor(source: ModelSource, options: Mapping[str, Any]) -> Any:
    """Load a model's processor: transformers' own, without its part for videos if torchvision is not installed.

    Args:
        source: From ``resolve_model`` or ``materialize``.
        options: Of ``from_pretrained``: ``revision``, ``trust_remote_code``.

    Returns:
        The processor.

    Raises:
        ModelError: If it cannot be loaded, or needs a package that is not installed.
    """
    from transformers import AutoConfig, AutoProcessor

    from moslora.compat.processors import without_videos

    if importlib.util.find_spec("torchvision") is None:
        config = call_loader(source, AutoConfig.from_pretrained, dict(options))
        kind = without_videos(config)
        if kind is not None:
            return call_loader(source, kind.from_pretrained, dict(options))
    return call_loader(source, AutoProcessor.from_pretrained, dict(options))


# --- Rendering ----------------------------------------------------------------------------------------------


class Renderer:
    """A processor with the interface of a tokenizer, for the pictures of one example at a time.

    Args:
        processor: The model's.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = copy.copy(processor)
        self._images: list[Any] = []
        # A conversation is rendered several times to find its answers; its pictures are processed once.
        self._cache = _CachedImageProcessor(processor.image_processor)
        self._processor.image_processor = self._cache

    @contextmanager
    def showing(self, images: Sequence[Any]) -> Iterator[None]:
        """Use these pictures, in their order, for what is rendered inside the block."""
        self._images = list(images)
        try:
            yield
        finally:
            self._images = []
            self._cache.clear()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._processor.tokenizer, name)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Control tokens, without the picture's: its placeholders were counted when the data was read."""
        added: dict[int, Any] = self._processor.tokenizer.added_tokens_decoder
        return {number: token for number, token in added.items() if str(token) != IMAGE}

    # Places of tokens in a text are not those in the text that a processor tokenizes.
    is_fast = False

    def get_chat_template(self, tools: Any = None) -> str:
        """Return the processor's."""
        return str(self._processor.chat_template)

    def apply_chat_template(
        self,
        turns: Sequence[Mapping[str, str]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> Any:
        """Render turns to token ids, pictures included, or to text with the placeholders of pictures.

        Args:
            turns: Roles and contents.
            tokenize: Whether to token ids.
            add_generation_prompt: Whether an answer is to follow.
            return_dict, tokenizer_kwargs: As for tokenizers; they change nothing here.
            **arguments: Variables of the template.
        """
        images = iter(self._images)
        conversation = [{"role": t["role"], "content": parts_of(t["content"], images)} for t in turns]
        options = {**arguments, "add_generation_prompt": add_generation_prompt}
        if not tokenize:
            return self._processor.apply_chat_template(conversation, tokenize=False, **options)
        output = self._processor.apply_chat_template(conversation, tokenize=True, return_dict=True, **options)
        return {**output, "input_ids": _row(output["input_ids"])}

    def pair(self, question: str, answer: str | None = None) -> list[int]:
        """Return the token ids of pictures, a question about them, and maybe an answer, as the processor joins them."""
        if not self._images:
            raise UsageError("this family of models reads no question without a picture")
        text = IMAGE * len(self._images) + question.replace(IMAGE, "").strip()
        more = {} if answer is None else {"suffix": [answer]}
        return _row(self._processor(text=[text], images=[self._images], **more)["input_ids"])


class _CachedImageProcessor:
    """An image processor that keeps its outputs for the pictures that it has seen."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._outputs: dict[str, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def clear(self) -> None:
        self._outputs.clear()

    def __call__(self, images: Any, **options: Any) -> Any:
        key = repr([_identities(images), sorted(options.items())])
        if key not in self._outputs:
            # The pictures are kept too, so that no other object gets their identity.
            self._outputs[key] = images, self._inner(images, **options)
        return copy.copy(self._outputs[key][1])  # a copy, because the processor may remove entries


def _identities(images: Any) -> Any:
    return [_identities(image) for image in images] if isinstance(images, list | tuple) else id(images)


def _row(ids: Any) -> list[int]:
    """Return the ids of the only row."""
    return [int(token) for token in (ids if isinstance(ids[0], int) else ids[0])]


def parts_of(content: str, images: Iterator[Any]) -> list[dict[str, Any]]:
    """Split a turn's text at its pictures.

    Args:
        content: Text with ``<image>`` in place of each picture.
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
    """Return the tokens that stand for a part of a picture, or mark its beginning and end.

    Args:
        processor: The model's.
    """
    tokens = {*getattr(processor, "image_token_ids", ()), getattr(processor, "image_token_id", None)}
    return {int(token) for token in tokens if token is not None}


def pixels(processor: Any, images: Sequence[Any]) -> dict[str, Any]:
    """Process pictures as the processor does for a conversation that contains them.

    Args:
        processor: The model's. Its image processor alone is not enough: some processors give it other settings
            (InternVL's cuts pictures into tiles) or remove outputs that the model does not read.
        images: PIL images, at least one.

    Returns:
        Tensors by the names of the model's arguments.
    """
    text = "".join([processor.image_token] * len(images))
    output = processor(text=[text], images=[list(images)], return_tensors="pt")
    return {name: value for name, value in output.items() if name not in OF_TEXT}


def token_types(processor: Any, family: ProcessorFamily, ids: Sequence[int], prompt: int) -> list[int]:
    """Return each token's type, as the processor does.

    Args:
        processor: The model's.
        family: The model's; its ``types`` is not empty.
        ids: Token ids of a row.
        prompt: How many of them come before the answer.

    Returns:
        One number per token.
    """
    if family.prefix:
        return [int(at >= prompt) for at in range(len(ids))]
    return multimodal_token_types(processor, ids)
