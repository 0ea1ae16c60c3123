"""The losses of classification, each a sum over its parts: an example, a label of an example, or a tagged word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.tasks.classification.encoding import IGNORED, EncodedLabel, label_batches, pad_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

__all__ = ["element_losses", "run_batches", "trained_loss"]


def element_losses(logits: Tensor, labels: Tensor, problem: str, smoothing: float = 0.0) -> Tensor:
    """Return the loss of every part.

    Args:
        logits: ``(rows, outputs)``, or ``(rows, length, tags)`` of words.
        labels: ``(rows,)`` of classes, ``(rows, labels)`` of sets, ``(rows,)`` of numbers, ``(rows, length)`` of words.
        problem: Which of these it is.
        smoothing: Of cross entropy's labels.

    Returns:
        In nats, or squared units of the numbers; of the labels' shape, 0 where a token is not scored.
    """
    from torch.nn import functional as F

    logits = logits.float()
    if problem == "regression":
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
    if problem == "multi-label":
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction="none",
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    return flat.reshape(labels.shape)


def trained_loss(outputs: Any, labels: Tensor, problem: str, smoothing: float, count: Any = None) -> Tensor:
    """Return the loss of a step's batch, as transformers' trainer wants it.

    Args:
        outputs: The model's, with ``logits``.
        labels, problem, smoothing: As for ``element_losses``.
        count: Parts in all batches of the step; None for those of this one.

    Returns:
        The sum of the losses over ``count``.
    """
    losses = element_losses(outputs.logits, labels, problem, smoothing)
    scored = (labels != IGNORED).sum() if problem == "tokens" else labels.numel()
    return losses.sum() / (scored if count is None else count)


def run_batches(
    model: nn.Module, examples: Sequence[EncodedLabel], problem: str, pad_id: int, device: str
) -> Iterator[tuple[list[int], list[tuple[float, int, Any]]]]:
    """Run a model on examples, batch by batch.

    Args:
        model: Base or adapted model; it is put into evaluation mode.
        examples: Encoded examples.
        problem: Which kind of labels it is.
        pad_id: Token to pad with.
        device: Where the model is.

    Yields:
        The positions of a batch's examples; and of each the sum of its losses, of how many, and what was predicted: a
        class, a list of labels, a number, or a tag for each scored word.
    """
    import torch

    model.eval()
    for numbers in label_batches(examples):
        rows = [examples[number] for number in numbers]
        arguments = pad_batch(
            [{"input_ids": r.input_ids, "token_type_ids": r.token_type_ids, "labels": r.label} for r in rows],
            pad_id,
            problem,
        )
        arguments = {name: tensor.to(device) for name, tensor in arguments.items()}
        labels = arguments.pop("labels")
        with torch.inference_mode():
            logits = model(**arguments).logits
        losses = element_losses(logits, labels, problem).double().cpu()
        logits, scored = logits.float().cpu(), (labels != IGNORED).cpu()
        found: list[tuple[float, int, Any]] = []
        for index, row in enumerate(rows):
            own = losses[index]
            parts = int(scored[index].sum()) if problem == "tokens" else own.numel()
            found.append((float(own.sum()), parts, _prediction(logits[index], row, problem)))
        yield numbers, found


def _prediction(logits: Tensor, row: EncodedLabel, problem: str) -> Any:
    """Return what a model predicts of an example, ready for JSON."""
    if problem == "regression":
        return float(logits.reshape(-1)[0])
    if problem == "multi-label":
        return [index for index, logit in enumerate(logits.tolist()) if logit > 0]
    if problem == "tokens":
        return [int(logits[position].argmax()) for position in row.heads]
    return int(logits.argmax())
