"""Adapters of a pipeline's models: their configurations, which modules they adapt, and how many parameters they add."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moslora.errors import RecipeError
from moslora.patterns import check_patterns
from moslora.tasks.task import Count

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from moslora.tasks.image.families.family import Family
    from moslora.tasks.image.pipeline import PipelineFiles

__all__ = [
    "adapted_modules",
    "count_pipeline_parameters",
    "denoiser_config",
    "text_encoder_config",
    "with_targets",
]

CLIP_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def with_targets(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return an adapter's settings with the modules that are adapted.

    Args:
        settings: The recipe's ``adapter`` section.
        family: Of the pipeline, whose default is taken where the section names no modules.
    """
    if settings.get("target_modules") is not None:
        return dict(settings)
    targets = family.targets
    return {**settings, "target_modules": targets if isinstance(targets, str) else list(targets)}


def denoiser_config(settings: Mapping[str, Any]) -> PeftConfig:
    """Return the denoiser's adapter configuration.

    Args:
        settings: The recipe's ``adapter`` section.
    """
    from moslora.tuner.config import MoSLoRAConfig

    return MoSLoRAConfig(**settings)


def text_encoder_config(
    settings: Mapping[str, Any], r: int | None = None, alpha: float | None = None
) -> PeftConfig:
    """Return a text encoder's adapter configuration: the denoiser's, with CLIP's module names.

    Args:
        settings: The recipe's ``adapter`` section.
        r: Rank; None takes the denoiser's.
        alpha: ``lora_alpha``; None takes the denoiser's.
    """
    from moslora.tuner.config import MoSLoRAConfig

    changes: dict[str, Any] = {
        "target_modules": CLIP_TARGETS,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
    }
    if r is not None:
        changes["r"] = r
    if alpha is not None:
        changes["lora_alpha"] = alpha
    return MoSLoRAConfig(**{**settings, **changes})


def adapted_modules(skeleton: nn.Module, settings: Mapping[str, Any], title: str) -> list[str]:
    """List the modules of a denoiser that are adapted; refuse names that it does not have.

    Args:
        skeleton: The denoiser; its weights are not used.
        settings: The recipe's ``adapter`` section.
        title: Names the denoiser in messages, as ``org/base's unet``.

    Returns:
        Dotted names.

    Raises:
        RecipeError: If no module is adapted, or a setting names a module that does not exist.
    """
    from torch import nn

    from moslora.compat.targets import is_target
    from moslora.tuner.matching import find_misfits

    check_patterns(settings, (name for name, _ in skeleton.named_modules()), "adapter")
    config: Any = denoiser_config(settings)
    leaves = [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    if config.target_modules == "all-linear":
        chosen = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    else:
        chosen = [name for name in leaves if is_target(config, name)]
    if not chosen:
        ends = {
            name.split(".")[-1] if not name.split(".")[-1].isdigit() else ".".join(name.split(".")[-2:])
            for name in leaves
        }
        raise RecipeError(
            f"adapter.target_modules={settings['target_modules']!r} names no module of {title}; it has "
            f"{', '.join(sorted(ends))}."
        )
    wrong = [
        str(misfit).replace("the base", title)
        for misfit in find_misfits(config, skeleton)
        if not misfit.is_harmless
    ]
    if wrong:
        raise RecipeError([f"adapter.{problem}" for problem in wrong])
    return chosen


def count_pipeline_parameters(
    files: PipelineFiles, settings: Mapping[str, Any], text_encoder: PeftConfig | None = None
) -> list[Count]:
    """Count the parameters of a pipeline's models, from their configurations alone.

    Args:
        files: The pipeline; its weights are not read.
        settings: The recipe's ``adapter`` section, with targets.
        text_encoder: Adapter configuration of its CLIP text encoders; None where they are frozen.

    Raises:
        RecipeError: If the denoiser's adapter does not fit it.
    """
    import copy

    from peft import get_peft_model

    denoiser = files.family.denoiser
    counts = []
    for name in (denoiser, "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        if not files.has(name):
            continue
        model = files.skeleton(name)
        base, trained = sum(p.numel() for p in model.parameters()), 0
        config: Any = None
        if name == denoiser:
            adapted_modules(
                model, settings, f"{files.source.name}'s {name}"
            )  # whose errors say more than PEFT's
            config = denoiser_config(settings)
        elif name in files.family.clips:
            config = copy.deepcopy(text_encoder)
        if config is not None:
            config.init_lora_weights = True  # the start of the factors changes no count, and may need weights
            adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
            trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        counts.append(Count(name, base, trained))
    return counts
