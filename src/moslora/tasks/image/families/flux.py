"""FLUX.1: patches of 2 × 2 latents in a row, with their positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.families.family import length_option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arguments", "count_t5", "unpack", "words"]


def words(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts."""
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, **length_option(tokens))
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def count_t5(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of FLUX.1's T5."""
    return len(pipeline.tokenizer_2(prompt).input_ids)


def arguments(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the transformer's arguments."""
    import torch

    from moslora.compat.pipelines import latent_image_ids, pack_latents

    embeds = words["prompt_embeds"]
    found = {
        "hidden_states": pack_latents(pipeline, noisy),
        "timestep": t.to(noisy.dtype) / 1000,
        "encoder_hidden_states": embeds,
        "pooled_projections": words["pooled_prompt_embeds"],
        "img_ids": latent_image_ids(pipeline, noisy),
        "txt_ids": torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
    }
    if pipeline.transformer.config.guidance_embeds:
        # Guidance-distilled models are trained at a guidance of 1, as in diffusers' own script.
        found["guidance"] = torch.ones(noisy.shape[0], device=noisy.device, dtype=torch.float32)
    return found


def unpack(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    """Bring the transformer's output to the shape of latents."""
    from moslora.compat.pipelines import unpack_latents

    return unpack_latents(pipeline, out, height, width)
