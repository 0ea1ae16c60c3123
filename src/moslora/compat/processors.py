"""Processors of transformers: parts of their interface that are not documented. Seen in transformers 5.23."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["multimodal_token_types", "without_videos"]


def without_videos(config: Any) -> Any:
    """Make a class of processors that has no part for videos, for models whose own needs torchvision for it.

    Seen in transformers 5.23.

    The class is a subclass of the model's own with its name; everything about text and pictures is the model's own.

    - Private: the table ``PROCESSOR_MAPPING``; ``ProcessorMixin.get_attributes`` and ``from_args_and_dict``, which are
      overridden.
    - Without it: if torchvision is missing, Qwen-VL, InternVL, SmolVLM and other models that also read videos cannot be
      loaded, not even for pictures.
    - Can go: when transformers loads such processors without torchvision.

    Args:
        config: The model's configuration.

    Returns:
        The class; None if the model's processor has no part for videos.
    """
    from transformers import PROCESSOR_MAPPING

    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or "video_processor" not in kind.get_attributes():
        return None
    # Made at run time, because its base class is the model's.
    members = {"video_processor": _NoVideos(), "whole": kind}
    return type(kind.__name__, (_WithoutVideos, kind), members)


class _NoVideos:
    """Takes the place of a processor's part for videos."""

    num_frames = fps = None

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ValueError("Videos are not supported; give pictures.")


class _WithoutVideos:
    """Overrides of a processor's class, to be mixed in before it."""

    whole: Any  # the processor's own class

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in cls.whole.get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **options: Any) -> Any:
        # The constructor takes its parts by position. The one for videos is the last, and None is not kept.
        settings = {key: value for key, value in processor_dict.items() if key != "video_processor"}
        return super().from_args_and_dict([*args, None], settings, **options)  # type: ignore[misc]


def multimodal_token_types(processor: Any, ids: Sequence[int]) -> list[int]:
    """Return the type of each token: 0 for text, 1 for a picture's.

    Seen in transformers 5.23.

    - Private: ``ProcessorMixin.create_mm_token_type_ids``, which processors call but transformers does not document.
    - Without it: positions of pictures' tokens in Qwen-VL and Gemma 3 are wrong, silently.
    - Can go: when transformers documents how to get the types of rows that are padded afterwards.

    Args:
        processor: The model's.
        ids: Token ids of one row, not padded.
    """
    types: list[int] = processor.create_mm_token_type_ids([list(ids)])[0]
    return types
