"""Generated answers, for text, for pictures and for commonsense questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.distributed import Team, is_split, no_gradients
from moslora.tasks.text.padding import pad_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Generation", "generate", "generate_from_prompts"]


@dataclass(frozen=True)
class Generation:
    """How answers are generated: without sampling.

    Attributes:
        max_new_tokens: Tokens at most.
        stop_ids: Tokens that end an answer.
        pad_id: Token to pad short rows with.
        beams: Beams of the search; None for greedy decoding.
    """

    max_new_tokens: int
    stop_ids: int | Sequence[int] | None
    pad_id: int
    beams: int | None = None


def generate(
    model: nn.Module, tokenizer: Any, inputs: Mapping[str, Tensor], settings: Generation, device: str
) -> list[str]:
    """Generate answers to one batch.

    Args:
        model: A causal language model; it is put into evaluation mode.
        tokenizer: The model's.
        inputs: The model's arguments: ``input_ids`` and ``attention_mask``, ``(rows, length)``, prompts padded on the
            left, and whatever else it takes.
        settings: How to generate.
        device: Where the model is.

    Returns:
        The answers' texts without special tokens; outer white space is not removed.
    """
    from transformers import GenerationConfig

    model.eval()
    options: dict[str, Any] = {} if settings.beams is None else {"num_beams": settings.beams}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=settings.stop_ids,
        pad_token_id=settings.pad_id,
        **options,
    )
    arguments = {name: tensor.to(device) for name, tensor in inputs.items()}
    with no_gradients(model):
        output = model.generate(**arguments, generation_config=config)  # type: ignore[operator]
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]


def generate_from_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    device: str,
    batch_size: int,
    on_batch: Callable[[int], None],
    team: Team | None = None,
) -> list[str]:
    """Generate an answer to each prompt, prompts of similar length together.

    Args:
        model: A causal language model; it is put into evaluation mode.
        tokenizer: The model's.
        prompts: Token ids, one list each.
        settings: How to generate.
        device: Where the model is.
        batch_size: Prompts per batch.
        on_batch: Called after each batch with its number of prompts; of several processes, after each has had one.
        team: The processes that share the prompts out; this one alone if None.

    Returns:
        The answers' texts in the order of ``prompts``, as ``generate`` returns them.
    """
    import torch

    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def answer(numbers: Sequence[int]) -> list[str]:
        """Answer the prompts of these numbers; those of half of them at a time where memory does not take all."""
        chosen = [prompts[number] for number in numbers]
        inputs = {
            "input_ids": pad_rows(chosen, settings.pad_id, left=True),
            "attention_mask": pad_rows([[1] * len(prompt) for prompt in chosen], 0, left=True),
        }
        try:
            return generate(model, tokenizer, inputs, settings, device)
        except torch.OutOfMemoryError:
            # Processes that each hold a part of the model run its layers together, as often as each other.
            if len(numbers) == 1 or is_split(model):
                raise
        torch.cuda.empty_cache()
        half = len(numbers) // 2
        return [*answer(numbers[:half]), *answer(numbers[half:])]

    def done(chosen: Sequence[Sequence[int]], _: Any) -> None:
        on_batch(sum(map(len, chosen)))

    answers = (team or Team()).share(batches, answer, done)
    for numbers, found in zip(batches, answers, strict=True):
        for number, text in zip(numbers, found, strict=True):
            texts[number] = text
    return texts
