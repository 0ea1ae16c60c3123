"""Preferences: causal language models that learn which of two answers is better, with TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.data.columns import without_keys
from moslora.data.encoding import Summary
from moslora.data.files import Records
from moslora.data.naming import rename_columns
from moslora.data.preferences import Preference, to_preferences
from moslora.data.sources import read_alone
from moslora.data.splitting import prompt_of, set_aside, split_heldout, thin_out
from moslora.data.tokenization import Encoder
from moslora.errors import RecipeError, UsageError
from moslora.metrics.change import change_of
from moslora.models.loading import load_tokenizer
from moslora.recipe.preferences import LOSSES, PreferenceLoss
from moslora.recipe.trainer_arguments import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.also import encode_also
from moslora.tasks.language import LanguageTask, judge_answer
from moslora.tasks.preference.collating import rows_of
from moslora.tasks.preference.encoding import Judged, Lengths, encode_preferences, show_preferences
from moslora.tasks.preference.rewards import Scored, measures_of, negative_log_sigmoid, score_preferences
from moslora.tasks.task import Answer, Evaluation
from moslora.tasks.text.generation import Generation, generate_from_prompts
from moslora.tasks.text.loss import Batch, text_batches
from moslora.tasks.text.room import check_room

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

__all__ = ["PreferenceTask"]

# Answers generated at once.
ANSWER_BATCH = 64
# Held-out rows, and tokens of each, whose logits the proof compares.
PROBES, PROBE_TOKENS = 4, 128


class PreferenceTask(LanguageTask):
    """Teach a causal language model which answers are preferred.

    Attributes:
        summaries: Counts of the training and of the held-out rows.
        start_values: What the trained parameters started as, by name, where that is the reference; None else.
        known_references: Log-probabilities of the reference that were computed before, by the rows' hash.
    """

    splits_by_marks = True  # a prompt of several pairs is on one side

    train_examples: Any  # Preferences
    heldout_examples: Any
    validation_examples: Any = ()
    summaries: list[Summary]
    stop_ids: list[int]
    start_values: dict[str, Tensor] | None = None
    known_references: dict[str, Any]

    @property
    def loss_of_recipe(self) -> PreferenceLoss:
        """The recipe's loss."""
        return LOSSES[self._section.loss]

    @property
    def beta(self) -> float:
        """The β of its rewards."""
        own = self._section.beta
        return float(self.loss_of_recipe.beta if own is None else own)

    @property
    def from_start(self) -> bool:
        """Whether the reference is the adapter that training starts from; else it is the base."""
        wanted = self._section.reference
        return wanted == "start" or (wanted == "auto" and self.recipe.start_from is not None)

    @property
    def _section(self) -> Any:
        return self.recipe.task

    # ---- data ----------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the data and find the base model."""
        data: Any = self.recipe.data
        self.base_model.find(self.needs_weights)
        self.known_references = {}
        parts = [without_keys(read_alone(data.train, data, data.train_split, data.limit), data.ignore or ())]
        self.data_hashes = {"train": parts[0][0].sha256}
        self.train_examples = self._preferences(parts[0][0])
        if data.heldout is not None or data.heldout_split is not None:
            records = read_alone(data.heldout or data.train, data, data.heldout_split or "train", None)
            parts.append(without_keys(records, data.ignore or ()))
            self.data_hashes["heldout"] = records.sha256
            self.heldout_examples = self._preferences(parts[1][0])
        else:
            every: Any = self.train_examples
            self.train_examples, self.heldout_examples = split_heldout(
                every, data.heldout_fraction, self.recipe.seed, self.marks
            )
            self.display.say(
                f"Held out {len(self.heldout_examples)} preferences ({data.heldout_fraction:.0%} of the prompts, "
                "chosen "
                "by prompt and seed), because data.heldout names none."
            )
        self.warn_of_idle_entries(parts)
        self.read_also()
        self._check_form(parts[0][0].source)
        trained = {prompt_of(one.example) for one in self.train_examples}
        shared = sum(prompt_of(one.example) in trained for one in self.heldout_examples)
        if shared and not self.measures_only:
            self.display.warn(
                f"{shared} of {len(self.heldout_examples)} held-out prompts are also trained on, so the held-out "
                "numbers are too good. Remove these prompts from one of the two files."
            )

    def _preferences(self, records: Records) -> list[Preference]:
        data = self.recipe.data
        renamed = rename_columns(records, data.columns)
        return to_preferences(renamed, data.format, data.reasoning, data.system_turn)

    def _check_form(self, source: str) -> None:
        """Refuse labeled answers where a loss compares two."""
        single = next((one.place for one in self.train_examples if not one.is_pair), None)
        if single is not None and self.loss_of_recipe.trainer != "kto" and not self.measures_only:
            raise UsageError(
                f"{source}, {single}: has one answer and a label, and task.loss={self._section.loss} compares two "
                "answers. Set task.loss=kto, or give prompt, chosen and rejected."
            )

    def marks(self, example: Any) -> Sequence[str]:
        """Return the prompt of a preference."""
        found: Preference = example
        return [prompt_of(found.example)]

    def set_aside(self, count: int, heldout: int | None) -> int:
        """Take preferences out of the training data to choose a learning rate by; see ``LanguageTask``."""
        self.train_examples, self.validation_examples = set_aside(
            self.train_examples, count, self.recipe.seed, self.marks, self.marks
        )
        if heldout is not None:
            self.heldout_examples = thin_out(self.heldout_examples, heldout)
        return len(self.validation_examples)

    def prepare(self) -> None:
        """Convert the base if it must be, encode the preferences, and show what is learned."""
        recipe, task = self.recipe, self._section
        self.base_model.convert(self.display.say)
        self.tokenizer = load_tokenizer(self.base_model.tokenizer_source, recipe.model.trust_remote_code)
        settings = resolve_trainer_arguments(recipe, self.device)
        encoder = Encoder(
            self.tokenizer, recipe.data.template, "completions", settings["max_length"], recipe.data.too_long
        )
        train: Any
        heldout: Any
        train, counts = encode_preferences(self.train_examples, encoder)
        heldout, heldout_counts = encode_preferences(self.heldout_examples, encoder)
        self.train_set, self.heldout_set, self.summaries = train, heldout, [counts, heldout_counts]
        if self.validation_examples:
            aside: Any
            aside, _ = encode_preferences(self.validation_examples, encoder)
            self.validation_set = aside
        self.by_place = {one.place: one.example for one in self.heldout_examples}
        self.stop_ids = sorted(encoder.stop_ids)
        # What answers an unwanted answer's prompt right is not known.
        asked: Any = [one for one in heldout if one.chosen is not None]
        self.asked = asked[: task.generate_examples]
        self.check_references()
        model = self.base_model.handed_over
        config = model.config if model is not None else self.base_model.config()
        sets: dict[str, Any] = {"held-out": [row for one in heldout for row in one.rows]}
        if not self.measures_only:
            sets = {"training": [row for one in train for row in one.rows], **sets}
        check_room(config, sets, self.asked, task.max_new_tokens, self.display.warn)
        self.also = encode_also(self.also_examples, encoder, config, self.also_limit, warn=self.display.warn)
        lengths = Lengths.of(train)
        self.remarks = [lengths.sentence(), *([warning] if (warning := lengths.warning()) else [])]
        learns_prompts = self.loss_of_recipe.trainer == "orpo"
        show_preferences(self.display, self.tokenizer, train, heldout, self.summaries, learns_prompts)

    # ---- the adapter ---------------------------------------------------------------------------------

    def part_of(self, module: str) -> str:
        """Return ``"language"``: the model has one part."""
        return "language"

    def check_adapter(self) -> None:
        """Put the adapter into the base without weights; refuse one on the head, which TRL would not train."""
        super().check_adapter()
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not self.loss_of_recipe.has_reference:
            return
        skeleton = self.base_model.build_skeleton()
        from peft import get_peft_model

        settings: Any = self.adapter_config(skeleton)
        settings.init_lora_weights = True  # other starts may need the weights
        head = get_peft_model(skeleton, settings, low_cpu_mem_usage=True).get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            raise RecipeError(
                f"adapter.target_modules adapts the output head, and TRL's trainer of task.loss={self._section.loss} "
                "multiplies by the head's weight without its adapter, which would never be trained. Leave the head out."
            )

    def check_method(self, name: str, adapter: PeftConfig | None) -> None:
        """Refuse methods after which the reference would be gone."""
        from moslora.tasks.preference.trainers import why_no_reference

        reason = why_no_reference(adapter)
        if reason:
            raise UsageError(f"Method {name} cannot be compared on preferences: {reason}")

    # ---- training ------------------------------------------------------------------------------------

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make TRL's trainer of the recipe's loss on the encoded preferences."""
        from moslora.tasks.preference.trainers import build_preference_trainer

        config = build_trainer_config(self.recipe, self.device, output_dir)
        train = self._rows(self.train_set, config)
        evaluates = config.eval_strategy != "no"
        trainer: Trainer = build_preference_trainer(
            self.loss_of_recipe.trainer,
            model,
            config,
            self.tokenizer,
            adapter,
            callbacks,
            train,
            self._rows(self.heldout_set, config) if evaluates else None,
            self.pad_id,
        )
        return trainer

    def _rows(self, judged: Any, config: Any) -> list[dict[str, Any]]:
        size = config.per_device_train_batch_size
        return rows_of(judged, self.loss_of_recipe.trainer, config.seed, size, config.max_length)

    def begin(self, trainer: Any, folder: Path | None) -> None:
        """Compute the reference's log-probabilities of the training rows, before the first step."""
        from moslora.tasks.preference.reference import add_reference

        if self.from_start:
            self.start_values = {
                name: parameter.detach().cpu().clone()
                for name, parameter in trainer.model.named_parameters()
                if parameter.requires_grad
            }
        loss = self.loss_of_recipe
        if loss.has_reference:
            about = {
                "from_start": self.from_start,
                "ld_alpha": getattr(trainer.args, "ld_alpha", None),
                "loss": self._section.loss,
                "batch": trainer.args.per_device_train_batch_size,
            }
            add_reference(
                trainer,
                loss.trainer,
                self.from_start,
                self.known_references,
                folder,
                self.display,
                self.raise_if_stopped,
                about,
            )

    # ---- measuring -----------------------------------------------------------------------------------

    def batches(self, examples: Any) -> Iterator[Batch]:
        """Make batches of the rows of preferences."""
        return text_batches([row for one in examples for row in one.rows], self.pad_id, self.device)

    def scored(self, model: nn.Module, examples: Sequence[Any], label: str) -> list[Scored]:
        """Measure every preference under a model and its reference.

        Args:
            model: Base or adapted model.
            examples: ``heldout_set`` or another set.
            label: The model's name in the progress display.
        """
        judged: Sequence[Judged] = examples
        with self.display.progress(f"Preferences, {label}", sum(len(one.rows) for one in judged)) as progress:

            def on_batch(count: int) -> None:
                progress.advance(count)
                self.raise_if_stopped()

            return score_preferences(model, judged, self.device, self.pad_id, self.start_values, on_batch)

    def score(self, model: nn.Module, examples: Sequence[Any], label: str) -> list[float]:
        """Return the negative log-likelihood of each preference, -log σ of its margin, in the order of ``examples``."""
        loss, beta = self.loss_of_recipe, self.beta
        return [negative_log_sigmoid(one.margin(loss, beta)) for one in self.scored(model, examples, label)]

    def loss(self, model: nn.Module, label: str) -> float:
        """Return the held-out loss: the mean of ``score``."""
        return fmean(self.score(model, self.heldout_set, label))

    def shares(self, model: nn.Module, label: str) -> Mapping[str, list[bool]]:
        """Return of which held-out pairs the model finds the chosen answer more probable."""
        found = [one.is_preferred() for one in self.scored(model, self.heldout_set, label)]
        pairs = [one for one in found if one is not None]
        return {"prefers_chosen": pairs} if pairs else {}

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure held-out preferences, and the answers that the model gives by itself."""
        scored = self.scored(model, self.heldout_set, label)
        metrics, intervals = measures_of(scored, self.loss_of_recipe, self.beta)
        answered = self.answers_measured(model, label)
        if answered.answers:
            lengths = [
                len(self.tokenizer(a.text, add_special_tokens=False)["input_ids"]) for a in answered.answers
            ]
            metrics["answer_tokens"] = fmean(lengths)
        unit = "held-out pairs" if all(one.is_pair for one in self.heldout_set) else "held-out preferences"  # type: ignore[attr-defined]
        return Evaluation(
            {**metrics, **answered.metrics},
            len(self.heldout_set),
            {**intervals, **answered.intervals},
            answered.answers,
            unit,
        )

    def notes(self, before: Evaluation, after: Evaluation) -> list[str]:
        """Say what the loss alone does not show: both answers less likely, or answers that grew."""
        one, two = before.metrics, after.metrics
        notes = []
        names = ("chosen_logp", "rejected_logp")
        if all(name in one and change_of(one[name], two[name], "higher") == "worse" for name in names):
            notes.append(
                "Both answers became less likely: the log-probability of chosen ones fell from "
                f"{one['chosen_logp']:.1f} to {two['chosen_logp']:.1f}, of rejected ones from "
                f"{one['rejected_logp']:.1f} to {two['rejected_logp']:.1f}. The margin grew because the rejected ones "
                "fell further, and other answers took their place: read the answers side by side. A higher task.beta, "
                "fewer steps, or a loss that holds the chosen ones up (orpo, apo-zero, nca) counters it."
                if two["reward_margin"] > one["reward_margin"]
                else "Both answers became less likely, and the preferred ones not less so than the others: the "
                f"log-probability of chosen ones went from {one['chosen_logp']:.1f} to {two['chosen_logp']:.1f}."
            )
        if "answer_tokens" in one and two["answer_tokens"] > 1.5 * one["answer_tokens"]:
            notes.append(
                f"The model's own answers grew from {one['answer_tokens']:.0f} to {two['answer_tokens']:.0f} tokens."
            )
        return notes

    def ask(self, model: nn.Module, chosen: Sequence[Any], label: str) -> list[Answer]:
        """Generate an answer to each prompt, in batches, and judge it by the recipe's metric."""
        task = self._section
        settings = Generation(task.max_new_tokens, self.stop_ids, self.pad_id)
        with self.display.progress(f"Answers, {label}", len(chosen)) as progress:

            def on_batch(count: int) -> None:
                progress.advance(count)
                self.raise_if_stopped()

            prompts = [encoded.prompt_ids for encoded in chosen]
            texts = generate_from_prompts(
                model, self.tokenizer, prompts, settings, self.device, ANSWER_BATCH, on_batch
            )
        judged = (
            judge_answer(self.by_place[encoded.place], encoded.answer, text.strip(), task.metric)
            for encoded, text in zip(chosen, texts, strict=True)
        )
        # The example is that of one answer, and says so; the question is the row's.
        return [replace(answer, place=row.place) for answer, row in zip(judged, chosen, strict=True)]

    def probe(self) -> list[Tensor]:
        """Return the first held-out rows, cut to a length that is quick."""
        import torch

        return [torch.tensor([one.input_ids[:PROBE_TOKENS]]) for one in self.heldout_set[:PROBES]]
