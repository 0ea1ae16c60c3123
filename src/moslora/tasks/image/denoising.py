"""What a diffusion pipeline learns: noise on pictures in latent space, and the loss of taking it away again.

U-Nets (Stable Diffusion 1 and 2, SDXL) see ``√ᾱ·x + √(1 - ᾱ)·ε`` and predict ε or ``v = √ᾱ·ε - √(1 - ᾱ)·x``;
transformers of flow matching (SD3, FLUX) see ``(1 - σ)·x + σ·ε`` and predict ``ε - x``. The loss is the mean squared
error of the prediction. Everything random about an example comes from one number, its seed: the same run is the same
noise, however its examples are divided into batches, accumulation and processes, and wherever it was resumed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = [
    "FAMILIES",
    "Denoising",
    "Draw",
    "Family",
    "Flow",
    "Noising",
    "Shot",
    "decode",
    "encode",
    "seed_of",
]


def seed_of(*parts: Any) -> int:
    """Return a number, below 2⁶³, that stands for what it is made of."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- How much noise -----------------------------------------------------------------------------------------


def _quantile(density: str, u: Tensor) -> Tensor:
    """Turn a uniform number into one of the density that timesteps are drawn from."""
    if density == "uniform":
        return u
    return torch.sigmoid(math.sqrt(2) * torch.erfinv(2 * u - 1))


class Noising:
    """The noise of a U-Net: a variance-preserving schedule.

    Args:
        scheduler: The pipeline's; its betas and what it takes a prediction for are what counts.
        density: ``"uniform"`` or ``"logit-normal"``.
        snr_gamma: Weigh by ``min(SNR, gamma)`` (arXiv:2303.09556); None weighs all timesteps alike.

    Raises:
        ValueError: If the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any, density: str = "uniform", snr_gamma: float | None = None) -> None:
        from diffusers import DDPMScheduler

        config = scheduler.config
        name = type(scheduler).__name__
        if "EDM" in name or "FlowMatch" in name or "num_train_timesteps" not in config:
            raise ValueError(f"The scheduler {name} is none of a variance-preserving schedule.")
        own = DDPMScheduler.from_config(config)
        self.prediction = str(own.config.prediction_type)
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction_type={self.prediction!r} is not trained; epsilon and v_prediction are."
            )
        self.kept: Tensor = own.alphas_cumprod.float()  # ᾱ, (timesteps,)
        if self.prediction == "epsilon" and float(self.kept.min()) <= 0:
            raise ValueError("The schedule ends at pure noise, from which noise cannot be predicted.")
        self.density, self.gamma = density, snr_gamma

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps, ``(rows,)``, of numbers ``u`` from 0 to 1."""
        count = len(self.kept)
        return (_quantile(self.density, u) * count).long().clamp(max=count - 1)

    def apply(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the model sees and what it should predict, ``(rows, …)``, and each row's weight, ``(rows,)``."""
        kept = self.kept.to(clean.device)[t]  # (rows,)
        signal, share = (part.sqrt().view(-1, 1, 1, 1) for part in (kept, 1 - kept))
        noisy = signal * clean + share * noise
        target = noise if self.prediction == "epsilon" else signal * noise - share * clean
        weight = torch.ones_like(kept)
        if self.gamma is not None:
            snr = kept / (1 - kept)
            weight = snr.clamp(max=self.gamma) / (snr if self.prediction == "epsilon" else snr + 1)
        return noisy, target, weight


class Flow:
    """The noise of flow matching: a straight line from picture to noise.

    Args:
        scheduler: The pipeline's, whose shift of the timesteps is kept.
        density: ``"uniform"`` or ``"logit-normal"``.

    Raises:
        ValueError: If the scheduler is of another kind.
    """

    def __init__(self, scheduler: Any, density: str = "logit-normal") -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        if "FlowMatch" not in type(scheduler).__name__:
            raise ValueError(f"The scheduler {type(scheduler).__name__} is none of flow matching.")
        own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.steps: Tensor = own.timesteps.float()  # (timesteps,), from most noise to least
        self.share: Tensor = own.sigmas[: len(self.steps)].float()  # σ, (timesteps,)
        self.density = density

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the timesteps, ``(rows,)``, of numbers ``u`` from 0 to 1."""
        return self.steps[self._places(u)]

    def _places(self, u: Tensor) -> Tensor:
        count = len(self.steps)
        return (_quantile(self.density, u) * count).long().clamp(max=count - 1)

    def apply(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the model sees and what it should predict, ``(rows, …)``, and each row's weight, ``(rows,)``."""
        steps = self.steps.to(t.device)
        share = self.share.to(clean.device)[(steps[None] - t[:, None]).abs().argmin(1)]  # (rows,)
        wide = share.view(-1, 1, 1, 1)
        return (1 - wide) * clean + wide * noise, noise - clean, torch.ones_like(share)


# --- Families -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What is particular about a kind of pipeline.

    Attributes:
        title: What people call it.
        denoiser: Name of the model that is trained.
        is_flow: Whether it is of flow matching.
        clips: Its text encoders of CLIP's kind, which can be adapted.
        words: Encodes prompts, with the pipeline's own code: tensors of one row per prompt. Its last argument is how
            long T5's are, in tokens; None is the pipeline's own length.
        arguments: The denoiser's, of noisy latents ``(rows, channels, height, width)``, timesteps ``(rows,)``, words
            and sizes ``(rows, 6)``.
        t5: Name of T5's tokenizer and how many tokens the pipeline takes of it; None without one.
        unpack: Brings the prediction back to the form of latents ``(rows, channels, height, width)``.
    """

    title: str
    denoiser: str
    is_flow: bool
    clips: tuple[str, ...]
    words: Callable[[Any, list[str], int | None], dict[str, Tensor]]
    arguments: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor], Tensor], dict[str, Any]]
    unpack: Callable[[Any, Tensor, int, int], Tensor] = lambda pipeline, out, height, width: out
    t5: tuple[str, int] | None = None


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
    rows, channels, height, width = noisy.shape
    embeds = words["prompt_embeds"]
    ids = pipeline._prepare_latent_image_ids(rows, height // 2, width // 2, noisy.device, noisy.dtype)
    found = {
        "hidden_states": pipeline._pack_latents(noisy, rows, channels, height, width),
        "timestep": t.to(noisy.dtype) / 1000,
        "encoder_hidden_states": embeds,
        "pooled_projections": words["pooled_prompt_embeds"],
        "img_ids": ids,
        "txt_ids": torch.zeros(embeds.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
    }
    if pipeline.transformer.config.guidance_embeds:
        # Distilled models are trained on at the guidance of 1, as diffusers' own script does.
        found["guidance"] = torch.ones(rows, device=noisy.device, dtype=torch.float32)
    return found


def _unpack_flux(pipeline: Any, out: Tensor, height: int, width: int) -> Tensor:
    factor = pipeline.vae_scale_factor
    found: Tensor = pipeline._unpack_latents(out, height * factor, width * factor, factor)
    return found


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


# --- Pictures and latents -----------------------------------------------------------------------------------


def _statistics(vae: Any, latents: Tensor) -> tuple[Any, Any]:
    """Return what is subtracted from latents, and what they are then multiplied by."""
    config = vae.config
    scale = config.scaling_factor
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            torch.tensor(v, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, scale / std
    return getattr(config, "shift_factor", None) or 0.0, scale


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a picture.

    Args:
        vae: The pipeline's.
        pixels: From -1 to 1, ``(3, height, width)``.

    Returns:
        Mean and standard deviation of its latents, as the denoiser knows them, float32 on the CPU,
        ``(channels, height / 8, width / 8)`` each.
    """
    found = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
    shift, scale = _statistics(vae, found.mean)
    mean, std = (found.mean - shift) * scale, found.std * scale
    return mean[0].float().cpu(), std[0].float().cpu()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Any:
    """Decode one picture's latents ``(1, channels, height, width)`` into a PIL image."""
    from PIL import Image

    latents = latents.to(vae.device, vae.dtype)
    shift, scale = _statistics(vae, latents)
    pixels = vae.decode(latents / scale + shift).sample[0].float().cpu()  # (3, height, width)
    if not torch.isfinite(pixels).all():
        raise ValueError("The pipeline made a picture of NaN or infinite values.")
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy(), "RGB")


# --- The loss -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """One square of a picture, ready to be learned.

    Attributes:
        mean, std: Of its latents, ``(channels, height, width)``, float32 on the CPU.
        sizes: The picture's height and width, top and left of the square, height and width of the square: ``(6,)``.
    """

    mean: Tensor
    std: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Draw:
    """What chance made of an example.

    Attributes:
        clean: Its latents, ``(channels, height, width)``.
        noise: What is mixed into them, the same shape.
        u: How far, from 0 to 1: a quantile of the timesteps' density, ``()``.
        sizes: Its shot's.
        prompt: Its words.
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
        noise_offset: How much noise is shared by all pixels of a channel.
        prior_weight: Weight of the class's pictures in the loss.
        tokens: How long T5's words are; None is the pipeline's own length.
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
    ) -> None:
        super().__init__()
        self.pipeline, self.family, self.schedule = pipeline, family, schedule
        self.dtype, self.noise_offset, self.prior_weight = dtype, noise_offset, prior_weight
        self.tokens = tokens
        self.parts = nn.ModuleDict({family.denoiser: getattr(pipeline, family.denoiser)})
        self.examples: list[tuple[list[Shot], str]] = []  # shots and words of each picture
        self.prior: list[tuple[list[Shot], str]] = []  # the same of the class's
        self.known: dict[str, dict[str, Tensor]] = {}  # encoded words, where their encoders are frozen

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.parts[self.family.denoiser].parameters()).device

    def adapt(self, configs: Mapping[str, PeftConfig]) -> None:
        """Put adapters into models of the pipeline, in place.

        Args:
            configs: By model, its adapter.
        """
        from peft import get_peft_model

        for name, config in configs.items():
            self.parts[name] = get_peft_model(getattr(self.pipeline, name), config)
        if any(name in self.family.clips for name in configs):
            self.known.clear()

    def save_pretrained(self, folder: Any) -> None:
        """Save the adapters natively, one directory for each model."""
        from pathlib import Path

        for name, part in self.parts.items():
            # No vocabulary has been resized; PEFT would look for the base's to find out.
            part.save_pretrained(Path(folder) / name, save_embedding_layers=False)  # type: ignore[operator]

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Compute the denoiser's activations again in backward."""
        getattr(self.pipeline, self.family.denoiser).enable_gradient_checkpointing()

    @torch.no_grad()
    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts once; call it only where the text encoders are frozen."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.known:
                words = self.family.words(self.pipeline, [prompt], self.tokens)
                self.known[prompt] = {name: tensor.cpu() for name, tensor in words.items()}

    def words(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return encoded words, one row per prompt."""
        if not self.known:
            return self.family.words(self.pipeline, prompts, self.tokens)
        return {
            name: torch.cat([self.known[prompt][name] for prompt in prompts]).to(self.device)
            for name in self.known[prompts[0]]
        }

    def draw(
        self,
        example: tuple[list[Shot], str],
        generator: torch.Generator,
        stratum: tuple[int, int] | None = None,
    ) -> Draw:
        """Let chance make something of an example.

        Args:
            example: Shots of a picture, and its words.
            generator: On the CPU; all randomness is its.
            stratum: ``(k, n)``: shot and timestep are the k-th of n, instead of random ones.

        Returns:
            What came out.
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
        """Return the denoiser's arguments, its target ``(rows, …)`` and the weights ``(rows,)``."""
        clean, noise, u, sizes = (
            torch.stack([getattr(d, name) for d in draws]) for name in ("clean", "noise", "u", "sizes")
        )
        t = self.schedule.timesteps(u).to(self.device)
        noisy, target, weight = self.schedule.apply(clean.to(self.device), noise.to(self.device), t)
        words = self.words([d.prompt for d in draws])
        given = self.family.arguments(self.pipeline, noisy.to(self.dtype), t, words, sizes.to(self.device))
        return given, target, weight

    def losses(self, draws: Sequence[Draw]) -> Tensor:
        """Return each example's weighted squared error, float32, ``(rows,)``."""
        given, target, weight = self.arguments(draws)
        denoiser = self.parts[self.family.denoiser]
        out = denoiser(**given, return_dict=False)[0]
        found = self.family.unpack(self.pipeline, out, *target.shape[-2:])
        return weight * F.mse_loss(found.float(), target.float(), reduction="none").flatten(1).mean(1)

    def forward(self, picture: Tensor, seed: Tensor, return_loss: bool = True) -> dict[str, Tensor]:
        """Return the loss of a batch.

        Args:
            picture: Which examples, ``(rows,)``.
            seed: Of each example's chance, ``(rows,)``.
            return_loss: Always done; its name tells the trainer so.

        Returns:
            ``loss``, ``()``: the mean over the rows, plus the weighted mean over as many of the class's pictures.
        """
        draws, prior = [], []
        for index, number in zip(picture.tolist(), seed.tolist(), strict=True):
            generator = torch.Generator().manual_seed(number)
            draws.append(self.draw(self.examples[index], generator))
            if self.prior and self.training:
                at = int(torch.randint(len(self.prior), (), generator=generator))
                prior.append(self.draw(self.prior[at], generator))
        losses = self.losses([*draws, *prior])
        loss = losses[: len(draws)].mean()
        if prior:
            loss = loss + self.prior_weight * losses[len(draws) :].mean()
        return {"loss": loss}
