"""How several processes share a model: by the recipe's section ``parallel``, or by accelerate's configuration.

    kind     weights       gradients     optimizer's state    engine
    ddp      whole         whole         whole                torch
    zero1    whole         whole         split                DeepSpeed
    zero2    whole         split         split                DeepSpeed
    zero3    split         split         split                DeepSpeed
    fsdp     split         split         split                torch, fully_shard (FSDP2)

"Split" is split between the processes. What has no kind here is refused by name, and not run as something else.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moslora.distributed import launched
from moslora.errors import RecipeError, UsageError
from moslora.recipe.schema import Recipe

__all__ = ["SPLITS_WEIGHTS", "parallel_arguments", "settle_parallel"]

# Kinds of which no process holds the whole model once training begins.
SPLITS_WEIGHTS = ("fsdp", "zero3")
# Those whose way through a run is tested; the others measure or save in ways of their own.
SPLIT_TASKS = ("text",)
# Fields of transformers that the section decides.
DECIDED = ("fsdp", "fsdp_config", "deepspeed", "parallelism_config")
# What accelerate's configuration calls other ways to spread a model, by the variable that says how many take part.
OTHER_WAYS = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "hybrid sharding",
}
UNITS = "TRANSFORMER_BASED_WRAP"


def settle_parallel(recipe: Recipe, will_train: bool = True) -> Recipe:
    """Decide how the processes share the model, and refuse what a run cannot do.

    Args:
        recipe: A checked recipe.
        will_train: Whether the run begins now; otherwise it may be meant for a launcher's processes elsewhere.

    Returns:
        The recipe with a ``parallel.kind`` that is not ``auto`` where several processes were launched.

    Raises:
        UsageError: If recipe or launcher asks for something that has no kind, or that does not go together.
    """
    decided = [f"trainer.{name}" for name in DECIDED if recipe.trainer.get(name)]
    if decided:
        raise UsageError(
            f"{decided[0]} is decided by the section parallel: set parallel.kind to fsdp, zero1, zero2 or zero3 "
            "instead, and leave it out."
        )
    asked = _of_accelerate()
    kind: str = recipe.parallel.kind
    if kind == "auto":
        kind = asked or ("ddp" if launched() > 1 else "auto")
    elif asked is not None and asked != kind:
        raise UsageError(
            f"parallel.kind is {kind}, and accelerate's configuration asks for {asked}. Make them agree, or leave "
            "parallel.kind out."
        )
    if kind != "auto" and getattr(recipe.model, "device_map", "none") != "none":
        raise UsageError(
            f"model.device_map spreads a model over the GPUs of one process, and parallel.kind={kind} shares one "
            "between several. Leave one out."
        )
    if kind not in ("auto", "ddp"):
        if will_train and launched() == 1:
            raise UsageError(
                f"parallel.kind={kind} spreads a model over processes, and this one is alone. Start several, one for "
                "each GPU: torchrun --nproc-per-node N -m moslora train ..."
            )
        _check_goes_together(recipe, kind)
    parallel = recipe.parallel.model_copy(update={"kind": kind})
    return recipe.model_copy(update={"parallel": parallel})


def _of_accelerate() -> str | None:
    """Return the kind that ``accelerate launch`` was configured for; None if it says nothing of it.

    Raises:
        UsageError: If it has no kind.
    """
    environment = os.environ
    for variable, way in OTHER_WAYS.items():
        if environment.get(variable, "1") not in ("", "1"):
            raise UsageError(
                f"accelerate's configuration asks for {way} ({variable}={environment[variable]}), which a run does "
                "not do. Known are ddp, fsdp, zero1, zero2 and zero3; see parallel.kind in docs/recipe.md."
            )
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError(
            "accelerate's configuration asks for Megatron-LM, which does not run models of transformers. Known are "
            "ddp, fsdp, zero1, zero2 and zero3; see parallel.kind in docs/recipe.md."
        )
    if _is_on("ACCELERATE_USE_FSDP"):
        if environment.get("FSDP_VERSION", "1") != "2":
            raise UsageError(
                "accelerate's configuration asks for FSDP's first version, which transformers is about to drop, and "
                "in which torch flattens an adapter's factors with the base's weights. Set fsdp_version: 2."
            )
        units = environment.get("FSDP_AUTO_WRAP_POLICY", UNITS)
        if units != UNITS:
            raise UsageError(
                f"accelerate's configuration has fsdp_auto_wrap_policy: {units}. Under FSDP2 the whole model would be "
                f"gathered at once, or blocks be cut where adapters are. Set {UNITS}."
            )
        return "fsdp"
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return _of_deepspeed(
            environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"),
            environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        )
    return None


def _of_deepspeed(file: str | None, stage: str) -> str:
    if file not in (None, "", "none"):
        try:
            settings = json.loads(Path(str(file)).read_text(encoding="utf-8"))
            stage = str(settings.get("zero_optimization", {}).get("stage", 0))
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"DeepSpeed's configuration {file} cannot be read: {error}") from error
    if stage not in ("1", "2", "3"):
        raise UsageError(
            f"accelerate's configuration asks for DeepSpeed's ZeRO of stage {stage}; known are 1, 2 and 3. Without "
            "ZeRO, leave DeepSpeed out: processes average their gradients by themselves (ddp)."
        )
    return f"zero{stage}"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_goes_together(recipe: Recipe, kind: str) -> None:
    """Refuse settings that a split model or optimizer does not take."""
    refused: dict[str, str] = {}
    if recipe.task.kind not in SPLIT_TASKS:
        refused[f"task.kind={recipe.task.kind}"] = (
            f"it is known for {' and '.join(SPLIT_TASKS)} so far; ddp works for every task"
        )
    if recipe.mix is not None:
        refused["mix"] = "mixers over frozen adapters are so small that ddp is enough"
    if recipe.adapter.get("bias", "none") != "none":
        refused["adapter.bias"] = "the base's own biases are measured against, and are split"
    for name in ("load_best_model_at_end", "auto_find_batch_size", "torch_compile"):
        if recipe.trainer.get(name):
            refused[f"trainer.{name}"] = "it is not tested with a split model or optimizer"
    if kind == "zero3" and getattr(recipe.model, "quantization", "none") != "none":
        refused["model.quantization"] = "DeepSpeed does not split 4-bit weights; fsdp does"
    if refused:
        raise RecipeError(
            [f"{what} cannot be set for parallel.kind={kind}: {why}." for what, why in refused.items()]
        )
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UsageError(f"parallel.kind={kind} needs one more package. Run: pip install deepspeed")


def parallel_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of the trainer's configuration that ``parallel`` decides.

    Args:
        recipe: From ``settle_parallel``.
    """
    kind = recipe.parallel.kind
    if kind == "fsdp":
        # Whole state dicts: an adapter's are small, and any number of processes can go on from them. Activations are
        # checkpointed by transformers; FSDP's own way draws other dropout masks in the second forward.
        config = {
            "version": 2,
            "auto_wrap_policy": UNITS,
            "reshard_after_forward": True,
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
            "activation_checkpointing": False,
        }
        if _is_on("FSDP_OFFLOAD_PARAMS"):
            config["cpu_offload"] = True
        return {"fsdp": True, "fsdp_config": config}
    if kind.startswith("zero"):
        return {"deepspeed": _deepspeed_settings(int(kind[-1]))}
    return {}


def _deepspeed_settings(stage: int) -> Mapping[str, Any] | str:
    """Return DeepSpeed's configuration; ``auto`` is filled in from the trainer's arguments."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file not in (None, "", "none"):
        return str(file)
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # Factors are small, and are kept whole where they are used next to each other.
        zero |= {"stage3_gather_16bit_weights_on_model_save": False}
    for what in ("optimizer", "param"):
        place = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        if place not in ("", "none"):
            zero[f"offload_{what}"] = {"device": place}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
