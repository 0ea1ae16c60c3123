"""The contract of a task: data, a base model, a trainer, an evaluation and inputs for the proof.

``training/run.py`` does the rest, the same for all tasks: run directory, checkpoints, interruption, saving, folding,
proofs and report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.distributed import Team

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import Trainer, TrainerCallback

    from moslora.display import Display
    from moslora.models.names import ModelSource
    from moslora.recipe.schema import Recipe

__all__ = ["Answer", "Count", "Evaluation", "Shown", "Table", "Task"]


@dataclass(frozen=True)
class Answer:
    """A model's answer to one held-out example.

    Attributes:
        place: Where the example is in its file.
        prompt: The question, as text.
        reference: The right answer.
        text: The model's answer.
        correct: Whether the task's metric accepts it; None without a metric.
        kind: The example's group, if the data names one.
        pictures: Files of the pictures that the question is about.
        value: What metrics are computed from, ready for JSON, where that is not the text.
    """

    place: str
    prompt: str
    reference: str
    text: str
    correct: bool | None
    kind: str | None = None
    pictures: Sequence[str] = ()
    value: Any = None


@dataclass(frozen=True)
class Table:
    """A table that a report shows beside the measurements, as a confusion matrix.

    Attributes:
        title: What it is.
        columns: Heads of the columns.
        rows: Texts and numbers, one for each column.
        note: How it is read, in a sentence.
        shades: Whether cells but the first of a row are shaded by their share of the row.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    shades: bool = False


@dataclass(frozen=True)
class Shown:
    """A picture that a model made, to look at.

    Attributes:
        prompt: The text that it was made from.
        seed: The seed of its noise.
        file: Its path in the run directory; empty before it is written.
        data: The file's content; empty once it is written.
    """

    prompt: str
    seed: int
    file: str = ""
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Evaluation:
    """The measurements of a model on held-out data.

    Attributes:
        metrics: Numbers by name, ``loss`` among them; the same names before and after training.
        examples: How many examples the loss was measured on.
        unit: What those are called.
        pictures: Pictures made from the recipe's prompts, in the prompts' order.
        intervals: 95 % intervals of the metrics that are shares, by the same names.
        fidelity: Similarity of pictures and prompts, by the score's name, ready for JSON; under ``absent`` why a score
            is missing.
        answers: One per held-out example that was answered, in the order of the data.
        baseline: The same metrics without a model, as of always saying the most frequent class; empty if there is none.
        baseline_note: What that is, in a sentence.
        tables: What a report shows beside them.
    """

    metrics: Mapping[str, float]
    examples: int
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    answers: Sequence[Answer] = field(default_factory=tuple)
    unit: str = "held-out examples"
    pictures: Sequence[Shown] = field(default_factory=tuple)
    fidelity: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)
    baseline_note: str = ""
    tables: Sequence[Table] = field(default_factory=tuple)


@dataclass(frozen=True)
class Count:
    """How many parameters a part of a model has.

    Attributes:
        part: The part's name, such as ``vision``.
        base: Parameters of the base model.
        trained: Parameters that training changes: factors, and modules that are trained in full.
    """

    part: str
    base: int
    trained: int


class Task(ABC):
    """A kind of fine-tuning.

    Args:
        recipe: The user's settings.
        display: Where progress is shown.
        raise_if_stopped: Called between the parts of long work; raises ``Stopped`` if the run was asked to stop.
    """

    def __init__(self, recipe: Recipe, display: Display, raise_if_stopped: Callable[[], None]) -> None:
        self.recipe = recipe
        self.display = display
        self.raise_if_stopped = raise_if_stopped
        # The processes that measure together, where a task can; the run sets it.
        self.team = Team()
        # What to know about the data before the numbers are believed; ``prepare`` sets it, and the report shows it.
        self.remarks: list[str] = []

    @abstractmethod
    def read(self) -> None:
        """Read and check the data and find the base model; no weights are loaded, nothing is written.

        Raises:
            ValueError: If data or model cannot be used; the message says where and what to do.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Encode the examples for the model, and show the user what will be trained on.

        Raises:
            ValueError: If nothing would be trained.
        """

    @property
    @abstractmethod
    def base(self) -> ModelSource:
        """The base model that the adapter will belong to."""

    @abstractmethod
    def hashes(self) -> dict[str, Any]:
        """Return the hashes that identify data, template and base."""

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
        """Make the trainer; it puts the adapter into the model.

        Args:
            model: The base model.
            adapter: The adapter's configuration; None trains the whole model.
            output_dir: Where checkpoints go.
            callbacks: Callbacks of the trainer.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure a model on the held-out data.

        Args:
            model: Base or adapted model.
            label: The model's name in the progress display.
        """

    def remember_base(self, model: nn.Module) -> Any:
        """Keep what training changes of the base itself, for ``costs``; called before training.

        Args:
            model: The base model.
        """
        return None

    def costs(self, model: nn.Module, remembered: Any) -> dict[str, Any]:
        """Measure what tuning cost on data that it is not about; empty if a task has none.

        Args:
            model: The tuned model.
            remembered: From ``remember_base``.

        Returns:
            By the name of each set what ``moslora.tasks.also.summarize`` gives.
        """
        return {}

    @abstractmethod
    def probe(self) -> list[Any]:
        """Return inputs for the proof: for each, token ids ``(1, length)`` or all arguments by name."""

    def begin(self, trainer: Any, folder: Path | None) -> None:  # noqa: B027 - most tasks need nothing
        """Prepare what depends on the model as it is before its first step; all processes of a team do.

        Args:
            trainer: From ``build_trainer``; the adapter has its first values.
            folder: The run directory, where what is made may be kept for a resumed run; None if nothing may.
        """

    def notes(self, before: Evaluation, after: Evaluation) -> list[str]:
        """Return what a person should know of two measurements beside their numbers, a sentence each.

        Args:
            before, after: Of the base and of the tuned model.
        """
        return []

    def shows_at(self, step: int) -> bool:
        """Tell whether pictures are made after this number of optimizer steps."""
        return False

    def show(self, model: nn.Module, skip: int = 0) -> Iterator[Shown]:
        """Make pictures during training; they must not change it.

        Args:
            model: The model in its current state.
            skip: How many pictures exist already; pictures always come in the same order.
        """
        return iter(())

    # Whether all processes of a team call ``evaluate`` and ``costs``, each for its share of the rows. If not, the first
    # measures alone.
    measures_together = False

    # Whether the base's weights are needed. If not, parameters can be counted and data checked, and nothing more.
    needs_weights = True

    def count(self) -> list[Count]:
        """Count parameters by part of the model, from its configuration alone; empty if a task cannot.

        Raises:
            ValueError: If the configuration cannot be read, or leaves nothing to train.
        """
        return []

    def check_adapter(self) -> None:  # noqa: B027 - a task may do so in ``prepare``
        """Try the adapter's settings on the base's modules; no weights are loaded.

        Raises:
            ValueError: If a setting fits nothing, or the adapter cannot be put into the base.
        """

    def skeleton(self) -> nn.Module | None:
        """Build the base without weights, as stock PEFT would find it; None if that is not known."""
        return None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base is quantized, as arguments of ``BitsAndBytesConfig``; None if it is not."""
        return None

    @property
    def variant(self) -> str | None:
        """Which variant of the base's files is read, such as ``fp16``; None for the plain ones."""
        return None

    # The class of transformers (or of diffusers, depending on the reader) that loads the base.
    auto_class = "AutoModelForCausalLM"
    # Which library loads the exported adapter in the proof: a key of ``READERS`` of training/reload_proof/proof.py.
    reader = "peft"

    @property
    def place(self) -> str:
        """Where a fresh process finds the base."""
        return self.base.path

    @property
    def exports(self) -> Mapping[str, tuple[str, str]]:
        """What is exported: path in the run directory and format, by the proof's name; the reader loads the first."""
        return {"fold": ("lora", "lora")}

    def live(self, model: nn.Module) -> Any:
        """Return what the proof runs: the trained model, or the pipeline that contains it."""
        return model

    def write_beside(self, model: Any, folder: Path) -> None:  # noqa: B027 - most adapters need nothing
        """Write what whoever loads the adapter needs beside it, as the size of a head.

        Args:
            model: The adapted model.
            folder: Of the adapter.
        """

    def release(self) -> None:  # noqa: B027 - most tasks hold none
        """Forget the model, so that its memory can go; only the task's data and names are asked for afterwards."""

    def adapter_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the adapter's arguments on this base model: the recipe's, and those derived from it.

        Args:
            model: The base model.
        """
        return dict(self.recipe.adapter)

    def adapter_config(self, model: nn.Module) -> PeftConfig:
        """Return the adapter's configuration on this base model."""
        from moslora.tuner.config import MoSLoRAConfig

        return MoSLoRAConfig(task_type="CAUSAL_LM", **self.adapter_arguments(model))
