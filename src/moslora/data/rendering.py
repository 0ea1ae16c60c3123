"""Conversations through a chat template, as text and as token ids, and whether the template kept what was said.

A template is a program, and may leave out what it has no branch for: thoughts, a system turn, a variable. What it
leaves out is looked for in the text that it writes, which costs no second tokenization.
"""

from __future__ import annotations

import inspect
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from moslora.data.columns import THOUGHTS
from moslora.data.faults import listed, quoted
from moslora.data.messages import Message, leaves
from moslora.errors import EncodingError
from moslora.wording import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KEEPING",
    "Template",
    "first_difference",
    "first_lost",
    "last_alone",
    "lost_of_calls",
    "missing_turns",
    "spells",
    "without_opening",
]

PICTURE = "<image>"  # stands for a picture in a text, and is written as the model's own token
LONGEST_OPENING = 200  # characters of an answer that a template may write before it is generated
PROBED = 64  # turns of a conversation whose roles are tried with words of our own

# What to do where a template leaves out text of a turn, by its role.
KEEPING = {
    "system": "Set data.system_turn=user to write it into the next question, or choose a tokenizer (model.tokenizer) "
    "with a template that has a branch for it.",
    "user": "Remove or rewrite that text, or choose a tokenizer (model.tokenizer) with a template that keeps it.",
    "tool": "Write this result into the next question, or choose a tokenizer (model.tokenizer) whose template has a "
    "branch for it.",
    "assistant": "The model would learn another answer than the data's. Remove that text if it is not to be learned, "
    "or choose a tokenizer (model.tokenizer) with a template that keeps it.",
}


class Template:
    """A tokenizer's chat template.

    Args:
        tokenizer: The tokenizer, or what renders in its place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self._roles: dict[tuple[Any, ...], frozenset[int]] = {}

    def apply(self, messages: Sequence[Message], arguments: Mapping[str, Any], **options: Any) -> Any:
        """Render turns.

        Args:
            messages: The turns.
            arguments: Variables of the template.
            **options: Of ``apply_chat_template``.

        Raises:
            EncodingError: If the template refuses them.
        """
        from jinja2 import TemplateError

        turns = [message.as_turn(self.thoughts) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, **arguments, **options)
        except (TemplateError, TypeError, ValueError, RecursionError) as problem:
            roles = [message.role for message in messages]
            way = " If it takes no system turn: data.system_turn=user writes it into the next question."
            said = f"the chat template refuses the turns {listed(roles)}: {problem}"
            raise EncodingError(f"{said}{way if 'system' in roles else ''}") from problem

    def text(self, messages: Sequence[Message], arguments: Mapping[str, Any], ask: bool = False) -> str:
        """Return turns as the template writes them.

        Args:
            messages, arguments: As for ``apply``.
            ask: Whether an answer is to follow.
        """
        return str(self.apply(messages, arguments, tokenize=False, add_generation_prompt=ask))

    def ids(self, messages: Sequence[Message], arguments: Mapping[str, Any], ask: bool = False) -> list[int]:
        """Return the token ids of turns; arguments as for ``text``."""
        output = self.apply(
            messages,
            arguments,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            add_generation_prompt=ask,
        )
        return list(output["input_ids"])

    # ---- what a template reads ---------------------------------------------------------------------------

    def source(self, tools: Any = None) -> str:
        """Return the template itself; a tokenizer may have another one for conversations with tools."""
        return str(
            self.tokenizer.get_chat_template(tools=tools) if tools else self.tokenizer.get_chat_template()
        )

    @cached_property
    def thoughts(self) -> tuple[str, ...]:
        """The keys under which the template looks for an assistant's thoughts; none if it knows of no such thing."""
        words = _words(self.source())
        return tuple(key for key in THOUGHTS if key in words)

    def check_thoughts(self, messages: Sequence[Message]) -> None:
        """Refuse thoughts that no key would bring to the template.

        Args:
            messages: The turns.

        Raises:
            EncodingError: If there are some, and the template reads none.
        """
        if not self.thoughts and any(message.reasoning for message in messages):
            index = next(i for i, message in enumerate(messages) if message.reasoning)
            raise EncodingError(
                f"turn {index} has thoughts in a key of their own, and the chat template reads none "
                f"({', '.join(THOUGHTS)}). Set data.reasoning=inline to write them into the answer as "
                "<think>…</think>, or data.reasoning=drop to leave them out."
            )

    @cached_property
    def _managed(self) -> frozenset[str]:
        """Names that a row may not set, because the encoder does, or because they name no variable."""
        parameters = inspect.signature(self.tokenizer.apply_chat_template).parameters
        return frozenset({*parameters, "messages"} - {"tools", "documents"})

    def check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Refuse variables that would do nothing.

        Args:
            arguments: Variables of a row.

        Raises:
            EncodingError: If the template does not read one, or the encoder sets it.
        """
        if not arguments:
            return
        names = _names(self.source(arguments.get("tools")))
        for name in arguments:
            where = "tools" if name == "tools" else f"chat_template_kwargs.{name}"
            way = f"remove it, or set data.ignore=[{where}]"
            if name in self._managed:
                raise EncodingError(f"field {where!r} cannot be set, because encoding sets it; {way}.")
            if name not in names:
                hint = did_you_mean(name, names)
                raise EncodingError(f"field {where!r} is not read by the chat template; {way}.{hint}")

    def check_tools(self, text: str, arguments: Mapping[str, Any]) -> None:
        """Refuse tools that a rendered conversation does not name.

        Args:
            text: The rendered conversation.
            arguments: Variables of a row.

        Raises:
            EncodingError: If one is left out.
        """
        for tool in arguments.get("tools", ()):
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, Mapping) else None
            if isinstance(name, str) and name not in text:
                raise EncodingError(
                    f"the chat template leaves out the tool {quoted(name)}; write the tools into a system turn, or "
                    "set data.ignore=[tools]."
                )

    # ---- what a template leaves out ----------------------------------------------------------------------

    def left_out(self, messages: Sequence[Message], arguments: Mapping[str, Any], text: str) -> set[int]:
        """Return the numbers of the turns whose text is not in the rendered conversation, white space aside.

        Args:
            messages, arguments: What was rendered.
            text: As the template writes it.
        """
        lost = missing_turns(messages, text) | self._without_branch(messages, arguments)
        return lost | {i for i, message in enumerate(messages) if lost_of_calls(message, text)}

    def _without_branch(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> frozenset[int]:
        """Return the turns that are left out whatever they say: a short text may be found elsewhere by chance."""
        roles = tuple((m.role, bool(m.content.strip()), bool(m.reasoning), len(m.calls)) for m in messages)
        if len(roles) > PROBED or not isinstance(arguments, Mapping):
            return frozenset()
        if roles not in self._roles:
            words = [_in_our_words(message, index) for index, message in enumerate(messages)]
            try:
                text = self.text(words, arguments)
                missing = missing_turns(words, text)
                missing |= {i for i, message in enumerate(words) if lost_of_calls(message, text)}
            except EncodingError:
                missing = set()  # the real turns were rendered, so these say nothing
            self._roles[roles] = frozenset(missing)
        return self._roles[roles]


def _in_our_words(message: Message, index: int) -> Message:
    """Return a turn of the same form that says what no template says by chance."""

    def word(number: int) -> str:
        return f"Word{index}x{(index + 1000 * number) * 7919 + 104729}"

    return replace(
        message,
        content=word(0) if message.content.strip() else message.content,
        reasoning=word(1) if message.reasoning else "",
        calls=tuple(
            {**call, "name": word(2 + number), "arguments": {word(100 + number): word(200 + number)}}
            for number, call in enumerate(message.calls)
        ),
    )


@lru_cache(maxsize=8)
def _words(source: str) -> frozenset[str]:
    """Return every name and every text in a template's source."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        found = list(Environment().lex(source))
    except TemplateSyntaxError:
        return frozenset()
    return frozenset(
        value.strip("'\"") if kind == "string" else value
        for _, kind, value in found
        if kind in ("name", "string")
    )


@lru_cache(maxsize=8)
def _names(source: str) -> frozenset[str]:
    """Return every name in a template's source."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        return frozenset(value for _, kind, value in Environment().lex(source) if kind == "name")
    except TemplateSyntaxError:
        return frozenset()


def missing_turns(messages: Sequence[Message], text: str) -> set[int]:
    """Return the numbers of turns whose text does not stand in a rendered conversation, white space aside.

    Args:
        messages: The turns.
        text: The rendered conversation. Turns come in their order; a system turn may stand anywhere.
    """
    missing = _missing([_pieces(message) for message in messages], messages, text)
    if missing:
        bare = [[_bare(piece) for piece in _pieces(message)] for message in messages]
        missing = _missing(bare, messages, _bare(text))
    return missing


def _pieces(message: Message) -> list[str]:
    """Return a turn's thoughts, if it has any apart, and its text between its pictures."""
    thoughts = [message.reasoning.strip()] if message.reasoning else []
    return thoughts + [piece.strip() for piece in message.content.split(PICTURE)]


def lost_of_calls(message: Message, text: str) -> str | int | float | bool | None:
    """Return the first name, key or value of a turn's calls that a rendered conversation lacks; None if it has all.

    Args:
        message: The turn.
        text: The rendered conversation; values may stand there as in JSON, in Python or as they are.
    """
    bare = _bare(text) if message.calls else ""
    for call in message.calls:
        for value in (call["name"], *leaves(call["arguments"])):
            if not any(_bare(form) in bare for form in _forms(value)):
                return value  # type: ignore[no-any-return]
    return None


def _forms(value: str | int | float | bool) -> list[str]:
    """Return the ways in which templates write a value."""
    if not isinstance(value, str):
        return [json.dumps(value), str(value)]
    escaped = [json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return [value, *escaped, repr(value)[1:-1]]


def _bare(text: str) -> str:
    return "".join(text.split())


def _missing(pieces: Iterable[Sequence[str]], messages: Sequence[Message], text: str) -> set[int]:
    missing, at = set(), 0
    for index, (message, parts) in enumerate(zip(messages, pieces, strict=True)):
        cursor = 0 if message.role == "system" else at
        for part in parts:
            start = text.find(part, cursor)
            if start < 0 and message.role == "tool":  # a result may be written as JSON
                part = _forms(part)[1]
                start = text.find(part, cursor)
            if start < 0:
                missing.add(index)
                break
            cursor = start + len(part)
        else:
            at = at if message.role == "system" else cursor
    return missing


def first_difference(text: str, rendered: str) -> str:
    """Return the first lines of a text that a rendered conversation lacks, short and in quotes."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = _bare(rendered)
    lost = [line for line in lines if _bare(line) not in bare]
    return quoted((lost or lines or [text])[0])


def spells(decoded: str, texts: Iterable[str]) -> bool:
    """Return whether decoded tokens spell texts in their order, white space and compatible characters aside.

    Args:
        decoded: From token ids.
        texts: What they should say.
    """
    at = 0
    said, wanted = _bare(decoded), [_bare(text) for text in texts]
    if not all(text in said for text in wanted):
        said, wanted = _folded(said), [_folded(text) for text in wanted]
    for text in wanted:
        start = said.find(text, at)
        if start < 0:
            return False
        at = start + len(text)
    return True


def without_opening(text: str, opening: str) -> str:
    """Return a text without the start that another text ends with, white space aside.

    Example:
        >>> without_opening("<think>hm</think>yes", "user: why? assistant: <think> ")
        'hm</think>yes'
    """
    bare, end = _bare(text), _bare(opening)
    shared = next(
        (n for n in range(min(len(bare), len(end), LONGEST_OPENING), 0, -1) if end.endswith(bare[:n])), 0
    )
    return bare[shared:]


def _folded(text: str) -> str:
    return _bare(unicodedata.normalize("NFKC", text))


def last_alone(messages: Sequence[Message]) -> Sequence[Message]:
    """Return turns of which the last answer that is learned is the only one.

    Args:
        messages: A conversation with an answer that is learned.
    """
    learned = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
    return [replace(m, trained=m.trained and i == learned[-1]) for i, m in enumerate(messages)]


def first_lost(message: Message, text: str) -> str:
    """Return the first piece of a turn that a rendered conversation lacks, short and in quotes.

    Args:
        message: A turn that was not written whole.
        text: The rendered conversation.
    """
    of_calls = lost_of_calls(message, text)
    if of_calls is not None and _bare_in(message.content, text):
        return f"{quoted(str(of_calls))} of its tool calls"
    thoughts = message.reasoning
    return first_difference(message.content if not thoughts or _bare_in(thoughts, text) else thoughts, text)


def _bare_in(part: str, text: str) -> bool:
    return "".join(part.split()) in "".join(text.split())
