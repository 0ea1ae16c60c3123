"""TRL's trainer of reward models. Imported inside functions: it imports TRL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trl import RewardTrainer

from moslora.tasks.reward.encoding import EncodedPair

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainerCallback

__all__ = ["build_reward_trainer"]


def build_reward_trainer(
    model: Any,
    config: Any,
    tokenizer: Any,
    callbacks: Sequence[TrainerCallback],
    train_set: Sequence[EncodedPair],
    heldout_set: Sequence[EncodedPair] | None,
) -> RewardTrainer:
    """Make the trainer.

    Args:
        model: With its adapter, and one output.
        config: TRL's ``RewardConfig``.
        tokenizer: The model's.
        callbacks: Callbacks of the trainer.
        train_set: What it trains on.
        heldout_set: What it evaluates on during training, if anything.
    """
    config.max_length = None  # the encoder has applied it, and the trainer would drop rows without a word
    if config.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return RewardTrainer(
        model=model,
        args=config,
        train_dataset=_as_dataset(train_set),
        eval_dataset=None if heldout_set is None else _as_dataset(heldout_set),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def _as_dataset(pairs: Sequence[EncodedPair]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "chosen_ids": [pair.chosen_ids for pair in pairs],
            "rejected_ids": [pair.rejected_ids for pair in pairs],
        }
    )
