"""Checking a recipe as a whole, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moslora.errors import MoSLoRAError, RecipeError
from moslora.recipe.field_types import check_fields, explain_all, fields_of, value_in_words
from moslora.recipe.keys import UNFIT
from moslora.recipe.paths import user_path
from moslora.recipe.preferences import unfit_preferences
from moslora.recipe.schema import (
    ADAPTER_DEFAULTS,
    RECIPES,
    ImageRecipe,
    Recipe,
)
from moslora.recipe.trainer_arguments import trainer_fields, trainer_of
from moslora.recipe.trainer_values import unfit_values
from moslora.wording import did_you_mean

__all__ = ["check_recipe"]

# Those that a kind has otherwise. A denoiser's are the method's paper's, on SDXL; which modules are adapted depends on
# the pipeline, whose family knows it (``tasks/image/families``).
ADAPTER_DEFAULTS_OF: dict[str, dict[str, Any]] = {"image": {"r": 4, "lora_alpha": 4, "target_modules": None}}


def check_recipe(raw: dict[str, Any], here: Path, problems: list[str]) -> Recipe:
    """Check a recipe as a whole; ``problems`` are those found before."""
    task = raw.get("task")
    kind = task.get("kind", "text") if isinstance(task, dict) else "text"
    defaults = ADAPTER_DEFAULTS | ADAPTER_DEFAULTS_OF.get(kind if isinstance(kind, str) else "", {})
    if "start_from" in raw:
        problems.append("start_from is unknown; set adapter.start_from.")
    section, start = _take_start(raw.get("adapter"), raw, kind, problems)
    raw = {
        **raw,
        "adapter": _with_defaults(section, {} if start else defaults),
        "trainer": raw.get("trainer", {}),
    }
    raw["start_from"] = start
    if not isinstance(kind, str) or kind not in RECIPES:
        kinds = " or ".join(map(repr, RECIPES))
        problems.append(
            f"task.kind is {value_in_words(kind)}, but must be {kinds}.{did_you_mean(kind, RECIPES)}"
        )
        raw["task"] = {**raw["task"], "kind": "text"}
        kind = "text"
    recipe = None
    try:
        recipe = RECIPES[kind].model_validate(raw)
    except ValidationError as error:
        problems.extend(explain_all(error.errors(include_url=False), kind))
    for section, unfit in UNFIT.get(kind, {}).items():
        values = raw[section] if isinstance(raw.get(section), dict) else {}
        problems.extend(
            f"{section}.{key} cannot be set for task={kind}: {why}."
            for key, why in unfit.items()
            if values.get(key) not in (None, False, 0, "none", [])
        )
    adapter = raw["adapter"]
    if kind == "vision" and isinstance(adapter, dict) and adapter.get("target_modules") != "all-linear":
        problems.append("adapter.target_modules cannot be set: set scopes.language, .vision and .projector.")
    if kind == "image" and raw.get("mix") is not None:
        problems.append("mix cannot be set for task=image: adapters of pipelines are not mixed.")
    if kind in ("classification", "reward") and raw.get("mix") is not None:
        problems.append(f"mix cannot be set for task={kind}: adapters with heads of their own are not mixed.")
    checked: dict[str, dict[str, Any]] = {}
    trainer = trainer_of(kind, task.get("loss") if isinstance(task, dict) else None)
    for section, fields in (("adapter", _adapter_fields()), ("trainer", trainer_fields(trainer))):
        if isinstance(raw[section], dict) and raw[section]:
            checked[section] = check_fields(section, raw[section], fields, problems)
    problems.extend(unfit_values(checked.get("trainer", {})))
    if kind == "preference" and recipe is not None:
        about = {**checked.get("adapter", {}), "start_from": start}
        problems.extend(unfit_preferences(recipe.task.model_dump(), checked.get("trainer", {}), about))
    dropout = checked.get("adapter", {}).get("lora_dropout")
    if kind == "reward" and dropout and checked.get("trainer", {}).get("disable_dropout", True):
        problems.append(
            f"adapter.lora_dropout={dropout:g} would do nothing: trainer.disable_dropout is on for reward models, as "
            "in TRL. Leave one out, or set trainer.disable_dropout=false."
        )
    if not any(problem.startswith("adapter.") for problem in problems) and "adapter" in checked:
        problems.extend(_adapter_complaint(checked["adapter"]))
    if problems or recipe is None:
        raise RecipeError(problems)
    folder = str((here / user_path(recipe.output.dir)).absolute())
    output = recipe.output.model_copy(update={"dir": folder})
    changed: dict[str, Any] = {**checked, "output": output}
    if isinstance(recipe, ImageRecipe) and recipe.data.class_images is not None:
        # It may be made by the run, and is then found from anywhere.
        place = str((here / user_path(recipe.data.class_images)).absolute())
        changed["data"] = recipe.data.model_copy(update={"class_images": place})
    return recipe.model_copy(update=changed)


def _take_start(
    adapter: Any, raw: Mapping[str, Any], kind: Any, problems: list[str]
) -> tuple[Any, str | None]:
    """Take ``start_from`` out of an adapter section, and put the structure of the adapter that it names under the rest.

    Returns:
        The section, and the adapter that training starts from.
    """
    if not isinstance(adapter, dict) or "start_from" not in adapter:
        return adapter, None
    section = {name: value for name, value in adapter.items() if name != "start_from"}
    start = adapter["start_from"]
    if start is None:
        return section, None
    if not isinstance(start, str) or not start:
        problems.append(
            f"adapter.start_from is {value_in_words(start)}, but must be an adapter's directory or file."
        )
        return section, None
    for other, why in (("image", "adapters of pipelines are trained from their own start"), ("mix", "")):
        if other == kind or (other == "mix" and raw.get("mix") is not None):
            reason = why or "a mix starts from the adapters that it mixes"
            problems.append(
                f"adapter.start_from cannot be set for {'task=image' if why else 'mix'}: {reason}."
            )
            return section, None
    from moslora.adapters.starting import fill_from_start, start_arguments

    model = raw.get("model")
    base = model.get("name") if isinstance(model, dict) else None
    try:
        arguments = start_arguments(Path(start), base if isinstance(base, str) else None)
    except (MoSLoRAError, OSError) as error:
        problems.append(f"adapter.start_from: {error}")
        return section, None
    section, contradictions = fill_from_start(section, arguments, start, kind == "vision")
    problems.extend(contradictions)
    return section, start


def _with_defaults(adapter: Any, defaults: Mapping[str, Any]) -> Any:
    return {**defaults, **(adapter or {})} if isinstance(adapter, dict | None) else adapter


def _adapter_fields() -> dict[str, Any]:
    from moslora.tuner.config import MoSLoRAConfig

    return {**fields_of(MoSLoRAConfig), "mixer": str}  # a tensor or callable has no place in YAML


def _adapter_complaint(arguments: dict[str, Any]) -> list[str]:
    """What the configuration itself says to values of the right type."""
    from moslora.tuner.config import MoSLoRAConfig

    init = arguments.get("init_lora_weights")
    if init in ("eva", "loftq"):
        return [
            f"adapter.init_lora_weights={init} cannot be set: a call in a script of yours has to follow it. Use "
            "get_peft_model there, or choose another start."
        ]
    try:
        MoSLoRAConfig(**arguments)
    except (ValueError, TypeError) as error:
        return [f"adapter: {error}"]
    return []
