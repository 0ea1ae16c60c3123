"""What is evaluated, and a loaded model, its tokenizer and its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.display import Display
from moslora.models.gguf import materialize
from moslora.models.loading import default_device, load_model, load_tokenizer
from moslora.models.names import resolve_model

if TYPE_CHECKING:
    from moslora.models.names import ModelSource

__all__ = ["Judge", "Subject", "load_judge"]


@dataclass(frozen=True)
class Subject:
    """The base model that is evaluated.

    Attributes:
        name: Hub id, folder, GGUF file or packaged name; of a model that was handed over, what to call it.
        model: The model itself, if a script handed it over; who did restores it.
        tokenizer: Its tokenizer, likewise.
    """

    name: str
    model: Any = None
    tokenizer: Any = None


@dataclass(frozen=True)
class Judge:
    """A loaded model's surroundings."""

    tokenizer: Any
    device: str
    display: Display


def load_judge(subject: Subject, display: Display) -> tuple[Judge, Any]:
    """Load a model in its own dtype, with its tokenizer, on the default device."""
    device = default_device()
    if subject.model is not None:
        tokenizer = subject.tokenizer or load_tokenizer(resolve_model(subject.name, weights=False))
        return Judge(tokenizer, device, display), subject.model.to(device).eval()
    source: ModelSource = materialize(resolve_model(subject.name), "float32", say=display.say)
    tokenizer = subject.tokenizer or load_tokenizer(source)
    return Judge(tokenizer, device, display), load_model(source, device=device)
