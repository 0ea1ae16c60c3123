"""The kinds of pipelines that can be trained: which model is the denoiser, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FAMILIES", "Family"]


def _as_it_is(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    return out


@dataclass(frozen=True)
class Family:
    """What is particular to one kind of pipeline.

    Attributes:
        title: Its usual name.
        denoiser: Name of the model that is trained.
        is_flow: Whether the denoiser is trained by flow matching.
        clips: Its CLIP text encoders, which can be adapted.
        words: Encodes prompts with the pipeline's own code: ``(pipeline, prompts, tokens)`` to tensors with one row
            for each prompt. ``tokens`` is the length of T5's text; None is the pipeline's default.
        arguments: The denoiser's arguments: ``(pipeline, noisy, t, words, sizes)``, where ``noisy`` are latents
            ``(rows, channels, height, width)``, ``t`` timesteps ``(rows,)``, ``words`` the result of ``words``, and
            ``sizes`` are ``(rows, 6)``.
        unpack: Brings the denoiser's output back to the shape of latents ``(rows, channels, height, width)``:
            ``(pipeline, out, height, width)``.
        t5: Name of T5's tokenizer, and how many tokens the pipeline reads by default; None without T5.
    """

    title: str
    denoiser: str
    is_flow: bool
    clips: tuple[str, ...]
    words: Callable[[Any, list[str], int | None], dict[str, Tensor]]
    arguments: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor], Tensor], dict[str, Any]]
    unpack: Callable[[Any, Tensor, int, int], Tensor] = _as_it_is
    t5: tuple[str, int] | None = None


# --- Encoded prompts ----------------------------------------------------------------------------------------


def _length(tokens: int | None) -> dict[str, int]:
    return {} if tokens is None else {"max_sequence_length": tokens}


def _words_sd(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
    return {"prompt_embeds": embeds}


def _words_sdxl(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _words_sd3(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, **_length(tokens)
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def _words_flux(pipeline: Any, prompts: list[str], tokens: int | None) -> dict[str, Tensor]:
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, **_length(tokens))
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


# --- The denoiser's arguments -------------------------------------------------------------------------------


def _arguments_sd(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    return {"sample": noisy, "timestep": t, "encoder_hidden_states": words["prompt_embeds"]}


def _arguments_sdxl(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    added = {"text_embeds": words["pooled_prompt_embeds"], "time_ids": sizes.to(noisy.dtype)}
    return {**_arguments_sd(pipeline, noisy, t, words, sizes), "added_cond_kwargs": added}


def _arguments_sd3(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    return {
        "hidden_states": noisy,
        "timestep": t,
        "encoder_hidden_states": words["prompt_embeds"],
        "pooled_projections": words["pooled_prompt_embeds"],
    }


def _arguments_flux(
    pipeline: Any, noisy: Tensor, t: Tensor, words: Mapping[str, Tensor], sizes: Tensor
) -> dict[str, Any]:
    import torch

    from moslora.compat.pipelines import latent_image_ids, pack_latents

    embeds = words["prompt_embeds"]
    arguments = {
        "hidden_states": pack_latents(pipeline, noisy),
        "timestep": t.to(noisy.dtype) / 1000,
        "encoder_hidden_states": embeds,
        "pooled_projections": words["pooled_prompt_embeds"],
        "img_ids": latent_image_ids(pipeline, noisy),
        "txt_ids": torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
    }
    if pipeline.transformer.config.guidance_embeds:
        # Guidance-distilled models are trained at a guidance of 1, as in diffusers' own script.
        arguments["guidance"] = torch.ones(noisy.shape[0], device=noisy.device, dtype=torch.float32)
    return arguments


def _unpack_flux(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    from moslora.compat.pipelines import unpack_latents

    return unpack_latents(pipeline, out, height, width)


# By the class that a pipeline's model_index.json names.
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion", "unet", False, ("text_encoder",), _words_sd, _arguments_sd
    ),
    "StableDiffusionXLPipeline": Family(
        "SDXL", "unet", False, ("text_encoder", "text_encoder_2"), _words_sdxl, _arguments_sdxl
    ),
    "StableDiffusion3Pipeline": Family(
        "SD3",
        "transformer",
        True,
        ("text_encoder", "text_encoder_2"),
        _words_sd3,
        _arguments_sd3,
        t5=("tokenizer_3", 256),
    ),
    "FluxPipeline": Family(
        "FLUX",
        "transformer",
        True,
        ("text_encoder",),
        _words_flux,
        _arguments_flux,
        _unpack_flux,
        ("tokenizer_2", 512),
    ),
}
