"""From what a script passes to sections of a recipe, and the objects that no recipe can hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from moslora.errors import UsageError
from moslora.recipe.building import WholeSection
from moslora.recipe.keys import MANAGED
from moslora.training.handed_over import HandedOver

__all__ = ["MODEL_OBJECT", "as_metrics", "as_rows", "check_model", "take_objects"]

# Stand in a recipe for what is not in a file yet.
MODEL_OBJECT, ROWS = "<the model object>", "<the rows>"
# Fields of an adapter's configuration whose defaults are not the recipe's.
ALWAYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "mixer")


def take_objects(
    *,
    callbacks: Any = (),
    metrics: Mapping[str, Callable[[str, str], Any]] | None = None,
    **sections: Any,
) -> tuple[list[dict[str, Any]], HandedOver]:
    """Separate what a recipe can contain from the objects that are passed with it.

    Args:
        callbacks, metrics: As for ``train``.
        **sections: Sections of a recipe, and ``tokenizer``, ``processor`` and ``heldout``; each may be an object.

    Returns:
        Layers for ``build_recipe``, and the objects.

    Raises:
        UsageError: If something has an unsupported type.
    """
    first = {name: value for name, value in sections.items() if value is not None}
    second: dict[str, Any] = {}
    model = _take_model(first, second)
    processor = _take_processor(first, second)
    rows = _take_rows(first, second)
    if "adapter" in first and not isinstance(first["adapter"], Mapping):
        first["adapter"] = _adapter_section(first["adapter"])
    return [first, second], HandedOver(model, processor, rows, _callbacks(callbacks), as_metrics(metrics))


def check_model(model: Any) -> None:
    """Refuse what is not a base model of transformers.

    Raises:
        UsageError: If it is something else; the message names what is accepted.
    """
    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}; give a model of transformers, or its name.")
    if hasattr(model, "peft_config"):
        raise UsageError(
            "The model has an adapter already. Hand over the base alone: model.unload() takes the adapter out, "
            "model.merge_and_unload() keeps what it learned."
        )
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"model is a {type(model).__name__}, which transformers cannot save and load again; give a model that "
            "from_pretrained made, or its name."
        )


def as_rows(value: Any, what: str) -> Iterable[Any] | None:
    """Return a value as rows; None if it names a file or is a section.

    Args:
        value: What the caller gave.
        what: Its argument's name.

    Raises:
        UsageError: If it is neither.
    """
    if isinstance(value, str | os.PathLike | Mapping):
        return None
    if not isinstance(value, Iterable):
        raise UsageError(
            f"{what} is a {type(value).__name__}; give a file's path, a datasets.Dataset or a list of dicts."
        )
    return value


def as_metrics(metrics: Mapping[str, Callable[[str, str], Any]] | None) -> dict[str, Any]:
    """Check metrics of the caller's.

    Raises:
        UsageError: If they are not functions by name.
    """
    if not isinstance(metrics, Mapping | None) or not all(
        callable(metric) for metric in (metrics or {}).values()
    ):
        raise UsageError(
            "metrics must be a dict from a name to a function of answer and reference, as {'exact': exact}."
        )
    return dict(metrics or {})


def _take_model(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """Replace a model object by a placeholder, and fill in what the object itself decides."""
    model = first.get("model")
    if model is None or isinstance(model, str | os.PathLike | Mapping):
        return None
    check_model(model)
    first["model"] = MODEL_OBJECT
    dtype = str(model.dtype).removeprefix("torch.")
    second["model"] = {"dtype": dtype if dtype in ("float32", "bfloat16", "float16") else "auto"}
    stored = getattr(model.config, "quantization_config", None)
    if stored is not None:
        settings = stored if isinstance(stored, dict) else stored.to_dict()
        if not (settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") == "nf4"):
            raise UsageError(
                "The model is quantized in another way than bitsandbytes' nf4. Load it without quantization and pass "
                "model={'name': …, 'quantization': 'nf4'}, or in 16 bits."
            )
        compute = str(settings.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
        second["model"] |= {"quantization": "nf4", "dtype": compute}
    return model


def _take_processor(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """Take a tokenizer or processor; one that is named goes into the recipe."""
    given = {name: first.pop(name) for name in ("tokenizer", "processor") if name in first}
    if not given:
        return None
    if len(given) > 1:
        raise UsageError(
            "tokenizer and processor are both given; a processor has its tokenizer, so give it alone."
        )
    name, value = next(iter(given.items()))
    if isinstance(value, str | os.PathLike):
        second.setdefault("model", {})["tokenizer"] = os.fspath(value)
        return None
    if not hasattr(value, "save_pretrained"):
        raise UsageError(
            f"{name} is a {type(value).__name__}; give what from_pretrained made, or its folder."
        )
    return value


def _take_rows(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Iterable[Any]]:
    """Replace rows by placeholders."""
    found: dict[str, Iterable[Any]] = {}
    data, heldout = first.pop("data", None), first.pop("heldout", None)
    if _is_dataset_dict(data):
        parts = data
        data = parts.get("train")
        heldout = heldout if heldout is not None else parts.get("test", parts.get("validation"))
        if data is None:
            raise UsageError(
                f"data has the splits {', '.join(parts)} and none called train; pass one as data=…"
            )
    if isinstance(data, Mapping):
        section = dict(data)
        data = None
        for part in ("train", "heldout"):
            rows = as_rows(section[part], f"data[{part!r}]") if section.get(part) is not None else None
            if rows is not None:
                found[part], section[part] = rows, ROWS
        first["data"] = section
    elif data is not None:
        rows = as_rows(data, "data")
        first["data"] = data if rows is None else ROWS
        found |= {} if rows is None else {"train": rows}
    if heldout is not None:
        rows = as_rows(heldout, "heldout")
        second["data"] = {"heldout": heldout if rows is None else ROWS}
        found |= {} if rows is None else {"heldout": rows}
    return found


def _is_dataset_dict(data: Any) -> bool:
    return isinstance(data, Mapping) and hasattr(data, "column_names")


def _adapter_section(config: Any) -> WholeSection:
    """Return an adapter's configuration as a section of a recipe."""
    import dataclasses

    from moslora.tuner.config import MoSLoRAConfig

    if not isinstance(config, MoSLoRAConfig):
        raise UsageError(
            f"adapter is a {type(config).__name__}; give a MoSLoRAConfig or a dict. LoraConfig's "
            "arguments mean the same."
        )
    if config.mixer == "custom" or not isinstance(config.mixer, str):
        raise UsageError(
            "adapter.mixer is a tensor or a function, which a recipe cannot hold, so the run could not be resumed. "
            "Choose a mixer by its name, or train in a script with get_peft_model(model, config)."
        )
    section = WholeSection()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.init or f"adapter.{field.name}" in MANAGED or field.name == "runtime_config":
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in ALWAYS or value != default:
            section[field.name] = value
    return section


def _callbacks(callbacks: Any) -> Sequence[Any]:
    """Check callbacks of the trainer; one alone is a list of one."""
    if not callbacks:
        return ()
    from transformers import TrainerCallback

    every = list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in every:
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise UsageError(f"callbacks has a {kind.__name__}; give transformers.TrainerCallback objects.")
    return every
