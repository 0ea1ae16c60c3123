"""Private names of diffusers' pipelines, and what this package does with them.

Every entry says what it is for, the versions it was seen in, what breaks without it and when it can go.
Training calls a denoiser directly, without the pipeline's own loop, so it needs steps that the loop takes inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["latent_image_ids", "pack_latents", "unpack_latents"]

# ``FluxPipeline._pack_latents``, ``_unpack_latents`` and ``_prepare_latent_image_ids``: FLUX's transformer takes
# patches of 2 × 2 latents in a row, with their positions, and the pipeline alone knows in which order.
# Seen in diffusers 0.38 to 0.42 (static methods).
# Without them: FLUX can be neither trained nor measured; the other families are not affected.
# They can go when diffusers has public functions for it, as its own training scripts call these private ones.


def pack_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Arrange latents as FLUX's transformer takes them.

    Seen in diffusers 0.38.

    Args:
        pipeline: A ``FluxPipeline``.
        latents: ``(rows, channels, height, width)``; height and width are even.

    Returns:
        ``(rows, height / 2 * width / 2, channels * 4)``.
    """
    packed: Tensor = pipeline._pack_latents(latents, *latents.shape)
    return packed


def unpack_latents(pipeline: Any, packed: Tensor, height: int, width: int) -> Tensor:
    """Undo ``pack_latents``.

    Seen in diffusers 0.38.

    Args:
        pipeline: A ``FluxPipeline``.
        packed: ``(rows, height / 2 * width / 2, channels * 4)``.
        height: Of the latents, not of the picture.
        width: Of the latents, not of the picture.

    Returns:
        ``(rows, channels, height, width)``.
    """
    factor = pipeline.vae_scale_factor
    latents: Tensor = pipeline._unpack_latents(packed, height * factor, width * factor, factor)
    return latents


def latent_image_ids(pipeline: Any, latents: Tensor) -> Tensor:
    """Return the positions of packed latents.

    Seen in diffusers 0.38.

    Args:
        pipeline: A ``FluxPipeline``.
        latents: Before packing, ``(rows, channels, height, width)``.

    Returns:
        ``(height / 2 * width / 2, 3)``, on the latents' device and of their dtype.
    """
    rows, _, height, width = latents.shape
    ids: Tensor = pipeline._prepare_latent_image_ids(
        rows, height // 2, width // 2, latents.device, latents.dtype
    )
    return ids
