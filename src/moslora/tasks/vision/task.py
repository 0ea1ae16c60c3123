"""Vision: fine-tuning of vision-language models on conversations about pictures.

Every example is encoded once to be checked, and again when a batch needs it: only the lengths are in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import Summary
from moslora.data.preview import MOST, preview
from moslora.data.shapes import Example
from moslora.data.splitting import prompt_of
from moslora.data.tokenization import Encoded, Encoder
from moslora.errors import ModelError, UsageError
from moslora.models.loading import call_loader
from moslora.recipe.schema import VisionRecipe
from moslora.recipe.trainer_arguments import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.also import encode_also
from moslora.tasks.language import LanguageTask, judge_answer, show_data
from moslora.tasks.task import Answer
from moslora.tasks.text.generation import Generation, generate
from moslora.tasks.text.loss import Batch
from moslora.tasks.vision.cropping import mean_color, measure_kept
from moslora.tasks.vision.encoding import EncodedRows, PictureEncoder, encode_rows
from moslora.tasks.vision.processors import PROCESSOR_FAMILIES, load_processor
from moslora.tasks.vision.reading import PictureFiles, read_examples
from moslora.tasks.vision.scopes import UNQUANTIZED, scope_of, scoped_arguments
from moslora.tasks.vision.shuffling import pair_with_other_images

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

    from moslora.data.files import Records

__all__ = ["VisionTask"]

PICTURE_BATCH = 16  # examples measured or answered at once
PROBES = 4  # held-out examples whose logits the proof compares


class VisionTask(LanguageTask):
    """Fine-tune an image-text-to-text model on conversations about pictures.

    Attributes:
        pictures: The files of the examples' pictures; set by ``read``.
        encoder: Encodes examples with their pictures; set by ``prepare``.
        model_config: The model's configuration; likewise.
    """

    auto_class = "AutoModelForImageTextToText"
    accuracy_name = "accuracy"
    unquantized = UNQUANTIZED
    splits_by_marks = True

    recipe: VisionRecipe
    pictures: PictureFiles
    encoder: PictureEncoder
    model_config: Any
    train_set: EncodedRows
    heldout_set: EncodedRows
    validation_set: EncodedRows
    train_summary: Summary
    heldout_summary: Summary
    _parts: list[tuple[Records, set[str]]]

    # ---- data ----------------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the data, open every picture once, and find the base model."""
        data = self.recipe.data
        if data.heldout is None:
            raise UsageError("data.heldout is missing; task: vision needs held-out examples of their own.")
        self.base_model.find(self.needs_weights)
        self.pictures = PictureFiles(data.max_pixels)
        self.data_hashes = {}
        self.train_examples, self._parts = [], []
        if not self.measures_only:
            self.train_examples = self._read("train", data.train, data.train_split, data.limit)
        self.heldout_examples = self._read("heldout", data.heldout, data.heldout_split or "train", None)
        self.warn_of_idle_entries(self._parts)
        self._warn_of_shared_pictures()
        self.read_also()

    def _read(self, part: str, source: str, split: str, limit: int | None) -> list[Example]:
        examples, hashes, rows = read_examples(
            part, source, split, limit, self.recipe.data, self.pictures, self.display, self.raise_if_stopped
        )
        self.data_hashes |= hashes
        self._parts.append(rows)
        return examples

    def _warn_of_shared_pictures(self) -> None:
        """Warn if held-out examples show pictures that training shows too."""

        def content(part: str, example: Example) -> tuple[str, ...]:
            return prompt_of(example), *self.pictures.hashes_of(part, example)

        train = {content("train", example) for example in self.train_examples}
        heldout = [content("heldout", example) for example in self.heldout_examples]
        same_question = sum(one in train for one in heldout)
        if same_question:
            self.display.warn(
                f"{same_question} of {len(heldout)} held-out questions are also asked about the same picture in "
                "training, so the held-out numbers are too good. Remove these from one of the two files."
            )
        train_pictures = {picture for _, *pictures in train for picture in pictures}
        same_picture = sum(not train_pictures.isdisjoint(pictures) for _, *pictures in heldout)
        if same_picture > same_question:
            self.display.warn(
                f"{same_picture} of {len(heldout)} held-out examples show a picture that training shows too, "
                "so the held-out numbers say little about new pictures. Split the data by picture."
            )

    def marks(self, example: Example) -> Sequence[str]:
        """Return the hashes of a training example's pictures, or its prompt if it has none."""
        return self.pictures.hashes_of("train", example) or [prompt_of(example)]

    def pictures_of(self, example: Example) -> list[str]:
        """Return the files of the pictures that a held-out example shows."""
        return [str(path) for path in self.pictures.of("heldout", example)]

    def prepare(self) -> None:
        """Load the processor, encode every example, and show what is trained on."""
        recipe = self.recipe
        self.base_model.convert(self.display.say)
        limit = resolve_trainer_arguments(recipe, self.device)["max_length"]
        self.encoder = self.make_encoder(limit)
        self.tokenizer = self.encoder.tokenizer
        self.pictures.square = (recipe.data.square, mean_color(self.encoder.processor))
        self._measure_kept()
        if not self.measures_only:
            self.train_set, self.train_summary = self._encode("train", self.train_examples)
        self.heldout_set, self.heldout_summary = self._encode("heldout", self.heldout_examples)
        if self.validation_examples:
            self.validation_set, _ = self._encode("validation", self.validation_examples)
        self.by_place = {example.place: example for example in self.heldout_examples}
        self.asked = self.heldout_set[: recipe.task.generate_examples]
        self.check_references()
        self._encode_also()
        if not self.measures_only:
            pieces = preview(self.train_set[0], self.tokenizer, MOST)
            shortened = ((self.encoder.shorten(piece), trained) for piece, trained in pieces)
            show_data(self.display, self.train_summary, self.heldout_summary, shortened)
        for remark in self.remarks:
            self.display.warn(f"Pictures: {remark}.")

    def _encode_also(self) -> None:
        """Encode the sets of ``evaluation.also``: text for the language part, which sees no picture then."""
        own = self.encoder.encoder
        if own.template == "pair":
            if self.also_examples:
                self.display.say(
                    "evaluation.also is not measured: this family of models reads no text without a question and a "
                    "picture."
                )
            return
        plain = Encoder(self.tokenizer, "plain", own.train_on, own.max_length, "cut")
        with self.encoder.renderer.showing([]):
            self.also = encode_also(
                self.also_examples, own, self.model_config, self.also_limit, plain, self.display.warn
            )

    def _measure_kept(self) -> None:
        """Note how much of the pictures the processor cuts off."""
        kept = measure_kept(
            self.encoder.processor, Counter(self.pictures.sizes.values()), self.recipe.data.square
        )
        self.remarks = [kept.sentence()] if kept is not None and kept.cut else []

    def make_encoder(self, max_length: int | None) -> PictureEncoder:
        """Load the processor, and check that its family is supported.

        Args:
            max_length: Most tokens of an example; None for no limit.
        """
        from transformers import AutoConfig

        source = self.base_model.source
        options: dict[str, Any] = {"trust_remote_code": self.recipe.model.trust_remote_code}
        if source.revision:
            options["revision"] = source.revision
        model = self.base_model.handed_over
        config = call_loader(source, AutoConfig.from_pretrained, options) if model is None else model.config
        self.model_config, kind = config, config.model_type
        if kind not in PROCESSOR_FAMILIES:
            raise ModelError(
                f"{source.name} is of the family {kind!r}; task=vision was tested on "
                f"{', '.join(PROCESSOR_FAMILIES)} only, and would prepare other families' pictures wrongly. Adapt it "
                "in a script of your own with get_peft_model(model, MoSLoRAConfig(...)) and the family's own collator."
            )
        family = PROCESSOR_FAMILIES[kind]
        if self.recipe.model.tokenizer is not None:  # the revision is the model's
            options.pop("revision", None)
        processor = load_processor(self.base_model.tokenizer_source, options)
        if not hasattr(processor, "image_processor"):
            raise ModelError(
                f"{source.name} reads no pictures; choose a vision-language model, or task=text."
            )
        if processor.tokenizer.chat_template is None and not family.prefix:
            processor.tokenizer.chat_template = processor.chat_template
        data = self.recipe.data
        return PictureEncoder(processor, family, data.train_on, max_length, data.too_long)

    def _encode(self, part: str, examples: Sequence[Example]) -> tuple[EncodedRows, Summary]:
        return encode_rows(part, examples, self.encoder, self.pictures, self.display, self.raise_if_stopped)

    # ---- model ---------------------------------------------------------------------------------------

    def part_of(self, module: str) -> str:
        """Return the scope of a module or parameter."""
        return scope_of(module)

    def adapter_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Turn scopes into target modules, with ranks and alphas of their own."""
        return scoped_arguments(model, self.base_model.source.name, self.recipe.scopes, self.recipe.adapter)

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make TRL's trainer; a batch's examples are encoded, and their pictures opened, when it is made."""
        from moslora.tasks.text.trainer import build_sft_trainer

        config = build_trainer_config(self.recipe, self.device, output_dir, remove_unused_columns=False)
        config.dataset_kwargs = {"skip_prepare_dataset": True}
        evaluates = config.eval_strategy != "no"
        return build_sft_trainer(
            model,
            config,
            self.tokenizer,
            adapter,
            callbacks,
            _as_dataset(self.train_set),
            _as_dataset(self.heldout_set) if evaluates else None,
            self._collate,
            self.display.say,
        )

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Encode a batch's examples with their pictures."""
        examples = {"train": self.train_set, "heldout": self.heldout_set}[rows[0]["split"]]
        return self.encoder.batch(*examples.take([row["row"] for row in rows]))

    # ---- measurements --------------------------------------------------------------------------------

    def batches(self, examples: EncodedRows) -> Iterator[Batch]:
        """Make batches whose loss is measured, rows of similar length together."""
        order = sorted(range(len(examples)), key=examples.lengths.__getitem__)
        for start in range(0, len(order), PICTURE_BATCH):
            numbers = order[start : start + PICTURE_BATCH]
            yield numbers, self.encoder.batch(*examples.take(numbers))

    def ask(self, model: nn.Module, chosen: Sequence[Encoded], label: str) -> list[Answer]:
        """Generate an answer to each example, in batches, and judge it by the recipe's metric."""
        examples = [self.by_place[encoded.place] for encoded in chosen]
        return self._ask(model, [(example, example) for example in examples], label)

    def ask_shuffled(self, model: nn.Module, label: str) -> list[Answer]:
        """Generate answers about other examples' pictures; empty unless the recipe wants them."""
        if not self.recipe.task.shuffle_images:
            return []
        asked = [self.by_place[encoded.place] for encoded in self.asked]
        others = pair_with_other_images(asked, self.pictures)
        left = len(asked) - len(others)
        if left:
            self.display.warn(
                f"{left} of {len(asked)} examples have no picture, or no other example has as many; they are not "
                "measured with shuffled pictures."
            )
        pairs = [(asked[number], others[number]) for number in sorted(others)]
        return self._ask(model, pairs, f"{label}, shuffled")

    def _ask(self, model: nn.Module, pairs: Sequence[tuple[Example, Example]], label: str) -> list[Answer]:
        """Ask each first example with the pictures of the second."""
        task = self.recipe.task
        stop_ids = sorted(self.encoder.encoder.stop_ids)
        settings = Generation(task.max_new_tokens, stop_ids, self.pad_id)
        answers: list[Answer] = []
        with self.display.progress(f"Answers, {label}", len(pairs)) as progress:
            for start in range(0, len(pairs), PICTURE_BATCH):
                batch = pairs[start : start + PICTURE_BATCH]
                rows: list[Encoded] = []
                images: list[Any] = []
                for example, other in batch:
                    shown = self.pictures.open("heldout", other)
                    rows.append(self.encoder.encode_question(example, shown))
                    images += shown
                inputs = self.encoder.batch(rows, images, prompts=True)
                texts = generate(model, self.tokenizer, inputs, settings, self.device)
                for (example, other), row, text in zip(batch, rows, texts, strict=True):
                    shown_files = self.pictures_of(other)
                    answers.append(judge_answer(example, row.answer, text.strip(), task.metric, shown_files))
                progress.advance(len(batch))
                self.raise_if_stopped()
        return answers

    def probe(self) -> list[Any]:
        """Return the first held-out examples with their pictures."""
        batches = [
            self.encoder.batch(*self.heldout_set.take([number]))
            for number in range(min(PROBES, len(self.heldout_set)))
        ]
        return [{name: tensor for name, tensor in b.items() if name != "labels"} for b in batches]


def _as_dataset(rows: EncodedRows) -> Dataset:
    """Return the positions and lengths of examples; the rest of a row is made when a batch needs it."""
    from datasets import Dataset

    count = len(rows)
    return Dataset.from_dict(
        {"row": list(range(count)), "length": list(rows.lengths), "split": [rows.part] * count}
    )
