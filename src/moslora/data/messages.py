"""One turn of a conversation, read from the forms in which people have it.

OpenAI's (``role``, ``content``, ``tool_calls``, ``tool_call_id``), ShareGPT's (``from``, ``value``, with the roles
``function_call`` and ``observation``), and the keys under which thoughts are kept. What a turn says beyond these is
refused elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moslora.data.columns import CALLS, FLAGS, THOUGHTS, says_nothing
from moslora.data.faults import kind_of, listed, quoted
from moslora.data.strict_json import parse_json
from moslora.wording import nearest

__all__ = [
    "FieldError",
    "Message",
    "checked_text",
    "leaves",
    "read_turn",
    "with_system",
    "with_thoughts",
    "without_nulls",
]

# Role in the data → role in a conversation; ShareGPT has names of its own.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
OF_CALLS = frozenset(("id", "type", "function", "index", "name", "arguments", "parameters"))
THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


class FieldError(ValueError):
    """A fault in one row, without its place, which the caller knows."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``"system"``, ``"user"``, ``"assistant"`` or ``"tool"``.
        content: Its text.
        trained: Whether an assistant's turn is learned; false for turns that a prompt quotes.
        flag: The key that says that this turn is not learned, as ``messages.weight``; empty if none does.
        reasoning: Thoughts that are kept apart from the text, as ``reasoning_content`` and its kin are.
        calls: Calls of tools: each has ``name``, ``arguments`` (an object) and maybe ``id``.
        name: Of the tool whose result this is, or of who speaks.
        call_id: Of the call that this is the result of.
    """

    role: str
    content: str
    trained: bool = True
    flag: str = ""
    reasoning: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    call_id: str = ""

    def as_turn(self, thoughts: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the turn as chat templates take it, in OpenAI's form.

        Args:
            thoughts: Keys under which the template looks for thoughts.
        """
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            turn |= dict.fromkeys(thoughts, self.reasoning)
        if self.calls:
            turn["tool_calls"] = [
                {
                    **({"id": call["id"]} if "id" in call else {}),
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in self.calls
            ]
        if self.call_id:
            turn["tool_call_id"] = self.call_id
        if self.name:
            turn["name"] = self.name
        return turn

    def says(self) -> tuple[Any, ...]:
        """Return what identifies the turn: role and text, and what else it has; alone if it has nothing else."""
        more = (self.reasoning, [dict(call) for call in self.calls], self.name)
        return (self.role, self.content, *(more if any(more) else ()))

    @property
    def texts(self) -> list[str]:
        """What has to be in the tokens, in its order: thoughts, text, and the names of what is called."""
        return [*([self.reasoning] if self.reasoning else []), self.content, *(c["name"] for c in self.calls)]


# ---- reading ---------------------------------------------------------------------------------------------


def read_turn(value: Any, where: str, in_prompt: bool) -> Message:
    """Read one message of a row.

    Args:
        value: What the row has.
        where: Its place, as ``messages[3]``.
        in_prompt: Whether it is a part of a prompt, of which nothing is learned.

    Raises:
        FieldError: If it is no message, naming the field.
    """
    if not isinstance(value, dict):
        raise FieldError(f"field {where!r} is {kind_of(value)}; expected an object with role and content")
    role_key, text_key = _one_of(value, "role", "from", where), _one_of(value, "content", "value", where)
    calls = _calls(value, where)
    for key in (role_key, text_key):
        if key not in value and not (key == text_key and calls):
            near = nearest(key, value)
            way = f"rename {near!r}" if near else f"found {listed(value)}"
            raise FieldError(f"field {where + '.' + key!r} is missing; {way}")
    found = checked_text(value[role_key], f"{where}.{role_key}")
    if found not in ROLES:
        raise FieldError(
            f"field {f'{where}.{role_key}'!r} is {quoted(found)}; expected one of {listed(ROLES)}"
        )
    role, place = ROLES[found], f"{where}.{text_key}"
    if found == "function_call":  # ShareGPT's: the text is the call
        calls, text = _written_calls(_content(value.get(text_key), place, role, False), place), ""
    else:
        text = _content(value.get(text_key), place, role, bool(calls))
    if calls and role != "assistant":
        raise FieldError(
            f"field {where + '.tool_calls'!r} is in a {role} turn; only an assistant calls tools"
        )
    flag = _flag_against(value, where, role, in_prompt)
    return Message(
        role,
        text,
        trained=not (flag and role == "assistant"),
        flag=flag,
        reasoning=_reasoning(value, where, role),
        calls=calls,
        name=_optional(value, "name", where) if role == "tool" else "",
        call_id=_optional(value, "tool_call_id", where),
    )


def _content(value: Any, where: str, role: str, empty: bool) -> str:
    """Return a turn's text; parts of text are joined, and a tool's result may be an object."""
    if value is None and empty:
        return ""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(p, dict) and p.get("type") == "text" for p in value)
    ):
        for index, part in enumerate(value):
            unread = next((k for k in part if k not in ("type", "text") and not says_nothing(part[k])), None)
            if unread is not None:
                key = f"{where.partition('[')[0]}.{where.rpartition('.')[2]}.{unread}"
                raise FieldError(
                    f"field {f'{where}[{index}].{unread}'!r} would be ignored. To drop it: data.ignore=[{key}]"
                )
        value = "".join(checked_text(part.get("text"), where, True) for part in value)
    elif isinstance(value, list) and any(
        isinstance(p, dict) and "image" in str(p.get("type")) for p in value
    ):
        raise FieldError(f"field {where!r} shows a picture, which needs task=vision")
    elif role == "tool" and isinstance(value, dict | list):
        value = json.dumps(without_nulls(value), ensure_ascii=False)
    # An empty turn of another is odd but harmless; an empty answer teaches silence.
    return checked_text(value, where, empty or role != "assistant")


def checked_text(value: Any, where: str, empty: bool = False) -> str:
    """Return a text.

    Args:
        value: What the row has.
        where: The field.
        empty: Whether it may be empty.

    Raises:
        FieldError: If it is none.
    """
    if not isinstance(value, str):
        raise FieldError(f"field {where!r} is {kind_of(value)}; expected text")
    if not (empty or value.strip()):
        raise FieldError(f"field {where!r} is empty; expected text")
    return value


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls with which tables fill gaps.

    Args:
        value: Of JSON.
    """
    if isinstance(value, Mapping):
        return {str(key): without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _optional(value: Mapping[str, Any], key: str, where: str) -> str:
    return "" if says_nothing(value.get(key)) else checked_text(value[key], f"{where}.{key}")


def _reasoning(value: Mapping[str, Any], where: str, role: str) -> str:
    """Return the thoughts of a turn; several keys may have them if they say the same."""
    said = {
        key: checked_text(value[key], f"{where}.{key}")
        for key in THOUGHTS
        if not says_nothing(value.get(key))
    }
    if said and role != "assistant":
        raise FieldError(
            f"field {f'{where}.{next(iter(said))}'!r} is in a {role} turn; only an assistant thinks"
        )
    if len(set(said.values())) > 1:
        raise FieldError(f"field {where!r} has {listed(said)}, which differ; remove one")
    return next(iter(said.values()), "")


def _one_of(value: Mapping[str, Any], name: str, other: str, where: str) -> str:
    """Return which of two names of one field a message has; both may be there if they say the same."""
    if value.get(name) is None or says_nothing(value.get(other)):
        return name if value.get(name) is not None or other not in value else other
    both = [
        ROLES.get(value[key], value[key]) if isinstance(value[key], str) else None for key in (name, other)
    ]
    if both[0] is None or both[0] != both[1]:
        raise FieldError(f"fields {f'{where}.{name}'!r} and {other!r} differ; remove one")
    return name


# ---- calls of tools ----------------------------------------------------------------------------------------


def _calls(value: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    """Return what a turn calls: ``tool_calls``, or the older ``function_call``."""
    given = [key for key in CALLS if not says_nothing(value.get(key))]
    if not given:
        return ()
    if len(given) > 1:
        raise FieldError(f"fields {f'{where}.{given[0]}'!r} and {given[1]!r} are both given; remove one")
    place, found = f"{where}.{given[0]}", value[given[0]]
    if isinstance(found, str):
        return _written_calls(found, place)
    return _read_calls(found, place)


def _written_calls(text: str, place: str) -> tuple[Mapping[str, Any], ...]:
    try:
        return _read_calls(parse_json(text), place)
    except FieldError:
        raise
    except ValueError as problem:
        raise FieldError(f"field {place!r} is not JSON: {problem}") from None


def _read_calls(found: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    several = isinstance(found, list)
    calls = found if several else [found]
    return tuple(_call(call, f"{place}[{n}]" if several else place) for n, call in enumerate(calls))


def _call(value: Any, place: str) -> Mapping[str, Any]:
    """Read one call, with its name and arguments inside ``function`` or beside."""
    if not isinstance(value, Mapping):
        raise FieldError(f"field {place!r} is {kind_of(value)}; expected an object with name and arguments")
    inner = value.get("function")
    function, where = (inner, f"{place}.function") if isinstance(inner, Mapping) else (value, place)
    for holder, at in ((value, place), (function, where)):
        unread = next((key for key in holder if key not in OF_CALLS and not says_nothing(holder[key])), None)
        if unread is not None:
            raise FieldError(f"field {f'{at}.{unread}'!r} would be ignored; remove it")
    kind = value.get("type")
    if not says_nothing(kind) and kind != "function":
        raise FieldError(f"field {f'{place}.type'!r} is {quoted(str(kind))}; expected 'function'")
    if says_nothing(function.get("name")):
        near = nearest("name", function)
        way = f"rename {near!r}" if near else f"found {listed(function)}"
        raise FieldError(f"field {f'{where}.name'!r} is missing; {way}")
    name = checked_text(function["name"], f"{where}.name")
    key = "arguments" if function.get("arguments") is not None else "parameters"
    arguments = function.get(key)
    if isinstance(arguments, str) and arguments.strip():  # as OpenAI's API returns them
        try:
            arguments = parse_json(arguments)
        except ValueError as problem:
            raise FieldError(f"field {f'{where}.{key}'!r} is not JSON: {problem}") from None
    else:
        arguments = without_nulls(arguments or {})
    if not isinstance(arguments, Mapping):
        raise FieldError(
            f"field {f'{where}.{key}'!r} is {kind_of(arguments)}; expected an object, or its JSON"
        )
    found = value.get("id")
    return {"name": name, "arguments": arguments, **({} if says_nothing(found) else {"id": str(found)})}


def leaves(value: Any) -> Iterator[str | int | float | bool]:
    """Yield the keys, texts, numbers and truth values of a call's arguments, which have to be in the tokens.

    Args:
        value: Of JSON.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield value


# ---- thoughts ----------------------------------------------------------------------------------------------


def with_thoughts(message: Message, choice: str) -> Message:
    """Do with a turn's thoughts what ``data.reasoning`` says.

    Args:
        message: Any turn.
        choice: ``"keep"`` leaves them as they are; ``"inline"`` writes those of a key of their own into the text, as
            ``<think>…</think>``; ``"drop"`` removes those, and such a block at the start of the text.

    Raises:
        FieldError: If nothing is left of an answer.
    """
    if message.role != "assistant" or choice == "keep":
        return message
    if choice == "inline":
        if not message.reasoning:
            return message
        text = f"<think>\n{message.reasoning.strip()}\n</think>\n\n{message.content}"
        return replace(message, content=text, reasoning="")
    block = THINK.match(message.content)
    text = message.content[block.end() :] if block else message.content
    if not (text.strip() or message.calls):
        raise FieldError(
            "an answer is nothing but thoughts, which data.reasoning=drop leaves out; remove the row"
        )
    return replace(message, content=text, reasoning="")


def with_system(messages: tuple[Message, ...], choice: str) -> tuple[Message, ...]:
    """Do with a system turn what ``data.system_turn`` says.

    Args:
        messages: A conversation.
        choice: ``"keep"`` leaves it; ``"user"`` writes it before the question that follows, for templates without a
            branch for it; ``"drop"`` leaves it out.

    Raises:
        FieldError: If no question follows that could take it.
    """
    if choice == "keep" or not any(message.role == "system" for message in messages):
        return messages
    kept: list[Message] = []
    waiting = ""
    for message in messages:
        if message.role == "system":
            waiting = (
                f"{waiting}{message.content}\n\n" if message.content.strip() and choice == "user" else waiting
            )
        elif waiting and message.role == "user":
            kept.append(replace(message, content=waiting + message.content))
            waiting = ""
        else:
            kept.append(message)
    if waiting:
        raise FieldError(
            "a system turn is followed by no question, which data.system_turn=user would write it into"
        )
    return tuple(kept)


# ---- flags -------------------------------------------------------------------------------------------------


def _flag_against(value: Mapping[str, Any], where: str, role: str, in_prompt: bool) -> str:
    """Return the key of a message that says that it is not learned; empty if none does."""
    said: dict[str, bool] = {}
    for key, when in FLAGS.items():
        flag = value.get(key)
        if flag is None or flag == "":
            continue
        place = f"field {f'{where}.{key}'!r}"
        way = f"or set data.ignore=[{where.partition('[')[0]}.{key}] to learn every answer alike"
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            found = repr(flag) if isinstance(flag, float) else kind_of(flag)
            raise FieldError(
                f"{place} is {found}; expected 0, 1, true or false (nothing is learned in part), {way}"
            )
        said[key] = bool(flag) == when
        if said[key] and (in_prompt or role != "assistant"):
            whose = "the answers that a prompt quotes" if role == "assistant" else f"{role} turns"
            raise FieldError(f"{place} asks to learn it, but {whose} are not learned; remove it, {way}")
    if len(set(said.values())) > 1:
        raise FieldError(f"field {where!r} has {listed(said)}, which contradict each other; remove one")
    column = where.partition("[")[0]
    return next((f"{column}.{key}" for key, learned in said.items() if not learned), "")
