"""Z-Image: lists of latents and of words for a Qwen3; time runs from noise (0) to picture (1), and so does the sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.families.family import length_option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arguments", "count_qwen3", "unpack", "words"]


def words(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts, ``(rows, length, hidden)``, and which of their tokens count, ``(rows, length)``."""
    from torch.nn.utils.rnn import pad_sequence

    # A copy of the list, for the pipeline writes its chat template into the one that it is given.
    embeds, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, **length_option(tokens)
    )
    masks = [one.new_ones(len(one)) for one in embeds]
    return {
        "prompt_embeds": pad_sequence(embeds, batch_first=True),
        "prompt_mask": pad_sequence(masks, batch_first=True).bool(),
    }


def count_qwen3(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of a prompt, with the chat template."""
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=True,
    )
    return len(pipeline.tokenizer(text).input_ids)


def arguments(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the transformer's arguments."""
    return {
        "x": list(noisy.unsqueeze(2).unbind(0)),  # of one frame each
        "t": (1000 - t) / 1000,
        "cap_feats": [
            row[mask] for row, mask in zip(words["prompt_embeds"], words["prompt_mask"], strict=True)
        ],
    }


def unpack(pipeline: Any, out: Any, height: int, width: int) -> Tensor:
    """Bring the transformer's output, a list, to the shape of latents; the pipeline's latents have it."""
    import torch

    return torch.stack(out).squeeze(2) if isinstance(out, list | tuple) else out
