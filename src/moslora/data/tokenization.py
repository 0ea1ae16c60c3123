"""Examples as token ids and labels: exactly which tokens are trained on.

Conversations go through the model's own chat template. The assistant's turns are trained on, each up to and
including the token that ends it. Where a turn begins and ends is read from token ids, never guessed from text:

    ids of turns[:i] + generation prompt ──must begin──▶ ids of turns[:i+1] ──must begin──▶ ids of all turns
                                          └ trained on: what follows, up to the end of turn ┘

A template for which this does not hold is refused: the tokens trained on would not be those generated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moslora.data.locating import IGNORED, OTHER_WAYS, AnswerFinder, common_length, decode, trained_count
from moslora.data.messages import Message
from moslora.data.rendering import KEEPING, Template, first_lost, last_alone, spells, without_opening
from moslora.data.shapes import Example
from moslora.errors import EncodingError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Encoded",
    "Encoder",
    "common_length",
    "decode",
    "trained_count",
]

CHOICES = {
    "template": ("auto", "chat", "plain", "pair"),
    "train_on": ("completions", "last", "each", "all"),
    "too_long": ("cut", "drop", "refuse"),
}
# An example far beyond max_length is tokenized up to so many characters, so many for each token allowed at least, and
# more until there are so many tokens too many: the last ones depend on what follows.
FEWEST_CHARACTERS, CHARACTERS, GUARD = 50_000, 16, 256
FEWEST = 200  # characters that are kept of every turn then, for templates that look at turns to come


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
        is_start: Whether these are the tokens of a start alone, because the example is far longer than ``max_length``;
            ``full_length`` is a lower bound then.
        loses_context: Whether the chat template leaves out text of an earlier answer that is not learned.
        misspelt: Whether the tokens spell another text, because the tokenizer changes or lacks characters.
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
    is_start: bool = False
    loses_context: bool = False
    misspelt: bool = False


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids and labels.

    Args:
        tokenizer: The model's tokenizer.
        template: ``"chat"``: the tokenizer's chat template; ``"plain"``: prompt and completion joined, and
            the end-of-sequence token; ``"auto"``: chat if there is a template. Text is always plain. ``"pair"``: one
            question and its answer, joined by ``tokenizer.pair``, for models with bidirectional attention to prompts.
        train_on: ``"completions"``: every assistant turn (every completion); ``"last"``: the last of them;
            ``"each"``: the same, of conversations that ``answers_apart`` made; ``"all"``: every token.
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
            # Answers that begin beyond the limit are not looked for; ``fit`` drops such examples.
            is_long = self.max_length is not None and whole.full_length > self.max_length
            if not (is_long or trained_count(whole.labels)):
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
                f"{whole.place}: has {whole.full_length} tokens{' and more' if whole.is_start else ''}, more than "
                f"max_length={self.max_length}. "
                "Raise trainer.max_length, shorten the example, or choose data.too_long=cut or drop."
            )
        labels = whole.labels[: self.max_length]
        if self.too_long == "drop" or not trained_count(labels):
            return None
        return replace(whole, input_ids=whole.input_ids[: self.max_length], labels=labels, was_cut=True)

    # ---- chat ----------------------------------------------------------------------------------------

    @cached_property
    def _renderer(self) -> Template:
        return Template(self.tokenizer)

    @cached_property
    def _finder(self) -> AnswerFinder:
        return AnswerFinder(self._renderer, self.max_length)

    def _chat(self, example: Example) -> Encoded:
        arguments, everything = example.template_arguments, self.train_on == "all"
        messages, last = self._conversation(example)
        learned = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
        text = self._renderer.text(messages, arguments)
        # Where every token is learned, earlier answers are learned as the template writes them.
        whole_answers = learned[-1:] if everything else learned
        loses_context = self._check_kept(messages, arguments, text, whole_answers)
        short = self._shortened(messages, arguments, text)
        beyond = short is not messages  # so is what comes after
        if everything:
            ids = self._renderer.ids(short, arguments)
            labels = list(ids)
        else:
            shown = self._renderer.text(short, arguments) if beyond else text
            ids, labels = self._finder.find(short, arguments, shown)
        asked = not beyond or short[:last] == messages[:last]
        opening = None
        if self._finder.has_marks and not everything:
            opening = self._renderer.text(messages[:last], arguments, ask=True)
        prompt_ids = self._renderer.ids(messages[:last], arguments, ask=True) if asked else []
        return Encoded(
            input_ids=ids,
            labels=[IGNORED, *labels[1:]],
            prompt_ids=prompt_ids,
            answer=self._answer(messages[last], ids, prompt_ids),
            was_cut=False,
            place=example.place,
            full_length=len(ids),
            prompt_differs=ids[: len(prompt_ids)] != prompt_ids,
            control_text=any(self._control.search(message.content) for message in messages),
            is_start=beyond,
            loses_context=loses_context,
            misspelt=self._misspells(
                ids, labels, [text for i in whole_answers for text in messages[i].texts], opening
            ),
        )

    def _conversation(self, example: Example) -> tuple[Sequence[Message], int]:
        """Return the turns that go through the chat template, and which is the last that is learned."""
        messages: Sequence[Message] = example.messages or (
            Message("user", example.prompt or ""),
            Message("assistant", example.completion or ""),
        )
        self._renderer.check_arguments(example.template_arguments)
        self._renderer.check_thoughts(messages)
        if self.train_on in ("last", "each"):
            messages = last_alone(messages)
        everything = self.train_on == "all"
        if everything:
            _refuse_flags(messages)
        last = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained][
            -1
        ]
        # A last question without an answer has no trained tokens.
        return (messages if everything else messages[: last + 1]), last

    def _answer(self, message: Message, ids: list[int], prompt_ids: list[int]) -> str:
        """Return the text of the last answer, with its calls as the template writes them."""
        if not message.calls or ids[: len(prompt_ids)] != prompt_ids:
            return message.content
        return str(self.tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)).strip()

    def _misspells(
        self, ids: list[int], labels: list[int], texts: Sequence[str], opening: str | None = None
    ) -> bool:
        """Return whether the tokenizer spells what is learned otherwise.

        Args:
            ids, labels: Of the whole example.
            texts: What is learned.
            opening: Where a template marks what is learned, the text after which an answer is generated.

        Raises:
            EncodingError: If the marks leave out a part of it.
        """
        if self.max_length is not None and len(ids) > self.max_length:
            return False  # a part is cut anyway
        if spells(decode([token for token in labels if token != IGNORED], self.tokenizer), texts):
            return False
        # Generation may begin inside the answer, after <think>; what comes before is not learned then.
        if not spells(decode(ids, self.tokenizer), texts):
            return True
        if opening is not None:
            rest = [without_opening(text, opening) for text in texts]
            if not spells(decode([token for token in labels if token != IGNORED], self.tokenizer), rest):
                raise EncodingError(
                    "the tokens that are learned do not hold the whole answer: the chat template's {% generation %} "
                    "marks leave out a part. Correct the template, or set data.train_on=all."
                )
        return False

    def _check_kept(
        self, messages: Sequence[Message], arguments: Mapping[str, Any], text: str, learned: Sequence[int]
    ) -> bool:
        """Check that a template wrote every turn's text.

        Returns:
            Whether it left out text of an answer that is not learned, as some do with earlier thoughts.

        Raises:
            EncodingError: If it left out text of another turn.
        """
        self._renderer.check_tools(text, arguments)
        lost = self._renderer.left_out(messages, arguments, text)
        for index in sorted(lost):
            message = messages[index]
            if index in learned or message.role != "assistant":
                earlier = f" {OTHER_WAYS}" if message.role == "assistant" and index < learned[-1] else ""
                if message.reasoning:
                    earlier += " data.reasoning=drop leaves thoughts out."
                raise EncodingError(
                    f"the chat template leaves out or changes text of turn {index} ({message.role}): "
                    f"{first_lost(message, text)} is not in what it writes. "
                    f"{KEEPING[message.role]}{earlier}"
                )
        return bool(lost)

    def _shortened(
        self, messages: Sequence[Message], arguments: Mapping[str, Any], text: str
    ) -> Sequence[Message]:
        """Return turns cut to what can matter below ``max_length``; the same where that is all.

        Tokenizing a text of megabytes whole, to cut it, takes gigabytes. The cut turns must give the same tokens.
        """
        most = self._most_characters
        while most is not None and len(text) > 2 * most and callable(self.tokenizer):
            short, left = [], most
            for message in messages:
                short.append(replace(message, content=message.content[: max(left, FEWEST)]))
                left -= len(message.content)
            limit = self.max_length or 0
            ids = self._renderer.ids(short, arguments)
            start = self.tokenizer(text[:most], add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) > limit + GUARD and ids[: limit + 1] == list(start[: limit + 1]):
                return short
            most *= 4
        return messages

    @cached_property
    def _most_characters(self) -> int | None:
        """How many characters of an example are tokenized at first; more if they are too few tokens."""
        return None if self.max_length is None else max(FEWEST_CHARACTERS, CHARACTERS * self.max_length)

    # ---- plain ---------------------------------------------------------------------------------------

    def _plain(self, example: Example) -> Encoded:
        if example.template_arguments:
            names = ", ".join(sorted(example.template_arguments))
            raise EncodingError(
                f"the row sets {names} for a chat template, and none is used here. Drop them: data.ignore=[tools, "
                "chat_template_kwargs]."
            )
        whole, example = example, self._start_of(example)
        beyond = example is not whole
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
        asked = not beyond or example.prompt == whole.prompt
        text = [whole.completion or ""] if whole.text is None else [whole.text]
        return Encoded(
            input_ids=ids,
            labels=[IGNORED if at < max(trained_from, 1) else token for at, token in enumerate(ids)],
            prompt_ids=prompt_ids if asked else [],
            answer=whole.completion or "",
            was_cut=False,
            place=example.place,
            full_length=len(ids),
            prompt_differs=ids[: len(prompt_ids)] != prompt_ids,
            # Plain text may contain control tokens on purpose.
            control_text=any(map(self._control.search, (whole.prompt or "", whole.completion or ""))),
            is_start=beyond,
            misspelt=self._misspells(ids, ids[boundary:], text),
        )

    def _start_of(self, example: Example) -> Example:
        """Return an example cut to what can matter below ``max_length``; the same where that is all."""
        text = (example.prompt or "") + (example.completion or "") if example.text is None else example.text
        most = self._most_characters
        while most is not None and len(text) > 2 * most:
            limit = self.max_length or 0
            start, more = self._tokens(text[:most]), self._tokens(text[: 2 * most])
            if len(start) > limit + GUARD and start[: limit + 1] == more[: limit + 1]:
                if example.text is not None:
                    return replace(example, text=text[:most])
                prompt = (example.prompt or "")[:most]
                return replace(example, prompt=prompt, completion=text[len(prompt) : most])
            most *= 4
        return example

    def _tokens(self, text: str) -> list[int]:
        """Tokenize with the tokenizer's start token, only once even if the text begins with it."""
        ids = self._called(text)
        start = self.tokenizer.bos_token_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def _called(self, text: str) -> list[int]:
        """Call the tokenizer."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

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
        if example.template_arguments:
            names = ", ".join(sorted(example.template_arguments))
            raise EncodingError(f"the row sets {names}, and this family of models has no chat template.")
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
        ends = {self.tokenizer.eos_token_id, self._finder.end_of_turn if self.uses_chat else None}
        return frozenset(token for token in ends if token is not None)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return re.compile("|".join(re.escape(str(token)) for token in added if token.special) or r"(?!)")


def _refuse_flags(messages: Sequence[Message]) -> None:
    """Refuse turns that say that they are not learned, where everything is."""
    for index, message in enumerate(messages):
        if message.flag:
            raise EncodingError(
                f"turn {index} says by {message.flag} that it is not learned, and data.train_on=all learns every "
                f"token. Set data.train_on=completions, or drop the flags: data.ignore=[{message.flag}]."
            )
