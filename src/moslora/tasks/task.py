"""What a modality must bring: data, a base model, a trainer, an evaluation and inputs for the proof.

``training/run.py`` does the rest for all of them alike: run directory, checkpoints, interruption, saving, folding,
proofs and report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import Trainer, TrainerCallback

    from moslora.display import Display
    from moslora.models.names import ModelSource
    from moslora.recipe.schema import Recipe

__all__ = ["Answer", "Count", "Evaluation", "Shown", "Task"]


@dataclass(frozen=True)
class Answer:
    """What a model answered to one held-out example.

    Attributes:
        place: Where the example stands in its file.
        prompt: What was asked, as text.
        reference: The right answer.
        text: The model's answer.
        correct: Whether the task's metric accepts it; None without a metric.
        kind: The example's group, if the data names one.
        pictures: Files that the question was asked about.
    """

    place: str
    prompt: str
    reference: str
    text: str
    correct: bool | None
    kind: str | None = None
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class Shown:
    """A picture that a model made, to be looked at.

    Attributes:
        prompt: What it was asked for.
        seed: Of its noise.
        file: Where it lies in the run directory; empty before it does.
        data: The file's content; empty once it is there.
    """

    prompt: str
    seed: int
    file: str = ""
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out data.

    Attributes:
        metrics: Numbers by name, ``loss`` among them; the same names before and after training.
        examples: How many examples the loss was measured on.
        unit: What those are.
        pictures: What the model made of the recipe's prompts, in their order.
        intervals: 95 % intervals of those that are shares, by the same names.
        fidelity: How alike pictures and prompts are, by the score's name, ready for JSON; under ``absent`` why a score
            is not there.
        answers: One per held-out example that was answered, in the order of the data.
    """

    metrics: Mapping[str, float]
    examples: int
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    answers: Sequence[Answer] = field(default_factory=tuple)
    unit: str = "held-out examples"
    pictures: Sequence[Shown] = field(default_factory=tuple)
    fidelity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """How many parameters a part of a model has.

    Attributes:
        part: What the part is called, as ``vision``.
        base: Parameters of the base model.
        trained: Parameters that training changes: factors, and what is trained in full.
    """

    part: str
    base: int
    trained: int


class Task(ABC):
    """A kind of fine-tuning.

    Args:
        recipe: What the user wants.
        display: Where to tell of progress.
        checkpoint: Called between pieces of long work; raises where the run was asked to stop.
    """

    def __init__(self, recipe: Recipe, display: Display, checkpoint: Callable[[], None]) -> None:
        self.recipe = recipe
        self.display = display
        self.checkpoint = checkpoint

    @abstractmethod
    def read(self) -> None:
        """Read and check the data and find the base model; no weights are loaded, nothing is written.

        Raises:
            ValueError: If data or model cannot be used; the message names the place and the way out.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Turn examples into what the model takes, and tell the user what will be trained on.

        Raises:
            ValueError: If nothing would be trained.
        """

    @property
    @abstractmethod
    def base(self) -> ModelSource:
        """The base model that the adapter will belong to."""

    @abstractmethod
    def hashes(self) -> dict[str, Any]:
        """Return what identifies data, template and base."""

    @abstractmethod
    def load(self) -> nn.Module:
        """Load the base model."""

    @abstractmethod
    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make the trainer, the adapter in its place.

        Args:
            model: The base model.
            adapter: The adapter's configuration; None trains the whole model.
            output_dir: Where checkpoints go.
            callbacks: To be told of steps.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure a model on the held-out data.

        Args:
            model: Base or adapted model.
            label: What it is, for the progress display.
        """

    @abstractmethod
    def probe(self) -> list[Any]:
        """Return inputs for the proof: token ids ``(1, length)``, or all arguments by name, each."""

    def shows_at(self, step: int) -> bool:
        """Say whether pictures are made after so many optimiser steps."""
        return False

    def show(self, model: nn.Module, skip: int = 0) -> Iterator[Shown]:
        """Make pictures while training goes on; training itself must not notice.

        Args:
            model: As it is at the moment.
            skip: How many are there already; the same ones come in the same order.
        """
        return iter(())

    # Whether the base's weights must be there. Without, the task can be counted and its data checked only.
    needs_weights = True

    def count(self) -> list[Count]:
        """Count parameters by part of the model, from its configuration alone; nothing where a task cannot.

        Raises:
            ValueError: If the configuration cannot be read, or leaves nothing to train.
        """
        return []

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base is quantised, as arguments of ``BitsAndBytesConfig``; None where it is not."""
        return None

    @property
    def variant(self) -> str | None:
        """Which files of the base are read, as ``fp16``; None for the plain ones."""
        return None

    # With which class of transformers anyone would load the base; or of diffusers, as the reader has it.
    auto_class = "AutoModelForCausalLM"
    # Who loads what is shipped, in the proof: a key of ``proofs.READERS``.
    reader = "peft"

    @property
    def place(self) -> str:
        """Where a fresh process finds the base."""
        return self.base.path

    @property
    def exports(self) -> Mapping[str, tuple[str, str]]:
        """What is shipped: place in the run directory and format, by the proof's name; the reader loads the first."""
        return {"fold": ("lora", "lora")}

    def live(self, model: nn.Module) -> Any:
        """Return what the proof runs: the trained model, or the pipeline around it."""
        return model

    def adapter_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return what the adapter is configured with on this base model: the recipe's section, and what follows.

        Args:
            model: The base model.
        """
        return dict(self.recipe.adapter)

    def adapter_config(self, model: nn.Module) -> PeftConfig:
        """Return the adapter's configuration on this base model."""
        from moslora import MoSLoRAConfig

        return MoSLoRAConfig(task_type="CAUSAL_LM", **self.adapter_arguments(model))
