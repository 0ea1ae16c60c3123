"""Text: supervised fine-tuning of causal language models with TRL's ``SFTTrainer``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import Summary, lengths_of
from moslora.data.preview import MOST, preview
from moslora.data.shapes import Example
from moslora.data.sources import Part, read_sources, weigh
from moslora.data.splitting import overlap, prompt_of, split_heldout
from moslora.data.stored.encoding import EncodedSet, each_apart, encode_any
from moslora.data.stored.examples import joined, places_of
from moslora.data.stored.workers import Workers, count_cores
from moslora.data.tokenization import Encoded, Encoder
from moslora.errors import UsageError
from moslora.models.loading import load_tokenizer
from moslora.recipe.trainer_arguments import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.also import encode_also
from moslora.tasks.language import LanguageTask, judge_answer, show_data
from moslora.tasks.task import Answer
from moslora.tasks.text.generation import Generation, generate_from_prompts
from moslora.tasks.text.loss import Batch, text_batches
from moslora.tasks.text.padding import choose_padding_free
from moslora.tasks.text.room import check_room

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

__all__ = ["TextTask"]

# Answers generated at once.
ANSWER_BATCH = 64
# Held-out examples, and tokens of each, whose logits the proof compares.
PROBES, PROBE_TOKENS = 4, 128


class TextTask(LanguageTask):
    """Fine-tune a causal language model on messages, prompts with completions, or text."""

    measures_together = True

    train_summary: Summary
    heldout_summary: Summary
    stop_ids: list[int]

    def read(self) -> None:
        """Read the data and find the base model."""
        data = self.recipe.data
        self.base_model.find(self.needs_weights)
        workers = self._workers()
        train = read_sources(data.train, data, data.train_split, data.limit, workers)
        parts = list(train)
        self.data_hashes = _hashes("train", train)
        self.train_examples = joined([part.examples for part in train])
        if data.heldout is not None or data.heldout_split is not None:
            split = data.heldout_split or "train"
            heldout = read_sources(data.heldout or data.train, data, split, None, workers)
            parts += heldout
            self.data_hashes |= _hashes("heldout", heldout)
            self.heldout_examples = joined([part.examples for part in heldout])
        else:
            self.train_examples, self.heldout_examples = split_heldout(
                self.train_examples, data.heldout_fraction, self.recipe.seed
            )
            self.display.say(
                f"Held out {len(self.heldout_examples)} examples ({data.heldout_fraction:.0%}, chosen "
                "by content and seed), because data.heldout names none."
            )
        self.warn_of_idle_entries([(part.records, part.present) for part in parts])
        self.read_also()
        shared = overlap(self.train_examples, self.heldout_examples)
        if shared and not self.measures_only:
            self.display.warn(
                f"{shared} of {len(self.heldout_examples)} held-out prompts are also trained on, so the "
                "held-out numbers are too good. Remove these prompts from one of the two files."
            )
        self._weigh(train)

    def _weigh(self, parts: Sequence[Part]) -> None:
        """Repeat a file's examples, or take a share of them, as its weight says; held-out ones stay as they are."""
        if len(parts) < 2 and parts[0].weight == 1:
            return
        chosen, files = weigh(parts, self.train_examples, self.recipe.seed)
        if not len(chosen):
            raise UsageError("The weights of data.train leave no example to train on; raise them.")
        self.train_examples = chosen
        rows = [
            [one.name, str(one.examples), f"{one.weight:g}", str(one.count), f"{one.count / len(chosen):.0%}"]
            for one in files
        ]
        columns = ["", "examples", "weight", "in an epoch", "share"]
        self.display.table("Training data", columns, rows)

    def _workers(self) -> Workers:
        """Return the processes that read and tokenize what is too large for memory."""
        processes = self.recipe.trainer.get("dataset_num_proc") or count_cores()
        return Workers(processes, self.display, self.raise_if_stopped)

    def prepare(self) -> None:
        """Convert the base if it must be, encode the examples, and show what is trained on."""
        recipe = self.recipe
        self.base_model.convert(self.display.say)
        self.tokenizer = load_tokenizer(self.base_model.tokenizer_source, recipe.model.trust_remote_code)
        encoder = Encoder(
            self.tokenizer,
            recipe.data.template,
            recipe.data.train_on,
            resolve_trainer_arguments(recipe, self.device)["max_length"],
            recipe.data.too_long,
        )
        if recipe.data.train_on == "each":
            self.train_examples, self.heldout_examples, self.validation_examples = (
                each_apart(examples)
                for examples in (self.train_examples, self.heldout_examples, self.validation_examples)
            )
        self.train_set, self.train_summary = encode_any(self.train_examples, encoder)
        self.heldout_set, self.heldout_summary = encode_any(self.heldout_examples, encoder)
        if len(self.validation_examples):
            self.validation_set, _ = encode_any(self.validation_examples, encoder)
        self.by_place = places_of(self.heldout_examples, recipe.data.train_on == "each")
        self.stop_ids = sorted(encoder.stop_ids)
        # Plain text has no question, so there is nothing to answer.
        with_question = (encoded for encoded in self.heldout_set if encoded.prompt_ids)
        self.asked = list(islice(with_question, recipe.task.generate_examples))
        self.check_references()
        self._check_room()
        self.also = encode_also(
            self.also_examples, encoder, self._config(), self.also_limit, warn=self.display.warn
        )
        if recipe.task.metric != "none" and not self.asked:
            self.display.warn(
                f"task.metric={recipe.task.metric} has no answer to judge: no held-out example has an answer, or "
                "task.generate_examples is 0. Only the held-out loss is measured."
            )
        pieces = preview(self.train_set[0], self.tokenizer, MOST)
        show_data(self.display, self.train_summary, self.heldout_summary, pieces)

    def _check_room(self) -> None:
        """Refuse tokens and positions that the model does not have."""
        sets = {"held-out": self.heldout_set}
        if not self.measures_only:
            sets = {"training": self.train_set, **sets}
        check_room(self._config(), sets, self.asked, self.recipe.task.max_new_tokens, self.display.warn)

    def _config(self) -> Any:
        model = self.base_model.handed_over
        return model.config if model is not None else self.base_model.config()

    def part_of(self, module: str) -> str:
        """Return ``"language"``: a text model has one part."""
        return "language"

    def marks(self, example: Example) -> Sequence[str]:
        """Return the prompt of an example."""
        return [prompt_of(example)]

    def batches(self, examples: Sequence[Encoded]) -> Iterator[Batch]:
        """Make batches whose loss is measured."""
        return text_batches(examples, self.pad_id, self.device)

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make TRL's trainer on the encoded examples; their labels say what is trained on."""
        from moslora.tasks.text.trainer import build_sft_trainer

        config = build_trainer_config(self.recipe, self.device, output_dir)
        if not config.packing:
            if "padding_free" not in self.recipe.trainer:
                lengths = lengths_of(self.train_set)
                config.padding_free = choose_padding_free(
                    model, config, lengths, self.pad_id, self.recipe.seed, self.display
                )
            if config.padding_free:
                config.max_length = None  # TRL requires it; the encoder has applied the limit
        # The encoder has cut, dropped or refused long examples; the trainer must not do it again.
        config.dataset_kwargs = None if config.packing else {"skip_prepare_dataset": True}
        evaluates = config.eval_strategy != "no"
        return build_sft_trainer(
            model,
            config,
            self.tokenizer,
            adapter,
            callbacks,
            _as_dataset(self.train_set),
            _as_dataset(self.heldout_set) if evaluates else None,
            say=self.display.say,
        )

    def ask(self, model: nn.Module, chosen: Sequence[Encoded], label: str) -> list[Answer]:
        """Generate an answer to each example, in batches, and judge it by the recipe's metric."""
        task = self.recipe.task
        settings = Generation(task.max_new_tokens, self.stop_ids, self.pad_id)
        with self.display.progress(f"Answers, {label}", len(chosen)) as progress:

            def on_batch(count: int) -> None:
                progress.advance(count)
                self.raise_if_stopped()

            prompts = [encoded.prompt_ids for encoded in chosen]
            texts = generate_from_prompts(
                model,
                self.tokenizer,
                prompts,
                settings,
                self.device,
                self._at_once(len(prompts)),
                on_batch,
                self.team,
            )
        return [
            judge_answer(self.by_place[encoded.place], encoded.answer, text.strip(), task.metric)
            for encoded, text in zip(chosen, texts, strict=True)
        ]

    def _at_once(self, prompts: int) -> int:
        """Return how many answers are generated at once: no more than a process's share of them."""
        return max(1, min(ANSWER_BATCH, -(-prompts // self.team.size)))

    def probe(self) -> list[Tensor]:
        """Return the first held-out examples, cut to a length that is quick."""
        import torch

        return [torch.tensor([e.input_ids[:PROBE_TOKENS]]) for e in self.heldout_set[:PROBES]]


def _hashes(name: str, parts: Sequence[Part]) -> dict[str, str]:
    """Return the hash of a file under the name of its half, and of several each under its own."""
    several = len(parts) > 1
    return {f"{name}, {part.name}" if several else name: part.records.sha256 for part in parts}


def _as_dataset(encoded: Sequence[Encoded]) -> Dataset:
    from datasets import Dataset

    if isinstance(encoded, EncodedSet):
        return encoded.as_dataset()
    return Dataset.from_dict(
        {"input_ids": [e.input_ids for e in encoded], "labels": [e.labels for e in encoded]}
    )
