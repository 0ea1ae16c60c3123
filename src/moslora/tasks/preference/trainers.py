"""TRL's trainers of preferences, given encoded rows. Imported inside functions: it imports TRL.

The rows hold what ``Encoder`` found to be the answer's own tokens; TRL's tokenization is left out. Losses, metrics,
checkpoints and resumption are TRL's and transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError
from moslora.patterns import check_patterns
from moslora.tasks.preference.collating import COLLATE, Row, Rows
from moslora.tasks.text.precision import train_in_float32

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import TrainerCallback

__all__ = ["build_preference_trainer", "why_no_reference"]

# Starts with which PEFT's own LoRA takes something out of the base weight, so that the adapter off is not the base.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def build_preference_trainer(
    trainer: str,
    model: nn.Module,
    config: Any,
    tokenizer: Any,
    adapter: PeftConfig | None,
    callbacks: Sequence[TrainerCallback],
    train_rows: Sequence[Row],
    heldout_rows: Sequence[Row] | None,
    pad_id: int,
) -> Any:
    """Make the trainer; it puts the adapter into the model, whose trained parameters are then in float32.

    Args:
        trainer: Of ``LOSSES``.
        model: The base model.
        config: TRL's configuration of that trainer.
        tokenizer: The model's.
        adapter: The adapter's configuration.
        callbacks: Callbacks of the trainer.
        train_rows: What it trains on.
        heldout_rows: What it evaluates on during training, if anything.
        pad_id: Token to pad short rows with.

    Raises:
        UsageError: If there is no adapter, or one whose start changes the base: then there is no reference.
    """
    reason = why_no_reference(adapter)
    if adapter is None or reason:
        raise UsageError(f"task=preference cannot train this: {reason}")
    check_patterns(vars(adapter), (name for name, _ in model.named_modules()), "The configuration")
    evaluates = heldout_rows is not None
    made: Any = _find(trainer)(
        model=model,
        args=config,
        data_collator=functools.partial(COLLATE[trainer], pad_id),
        train_dataset=_dataset(trainer, train_rows),
        eval_dataset=_dataset(trainer, heldout_rows) if evaluates and heldout_rows is not None else None,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=list(callbacks),
    )
    from moslora.compat.trl import PREFERENCE_FIELDS

    train_in_float32(made.model, PREFERENCE_FIELDS)
    return made


def why_no_reference(adapter: PeftConfig | None) -> str:
    """Return why a model with its adapter off is not its base, which the reference has to be; empty if it is.

    Args:
        adapter: The adapter's configuration; None where all weights are trained.
    """
    from moslora.tuner.config import MoSLoRAConfig

    if adapter is None:
        return "full fine-tuning overwrites the base, which is the reference. Leave it out."
    start = str(getattr(adapter, "init_lora_weights", ""))
    if not isinstance(adapter, MoSLoRAConfig) and start.startswith(CHANGE_THE_BASE):
        return (
            f"PEFT's LoRA with init_lora_weights={start} takes its start out of the base weights, so that with the "
            "adapter off the model is not the base, which is the reference. With moslora's adapters the base stays as "
            "it is: adapter.init_lora_weights=pissa or olora."
        )
    return ""


def _find(trainer: str) -> Any:
    from moslora.compat.trl import find_experimental, with_rows_as_given

    if trainer in ("cpo", "orpo"):
        return find_experimental(f"trl.experimental.{trainer}", f"{trainer.upper()}Trainer")
    import trl

    return with_rows_as_given(getattr(trl, f"{trainer.upper()}Trainer"))


def _dataset(trainer: str, rows: Sequence[Row]) -> Any:
    if trainer in ("cpo", "orpo"):
        return Rows(rows)
    from datasets import Dataset

    return Dataset.from_list(list(rows))
