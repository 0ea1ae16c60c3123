"""Functions of TRL that are not in its public interface, each with its reason. Seen in TRL 1.16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["collate_padding_free", "fuse_head_in_float32"]

# The fields that SFTTrainer reads from the fused head's output.
TRAINER_FIELDS = ("log_probs", "entropy", "is_top1")


def fuse_head_in_float32(model: nn.Module) -> None:
    """Replace the forward of TRL's fused head by one that computes the head's product in float32.

    Seen in trl 1.16.

    ``SFTTrainer`` adds the fused head to the base model, before PEFT wraps it; the head's weight is float32 only later.
    The fused head reads that weight directly, so the module's hooks do not convert its inputs.

    - Private: ``trl.trainer.utils.add_fused_lm_head``; it assigns ``model.forward``.
    - Without it: training a head in full on a base of lower precision fails with a dtype mismatch, wherever TRL's own
      loss is used (GPUs, ``loss_type`` other than ``nll``).
    - Can go: when TRL's fused head converts its inputs to the weight's dtype.

    Args:
        model: The base model inside PEFT's wrapper; changed in place.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=TRAINER_FIELDS)


def collate_padding_free(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """Make a padding-free batch, as ``SFTTrainer`` does.

    Seen in trl 1.16.

    - Private: ``trl.trainer.sft_trainer.DataCollatorForLanguageModeling``, which is not exported by ``trl``.
    - Without it: the check whether padding-free batches are exact would check other batches than those trained on.
    - Can go: when TRL exports the collator.

    Args:
        rows: Each with ``input_ids``.
        pad_id: Token to pad with; unused in padding-free batches.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)
    batch: dict[str, Any] = collate(list(rows))
    return batch
