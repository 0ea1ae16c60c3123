"""Answers of base and adapter to a benchmark's items, in one pass over its pictures, kept as they come.

Every batch's pictures are opened and prepared once, for both models and both protocols. Answers are appended to a file
when a batch is done, so that the same command continues after an interruption.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.batching import BatchSize
from moslora.data.shapes import Example, Message
from moslora.data.tokenization import IGNORED
from moslora.display import Display
from moslora.errors import ExistsError, ProofError, UsageError
from moslora.evaluation.benchmarks.grading import options_of
from moslora.evaluation.benchmarks.prompts import question_of_item
from moslora.evaluation.benchmarks.table import Benchmark
from moslora.evaluation.benchmarks.tsv import BenchmarkFile, Item
from moslora.files import write_text
from moslora.tasks.vision.cropping import Kept, make_square, mean_color, measure_kept
from moslora.tasks.vision.processors import IMAGE
from moslora.wording import evenly_spaced

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moslora.data.tokenization import Encoded
    from moslora.tasks.vision.encoding import PictureEncoder

__all__ = ["COLUMNS", "Answers", "Asker", "other_pictures"]

# What is asked of each item: whose answer, and about which pictures.
COLUMNS = ("base", "tuned", "base_exchanged", "tuned_exchanged")
# Items at once on a CPU, and at most on a GPU, where their number follows the free memory.
BATCH, MOST = 16, 64
# Items whose pictures are looked at to tell what the processor cuts off.
LOOKED_AT = 16
YES_NO = ("Yes", "No")


class Answers:
    """The answers of an evaluation, one line per item, continued if they are of the same evaluation.

    Args:
        folder: Where they are: ``answers.jsonl``, and of further processes ``answers-1.jsonl``, ….
        identity: What the answers are of: file, prompt, models, protocol. It is the first line of each file.
        process: This process's number among those that share the items.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], process: int = 0) -> None:
        self.folder, self.identity = folder, json.loads(json.dumps(identity))
        self.path = folder / (f"answers-{process}.jsonl" if process else "answers.jsonl")
        self.by_index: dict[str, dict[str, Any]] = {}

    def open(self) -> None:
        """Read the answers that are there, whichever process gave them, and begin an own file.

        Raises:
            ExistsError: If a file is of another evaluation.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.read()
        if not self.path.exists():
            write_text(self.path, json.dumps(self.identity) + "\n")

    def read(self) -> None:
        """Read the answers of all processes.

        Raises:
            ExistsError: If a file is of another evaluation.
        """
        for path in sorted(self.folder.glob("answers*.jsonl")):
            whole, ended, torn = path.read_bytes().rpartition(b"\n")
            if torn and path == self.path:
                with path.open("r+b") as file:  # a last line without its end was cut off by a kill
                    file.truncate(len(whole) + len(ended))
            first, *lines = (json.loads(line) for line in whole.splitlines() or [b"{}"])
            self._check(path, first)
            self.by_index |= {line["index"]: line for line in lines}

    def _check(self, path: Path, first: Mapping[str, Any]) -> None:
        changed = sorted(key for key in {*first, *self.identity} if first.get(key) != self.identity.get(key))
        if changed:
            was, now = (of.get(changed[0]) for of in (first, self.identity))
            raise ExistsError(
                f"{path} has the answers of another evaluation: {changed[0]} was {was!r}, and is {now!r} now. Name "
                "another folder with --out, or remove this one."
            )

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the answers to a batch.

        Args:
            lines: By column; each with its item's ``index``.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        self.by_index |= {line["index"]: dict(line) for line in lines}


@dataclass
class Asker:
    """Asks base and adapter about a benchmark's items.

    Attributes:
        model: The base; with an adapter PEFT's model around it.
        has_adapter: Whether it has one.
        encoder: Encodes questions with their pictures.
        device: Where the model is.
        display: Where progress is shown.
        max_pixels: Most pixels that a picture may have.
        square: As for ``cropping.make_square``.
        prompt: One of ``prompts.PROMPTS``.
        letters: Whether the likeliest option is taken, instead of what the model writes.
    """

    model: nn.Module
    has_adapter: bool
    encoder: PictureEncoder
    device: str
    display: Display
    max_pixels: int
    square: str
    prompt: str
    letters: bool = False

    def __post_init__(self) -> None:
        self.batch = BatchSize(self.device, BATCH, MOST, self.display.warn)
        self.first_tokens: dict[str, int] = {}

    def ask(
        self,
        benchmark: Benchmark,
        file: BenchmarkFile,
        items: Sequence[Item],
        exchanged: Mapping[str, Item],
        answers: Answers,
        raise_if_stopped: Any = lambda: None,
    ) -> None:
        """Ask what is not answered yet.

        Args:
            benchmark: Which benchmark it is.
            file: Its file.
            items: Its rows that are asked.
            exchanged: By index the item whose pictures are shown instead, from ``other_pictures``.
            answers: Receives the answers.
            raise_if_stopped: Called after each batch.
        """
        left = [item for item in items if item.index not in answers.by_index]
        if not left:
            return
        with self.display.progress(f"{benchmark.name}, answers", len(items)) as progress:
            progress.advance(len(items) - len(left))
            while left:
                chosen = left[: self.batch.now]
                shown = [exchanged.get(item.index) for item in chosen]
                try:
                    with self.batch.measured(len(chosen)):
                        lines = self._ask_batch(benchmark, file, chosen, shown)
                except Exception as error:
                    if not self.batch.made_smaller(error):
                        raise
                    continue
                answers.add(lines)
                left = left[len(chosen) :]
                progress.advance(len(chosen))
                raise_if_stopped()

    def answer_all(
        self,
        benchmark: Benchmark,
        file: BenchmarkFile,
        items: Sequence[Item],
        label: str,
        raise_if_stopped: Any = lambda: None,
    ) -> list[str]:
        """Return the model's answers to all items; nothing is kept on disk.

        Args:
            benchmark: Which benchmark it is.
            file: Its file.
            items: Its rows that are asked.
            label: The model's name in the progress display.
            raise_if_stopped: Called after each batch.
        """
        answers: list[str] = []
        with self.display.progress(f"{benchmark.name}, {label}", len(items)) as progress:
            while len(answers) < len(items):
                chosen = items[len(answers) : len(answers) + self.batch.now]
                try:
                    with self.batch.measured(len(chosen)):
                        rows, images = self._encode(benchmark, file, [(item, item) for item in chosen])
                        answers += self._answer(benchmark, chosen, rows, images)
                except Exception as error:
                    if not self.batch.made_smaller(error):
                        raise
                    continue
                progress.advance(len(chosen))
                raise_if_stopped()
        return answers

    def _ask_batch(
        self, benchmark: Benchmark, file: BenchmarkFile, chosen: Sequence[Item], shown: Sequence[Item | None]
    ) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = [{"index": item.index} for item in chosen]
        own = [(number, item, item) for number, item in enumerate(chosen)]
        others = [
            (number, item, other)
            for number, (item, other) in enumerate(zip(chosen, shown, strict=True))
            if other is not None
        ]
        for suffix, asked in (("", own), ("_exchanged", others)):
            if not asked:
                continue
            rows, images = self._encode(benchmark, file, [(item, other) for _, item, other in asked])
            for name, is_base in (("base", True), ("tuned", False)):
                if not is_base and not self.has_adapter:
                    continue
                with self._as(is_base):
                    texts = self._answer(benchmark, [item for _, item, _ in asked], rows, images)
                for (number, _, _), text in zip(asked, texts, strict=True):
                    lines[number][f"{name}{suffix}"] = text
        return lines

    @contextmanager
    def _as(self, base: bool) -> Iterator[None]:
        if base and self.has_adapter:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield
        else:
            yield

    def _encode(
        self, benchmark: Benchmark, file: BenchmarkFile, pairs: Sequence[tuple[Item, Item]]
    ) -> tuple[list[Encoded], list[Any]]:
        """Encode each first item's question with the pictures of the second."""
        rows: list[Encoded] = []
        images: list[Any] = []
        for item, other in pairs:
            color = mean_color(self.encoder.processor)
            opened = file.pictures(other, self.max_pixels)
            pictures = [make_square(picture, self.square, color) for picture in opened]
            rows.append(self.encoder.encode_question(self._example(benchmark, item, "A"), pictures))
            images += pictures
        return rows, images

    def _example(self, benchmark: Benchmark, item: Item, answer: str) -> Example:
        question = question_of_item(benchmark, item, self.prompt)
        place = f"index {item.index}"
        return Example(place, (Message("user", question), Message("assistant", answer)))

    def _answer(
        self, benchmark: Benchmark, items: Sequence[Item], rows: Sequence[Encoded], images: Sequence[Any]
    ) -> list[str]:
        inputs = self.encoder.batch(rows, images, prompts=True)
        if self.letters:
            return self._likeliest(benchmark, items, inputs)
        from moslora.tasks.language import pad_token_of
        from moslora.tasks.text.generation import Generation, generate

        tokenizer = self.encoder.tokenizer
        stop_ids = sorted(self.encoder.encoder.stop_ids)
        settings = Generation(benchmark.new_tokens, stop_ids, pad_token_of(tokenizer))
        return [text.strip() for text in generate(self.model, tokenizer, inputs, settings, self.device)]

    def _likeliest(
        self, benchmark: Benchmark, items: Sequence[Item], inputs: Mapping[str, Tensor]
    ) -> list[str]:
        """Return the option whose first token is the likeliest; no answer is generated."""
        logits = first_logits(self.model, inputs, self.device)
        found = []
        for row, item in zip(logits, items, strict=True):
            names = YES_NO if benchmark.kind == "yes-no" else tuple(options_of(benchmark, item))
            ids = [self.first_token(benchmark, item, name) for name in names]
            if len(set(ids)) < len(ids):
                raise UsageError(
                    f"--protocol letter: two of the options {', '.join(names)} begin with the same token of this "
                    "model; take --protocol published."
                )
            found.append(names[int(row[ids].argmax())])
        return found

    def first_token(self, benchmark: Benchmark, item: Item, answer: str) -> int:
        """Return the first token of an answer, as the model would write it after its question."""
        if answer not in self.first_tokens:
            from PIL import Image

            # Some families have no question without a picture.
            text = Example(item.index, (Message("user", f"{IMAGE}\n?"), Message("assistant", answer)))
            encoded = self.encoder.encode_question(text, [Image.new("RGB", (64, 64))])
            self.first_tokens[answer] = next(label for label in encoded.labels if label != IGNORED)
        return self.first_tokens[answer]

    def kept(self, file: BenchmarkFile, items: Sequence[Item]) -> Kept | None:
        """Measure what the processor keeps of a benchmark's pictures, on a few of them.

        Args:
            file: Its file.
            items: Its rows that are asked.
        """
        chosen = evenly_spaced(items, LOOKED_AT)
        opened = (file.pictures(item, self.max_pixels) for item in chosen)
        sizes = Counter(picture.size for pictures in opened for picture in pictures)
        return measure_kept(self.encoder.processor, sizes, self.square)

    def prove_base(self, before: Sequence[Tensor], probes: Sequence[Mapping[str, Tensor]]) -> None:
        """Prove that the model without its adapter is the base.

        Args:
            before: Logits of the base alone, from ``first_logits``.
            probes: What they are of.

        Raises:
            ProofError: If they differ.
        """
        if not self.has_adapter:
            return
        import torch

        with self._as(base=True):
            now = [first_logits(self.model, inputs, self.device) for inputs in probes]
        if not all(torch.equal(a, b) for a, b in zip(before, now, strict=True)):
            raise ProofError(
                "With its adapter switched off the model is not the base: the adapter brings something that stays, as "
                "trained biases do. Evaluate the base without --adapter, and the merged model likewise (moslora merge)."
            )

    def probes(
        self, benchmark: Benchmark, file: BenchmarkFile, items: Sequence[Item]
    ) -> list[dict[str, Tensor]]:
        """Return inputs of a few items, one by one."""
        found = []
        for item in items:
            rows, images = self._encode(benchmark, file, [(item, item)])
            found.append(self.encoder.batch(rows, images, prompts=True))
        return found


def first_logits(model: nn.Module, inputs: Mapping[str, Tensor], device: str) -> Tensor:
    """Return the logits of the first token of each answer.

    Args:
        model: The model.
        inputs: Prompts padded on the left.
        device: Where the model is.

    Returns:
        ``(rows, vocabulary)``, on the CPU, in float32.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, use_cache=False
    )
    arguments = {name: tensor.to(device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        output = model.generate(**arguments, generation_config=config)  # type: ignore[operator]
    logits: Tensor = output.logits[0].float().cpu()
    return logits


def other_pictures(items: Sequence[Item]) -> dict[str, Item]:
    """Pair items with others that show as many, but other pictures.

    Args:
        items: A benchmark's rows.

    Returns:
        By index the other item; without those for which there is none.
    """
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.pictures, []).append(item)
    found = {}
    for group in groups.values():
        half = len(group) // 2
        for at, item in enumerate(group):
            others = (group[(at + half + step) % len(group)] for step in range(len(group)))
            other = next((one for one in others if one.shows != item.shows), None)
            if other is not None:
                found[item.index] = other
    return found
