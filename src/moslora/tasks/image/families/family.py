"""What is particular to one kind of pipeline, as one entry of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ATTENTION", "Family", "LongText", "as_it_is", "length_option"]

# What diffusers' training scripts adapt where they are not told otherwise.
ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")


def as_it_is(pipeline: Any, out: Any, height: int, width: int) -> Tensor:
    """Return the denoiser's output, which has the shape of latents already."""
    tensor: Tensor = out
    return tensor


def length_option(tokens: int | None) -> dict[str, int]:
    """Return the argument of ``encode_prompt`` for how many tokens are read; none for the pipeline's default."""
    return {} if tokens is None else {"max_sequence_length": tokens}


@dataclass(frozen=True)
class LongText:
    """The text encoder whose length ``task.max_sequence_length`` sets.

    Attributes:
        reader: Its name in messages, as ``T5``.
        limit: How many tokens the pipeline reads by default.
        count: How many tokens it makes of a prompt, with what the pipeline puts around it: ``(pipeline, prompt)``.
            None where the text encoder is not loaded.
    """

    reader: str
    limit: int
    count: Callable[[Any, str], int | None]


@dataclass(frozen=True)
class Family:
    """What is particular to one kind of pipeline.

    Attributes:
        title: Its usual name.
        denoiser: Name of the model that is trained.
        is_flow: Whether the denoiser is trained by flow matching.
        clips: Its CLIP text encoders, which can be adapted.
        words: Encodes prompts with the pipeline's own code: ``(pipeline, prompts, tokens)`` to tensors with one row
            for each prompt. ``tokens`` is the length of ``long_text``; None is the pipeline's default. Rows may differ
            in their second dimension between calls; shorter ones are padded with zeros, so there is a mask then.
        arguments: The denoiser's arguments: ``(pipeline, noisy, t, words, sizes)``, where ``noisy`` are latents
            ``(rows, channels, height, width)``, ``t`` timesteps ``(rows,)`` from 0 (picture) to 1000 (noise), ``words``
            the result of ``words``, and ``sizes`` are ``(rows, 6)``.
        unpack: Brings the denoiser's output to the shape of latents ``(rows, channels, height, width)``:
            ``(pipeline, out, height, width)``.
        long_text: The text encoder whose length can be set; None without one.
        drawn: The same for the latents that the pipeline makes (``output_type="latent"``); None for ``unpack``.
        sign: -1 where the denoiser predicts picture minus noise, the negative of what flow matching trains here.
        multiple: Of how many latents the sides of a picture must be a multiple, where ``patch_size`` does not say it.
        targets: The modules that are adapted where a recipe names none: the published default.
        guidance: The pipeline's argument for ``task.guidance_scale``; empty if it takes none.
        takes_negative: Whether its pipeline takes a negative prompt.
        drawing: Further arguments of the pipeline, so that it draws the size that it is asked for.
    """

    title: str
    denoiser: str
    is_flow: bool
    clips: tuple[str, ...]
    words: Callable[[Any, list[str], int | None], dict[str, Tensor]]
    arguments: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor], Tensor], dict[str, Any]]
    unpack: Callable[[Any, Any, int, int], Tensor] = as_it_is
    long_text: LongText | None = None
    drawn: Callable[[Any, Any, int, int], Tensor] | None = None
    sign: int = 1
    multiple: int = 1
    targets: Sequence[str] | str = ATTENTION
    guidance: str = "guidance_scale"
    takes_negative: bool = True
    drawing: Mapping[str, Any] = field(default_factory=dict)
