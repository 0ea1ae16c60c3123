"""The autoencoders of pipelines: how each encodes pixels, and what a denoiser sees of it.

"Latents" are what the denoiser is trained on: scaled, and with FLUX.2 in patches of 2 × 2. By the class of the
pipeline's ``vae``; a new one is one entry of ``AUTOENCODERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.errors import ModelError

__all__ = ["AUTOENCODERS", "Autoencoder", "autoencoder_of", "latent_factor", "normalize_flux2"]


@dataclass(frozen=True)
class Autoencoder:
    """How one class of autoencoders is used.

    Attributes:
        factor: By how much the sides of latents are smaller than those of the picture, from its configuration.
        encode: ``(vae, pixels)``, pixels from -1 to 1 ``(1, 3, height, width)``, to mean and standard deviation of
            the latents, ``(1, channels, height / factor, width / factor)`` each.
        decode: ``(vae, latents)`` to pixels.
    """

    factor: Callable[[Mapping[str, Any]], int]
    encode: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Any, Tensor], Tensor]


def autoencoder_of(vae: Any) -> Autoencoder:
    """Return how a pipeline's autoencoder is used.

    Args:
        vae: The model.

    Raises:
        ModelError: If its class is not known.
    """
    return _find(type(vae).__name__)


def latent_factor(config: Mapping[str, Any]) -> int:
    """Return by how much the sides of latents are smaller than those of the picture.

    Args:
        config: Content of the autoencoder's ``config.json``.

    Raises:
        ModelError: If its class is not known.
    """
    return _find(str(config.get("_class_name", "AutoencoderKL"))).factor(config)


def _find(kind: str) -> Autoencoder:
    if kind not in AUTOENCODERS:
        raise ModelError(
            f"The pipeline's vae is a {kind}; supported: {', '.join(AUTOENCODERS)}. Others scale latents in other ways."
        )
    return AUTOENCODERS[kind]


# --- Stable Diffusion, SDXL, SD3, FLUX.1, Z-Image, Lumina 2 ---------------------------------------------------


def _statistics(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """Return what is subtracted from latents, and what they are then multiplied by."""
    config = vae.config
    scale = config.scaling_factor
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, scale / std
    return getattr(config, "shift_factor", None) or 0.0, scale


def _encode_kl(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixels).latent_dist
    shift, scale = _statistics(vae, distribution.mean)
    return (distribution.mean - shift) * scale, distribution.std * scale


def _decode_kl(vae: Any, latents: Tensor) -> Tensor:
    shift, scale = _statistics(vae, latents)
    pixels: Tensor = vae.decode(latents / scale + shift).sample
    return pixels


def _blocks(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


# --- FLUX.2: patches, normalized by the statistics of a batch norm --------------------------------------------


def _batch_norm(vae: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of a patch."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)


def _encode_flux2(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixels).latent_dist
    std = F.pixel_unshuffle(distribution.std, 2) / _batch_norm(vae)[1]
    return normalize_flux2(vae, distribution.mean), std


def normalize_flux2(vae: Any, latents: Tensor) -> Tensor:
    """Turn latents of FLUX.2's autoencoder into those of its denoiser.

    Args:
        vae: The autoencoder.
        latents: ``(rows, channels, height, width)``.

    Returns:
        Normalized patches, ``(rows, channels × 4, height / 2, width / 2)``.
    """
    center, width = _batch_norm(vae)
    return (F.pixel_unshuffle(latents, 2) - center) / width


def _decode_flux2(vae: Any, latents: Tensor) -> Tensor:
    center, width = _batch_norm(vae)
    pixels: Tensor = vae.decode(F.pixel_shuffle(latents * width + center, 2)).sample
    return pixels


# --- Qwen-Image: videos of one frame --------------------------------------------------------------------------


def _channels(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _encode_qwen(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixels.unsqueeze(2)).latent_dist
    mean, spread = (part.squeeze(2) for part in (distribution.mean, distribution.std))
    center, width = _channels(vae, mean)
    return (mean - center) / width, spread / width


def _decode_qwen(vae: Any, latents: Tensor) -> Tensor:
    center, width = _channels(vae, latents)
    pixels: Tensor = vae.decode((latents * width + center).unsqueeze(2)).sample.squeeze(2)
    return pixels


# --- SANA: no distribution ------------------------------------------------------------------------------------


def _encode_dc(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = vae.encode(pixels).latent * vae.config.scaling_factor
    return mean, torch.zeros_like(mean)


def _decode_dc(vae: Any, latents: Tensor) -> Tensor:
    pixels: Tensor = vae.decode(latents / vae.config.scaling_factor).sample
    return pixels


AUTOENCODERS: dict[str, Autoencoder] = {
    "AutoencoderKL": Autoencoder(_blocks, _encode_kl, _decode_kl),
    "AutoencoderKLFlux2": Autoencoder(lambda config: 2 * _blocks(config), _encode_flux2, _decode_flux2),
    "AutoencoderKLQwenImage": Autoencoder(
        lambda config: int(2 ** len(config["temperal_downsample"])), _encode_qwen, _decode_qwen
    ),
    "AutoencoderDC": Autoencoder(
        lambda config: int(2 ** (len(config["encoder_block_out_channels"]) - 1)), _encode_dc, _decode_dc
    ),
}
