"""Vision-language models: pictures beside the text, through the model's own processor.

Conversations are encoded as the text task encodes them, with one difference: what renders a conversation is the
processor, which puts each picture's tokens in place of ``<image>``. Labels are found by the same rules, so that
tokens of pictures, which stand in questions, are never learned.

Every example is encoded once to be checked, and again when a batch wants it: what is kept is how long each is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.records import Example, Records, prompt_of, read_records, to_examples
from moslora.data.tokenization import Encoded, Encoder, Summary, encode_all
from moslora.errors import DataError
from moslora.metrics.answers import METRICS, wilson_interval
from moslora.models.gguf import materialize
from moslora.models.loading import call_loader
from moslora.models.names import resolve_model
from moslora.recipe.schema import build_trainer_config, resolve_trainer_arguments
from moslora.tasks.task import Answer, Evaluation
from moslora.tasks.text.task import (
    TextTask,
    _kind,
    labelled_loss_trainer,
    question,
    row_losses,
    train_in_float32,
)
from moslora.tasks.vision.processors import (
    FAMILIES,
    IMAGE,
    Renderer,
    load_processor,
    picture_ids,
    pixels,
    token_types,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

__all__ = ["VisionTask", "open_image", "scope_of"]

BATCH = 16  # examples measured or answered at once
PROBES = 4  # held-out examples whose logits the proof compares
SHOWN = 5  # bad pictures spelt out; the rest are counted


def open_image(path: Path, max_pixels: int) -> Any:
    """Open a picture as RGB, upright; transparent ones on white.

    Args:
        path: The file.
        max_pixels: Most pixels it may have.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ValueError: If it is missing, broken, too large, or of a mode whose range says nothing about brightness.
    """
    from PIL import Image, ImageOps

    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with Image.open(path) as found:
            width, height = found.size
            if width * height > max_pixels:
                raise ValueError(
                    f"{path} has {width} × {height} pixels, more than data.max_pixels={max_pixels}"
                )
            if found.mode.startswith(("I", "F")):
                raise ValueError(
                    f"{path} is of mode {found.mode}, which has no fixed white; save it as 8-bit RGB"
                )
            upright = ImageOps.exif_transpose(found)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")
    except ValueError:
        raise
    except Image.DecompressionBombError as problem:
        raise ValueError(f"{path} is too large: {problem}") from None
    except Exception as problem:  # PIL's readers fail in many ways on a damaged file
        raise ValueError(f"{path} is broken: {problem}") from None


def scope_of(module: str) -> str:
    """Return the scope that a module of a vision-language model belongs to.

    Args:
        module: Its name, as ``model.vision_tower.encoder.layers.0.mlp.fc1``.

    Returns:
        ``"projector"``, ``"vision"`` or ``"language"``.
    """
    if re.search(r"projector|connector|\.merger\b|merger_list|aligner", module):
        return "projector"
    return "vision" if re.search(r"vision|visual|image_tower", module) else "language"


# Of a summary, what is added up over examples.
ADDED = ("examples", "tokens", "trained_tokens", "cut", "without_end", "prompt_differs", "control_text")


class _TooLong(Exception):  # noqa: N818 - it is no error where the user wants such examples dropped
    """An example is dropped for its length."""


class _Rows(Sequence[Encoded]):
    """Encoded examples, each encoded anew when it is asked for.

    Args:
        name: Of the part of the data, as ``"train"``.
        encode: From an example's number to what it is encoded as, and its pictures.
        numbers: Those of the examples that are there.
        lengths: How many tokens each has.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[int], tuple[Encoded, list[Any]]],
        numbers: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        self.name, self.lengths = name, lengths
        self._encode, self._numbers = encode, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return _Rows(self.name, self._encode, self._numbers[at], self.lengths[at])
        return self._encode(self._numbers[at])[0]

    def take(self, chosen: Sequence[int]) -> tuple[list[Encoded], list[Any]]:
        """Return some of them, and all their pictures in that order."""
        made = [self._encode(self._numbers[at]) for at in chosen]
        return [encoded for encoded, _ in made], [image for _, images in made for image in images]


class VisionTask(TextTask):
    """Fine-tune an image-text-to-text model on conversations about pictures."""

    auto_class = "AutoModelForImageTextToText"
    share = "accuracy"
    train_set: Any  # _Rows, as the others
    heldout_set: Any
    validation_set: Any

    def read(self) -> None:
        """Read the data, open every picture once, and find the base model."""
        recipe: Any = self.recipe
        data = recipe.data
        if data.heldout is None:
            raise ValueError("data.heldout is missing; task: vision needs held-out examples of their own.")
        self.source = resolve_model(recipe.model.name, recipe.model.revision, self.needs_weights)
        self.paths: dict[str, list[Path]] = {}
        self.picture_hashes: dict[str, str] = {}
        self.data_hashes = {}
        self.train_examples = []
        if not self.measures_only:
            self.train_examples = self._read("train", data.train, data.train_split, data.limit)
        self.heldout_examples = self._read("heldout", data.heldout, data.heldout_split or "train", None)
        seen = {self._identity("train", e) for e in self.train_examples}
        both = sum(self._identity("heldout", e) in seen for e in self.heldout_examples)
        if both:
            self.display.warn(
                f"{both} of {len(self.heldout_examples)} held-out questions are asked of the same picture in "
                "training, so the held-out numbers flatter the model. Take them out of one of the two files."
            )
        known = {h for e in self.train_examples for h in self._identity("train", e)[1:]}
        shared = sum(not known.isdisjoint(self._identity("heldout", e)[1:]) for e in self.heldout_examples)
        if shared > both:
            self.display.warn(
                f"{shared} of {len(self.heldout_examples)} held-out examples show a picture that training shows too, "
                "so the held-out numbers say little of pictures never seen. Split the data by picture."
            )

    def _identity(self, name: str, example: Example) -> tuple[Any, ...]:
        return prompt_of(example), *self._shown_in(name, example)

    def _read(self, name: str, source: str, split: str, limit: int | None) -> list[Example]:
        data: Any = self.recipe.data
        records = read_records(source, split, limit)
        folder = Path(data.images) if data.images else Path(records.source).parent
        rows, places, faults, bad = [], [], [], []
        for place, row in zip(records.places, records.rows, strict=True):
            try:
                text, named = _without_images(row)
            except ValueError as problem:
                faults.append(f"{place}: {problem}")
                continue
            try:
                for path in (folder / n for n in named):
                    open_image(path, data.max_pixels)
                    if str(path) not in self.picture_hashes:
                        self.picture_hashes[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            except ValueError as problem:
                bad.append(f"{place}: {problem}")
                continue
            rows.append(text)
            places.append(place)
            self.paths[f"{name} {place}"] = [folder / n for n in named]
            self.checkpoint()
        if data.bad_images == "refuse":
            faults += bad
        if faults:
            advice = "Correct or remove these, or set data.bad_images=skip for pictures; none was skipped."
            raise DataError(records.source, faults[:SHOWN], advice, max(0, len(faults) - SHOWN))
        if bad:
            more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            self.display.warn(
                f"{records.source}: skipped {len(bad)} examples: {'; '.join(bad[:SHOWN])}{more}."
            )
        if not rows:
            raise DataError(records.source, ["no example has a usable picture"], "Check data.images.")
        pictures = hashlib.sha256("".join(sorted(set(self.picture_hashes.values()))).encode()).hexdigest()
        self.data_hashes |= {name: records.sha256, f"{name}_pictures": pictures}
        return to_examples(Records(rows, places, records.source, records.sha256), data.format)

    def _files(self, name: str, example: Example) -> list[Path]:
        # What is set aside comes out of the training data.
        return self.paths[f"{'train' if name == 'validation' else name} {example.place}"]

    def _shown_in(self, name: str, example: Example) -> list[str]:
        return [self.picture_hashes[str(path)] for path in self._files(name, example)]

    def _open(self, name: str, example: Example) -> list[Any]:
        data: Any = self.recipe.data
        try:
            return [open_image(path, data.max_pixels) for path in self._files(name, example)]
        except ValueError as problem:  # it could be read when the data was
            raise ValueError(f"{example.place}: {problem}") from None

    @property
    def identity_of(self) -> Callable[[Example], Sequence[str]]:
        """Examples of the same pictures stand on one side of a split."""
        return self.marks

    def marks(self, example: Example) -> Sequence[str]:
        """Return the pictures of a training example by their hashes, or its prompt where it has none."""
        return self._shown_in("train", example) or [prompt_of(example)]

    def prepare(self) -> None:
        """Load the processor, encode every example, and show what is trained."""
        from transformers import AutoConfig

        recipe: Any = self.recipe
        self.source = materialize(self.source, self._file_dtype(), say=self.display.say)
        options = {"trust_remote_code": recipe.model.trust_remote_code}
        if self.source.revision:
            options["revision"] = self.source.revision
        kind = call_loader(self.source, AutoConfig.from_pretrained, options).model_type
        if kind not in FAMILIES:
            raise ValueError(
                f"{self.source.name} is of the family {kind!r}; task=vision was tried on "
                f"{', '.join(FAMILIES)} only, and would prepare the pictures of others wrongly. Adapt it "
                "in a script of your own with get_peft_model(model, MoSLoRAConfig(...)) and the family's own collator."
            )
        self.family = FAMILIES[kind]
        self.processor: Any = load_processor(self.source, options)
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"{self.source.name} reads no pictures; choose a vision-language model, or task=text."
            )
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.chat_template is None and not self.family.prefix:
            self.tokenizer.chat_template = self.processor.chat_template
        self.picture_ids = picture_ids(self.processor)
        self.renderer: Any = Renderer(self.processor)
        limit = resolve_trainer_arguments(recipe, self.device)["max_length"]
        # A cut could part a picture's tokens from the picture, which no model can read.
        longer = "refuse" if recipe.data.too_long == "cut" else recipe.data.too_long
        template = "pair" if self.family.prefix else "chat"
        self.encoder = Encoder(self.renderer, template, recipe.data.train_on, limit, longer)
        # What is asked is asked whole.
        self.asking = replace(self.encoder, max_length=None)
        self.examples = {"train": self.train_examples, "heldout": self.heldout_examples}
        if self.validation_examples:
            self.examples["validation"] = list(self.validation_examples)
        if not self.measures_only:
            self.train_set, self.train_summary = self._encode("train")
        self.heldout_set, self.heldout_summary = self._encode("heldout")
        if self.validation_examples:
            self.validation_set, _ = self._encode("validation")
        self.by_place = {example.place: example for example in self.heldout_examples}
        self.stop_ids = sorted(self.encoder.stop_ids)
        self.asked = self.heldout_set[: recipe.task.generate_examples]
        self._check_references()
        if not self.measures_only:
            self._show(self.train_summary, self.heldout_summary)

    def _shorten(self, piece: str) -> str:
        """Count a picture's tokens instead of showing all of them."""
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.picture_ids))
        runs = "|".join(f"(?:{re.escape(token)}){{4,}}" for token in tokens)

        def count(found: re.Match[str]) -> str:
            token = next(token for token in tokens if found[0].startswith(token * 4))
            return f"{token}×{len(found[0]) // len(token)}"

        return re.sub(runs, count, piece)

    def _encode(self, name: str) -> tuple[_Rows, Summary]:
        """Encode examples one by one, each with its pictures; keep their lengths, and sum up."""
        numbers: list[int] = []
        lengths: list[int] = []
        totals: dict[str, int] = dict.fromkeys(ADDED, 0)
        longest, last = 0, None
        examples = self.examples[name]
        with self.display.progress(f"Encoding, {name}", len(examples)) as progress:
            for number, example in enumerate(examples):
                try:
                    encoded, last = self._encoded(example, self._open(name, example))
                except _TooLong:
                    pass
                else:
                    numbers.append(number)
                    lengths.append(len(encoded.input_ids))
                    totals = {key: count + getattr(last, key) for key, count in totals.items()}
                    longest = max(longest, last.longest)
                progress.advance()
                self.checkpoint()
        if last is None:
            raise ValueError(
                f"No {name} example is left within trainer.max_length={self.encoder.max_length}; raise it."
            )
        sums: Any = {**totals, "longest": longest, "dropped": len(examples) - len(numbers)}
        summary = replace(last, **sums)

        def encode(number: int) -> tuple[Encoded, list[Any]]:
            images = self._open(name, examples[number])
            return self._encoded(examples[number], images)[0], images

        return _Rows(name, encode, numbers, lengths), summary

    def _encoded(
        self, example: Example, images: Sequence[Any], whole: bool = False
    ) -> tuple[Encoded, Summary]:
        """Encode one example with pictures.

        Raises:
            _TooLong: If it is dropped for its length.
        """
        encoder = self.asking if whole else self.encoder
        with self.renderer.showing(images):
            try:
                (encoded,), summary = encode_all([example], encoder)
            except ValueError as problem:
                if "is left within" in str(problem):
                    raise _TooLong from None
                raise
        if not self.picture_ids.isdisjoint(encoded.labels):
            if self.recipe.data.train_on != "all":
                raise ValueError(
                    f"{encoded.place}: a picture's tokens would be learned; pictures belong into questions."
                )
            labels = [-100 if label in self.picture_ids else label for label in encoded.labels]
            encoded = replace(encoded, labels=labels)
        return encoded, summary

    def part_of(self, module: str) -> str:
        """Return the scope of a module or parameter."""
        return scope_of(module)

    # Vision tower and projector keep their precision, as in the recipes that the paper builds on.
    whole = (r".*(?:vision|visual|image_tower|projector|connector|merger|aligner)[^.]*", "lm_head")

    def adapter_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Turn scopes into target modules, with ranks and alphas of their own."""
        from torch import nn

        recipe: Any = self.recipe
        scopes, arguments = recipe.scopes, {k: v for k, v in recipe.adapter.items() if k != "target_modules"}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        chosen = [n for n in linear if getattr(scopes, scope_of(n)) == "adapter"]
        for scope in ("language", "vision", "projector"):
            if getattr(scopes, scope) == "adapter" and not any(scope_of(n) == scope for n in chosen):
                other = "full or frozen" if scope == "projector" else "frozen"
                raise ValueError(
                    f"scopes.{scope}=adapter, but {self.source.name} has no such linear module; set it to {other}."
                )
        if scopes.projector == "full":
            # A list of modules cannot be trained whole, but each of them can.
            lists = (nn.ModuleList, nn.ModuleDict)
            whole = [
                n for n, m in model.named_modules() if scope_of(n) == "projector" and not isinstance(m, lists)
            ]
            top = [n for n in whole if not any(n.startswith(f"{o}.") for o in whole)]
            if not top:
                raise ValueError(f"scopes.projector=full, but {self.source.name} has no projector.")
            arguments["modules_to_save"] = [*(arguments.get("modules_to_save") or []), *top]
        if not chosen:
            raise ValueError(
                "scopes leaves no module to adapt; set one of language, vision, projector=adapter."
            )
        ranks, alphas = dict(arguments.pop("rank_pattern", {})), dict(arguments.pop("alpha_pattern", {}))
        for name in chosen:
            for key, patterns in (("r", ranks), ("alpha", alphas)):
                value = getattr(scopes, f"{scope_of(name)}_{key}")
                if value is not None:
                    patterns.setdefault(f"^{re.escape(name)}", value)
        return {**arguments, "target_modules": chosen, "rank_pattern": ranks, "alpha_pattern": alphas}

    def _batch(
        self,
        name: str,
        rows: Sequence[Encoded],
        prompts: bool = False,
        images: Sequence[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Pad rows, prompts on the left, and put their pictures beside; ``images`` if they are open already."""
        import torch

        texts = [e.prompt_ids if prompts else e.input_ids for e in rows]
        length = max(map(len, texts))
        ids = torch.full((len(rows), length), self.pad_id)
        mask, labels, types = torch.zeros_like(ids), torch.full_like(ids, -100), torch.zeros_like(ids)
        for at, (row, text) in enumerate(zip(rows, texts, strict=True)):
            place = slice(length - len(text), length) if prompts else slice(0, len(text))
            ids[at, place], mask[at, place] = torch.tensor(text), 1
            if not prompts:
                labels[at, place] = torch.tensor(row.labels)
            if self.family.types:
                known = token_types(self.processor, self.family, text, len(row.prompt_ids))
                types[at, place] = torch.tensor(known)
        batch = {"input_ids": ids, "attention_mask": mask, **({} if prompts else {"labels": labels})}
        if self.family.types:
            batch[self.family.types] = types
        if images is None:
            examples = {example.place: example for example in self.examples[name]}
            images = [image for row in rows for image in self._open(name, examples[row.place])]
        return batch | (pixels(self.processor, images) if images else {})

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig | None,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make TRL's trainer; a batch's examples are encoded, and their pictures opened, as it is made."""
        from datasets import Dataset

        sets = {"train": self.train_set, "heldout": self.heldout_set}

        def dataset(name: str) -> Dataset:
            # Lengths are for batches of like length; the rest is made when it is wanted.
            count = len(sets[name])
            columns = {"row": list(range(count)), "length": list(sets[name].lengths), "split": [name] * count}
            return Dataset.from_dict(columns)

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            name = rows[0]["split"]
            made, images = sets[name].take([row["row"] for row in rows])
            return self._batch(name, made, images=images)

        config = build_trainer_config(self.recipe, self.device, output_dir, remove_unused_columns=False)
        config.dataset_kwargs = {"skip_prepare_dataset": True}
        trainer = labelled_loss_trainer()(
            model=model,
            args=config,
            data_collator=collate,
            train_dataset=dataset("train"),
            eval_dataset=dataset("heldout") if config.eval_strategy != "no" else None,
            processing_class=self.tokenizer,
            peft_config=adapter,
            callbacks=list(callbacks),
        )
        if adapter is not None:
            train_in_float32(trainer.model)
        return trainer

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure held-out loss and answers, the latter with other examples' pictures too."""
        task: Any = self.recipe.task
        metrics, intervals = {"loss": self._loss(model, label)}, {}
        answers = self.ask(model, self.asked, label) if len(self.asked) else []
        if answers and task.metric != "none":
            measured = {self.share: answers}
            strange = self.ask_shuffled(model, label)
            if strange:
                measured[f"{self.share}_shuffled_images"] = strange
            for name, given in measured.items():
                right = sum(bool(a.correct) for a in given)
                metrics[name] = right / len(given)
                intervals[name] = wilson_interval(right, len(given))
        return Evaluation(metrics, len(self.heldout_set), intervals, answers)

    def _strangers(self) -> dict[int, Example]:
        """Pair answered examples, by their number, with another that shows as many other pictures."""
        groups: dict[int, list[int]] = {}
        asked = [self.by_place[encoded.place] for encoded in self.asked]
        for number, example in enumerate(asked):
            count = len(self._files("heldout", example))
            if count:
                groups.setdefault(count, []).append(number)
        found: dict[int, Example] = {}
        for group in groups.values():
            half = len(group) // 2
            for at, own in enumerate(group):
                others = (asked[group[(at + half + step) % len(group)]] for step in range(len(group)))
                shown = self._shown_in("heldout", asked[own])
                other = next((o for o in others if self._shown_in("heldout", o) != shown), None)
                if other is not None:
                    found[own] = other
        return found

    @contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Any]:
        with self.display.progress(title, total) as progress:
            yield progress

    def _losses(self, model: nn.Module, examples: _Rows) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield per batch where its examples stand, each one's summed loss in nats, and over how many tokens."""
        model.eval()
        # Rows of like length pad least.
        order = sorted(range(len(examples)), key=examples.lengths.__getitem__)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows, images = examples.take(chosen)
            batch = self._batch(examples.name, rows, images=images)
            batch = {name: value.to(self.device) for name, value in batch.items()}
            sums, counts = row_losses(model, batch, batch.pop("labels"))
            yield chosen, sums.cpu(), counts.cpu()

    def _loss(self, model: nn.Module, label: str) -> float:
        total, count = 0.0, 0
        with self._progress(f"Held-out loss, {label}", len(self.heldout_set)) as progress:
            for chosen, sums, counts in self._losses(model, self.heldout_set):
                total, count = total + float(sums.sum()), count + int(counts.sum())
                progress.advance(len(chosen), f"loss {total / max(count, 1):.4f}")
                self.checkpoint()
        return total / count

    def score(self, model: nn.Module, examples: Any, label: str) -> list[float]:
        """Return each example's loss: the mean over its trained tokens, in nats, in the order given."""
        found = [0.0] * len(examples)
        with self._progress(f"Loss, {label}", len(examples)) as progress:
            for chosen, sums, counts in self._losses(model, examples):
                for at, loss in zip(chosen, (sums / counts.clamp(min=1)).tolist(), strict=True):
                    found[at] = loss
                progress.advance(len(chosen))
                self.checkpoint()
        return found

    def ask(self, model: nn.Module, chosen: Any, label: str) -> list[Answer]:
        """Generate an answer to each example, in batches, and judge it by the recipe's metric."""
        own = [self.by_place[encoded.place] for encoded in chosen]
        return self._ask(model, [(example, example) for example in own], label)

    def ask_shuffled(self, model: nn.Module, label: str) -> list[Answer]:
        """The same with other examples' pictures, of those for which another shows as many; none unless wished for."""
        if not self.recipe.task.shuffle_images:  # type: ignore[attr-defined]
            return []
        strangers = self._strangers()
        left = len(self.asked) - len(strangers)
        if left:
            self.display.warn(
                f"{left} of {len(self.asked)} examples have no picture, or no other example has as many; shuffled "
                "pictures are not measured on them."
            )
        asked = [self.by_place[encoded.place] for encoded in self.asked] if strangers else []
        pairs = [(asked[number], strangers[number]) for number in sorted(strangers)]
        return self._ask(model, pairs, f"{label}, shuffled")

    def pictures_of(self, example: Example) -> list[str]:
        """Return the files of the pictures that a held-out example shows."""
        return [str(path) for path in self._files("heldout", example)]

    def _ask(self, model: nn.Module, pairs: Sequence[tuple[Example, Example]], label: str) -> list[Answer]:
        """Ask examples, each with the pictures of another."""
        import torch
        from transformers import GenerationConfig

        model.eval()
        metric = METRICS.get(self.recipe.task.metric)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.recipe.task.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
        )
        answers: list[Answer] = []
        with self._progress(f"Answers, {label}", len(pairs)) as progress:
            for start in range(0, len(pairs), BATCH):
                rows, images = [], []
                for example, other in pairs[start : start + BATCH]:
                    shown = self._open("heldout", other)
                    rows.append(self._encoded(example, shown, whole=True)[0])
                    images += shown
                batch = self._batch("heldout", rows, prompts=True, images=images)
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                with torch.inference_mode():
                    out = model.generate(**batch, generation_config=config)  # type: ignore[operator]
                new = out[:, batch["input_ids"].shape[1] :]
                texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
                for (example, other), row, text in zip(
                    pairs[start:], rows, map(str.strip, texts), strict=False
                ):
                    answers.append(
                        Answer(
                            place=example.place,
                            prompt=question(example),
                            reference=row.answer,
                            text=text,
                            correct=None if metric is None else metric(text, row.answer),
                            kind=_kind(example),
                            pictures=self.pictures_of(other),
                        )
                    )
                progress.advance(len(new))
                self.checkpoint()
        return answers

    def probe(self) -> list[Any]:
        """Return the first held-out examples with their pictures."""
        first = range(min(PROBES, len(self.heldout_set)))
        taken = [self.heldout_set.take([at]) for at in first]
        batches = [self._batch("heldout", rows, images=images) for rows, images in taken]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def _without_images(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Part a row's pictures from its text, and check that each has its place there.

    Returns:
        The row without its pictures, and their names.

    Raises:
        ValueError: If pictures and their places do not agree.
    """
    given = row.get("images") if row.get("images") is not None else row.get("image")
    named = [given] if isinstance(given, str) else list(given or [])
    if row.get("image") and row.get("images"):
        raise ValueError("fields 'image' and 'images' are both given; remove one")
    if not all(isinstance(name, str) for name in named):
        raise ValueError("pictures are given as names of files in data.images")
    text = {key: value for key, value in row.items() if key not in ("image", "images")}
    column = "conversations" if text.get("conversations") is not None else "messages"
    turns = text.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return text, named  # the reader of conversations says what is wrong
    turns = [dict(turn) for turn in turns]
    users = []
    for turn in turns:
        key = "value" if "value" in turn else "content"
        if isinstance(turn.get(key), list):
            parts = turn[key]
            if not all(isinstance(p, dict) and p.get("type") in ("text", "image") for p in parts):
                raise ValueError("a turn's parts must be of type text or image")
            turn[key] = "".join(IMAGE if p["type"] == "image" else str(p.get("text", "")) for p in parts)
        is_user = turn.get("role", turn.get("from")) in ("user", "human")
        if isinstance(turn.get(key), str) and IMAGE in turn[key] and not is_user:
            raise ValueError(f"{IMAGE} stands in a turn that is not the user's")
        if is_user and isinstance(turn.get(key), str):
            users.append((turn, key))
    places = sum(turn[key].count(IMAGE) for turn, key in users)
    if named and not places and users:
        users[0][0][users[0][1]] = IMAGE * len(named) + "\n" + users[0][0][users[0][1]]
    elif places != len(named):
        raise ValueError(f"{len(named)} pictures, but {IMAGE} stands {places} times in the user's turns")
    text[column] = turns
    return text, named
