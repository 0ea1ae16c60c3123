"""The trainer's arguments: our defaults, and the configuration that holds them."""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

from moslora.errors import RecipeError
from moslora.recipe.field_types import fields_of
from moslora.recipe.parallel import parallel_arguments
from moslora.recipe.preferences import LOSSES
from moslora.recipe.schema import Recipe

__all__ = ["TRAINER_DEFAULTS", "build_trainer_config", "resolve_trainer_arguments"]


# The class that holds a trainer's arguments, by the trainer.
CONFIGS: dict[str, tuple[str, str]] = {
    "sft": ("trl", "SFTConfig"),
    "plain": ("transformers", "TrainingArguments"),
    "dpo": ("trl", "DPOConfig"),
    "kto": ("trl", "KTOConfig"),
    "cpo": ("trl.experimental.cpo", "CPOConfig"),
    "reward": ("trl", "RewardConfig"),
    "classifier": ("moslora.recipe.classifier_arguments", "ClassifierArguments"),
    "orpo": ("trl.experimental.orpo", "ORPOConfig"),
}
# Which trainer a kind of task has, where it isn't TRL's SFTTrainer.
TRAINERS = {"image": "plain", "classification": "classifier", "reward": "reward"}


def trainer_of(kind: str, loss: Any = None) -> str:
    """Return the trainer of a task, a key of ``CONFIGS``.

    Args:
        kind: The task's.
        loss: Its ``task.loss``, where a kind has several; an unknown one counts as the usual one.
    """
    if kind == "preference":
        return LOSSES[loss if isinstance(loss, str) and loss in LOSSES else "dpo"].trainer
    return TRAINERS.get(kind, "sft")


def trainer_config(trainer: str) -> Any:
    """Return the class that holds a trainer's arguments.

    Args:
        trainer: A key of ``CONFIGS``.
    """
    module, name = CONFIGS[trainer]
    if module.startswith("trl.experimental"):
        from moslora.compat.trl import find_experimental

        return find_experimental(module, name)
    return getattr(importlib.import_module(module), name)


def trainer_fields(trainer: str = "sft") -> dict[str, Any]:
    """Return the type of every field of a trainer's arguments.

    Args:
        trainer: A key of ``CONFIGS``.
    """
    return fields_of(trainer_config(trainer))


def trainer_of_recipe(recipe: Recipe) -> str:
    """Return the trainer of a recipe, a key of ``CONFIGS``."""
    return trainer_of(recipe.task.kind, getattr(recipe.task, "loss", None))


@dataclasses.dataclass(frozen=True)
class TrainerDefault:
    """A default of ours for a field of SFTConfig.

    Attributes:
        cpu: Value on a CPU.
        gpu: Value on any other device.
        reason: Why it is not TRL's.
    """

    cpu: Any
    gpu: Any
    reason: str


def _default(value: Any, reason: str) -> TrainerDefault:
    return TrainerDefault(value, value, reason)


TRAINER_DEFAULTS: dict[str, TrainerDefault] = {
    "learning_rate": _default(2e-4, "adapters want ten times the rate of full fine-tuning"),
    "lr_scheduler_type": _default("cosine", "ends at zero, so the last steps do not add noise"),
    "warmup_steps": _default(0.03, "a fraction of all steps: Adam's first steps have no history"),
    "num_train_epochs": _default(1, "choose more epochs by the held-out loss"),
    "per_device_train_batch_size": _default(8, "TRL's own, written out because runs are compared by it"),
    "max_length": _default(1024, "TRL's own, written out because examples are cut by it"),
    "bf16": TrainerDefault(False, True, "TRL turns it on everywhere, and fails on a CPU"),
    "fp16": _default(False, "bf16 needs no loss scaling; set it explicitly on GPUs without bf16"),
    "use_cpu": TrainerDefault(True, False, "the device is chosen once, for the model and the trainer"),
    "activation_checkpointing": TrainerDefault(False, True, "saves GPU memory for a third more time"),
    "dataloader_pin_memory": TrainerDefault(False, True, "pinning helps copies to a GPU, and warns without"),
    "logging_steps": _default(10, "1 where a run is so short that ten would leave no curve"),
    "save_strategy": _default("steps", "an interrupted run continues from the last checkpoint"),
    "save_steps": _default(50, "a killed run loses minutes, not hours"),
    "save_total_limit": _default(2, "the newest may be cut off by a full disk; the one before is whole"),
    "eval_strategy": _default("no", "the run evaluates before and after by itself"),
    "report_to": _default("none", "nothing leaves the machine unasked"),
    "disable_tqdm": _default(True, "the run prints its own progress"),
}
# Those that a kind has otherwise: few pictures are seen often, and the paper's runs did not decay the rate.
TRAINER_DEFAULTS_OF: dict[str, dict[str, Any]] = {
    "image": {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "per_device_train_batch_size": 1,
        "max_steps": 500,
    },
    # tinker-cookbook's rate for DPO with LoRA; ten times the 1e-6 of TRL, which is for all weights.
    "preference": {"learning_rate": 1e-5, "per_device_train_batch_size": 4},
    # TRL's own for reward models; it is for adapters too.
    "reward": {"learning_rate": 1e-4},
    # Classifiers are small and their examples few: three passes, and memory is not what they lack.
    "classification": {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "max_length": 512,
        "activation_checkpointing": False,
    },
}
LOADING = max(1, min(4, (os.cpu_count() or 1) // 2))  # processes that open pictures for a GPU
FEW_STEPS = 200  # below, every step is logged
# transformers 5.23 renamed these; whichever is given, the one that this version has is set.
CHECKPOINTING = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def resolve_trainer_arguments(recipe: Recipe, device: str, steps: int | None = None) -> dict[str, Any]:
    """Put our defaults under the recipe's ``trainer`` section.

    Args:
        recipe: A checked recipe.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:0"``, ...
        steps: How many optimizer steps the run will take, if known.

    Returns:
        Arguments of the trainer's configuration, all but ``output_dir``.
    """
    given = dict(recipe.trainer)
    on_cpu = device.startswith("cpu") or bool(given.get("use_cpu"))
    arguments = {name: d.cpu if on_cpu else d.gpu for name, d in TRAINER_DEFAULTS.items()}
    own = TRAINER_DEFAULTS_OF.get(recipe.task.kind, {}) | loss_defaults(recipe)
    # Who counts epochs wants no other number of steps.
    arguments |= {n: v for n, v in own.items() if n != "max_steps" or "num_train_epochs" not in given}
    arguments |= {"seed": recipe.seed, "data_seed": recipe.seed}
    kind: str = recipe.task.kind
    if kind == "vision" and not on_cpu:
        arguments["dataloader_num_workers"] = LOADING  # pictures are opened while the GPU computes
    arguments["bf16"] = arguments["bf16"] and not given.get("fp16") and _has_bf16(device)
    planned = steps if steps is not None else given.get("max_steps", arguments.get("max_steps", -1))
    if 0 < planned <= FEW_STEPS:
        arguments["logging_steps"] = 1
    # Both to the new name, so that the user's replaces ours; then to the one that this version has.
    arguments |= {CHECKPOINTING.get(name, name): value for name, value in given.items()}
    known = trainer_fields(trainer_of_recipe(recipe))
    older = {new: old for old, new in CHECKPOINTING.items() if new not in known}
    named = {older.get(name, name): value for name, value in arguments.items()}
    return {name: value for name, value in named.items() if name in known}


def _has_bf16(device: str) -> bool:
    if not device.startswith("cuda"):
        return False
    import torch

    return bool(
        torch.cuda.is_bf16_supported(including_emulation=False)
    )  # emulated, it is slower than float32


def build_trainer_config(
    recipe: Recipe, device: str, output_dir: str | Path, steps: int | None = None, **changes: Any
) -> Any:
    """Make the trainer's configuration: TRL's, or transformers' own for pictures.

    Args:
        recipe: A checked recipe.
        device: Where the run trains.
        output_dir: Where checkpoints go.
        steps: How many optimizer steps the run will take, if known.
        **changes: Fields that the run decides, over all others.

    Returns:
        The configuration.

    Raises:
        RecipeError: With the configuration's own complaint, for values that do not go together or not on this device.
    """
    arguments = resolve_trainer_arguments(recipe, device, steps) | loss_arguments(recipe)
    arguments |= parallel_arguments(recipe) | changes
    try:
        return trainer_config(trainer_of_recipe(recipe))(output_dir=str(output_dir), **arguments)
    except (ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        raise RecipeError(f"trainer: {' '.join(str(error).split())}") from error


def loss_defaults(recipe: Recipe) -> dict[str, Any]:
    """Return fields of the trainer's configuration that a loss has otherwise than TRL's trainer of it."""
    task: Any = recipe.task
    return dict(LOSSES[task.loss].defaults) if task.kind == "preference" else {}


def loss_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of the trainer's configuration that the task section decides."""
    task: Any = recipe.task
    if task.kind != "preference":
        return {}
    loss = LOSSES[task.loss]
    beta = loss.beta if task.beta is None else task.beta
    own = {"beta": beta, **({} if loss.loss_type is None else {"loss_type": loss.loss_type})}
    if loss.trainer == "dpo":
        own["loss_type"] = [loss.loss_type]
    return {**own, "remove_unused_columns": False}
