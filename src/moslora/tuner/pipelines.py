"""Save and load the adapters of a diffusers pipeline's models, for training loops that are not diffusers' own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from moslora.adapters.formats import diffusers
from moslora.adapters.formats.pipeline_checkpoint import DEFAULT_NAME, Part, native_tensors, place_of, save
from moslora.adapters.formats.tensors import save_tensors
from moslora.errors import AdapterError
from moslora.files import replaced_file
from moslora.tuner.config import MoSLoRAConfig

__all__ = ["resume_for_diffusers", "save_for_diffusers"]


def save_for_diffusers(folder: str | Path, *, name: str | None = None, **models: nn.Module) -> None:
    """Save adapters of a pipeline's models: a plain LoRA for ``load_lora_weights``, and the mixers beside it.

    diffusers' own scripts do this with their ``save_lora_weights``; this is for loops of one's own::

        moslora.save_for_diffusers("out", unet=unet, text_encoder=text_encoder)
        pipe.load_lora_weights("out")  # in any program

    Args:
        folder: Directory to write into. What an earlier save left there is replaced.
        name: The file's name; None for diffusers' own.
        **models: Models that carry an adapter of the name "default", by their names in the pipeline.

    Raises:
        AdapterError: If diffusers' files have no place for what was trained; it is in
            ``folder/moslora_checkpoint`` then.
        OSError: If it cannot be written.
        TypeError: If no model is given.
        ValueError: If a model carries no such adapter.
    """
    if not models:
        raise TypeError("save_for_diffusers takes models by their names in the pipeline: unet=unet, …")
    parts = {
        component: Part(_config(component, model), get_peft_model_state_dict(model))
        for component, model in models.items()
    }
    path = Path(folder)

    def write_file(tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        text = json.dumps(metadata, indent=2, sort_keys=True)
        with replaced_file(path / (name or DEFAULT_NAME)) as part:
            save_tensors(part, tensors, {"format": "pt", diffusers.METADATA: text})

    save(path, parts, {}, write_file, name)


def resume_for_diffusers(folder: str | Path, *, name: str | None = None, **models: nn.Module) -> None:
    """Load what ``save_for_diffusers`` or a script of diffusers saved into models that carry the adapter already.

    Args:
        folder: Where it was saved.
        name: The file's name; None for diffusers' own.
        **models: By their names in the pipeline.

    Raises:
        AdapterError: If there is nothing for a model.
        TypeError: If no model is given.
        ValueError: If a model carries no such adapter, or another than was saved.
    """
    if not models:
        raise TypeError("resume_for_diffusers takes models by their names in the pipeline: unet=unet, …")
    place = place_of(Path(folder), name)
    for component, model in models.items():
        _config(component, model)
        if not (place / component).is_dir():
            there = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
            raise AdapterError(
                f"{place} has nothing for {component}; it has {', '.join(there) or 'nothing'}."
            )
    for component, model in models.items():
        set_peft_model_state_dict(model, native_tensors(place / component))


def _config(component: str, model: nn.Module) -> MoSLoRAConfig:
    configs: Any = getattr(model, "peft_config", {})
    config = configs.get("default")
    if not isinstance(config, MoSLoRAConfig):
        raise ValueError(
            f"{component} carries no MoSLoRA adapter of the name 'default'; it has {sorted(configs) or 'none'}. Add "
            f"one with {component}.add_adapter(MoSLoRAConfig(...))."
        )
    return config
