"""A task whose model has a head of its own, trained in full beside the adapter: labels, tags, a number or a reward.

A base that lacks the head gets a fresh one from the run's seed. The head travels with the adapter
(``modules_to_save``), and its size and labels in a ``config.json`` beside it, so that stock PEFT loads both.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.bounded import read_json
from moslora.errors import ModelError, UsageError
from moslora.metrics.resampling import compare_scores, measure_scores
from moslora.metrics.scored import Scores
from moslora.models.heads import draw_head, head_modules, load_with_head, own_head
from moslora.models.shards import open_weights
from moslora.tasks.base_model import count_parameters, refuse_misfits
from moslora.tasks.language import AnswerMetric, LanguageTask
from moslora.tasks.task import Answer, Count, Evaluation, Table

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from moslora.metrics.resampling import Compared
    from moslora.tasks.text.loss import Batch

__all__ = ["HeadTask"]

# Where a configuration says how many positions its model looks up; and families whose first one follows the padding.
POSITIONS = ("max_position_embeddings", "n_positions")
AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "mpnet",
    "longformer",
)


class HeadTask(LanguageTask):
    """A task whose model has a head of its own.

    Attributes:
        fresh: Modules that the base lacks, drawn from the seed; None before it is loaded.
    """

    # PEFT's kind of task.
    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    # A head is drawn or trained in full; half of a byte would be too little for it.
    unquantized = ("score", "classifier", "pooler", "head", "pre_classifier", "lm_head")
    splits_by_marks = True

    # What ``baseline`` measures, in a sentence.
    baseline_note = ""

    fresh: tuple[str, ...] | None = None
    _is_read = False
    _heads: tuple[str, ...] = ()

    # ---- what such a task brings ---------------------------------------------------------------------

    @abstractmethod
    def read_data(self) -> None:
        """Read and check the data; the base model's configuration is at hand."""

    @abstractmethod
    def head_settings(self) -> dict[str, Any]:
        """Return what the model's configuration says of the head: its size, names and kind of problem."""

    @abstractmethod
    def run_examples(
        self, model: nn.Module, examples: Sequence[Any], label: str
    ) -> list[tuple[float, int, Any]]:
        """Run a model on examples.

        Args:
            model: Base or adapted model.
            examples: ``heldout_set`` or another set.
            label: What is shown beside the progress bar.

        Returns:
            In the order of ``examples``: the sum of the losses, of how many, and what was predicted.
        """

    @abstractmethod
    def answer(self, encoded: Any, value: Any) -> Answer:
        """Return what was predicted of an example as an answer, judged."""

    @abstractmethod
    def scores(self, answers: Sequence[Answer]) -> Scores:
        """Return the predictions of all held-out examples, to be measured."""

    @abstractmethod
    def tables(self, answers: Sequence[Answer]) -> list[Table]:
        """Return what a report shows beside the measurements."""

    def baseline(self) -> dict[str, float]:
        """Return the same metrics without a model; empty if there is no such thing."""
        return {}

    def metric_order(self) -> Sequence[str]:
        """Return the metrics that come first."""
        return ()

    # ---- the base and its head -----------------------------------------------------------------------

    def read(self) -> None:
        """Find the base model and read the data, once."""
        if self._is_read:
            return
        self.base_model.find(self.needs_weights)
        self.read_data()
        self._is_read = True

    @property
    def own_config(self) -> Any:
        """The base's configuration."""
        model = self.base_model.handed_over
        return model.config if model is not None else self.base_model.config()

    def check_head(self, config: Any, size: int, what: str) -> bool:
        """Refuse a base whose trained head is of another size; return whether the base has a head of its own.

        Args:
            config: The base's configuration.
            size: How many outputs the task needs.
            what: What they are, for the message.

        Raises:
            UsageError: If there is such a head.
        """
        if not own_head(config, self.auto_class) or self.recipe.task.head == "new":  # type: ignore[attr-defined]
            return False
        if config.num_labels != size:
            names = ", ".join(map(str, (config.id2label or {}).values()))
            raise UsageError(
                f"{self.base.name} has a trained head of {config.num_labels} outputs ({names}), and {what} needs "
                f"{size}. Name the base that it was made from, give data with its labels, or set task.head=new to "
                "train a new head in its place."
            )
        return True

    def check_start(self, size: int, what: str) -> bool:
        """Refuse to start from an adapter whose head is of another kind or size; return whether it has a head.

        Args:
            size: How many outputs the task needs.
            what: What they are, for the message.

        Raises:
            UsageError: If it cannot be started from.
        """
        start = self.recipe.start_from
        beside = None if start is None else Path(start) / "config.json"
        if beside is None or not beside.is_file():
            return False  # as of a language model: its factors are taken, and the head is fresh
        config = read_json(beside)
        kinds, count = config.get("architectures") or [], len(config.get("id2label") or ("", ""))
        ending = self.auto_class.removeprefix("AutoModel")
        if count != size or not any(str(kind).endswith(ending) for kind in kinds):
            raise UsageError(
                f"adapter.start_from={start} has a head of {count} outputs ({', '.join(map(str, kinds))}), and {what} "
                f"needs {size} of a model {ending}. Start from another adapter, or from none."
            )
        if self.recipe.task.head == "new":  # type: ignore[attr-defined]
            raise UsageError(
                "task.head=new cannot be set together with adapter.start_from: the start brings its own head."
            )
        return True

    def settings_of_config(self) -> dict[str, Any]:
        """Return what the model's configuration says otherwise than the base's on disk."""
        settings = self.head_settings()
        if "tokenizer" in self.__dict__ or self.base_model.handed_over is None:
            config = self.own_config
            if getattr(config, "pad_token_id", None) is None and "tokenizer" in self.__dict__:
                settings["pad_token_id"] = self.pad_id  # decoders look for the last token that is not it
        return settings

    def count(self) -> list[Count]:
        """Count parameters, from the base's configuration and the size of the head."""
        self.read()
        self.base_model.convert(self.display.say)
        skeleton = self.base_model.build_skeleton(self.head_settings())
        self._heads = self.heads(skeleton)
        config = self.adapter_config(skeleton)
        refuse_misfits(config, skeleton, self.display.warn)
        return count_parameters(skeleton, config, self.part_of)

    def skeleton(self) -> nn.Module | None:
        """Build the base from its configuration; None if that alone does not give it."""
        try:
            return self.base_model.build_skeleton(self.settings_of_config())
        except ModelError:
            return None

    def part_of(self, module: str) -> str:
        """Return ``"head"`` for what is beside the backbone, else ``"base"``."""
        path = module.removeprefix("base_model.model.")
        return "head" if any(path.startswith(f"{name}.") for name in self._heads) else "base"

    def load(self) -> nn.Module:
        """Load the base with its head; one that it lacks is drawn from the run's seed."""
        if self.base_model.handed_over is not None:
            return self._handed_over()
        settings = self.recipe.model
        model, self.fresh = load_with_head(
            self.base,
            self.settings_of_config(),
            self.recipe.seed,
            settings.dtype,
            settings.trust_remote_code,
            settings.attn_implementation,
            self.device,
            self.auto_class,
            self.quantization,
            new=self.recipe.task.head == "new",  # type: ignore[attr-defined]
        )
        return model  # type: ignore[no-any-return]

    def _handed_over(self) -> nn.Module:
        """Take the model of a script's, whose head is what it is."""
        model: Any = self.base_model.prepared(self.device)
        ending = self.auto_class.removeprefix("AutoModel")
        if not type(model).__name__.endswith(ending):
            raise UsageError(
                f"model is a {type(model).__name__}, and this task needs a model {ending}. Load it with "
                f"{self.auto_class}.from_pretrained(name, num_labels=…), or pass its name."
            )
        for name, value in self.settings_of_config().items():
            setattr(model.config, name, value)
        self.fresh = ()
        return model  # type: ignore[no-any-return]

    def heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return the modules that are trained in full: the head, and what the base lacks."""
        fresh = self.fresh if self.fresh is not None else self._missing_pooler(model)
        return tuple(dict.fromkeys([*head_modules(model), *fresh]))

    def _missing_pooler(self, model: nn.Module) -> tuple[str, ...]:
        """Return the pooler of the backbone if the base's weights on disk have none."""
        backbone = getattr(model, "base_model_prefix", "")
        name = f"{backbone}.pooler"
        if not any(path.startswith(f"{name}.") for path, _ in model.named_parameters()):
            return ()
        try:
            stored = open_weights(str(self.base.path)).table
        except ModelError:
            return ()  # not on this machine, or not complete: loading it tells
        return () if any("pooler." in key for key in stored) else (name,)

    def adapter_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return the adapter's arguments: the recipe's, and the head beside it."""
        arguments = dict(self.recipe.adapter)
        saved = arguments.get("modules_to_save") or []
        arguments["modules_to_save"] = list(dict.fromkeys([*saved, *self.heads(model)]))
        return {"task_type": self.task_type, **arguments}

    def adapter_config(self, model: nn.Module) -> PeftConfig:
        """Return the adapter's configuration on this base model."""
        from moslora.tuner.config import MoSLoRAConfig

        return MoSLoRAConfig(**self.adapter_arguments(model))

    def completed(self, config: PeftConfig | None, model: nn.Module) -> PeftConfig | None:
        """Have any configuration train the head."""
        if config is None:
            return None
        settings: Any = config
        settings.task_type = self.task_type
        if hasattr(settings, "modules_to_save"):
            saved = settings.modules_to_save or []
            settings.modules_to_save = list(dict.fromkeys([*saved, *self.heads(model)]))
        return config

    def put_adapter(self, model: Any, adapter: PeftConfig | None, seed: int) -> Any:
        """Put an adapter into a model, as TRL's trainers do; a fresh head starts from the seed.

        Args:
            model: The base.
            adapter: Its configuration; None trains the whole model.
            seed: Of the factors, and of a head that the base lacks.
        """
        from peft import get_peft_model
        from transformers import set_seed

        from moslora.patterns import check_patterns

        fresh = self.fresh or ()
        if adapter is None:
            draw_head({name: model.get_submodule(name) for name in fresh}, model.config, seed)
            return model
        check_patterns(vars(adapter), (name for name, _ in model.named_modules()), "The configuration")
        set_seed(seed)
        adapted: Any = get_peft_model(model, adapter)
        _without_targets_in(self.heads(model), adapter, [name for name, _ in model.named_modules()])
        wrapped = {name: adapted.get_base_model().get_submodule(name) for name in fresh}
        # The base's own stays as it is; what is trained is a copy.
        draw_head(
            {name: wrapper.modules_to_save["default"] for name, wrapper in wrapped.items()},
            model.config,
            seed,
        )
        return adapted

    def write_beside(self, model: Any, folder: Path) -> None:
        """Write the model's configuration beside the adapter: the head's size, and what its outputs are called."""
        base = model.get_base_model()
        config = copy.deepcopy(base.config)
        config.architectures = [type(base).__name__]
        config.save_pretrained(folder)

    # ---- data ----------------------------------------------------------------------------------------

    def room(self, config: Any) -> int | None:
        """Return for how many tokens a model looks positions up; None if it computes them."""
        from moslora.tasks.text.room import COMPUTED

        if any(getattr(config, name, None) for name in COMPUTED):
            return None
        limit = next(
            (n for n in (getattr(config, name, None) for name in POSITIONS) if isinstance(n, int)), None
        )
        if limit is None or limit < 1:
            return None
        if config.model_type in AFTER_PADDING:
            return limit - int(config.pad_token_id or 0) - 1
        return limit

    def batches(self, examples: Any) -> Iterator[Batch]:
        """Not used: such a model has no loss of tokens."""
        raise NotImplementedError

    # ---- measurements --------------------------------------------------------------------------------

    def score(self, model: nn.Module, examples: Sequence[Any], label: str) -> list[float]:
        """Return each example's loss, a mean where it has several parts."""
        return [total / count for total, count, _ in self.run_examples(model, examples, f"Loss, {label}")]

    def loss(self, model: nn.Module, label: str) -> float:
        """Return the held-out loss: the mean over all parts of all examples."""
        return _mean_loss(self.run_examples(model, self.heldout_set, f"Held-out loss, {label}"))

    def ask(self, model: nn.Module, chosen: Sequence[Any], label: str) -> list[Answer]:
        """Return what a model predicts of examples."""
        found = self.run_examples(model, chosen, f"Answers, {label}")
        return [self.answer(encoded, value) for encoded, (_, _, value) in zip(chosen, found, strict=True)]

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure held-out loss and all metrics of the problem, with intervals over examples."""
        found = self.run_examples(model, self.heldout_set, f"Held-out data, {label}")
        answers = [self.answer(e, value) for e, (_, _, value) in zip(self.heldout_set, found, strict=True)]
        values, intervals = measure_scores(self.scores(answers))
        order = [name for name in self.metric_order() if name in values]
        metrics = {"loss": _mean_loss(found), **{name: values[name] for name in [*order, *values]}}
        for name, metric in self.answer_metrics.items():
            metrics[name] = _mean_of(metric, answers)
        baseline = self.baseline()
        return Evaluation(
            metrics,
            len(answers),
            intervals,
            answers,
            baseline={name: baseline[name] for name in metrics if name in baseline},
            baseline_note=self.baseline_note,
            tables=self.tables(answers),
        )

    def compare_answers(self, base: Sequence[Answer], tuned: Sequence[Answer]) -> Mapping[str, Compared]:
        """Compare the metrics of two models over the same held-out examples, but the share that answers show."""
        one, two = self.scores(base), self.scores(tuned)
        return {name: found for name, found in compare_scores(one, two).items() if name != one.share}


def _without_targets_in(heads: Sequence[str], adapter: Any, modules: Sequence[str]) -> None:
    """Take targets out of a configuration that fit heads alone: PEFT lists them for ``all-linear`` and adapts none.

    An adapter that says so could not be started from: its configuration would name modules that have no factors.
    """
    targets = getattr(adapter, "target_modules", None)
    if not isinstance(targets, set | list | tuple):
        return
    # PEFT's wrappers have put more between the names by now.
    plain = [name.replace(".modules_to_save.default", "").replace(".original_module", "") for name in modules]

    def fits_elsewhere(target: str) -> bool:
        own = [name for name in plain if name == target or name.endswith(f".{target}")]
        return not own or any(not any(f"{name}.".startswith(f"{head}.") for head in heads) for name in own)

    adapter.target_modules = {target for target in targets if fits_elsewhere(target)}


def _mean_loss(found: Sequence[tuple[float, int, Any]]) -> float:
    return sum(total for total, _, _ in found) / max(1, sum(count for _, count, _ in found))


def _mean_of(metric: AnswerMetric, answers: Sequence[Answer]) -> float:
    return sum(float(metric(answer.text, answer.reference)) for answer in answers) / len(answers)
