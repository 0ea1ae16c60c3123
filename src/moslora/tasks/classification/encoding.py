"""Labeled examples as token ids, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.data.labeled import Labeled
from moslora.errors import EncodingError
from moslora.tasks.text.padding import pad_rows

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EncodedLabel", "LabelEncoder", "LabelSummary", "encode_labeled", "label_batches", "pad_batch"]

# Tokens in a batch that is measured, with padding.
BATCH_TOKENS = 4096
IGNORED = -100


@dataclass(frozen=True)
class EncodedLabel:
    """One example as a model reads it.

    Attributes:
        place: Where it stands in its file.
        input_ids: Its tokens, special ones included.
        label: Index of a class; 0 or 1 for each label; a number; or index of a tag for each token, -100 where none is
            scored.
        answer: The label as text.
        token_type_ids: Which of two texts a token is of, where the model wants to know.
        heads: Of words with tags, the position of each scored word's first token.
        was_cut: Whether tokens were left out for their number.
    """

    place: str
    input_ids: list[int]
    label: Any
    answer: str
    token_type_ids: list[int] | None = None
    heads: tuple[int, ...] = ()
    was_cut: bool = False


@dataclass
class LabelSummary:
    """Counts of a set of encoded examples.

    Attributes:
        examples, tokens: How many there are.
        longest: Tokens of the longest, before any cut.
        cut, dropped: How many were longer than ``limit``.
        unseen: Words that no token stands for, or that were cut off: their tags are neither learned nor scored.
        limit: Tokens at most.
    """

    examples: int = 0
    tokens: int = 0
    longest: int = 0
    cut: int = 0
    dropped: int = 0
    unseen: int = 0
    limit: int | None = None

    def warnings(self) -> list[str]:
        """Return what a person should know before training."""
        total, said = self.examples + self.dropped, []
        for count, fate in ((self.dropped, "dropped"), (self.cut, "cut")):
            if count:
                said.append(
                    f"{count} of {total} examples are longer than {self.limit} tokens and were {fate}: raise "
                    f"trainer.max_length, if the model has positions for more (the longest has {self.longest} tokens)"
                )
        if self.unseen:
            said.append(
                f"{self.unseen} words have no token, because they were cut off or the tokenizer drops them: their tags "
                "are neither learned nor scored"
            )
        return said


class LabelEncoder:
    """Encodes labeled examples.

    Args:
        tokenizer: The model's.
        limit: Tokens at most; None for any number.
        too_long: ``"cut"``, ``"drop"`` or ``"refuse"``.
    """

    def __init__(self, tokenizer: Any, limit: int | None, too_long: str) -> None:
        self.tokenizer, self.limit, self.too_long = tokenizer, limit, too_long
        least = tokenizer.num_special_tokens_to_add(pair=True)
        if limit is not None and limit <= least:
            raise EncodingError(
                f"trainer.max_length={limit} leaves no room for text beside {least} special tokens."
            )

    def encode(self, example: Labeled, label: Any, answer: str, summary: LabelSummary) -> EncodedLabel | None:
        """Encode an example, and count it.

        Args:
            example: What is classified.
            label: As ``EncodedLabel`` has it; of words the index of each one's tag.
            answer: The label as text.
            summary: Counts go there.

        Returns:
            The example; None if it was dropped for its length.

        Raises:
            EncodingError: If it is too long and ``too_long`` is ``"refuse"``, or no token is left.
        """
        whole = self._tokens(example, None)
        length = len(whole["input_ids"])
        summary.longest = max(summary.longest, length)
        is_long = self.limit is not None and length > self.limit
        if is_long and self.too_long == "refuse":
            raise EncodingError(
                f"{example.place}: {length} tokens are more than trainer.max_length={self.limit}, and data.too_long is "
                "refuse. Shorten the text, or raise the limit."
            )
        if is_long and self.too_long == "drop":
            summary.dropped += 1
            return None
        fitted = self._tokens(example, self.limit) if is_long else whole
        ids = list(fitted["input_ids"])
        special = set(self.tokenizer.all_special_ids)
        if all(token in special for token in ids):
            raise EncodingError(
                f"{example.place}: the tokenizer has no tokens for this text. Remove the row, or choose another model."
            )
        summary.examples += 1
        summary.tokens += len(ids)
        summary.cut += is_long
        heads: tuple[int, ...] = ()
        if example.words is not None:
            label, heads = self._of_tokens(fitted, example.words, label)
            summary.unseen += len(example.words) - len(heads)
            if not heads:
                raise EncodingError(f"{example.place}: no word has a token of the model's. Remove the row.")
        types = fitted.get("token_type_ids")
        return EncodedLabel(
            example.place, ids, label, answer, None if types is None else list(types), heads, bool(is_long)
        )

    def _tokens(self, example: Labeled, limit: int | None) -> Mapping[str, Any]:
        options: dict[str, Any] = {} if limit is None else {"truncation": True, "max_length": limit}
        if limit is None:
            options["verbose"] = False  # the length is judged here
        if example.words is None:
            found: Mapping[str, Any] = self.tokenizer(example.text, example.text_pair, **options)
            return found
        if not getattr(self.tokenizer, "is_fast", False):
            raise EncodingError(
                "task.problem=tokens needs a fast tokenizer, which tells the words of its tokens; this model has none."
            )
        text = " ".join(example.words)
        options |= {"return_offsets_mapping": True, "return_special_tokens_mask": True}
        words: Mapping[str, Any] = self.tokenizer(text, **options)
        return words

    def _of_tokens(
        self, fitted: Mapping[str, Any], words: Sequence[str], tags: Sequence[int]
    ) -> tuple[list[int], tuple[int, ...]]:
        """Give the tag of each word to its first token."""
        ends, at = [], 0
        for one in words:
            at += len(one)
            ends.append(at)
            at += 1
        labels = [IGNORED] * len(fitted["input_ids"])
        heads: list[int] = []
        word = -1
        for position, ((start, end), special) in enumerate(
            zip(fitted["offset_mapping"], fitted["special_tokens_mask"], strict=True)
        ):
            if special or start == end:
                continue
            own = next(index for index in range(max(word, 0), len(ends)) if end - 1 < ends[index] + 1)
            if own != word:
                word = own
                labels[position] = tags[own]
                heads.append(position)
        return labels, tuple(heads)


def encode_labeled(
    encoder: LabelEncoder, examples: Sequence[Labeled], labels: Sequence[Any], answers: Sequence[str]
) -> tuple[list[EncodedLabel], LabelSummary]:
    """Encode examples and count what happened.

    Args:
        encoder: How.
        examples: The examples.
        labels, answers: Each one's label, as a model and as people have it.

    Returns:
        The encoded examples in order, without those dropped, and the counts.

    Raises:
        EncodingError: If examples cannot be encoded, naming the first and how many more; or if none is left.
    """
    summary = LabelSummary(limit=encoder.limit)
    found: list[EncodedLabel] = []
    problems: list[EncodingError] = []
    for example, label, answer in zip(examples, labels, answers, strict=True):
        try:
            encoded = encoder.encode(example, label, answer, summary)
        except EncodingError as problem:
            problems.append(problem)
            continue
        if encoded is not None:
            found.append(encoded)
    if problems:
        more = f" ({len(problems) - 1} more examples cannot be encoded either)" if problems[1:] else ""
        raise EncodingError(f"{problems[0]}{more}") from problems[0].__cause__
    if not found:
        raise EncodingError(
            f"none of {len(examples)} examples is left within {encoder.limit} tokens: raise trainer.max_length (the "
            f"longest has {summary.longest} tokens)."
        )
    return found, summary


def label_batches(examples: Sequence[EncodedLabel]) -> Iterator[list[int]]:
    """Group the positions of examples of similar length, so that a batch has at most ``BATCH_TOKENS`` tokens.

    Args:
        examples: Encoded examples.
    """
    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids)):
        if batch and (len(batch) + 1) * len(examples[index].input_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad_batch(rows: Sequence[Mapping[str, Any]], pad_id: int, problem: str) -> dict[str, Tensor]:
    """Make a batch of rows of different length, padded on the right.

    Args:
        rows: ``input_ids``, ``labels``, and ``token_type_ids`` where the model has them.
        pad_id: Token to pad with.
        problem: Which kind of labels it is.

    Returns:
        The model's arguments, with ``labels``.
    """
    import torch

    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": pad_rows(ids, pad_id),
        "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
    }
    if rows[0].get("token_type_ids") is not None:
        batch["token_type_ids"] = pad_rows([row["token_type_ids"] for row in rows], 0)
    labels = [row["labels"] for row in rows]
    if problem == "tokens":
        batch["labels"] = pad_rows(labels, IGNORED)
    else:
        batch["labels"] = torch.tensor(labels, dtype=torch.long if problem == "single-label" else torch.float)
    return batch
