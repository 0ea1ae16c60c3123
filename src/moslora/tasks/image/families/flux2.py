"""FLUX.2, dev and klein: its latents are patches of 2 × 2 already (``autoencoders``), one in each place of a row.

Dev reads prompts with Mistral Small, klein with Qwen3; the pipeline's own code puts its template around them and takes
hidden states of three layers. Positions have four numbers: picture, row, column, and the place in the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.families.family import length_option

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TARGETS", "arguments", "count_mistral", "count_qwen3", "drawn", "unpack", "words"]

# The default of diffusers' scripts: attention of both kinds of blocks, where a single block has q, k, v and its MLP in
# one layer. A pattern, because ``attn.to_out`` is a linear layer in a single block and a list in a double one.
TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|to_qkv_mlp_proj)|single_transformer_blocks\.\d+\.attn\.to_out"


def words(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    """Encode prompts, ``(rows, length, 3 × hidden)``; padding is part of what FLUX.2 was trained with."""
    embeds, _ = pipeline.encode_prompt(list(prompts), **length_option(tokens))
    return {"prompt_embeds": embeds}


def count_mistral(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of dev's text encoder, with the system message."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": pipeline.system_message}]},
        {"role": "user", "content": [{"type": "text", "text": prompt}]},
    ]
    found = pipeline.tokenizer.apply_chat_template(
        [messages], add_generation_prompt=False, tokenize=True, return_dict=True
    )
    return len(found["input_ids"][0])


def count_qwen3(pipeline: Any, prompt: str) -> int | None:
    """Count the tokens of klein's text encoder."""
    text = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return len(pipeline.tokenizer(text).input_ids)


def arguments(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    """Return the transformer's arguments."""
    import torch

    embeds = words["prompt_embeds"]
    rows, length = embeds.shape[:2]
    one = torch.arange(1)

    def positions(height: int, width: int, text: int) -> Tensor:
        ids = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), torch.arange(text))
        return ids.expand(rows, -1, -1).to(noisy.device)

    found = {
        "hidden_states": noisy.flatten(2).transpose(1, 2),
        "timestep": t.to(noisy.dtype) / 1000,
        "encoder_hidden_states": embeds,
        "img_ids": positions(noisy.shape[2], noisy.shape[3], 1),
        "txt_ids": positions(1, 1, length),
    }
    if pipeline.transformer.config.guidance_embeds:
        # Dev is guidance-distilled; it is trained at a guidance of 1, as diffusers' README does.
        found["guidance"] = torch.ones(rows, device=noisy.device, dtype=torch.float32)
    return found


def unpack(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    """Bring the transformer's output to the shape of latents."""
    return out.transpose(1, 2).reshape(len(out), -1, height, width)


def drawn(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    """Bring what the pipeline makes to the shape of latents: dev's is packed, klein's is already the autoencoder's."""
    from moslora.tasks.image.autoencoders import normalize_flux2

    return unpack(pipeline, out, height, width) if out.ndim == 3 else normalize_flux2(pipeline.vae, out)
