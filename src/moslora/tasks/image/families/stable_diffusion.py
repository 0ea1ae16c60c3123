"""Stable Diffusion 1 and 2, SDXL, and SD3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.families.family import length_option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "arguments_sd",
    "arguments_sd3",
    "arguments_sdxl",
    "count_t5_sd3",
    "words_sd",
    "words_sd3",
    "words_sdxl",
]


def words_sd(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts for Stable Diffusion 1 and 2."""
    embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
    return {"prompt_embeds": embeds}


def words_sdxl(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts for SDXL."""
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def words_sd3(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts for SD3."""
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, **length_option(tokens)
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def count_t5_sd3(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of SD3's T5, which may be left out."""
    tokenizer = pipeline.tokenizer_3
    return None if tokenizer is None else len(tokenizer(prompt).input_ids)


def arguments_sd(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the arguments of Stable Diffusion's U-Net."""
    return {"sample": noisy, "timestep": t, "encoder_hidden_states": words["prompt_embeds"]}


def arguments_sdxl(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the arguments of SDXL's U-Net."""
    added = {"text_embeds": words["pooled_prompt_embeds"], "time_ids": sizes.to(noisy.dtype)}
    return {**arguments_sd(pipeline, noisy, t, words, sizes), "added_cond_kwargs": added}


def arguments_sd3(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the arguments of SD3's transformer."""
    return {
        "hidden_states": noisy,
        "timestep": t,
        "encoder_hidden_states": words["prompt_embeds"],
        "pooled_projections": words["pooled_prompt_embeds"],
    }
