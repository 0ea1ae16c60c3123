"""transformers' trainer for classification. Imported inside functions: it imports transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from moslora.tasks.classification.encoding import EncodedLabel, pad_batch
from moslora.tasks.classification.losses import trained_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

__all__ = ["build_classification_trainer"]


def build_classification_trainer(
    model: Any,
    config: Any,
    tokenizer: Any,
    problem: str,
    pad_id: int,
    callbacks: Sequence[TrainerCallback],
    train_set: Sequence[EncodedLabel],
    heldout_set: Sequence[EncodedLabel] | None,
) -> Trainer:
    """Make the trainer.

    The loss is computed here, and not by the model: transformers' models ignore how many examples a step has in all,
    and sums of several batches would come out too large for numbers and sets of labels.

    Args:
        model: With its adapter.
        config: The trainer's arguments.
        tokenizer: The model's.
        problem: Which kind of labels it is.
        pad_id: Token to pad with.
        callbacks: Callbacks of the trainer.
        train_set: What it trains on.
        heldout_set: What it evaluates on during training, if anything.
    """
    config.remove_unused_columns, config.label_names = False, ["labels"]
    smoothing = config.label_smoothing_factor

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return trained_loss(outputs, labels, problem, smoothing, num_items_in_batch)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return pad_batch(rows, pad_id, problem)

    if config.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return Trainer(
        model=model,
        args=config,
        data_collator=collate,
        train_dataset=_as_dataset(train_set),
        eval_dataset=None if heldout_set is None else _as_dataset(heldout_set),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_loss_func=loss,
    )


def _as_dataset(examples: Sequence[EncodedLabel]) -> Dataset:
    from datasets import Dataset

    columns: dict[str, Any] = {
        "input_ids": [example.input_ids for example in examples],
        "labels": [example.label for example in examples],
    }
    if examples[0].token_type_ids is not None:
        columns["token_type_ids"] = [example.token_type_ids for example in examples]
    return Dataset.from_dict(columns)
