"""Conversations with pictures as token ids, labels and pixel values, made when a batch needs them.

Conversations are encoded as the text task encodes them, with one difference: the processor renders them, which puts
each picture's tokens in place of ``<image>``. Labels follow the same rules. Tokens of pictures are in questions, so
they are never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import Summary, Tally
from moslora.data.tokenization import IGNORED, Encoded, Encoder
from moslora.errors import EncodingError
from moslora.tasks.language import pad_token_of
from moslora.tasks.text.padding import pad_rows
from moslora.tasks.vision.processors import ProcessorFamily, Renderer, picture_ids, pixels, token_types

if TYPE_CHECKING:
    from torch import Tensor

    from moslora.data.shapes import Example
    from moslora.display import Display
    from moslora.tasks.vision.reading import PictureFiles

__all__ = ["EncodedRows", "PictureEncoder", "encode_rows"]


class PictureEncoder:
    """Encodes conversations with their pictures, and makes batches of them.

    Args:
        processor: The model's.
        family: The model's.
        train_on: As for ``Encoder``.
        max_length: Most tokens of an example; None for no limit.
        too_long: As for ``Encoder``; ``"cut"`` is taken as ``"refuse"``, because a cut could separate a picture from
            some of its tokens, which no model can read.

    Attributes:
        processor: The model's.
        tokenizer: The processor's.
        picture_ids: Tokens that stand for a part of a picture.
        renderer: Renders conversations with the pictures of one example at a time.
        encoder: Encodes what the renderer renders.
    """

    def __init__(
        self, processor: Any, family: ProcessorFamily, train_on: str, max_length: int | None, too_long: str
    ) -> None:
        self.processor, self.family = processor, family
        self.tokenizer = processor.tokenizer
        self.picture_ids = picture_ids(processor)
        self.renderer: Any = Renderer(processor)
        template = "pair" if family.prefix else "chat"
        self.encoder = Encoder(
            self.renderer, template, train_on, max_length, "refuse" if too_long == "cut" else too_long
        )

    def encode(self, example: Example, images: Sequence[Any], tally: Tally | None = None) -> Encoded | None:
        """Encode one example for training.

        Args:
            example: The example.
            images: Its pictures, open.
            tally: Counts it.

        Returns:
            Its tokens; None if it is dropped for its length.

        Raises:
            EncodingError: If it cannot be encoded.
        """
        with self.renderer.showing(images):
            whole = self.encoder.encode_whole(example)
            fitted = self.encoder.fit(whole)
            if tally is not None:
                tally.add(whole, fitted)
        return None if fitted is None else self._without_picture_labels(fitted)

    def encode_question(self, example: Example, images: Sequence[Any]) -> Encoded:
        """Encode one example to be asked: without regard to its length.

        Args:
            example: The example.
            images: The pictures to show, open.

        Raises:
            EncodingError: If it cannot be encoded.
        """
        with self.renderer.showing(images):
            whole = self.encoder.encode_whole(example)
        return self._without_picture_labels(whole)

    def _without_picture_labels(self, encoded: Encoded) -> Encoded:
        if self.picture_ids.isdisjoint(encoded.labels):
            return encoded
        if self.encoder.train_on != "all":
            raise EncodingError(
                f"{encoded.place}: a picture's tokens would be trained on; pictures belong in questions."
            )
        labels = [IGNORED if label in self.picture_ids else label for label in encoded.labels]
        return replace(encoded, labels=labels)

    def batch(
        self, rows: Sequence[Encoded], images: Sequence[Any], prompts: bool = False
    ) -> dict[str, Tensor]:
        """Pad rows to a batch, with their pictures.

        Args:
            rows: Encoded examples.
            images: All their pictures, in order.
            prompts: Whether the prompts alone are wanted, padded on the left, to generate from.

        Returns:
            The model's arguments, with ``labels`` unless ``prompts``.
        """
        texts = [row.prompt_ids if prompts else row.input_ids for row in rows]
        batch = {
            "input_ids": pad_rows(texts, pad_token_of(self.tokenizer), left=prompts),
            "attention_mask": pad_rows([[1] * len(text) for text in texts], 0, left=prompts),
        }
        if not prompts:
            batch["labels"] = pad_rows([row.labels for row in rows], IGNORED)
        if self.family.types:
            types = [
                token_types(self.processor, self.family, text, len(row.prompt_ids))
                for row, text in zip(rows, texts, strict=True)
            ]
            batch[self.family.types] = pad_rows(types, 0, left=prompts)
        return batch | (pixels(self.processor, images) if images else {})

    def shorten(self, piece: str) -> str:
        """Return a text in which four or more tokens of a picture in a row are replaced by their number."""
        tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.picture_ids))
        runs = "|".join(f"(?:{re.escape(token)}){{4,}}" for token in tokens)

        def count(match: re.Match[str]) -> str:
            token = next(token for token in tokens if match[0].startswith(token * 4))
            return f"{token}×{len(match[0]) // len(token)}"

        return re.sub(runs, count, piece)


class EncodedRows(Sequence[Encoded]):
    """Encoded examples of which only the lengths are in memory; each is encoded again whenever it is needed.

    Args:
        part: ``"train"``, ``"heldout"`` or ``"validation"``.
        examples: Those that were not dropped.
        lengths: Tokens of each.
        encoder: Encodes them.
        pictures: Their pictures.
    """

    def __init__(
        self,
        part: str,
        examples: Sequence[Example],
        lengths: Sequence[int],
        encoder: PictureEncoder,
        pictures: PictureFiles,
    ) -> None:
        self.part, self.examples, self.lengths = part, examples, lengths
        self.encoder, self.pictures = encoder, pictures

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return EncodedRows(self.part, self.examples[at], self.lengths[at], self.encoder, self.pictures)
        return self.take([at])[0][0]

    def take(self, numbers: Sequence[int]) -> tuple[list[Encoded], list[Any]]:
        """Return some examples, and all their pictures in that order.

        Args:
            numbers: Their positions.
        """
        rows: list[Encoded] = []
        images: list[Any] = []
        for number in numbers:
            example = self.examples[number]
            shown = self.pictures.open(self.part, example)
            encoded = self.encoder.encode(example, shown)
            assert encoded is not None, "it was not dropped before"
            rows.append(encoded)
            images += shown
        return rows, images


def encode_rows(
    part: str,
    examples: Sequence[Example],
    encoder: PictureEncoder,
    pictures: PictureFiles,
    display: Display,
    raise_if_stopped: Callable[[], None],
) -> tuple[EncodedRows, Summary]:
    """Encode every example once, with its pictures, to check it and to learn its length.

    Args:
        part: ``"train"``, ``"heldout"`` or ``"validation"``.
        examples: The examples.
        encoder: Encodes them.
        pictures: Their pictures.
        display: Where progress is shown.
        raise_if_stopped: Called after each example.

    Returns:
        The examples that were not dropped, and the counts.

    Raises:
        EncodingError: If an example cannot be encoded, or none is left.
    """
    fitting: list[Example] = []
    lengths: list[int] = []
    tally = Tally(encoder.encoder)
    with display.progress(f"Encoding, {part}", len(examples)) as progress:
        for example in examples:
            encoded = encoder.encode(example, pictures.open(part, example), tally)
            if encoded is not None:
                fitting.append(example)
                lengths.append(len(encoded.input_ids))
            progress.advance()
            raise_if_stopped()
    if not fitting:
        raise EncodingError(
            f"No {part} example is left within trainer.max_length={encoder.encoder.max_length}; raise it "
            f"(the longest has {tally.longest} tokens)."
        )
    return EncodedRows(part, fitting, lengths, encoder, pictures), tally.summary()
