"""Pictures that a pipeline draws of prompts, with the adapters that it has at the moment.

The maker needs a pipeline only, not a run::

    maker = PictureMaker(pipeline, family, resolution=512, steps=25)
    Path("cat.png").write_bytes(maker.draw("a cat on ice", seed=0))
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.tasks.task import Shown

if TYPE_CHECKING:
    from torch import Tensor

    from moslora.tasks.image.families.family import Family

__all__ = ["PictureMaker", "draw_pictures", "plan_pictures"]


@dataclass(frozen=True)
class PictureMaker:
    """Draws pictures with a pipeline.

    Attributes:
        pipeline: From ``load_pipeline``.
        family: Its kind.
        resolution: Side of the pictures in pixels.
        steps: How many denoising steps each takes.
        guidance_scale: None is the pipeline's default.
        negative_prompt: What not to draw; None for nothing.
        max_sequence_length: How many tokens the longest text encoder reads; None is the pipeline's default.
    """

    pipeline: Any
    family: Family
    resolution: int
    steps: int = 25
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    max_sequence_length: int | None = None

    def draw(self, prompt: str, seed: int) -> bytes:
        """Draw a picture.

        Args:
            prompt: What it shows.
            seed: Of its noise, which is drawn on the CPU, so that it is the same on every device.

        Returns:
            A PNG file.
        """
        import torch

        from moslora.tasks.image.autoencoders import autoencoder_of
        from moslora.tasks.image.latents import decode_latents

        vae = self.pipeline.vae
        settings = {
            self.family.guidance: self.guidance_scale,
            "negative_prompt": self.negative_prompt,
            "max_sequence_length": self.max_sequence_length,
        }
        latents: Tensor = self.pipeline(
            prompt=prompt,  # by name: FLUX.2's first argument is a picture
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=self.steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **self.family.drawing,
            **{name: value for name, value in settings.items() if value is not None},
        ).images
        side = self.resolution // autoencoder_of(vae).factor(vae.config)
        unpack = self.family.drawn or self.family.unpack
        latents = unpack(self.pipeline, latents, side, side)
        buffer = io.BytesIO()
        decode_latents(vae, latents).save(buffer, "PNG")
        return buffer.getvalue()


def plan_pictures(prompts: Sequence[str], count: int, seed: int) -> list[tuple[str, int]]:
    """Return prompt and seed of every picture to be shown, in their order.

    Args:
        prompts: The prompts.
        count: Pictures of each.
        seed: Of the first picture of each prompt; the next ones follow it.
    """
    return [(prompt, seed + k) for prompt in prompts for k in range(count)]


def draw_pictures(
    draw: Callable[[str, int], bytes],
    plan: Iterable[tuple[str, int]],
    checkpoint: Callable[[], None] = lambda: None,
) -> list[Shown]:
    """Draw several pictures.

    Args:
        draw: Makes a PNG file of a prompt and a seed, as ``PictureMaker.draw``.
        plan: Prompt and seed of each, from ``plan_pictures``.
        checkpoint: Called after each.
    """
    pictures = []
    for prompt, seed in plan:
        pictures.append(Shown(prompt, seed, data=draw(prompt, seed)))
        checkpoint()
    return pictures
