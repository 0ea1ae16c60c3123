"""Private names of transformers' Trainer, under public names.

A trainer of this package derives from ``HookedTrainer`` and overrides its public methods; the private ones that
Trainer calls are named here alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

__all__ = ["HookedTrainer", "load_checkpoint", "take_rates_of_schedule", "use_one_gpu"]


class HookedTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer with public names for the steps that a subclass may replace.

    ``make_train_sampler``, ``save_weights`` and ``load_weights`` do what Trainer does, until they are overridden.

    Seen in transformers 5.20 to 5.23. It can go when Trainer takes a sampler, and a function that writes and one that
    reads the weights of a checkpoint, as arguments.
    """

    def make_train_sampler(self, dataset: Any) -> Any:
        """Return the sampler of training examples.

        Args:
            dataset: The training data.
        """
        return super()._get_train_sampler(dataset)

    def save_weights(self, folder: Path, state_dict: Any = None) -> None:
        """Write the model's weights.

        Args:
            folder: The checkpoint.
            state_dict: Weights that Trainer gathered from several processes; None where it did not.
        """
        super()._save(str(folder), state_dict)

    def load_weights(self, folder: Path, model: Any = None) -> None:
        """Read weights into the model.

        Args:
            folder: A checkpoint that ``save_weights`` wrote.
            model: The model, where it is not the trainer's.
        """
        super()._load_from_checkpoint(str(folder), model)

    # Calls the hook for the order of examples. Without it Trainer shuffles with its own generator, and an interrupted
    # run does not see the same examples as an uninterrupted one.
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.make_train_sampler(self.train_dataset if train_dataset is None else train_dataset)

    # Calls the hook for writing a checkpoint. Without it every checkpoint has the frozen base, too.
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder, state_dict)

    # Calls the hook for reading a checkpoint. Without it a checkpoint of ``save_weights`` cannot be resumed from.
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint), model)

    # Reads the best checkpoint (``load_best_model_at_end``) by the same hook. Without it Trainer looks for the names
    # of its own files, warns, and keeps the last weights.
    def _load_best_model(self) -> None:
        self.load_weights(Path(self.state.best_model_checkpoint))


def load_checkpoint(trainer: Any, folder: Path) -> None:
    """Load the weights of a checkpoint into a trainer's model, without training.

    Calls ``Trainer._load_from_checkpoint``, seen in transformers 4.57 to 5.23: ``train(resume_from_checkpoint=…)``
    takes one more step before it looks whether enough were taken. Without it a run that was interrupted after its last
    step trains one step too many. It can go when Trainer stops before that step.

    Args:
        trainer: transformers' Trainer, or one derived from it.
        folder: The checkpoint.
    """
    trainer._load_from_checkpoint(str(folder))


def take_rates_of_schedule(optimizer: Any, scheduler: Any) -> None:
    """Set an optimizer's rates to those that its schedule has at its step.

    Sets torch's ``LRScheduler._last_lr``, seen in torch 2.4 to 2.13: a checkpoint restores it, and Trainer logs it.
    Without it the first step of a lengthened run is logged with the rate at which the shorter one had ended. It can go
    when torch's schedules recompute their rates on request.

    Args:
        optimizer: Its groups are changed in place.
        scheduler: torch's ``LambdaLR``, which all schedules of transformers are but those that look at the loss; others
            are left alone.
    """
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if not lambdas:
        return
    rates = [
        rate * part(scheduler.last_epoch) for rate, part in zip(scheduler.base_lrs, lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def use_one_gpu(arguments: Any) -> bool:
    """Make a process train on one GPU, where Trainer would wrap the model in ``nn.DataParallel``.

    Sets ``TrainingArguments._n_gpu``, which its public property ``n_gpu`` only reads; seen in transformers 4.57 to
    5.23. Without it the batch is divided between all visible GPUs, and the same run has other noise on another
    machine. It can go when transformers drops ``nn.DataParallel``, or gives ``n_gpu`` a setter.

    Args:
        arguments: transformers' ``TrainingArguments``; changed in place.

    Returns:
        Whether it saw more than one GPU.
    """
    if arguments.n_gpu <= 1:
        return False
    arguments._n_gpu = 1
    return True
