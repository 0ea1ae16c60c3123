"""Rows of different length in one batch: padded, or concatenated (padding-free) where that is exact and cheaper."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.wording import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moslora.display import Display

__all__ = ["choose_padding_free", "pad_rows", "padding_cost", "why_rows_mix"]

# How many experts a token meets, and how many there are, in the configurations of transformers.
CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Padding-free batches may change a row's logits by rounding only: relative to the largest logit.
SAME_LOGITS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def pad_rows(rows: Sequence[Sequence[int]], filler: int, left: bool = False) -> Tensor:
    """Return rows of numbers as one tensor.

    Args:
        rows: At least one row.
        filler: What short rows are padded with.
        left: Whether they are padded on the left, as for generation.

    Returns:
        Shape ``(rows, length of the longest)``.
    """
    import torch

    length = max(map(len, rows))
    padded = torch.full((len(rows), length), filler, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        padded[number, place] = torch.tensor(list(row), dtype=torch.long)
    return padded


def choose_padding_free(
    model: nn.Module, config: Any, lengths: Sequence[int], pad_id: int, seed: int, display: Display
) -> bool:
    """Decide whether batches are padding-free, and show what was decided and why.

    Args:
        model: A causal language model of transformers.
        config: The trainer's configuration.
        lengths: Tokens of each training example.
        pad_id: Token to pad short rows with.
        seed: Decides which examples are in one batch.
        display: Where to show it.
    """
    rows = config.per_device_train_batch_size
    if rows == 1:
        return False  # nothing to pad
    if attention_of(model) == "eager":
        # It writes the weights of all pairs of a batch's tokens, for every head.
        display.say(
            "Padded batches are used: with eager attention, padding-free ones take memory with the square of all "
            "tokens."
        )
        return False
    saved = padding_cost(model, lengths, rows, seed)
    if saved <= 1:
        display.say(
            "Padded batches are used: in padding-free batches attention would cost more than padding does "
            f"({saved:.2f} times)."
        )
        return False
    reason = why_rows_mix(model, pad_id)
    if reason:
        display.warn(f"Padded batches are used, which cost about {saved:.2f} times the work: {reason}")
        return False
    display.say(
        f"Padding-free batches are used (examples concatenated); padding would cost {saved:.2f} times the work. "
        "Checked on this model: no example influences another. Set trainer.padding_free=false to pad instead."
    )
    return True


def padding_cost(model: nn.Module, lengths: Sequence[int], rows: int, seed: int) -> float:
    """Estimate how much more work padded batches are than padding-free ones.

    In padding-free batches dense attention computes all pairs of a batch's tokens; in padded ones, all pairs of the
    longest row, for each row.

    Args:
        model: A causal language model of transformers.
        lengths: Tokens of each example.
        rows: Examples per batch.
        seed: Decides which examples are in one batch.

    Returns:
        The ratio; below 1, padding is cheaper.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    per_token = _weights_per_token(model, config)
    implementation = attention_of(model)
    per_pair = 2 * config.num_hidden_layers * config.hidden_size
    order = random.Random(seed).sample(list(lengths), len(lengths))
    padded = concatenated = 0
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        padded += len(batch) * (max(batch) * per_token + max(batch) ** 2 * per_pair)
        # Flash attention knows where rows begin, and computes no pairs across rows.
        pairs = sum(n * n for n in batch) if "flash" in implementation else sum(batch) ** 2
        concatenated += sum(batch) * per_token + pairs * per_pair
    return padded / max(concatenated, 1)


def attention_of(model: Any) -> str:
    """Return how a model computes attention, as transformers calls it; empty if it does not say.

    Args:
        model: A model of transformers.
    """
    return str(getattr(model.config.get_text_config(), "_attn_implementation", None) or "")


def _weights_per_token(model: Any, config: Any) -> float:
    """Return how many weights each token is multiplied with, embeddings and head aside."""
    apart = {id(p) for p in (*model.get_input_embeddings().parameters(), *_head_parameters(model))}
    chosen, there = (_first(config, names) for names in (CHOSEN_EXPERTS, EXPERTS))
    share = chosen / there if chosen and there else 1.0
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in apart:
            total += _count(parameter) * (share if ".experts." in f".{name}." else 1.0)
    return total


def _count(parameter: Any) -> int:
    """Return how many weights a parameter has; bitsandbytes packs two of 4 bits into a byte."""
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None)
    return math.prod(shape) if shape is not None else int(parameter.numel())


def _first(config: Any, names: Sequence[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _head_parameters(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [] if head is None else list(head.parameters())


def why_rows_mix(model: Any, pad_id: int) -> str | None:
    """Check by running the model whether padding-free batches give each row the logits that it has alone.

    Architectures without position ids, with state-space layers or with convolutions over tokens carry one row into the
    next. There is no list of names; the model itself is run: the first row must not change the second, and the second
    must have the logits that it has alone.

    Args:
        model: A causal language model of transformers.
        pad_id: As for the trainer's collator.

    Returns:
        None if the rows are independent; otherwise what was observed, a sentence.
    """
    import torch

    from moslora.compat.trl import collate_padding_free

    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(size, (n,), generator=generator).tolist() for n in (7, 7, 9))
    device = next(model.parameters()).device
    was_training = model.training

    def logits_of(*rows: list[int]) -> Tensor:
        batch = collate_padding_free([{"input_ids": row} for row in rows], pad_id)
        arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items() if k != "labels"}
        logits: Tensor = model(**arguments, use_cache=False).logits[0]
        return logits

    model.eval()
    try:
        with torch.inference_mode():
            # A row before and a row behind: what is behind may not leak either.
            one = logits_of(first, second, other)[7:16].float()
            two = logits_of(other, second, first)[7:16].float()
            ids = torch.tensor([second], device=device)
            alone = model(input_ids=ids, use_cache=False).logits[0].float()
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError, KeyError) as error:
        return (
            "this architecture does not support padding-free batches "
            f"({type(error).__name__}: {first_line(error)})."
        )
    finally:
        model.train(was_training)
    largest = alone.abs().max().clamp_min(1e-30)
    by_neighbor = float((one - two).abs().max() / largest)
    against_alone = float((one - alone).abs().max() / largest)
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    allowed = SAME_LOGITS.get(name, SAME_LOGITS["bfloat16"])
    # Shapes and row are the same: only the order of sums in shared work, such as experts', may differ.
    if not by_neighbor <= allowed / 10 or not against_alone <= allowed:
        return (
            "in padding-free batches one row changes the next in this architecture (logits by "
            f"{by_neighbor:.1e}; compared with the row alone {against_alone:.1e})."
        )
    return None
