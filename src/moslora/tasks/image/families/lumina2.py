"""Lumina Image 2.0: words of a Gemma 2 behind a system prompt; time runs from noise (0) to picture (1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.families.family import length_option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arguments", "count_gemma", "words"]


def words(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts, ``(rows, length, hidden)``, and which of their tokens count, ``(rows, length)``."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, **length_option(tokens)
    )
    return {"prompt_embeds": embeds, "prompt_mask": mask}


def count_gemma(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of a prompt, with the system prompt."""
    return len(pipeline.tokenizer(f"{pipeline.system_prompt} <Prompt Start> {prompt}").input_ids)


def arguments(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the transformer's arguments."""
    return {
        "hidden_states": noisy,
        "timestep": 1 - t / 1000,
        "encoder_hidden_states": words["prompt_embeds"],
        "encoder_attention_mask": words["prompt_mask"],
    }
