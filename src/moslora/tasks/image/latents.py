"""Pictures encoded into latents by a pipeline's VAE, once for the whole run, and latents decoded into pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moslora.data.pictures import open_image
from moslora.errors import ModelError
from moslora.tasks.image.autoencoders import autoencoder_of
from moslora.tasks.image.crops import Crop, Size, cut
from moslora.tasks.image.folders import Picture

__all__ = ["Shot", "decode_latents", "encode", "encode_picture"]


@dataclass(frozen=True)
class Shot:
    """One crop of a picture, encoded.

    Attributes:
        mean, std: Of its latents, ``(channels, height, width)``, float32 on the CPU.
        sizes: The picture's height and width, top and left of the crop, height and width of the crop: ``(6,)``.
    """

    mean: Tensor
    std: Tensor
    sizes: Tensor


def encode_picture(
    vae: Any, picture: Picture, size: Size, crops: Sequence[Crop], max_pixels: int
) -> list[Shot]:
    """Open a picture and encode its crops.

    Args:
        vae: The pipeline's.
        picture: The picture.
        size: Of the crops.
        crops: From ``plan_crops``.
        max_pixels: The most pixels that the file may have.

    Returns:
        One shot for each crop, in their order.

    Raises:
        ValueError: If the file cannot be opened.
        ModelError: If the latents are not finite.
    """
    image = open_image(picture.path, max_pixels)
    wide, high = (size, size) if isinstance(size, int) else size
    shots = []
    for crop in crops:
        mean, std = encode(vae, cut(image, size, crop))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ModelError(f"{picture.path}: the VAE encodes it as NaN or infinite values.")
        sizes = (picture.height, picture.width, crop.top, crop.left, high, wide)
        shots.append(Shot(mean, std, torch.tensor(sizes, dtype=torch.float32)))
    return shots


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a picture.

    Args:
        vae: The pipeline's.
        pixels: From -1 to 1, ``(3, height, width)``.

    Returns:
        Mean and standard deviation of its latents, scaled as the denoiser takes them, float32 on the CPU,
        ``(channels, height / factor, width / factor)`` each.
    """
    mean, std = autoencoder_of(vae).encode(vae, pixels[None].to(vae.device, vae.dtype))
    return mean[0].float().cpu(), std[0].float().cpu()


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Any:
    """Decode one picture.

    Args:
        vae: The pipeline's.
        latents: ``(1, channels, height, width)``.

    Returns:
        A PIL image, RGB.

    Raises:
        ModelError: If the pixels are not finite.
    """
    from PIL import Image

    pixels = autoencoder_of(vae).decode(vae, latents.to(vae.device, vae.dtype))
    pixels = pixels[0].float().cpu()  # (3, height, width)
    if not torch.isfinite(pixels).all():
        raise ModelError("The pipeline made a picture of NaN or infinite values.")
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy(), "RGB")
