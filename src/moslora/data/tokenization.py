"""Examples as token ids and labels: exactly which tokens are trained on.

Conversations go through the model's own chat template. The assistant's turns are trained on, each up to and
including the token that ends it. Where a turn begins and ends is read from token ids, never guessed from text:

    ids of turns[:i] + generation prompt ──must begin──▶ ids of turns[:i+1] ──must begin──▶ ids of all turns
                                          └ trained on: what follows, up to the end of turn ┘

A template for which this does not hold is refused: the tokens trained on would not be those generated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from moslora.data.shapes import Example, Message
from moslora.errors import EncodingError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Encoded",
    "Encoder",
    "common_length",
    "decode",
]

IGNORED = -100  # torch's cross entropy and every Trainer skip this label

CHOICES = {
    "template": ("auto", "chat", "plain", "pair"),
    "train_on": ("completions", "all"),
    "too_long": ("cut", "drop", "refuse"),
}
OTHER_WAYS = (
    "Set data.train_on=all, or, if earlier answers are the cause, give prompt (a list of messages) and "
    "completion, so that only the last answer is trained on."
)


@dataclass(frozen=True)
class Encoded:
    """One example, ready to train and to be asked.

    Attributes:
        input_ids: The tokens.
        labels: The same where trained on, ``IGNORED`` elsewhere. The first token has no context: never trained on.
        prompt_ids: What generation starts from: all before the last answer. Empty for text examples.
        answer: The last answer as the data has it; empty for text examples.
        was_cut: Whether the end is missing, beyond ``max_length``.
        place: Where the example stands in its file.
        full_length: Number of tokens before any cut.
        prompt_differs: Whether ``input_ids`` do not begin with ``prompt_ids``: a token spans the end of the
            prompt and the start of the answer (and is trained on), or the template writes the two differently.
        control_text: Whether a turn's own text contains a control token, such as ``<|im_end|>``.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]
    answer: str
    was_cut: bool
    place: str
    full_length: int
    prompt_differs: bool
    control_text: bool


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids and labels.

    Args:
        tokenizer: The model's tokenizer.
        template: ``"chat"``: the tokenizer's chat template; ``"plain"``: prompt and completion joined, and
            the end-of-sequence token; ``"auto"``: chat if there is a template. Text is always plain. ``"pair"``: one
            question and its answer, joined by ``tokenizer.pair``, for models with bidirectional attention to prompts.
        train_on: ``"completions"``: every assistant turn (every completion); ``"all"``: every token.
        max_length: Most tokens of an example; None for no limit.
        too_long: What to do with a longer one: ``"cut"`` its end, ``"drop"`` it, or ``"refuse"`` it with an
            error. If a cut would leave no trained token, the example is dropped.

    Raises:
        UsageError: For an unknown choice, or ``template="chat"`` without a chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = "auto"
    train_on: str = "completions"
    max_length: int | None = None
    too_long: str = "cut"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}."
                )
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"max_length={self.max_length} leaves nothing to train on; give 2 or more.")
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise UsageError(
                "template='chat' needs a chat template, and the tokenizer has none: "
                "choose an instruct model, or data.template=plain."
            )

    @property
    def uses_chat(self) -> bool:
        """Whether prompts and completions go through the chat template."""
        return self.template == "chat" or (self.template == "auto" and bool(self.tokenizer.chat_template))

    def encode(self, example: Example) -> Encoded | None:
        """Encode one example.

        Returns:
            Its tokens, or None if it was dropped for its length.

        Raises:
            EncodingError: If the template refuses it, if the trained tokens cannot be located exactly, if there are
                none, or if the example is too long and ``too_long="refuse"``.
        """
        return self.fit(self.encode_whole(example))

    def encode_whole(self, example: Example) -> Encoded:
        """Encode one example without regard to ``max_length``.

        Raises:
            EncodingError: As ``encode``, but for its length.
        """
        encode = self._chat if example.text is None and self.uses_chat else self._plain
        if self.template == "pair":
            encode = self._pair
        try:
            whole = encode(example)
            if not trained_count(whole.labels):
                raise EncodingError(f"no token is left to train on. {OTHER_WAYS}")
        except EncodingError as problem:
            raise EncodingError(f"{example.place}: {problem}") from problem.__cause__
        return whole

    def fit(self, whole: Encoded) -> Encoded | None:
        """Apply ``max_length`` to an encoded example.

        Returns:
            The example, cut if it must be; None if it is dropped.

        Raises:
            EncodingError: If it is too long and ``too_long="refuse"``.
        """
        if self.max_length is None or whole.full_length <= self.max_length:
            return whole
        if self.too_long == "refuse":
            raise EncodingError(
                f"{whole.place}: has {whole.full_length} tokens, more than max_length={self.max_length}. "
                "Raise trainer.max_length, shorten the example, or choose data.too_long=cut or drop."
            )
        labels = whole.labels[: self.max_length]
        if self.too_long == "drop" or not trained_count(labels):
            return None
        return replace(whole, input_ids=whole.input_ids[: self.max_length], labels=labels, was_cut=True)

    # ---- chat ----------------------------------------------------------------------------------------

    def _chat(self, example: Example) -> Encoded:
        messages = example.messages or (
            Message("user", example.prompt or ""),
            Message("assistant", example.completion or ""),
        )
        last = max(index for index, message in enumerate(messages) if message.role == "assistant")
        prompt_ids = self._render(messages[:last], ask=True)
        if self.train_on == "all":
            ids = self._render(messages)
            labels = list(ids)
        else:
            messages = messages[: last + 1]  # a last question without an answer has no trained tokens
            ids, labels = self._marked(messages) if self._has_marks else self._incremental(messages)
        return Encoded(
            input_ids=ids,
            labels=[IGNORED, *labels[1:]],
            prompt_ids=prompt_ids,
            answer=messages[last].content,
            was_cut=False,
            place=example.place,
            full_length=len(ids),
            prompt_differs=ids[: len(prompt_ids)] != prompt_ids,
            control_text=any(self._control.search(message.content) for message in messages),
        )

    def _incremental(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Find each answer by rendering the conversation up to it, without and with it."""
        ids = self._render(messages)
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.trained:
                continue
            before = self._render(messages[:index], ask=True)
            upto = ids if index == len(messages) - 1 else self._render(messages[: index + 1])
            start = common_length(before, upto)
            if start < len(before) and not decode(upto, self.tokenizer).startswith(
                decode(before, self.tokenizer)
            ):
                raise EncodingError(
                    f"the chat template writes what comes before turn {index} differently once that turn "
                    f"follows, so the trained tokens would not be those generated. {OTHER_WAYS}"
                )
            # If only tokens differ, one token spans the template's white space and the answer's.
            end = self._end_of(upto, start)
            if ids[:end] != upto[:end]:
                raise EncodingError(
                    f"the chat template writes turn {index} differently once more turns follow (some leave "
                    f"out earlier reasoning), so it cannot be trained on as it would be generated. {OTHER_WAYS}"
                )
            labels[start:end] = ids[start:end]
        return ids, labels

    def _end_of(self, ids: list[int], start: int) -> int:
        """Return where the turn that begins at ``start`` and ends ``ids`` stops: after its end-of-turn token.

        What a template writes after that token (most often a line break) is not the model's to generate.
        """
        end = self._end_of_turn
        if end is None:
            return len(ids)
        return next((at + 1 for at in reversed(range(start, len(ids))) if ids[at] == end), len(ids))

    def _marked(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Read where answers are from the template's own ``{% generation %}`` marks."""
        output = self._apply(messages, return_assistant_tokens_mask=True)
        ids, mask = list(output["input_ids"]), list(output["assistant_masks"])
        runs = [list(run) for on, run in groupby(range(len(ids)), key=lambda at: mask[at]) if on]
        answers = [message for message in messages if message.role == "assistant"]
        if not all(message.trained for message in answers):
            if len(runs) != len(answers):
                raise EncodingError(
                    f"the chat template marks {len(runs)} spans for {len(answers)} answers, so the answers "
                    "inside the prompt cannot be told from the others. Give the conversation as messages, or set "
                    "data.train_on=all."
                )
            runs = [run for run, message in zip(runs, answers, strict=True) if message.trained]
        trained = {at for run in runs for at in run}
        return ids, [token if at in trained else IGNORED for at, token in enumerate(ids)]

    def _render(self, messages: Sequence[Message], ask: bool = False) -> list[int]:
        return list(self._apply(messages, add_generation_prompt=ask)["input_ids"])

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **options
            )
        except (TemplateError, TypeError, ValueError) as problem:
            roles = ", ".join(message.role for message in messages)
            raise EncodingError(f"the chat template refuses the turns {roles}: {problem}") from problem

    @cached_property
    def _has_marks(self) -> bool:
        # Marks are mapped to tokens by character offsets, which only fast tokenizers keep.
        template = self.tokenizer.get_chat_template()
        return self.tokenizer.is_fast and re.search(r"\{%-?\s*generation\b", template) is not None

    @cached_property
    def _end_of_turn(self) -> int | None:
        """The first control token that the template writes after an answer, whatever the answer."""
        asked = (Message("user", "a"),)
        start = len(self._render(asked, ask=True))
        b, c = (self._render((*asked, Message("assistant", word)))[start:] for word in ("b", "c"))
        closing: list[int] = []
        for one, other in zip(reversed(b), reversed(c), strict=False):
            if one != other:
                break
            closing.insert(0, one)
        control = self.tokenizer.added_tokens_decoder.keys() - {self.tokenizer.unk_token_id}
        return next((token for token in closing if token in control), None)

    # ---- plain ---------------------------------------------------------------------------------------

    def _plain(self, example: Example) -> Encoded:
        if example.text is not None:
            ids, boundary, prompt_ids = self._closed(self._tokens(example.text)), 0, []
        elif example.prompt is None or example.completion is None:
            raise EncodingError(
                "a conversation needs a chat template, and "
                + (
                    "data.template=plain turns it off"
                    if self.template == "plain"
                    else "the tokenizer has none"
                )
                + ". Choose an instruct model and data.template=chat, or give prompt and completion as text."
            )
        else:
            prompt_ids = self._opened(self._tokens(example.prompt))
            ids = self._closed(self._tokens(example.prompt + example.completion))
            boundary = self._boundary(example.prompt, example.completion, ids, prompt_ids)
        trained_from = 0 if self.train_on == "all" else boundary
        return Encoded(
            input_ids=ids,
            labels=[IGNORED if at < max(trained_from, 1) else token for at, token in enumerate(ids)],
            prompt_ids=prompt_ids,
            answer=example.completion or "",
            was_cut=False,
            place=example.place,
            full_length=len(ids),
            prompt_differs=ids[: len(prompt_ids)] != prompt_ids,
            # Plain text may contain control tokens on purpose.
            control_text=any(map(self._control.search, (example.prompt or "", example.completion or ""))),
        )

    def _tokens(self, text: str) -> list[int]:
        """Tokenize with the tokenizer's start token, only once even if the text begins with it."""
        ids: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        start = self.tokenizer.bos_token_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def _opened(self, ids: list[int]) -> list[int]:
        """Remove the end token if the tokenizer adds one: generation continues from here."""
        end = self.tokenizer.eos_token_id
        adds_it = end is not None and self._tokens("a")[-1] == end
        return ids[:-1] if adds_it else ids

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _boundary(self, prompt: str, completion: str, ids: list[int], prompt_ids: list[int]) -> int:
        """Return the index of the first token that holds any of the completion."""
        if ids[: len(prompt_ids)] == prompt_ids:
            return len(prompt_ids)
        # A token spans the boundary. Without offsets, go back to where both tokenizations differ.
        if not self.tokenizer.is_fast:
            return common_length(ids, prompt_ids)
        offsets = self.tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        skipped = len(offsets) - len(self._tokens(prompt + completion))  # a start token that _tokens removed
        across = next((at for at, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
        return across - skipped

    # ---- question and answer -------------------------------------------------------------------------

    def _pair(self, example: Example) -> Encoded:
        messages = example.messages or (
            Message("user", example.prompt or ""),
            Message("assistant", example.completion or ""),
        )
        roles = [message.role for message in messages]
        if roles != ["user", "assistant"]:
            raise EncodingError(
                f"this family of models takes one question and one answer, but the turns are {', '.join(roles)}. Split "
                "the conversation, and move the text of a system turn into the question."
            )
        if self.train_on == "all":
            raise EncodingError(
                "this family of models attends to a question in both directions, so it cannot be trained on. "
                "Set data.train_on=completions."
            )
        asked, answer = (message.content for message in messages)
        tokenizer: Any = self.tokenizer
        try:
            prompt_ids, ids = tokenizer.pair(asked), tokenizer.pair(asked, answer)
        except (TypeError, ValueError) as problem:
            raise EncodingError(str(problem)) from problem
        if ids[: len(prompt_ids)] != prompt_ids:
            raise EncodingError("the processor writes the question differently once an answer follows")
        return Encoded(
            input_ids=ids,
            labels=[IGNORED if at < len(prompt_ids) else token for at, token in enumerate(ids)],
            prompt_ids=prompt_ids,
            answer=answer,
            was_cut=False,
            place=example.place,
            full_length=len(ids),
            prompt_differs=False,
            control_text=any(map(self._control.search, (asked, answer))),
        )

    # ---- special tokens ------------------------------------------------------------------------------

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end token and the one that the chat template writes."""
        ends = {self.tokenizer.eos_token_id, self._end_of_turn if self.uses_chat else None}
        return frozenset(token for token in ends if token is not None)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return re.compile("|".join(re.escape(str(token)) for token in added if token.special) or r"(?!)")


def trained_count(labels: Iterable[int]) -> int:
    """Return how many tokens are trained on."""
    return sum(label != IGNORED for label in labels)


# ---- token ids -------------------------------------------------------------------------------------------


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of token ids, control tokens included and white space as it is."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """Return the length of the longest common prefix.

    Example:
        >>> common_length([1, 2, 3], [1, 2, 4])
        2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
