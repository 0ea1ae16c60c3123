"""Examples encoded many at a time: the same tokens as one by one, from fewer calls of the tokenizer.

``Encoder`` decides everything. What it asks the tokenizer for is looked up here, and was tokenized for all examples of
a batch at once; whatever else it asks for is tokenized when it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moslora.data.messages import Message
from moslora.data.rendering import Template
from moslora.data.shapes import Example
from moslora.data.tokenization import Encoded, Encoder
from moslora.errors import EncodingError

__all__ = ["BatchEncoder", "batched"]

CHARACTERS = 1_000_000  # of a batch, about


class _Remembering(Template):
    """A chat template that keeps what it wrote, and what that is in tokens, until told to forget.

    Args:
        tokenizer: As for ``Template``.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._written: dict[tuple[Any, ...], tuple[Any, str]] = {}
        self._ids: dict[str, list[int]] = {}

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the tokens of turns are those of what the template writes, as transformers' own method has it."""
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        own = getattr(type(self.tokenizer), "apply_chat_template", None)
        return (
            isinstance(self.tokenizer, PreTrainedTokenizerFast)
            and own is PreTrainedTokenizerBase.apply_chat_template
            and type(self.tokenizer).__call__ is PreTrainedTokenizerBase.__call__
        )

    def text(self, messages: Sequence[Message], arguments: Mapping[str, Any], ask: bool = False) -> str:
        """Return turns as the template writes them; the same turns are written once."""
        key = (*map(id, messages), ask, id(arguments))
        found = self._written.get(key)
        if found is None:
            # Kept beside the text, so that no other object has the same id meanwhile.
            found = (list(messages), arguments), super().text(messages, arguments, ask)
            self._written[key] = found
        return found[1]

    def ids(self, messages: Sequence[Message], arguments: Mapping[str, Any], ask: bool = False) -> list[int]:
        """Return the token ids of turns."""
        if not self._is_plain:
            return super().ids(messages, arguments, ask)
        text = self.text(messages, arguments, ask)
        known = self._ids.get(text)
        if known is None:
            # The template's own call: its errors are worded there.
            known = self._ids[text] = super().ids(messages, arguments, ask)
        return list(known)

    def tokenize(self, texts: Sequence[str]) -> None:
        """Tokenize what the template wrote, all at once.

        Args:
            texts: Texts that are going to be asked for.
        """
        missing = [text for text in dict.fromkeys(texts) if text not in self._ids]
        if missing and self._is_plain:
            found = self.tokenizer(
                missing, add_special_tokens=False, padding=False, truncation=False, verbose=False
            )
            self._ids.update(zip(missing, found["input_ids"], strict=True))

    def forget(self) -> None:
        """Forget all texts."""
        self._written.clear()
        self._ids.clear()


@dataclass(frozen=True)
class BatchEncoder(Encoder):
    """An encoder of many examples; arguments and errors are those of ``Encoder``."""

    def encode_many(self, examples: Sequence[Example]) -> list[Encoded | EncodingError]:
        """Encode examples without regard to ``max_length``.

        Args:
            examples: A batch.

        Returns:
            For each what ``encode_whole`` returns or raises.
        """
        encoded: list[Encoded | EncodingError] = []
        batch: list[Example] = []
        characters = 0
        for example in examples:
            batch.append(example)
            characters += _length(example)
            if characters > CHARACTERS:
                encoded += self._encode_batch(batch)
                batch, characters = [], 0
        return encoded + self._encode_batch(batch)

    def _encode_batch(self, examples: Sequence[Example]) -> list[Encoded | EncodingError]:
        self._tokenize_ahead(examples)
        encoded: list[Encoded | EncodingError] = []
        for example in examples:
            try:
                encoded.append(self.encode_whole(example))
            except EncodingError as problem:
                encoded.append(problem)
        self._renderer.forget()
        self._known.clear()
        return encoded

    def _tokenize_ahead(self, examples: Sequence[Example]) -> None:
        """Tokenize what most examples ask for: the whole, and what comes before its last answer."""
        rendered, plain = [], []
        most = self._most_characters
        for example in examples:
            if most is not None and _length(example) > most:
                continue  # its start alone is tokenized
            if self.template == "pair":
                continue
            if example.text is not None or not self.uses_chat:
                prompt = example.prompt or ""
                plain += (
                    [example.text]
                    if example.text is not None
                    else [prompt, prompt + (example.completion or "")]
                )
                continue
            try:
                messages, last = self._conversation(example)
                arguments = example.template_arguments
                rendered.append(self._renderer.text(messages, arguments))
                rendered.append(self._renderer.text(messages[:last], arguments, ask=True))
            except EncodingError:
                continue  # it is raised again where it belongs
        try:
            self._renderer.tokenize(rendered)
            missing = list(dict.fromkeys(plain))
            if missing and self._has_plain_call:
                found = self.tokenizer(missing, padding=False, truncation=False, verbose=False)["input_ids"]
                self._known.update(zip(missing, found, strict=True))
        except (TypeError, ValueError, KeyError, OverflowError):
            pass  # one of the texts is at fault, which its own turn finds out

    @cached_property
    def _renderer(self) -> _Remembering:
        return _Remembering(self.tokenizer)

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """Token ids of plain texts of the batch under way."""
        return {}

    @cached_property
    def _has_plain_call(self) -> bool:
        """Whether several texts are tokenized as each alone is."""
        from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

        own = type(self.tokenizer).__call__
        return isinstance(self.tokenizer, PreTrainedTokenizerFast) and own is PreTrainedTokenizerBase.__call__

    def _called(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = super()._called(text)
            if len(text) < 8:  # as the letter by which ``_opened`` looks for an end token
                self._known[text] = known
        return list(known)


def _length(example: Example) -> int:
    if example.messages is not None:
        return sum(len(message.content) for message in example.messages)
    return len(example.text or "") + len(example.prompt or "") + len(example.completion or "")


def batched(encoder: Encoder) -> BatchEncoder:
    """Return an encoder of many examples that does what another does one by one.

    Args:
        encoder: The other.
    """
    return BatchEncoder(
        encoder.tokenizer, encoder.template, encoder.train_on, encoder.max_length, encoder.too_long
    )
