"""Functions of TRL that are not in its public interface, each with its reason. Seen in TRL 1.16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["collate_padding_free", "find_experimental", "fuse_head_in_float32", "with_rows_as_given"]

# The fields that SFTTrainer reads from the fused head's output, and those of its trainers of preferences.
TRAINER_FIELDS = ("log_probs", "entropy", "is_top1")
PREFERENCE_FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def find_experimental(module: str, name: str) -> Any:
    """Return a name of ``trl.experimental``, without the warning that its import gives.

    Seen in trl 1.16.

    - Unstable: ``trl.experimental.cpo`` and ``.orpo``, whose classes TRL may change without notice.
    - Without it: no ORPO, CPO and SimPO; and every run of theirs begins with a warning that the user can do nothing
      about. ``tests/test_preference.py`` trains with each.
    - Can go: when TRL has them among its own trainers.

    Args:
        module: ``trl.experimental.cpo`` or another.
        name: What is wanted of it.
    """
    import importlib
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def with_rows_as_given(trainer: type) -> type:
    """Derive a trainer of TRL's that takes its rows as they are given, encoded.

    Seen in trl 1.0 to 1.16.

    - Private: ``DPOTrainer._prepare_dataset`` and ``KTOTrainer._prepare_dataset``, which tokenize rows.
    - Without it: TRL tokenizes by its own rules, under which tokens before an answer are learned where a template or
      a tokenizer joins prompt and answer, and end-of-turn tokens are followed by white space that is learned too.
    - Can go: when these trainers have what ``SFTTrainer`` has, ``dataset_kwargs={"skip_prepare_dataset": True}``.

    Args:
        trainer: ``trl.DPOTrainer`` or ``trl.KTOTrainer``.
    """

    class RowsAsGiven(trainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    RowsAsGiven.__name__ = trainer.__name__
    return RowsAsGiven


def fuse_head_in_float32(model: nn.Module, fields: Sequence[str] = TRAINER_FIELDS) -> None:
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
        fields: What the trainer reads from the fused head's output.
    """
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=tuple(fields))


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
