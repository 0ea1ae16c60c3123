"""What the trainer will make first, made once before a run exists: arguments, reporters, optimizer, schedule.

Each can fail for a reason that the recipe alone has, as a package that is not installed or a value that the optimizer
does not take; that is said before a model is loaded, and leaves nothing behind.
"""

from __future__ import annotations

import tempfile
from typing import Any

from moslora.errors import RecipeError
from moslora.recipe.schema import Recipe
from moslora.recipe.trainer_arguments import build_trainer_config
from moslora.wording import one_line

__all__ = ["try_trainer_parts"]

# Optimizers that want the whole model or its modules' names: only whether they are installed can be tried.
OF_A_MODEL = ("galore", "apollo", "lomo", "layerwise")
STEPS = 100  # of the schedule that is tried, where the recipe does not say how many


def try_trainer_parts(recipe: Recipe, device: str) -> None:
    """Make what the trainer makes of a recipe's ``trainer`` section, and throw it away.

    Args:
        recipe: A checked recipe.
        device: Where the run trains.

    Raises:
        RecipeError: If something cannot be made; names the key, and says what the library said.
    """
    with tempfile.TemporaryDirectory(prefix="moslora-") as folder:
        arguments = build_trainer_config(recipe, device, folder, push_to_hub=False)
    _try("report_to", "none, the default, sends nothing", _make_reporters, arguments)
    _try("torch_compile_backend", "inductor is the default", _find_backend, arguments)
    _try("use_liger_kernel", "false is the default", _find_liger, arguments)
    optimizer = _try("optim", "adamw_torch is always there", _make_optimizer, arguments)
    if optimizer is not None:
        _try(
            "lr_scheduler_type and its arguments",
            "cosine is the default",
            _make_schedule,
            arguments,
            optimizer,
        )


def _try(key: str, way: str, make: Any, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except Exception as error:  # of whichever library it is
        raise RecipeError(
            f"trainer.{key} cannot be used: {one_line(error, 300) or type(error).__name__} ({way})"
        ) from error


def _make_reporters(arguments: Any) -> None:
    from transformers.integrations import get_reporting_integration_callbacks

    for kind in get_reporting_integration_callbacks(arguments.report_to):
        kind()


def _find_backend(arguments: Any) -> None:
    from accelerate.utils import DynamoBackend

    if arguments.torch_compile_backend:
        DynamoBackend(arguments.torch_compile_backend.upper())


def _find_liger(arguments: Any) -> None:
    if arguments.use_liger_kernel:
        import liger_kernel  # type: ignore[import-not-found]  # noqa: F401


def _make_optimizer(arguments: Any) -> Any:
    import torch
    from transformers import Trainer

    name = str(getattr(arguments.optim, "value", arguments.optim))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError:
        raise
    except Exception:
        if any(word in name for word in OF_A_MODEL):
            return None
        raise
    if (
        not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer))
        or "optimizer_dict" in options
    ):
        return None
    return kind([torch.nn.Parameter(torch.zeros(2, 2))], **options)


def _make_schedule(arguments: Any, optimizer: Any) -> None:
    from transformers import get_scheduler

    steps = arguments.max_steps if arguments.max_steps > 0 else STEPS
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
    )
