"""The loss of labeled tokens, with logits computed at labeled positions only, for training and for measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import lengths_of
from moslora.distributed import Team, is_split, no_gradients
from moslora.tasks.text.padding import pad_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moslora.data.tokenization import Encoded

__all__ = [
    "Batch",
    "Measured",
    "example_losses",
    "labeled_loss",
    "labeled_rows",
    "logits_are_plain",
    "row_losses",
    "score_labels",
    "score_rows",
    "scores_plainly",
    "shared_losses",
    "text_batches",
    "unwrapped",
]

# Tokens in a batch whose loss is measured; the logits have at most this many times the vocabulary's entries.
LOSS_TOKENS = 1024
# The same on a GPU, which so few tokens leave idle; a batch that does not fit its memory is halved.
GPU_LOSS_TOKENS = 8192
# Labeled positions whose logits are in memory at once; more are scored in parts, and recomputed in backward.
LOGIT_ROWS = 2048

# Settings by which an architecture's logits are more than its head's product. TRL handles them all.
SCALED_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)

# The positions of a batch's examples in their set, and the model's arguments with ``labels``, ``(rows, length)``.
Batch = tuple[list[int], dict[str, "Tensor"]]
# The positions, and of each example the sum of its losses in nats and its number of tokens, ``(rows,)`` each.
Measured = tuple[list[int], "Tensor", "Tensor"]


# ---- training --------------------------------------------------------------------------------------------


def scores_plainly(trainer: Any) -> bool:
    """Tell whether the trainer's loss is plain cross entropy, and the model's logits are its head's product.

    Args:
        trainer: An ``SFTTrainer``.

    Returns:
        Whether ``labeled_loss`` gives the same value.
    """
    arguments = trainer.args
    return (
        logits_are_plain(unwrapped(trainer.model))
        and arguments.loss_type == "nll"
        and not arguments.label_smoothing_factor
        and trainer.compute_loss_func is None
    )


def unwrapped(model: Any) -> Any:
    """Return the model without PEFT's wrapper; its layers are still adapted.

    Args:
        model: A model of transformers, or PEFT's around it.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits_are_plain(model: Any) -> bool:
    """Tell whether a model's logits are its head's product and nothing more.

    Args:
        model: A causal language model of transformers.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    return head is not None and not any(getattr(config, name, None) for name in SCALED_LOGITS)


def labeled_loss(model: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood over the labeled positions, with logits computed there only.

    Args:
        model: A causal language model of transformers whose logits are its head's product.
        inputs: ``input_ids``, ``labels`` and maybe ``attention_mask`` or ``position_ids``, ``(rows, length)``.

    Returns:
        The sum in nats, and the number of tokens (at least 1).
    """
    arguments = {name: value for name, value in inputs.items() if name not in ("labels", "use_cache")}
    hidden = model.base_model(**arguments, use_cache=False).last_hidden_state  # (rows, length, d)
    return score_labels(model.get_output_embeddings(), hidden, inputs["labels"])


def score_labels(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood over the labeled positions, from the last layer's output.

    Args:
        head: The output embeddings.
        hidden: Shape ``(rows, length, d)``.
        labels: Token ids, -100 where nothing is trained, ``(rows, length)``.

    Returns:
        The sum in nats, and the number of tokens (at least 1).
    """
    targets = labels[:, 1:]
    trained = targets != -100
    total = score_rows(head, hidden[:, :-1][trained], targets[trained])
    return total, trained.sum().clamp(min=1)


def score_rows(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum the negative log-likelihood of tokens, with the logits of ``LOGIT_ROWS`` in memory at a time.

    Args:
        head: The output embeddings.
        hidden: Shape ``(tokens, d)``.
        targets: Token ids, shape ``(tokens,)``.

    Returns:
        The sum, in nats.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    parts = list(zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True))
    if len(parts) > 1 and torch.is_grad_enabled():
        # The logits of one part at a time exist, in forward and again in backward.
        return torch.stack(
            [checkpoint(_cross_entropy, head, *part, use_reentrant=False) for part in parts]
        ).sum()
    return torch.stack([_cross_entropy(head, *part) for part in parts]).sum()


def _cross_entropy(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import functional as F

    logits = head(hidden).float()  # (tokens, vocabulary)
    return F.cross_entropy(logits, targets, reduction="sum")


# ---- measuring -------------------------------------------------------------------------------------------


def text_batches(examples: Sequence[Encoded], pad_id: int, device: str = "cpu") -> Iterator[Batch]:
    """Make batches of text, examples of similar length together, at most ``LOSS_TOKENS`` tokens with padding.

    Args:
        examples: Encoded examples.
        pad_id: Token to pad short rows with.
        device: Where they are measured; on a GPU at most ``GPU_LOSS_TOKENS`` tokens.
    """
    tokens = GPU_LOSS_TOKENS if device.startswith("cuda") else LOSS_TOKENS
    for numbers in _of_similar_length(examples, tokens):
        rows = [examples[number] for number in numbers]
        yield (
            numbers,
            {
                "input_ids": pad_rows([row.input_ids for row in rows], pad_id),
                "attention_mask": pad_rows([[1] * len(row.input_ids) for row in rows], 0),
                "labels": pad_rows([row.labels for row in rows], -100),
            },
        )


def _of_similar_length(examples: Sequence[Encoded], tokens: int) -> Iterator[list[int]]:
    """Group the positions of examples of similar length, so that rows × longest row is at most ``tokens``."""
    batch: list[int] = []
    lengths = lengths_of(examples)
    for index in sorted(range(len(examples)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def example_losses(
    model: nn.Module, batches: Iterable[Batch], device: str
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Sum the negative log-likelihood of the trained tokens of each example, batch by batch.

    Args:
        model: A causal language model; it is put into evaluation mode.
        batches: The positions of each batch's examples in their set, and the model's arguments with ``labels``.
        device: Where the model is.

    Yields:
        Per batch: the positions of its examples, each one's sum in nats, and its number of tokens, on the CPU.
    """
    model.eval()
    for numbers, tensors in batches:
        arguments = {name: tensor.to(device) for name, tensor in tensors.items()}
        sums, counts = _row_losses_in_parts(model, arguments)
        yield numbers, sums.cpu(), counts.cpu()


def shared_losses(
    team: Team,
    model: nn.Module,
    batches: Iterable[Batch],
    device: str,
    progress: Any,
    raise_if_stopped: Callable[[], None],
    show: bool,
) -> list[Measured]:
    """Return what ``example_losses`` yields, in every process of a team, each having measured its share.

    Args:
        team: Who measures.
        model, batches, device: As of ``example_losses``.
        progress: Shown how many examples are done.
        raise_if_stopped: Called after each batch.
        show: Whether it is shown the mean loss of this process's own, too.
    """
    total, count = 0.0, 0

    def work(batch: Batch) -> Measured:
        (measured,) = example_losses(model, [batch], device)
        return measured

    def done(chosen: Sequence[Batch], measured: Measured | None) -> None:
        nonlocal total, count
        if measured is not None:
            total, count = total + float(measured[1].sum()), count + int(measured[2].sum())
        mean = (f"loss {total / max(count, 1):.4f}",) if show else ()
        progress.advance(sum(len(numbers) for numbers, _ in chosen), *mean)
        raise_if_stopped()

    return team.share(batches, work, done)


def _row_losses_in_parts(model: nn.Module, arguments: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``row_losses``, of half the rows at a time where a GPU's memory does not take all."""
    import torch

    labels = arguments["labels"]
    try:
        return row_losses(model, {k: v for k, v in arguments.items() if k != "labels"}, labels)
    except torch.OutOfMemoryError:
        # What has another first dimension (the pixels of several pictures to a row) cannot be cut by rows.
        # And processes that each hold a part of the model run its layers together, as often as each other.
        odd = any(len(tensor) != len(labels) for tensor in arguments.values())
        if len(labels) == 1 or odd or is_split(model):
            raise
    torch.cuda.empty_cache()
    half = len(labels) // 2
    parts = [
        {name: tensor[at] for name, tensor in arguments.items()} for at in (slice(half), slice(half, None))
    ]
    sums, counts = zip(*(_row_losses_in_parts(model, part) for part in parts), strict=True)
    return torch.cat(sums), torch.cat(counts)


def row_losses(model: nn.Module, arguments: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the negative log-likelihood of the labeled positions of each row, if possible with logits there only.

    Args:
        model: A causal language model, or PEFT's around it.
        arguments: The model's: ``input_ids``, ``attention_mask``, ``(rows, length)``, and whatever else it takes.
        labels: Token ids, -100 where nothing is trained, ``(rows, length)``.

    Returns:
        The sums in nats, float64, and the numbers of tokens, ``(rows,)`` each.
    """
    import torch
    from torch.nn import functional as F

    targets = labels[:, 1:]
    trained = targets != -100  # (rows, length - 1)
    with no_gradients(model):
        head, rows = labeled_rows(model, arguments, trained)
        parts = zip(torch.split(rows, LOGIT_ROWS), torch.split(targets[trained], LOGIT_ROWS), strict=True)
        losses = [F.cross_entropy(head(row).float(), target, reduction="none") for row, target in parts]
    sums = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
    token_losses = torch.cat(losses).double() if losses else sums[:0]  # (tokens,)
    sums.index_add_(0, trained.nonzero()[:, 0], token_losses)
    return sums, trained.sum(dim=1)


def labeled_rows(model: nn.Module, arguments: Mapping[str, Tensor], labeled: Tensor) -> tuple[Any, Tensor]:
    """Run a model, and return what its logits at labeled positions are made from.

    Args:
        model: A causal language model, or PEFT's around it.
        arguments: As for ``row_losses``.
        labeled: Where the next token is labeled, ``(rows, length - 1)``.

    Returns:
        The head, and its input at those positions, ``(tokens, d)``; where logits are more than the head's product, the
        identity and the logits, ``(tokens, vocabulary)``.
    """
    from torch import nn

    base = unwrapped(model)
    if logits_are_plain(base) and not is_split(model):  # parts are gathered where the model itself is called
        hidden = base.base_model(**arguments, use_cache=False).last_hidden_state[:, :-1]
        return base.get_output_embeddings(), hidden[labeled]
    logits = model(**arguments, use_cache=False).logits[:, :-1]
    return nn.Identity(), logits[labeled]
