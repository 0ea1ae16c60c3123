"""Inputs for the reload proof: what the trained models take, by the names of the models and their arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.randomness import seed_of

if TYPE_CHECKING:
    from torch import Tensor

    from moslora.tasks.image.denoising import Denoising

__all__ = ["probe_denoiser", "probe_text_encoders"]

PICTURES = 2  # whose noised latents the proof compares
LEVELS = 3  # of noise, for each picture


def probe_denoiser(model: Denoising, examples: Sequence[int], seed: int) -> list[dict[str, Tensor]]:
    """Return arguments of the denoiser, for noised pictures.

    Args:
        model: The trained model.
        examples: Which of its examples; the first few are used.
        seed: Of the noise.

    Returns:
        Tensors by names such as ``unet.sample``, once for each picture and level of noise.
    """
    import torch

    inputs = []
    for index in list(examples)[:PICTURES]:
        for k in range(LEVELS):
            generator = torch.Generator().manual_seed(seed_of("probe", seed, index, k))
            draw = model.draw(model.examples[index], generator, (k, LEVELS))
            with torch.no_grad():
                arguments, _, _ = model.arguments([draw])
            inputs.append(_flat(arguments, model.family.denoiser))
    return inputs


def probe_text_encoders(pipeline: Any, names: Sequence[str], prompt: str) -> list[dict[str, Tensor]]:
    """Return arguments of text encoders, for a prompt.

    Args:
        pipeline: With their tokenizers.
        names: Of the text encoders, as ``text_encoder_2``.
        prompt: The prompt.

    Returns:
        Token ids ``(1, length)`` by a name such as ``text_encoder_2.input_ids``, once for each.
    """
    inputs: list[dict[str, Tensor]] = []
    for name in names:
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        ids = tokenizer(
            prompt,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        inputs.append({f"{name}.input_ids": ids})
    return inputs


def _flat(arguments: Mapping[Any, Any], prefix: str) -> dict[str, Tensor]:
    """Return nested arguments as one mapping, with dotted names; lists by number, and numbers as tensors."""
    import torch

    flat: dict[str, Tensor] = {}
    for name, value in arguments.items():
        key = f"{prefix}.{name}"
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        if isinstance(value, int):
            value = torch.tensor(value)
        flat |= _flat(value, key) if isinstance(value, Mapping) else {key: value}
    return flat
