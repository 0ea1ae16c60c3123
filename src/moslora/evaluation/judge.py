"""A loaded model, its tokenizer and its device, for evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.display import Display
from moslora.models.gguf import materialize
from moslora.models.loading import default_device, load_model, load_tokenizer
from moslora.models.names import resolve_model

if TYPE_CHECKING:
    from moslora.models.names import ModelSource


@dataclass(frozen=True)
class Judge:
    """A loaded model's surroundings."""

    tokenizer: Any
    device: str
    display: Display


def load_judge(model: str, display: Display) -> tuple[Judge, Any]:
    """Load a model in its own dtype, with its tokenizer, on the default device."""
    source: ModelSource = materialize(resolve_model(model), "float32", say=display.say)
    device = default_device()
    return Judge(load_tokenizer(source), device, display), load_model(source, device=device)
