"""Reward models: a causal model with one output, which is to be higher for the better of two answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.columns import without_keys
from moslora.data.files import Records
from moslora.data.naming import rename_columns
from moslora.data.preferences import Preference, to_preferences
from moslora.data.sources import read_alone
from moslora.data.splitting import prompt_of, split_heldout
from moslora.data.tokenization import Encoder
from moslora.errors import UsageError
from moslora.metrics.margins import PairScores, reliability
from moslora.metrics.scored import Scores
from moslora.models.loading import load_tokenizer
from moslora.recipe.trainer_arguments import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.head import HeadTask
from moslora.tasks.language import question_of
from moslora.tasks.reward.encoding import EncodedPair, encode_pairs, longer_share, show_pairs
from moslora.tasks.task import Answer, Table

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import Trainer, TrainerCallback

__all__ = ["RewardTask"]

# Held-out rows, and tokens of each, whose rewards the proof compares.
PROBES, PROBE_TOKENS = 4, 128
BATCH_TOKENS = 4096  # in a batch that is measured, with padding


class RewardTask(HeadTask):
    """Fine-tune a causal model with a scalar head on pairs of answers."""

    train_examples: list[Preference]  # type: ignore[assignment]
    heldout_examples: list[Preference]  # type: ignore[assignment]
    accuracy_name = "accuracy"
    preferred_length = "longer"

    @property
    def baseline_note(self) -> str:  # type: ignore[override]
        """What stands beside the measurements."""
        return f"Without a model: always preferring the {self.preferred_length} answer, as most training pairs do."

    # ---- data ----------------------------------------------------------------------------------------

    def read_data(self) -> None:
        """Read the pairs, and hold them against the base's head."""
        data: Any = self.recipe.data
        self.check_start(1, "a reward")
        self.check_head(self.own_config, 1, "a reward")
        train = self._records(data.train, data.train_split, data.limit)
        self.data_hashes = {"train": train.sha256}
        self.train_examples = self._pairs(train)
        if data.heldout is not None or data.heldout_split is not None:
            heldout = self._records(data.heldout or data.train, data.heldout_split or "train", None)
            self.data_hashes["heldout"] = heldout.sha256
            self.heldout_examples = self._pairs(heldout)
        else:
            self.train_examples, self.heldout_examples = split_heldout(  # type: ignore[assignment]
                self.train_examples,  # type: ignore[arg-type]
                data.heldout_fraction,
                self.recipe.seed,
                self.marks,
            )
            self.display.say(
                f"Held out {len(self.heldout_examples)} pairs ({data.heldout_fraction:.0%}, chosen by prompt and "
                "seed), because data.heldout names none."
            )
        trained = {mark for pair in self.train_examples for mark in self.marks(pair)}
        shared = sum(not trained.isdisjoint(self.marks(pair)) for pair in self.heldout_examples)
        if shared and not self.measures_only:
            self.display.warn(
                f"{shared} of {len(self.heldout_examples)} held-out prompts are also trained on, so the held-out "
                "numbers are too good. Remove these prompts from one of the two files."
            )

    def _records(self, source: str, split: str, limit: int | None) -> Records:
        ignore = self.recipe.data.ignore or ()
        records, present = without_keys(read_alone(source, self.recipe.data, split, limit), ignore)
        for key in ignore:
            if key not in present and not self.measures_only:
                self.display.warn(f"data.ignore has {key!r}, which no row of {records.source} has.")
        return records

    def _pairs(self, records: Records) -> list[Preference]:
        data = self.recipe.data
        renamed = rename_columns(records, data.columns)
        return to_preferences(renamed, "preference", data.reasoning, data.system_turn)

    def marks(self, example: Any) -> Sequence[str]:
        """Return the prompt of a pair."""
        return [prompt_of(example.chosen)]

    def prepare(self) -> None:
        """Convert the base if it must be, encode the pairs, and show what is trained on."""
        recipe = self.recipe
        self.base_model.convert(self.display.say)
        self.tokenizer = load_tokenizer(self.base_model.tokenizer_source, recipe.model.trust_remote_code)
        limit = resolve_trainer_arguments(recipe, self.device)["max_length"]
        config = self.own_config
        room = self.room(config)
        if room is not None and (limit is None or limit > room):
            limit = room
        encoder = Encoder(self.tokenizer, recipe.data.template, "completions", limit, recipe.data.too_long)
        pairs, summaries = [], []
        for examples in (self.train_examples, self.heldout_examples):
            found, summary = encode_pairs(examples, encoder)
            pairs.append(found)
            summaries.append(summary)
        self.train_set, self.heldout_set = pairs  # type: ignore[assignment]
        if self.validation_examples:
            self.validation_set, _ = encode_pairs(self.validation_examples, encoder)  # type: ignore[arg-type, assignment]
        self.by_place = {pair.place: pair.chosen for pair in self.heldout_examples}  # type: ignore[misc]
        self.asked = self.heldout_set
        self._check_vocabulary(config)
        if self.answer_metrics:
            raise UsageError("metrics judges texts, and a reward model writes none.")
        self.preferred_length = "longer" if longer_share(pairs[0]) >= 0.5 else "shorter"
        show_pairs(self.display, self.tokenizer, pairs[0], pairs[1], summaries)

    def _check_vocabulary(self, config: Any) -> None:
        from moslora.tasks.text.room import check_tokens

        sets = {"held-out": self.heldout_set}
        size = getattr(config.get_text_config(), "vocab_size", None)
        check_tokens(size, sets if self.measures_only else {"training": self.train_set, **sets})

    # ---- model ---------------------------------------------------------------------------------------

    def head_settings(self) -> dict[str, Any]:
        """Return the head's size, and what its output is called."""
        return {
            "num_labels": 1,
            "id2label": {0: "reward"},
            "label2id": {"reward": 0},
            "problem_type": "regression",
        }

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Put the adapter into the model and make TRL's trainer."""
        from moslora.tasks.reward.trainer import build_reward_trainer
        from moslora.tasks.text.precision import train_in_float32

        config = build_trainer_config(self.recipe, self.device, output_dir)
        adapted = self.put_adapter(model, adapter, config.seed)
        evaluates = config.eval_strategy != "no"
        trainer = build_reward_trainer(
            adapted,
            config,
            self.tokenizer,
            callbacks,
            self.train_set,  # type: ignore[arg-type]
            self.heldout_set if evaluates else None,  # type: ignore[arg-type]
        )
        if adapter is not None:
            train_in_float32(trainer.model)
        return trainer

    # ---- measurements --------------------------------------------------------------------------------

    def run_examples(
        self, model: nn.Module, examples: Sequence[Any], label: str
    ) -> list[tuple[float, int, Any]]:
        """Run a model on pairs; a prediction is the rewards of both answers."""
        import torch

        from moslora.tasks.text.padding import pad_rows

        model.eval()
        found: list[Any] = [None] * len(examples)
        with self.display.progress(label, len(examples)) as progress:
            for numbers in _in_batches(examples):
                rows = [ids for n in numbers for ids in (examples[n].chosen_ids, examples[n].rejected_ids)]
                arguments = {
                    "input_ids": pad_rows(rows, self.pad_id).to(self.device),
                    "attention_mask": pad_rows([[1] * len(row) for row in rows], 0).to(self.device),
                }
                with torch.inference_mode():
                    rewards = model(**arguments).logits.float().cpu().reshape(-1, 2).tolist()
                for number, (chosen, rejected) in zip(numbers, rewards, strict=True):
                    found[number] = (softplus(rejected - chosen), 1, [chosen, rejected])
                progress.advance(len(numbers))
                self.raise_if_stopped()
        return found

    def answer(self, encoded: EncodedPair, value: Any) -> Answer:
        """Return the rewards of a pair as an answer."""
        chosen, rejected = value
        example: Any = self.by_place[encoded.place]
        kind = example.extra.get("kind")
        return Answer(
            place=encoded.place,
            prompt=f"{question_of(example)}\n⸻ chosen\n{encoded.answer}\n⸻ rejected\n{encoded.rejected}",
            reference="the chosen answer has the higher reward",
            text=f"chosen {chosen:+.3f}, rejected {rejected:+.3f} (margin {chosen - rejected:+.3f})",
            correct=chosen > rejected,
            kind=None if kind is None else str(kind),
            value={"chosen": chosen, "rejected": rejected},
        )

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """Return the margins, to be measured."""
        return PairScores(_margins(answers))

    def baseline(self) -> dict[str, float]:
        """Return what preferring an answer for its length would reach, and the loss of no preference."""
        share = longer_share(self.heldout_set)  # type: ignore[arg-type]
        return {"loss": math.log(2), "accuracy": share if self.preferred_length == "longer" else 1 - share}

    def tables(self, answers: Sequence[Answer]) -> list[Table]:
        """Return how often the preferred answer is the chosen one, by how sure the model is."""
        rows = [
            [f"{low:.0%} to {high:.0%}", count, f"{sure:.1%}", f"{right:.1%}"]
            for low, high, count, sure, right in reliability(_margins(answers))
        ]
        return [
            Table(
                "Reliability",
                ["the model is sure by", "pairs", "on average", "right"],
                rows,
                "By a margin m the model says that it is sigmoid(|m|) sure which answer is better. Where the last two "
                "columns agree, margins can be believed.",
            )
        ]

    def probe(self) -> list[Any]:
        """Return rows of the first held-out pairs, cut to a length that is quick."""
        import torch

        rows = [ids for pair in self.heldout_set for ids in (pair.chosen_ids, pair.rejected_ids)]  # type: ignore[attr-defined]
        return [torch.tensor([ids[:PROBE_TOKENS]]) for ids in rows[:PROBES]]


def softplus(value: float) -> float:
    """Return ``ln(1 + e^value)``: the loss of a margin is that of its negative.

    Example:
        >>> round(softplus(0.0), 4), softplus(1000.0)
        (0.6931, 1000.0)
    """
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _margins(answers: Sequence[Answer]) -> list[float]:
    return [answer.value["chosen"] - answer.value["rejected"] for answer in answers]


def _in_batches(pairs: Sequence[Any]) -> Iterator[list[int]]:
    """Group the positions of pairs of similar length, so that a batch has at most ``BATCH_TOKENS`` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(pairs)), key=lambda i: len(pairs[i].input_ids)):
        if batch and 2 * (len(batch) + 1) * len(pairs[index].input_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
