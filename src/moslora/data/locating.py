"""Where the answers of a conversation are among its tokens.

Three ways: a template's own ``{% generation %}`` marks; the conversation rendered up to each answer, without and with
it, as token ids; and the same as text, tokenized once, for conversations of many turns. Only answers that begin within
the limit are looked for, so that the work does not grow with the square of the turns.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise, takewhile
from typing import Any

from moslora.data.messages import Message
from moslora.data.rendering import Template
from moslora.errors import EncodingError

__all__ = ["IGNORED", "OTHER_WAYS", "AnswerFinder", "common_length", "decode", "trained_count"]

IGNORED = -100  # torch's cross entropy and every Trainer skip this label
MANY = 16  # answers; up to so many are found by token ids alone
# Of very many answers about so many are found by rendering what comes before, evenly spaced and the first and last;
# the others must stand between the same opening and end, or are found so too.
RENDERED, ALL_AT_ENDS = 128, 8
OTHER_WAYS = (
    "If earlier answers are the cause, set data.train_on=each, which makes every answer an example of its own, written "
    "as it would be generated, or data.train_on=last to learn only the last one; else set data.train_on=all."
)


@dataclass(frozen=True)
class AnswerFinder:
    """Finds the tokens of answers, each up to and including the token that ends it.

    Args:
        template: The chat template.
        limit: Tokens beyond which nothing is learned; None for all.
    """

    template: Template
    limit: int | None = None

    def find(
        self, messages: Sequence[Message], arguments: Mapping[str, Any], text: str
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a conversation, and the same where an answer is learned, ``IGNORED`` elsewhere.

        Args:
            messages, arguments: As for ``Template``.
            text: The rendered conversation.

        Raises:
            EncodingError: If the answers cannot be located exactly.
        """
        if self.has_marks:
            return self._marked(messages, arguments)
        if sum(message.role == "assistant" and message.trained for message in messages) > MANY:
            found = self._by_text(messages, arguments, text)
            if found is not None:
                return found
        return self._by_ids(messages, arguments)

    # ---- by token ids --------------------------------------------------------------------------------

    def _by_ids(
        self, messages: Sequence[Message], arguments: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Find each answer by rendering the conversation up to it, without and with it."""
        ids = self.template.ids(messages, arguments)
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.trained:
                continue
            before = self.template.ids(messages[:index], arguments, ask=True)
            if self.limit is not None and len(before) > self.limit:
                break  # this answer and those after it are beyond the limit
            last = index == len(messages) - 1
            upto = ids if last else self.template.ids(messages[: index + 1], arguments)
            start = common_length(before, upto)
            if start < len(before) and not self._decode(upto).startswith(self._decode(before)):
                raise _before_differs(index)
            # If only tokens differ, one token spans the template's white space and the answer's.
            end = self._end_of(upto, start)
            if ids[:end] != upto[:end]:
                raise _turn_differs(index)
            labels[start:end] = ids[start:end]
        return ids, labels

    def _decode(self, ids: list[int]) -> str:
        return str(
            self.template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _end_of(self, ids: list[int], start: int) -> int:
        """Return where the turn that begins at ``start`` and ends ``ids`` stops: after its end-of-turn token.

        What a template writes after that token (most often a line break) is not the model's to generate.
        """
        end = self.end_of_turn
        if end is None:
            return len(ids)
        return next((at + 1 for at in reversed(range(start, len(ids))) if ids[at] == end), len(ids))

    @cached_property
    def end_of_turn(self) -> int | None:
        """The first control token that the template writes after an answer, whatever the answer."""
        asked = (Message("user", "a"),)
        start = len(self.template.ids(asked, {}, ask=True))
        b, c = (self.template.ids((*asked, Message("assistant", word)), {})[start:] for word in ("b", "c"))
        closing: list[int] = []
        for one, other in zip(reversed(b), reversed(c), strict=False):
            if one != other:
                break
            closing.insert(0, one)
        tokenizer = self.template.tokenizer
        control = tokenizer.added_tokens_decoder.keys() - {tokenizer.unk_token_id}
        return next((token for token in closing if token in control), None)

    # ---- by text -------------------------------------------------------------------------------------

    def _by_text(
        self, messages: Sequence[Message], arguments: Mapping[str, Any], text: str
    ) -> tuple[list[int], list[int]] | None:
        """Find many answers by the text before each of them; None where tokens do not say where they are in a text.

        The first and the last answer are found by token ids too, and must be the same. The text before an answer is
        rendered for every answer, or for some where they are so many that this would take the square of their number.
        """
        tokenizer = self.template.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return None
        ids = self.template.ids(messages, arguments)
        try:
            output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            offsets = output["offset_mapping"]
        except (KeyError, NotImplementedError, TypeError, ValueError):
            return None
        if list(output["input_ids"]) != ids:
            return None
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        if any(a > b for a, b in pairwise(ends)):
            return None
        most = len(text) if self.limit is None or self.limit >= len(ids) else ends[self.limit]
        labels, spans, at = [IGNORED] * len(ids), [], 0
        answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
        stride, opening = max(1, len(answers) // RENDERED), ""
        is_alike = stride > 1 and all(m.trained for m in messages if m.role == "assistant")
        for number, index in enumerate(answers):
            span = None
            if (
                is_alike
                and opening
                and number % stride
                and number >= ALL_AT_ENDS
                and number < len(answers) - ALL_AT_ENDS
            ):
                span = self._next_span(text, at, opening, messages[index].content.strip())
            if span is None:
                before = self.template.text(messages[:index], arguments, ask=True)
                if len(before) > most:
                    break
                upto = self.template.text(messages[: index + 1], arguments)
                if not upto.startswith(before):
                    raise _before_differs(index)
                span = len(before), self._end_in(upto, len(before))
                if not text.startswith(upto[: span[1]]):
                    raise _turn_differs(index)
                if is_alike and not opening:
                    opening = before.removeprefix(self.template.text(messages[:index], arguments))
                    is_alike = not any(opening in message.content for message in messages)
            if span[0] > most:
                break
            at = span[1]
            start, end = bisect_right(ends, span[0]), bisect_left(starts, at)
            labels[start:end] = ids[start:end]
            spans.append((index, start, end))
        for index, start, end in {*spans[:1], *spans[-1:]}:
            by_ids = self.template.ids(messages[:index], arguments, ask=True)
            upto_ids = self.template.ids(messages[: index + 1], arguments)
            if (start, end) != (len(by_ids), self._end_of(upto_ids, start)) or ids[:start] != by_ids:
                return None
        return ids, labels

    def _next_span(self, text: str, at: int, opening: str, content: str) -> tuple[int, int] | None:
        """Return where the next answer is, if it stands between the template's opening and end of turn as others do."""
        if self.end_of_turn is None:
            return None
        end = str(self.template.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        start = text.find(opening, at)
        if start < 0:
            return None
        start += len(opening)
        stop = text.find(end, start + len(content))
        return (start, stop + len(end)) if text[start:stop].strip() == content and stop >= 0 else None

    def _end_in(self, text: str, start: int) -> int:
        """Return where the turn that begins at ``start`` and ends a text stops, as ``_end_of`` does for ids."""
        if self.end_of_turn is None:
            return len(text)
        end = str(self.template.tokenizer.convert_ids_to_tokens(self.end_of_turn))
        at = text.rfind(end, start)
        return len(text) if at < 0 else at + len(end)

    # ---- by the template's own marks -----------------------------------------------------------------

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template marks its answers."""
        # Marks are mapped to tokens by character offsets, which only fast tokenizers keep.
        fast = self.template.tokenizer.is_fast
        return fast and re.search(r"\{%-?\s*generation\b", self.template.source()) is not None

    def _marked(
        self, messages: Sequence[Message], arguments: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Read where answers are from the template's own ``{% generation %}`` marks."""
        output = self.template.apply(
            messages,
            arguments,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            return_assistant_tokens_mask=True,
        )
        ids, mask = list(output["input_ids"]), list(output["assistant_masks"])
        runs = [list(run) for on, run in groupby(range(len(ids)), key=lambda at: mask[at]) if on]
        answers = [message for message in messages if message.role == "assistant"]
        if not all(message.trained for message in answers):
            if len(runs) != len(answers):
                raise EncodingError(
                    f"the chat template marks {len(runs)} spans for {len(answers)} answers, so the answers that are "
                    "not learned cannot be told from the others. Give the conversation as messages without flags, or "
                    "set data.train_on=all."
                )
            runs = [run for run, message in zip(runs, answers, strict=True) if message.trained]
        trained = {at for run in runs for at in run}
        return ids, [token if at in trained else IGNORED for at, token in enumerate(ids)]


def _before_differs(index: int) -> EncodingError:
    return EncodingError(
        f"the chat template writes what comes before turn {index} differently once that turn "
        f"follows, so the trained tokens would not be those generated. {OTHER_WAYS}"
    )


def _turn_differs(index: int) -> EncodingError:
    return EncodingError(
        f"the chat template writes turn {index} differently once more turns follow (some leave "
        f"out earlier reasoning), so it cannot be trained on as it would be generated. {OTHER_WAYS}"
    )


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the longest common prefix.

    Example:
        >>> common_length([1, 2, 3], [1, 2, 4])
        2
    """
    if isinstance(a, list) and isinstance(b, list) and b[: len(a)] == a:
        return len(a)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def trained_count(labels: Iterable[int]) -> int:
    """Return how many tokens are trained on."""
    if isinstance(labels, list):
        return len(labels) - labels.count(IGNORED)
    return sum(label != IGNORED for label in labels)


def decode(ids: list[int], tokenizer: Any) -> str:
    """Return the text of token ids, control tokens included and white space as it is."""
    given: Any = ids
    if getattr(tokenizer, "is_fast", False):
        import numpy

        given = numpy.asarray(
            ids, dtype=numpy.int64
        )  # of a list, transformers looks at the type of every number
    return str(tokenizer.decode(given, skip_special_tokens=False, clean_up_tokenization_spaces=False))
