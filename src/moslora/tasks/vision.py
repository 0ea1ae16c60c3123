"""Vision-language models: pictures beside the text, through the model's own processor.

Conversations are encoded as the text task encodes them, with one difference: what renders a conversation is the
processor, which puts each picture's tokens in place of ``<image>``. Labels are found by the same rules, so that
tokens of pictures, which stand in questions, are never learned.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.answers import METRICS, wilson_interval
from moslora.models import _call, materialise, resolve_model
from moslora.recipe import build_trainer_config, resolve_trainer_arguments
from moslora.records import DataError, Example, Records, prompt_of, read_records, to_examples
from moslora.tasks.task import Answer, Evaluation
from moslora.tasks.text import (
    TextTask,
    _kind,
    labelled_loss,
    labelled_loss_trainer,
    logits_are_plain,
    question,
    train_in_float32,
    unwrapped,
)
from moslora.tokenization import Encoded, Encoder, encode_all

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import Trainer, TrainerCallback

__all__ = ["VisionTask", "open_image", "scope_of"]

IMAGE = "<image>"  # where a picture stands in a text, whatever the model's own token is
BATCH = 16  # examples measured or answered at once
PROBES = 4  # held-out examples whose logits the proof compares
# Families whose batches were compared with what their own processor gives. Others bring arguments of their own (Qwen-VL
# its token types, PaliGemma its prefix), and would train on something else without a word.
TRIED = ("llava", "llava_next", "idefics3")
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
    if re.search(r"projector|connector|\.merger\b|aligner", module):
        return "projector"
    return "vision" if re.search(r"vision|visual|image_tower", module) else "language"


class _Renderer:
    """A processor that stands for a tokenizer, with the pictures of one example.

    Args:
        processor: The model's.
        images: The example's pictures, in their order.
    """

    def __init__(self, processor: Any, images: Sequence[Any]) -> None:
        self._processor, self._images = processor, list(images)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor.tokenizer, name)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Control tokens but the picture's, whose places in the text were counted when it was read."""
        added: dict[int, Any] = self._processor.tokenizer.added_tokens_decoder
        return {at: token for at, token in added.items() if str(token) != IMAGE}

    def get_chat_template(self) -> str:
        return str(self._processor.chat_template)

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **options: Any) -> dict[str, Any]:
        """Render turns to token ids, pictures included."""
        images = iter(self._images)
        asked = {"add_generation_prompt": bool(options.get("add_generation_prompt"))}
        output = self._processor.apply_chat_template(
            [{"role": t["role"], "content": _parts(t["content"], images)} for t in turns],
            tokenize=True,
            return_dict=True,
            **asked,
        )
        ids = output["input_ids"]
        first = ids[0]
        return {**output, "input_ids": list(ids) if isinstance(first, int) else [int(i) for i in first]}


def _parts(content: str, images: Iterator[Any]) -> list[dict[str, Any]]:
    """Split a turn's text at its pictures."""
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(content.split(IMAGE)):
        if index:
            parts.append({"type": "image", "image": next(images, None)})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


class VisionTask(TextTask):
    """Fine-tune an image-text-to-text model on conversations about pictures."""

    auto_class = "AutoModelForImageTextToText"

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
        return prompt_of(example), *(
            self.picture_hashes[str(p)] for p in self.paths[f"{name} {example.place}"]
        )

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

    def _open(self, name: str, example: Example) -> list[Any]:
        data: Any = self.recipe.data
        return [open_image(path, data.max_pixels) for path in self.paths[f"{name} {example.place}"]]

    def prepare(self) -> None:
        """Load the processor, encode every example, and show what is trained."""
        from transformers import AutoConfig, AutoProcessor

        recipe: Any = self.recipe
        self.source = materialise(self.source, self._file_dtype(), say=self.display.say)
        options = {"trust_remote_code": recipe.model.trust_remote_code}
        if self.source.revision:
            options["revision"] = self.source.revision
        family = _call(self.source, AutoConfig.from_pretrained, options).model_type
        if family not in TRIED:
            raise ValueError(
                f"{self.source.name} is of the family {family!r}; task=vision was tried on "
                f"{', '.join(TRIED)} only, and would prepare the pictures of others wrongly. Adapt it "
                "in a script of your own with get_peft_model(model, MoSLoRAConfig(...)) and the family's own collator."
            )
        self.processor: Any = _call(self.source, AutoProcessor.from_pretrained, options)
        if not hasattr(self.processor, "image_processor"):
            raise ValueError(
                f"{self.source.name} reads no pictures; choose a vision-language model, or task=text."
            )
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = self.processor.chat_template
        self.by_index = {"train": self.train_examples, "heldout": self.heldout_examples}
        self.train_set, self.train_summary = self._encode("train")
        self.heldout_set, self.heldout_summary = self._encode("heldout")
        self.by_place = {example.place: example for example in self.heldout_examples}
        self.train_by_place = {example.place: example for example in self.train_examples}
        self.stop_ids = sorted(Encoder(self._renderer([]), "chat").stop_ids)
        self.asked = self.heldout_set[: recipe.task.generate_examples]
        self._check_references()
        self._show(self.train_summary, self.heldout_summary)

    def _shorten(self, piece: str) -> str:
        """Count a picture's tokens instead of showing all of them."""
        token = str(getattr(self.processor, "image_token", IMAGE))
        return re.sub(
            f"(?:{re.escape(token)}){{4,}}", lambda found: f"{token}×{len(found[0]) // len(token)}", piece
        )

    def _renderer(self, images: Sequence[Any]) -> Any:
        return _Renderer(self.processor, images)

    def _encode(self, name: str) -> tuple[list[Encoded], Any]:
        """Encode examples one by one, each with its pictures, and sum up."""
        data = self.recipe.data
        limit = resolve_trainer_arguments(self.recipe, self.device)["max_length"]
        # A cut could part a picture's tokens from the picture, which no model can read.
        longer = "refuse" if data.too_long == "cut" else data.too_long
        kept: list[Encoded] = []
        summaries = []
        with self.display.progress(f"Encoding, {name}", len(self.by_index[name])) as progress:
            for example in self.by_index[name]:
                encoder = Encoder(
                    self._renderer(self._open(name, example)), "chat", data.train_on, limit, longer
                )
                try:
                    encoded, summary = encode_all([example], encoder)
                except ValueError as problem:
                    if "is left within" not in str(problem):
                        raise
                else:
                    kept += encoded
                    summaries.append(summary)
                progress.advance()
                self.checkpoint()
        if not kept:
            raise ValueError(f"No {name} example is left within trainer.max_length={limit}; raise it.")
        image = self.image_id
        learned = next((e.place for e in kept if image in e.labels), None)
        if learned and data.train_on == "all":
            kept = [replace(e, labels=[-100 if i == image else i for i in e.labels]) for e in kept]
        elif learned:
            raise ValueError(
                f"{learned}: a picture's tokens would be learned; pictures belong into questions."
            )
        added = (
            "examples",
            "tokens",
            "trained_tokens",
            "cut",
            "without_end",
            "prompt_differs",
            "control_text",
        )
        totals = {key: sum(getattr(s, key) for s in summaries) for key in added}
        longest = max(s.longest for s in summaries)
        dropped = len(self.by_index[name]) - len(kept)
        return kept, replace(summaries[0], **totals, longest=longest, dropped=dropped)

    def part_of(self, module: str) -> str:
        """Return the scope of a module or parameter."""
        return scope_of(module)

    @property
    def image_id(self) -> int | None:
        """The token that stands for a part of a picture."""
        found = getattr(self.processor, "image_token_id", None)
        return None if found is None else int(found)

    # Vision tower and projector keep their precision, as in the recipes that the paper builds on.
    whole = (r".*(?:vision|visual|image_tower|projector|connector|merger|aligner)[^.]*", "lm_head")

    def adapter_config(self, model: nn.Module) -> PeftConfig:
        """Turn scopes into target modules, with ranks and alphas of their own."""
        from torch import nn

        from moslora import MoSLoRAConfig

        recipe: Any = self.recipe
        scopes, arguments = recipe.scopes, {k: v for k, v in recipe.adapter.items() if k != "target_modules"}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        chosen = [n for n in linear if getattr(scopes, scope_of(n)) == "adapter"]
        for scope in ("language", "vision", "projector"):
            if getattr(scopes, scope) == "adapter" and not any(scope_of(n) == scope for n in chosen):
                raise ValueError(f"scopes.{scope}=adapter, but {self.source.name} has no such linear module.")
        if scopes.projector == "full":
            whole = [n for n, _ in model.named_modules() if scope_of(n) == "projector"]
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
        return MoSLoRAConfig(
            task_type="CAUSAL_LM",
            target_modules=chosen,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            **arguments,
        )

    def _pixels(
        self, name: str, places: Sequence[str], others: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Return what the model takes beside ids, of the rows' pictures (or of ``others``')."""
        examples = self.by_place if name == "heldout" else self.train_by_place
        images = [i for place in others or places for i in self._open(name, examples[place])]
        if not images:
            return {}
        return dict(self.processor.image_processor(images, return_tensors="pt"))

    def _batch(
        self, name: str, rows: Sequence[Encoded], prompts: bool = False, others: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Pad rows, prompts on the left, and put their pictures beside."""
        import torch

        texts = [e.prompt_ids if prompts else e.input_ids for e in rows]
        length = max(map(len, texts))
        ids = torch.full((len(rows), length), self.pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for at, (row, text) in enumerate(zip(rows, texts, strict=True)):
            place = slice(length - len(text), length) if prompts else slice(0, len(text))
            ids[at, place], mask[at, place] = torch.tensor(text), 1
            if not prompts:
                labels[at, place] = torch.tensor(row.labels)
        batch = {"input_ids": ids, "attention_mask": mask, **({} if prompts else {"labels": labels})}
        return batch | self._pixels(name, [row.place for row in rows], others)

    def build_trainer(
        self,
        model: nn.Module,
        adapter: PeftConfig,
        output_dir: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> Trainer:
        """Make TRL's trainer on the encoded examples; a batch's pictures are opened as it is made."""
        from datasets import Dataset

        def dataset(name: str, encoded: Sequence[Encoded]) -> Dataset:
            columns = {"input_ids": [e.input_ids for e in encoded], "labels": [e.labels for e in encoded]}
            return Dataset.from_dict(
                {**columns, "row": list(range(len(encoded))), "split": [name] * len(encoded)}
            )

        sets = {"train": self.train_set, "heldout": self.heldout_set}

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
            name = rows[0]["split"]
            return self._batch(name, [sets[name][row["row"]] for row in rows])

        config = build_trainer_config(self.recipe, self.device, output_dir, remove_unused_columns=False)
        config.dataset_kwargs = {"skip_prepare_dataset": True}
        trainer = labelled_loss_trainer()(
            model=model,
            args=config,
            data_collator=collate,
            train_dataset=dataset("train", self.train_set),
            eval_dataset=dataset("heldout", self.heldout_set) if config.eval_strategy != "no" else None,
            processing_class=self.tokenizer,
            peft_config=adapter,
            callbacks=list(callbacks),
        )
        train_in_float32(trainer.model)
        return trainer

    def evaluate(self, model: nn.Module, label: str) -> Evaluation:
        """Measure held-out loss and answers; the answers with each other's pictures too."""
        task: Any = self.recipe.task
        metrics, intervals = {"loss": self._loss(model, label)}, {}
        answers = self._answers(model, self.asked, label) if self.asked else []
        if answers and task.metric != "none":
            measured = {"accuracy": answers}
            if task.shuffle_images:
                pairs = self._strangers()
                if pairs:
                    measured["accuracy_shuffled_images"] = self._answers(
                        model, [own for own, _ in pairs], f"{label}, shuffled", [other for _, other in pairs]
                    )
                if len(pairs) < len(self.asked):
                    self.display.warn(
                        f"{len(self.asked) - len(pairs)} of {len(self.asked)} examples have no picture, or no other "
                        "example with as many and as large ones; shuffled pictures are not measured on them."
                    )
            for name, given in measured.items():
                right = sum(bool(a.correct) for a in given)
                metrics[name] = right / len(given)
                intervals[name] = wilson_interval(right, len(given))
        return Evaluation(metrics, len(self.heldout_set), intervals, answers)

    def _strangers(self) -> list[tuple[Encoded, str]]:
        """Pair answered examples with the place of another that fills as many tokens with other pictures."""
        groups: dict[tuple[int, int], list[Encoded]] = {}
        for encoded in self.asked:
            paths = self.paths[f"heldout {encoded.place}"]
            if paths:
                key = len(paths), encoded.prompt_ids.count(self.image_id or -1)
                groups.setdefault(key, []).append(encoded)

        def pictures(encoded: Encoded) -> list[str]:
            return [self.picture_hashes[str(path)] for path in self.paths[f"heldout {encoded.place}"]]

        found: dict[str, str] = {}
        for group in groups.values():
            half = len(group) // 2
            for at, own in enumerate(group):
                others = (group[(at + half + step) % len(group)] for step in range(len(group)))
                other = next((o for o in others if pictures(o) != pictures(own)), None)
                if other is not None:
                    found[own.place] = other.place
        return [(encoded, found[encoded.place]) for encoded in self.asked if encoded.place in found]

    @contextmanager
    def _progress(self, title: str, total: int) -> Iterator[Any]:
        with self.display.progress(title, total) as progress:
            yield progress

    def _loss(self, model: nn.Module, label: str) -> float:
        import torch
        from torch.nn import functional as F

        model.eval()
        base = unwrapped(model)
        plain = logits_are_plain(base)
        total, count = 0.0, 0
        # Rows of like length pad least.
        order = sorted(self.heldout_set, key=lambda e: len(e.input_ids))
        with self._progress(f"Held-out loss, {label}", len(order)) as progress:
            for start in range(0, len(order), BATCH):
                rows = order[start : start + BATCH]
                batch = {k: v.to(self.device) for k, v in self._batch("heldout", rows).items()}
                targets = batch["labels"][:, 1:]
                trained = targets != -100
                with torch.inference_mode():
                    if plain:
                        part, _ = labelled_loss(base, batch)
                    else:
                        given = {name: value for name, value in batch.items() if name != "labels"}
                        logits = model(**given).logits[:, :-1][trained]  # (tokens, vocabulary)
                        part = F.cross_entropy(logits.float(), targets[trained], reduction="sum")
                total, count = total + part.item(), count + int(trained.sum())
                progress.advance(len(rows), f"loss {total / max(count, 1):.4f}")
                self.checkpoint()
        return total / count

    def _answers(
        self, model: nn.Module, chosen: Sequence[Encoded], label: str, others: Sequence[str] | None = None
    ) -> list[Answer]:
        import torch
        from transformers import GenerationConfig

        model.eval()
        metric = METRICS.get(self.recipe.task.metric)
        others = others or [e.place for e in chosen]
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.recipe.task.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
        )
        texts: list[str] = []
        with self._progress(f"Answers, {label}", len(chosen)) as progress:
            for start in range(0, len(chosen), BATCH):
                span = slice(start, start + BATCH)
                batch = self._batch("heldout", chosen[span], prompts=True, others=others[span])
                batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
                with torch.inference_mode():
                    out = model.generate(**batch, generation_config=config)  # type: ignore[operator]
                new = out[:, batch["input_ids"].shape[1] :]
                texts += [str(t).strip() for t in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
                progress.advance(len(new))
                self.checkpoint()
        return [
            Answer(
                place=encoded.place,
                prompt=question(self.by_place[encoded.place]),
                reference=encoded.answer,
                text=text,
                correct=None if metric is None else metric(text, encoded.answer),
                kind=_kind(self.by_place[encoded.place]),
            )
            for encoded, text in zip(chosen, texts, strict=True)
        ]

    def probe(self) -> list[Any]:
        """Return the first held-out examples with their pictures."""
        batches = [self._batch("heldout", [e]) for e in self.heldout_set[:PROBES]]
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
