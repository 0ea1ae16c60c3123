"""How noise is mixed into latents, and what a denoiser should predict from the mixture.

U-Nets (Stable Diffusion 1 and 2, SDXL) take ``√ᾱ·x + √(1 - ᾱ)·ε`` and predict ε or ``v = √ᾱ·ε - √(1 - ᾱ)·x``;
transformers trained by flow matching (SD3, FLUX, and all later ones) take ``(1 - σ)·x + σ·ε`` and predict ``ε - x``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moslora.errors import ModelError

__all__ = ["Flow", "Noising", "make_schedule"]


def make_schedule(
    scheduler: Any, is_flow: bool, density: str = "auto", snr_gamma: float | None = None
) -> Noising | Flow:
    """Make the noise schedule of a pipeline.

    Args:
        scheduler: The pipeline's.
        is_flow: Whether its denoiser is trained by flow matching.
        density: Of the timesteps: ``"uniform"``, ``"logit-normal"``, or ``"auto"``, which is logit-normal for flow
            matching and uniform otherwise.
        snr_gamma: See ``Noising``; not used by flow matching.

    Raises:
        ModelError: If the scheduler is of another kind.
    """
    if density == "auto":
        density = "logit-normal" if is_flow else "uniform"
    return Flow(scheduler, density) if is_flow else Noising(scheduler, density, snr_gamma)


def _quantile(density: str, u: Tensor) -> Tensor:
    """Turn uniform numbers from 0 to 1 into numbers from 0 to 1 of the density that timesteps are drawn from."""
    if density == "uniform":
        return u
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1))


class Noising:
    """The noise of a U-Net: a variance-preserving schedule.

    Args:
        scheduler: The pipeline's; its betas and its prediction type are used.
        density: ``"uniform"`` or ``"logit-normal"``.
        snr_gamma: Weight the loss by ``min(SNR, gamma)`` (arXiv:2303.09556); None gives all timesteps equal weight.

    Raises:
        ModelError: If the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any, density: str = "uniform", snr_gamma: float | None = None) -> None:
        from diffusers import DDPMScheduler

        config = scheduler.config
        name = type(scheduler).__name__
        if "EDM" in name or "FlowMatch" in name or "num_train_timesteps" not in config:
            raise ModelError(f"The scheduler {name} does not have a variance-preserving schedule.")
        ddpm = DDPMScheduler.from_config(config)
        self.prediction = str(ddpm.config.prediction_type)
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"prediction_type={self.prediction!r} is not supported; supported: epsilon, v_prediction."
            )
        self.alphas_cumprod: Tensor = ddpm.alphas_cumprod.float()  # ᾱ, (timesteps,)
        if self.prediction == "epsilon" and float(self.alphas_cumprod.min()) <= 0:
            raise ModelError(
                "The schedule ends at pure noise (zero terminal SNR), from which epsilon cannot be learned."
            )
        self.density, self.gamma = density, snr_gamma

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps, ``(rows,)``, of numbers ``u`` from 0 to 1."""
        count = len(self.alphas_cumprod)
        return (_quantile(self.density, u) * count).long().clamp(max=count - 1)

    def apply(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix noise into latents.

        Args:
            clean: Latents, ``(rows, channels, height, width)``.
            noise: The same shape.
            t: Timesteps, ``(rows,)``.

        Returns:
            The denoiser's input and its target, both of the latents' shape, and each row's weight, ``(rows,)``.
        """
        alpha = self.alphas_cumprod.to(clean.device)[t]  # (rows,)
        signal, share = (part.sqrt().view(-1, 1, 1, 1) for part in (alpha, 1 - alpha))
        noisy = signal * clean + share * noise
        target = noise if self.prediction == "epsilon" else signal * noise - share * clean
        weight = torch.ones_like(alpha)
        if self.gamma is not None:
            snr = alpha / (1 - alpha)
            weight = snr.clamp(max=self.gamma) / (snr if self.prediction == "epsilon" else snr + 1)
        return noisy, target, weight


class Flow:
    """The noise of flow matching: a straight line from the picture to the noise.

    Args:
        scheduler: The pipeline's; its shift of the timesteps is used.
        density: ``"uniform"`` or ``"logit-normal"``.

    Raises:
        ModelError: If the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any, density: str = "logit-normal") -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = scheduler.config
        if "FlowMatch" not in type(scheduler).__name__ and not config.get("use_flow_sigmas"):
            raise ModelError(f"The scheduler {type(scheduler).__name__} is not one for flow matching.")
        # SANA's is a multistep solver on flow matching's noise, whose shift has another name.
        shift = {"shift": config["flow_shift"]} if config.get("use_flow_sigmas") else {}
        euler = FlowMatchEulerDiscreteScheduler.from_config(config, **shift)
        self.steps: Tensor = euler.timesteps.float()  # (timesteps,), from most noise to least
        self.sigmas: Tensor = euler.sigmas[: len(self.steps)].float()  # σ, (timesteps,)
        self.density = density

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps, ``(rows,)``, of numbers ``u`` from 0 to 1."""
        count = len(self.steps)
        return self.steps[(_quantile(self.density, u) * count).long().clamp(max=count - 1)]

    def apply(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix noise into latents; arguments and results are those of ``Noising.apply``."""
        steps = self.steps.to(t.device)
        sigma = self.sigmas.to(clean.device)[(steps[None] - t[:, None]).abs().argmin(1)]  # (rows,)
        wide = sigma.view(-1, 1, 1, 1)
        return (1 - wide) * clean + wide * noise, noise - clean, torch.ones_like(sigma)
