"""Classification: one label, several, a number, or a tag for each word, with transformers' own models and trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.bounded import read_json
from moslora.data.columns import without_keys
from moslora.data.faults import listed, quoted
from moslora.data.files import Records
from moslora.data.glue import GLUE
from moslora.data.label_sets import LabelSet, as_label_set, check_all_present, find_labels, index_labels
from moslora.data.labeled import Labeled, Problem, read_labeled, recognize
from moslora.data.sources import read_alone
from moslora.data.splitting import split_heldout
from moslora.errors import UsageError
from moslora.metrics.resampling import measure_scores
from moslora.metrics.scored import Scores, has_spans, scores_of
from moslora.models.loading import load_tokenizer
from moslora.recipe.schema import ClassificationDataSection, ClassificationTaskSection
from moslora.recipe.trainer_arguments import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.classification.baseline import constant_losses
from moslora.tasks.classification.encoding import EncodedLabel, LabelEncoder, LabelSummary, encode_labeled
from moslora.tasks.classification.losses import run_batches
from moslora.tasks.classification.showing import show_labeled, table_of
from moslora.tasks.head import HeadTask
from moslora.tasks.task import Answer, Table

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

__all__ = ["ClassificationTask"]

# Held-out examples, and tokens of each, whose logits the proof compares.
PROBES, PROBE_TOKENS = 4, 128
# What transformers calls the problems.
PROBLEM_TYPES = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
# The metrics of each problem, the one that is looked at first in front.
METRICS: dict[str, tuple[str, ...]] = {
    "single-label": ("accuracy", "f1", "f1_macro", "mcc"),
    "multi-label": ("f1_micro", "f1_macro", "exact_match"),
    "regression": ("pearson", "spearman"),
    "tokens": ("entity_f1", "accuracy", "f1_macro"),
}


class ClassificationTask(HeadTask):
    """Fine-tune a model with a head on labeled texts or words."""

    baseline_note = "Without a model: always the training data's most frequent label, or their mean number."

    problem: Problem
    labels: LabelSet | None = None  # None for numbers
    positive: int | None = None
    train_examples: list[Labeled]  # type: ignore[assignment]
    heldout_examples: list[Labeled]  # type: ignore[assignment]
    adapter_labels: LabelSet | None = None

    # ---- data ----------------------------------------------------------------------------------------

    @property
    def _data(self) -> ClassificationDataSection:
        return self.recipe.data  # type: ignore[return-value]

    @property
    def _task(self) -> ClassificationTaskSection:
        return self.recipe.task  # type: ignore[return-value]

    @property
    def accuracy_name(self) -> str:  # type: ignore[override]
        """What the share of right answers is called: of words, that of sentences with every tag right."""
        return {"tokens": "all_tags_right", "multi-label": "exact_match"}.get(self.problem, "accuracy")

    @property
    def judges(self) -> bool:
        """Whether predictions are right or wrong; a number is near or far."""
        return self._task.metric != "none" and self.problem != "regression"

    def read_data(self) -> None:
        """Read rows and labels, and hold them against the base's head."""
        data, glue = self._data, GLUE.get(self._data.subset or "")
        train = self._records(data.train, data.train_split, data.limit)
        columns = self._columns(train)
        self._uses_glue = glue is not None and columns == glue.columns and not data.columns
        self.problem = self._find_problem(train, columns)
        self.task_type = "TOKEN_CLS" if self.problem == "tokens" else "SEQ_CLS"
        kind = "TokenClassification" if self.problem == "tokens" else "SequenceClassification"
        self.auto_class = self.base_model.auto_class = f"AutoModelFor{kind}"
        self.data_hashes = {"train": train.sha256}
        self.train_examples = self._read(train, columns)
        split = data.heldout_split
        if split is None and data.heldout is None and self._uses_glue and data.train_split == "train":
            assert glue is not None
            split = glue.heldout_split if not Path(data.train).expanduser().is_file() else None
        if data.heldout is not None or split is not None:
            heldout = self._records(data.heldout or data.train, split or "train", None)
            self.data_hashes["heldout"] = heldout.sha256
            self.heldout_examples = self._read(heldout, self._columns(heldout))
        else:
            heldout = train
            self.train_examples, self.heldout_examples = split_heldout(  # type: ignore[assignment]
                self.train_examples,  # type: ignore[arg-type]
                data.heldout_fraction,
                self.recipe.seed,
                self.marks,
            )
            self.display.say(
                f"Held out {len(self.heldout_examples)} examples ({data.heldout_fraction:.0%}, chosen by content and "
                "seed), because data.heldout names none."
            )
        config = self.own_config
        if self.problem == "regression":
            self._check_numbers(train)
            self.check_start(1, "data of numbers")
            self.check_head(config, 1, "data of numbers")
        else:
            self._find_labels(config, train, heldout)
        self._warn_of_repeats()

    def _records(self, source: str, split: str, limit: int | None) -> Records:
        records = read_alone(source, self._data, split, limit)
        found, present = without_keys(records, self._data.ignore or ())
        for key in self._data.ignore or ():
            if key not in present and not self.measures_only:
                self.display.warn(f"data.ignore has {key!r}, which no row of {records.source} has.")
        return found

    def _columns(self, records: Records) -> dict[str, str]:
        """Return the file's columns by ours: the recipe's, or GLUE's of a subset."""
        data = self._data
        known = ("text", "text_pair", "label", "tokens", "tags")
        for name in data.columns or {}:
            if name not in known:
                raise UsageError(f"data.columns has {name!r}; the columns are called {listed(known)} here.")
        if data.columns:
            return dict(data.columns)
        glue = GLUE.get(data.subset or "")
        first = records.rows[0]
        return dict(glue.columns) if glue is not None and glue.columns["text"] in first else {}

    def _find_problem(self, records: Records, columns: Mapping[str, str]) -> Problem:
        if self._task.problem != "auto":
            return self._task.problem
        if self._uses_glue:
            return "regression" if GLUE[str(self._data.subset)].labels is None else "single-label"
        return recognize(records, columns)

    def _read(self, records: Records, columns: Mapping[str, str]) -> list[Labeled]:
        hidden = self._uses_glue and self.problem != "regression"
        return read_labeled(records, self.problem, columns, hidden)

    def _check_numbers(self, records: Records) -> None:
        if self._data.labels is not None:
            raise UsageError(
                "data.labels names classes, and the labels of this data are numbers (regression)."
            )
        if len({example.label for example in self.train_examples}) < 2 and not self.measures_only:
            raise UsageError(
                f"{records.source}: all training examples have the number {self.train_examples[0].label:g}; there is "
                "nothing to learn."
            )

    def _find_labels(self, config: Any, train: Records, heldout: Records) -> None:
        """Find the set of labels, and refuse rows outside of it."""
        given: Sequence[str | int] | None = self._data.labels
        if given is None and self._uses_glue:
            given = GLUE[str(self._data.subset)].labels
        from moslora.models.heads import own_head

        if self.recipe.start_from is not None and (Path(self.recipe.start_from) / "config.json").is_file():
            self.take_adapter(Path(self.recipe.start_from))
        known = self.adapter_labels
        if known is None and own_head(config, self.auto_class) and self._task.head == "auto":
            known = as_label_set(config.id2label, f"the trained head of {self.base.name}")
            if known is None:
                known = LabelSet(
                    tuple(map(str, range(config.num_labels))), tuple(range(config.num_labels)), "its head"
                )
                known = known if given is None and self._has_numbers() else None
        has_own = known is not None
        labels = find_labels(given, self.train_examples, train.source, known)
        if has_own and given is not None and known is not None and known.names != labels.names:
            raise UsageError(
                f"data.labels is {listed(labels.names)}, and {known.origin} has {listed(known.names)}, in this order. "
                "Leave data.labels out, or set task.head=new to train a new head."
            )
        self.labels = labels
        self.check_start(len(labels.names), f"data with the labels {listed(labels.names)}")
        self.check_head(config, len(labels.names), f"data with the labels {listed(labels.names)}")
        self.train_labels = index_labels(self.train_examples, labels, train.source)
        self.heldout_labels = index_labels(self.heldout_examples, labels, heldout.source)
        if not has_own and not self.measures_only:
            check_all_present(self.train_labels, labels, train.source)
        unseen = set(range(len(labels.names))) - {index for row in self.heldout_labels for index in row}
        if unseen and not self.measures_only:
            names = listed(quoted(labels.names[index]) for index in sorted(unseen))
            self.display.warn(
                f"No held-out example has the label {names}: how it is predicted is not measured."
            )
        self.positive = self._positive(labels)
        self._check_metric()

    def _has_numbers(self) -> bool:
        return all(isinstance(one, int) for e in self.train_examples for one in _classes(e.label))

    def _positive(self, labels: LabelSet) -> int | None:
        """Return the class whose F1 is taken: of two the second, unless the recipe says."""
        wanted = self._task.positive
        if wanted is None:
            return 1 if self.problem == "single-label" and len(labels.names) == 2 else None
        index = labels.index(wanted)
        if index is None:
            raise UsageError(f"task.positive={wanted} is not one of the labels {listed(labels.spelled)}.")
        if self.problem != "single-label":
            raise UsageError(f"task.positive is for data with one label each; this is {self.problem}.")
        return index

    def _check_metric(self) -> None:
        """Refuse a metric that the problem does not have."""
        wanted = self._task.metric
        have = [name for name in METRICS[self.problem] if name != "f1" or self.positive is not None]
        if self.problem == "tokens" and self.labels is not None and not has_spans(self.labels.names):
            have.remove("entity_f1")
        if wanted not in ("auto", "none") and wanted not in have:
            raise UsageError(
                f"task.metric={wanted} is not measured for {self.problem} with these labels; choose from "
                f"{listed(have)}."
            )

    def _warn_of_repeats(self) -> None:
        """Warn of texts that stand with two labels, and of those on both sides."""
        if self.measures_only:
            return
        labels: dict[str, set[Any]] = {}
        for example in self.train_examples:
            labels.setdefault(example.identity, set()).add(example.label)
        unclear = sum(len(own) > 1 for own in labels.values())
        if unclear and self.problem != "regression":
            self.display.warn(
                f"{unclear} of {len(labels)} training texts stand with more than one label, so no model can be right "
                "about all of them."
            )
        shared = sum(example.identity in labels for example in self.heldout_examples)
        if shared:
            self.display.warn(
                f"{shared} of {len(self.heldout_examples)} held-out texts are also trained on, so the held-out numbers "
                "are too good. Remove these texts from one of the two files."
            )

    def take_adapter(self, adapter: Path) -> None:
        """Read the labels of an adapter that is to be measured, in its order."""
        beside = adapter / "config.json"
        if beside.is_file():
            self.adapter_labels = as_label_set(read_json(beside).get("id2label"), f"the adapter {adapter}")
        elif self._data.labels is None:
            self.display.warn(
                f"{adapter} does not say what its labels are called, so they are those of the data in sorted order. "
                "Give data.labels in the order of its training to be sure."
            )

    def marks(self, example: Any) -> Sequence[str]:
        """Return the text or words of an example."""
        return [example.identity]

    # ---- encoding ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Convert the base if it must be, encode the examples, and show what is trained on."""
        recipe = self.recipe
        self.base_model.convert(self.display.say)
        self.tokenizer = load_tokenizer(self.base_model.tokenizer_source, recipe.model.trust_remote_code)
        config = self.own_config
        limit = resolve_trainer_arguments(recipe, self.device)["max_length"]
        room = self.room(config)
        if room is not None and (limit is None or limit > room):
            if recipe.trainer.get("max_length") is not None:
                self.display.warn(
                    f"trainer.max_length={limit} is more than the {room} positions that the model has."
                )
            limit = room
        encoder = LabelEncoder(self.tokenizer, limit, recipe.data.too_long)
        self.train_set, train_summary = self._encode(encoder, self.train_examples)
        self.heldout_set, heldout_summary = self._encode(encoder, self.heldout_examples)
        if self.validation_examples:
            self.validation_set, _ = self._encode(encoder, self.validation_examples)  # type: ignore[arg-type]
        self._check_vocabulary(config)
        self.by_place = {example.place: example for example in self.heldout_examples}  # type: ignore[misc]
        self.asked = self.heldout_set
        self._check_answer_metrics()
        self._show(train_summary, heldout_summary)

    def _encode(self, encoder: LabelEncoder, examples: Sequence[Labeled]) -> tuple[Any, LabelSummary]:
        labels: list[Any] = [example.label for example in examples]
        if self.labels is not None:
            rows = index_labels(examples, self.labels, self._data.train)
            labels = [self._for_model(row) for row in rows]
            answers = [self.in_words(row if self.problem != "single-label" else row[0]) for row in rows]
        else:
            answers = [self.in_words(label) for label in labels]
        return encode_labeled(encoder, examples, labels, answers)

    def _for_model(self, row: Sequence[int]) -> Any:
        """Return indices of labels as a model has them."""
        assert self.labels is not None
        if self.problem == "multi-label":
            return [float(index in row) for index in range(len(self.labels.names))]
        return list(row) if self.problem == "tokens" else row[0]

    def in_words(self, value: Any) -> str:
        """Return a prediction as text."""
        if self.labels is None:
            return f"{value:.6g}"
        if self.problem == "single-label":
            return str(self.labels.names[value])
        joint = " " if self.problem == "tokens" else ", "
        return joint.join(self.labels.names[index] for index in value) or "(none)"

    def _check_vocabulary(self, config: Any) -> None:
        from moslora.tasks.text.room import check_tokens

        sets = {"held-out": self.heldout_set}
        size = getattr(config.get_text_config(), "vocab_size", None)
        check_tokens(size, sets if self.measures_only else {"training": self.train_set, **sets})

    def _check_answer_metrics(self) -> None:
        for name, metric in self.answer_metrics.items():
            if name in ("loss", *METRICS[self.problem], self.accuracy_name):
                raise UsageError(f"metrics has {name!r}, which is measured already; choose another name.")
            value = metric(self.heldout_set[0].answer, self.heldout_set[0].answer)
            if not isinstance(value, bool | int | float):
                raise UsageError(f"metrics[{name!r}] returned {value!r}; return a bool or a float.")

    def _show(self, train: LabelSummary, heldout: LabelSummary) -> None:
        counts = None
        if self.labels is not None:
            present = Counter(index for row in self.train_labels for index in row)
            counts = {name: present[index] for index, name in enumerate(self.labels.names)}
        show_labeled(self.display, self.problem, counts, train, heldout, self.train_set[0], self.tokenizer)  # type: ignore[arg-type]

    # ---- model ---------------------------------------------------------------------------------------

    def head_settings(self) -> dict[str, Any]:
        """Return size and names of the head, and what kind of labels it has."""
        if self.labels is None:
            return {
                "num_labels": 1,
                "id2label": {0: "LABEL_0"},
                "label2id": {"LABEL_0": 0},
                "problem_type": "regression",
            }
        names = self.labels.names
        settings: dict[str, Any] = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if self.problem in PROBLEM_TYPES:
            settings["problem_type"] = PROBLEM_TYPES[self.problem]
        return settings

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Put the adapter into the model and make transformers' trainer."""
        from moslora.tasks.classification.trainer import build_classification_trainer
        from moslora.tasks.text.precision import train_in_float32

        if self.problem in ("multi-label", "regression") and self.recipe.trainer.get(
            "label_smoothing_factor"
        ):
            raise UsageError(
                f"trainer.label_smoothing_factor cannot be set for {self.problem}; leave it out."
            )
        config = build_trainer_config(self.recipe, self.device, output_dir)
        adapted = self.put_adapter(model, adapter, config.seed)
        if adapter is not None:
            train_in_float32(adapted)
        evaluates = config.eval_strategy != "no"
        return build_classification_trainer(
            adapted,
            config,
            self.tokenizer,
            self.problem,
            self.pad_id,
            callbacks,
            self.train_set,  # type: ignore[arg-type]
            self.heldout_set if evaluates else None,  # type: ignore[arg-type]
        )

    # ---- measurements --------------------------------------------------------------------------------

    def run_examples(
        self, model: nn.Module, examples: Sequence[Any], label: str
    ) -> list[tuple[float, int, Any]]:
        """Run a model on examples; predictions are as ``run_batches`` has them."""
        found: list[Any] = [None] * len(examples)
        with self.display.progress(label, len(examples)) as progress:
            for numbers, results in run_batches(model, examples, self.problem, self.pad_id, self.device):
                for number, result in zip(numbers, results, strict=True):
                    found[number] = result
                progress.advance(len(numbers))
                self.raise_if_stopped()
        return found

    def answer(self, encoded: EncodedLabel, value: Any) -> Answer:
        """Return a prediction as an answer."""
        example: Any = self.by_place[encoded.place]
        truth = self._truth(encoded)
        kind = example.extra.get("kind")
        return Answer(
            place=encoded.place,
            prompt=example.prompt,
            reference=encoded.answer if self.problem != "tokens" else self.in_words(truth),
            text=self.in_words(value),
            correct=None if self.problem == "regression" else value == truth,
            kind=None if kind is None else str(kind),
            value={"truth": truth, "predicted": value},
        )

    def _truth(self, encoded: EncodedLabel) -> Any:
        """Return an example's label in the form of a prediction."""
        if self.problem == "multi-label":
            return [index for index, has in enumerate(encoded.label) if has]
        if self.problem == "tokens":
            return [encoded.label[position] for position in encoded.heads]
        return encoded.label

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """Return the predictions, to be measured."""
        truth = [answer.value["truth"] for answer in answers]
        return self._scores(truth, [answer.value["predicted"] for answer in answers])

    def _scores(self, truth: list[Any], predicted: list[Any]) -> Scores:
        names = () if self.labels is None else self.labels.names
        return scores_of(self.problem, names, self.positive, truth, predicted)

    def metric_order(self) -> Sequence[str]:
        """Return the metrics of the problem, the recipe's or GLUE's first."""
        first = self._task.metric
        if first == "auto" and self._uses_glue:
            first = GLUE[str(self._data.subset)].metric  # type: ignore[assignment]
        return dict.fromkeys([first, *METRICS[self.problem]]).keys()  # type: ignore[return-value]

    def baseline(self) -> dict[str, float]:
        """Return what always saying the most frequent class, labels, tag, or the mean number, would reach."""
        truth = [self._truth(encoded) for encoded in self.heldout_set]  # type: ignore[arg-type]
        learned = [self._truth(encoded) for encoded in self.train_set]  # type: ignore[arg-type]
        if not learned:
            return {}
        size = 1 if self.labels is None else len(self.labels.names)
        loss, said = constant_losses(learned, truth, self.problem, size)
        values, _ = measure_scores(self._scores(truth, said))
        return {"loss": loss, **values}

    def tables(self, answers: Sequence[Answer]) -> list[Table]:
        """Return a confusion matrix, or how each label or tag was predicted."""
        truth = [answer.value["truth"] for answer in answers]
        predicted = [answer.value["predicted"] for answer in answers]
        return [] if self.labels is None else [table_of(self.problem, truth, predicted, self.labels.names)]

    def probe(self) -> list[Any]:
        """Return the first held-out examples, cut to a length that is quick, with all arguments."""
        import torch

        found: list[dict[str, Tensor]] = []
        for encoded in self.heldout_set[:PROBES]:
            ids = encoded.input_ids[:PROBE_TOKENS]
            given = {
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            }
            types = encoded.token_type_ids  # type: ignore[attr-defined]
            if types is not None:
                given["token_type_ids"] = torch.tensor([types[:PROBE_TOKENS]])
            found.append(given)
        return found


def _classes(label: Any) -> Sequence[Any]:
    return label if isinstance(label, tuple) else (label,)
