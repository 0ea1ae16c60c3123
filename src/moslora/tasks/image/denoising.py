"""The model that is trained: a pipeline's denoiser with its adapters, whose forward returns the denoising loss.

The loss is the mean squared error of the denoiser's prediction. Everything random about an example follows from one
number, its seed, so a run has the same noise however its examples are divided into batches, accumulation and
processes, and wherever it was resumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moslora.tasks.image.families.family import Family
from moslora.tasks.image.latents import Shot
from moslora.tasks.image.noise import Flow, Noising

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["Denoising", "Draw"]


@dataclass(frozen=True)
class Draw:
    """One random draw of an example: its crop, its noise and its timestep.

    Attributes:
        clean: The crop's latents, ``(channels, height, width)``.
        noise: The noise to mix into them, the same shape.
        u: The timestep, as a quantile of its density from 0 to 1, ``()``.
        sizes: The crop's, ``(6,)``; see ``Shot``.
        prompt: The example's words.
    """

    clean: Tensor
    noise: Tensor
    u: Tensor
    sizes: Tensor
    prompt: str


class Denoising(nn.Module):
    """A pipeline's trained models, with the examples; its forward returns the loss.

    Args:
        pipeline: A diffusers pipeline.
        family: Its kind.
        schedule: How noise is mixed in.
        dtype: Of the frozen weights.
        noise_offset: Strength of noise that is the same for all pixels of a channel.
        prior_weight: Weight of the class's pictures in the loss.
        tokens: How many tokens the longest text encoder reads; None is the pipeline's default.

        caption_dropout: The share of training examples that are learned without their words.

    Attributes:
        parts: The trained models by their name in the pipeline.
        examples: Crops and words of each picture: training pictures, then held-out ones.
        prior: Crops and words of each class picture.
        encoded_prompts: Encoded words by their prompt, where the text encoders are frozen.
    """

    def __init__(
        self,
        pipeline: Any,
        family: Family,
        schedule: Noising | Flow,
        dtype: torch.dtype,
        noise_offset: float = 0.0,
        prior_weight: float = 1.0,
        tokens: int | None = None,
        caption_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pipeline, self.family, self.schedule = pipeline, family, schedule
        self.dtype, self.noise_offset, self.prior_weight = dtype, noise_offset, prior_weight
        self.tokens, self.caption_dropout = tokens, caption_dropout
        self.parts = nn.ModuleDict({family.denoiser: getattr(pipeline, family.denoiser)})
        self.examples: list[tuple[list[Shot], str]] = []
        self.prior: list[tuple[list[Shot], str]] = []
        self.encoded_prompts: dict[str, dict[str, Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.parts[self.family.denoiser].parameters()).device

    def adapt(self, configs: Mapping[str, PeftConfig]) -> None:
        """Put adapters into models of the pipeline, in place.

        Args:
            configs: Adapter configurations by the model's name in the pipeline.
        """
        from peft import get_peft_model

        for name, config in configs.items():
            self.parts[name] = get_peft_model(getattr(self.pipeline, name), config)
        if any(name in self.family.clips for name in configs):
            self.encoded_prompts.clear()

    def save_pretrained(self, folder: Any) -> None:
        """Save the adapters natively, one directory for each model."""
        for name, part in self.parts.items():
            # No vocabulary has been resized; PEFT would look for the base's to find out.
            part.save_pretrained(Path(folder) / name, save_embedding_layers=False)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Switch the denoiser's gradient checkpointing on; Trainer calls it."""
        getattr(self.pipeline, self.family.denoiser).enable_gradient_checkpointing()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts once for all steps; call it only where the text encoders are frozen."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.encoded_prompts:
                words = self.family.words(self.pipeline, [prompt], self.tokens)
                self.encoded_prompts[prompt] = {name: tensor.cpu() for name, tensor in words.items()}

    def words(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return encoded prompts: tensors with one row for each."""
        if not self.encoded_prompts:
            return self.family.words(self.pipeline, prompts, self.tokens)
        return {
            name: _stack([self.encoded_prompts[prompt][name] for prompt in prompts]).to(self.device)
            for name in self.encoded_prompts[prompts[0]]
        }

    def draw(
        self,
        example: tuple[list[Shot], str],
        generator: torch.Generator,
        stratum: tuple[int, int] | None = None,
    ) -> Draw:
        """Draw crop, noise and timestep of an example.

        Args:
            example: Crops of a picture, and its words.
            generator: The only source of randomness, on the CPU.
            stratum: ``(k, n)``: crop and timestep are of the k-th of n strata, instead of any.
        """
        shots, prompt = example
        place = int(torch.randint(len(shots), (), generator=generator))
        u = torch.rand((), generator=generator)
        if stratum is not None:
            k, n = stratum
            place, u = k % len(shots), (k + u) / n
        shot = shots[place]
        clean = shot.mean + shot.std * torch.randn(shot.mean.shape, generator=generator)
        noise = torch.randn(shot.mean.shape, generator=generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(noise.shape[0], 1, 1, generator=generator)
        return Draw(clean, noise, u, shot.sizes, prompt)

    def arguments(self, draws: Sequence[Draw]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Return the denoiser's arguments, its target ``(rows, channels, height, width)`` and weights ``(rows,)``."""
        clean, noise, u, sizes = (
            torch.stack([getattr(d, name) for d in draws]) for name in ("clean", "noise", "u", "sizes")
        )
        t = self.schedule.timesteps(u).to(self.device)
        noisy, target, weight = self.schedule.apply(clean.to(self.device), noise.to(self.device), t)
        words = self.words([d.prompt for d in draws])
        arguments = self.family.arguments(
            self.pipeline, noisy.to(self.dtype), t, words, sizes.to(self.device)
        )
        return arguments, target, weight

    def losses(self, draws: Sequence[Draw]) -> Tensor:
        """Return each example's weighted squared error, float32, ``(rows,)``; those of one size are run at once."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, draw in enumerate(draws):
            sizes.setdefault(tuple(draw.clean.shape), []).append(place)
        places = [place for own in sizes.values() for place in own]
        found = torch.cat([self._losses([draws[place] for place in own]) for own in sizes.values()])
        return found[torch.tensor(places, device=found.device).argsort()]

    def _losses(self, draws: Sequence[Draw]) -> Tensor:
        arguments, target, weight = self.arguments(draws)
        denoiser = self.parts[self.family.denoiser]
        out = denoiser(**arguments, return_dict=False)[0]
        prediction = self.family.sign * self.family.unpack(self.pipeline, out, *target.shape[-2:])
        return weight * F.mse_loss(prediction.float(), target.float(), reduction="none").flatten(1).mean(1)

    def forward(self, picture: Tensor, seed: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """Return the loss of a batch.

        Args:
            picture: Numbers of the examples, ``(rows,)``.
            seed: Of each example's draw, ``(rows,)``.
            return_loss: Ignored; Trainer looks for an argument of this name to find out that a loss is returned.

        Returns:
            ``loss``, ``()``: the mean over the rows; in training mode, plus the weighted mean over as many class
            pictures.
        """
        draws, prior = [], []
        for index, number in zip(picture.tolist(), seed.tolist(), strict=True):
            generator = torch.Generator().manual_seed(number)
            draw = self.draw(self.examples[index], generator)
            if self.training and self.caption_dropout:
                is_dropped = float(torch.rand((), generator=generator)) < self.caption_dropout
                draw = replace(draw, prompt="" if is_dropped else draw.prompt)
            draws.append(draw)
            if self.prior and self.training:
                at = int(torch.randint(len(self.prior), (), generator=generator))
                prior.append(self.draw(self.prior[at], generator))
        losses = self.losses([*draws, *prior])
        loss = losses[: len(draws)].mean()
        if prior:
            loss = loss + self.prior_weight * losses[len(draws) :].mean()
        return {"loss": loss}


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate encoded prompts along the batch dimension; shorter ones are padded with zeros, their masks too."""
    longest = max(row.shape[1] for row in rows)
    padded = [
        row if row.shape[1] == longest else F.pad(row, (*(0, 0) * (row.ndim - 2), 0, longest - row.shape[1]))
        for row in rows
    ]
    return torch.cat(padded)
