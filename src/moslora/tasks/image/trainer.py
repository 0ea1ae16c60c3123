"""The trainer of a denoiser. Imported inside functions only, as it brings torch and transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moslora.compat.trainer import HookedTrainer, use_one_gpu
from moslora.errors import AdapterError
from moslora.tasks.image.order import TrainingOrder, step_count
from moslora.tasks.image.randomness import seed_of

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from moslora.tasks.image.denoising import Denoising

__all__ = ["DenoisingTrainer", "make_trainer"]

WEIGHTS_FILE = "adapter_model.safetensors"  # of a checkpoint; transformers' name


class DenoisingTrainer(HookedTrainer):
    """Takes examples in the order of the data set; its checkpoints have the trained parameters only.

    Args:
        model: With its adapters and its examples.
        **options: Of transformers' Trainer.
    """

    def __init__(self, model: Denoising, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.denoising = model  # never wrapped for several processes

    def make_train_sampler(self, dataset: Any) -> Any:
        """Return a sampler that keeps the order of the data set."""
        return torch.utils.data.SequentialSampler(dataset)

    def save_weights(self, folder: Path, state_dict: Any = None) -> None:
        """Write the trained parameters.

        Args:
            folder: The checkpoint.
            state_dict: Not used: the parameters are whole in every process.
        """
        from safetensors.torch import save_file

        tensors = {name: p.detach().cpu().contiguous() for name, p in self._trained().items()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load_weights(self, folder: Path, model: Any = None) -> None:
        """Read the trained parameters.

        Args:
            folder: A checkpoint of the same adapters.
            model: Not used: they go into the trainer's own model.

        Raises:
            AdapterError: If it is the checkpoint of another adapter.
        """
        from safetensors.torch import load_file

        tensors, trained = load_file(folder / WEIGHTS_FILE), self._trained()
        if tensors.keys() != trained.keys():
            raise AdapterError(f"{folder} is the checkpoint of another adapter.")
        with torch.no_grad():
            for name, tensor in tensors.items():
                trained[name].copy_(tensor)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.denoising.named_parameters() if p.requires_grad}


def make_trainer(
    model: Denoising,
    arguments: Any,
    pictures: int,
    measured: Sequence[int],
    seed: int,
    text_encoders: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = lambda text: None,
) -> DenoisingTrainer:
    """Make a trainer.

    Args:
        model: With its adapters and its examples.
        arguments: transformers' ``TrainingArguments``; changed in place: one GPU for each process, and the number of
            steps where the epochs decide it.
        pictures: How many of the model's examples, from the first one, are trained on.
        measured: Which of its examples ``Trainer.evaluate`` measures the loss on.
        seed: Of the order of examples and of their noise.
        text_encoders: Whether text encoders are adapted, too.
        callbacks: Told of steps.
        say: Told when further GPUs stay unused.
    """
    if use_one_gpu(arguments):
        say("Training on one GPU; `accelerate launch -m moslora` or torchrun starts a process for each.")
    if arguments.ddp_find_unused_parameters is None:
        # A pipeline does not use the last layer of a text encoder; every other adapter acts on every picture.
        arguments.ddp_find_unused_parameters = text_encoders
    at_once = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0:
        arguments.max_steps = step_count(pictures, arguments.num_train_epochs, at_once)
    return DenoisingTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingOrder(pictures, int(arguments.max_steps * at_once), seed),
        eval_dataset=[{"picture": index, "seed": seed_of("evaluate", seed, index)} for index in measured],
        callbacks=list(callbacks),
    )
