"""Examples as token ids and labels: exactly which tokens are learned.

Conversations go through the model's own chat template. What is learned are the assistant's turns, each up to
and including the token that ends it; where that lies is read off token ids, never guessed from text:

    ids of turns[:i] + generation prompt ──must begin──▶ ids of turns[:i+1] ──must begin──▶ ids of all turns
                                          └ learned: what follows, up to the end of turn ┘

A template for which that does not hold is refused, because tokens learned there would not be those generated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise, takewhile
from typing import TYPE_CHECKING, Any

from moslora.data.records import Example, Message
from moslora.errors import EncodingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "Encoder", "Summary", "encode_all", "preview"]

IGNORED = -100  # torch's cross entropy and every Trainer skip this label

CHOICES = {
    "template": ("auto", "chat", "plain", "pair"),
    "train_on": ("completions", "all"),
    "too_long": ("cut", "drop", "refuse"),
}
OTHER_WAYS = (
    "Set data.train_on=all, or, if earlier answers are the trouble, give prompt (a list of messages) and "
    "completion, so that only the last answer is learned."
)


@dataclass(frozen=True)
class Encoded:
    """One example, ready to train and to be asked.

    Attributes:
        input_ids: The tokens.
        labels: The same where learned, ``IGNORED`` elsewhere. Nothing comes before the first, so it never is.
        prompt_ids: What generation starts from: all before the last answer. Empty for text examples.
        answer: The last answer as the data has it; empty for text examples.
        was_cut: Whether the end is missing, beyond ``max_length``.
        place: Where the example stands in its file.
        full_length: Number of tokens before any cut.
        prompt_differs: Whether ``prompt_ids`` are not how ``input_ids`` begin: a token reaches from the
            prompt into the answer (and is learned), or the template writes the two differently.
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
            question and its answer, which ``tokenizer.pair`` joins, for models that see questions in both directions.
        train_on: ``"completions"``: every assistant turn (every completion); ``"all"``: every token.
        max_length: Most tokens of an example; None for no limit.
        too_long: What becomes of a longer one: ``"cut"`` at the end, ``"drop"``, or ``"refuse"`` with an
            error. One that a cut would leave without a learned token is dropped.

    Raises:
        ValueError: For an unknown choice, or ``template="chat"`` without a chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = "auto"
    train_on: str = "completions"
    max_length: int | None = None
    too_long: str = "cut"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}."
                )
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves nothing to learn; give 2 or more.")
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise ValueError(
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
            EncodingError: If the template refuses it, if what is learned cannot be told exactly, if there is
                nothing to learn, or if it is too long and ``too_long="refuse"``.
        """
        return self._fit(self._whole(example))

    def _whole(self, example: Example) -> Encoded:
        lay_out = self._chat if example.text is None and self.uses_chat else self._plain
        if self.template == "pair":
            lay_out = self._pair
        try:
            whole = lay_out(example)
            if not _learned(whole.labels):
                raise EncodingError(f"no token is left to learn. {OTHER_WAYS}")
        except EncodingError as problem:
            raise EncodingError(f"{example.place}: {problem}") from problem.__cause__
        return whole

    def _fit(self, whole: Encoded) -> Encoded | None:
        if self.max_length is None or whole.full_length <= self.max_length:
            return whole
        if self.too_long == "refuse":
            raise EncodingError(
                f"{whole.place}: has {whole.full_length} tokens, more than max_length={self.max_length}. "
                "Raise trainer.max_length, shorten the example, or choose data.too_long=cut or drop."
            )
        labels = whole.labels[: self.max_length]
        if self.too_long == "drop" or not _learned(labels):
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
            messages = messages[: last + 1]  # nothing is learned from a question without an answer
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
            start = _common(before, upto)
            if start < len(before) and not _decode(upto, self.tokenizer).startswith(
                _decode(before, self.tokenizer)
            ):
                raise EncodingError(
                    f"the chat template writes what comes before turn {index} differently once that turn "
                    f"follows, so what is learned would not be what is generated. {OTHER_WAYS}"
                )
            # Where only tokens differ, one reaches across from the template's white space into the answer's.
            end = self._end_of(upto, start)
            if ids[:end] != upto[:end]:
                raise EncodingError(
                    f"the chat template writes turn {index} differently once more turns follow (some leave "
                    f"out earlier reasoning), so it cannot be learned as it would be generated. {OTHER_WAYS}"
                )
            labels[start:end] = ids[start:end]
        return ids, labels

    def _end_of(self, ids: list[int], start: int) -> int:
        """Return where the turn that begins at ``start`` and ends ``ids`` stops: after its end-of-turn token.

        What templates write after that (a line break, most often) is theirs to write, not the model's.
        """
        end = self._end_of_turn
        if end is None:
            return len(ids)
        return next((at + 1 for at in reversed(range(start, len(ids))) if ids[at] == end), len(ids))

    def _marked(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Read the answers off the template's own ``{% generation %}`` marks."""
        output = self._apply(messages, return_assistant_tokens_mask=True)
        ids, mask = list(output["input_ids"]), list(output["assistant_masks"])
        runs = [list(run) for on, run in groupby(range(len(ids)), key=lambda at: mask[at]) if on]
        answers = [message for message in messages if message.role == "assistant"]
        if not all(message.trained for message in answers):
            if len(runs) != len(answers):
                raise EncodingError(
                    f"the chat template marks {len(runs)} stretches for {len(answers)} answers, so those "
                    "that the prompt quotes cannot be told apart. Give the conversation as messages, or set "
                    "data.train_on=all."
                )
            runs = [run for run, message in zip(runs, answers, strict=True) if message.trained]
        learned = {at for run in runs for at in run}
        return ids, [token if at in learned else IGNORED for at, token in enumerate(ids)]

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
        learned_from = 0 if self.train_on == "all" else boundary
        return Encoded(
            input_ids=ids,
            labels=[IGNORED if at < max(learned_from, 1) else token for at, token in enumerate(ids)],
            prompt_ids=prompt_ids,
            answer=example.completion or "",
            was_cut=False,
            place=example.place,
            full_length=len(ids),
            prompt_differs=ids[: len(prompt_ids)] != prompt_ids,
            # Text may be laid out with control tokens on purpose.
            control_text=any(map(self._control.search, (example.prompt or "", example.completion or ""))),
        )

    def _tokens(self, text: str) -> list[int]:
        """Tokenize with the tokenizer's own start token, once even where the text spells it out."""
        ids: list[int] = list(self.tokenizer(text, verbose=False)["input_ids"])
        start = self.tokenizer.bos_token_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    def _opened(self, ids: list[int]) -> list[int]:
        """Take off the end token, if it is the tokenizer that adds it: generation goes on from here."""
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
        # A token reaches across. Without offsets, go back to where both tokenizations part.
        if not self.tokenizer.is_fast:
            return _common(ids, prompt_ids)
        offsets = self.tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        skipped = len(offsets) - len(self._tokens(prompt + completion))  # a start token taken off
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
                f"this family of models takes one question and one answer, and here are {', '.join(roles)}. Split the "
                "conversation, and put what a system turn says into the question."
            )
        if self.train_on == "all":
            raise EncodingError(
                "this family of models sees a question in both directions, so that nothing could be learned in it. "
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

    # ---- tokens that mean something ------------------------------------------------------------------

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end token and the one that the chat template writes."""
        ends = {self.tokenizer.eos_token_id, self._end_of_turn if self.uses_chat else None}
        return frozenset(token for token in ends if token is not None)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return re.compile("|".join(re.escape(str(token)) for token in added if token.special) or r"(?!)")


def _learned(labels: Iterable[int]) -> int:
    return sum(label != IGNORED for label in labels)


# ---- all examples ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """What encoding did to a set of examples; all counts are of examples that were kept, but for ``dropped``.

    Attributes:
        examples: How many there are to train on.
        tokens: Their tokens.
        trained_tokens: Those of them that are learned.
        longest: Tokens of the longest example, before any cut or drop.
        cut: How many lost their end.
        dropped: How many were left out for their length.
        without_end: How many never learn to stop: no end-of-turn token among their learned tokens.
        prompt_differs: How many prompts generation reads otherwise than training shows them.
        control_text: How many contain a control token in the text of a turn.
        max_length: The limit.
        end_tokens: The end-of-turn tokens, as text.
    """

    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    cut: int
    dropped: int
    without_end: int
    prompt_differs: int
    control_text: int
    max_length: int | None
    end_tokens: tuple[str, ...]

    def warnings(self) -> list[str]:
        """Return what a person should know before training, worst first; empty when all is well."""
        total = self.examples + self.dropped
        ends = " or ".join(map(repr, self.end_tokens)) or "(the tokenizer names none)"
        said = []
        if self.without_end == self.examples:
            said.append(
                f"the end-of-turn token {ends} is never among the trained tokens: "
                "the model will not learn to stop"
            )
        elif self.without_end > self.cut:
            said.append(f"{self.without_end} of {self.examples} examples train no end-of-turn token {ends}")
        for count, fate in ((self.dropped, "dropped"), (self.cut, "cut")):
            if count:
                said.append(
                    f"{count} of {total} examples are longer than max_length={self.max_length} and were "
                    f"{fate}: raise trainer.max_length (the longest has {self.longest} tokens)"
                )
        if self.prompt_differs:
            said.append(
                f"in {self.prompt_differs} of {self.examples} examples generation reads the prompt otherwise "
                "than training shows it: white space where prompt and answer meet is joined into one token "
                "(move it from the prompt's end to the answer's start, or leave it out), or the chat "
                "template is at fault"
            )
        if self.control_text:
            said.append(
                f"{self.control_text} of {self.examples} examples contain a control token in their text, "
                "which the model will read as one: remove it unless it is meant"
            )
        return said


def encode_all(examples: Sequence[Example], encoder: Encoder) -> tuple[list[Encoded], Summary]:
    """Encode every example and count what happened.

    Returns:
        The examples that were kept, in order, and the counts.

    Raises:
        EncodingError: If examples cannot be encoded, naming the first and how many more; or if none is left.
    """
    kept: list[Encoded] = []
    problems: list[EncodingError] = []
    longest = 0
    for example in examples:
        try:
            whole = encoder._whole(example)
            longest = max(longest, whole.full_length)
            fitted = encoder._fit(whole)
        except EncodingError as problem:
            problems.append(problem)
            continue
        if fitted:
            kept.append(fitted)
    if problems:
        more = f" ({len(problems) - 1} more examples cannot be encoded either)" if problems[1:] else ""
        raise EncodingError(f"{problems[0]}{more}") from problems[0].__cause__
    if not kept:
        raise EncodingError(
            f"none of {len(examples)} examples is left within max_length={encoder.max_length}: raise "
            f"trainer.max_length (the longest has {longest} tokens)."
        )
    ends = encoder.stop_ids
    names = encoder.tokenizer.convert_ids_to_tokens(sorted(ends))
    return kept, Summary(
        examples=len(kept),
        tokens=sum(len(e.input_ids) for e in kept),
        trained_tokens=sum(_learned(e.labels) for e in kept),
        longest=longest,
        cut=sum(e.was_cut for e in kept),
        dropped=len(examples) - len(kept),
        without_end=sum(ends.isdisjoint(e.labels) for e in kept),
        prompt_differs=sum(e.prompt_differs for e in kept),
        control_text=sum(e.control_text for e in kept),
        max_length=encoder.max_length,
        end_tokens=tuple(names),
    )


def preview(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return an example as stretches of text, each with whether it is learned.

    The stretches join to the decoded whole, control tokens included. Where a stretch ends inside a character
    that takes several tokens, the character goes whole to the later stretch.
    """
    whole = _decode(encoded.input_ids, tokenizer)
    learned = [label != IGNORED for label in encoded.labels]
    starts = [at for at in range(len(learned)) if at == 0 or learned[at] != learned[at - 1]]
    # Half a character decodes as �, so only what the beginning has in common with the whole counts.
    cuts = [_common(_decode(encoded.input_ids[:at], tokenizer), whole) for at in starts]
    cuts = [*accumulate(cuts, max), len(whole)]
    pieces = zip(pairwise(cuts), starts, strict=True)
    return [(whole[start:stop], learned[at]) for (start, stop), at in pieces if stop > start]


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many items both begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
