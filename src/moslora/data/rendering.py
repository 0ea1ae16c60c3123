"""Conversations through a chat template, as text and as token ids, and whether the template kept what was said.

A template is a program, and may leave out what it has no branch for: thoughts, a system turn, a variable. What it
leaves out is looked for in the text that it writes, which costs no second tokenization.
"""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from moslora.data.faults import listed, quoted
from moslora.data.shapes import Message
from moslora.errors import EncodingError
from moslora.wording import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Template", "first_difference", "missing_turns", "spells", "without_opening"]

PICTURE = "<image>"  # stands for a picture in a text, and is written as the model's own token
LONGEST_OPENING = 200  # characters of an answer that a template may write before it is generated
PROBED = 64  # turns of a conversation whose roles are tried with words of our own


class Template:
    """A tokenizer's chat template.

    Args:
        tokenizer: The tokenizer, or what renders in its place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer
        self._roles: dict[tuple[str, ...], frozenset[int]] = {}

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

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, **arguments, **options)
        except (TemplateError, TypeError, ValueError, RecursionError) as problem:
            roles = listed(message.role for message in messages)
            raise EncodingError(f"the chat template refuses the turns {roles}: {problem}") from problem

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
        return missing_turns(messages, text) | self._without_branch(messages, arguments)

    def _without_branch(self, messages: Sequence[Message], arguments: Mapping[str, Any]) -> frozenset[int]:
        """Return the turns that are left out whatever they say: a short text may be found elsewhere by chance."""
        roles = tuple(message.role for message in messages)
        if len(roles) > PROBED or not isinstance(arguments, Mapping):
            return frozenset()
        if roles not in self._roles:
            words = [
                Message(role, f"Word{index}x{index * 7919 + 104729}") for index, role in enumerate(roles)
            ]
            try:
                missing = missing_turns(words, self.text(words, arguments))
            except EncodingError:
                missing = set()  # the real turns were rendered, so these say nothing
            self._roles[roles] = frozenset(missing)
        return frozenset(i for i in self._roles[roles] if messages[i].content.strip())


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
    """Return a turn's text between its pictures."""
    return [piece.strip() for piece in message.content.split(PICTURE)]


def _bare(text: str) -> str:
    return "".join(text.split())


def _missing(pieces: Iterable[Sequence[str]], messages: Sequence[Message], text: str) -> set[int]:
    missing, at = set(), 0
    for index, (message, parts) in enumerate(zip(messages, pieces, strict=True)):
        cursor = 0 if message.role == "system" else at
        for part in parts:
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
