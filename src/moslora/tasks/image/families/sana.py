"""SANA: words of a Gemma 2 behind an instruction; latents of a deep-compression autoencoder, 32 × smaller."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.families.family import length_option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arguments", "count_gemma", "words"]


def _instruction(pipeline: Any) -> list[str]:
    """Return what the pipeline puts before a prompt when it draws, so that training reads the same words."""
    found = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return list(found or [])


def words(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts, ``(rows, length, hidden)``, and which of their tokens count, ``(rows, length)``."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts),
        do_classifier_free_guidance=False,
        complex_human_instruction=_instruction(pipeline),
        **length_option(tokens),
    )
    return {"prompt_embeds": embeds, "prompt_mask": mask}


def count_gemma(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of a prompt; those of the instruction have a room of their own."""
    instruction = "\n".join(_instruction(pipeline))
    tokenizer = pipeline.tokenizer
    return len(tokenizer(instruction + prompt).input_ids) - len(tokenizer.encode(instruction)) + 2


def arguments(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the transformer's arguments."""
    return {
        "hidden_states": noisy,
        "timestep": t * pipeline.transformer.config.timestep_scale,
        "encoder_hidden_states": words["prompt_embeds"],
        "encoder_attention_mask": words["prompt_mask"],
    }
