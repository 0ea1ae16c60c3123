"""Rows as examples: conversations, prompt and completion, Alpaca's columns, or text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from moslora.data.columns import FLAGS, OF_TEMPLATES, Unread, says_nothing, unread_keys
from moslora.data.faults import Faults, kind_of, listed, quoted
from moslora.data.files import Records
from moslora.data.strict_json import parse_json
from moslora.errors import DataError, UsageError
from moslora.wording import did_you_mean, nearest

__all__ = ["DATA_FORMATS", "Example", "Message", "to_examples"]


# Role in the data → role in a conversation; ShareGPT has names of its own.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class _FieldError(ValueError):
    """A fault in one row, without its place, which the caller knows."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: Its text.
        trained: Whether an assistant's turn is learned; false for turns that a prompt quotes.
        flag: The key that says that this turn is not learned, as ``messages.weight``; empty if none does.
    """

    role: str
    content: str
    trained: bool = True
    flag: str = ""


@dataclass(frozen=True)
class Example:
    """One training example: as a conversation, as prompt and completion, as text, or in both first forms.

    Attributes:
        place: Where it stands in the file.
        messages: The conversation, for a chat template.
        prompt: What comes before ``completion`` in plain layout.
        completion: What is learned in plain layout.
        text: Text that is learned as a whole.
        template_arguments: Variables for the chat template: those of ``chat_template_kwargs``, and ``tools``.
        extra: The other columns, untouched.
    """

    place: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


_Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Shape:
    """A form that rows may have.

    Attributes:
        required: Columns that it needs.
        build: From a row to the fields of an ``Example``.
        optional: Columns that it also reads.
        other_name: A column that may stand for the required one.
        harmless: Columns that say again what is in these.
    """

    required: tuple[str, ...]
    build: Callable[[_Row], dict[str, Any]]
    optional: tuple[str, ...] = ()
    other_name: str = ""
    harmless: tuple[str, ...] = ()

    def fits(self, row: _Row) -> bool:
        # Tables fill absent columns with null, so a null does not count.
        return (
            all(row.get(column) is not None for column in self.required)
            or row.get(self.other_name) is not None
        )


def _conversation(row: _Row) -> dict[str, Any]:
    given = [column for column in ("messages", "conversations") if row.get(column) is not None]
    if len(given) == 2:
        raise _FieldError("fields 'messages' and 'conversations' are both given; remove one")
    column = given[0] if given else "messages"
    return {"messages": _with_answer(_turns(row, column), column)}


def _prompt_completion(row: _Row) -> dict[str, Any]:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        quoted = [Message(m.role, m.content, False, m.flag) for m in _turns(row, "prompt", in_prompt=True)]
        return {"messages": _with_answer((*quoted, *_turns(row, "completion")), "completion", len(quoted))}
    if isinstance(row.get("prompt"), list) != isinstance(row.get("completion"), list):
        kinds = f"{kind_of(row.get('prompt'))} and {kind_of(row.get('completion'))}"
        raise _FieldError(f"fields 'prompt' and 'completion' are {kinds}; expected both text or both lists")
    return {"prompt": _text(row, "prompt"), "completion": _text(row, "completion")}


def _alpaca(row: _Row) -> dict[str, Any]:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    given = _text(row, "input", empty=True) if row.get("input") is not None else ""
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    sections = {"Instruction": instruction, "Input": given, "Response": ""}
    written = [
        f"### {name}:\n{text}" for name, text in sections.items() if text.strip() or name == "Response"
    ]
    return {
        "messages": (Message("user", asked), Message("assistant", output)),
        "prompt": "\n\n".join(written),
        "completion": output,
    }


SHAPES = {
    # ShareGPT's name is the other one.
    "messages": _Shape(("messages",), _conversation, optional=OF_TEMPLATES, other_name="conversations"),
    "prompt-completion": _Shape(("prompt", "completion"), _prompt_completion, optional=OF_TEMPLATES),
    # LLM-Adapters' data repeat the output's last word as the answer.
    "alpaca": _Shape(
        ("instruction", "output"), _alpaca, optional=("input", *OF_TEMPLATES), harmless=("answer",)
    ),
    "text": _Shape(("text",), lambda row: {"text": _text(row, "text")}),
}
DATA_FORMATS = ("auto", *SHAPES)


def to_examples(records: Records, format: str = "auto") -> list[Example]:
    """Interpret rows: conversations, prompt and completion, Alpaca's columns, or text.

    Args:
        records: Rows, as :func:`read_records` gives them.
        format: One of ``DATA_FORMATS``; ``"auto"`` decides by the columns and refuses rows that fit more than one.

    Returns:
        One example per row, in order.

    Raises:
        DataError: If a row does not fit, naming place and field, or has keys that nobody reads.
        UsageError: If ``format`` is unknown.
    """
    if format not in DATA_FORMATS:
        hint = did_you_mean(format, DATA_FORMATS)
        raise UsageError(f"format={format!r} is unknown.{hint} Choose one of {listed(DATA_FORMATS)}.")
    name = _recognize(records) if format == "auto" else format
    shape = SHAPES[name]
    # Who names a format says that the columns of the others are not meant.
    others = (
        () if format == "auto" else tuple(c for s in SHAPES.values() for c in (*s.required, s.other_name))
    )
    read = {*shape.required, *shape.optional, shape.other_name}
    known = {*shape.harmless, *others}
    faults, unread = Faults(records.source), Unread()
    examples = []
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            examples.append(_example(place, row, shape, read))
        except RecursionError:
            faults.add(place, "has too many nested levels")
        except _FieldError as problem:
            fitting = [other for other in _fitting_shapes(row) if other != name]
            mixed = f" (the row fits format {fitting[0]!r}, the file {name!r})" if fitting else ""
            faults.add(place, f"{problem}{mixed}")
        else:
            unread.add(place, unread_keys(row, read, known))
    advice = f"Correct or remove these rows (read as data.format={name}); none was skipped."
    if unread:
        advice = f"{advice if faults.count else 'Rename or remove these fields.'} {unread.advice()}"
    for fault in unread.faults():
        faults.add("", fault)
    faults.raise_if_any(advice)
    return examples


def _example(place: str, row: _Row, shape: _Shape, own: set[str]) -> Example:
    fields = shape.build(row)
    if any(row.get(column) is not None for column in OF_TEMPLATES) and OF_TEMPLATES[0] in own:
        fields["template_arguments"] = _template_arguments(row)
    return Example(place, **fields, extra={key: value for key, value in row.items() if key not in own})


def _fitting_shapes(row: _Row) -> list[str]:
    return [name for name, shape in SHAPES.items() if shape.fits(row)]


def _recognize(records: Records) -> str:
    """Return the one format that the rows have, by their columns."""
    fits = [_fitting_shapes(row) for row in records.rows]
    for place, names in zip(records.places, fits, strict=True):
        if len(names) > 1:
            fault = f"{place}: the columns {listed(records.rows[0])} fit more than one format"
            ways = " or ".join(f"data.format={name}" for name in names)
            raise DataError(records.source, [fault], f"Choose one: {ways}.")
    counts = Counter(name for names in fits for name in names)
    if counts:
        return counts.most_common(1)[0][0]
    row = records.rows[0]
    closeness = {
        name: sum(bool(_similar_column(column, row) or column in row) for column in shape.required)
        for name, shape in SHAPES.items()
    }
    best = max(closeness, key=lambda name: closeness[name] / len(SHAPES[name].required))
    if closeness[best]:
        return best
    known = "; ".join(" + ".join(shape.required) for shape in SHAPES.values())
    fault = f"{records.places[0]}: the columns {listed(row)} are not those of a known format ({known})"
    raise DataError(records.source, [fault], "Rename the columns.")


def _similar_column(name: str, names: Iterable[str]) -> str | None:
    """Return the column that ``name`` may be misspelled as, among those that no shape reads."""
    return _similar(name, tuple(names))


@lru_cache(maxsize=16)  # rows of a file have the same columns
def _similar(name: str, names: tuple[str, ...]) -> str | None:
    known = {column for shape in SHAPES.values() for column in (*shape.required, *shape.optional)}
    return nearest(name, [n for n in names if n not in known], 0.75)


def _missing(name: str, row: _Row) -> _FieldError:
    near = _similar_column(name, [str(key) for key in row])
    return _FieldError(
        f"field {name!r} is missing; " + (f"rename {near!r}" if near else f"found {listed(row)}")
    )


def _template_arguments(row: _Row) -> dict[str, Any]:
    """Return the variables that a row gives to the chat template, without the nulls with which tables fill gaps."""
    arguments = row.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise _FieldError(f"field 'chat_template_kwargs' is {kind_of(arguments)}; expected an object")
    variables = {} if arguments is None else dict(_without_nulls(arguments))
    if says_nothing(row.get("tools")):
        return variables
    tools = row["tools"]
    if isinstance(tools, str):  # tables of Arrow cannot hold them otherwise
        try:
            tools = parse_json(tools)
        except ValueError as problem:
            raise _FieldError(f"field 'tools' is not JSON: {problem}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _FieldError("field 'tools' is not a list of objects, one for each tool")
    if "tools" in variables:
        raise _FieldError("fields 'tools' and 'chat_template_kwargs.tools' are both given; remove one")
    return {**variables, "tools": _without_nulls(tools)}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text(row: _Row, column: str, empty: bool = False) -> str:
    if column not in row:
        raise _missing(column, row)
    return _checked_text(row[column], column, empty)


def _checked_text(value: Any, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _FieldError(f"field {where!r} is {kind_of(value)}; expected text")
    if not (empty or value.strip()):
        raise _FieldError(f"field {where!r} is empty; expected text")
    return value


def _turns(row: _Row, column: str, in_prompt: bool = False) -> tuple[Message, ...]:
    if column not in row:
        raise _missing(column, row)
    if not isinstance(row[column], list):
        raise _FieldError(f"field {column!r} is {kind_of(row[column])}; expected a list of messages")
    if not row[column]:
        raise _FieldError(f"field {column!r} is an empty list; expected messages")
    return tuple(_turn(value, f"{column}[{index}]", in_prompt) for index, value in enumerate(row[column]))


def _turn(value: Any, where: str, in_prompt: bool) -> Message:
    if not isinstance(value, dict):
        raise _FieldError(f"field {where!r} is {kind_of(value)}; expected an object with role and content")
    role_key, text_key = _one_of(value, "role", "from", where), _one_of(value, "content", "value", where)
    for key in (role_key, text_key):
        if key not in value:
            near = nearest(key, value)
            way = f"rename {near!r}" if near else f"found {listed(value)}"
            raise _FieldError(f"field {where + '.' + key!r} is missing; {way}")
    role = _checked_text(value[role_key], f"{where}.{role_key}")
    if role not in ROLES:
        hint = "; tool calls are not supported" if role in ("tool", "function", "ipython") else ""
        raise _FieldError(
            f"field {f'{where}.{role_key}'!r} is {quoted(role)}; expected one of {listed(ROLES)}{hint}"
        )
    role = ROLES[role]
    # An empty system or user turn is odd but harmless; an empty answer teaches silence.
    text = _checked_text(value[text_key], f"{where}.{text_key}", role != "assistant")
    flag = _flag_against(value, where, role, in_prompt)
    return Message(role, text, trained=not (flag and role == "assistant"), flag=flag)


def _one_of(value: _Row, name: str, other: str, where: str) -> str:
    """Return which of two names of one field a message has; both may be there if they say the same."""
    if value.get(name) is None or says_nothing(value.get(other)):
        return name if value.get(name) is not None or other not in value else other
    both = [
        ROLES.get(value[key], value[key]) if isinstance(value[key], str) else None for key in (name, other)
    ]
    if both[0] is None or both[0] != both[1]:
        raise _FieldError(f"fields {f'{where}.{name}'!r} and {other!r} differ; remove one")
    return name


def _flag_against(value: _Row, where: str, role: str, in_prompt: bool) -> str:
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
            raise _FieldError(
                f"{place} is {found}; expected 0, 1, true or false (nothing is learned in part), {way}"
            )
        said[key] = bool(flag) == when
        if said[key] and (in_prompt or role != "assistant"):
            whose = "the answers that a prompt quotes" if role == "assistant" else f"{role} turns"
            raise _FieldError(f"{place} asks to learn it, but {whose} are not learned; remove it, {way}")
    if len(set(said.values())) > 1:
        raise _FieldError(f"field {where!r} has {listed(said)}, which contradict each other; remove one")
    column = where.partition("[")[0]
    return next((f"{column}.{key}" for key, learned in said.items() if not learned), "")


def _with_answer(messages: tuple[Message, ...], column: str, start: int = 0) -> tuple[Message, ...]:
    """Check that there is an answer to learn, and a question before it."""
    if not any(message.role == "assistant" for message in messages[start:]):
        roles = listed(message.role for message in messages[start:])
        raise _FieldError(
            f"field {column!r} has no assistant turn (roles: {roles}); nothing could be learned"
        )
    if not any(message.role == "assistant" and message.trained for message in messages[start:]):
        raise _FieldError(f"field {column!r} marks every answer as not to be learned; remove the row")
    if messages[0].role == "assistant":
        raise _FieldError(
            f"field {column!r} opens with an assistant turn, which answers no question; remove it"
        )
    return messages


# For rows of other tasks, which read the same fields.
FieldError, read_text, read_turns, read_template_arguments = _FieldError, _text, _turns, _template_arguments
