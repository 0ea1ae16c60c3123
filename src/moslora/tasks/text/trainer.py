"""TRL's trainer with a loss that computes logits at labeled positions only. Imported inside functions: it imports TRL.

``compute_loss`` has the contract of TRL 1.16: ``inputs`` holds ``labels``; the result is the mean over
``num_items_in_batch`` tokens if that is given, and with ``return_outputs`` a pair. ``test_the_loss_on_labels_only_...``
compares value and gradients with TRL's own. The class can go when TRL does the same on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from trl import SFTTrainer

from moslora.compat.accelerate import shard_on_cpus
from moslora.compat.trainer import use_one_gpu
from moslora.distributed import is_split
from moslora.patterns import check_patterns
from moslora.tasks.text.loss import labeled_loss, scores_plainly, unwrapped
from moslora.tasks.text.precision import train_in_float32

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from torch import nn
    from transformers import TrainerCallback

__all__ = ["LabeledLossTrainer", "build_sft_trainer"]


class LabeledLossTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; on a CPU it computes logits at labeled positions only.

    On Triton devices TRL does so itself. On a CPU its output head runs at every position, which with a vocabulary of
    49152 costs as much as half of the layers.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the labeled positions.

        Args:
            model: ``self.model``; anything else is left to TRL.
            inputs: The model's arguments, with ``labels``.
            return_outputs: Whether the model's outputs are wanted too; left to TRL.
            num_items_in_batch: Labeled tokens in all micro-batches of the step, if known.
        """
        is_special = return_outputs or model is not self.model or is_split(model) or not scores_plainly(self)
        if is_special or inputs["labels"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Mixed precision wraps the model's own forward, which is not called here.
        with self.accelerator.autocast():
            total, count = labeled_loss(unwrapped(model), inputs)
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, and of a base that is split between processes nothing; every process calls it.

        Args:
            output_dir: Where; the trainer's own folder by default.
            _internal_call: Transformers says so where a checkpoint is written.
        """
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        from moslora.tuner.sharding import gathered

        with gathered(self.model):
            self.model.save_pretrained(
                output_dir or self.args.output_dir, is_main_process=bool(self.args.should_save)
            )


def build_sft_trainer(
    model: nn.Module,
    config: Any,
    tokenizer: Any,
    adapter: PeftConfig | None,
    callbacks: Sequence[TrainerCallback],
    train_set: Dataset,
    heldout_set: Dataset | None,
    collate: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> LabeledLossTrainer:
    """Make the trainer; it puts the adapter into the model, whose trained parameters are then in float32.

    Args:
        model: The base model.
        config: TRL's ``SFTConfig``; changed in place: one GPU for each process.
        tokenizer: The model's.
        adapter: The adapter's configuration; None trains the whole model.
        callbacks: Callbacks of the trainer.
        train_set: What it trains on.
        heldout_set: What it evaluates on during training, if anything.
        collate: Makes a batch of rows; TRL's own if None.
        say: Told when further GPUs stay unused.
    """
    if getattr(config, "fsdp", None):
        shard_on_cpus()
    if use_one_gpu(config):
        say("Training on one GPU; `accelerate launch -m moslora` or torchrun starts a process for each.")
    if adapter is not None:
        check_patterns(vars(adapter), (name for name, _ in model.named_modules()), "The configuration")
    trainer = LabeledLossTrainer(
        model=model,
        args=config,
        data_collator=collate,
        train_dataset=train_set,
        eval_dataset=heldout_set,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=list(callbacks),
    )
    if adapter is not None and not trainer.is_deepspeed_enabled:  # which keeps float32 copies of its own
        train_in_float32(trainer.model)
    return trainer
