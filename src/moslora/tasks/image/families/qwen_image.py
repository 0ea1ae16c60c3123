"""Qwen-Image: words of a Qwen2.5-VL, of any length with a mask; latents in patches of 2 × 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LIMIT", "arguments", "count_qwen", "unpack", "words"]

LIMIT = 512  # of the pipeline's call; ``encode_prompt`` alone would read 1024


def words(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts, ``(rows, length, hidden)``, and which of their tokens count, ``(rows, length)``."""
    embeds, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=tokens or LIMIT)
    if mask is None:  # all of them
        mask = embeds.new_ones(embeds.shape[:2])
    return {"prompt_embeds": embeds, "prompt_mask": mask.bool()}


def count_qwen(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of a prompt, without the template's beginning, which the pipeline leaves out again."""
    ids = pipeline.tokenizer(pipeline.prompt_template_encode.format(prompt)).input_ids
    return len(ids) - int(pipeline.prompt_template_encode_start_idx)


def arguments(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the transformer's arguments."""
    from torch.nn import functional as F

    rows, _, height, width = noisy.shape
    found = {
        "hidden_states": F.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
        "timestep": t.to(noisy.dtype) / 1000,
        "encoder_hidden_states": words["prompt_embeds"],
        "img_shapes": [[(1, height // 2, width // 2)]] * rows,
    }
    if not words["prompt_mask"].all():
        found["encoder_hidden_states_mask"] = words["prompt_mask"]
    return found


def unpack(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    """Bring the transformer's output to the shape of latents."""
    from torch.nn import functional as F

    patches = out.transpose(1, 2).reshape(len(out), -1, height // 2, width // 2)
    return F.pixel_shuffle(patches, 2)
