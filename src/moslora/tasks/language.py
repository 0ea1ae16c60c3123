"""The contract of a task whose model writes text: its examples are scored and asked, one by one.

``TextTask`` and ``VisionTask`` follow it; comparisons and evaluations need no more than what it declares. A task brings
its data, batches, answers and trainer. The measurements made from them are here, the same for both.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.compat.deepspeed import meet_for_deepspeed
from moslora.data.columns import idle_entry
from moslora.data.splitting import set_aside, thin_out
from moslora.errors import ModelError, UsageError
from moslora.metrics.answers import ANSWER_METRICS, wilson_interval
from moslora.models.loading import default_device
from moslora.recipe.parallel import SPLITS_WEIGHTS
from moslora.recipe.trainer_arguments import build_trainer_config
from moslora.tasks.also import AlsoExamples, AlsoSet, measure_set, read_also, summarize
from moslora.tasks.base_model import BaseModel, count_parameters, refuse_misfits
from moslora.tasks.task import Answer, Count, Evaluation, Task
from moslora.tasks.text.cost import Changed, Costs, keep_changed
from moslora.tasks.text.loss import Batch, Measured, shared_losses

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftConfig
    from torch import nn

    from moslora.data.encoding import Summary
    from moslora.data.files import Records
    from moslora.data.shapes import Example
    from moslora.data.tokenization import Encoded
    from moslora.display import Display
    from moslora.metrics.resampling import Compared
    from moslora.models.names import ModelSource
    from moslora.recipe.schema import Recipe

__all__ = ["AnswerMetric", "LanguageTask", "judge_answer", "pad_token_of", "question_of", "show_data"]


# From a model's answer and its reference to whether it is right, or how good it is.
AnswerMetric = Callable[[str, str], bool | float]


class LanguageTask(Task):
    """A task whose model writes text.

    Args:
        recipe: The user's settings.
        display: Where progress is shown.
        raise_if_stopped: Called between the parts of long work; raises ``Stopped`` if the run was asked to stop.

    Attributes:
        base_model: The base model that the recipe names.
        data_hashes: Hashes of the data files; set by ``read``, as are the examples.
        train_examples, heldout_examples: The examples, not encoded.
        validation_examples: Those that ``set_aside`` took out of the training data; a plain run has none.
        tokenizer: The model's; set by ``prepare``, as are the following ones.
        train_set, heldout_set, validation_set: The encoded examples.
        asked: The held-out examples that are to be answered.
        by_place: The held-out examples by their place in the data.
        answer_metrics: By name, functions of an answer and its reference, measured beside the recipe's metric.
        also_examples, also: The sets of ``evaluation.also``: as they were read, and encoded.
        also_limit: How many passages of each are measured, evenly spread; None for all.
        remembered: In a comparison, what the method under way changes of the base itself.
        arguments: The trainer's configuration, where loading needs it; set by ``load``.
        measures_only: Whether only held-out data are used; a task may then leave the rest unread.
    """

    # The name of the share of right answers among the metrics.
    accuracy_name = "exact_match"
    # Patterns of modules that are not quantized; transformers' own by default.
    unquantized: Sequence[str] = ()
    # Whether examples with a mark in common are on the same side of a split; otherwise those with equal content are.
    splits_by_marks = False

    data_hashes: dict[str, str]
    train_examples: Sequence[Example]
    heldout_examples: Sequence[Example]
    validation_examples: Sequence[Example] = ()
    tokenizer: Any
    train_set: Sequence[Encoded]
    heldout_set: Sequence[Encoded]
    validation_set: Sequence[Encoded]
    asked: Sequence[Encoded]
    by_place: Mapping[str, Example]
    answer_metrics: Mapping[str, AnswerMetric] = {}
    measures_only = False
    also_examples: Sequence[AlsoExamples] = ()
    also: Sequence[AlsoSet] = ()
    also_limit: int | None = None
    remembered: Any = ()
    arguments: Any = None

    def __init__(self, recipe: Recipe, display: Display, raise_if_stopped: Callable[[], None]) -> None:
        super().__init__(recipe, display, raise_if_stopped)
        self.base_model = BaseModel(recipe.model, self.auto_class, self.unquantized)

    # ---- what a task brings --------------------------------------------------------------------------

    @abstractmethod
    def part_of(self, module: str) -> str:
        """Return the name of the part of the model that a module or parameter belongs to."""

    @abstractmethod
    def marks(self, example: Example) -> Sequence[str]:
        """Return what a training example must not share with one that is set aside."""

    @abstractmethod
    def batches(self, examples: Any) -> Iterator[Batch]:
        """Make batches whose loss is measured, examples of similar length together.

        Args:
            examples: ``heldout_set`` or another set.
        """

    @abstractmethod
    def ask(self, model: nn.Module, chosen: Sequence[Encoded], label: str) -> list[Answer]:
        """Generate an answer to each example, in batches, and judge it by the recipe's metric.

        Args:
            model: Base or adapted model.
            chosen: Held-out examples.
            label: The model's name in the progress display.
        """

    def ask_shuffled(self, model: nn.Module, label: str) -> list[Answer]:
        """Generate answers about other examples' pictures; empty if there are no pictures.

        Args:
            model: Base or adapted model.
            label: The model's name in the progress display.
        """
        return []

    def completed(self, config: PeftConfig | None, model: nn.Module) -> PeftConfig | None:
        """Return a method's configuration with what this task needs of any, as its head.

        Args:
            config: The method's; it may be changed. None for the whole model.
            model: The base model.
        """
        return config

    @property
    def judges(self) -> bool:
        """Whether answers are right or wrong."""
        return self.recipe.task.metric != "none"

    def take_adapter(self, adapter: Path) -> None:
        """Read what an adapter says of the data that it was trained on, before they are read.

        Args:
            adapter: A directory that PEFT loads.
        """

    def compare_answers(self, base: Sequence[Answer], tuned: Sequence[Answer]) -> Mapping[str, Compared]:
        """Compare metrics of two models that are no means over answers.

        Args:
            base, tuned: Their answers to the same examples.

        Returns:
            By name; empty if there are none.
        """
        return {}

    def pictures_of(self, example: Example) -> list[str]:
        """Return the files of the pictures that a held-out example shows."""
        return []

    # ---- the base model ------------------------------------------------------------------------------

    @property
    def base(self) -> ModelSource:
        """The base model, as a folder or hub id that every program can load."""
        return self.base_model.source

    @property
    def device(self) -> str:
        """Where the run computes."""
        return default_device()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """How the base is quantized."""
        return self.base_model.quantization(self.device)

    def load(self) -> nn.Module:
        """Load the base model in the recipe's dtype."""
        kind = self.recipe.parallel.kind
        if kind == "zero3":  # transformers splits weights as they come, while such a configuration exists
            meet_for_deepspeed()
            self.arguments = build_trainer_config(self.recipe, self.device, self.recipe.output.dir)
        return self.base_model.load(self.device, "memory" if kind in SPLITS_WEIGHTS else "device")

    def count(self) -> list[Count]:
        """Count parameters by part of the model, from its configuration alone."""
        self.base_model.find(self.needs_weights)
        self.base_model.convert(self.display.say)
        skeleton = self.base_model.build_skeleton()
        config = self.adapter_config(skeleton)
        refuse_misfits(config, skeleton, self.display.warn)
        return count_parameters(skeleton, config, self.part_of)

    def skeleton(self) -> nn.Module | None:
        """Build the base from its configuration; None if that alone does not give it."""
        try:
            return self.base_model.build_skeleton()
        except ModelError:
            return None

    def check_adapter(self) -> None:
        """Put the adapter into the base without weights, on the real names of its modules."""
        self.count()

    def hashes(self) -> dict[str, Any]:
        """Return hashes of the data files, the chat template and the base model."""
        template = self.tokenizer.chat_template
        return {
            "data": self.data_hashes,
            "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            "base": self.base_model.fingerprint(),
        }

    # ---- data ----------------------------------------------------------------------------------------

    def warn_of_idle_entries(self, parts: Sequence[tuple[Records, set[str]]]) -> None:
        """Warn of entries of ``data.ignore`` that no row has.

        Args:
            parts: Rows, and the entries that they have; from ``without_keys``.
        """
        present = set().union(*(one for _, one in parts))
        for key in self.recipe.data.ignore or ():
            if key not in present and not self.measures_only:
                self.display.warn(idle_entry(key, parts[0][0]))

    @property
    def pad_id(self) -> int:
        """A token to pad short rows with."""
        return pad_token_of(self.tokenizer)

    def set_aside(self, count: int, heldout: int | None) -> int:
        """Take examples out of the training data to choose a learning rate by; call it before ``prepare``.

        Args:
            count: About how many; at most a quarter of the training data.
            heldout: How many held-out examples to use, evenly spread; None for all.

        Returns:
            How many were set aside. Which ones depends on content and the recipe's seed alone.
        """
        identity = self.marks if self.splits_by_marks else None
        self.train_examples, aside = set_aside(
            self.train_examples, count, self.recipe.seed, self.marks, identity
        )
        self.validation_examples = aside
        if heldout is not None:
            self.heldout_examples = thin_out(self.heldout_examples, heldout)
        return len(aside)

    def check_references(self) -> None:
        """Refuse references that the metric can never accept, before anything is loaded.

        Raises:
            UsageError: If there is one.
        """
        name = self.recipe.task.metric
        if self.answer_metrics:
            self._check_answer_metrics()
        metric = ANSWER_METRICS.get(name)
        if metric is None:
            return
        for encoded in self.asked:
            try:
                metric(encoded.answer, encoded.answer)
            except ValueError as error:
                raise UsageError(f"task.metric={name}, {encoded.place}: {error}") from error

    def _check_answer_metrics(self) -> None:
        """Refuse metrics of the caller's that cannot be measured, before anything is loaded."""
        for name, metric in self.answer_metrics.items():
            if name in ("loss", self.accuracy_name, f"{self.accuracy_name}_shuffled_images"):
                raise UsageError(f"metrics has {name!r}, which is measured already; choose another name.")
            for encoded in self.asked[:1]:
                value = metric(encoded.answer, encoded.answer)
                if not isinstance(value, bool | int | float):
                    raise UsageError(f"metrics[{name!r}] returned {value!r}; return a bool or a float.")
        if not self.asked:
            self.display.warn(
                "metrics has no answer to judge: no held-out example has an answer, or task.generate_examples is 0."
            )

    # ---- what tuning cost ----------------------------------------------------------------------------

    def read_also(self) -> None:
        """Read the sets of ``evaluation.also``; a part of ``read``."""
        self.also_examples = read_also(self.recipe.evaluation.also, self.recipe.data.ignore or ())

    def remember_base(self, model: nn.Module) -> Any:
        """Copy what training changes of the base itself, which is nothing for most adapters."""
        return keep_changed(model, self.adapter_config(model)) if self.also else ()

    def costs(self, model: nn.Module, remembered: Any) -> dict[str, Any]:
        """Measure loss and KL from the base on the sets of ``evaluation.also``."""
        found = self.measure_also(model, remembered)
        return {also.name: summarize(also, found[also.name]) for also in self.also}

    def measure_also(self, model: nn.Module, changed: Changed = (), tuned: bool = True) -> dict[str, Costs]:
        """Measure base and tuned model on every set of ``evaluation.also``.

        Args:
            model: The tuned model, or the base if not ``tuned``.
            changed: From ``keep_changed``.
            tuned: Whether there is a tuned model.

        Returns:
            Sums of each passage, by the set's name.
        """
        found = {}
        for also in self.also:
            with self.display.progress(f"What it cost, {also.name}", len(also.passages)) as progress:

                def done(count: int, progress: Any = progress) -> None:
                    progress.advance(count)
                    self.raise_if_stopped()

                where = (self.pad_id, self.device)
                found[also.name] = measure_set(also, model, *where, changed, tuned, done, self.team)
        return found

    # ---- measurements --------------------------------------------------------------------------------

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure held-out loss, and answers if the recipe has any; with pictures also those to others' pictures."""
        loss = self.loss(model, label)
        answered = self.answers_measured(model, label)
        return Evaluation(
            {"loss": loss, **answered.metrics}, len(self.heldout_set), answered.intervals, answered.answers
        )

    def answers_measured(self, model: nn.Module, label: str) -> Evaluation:
        """Measure answers alone, by the recipe's metric and the caller's; see ``evaluate``."""
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        answers = self.ask(model, self.asked, label) if len(self.asked) else []
        if answers and self.judges:
            judged = {self.accuracy_name: answers}
            shuffled = self.ask_shuffled(model, label)
            if shuffled:
                judged[f"{self.accuracy_name}_shuffled_images"] = shuffled
            for name, group in judged.items():
                right = sum(bool(answer.correct) for answer in group)
                metrics[name] = right / len(group)
                intervals[name] = wilson_interval(right, len(group))
        for name, metric in self.answer_metrics.items() if answers else ():
            values = [metric(answer.text, answer.reference) for answer in answers]
            metrics[name] = sum(map(float, values)) / len(values)
            if all(isinstance(value, bool) for value in values):
                intervals[name] = wilson_interval(sum(map(bool, values)), len(values))
        return Evaluation(metrics, len(self.heldout_set), intervals, answers)

    def check_method(self, name: str, adapter: PeftConfig | None) -> None:
        """Refuse a method of fine-tuning that this task cannot train, before anything is loaded.

        Args:
            name: The method's.
            adapter: Its configuration; None where all weights are trained.

        Raises:
            UsageError: If it cannot.
        """

    def shares(self, model: nn.Module, label: str) -> Mapping[str, list[bool]]:
        """Return what is right or wrong of each held-out example beside its answer, by name; most tasks have nothing.

        Args:
            model: Base or adapted model.
            label: The model's name in the progress display.
        """
        return {}

    def loss(self, model: nn.Module, label: str) -> float:
        """Return the held-out loss: the mean over all trained tokens, in nats.

        Args:
            model: Base or adapted model.
            label: The model's name in the progress display.
        """
        measured = self._losses(model, self.heldout_set, f"Held-out loss, {label}", show=True)
        total, count = 0.0, 0
        for _, losses, tokens in measured:
            total, count = total + float(losses.sum()), count + int(tokens.sum())
        return total / count

    def _losses(self, model: nn.Module, examples: Any, title: str, show: bool) -> list[Measured]:
        """Return what ``example_losses`` gives for each batch, each process having measured its share."""
        with self.display.progress(title, len(examples)) as progress:
            batches, check = self.batches(examples), self.raise_if_stopped
            return shared_losses(self.team, model, batches, self.device, progress, check, show)

    def score(self, model: nn.Module, examples: Sequence[Encoded], label: str) -> list[float]:
        """Return each example's loss: the mean over its trained tokens, in nats, in the order of ``examples``.

        Args:
            model: Base or adapted model.
            examples: ``heldout_set`` or another set.
            label: The model's name in the progress display.
        """
        means = [0.0] * len(examples)
        for numbers, losses, tokens in self._losses(model, examples, f"Loss, {label}", show=False):
            for number, mean in zip(numbers, (losses / tokens.clamp(min=1)).tolist(), strict=True):
                means[number] = mean
        return means


def pad_token_of(tokenizer: Any) -> int:
    """Return a token to pad short rows with; it is masked, so any token will do.

    Args:
        tokenizer: The model's.
    """
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id or 0) if pad is None else int(pad)


def question_of(example: Example) -> str:
    """Return the question of an example, for people to read.

    Args:
        example: Any example.

    Returns:
        The last user message, or the prompt; empty for plain text.
    """
    if example.messages is None:
        return example.prompt or ""
    questions = [message.content for message in example.messages if message.role == "user"]
    return questions[-1] if questions else ""


def judge_answer(
    example: Example, reference: str, text: str, metric: str, pictures: Sequence[str] = ()
) -> Answer:
    """Judge a model's answer.

    Args:
        example: What was asked.
        reference: The right answer.
        text: The model's answer.
        metric: A key of ``ANSWER_METRICS``, or ``"none"``.
        pictures: Files of the pictures that were shown.
    """
    is_right = ANSWER_METRICS.get(metric)
    turns = [message for message in example.messages or () if message.role == "assistant" and message.trained]
    # Thoughts that the data has apart from the answer are not a part of the reference.
    answer = text.rpartition("</think>")[2].strip() if turns and turns[-1].reasoning else text
    kind = example.extra.get("kind")
    return Answer(
        place=example.place,
        prompt=question_of(example),
        reference=reference,
        text=text,
        correct=None if is_right is None else is_right(answer, reference),
        kind=None if kind is None else str(kind),
        pictures=pictures,
    )


def show_data(display: Display, train: Summary, heldout: Summary, pieces: Iterable[tuple[str, bool]]) -> None:
    """Show what is trained on, with one example whose trained tokens are marked.

    Args:
        display: Where to show it.
        train, heldout: Counts of the encoded examples.
        pieces: One example's text, each piece with whether it is trained on.
    """
    from rich.text import Text

    display.say(
        f"Training examples: {train.examples}, held out: {heldout.examples}. Tokens: {train.tokens}, "
        f"of which trained: {train.trained_tokens} ({train.trained_tokens / train.tokens:.0%}). "
        f"Longest example: {train.longest} tokens."
    )
    marked = Text("One example; ")
    marked.append("⟦what is trained on⟧", "bold green")
    marked.append(":\n")
    for piece, trained in pieces:
        marked.append(f"⟦{piece}⟧" if trained else piece, "bold green" if trained else "dim")
    display.show(marked)
    display.say()
    for name, summary in (("Training data", train), ("Held-out data", heldout)):
        for warning in summary.warnings():
            display.warn(f"{name}: {warning}")
