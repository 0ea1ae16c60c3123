"""Rows as examples: conversations, prompt and completion, Alpaca's columns, or text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from moslora.data.columns import OF_TEMPLATES, Unread, says_nothing, unread_keys
from moslora.data.faults import Faults, kind_of, listed
from moslora.data.files import Records
from moslora.data.messages import (
    FieldError,
    Message,
    checked_text,
    read_turn,
    with_system,
    with_thoughts,
    without_nulls,
)
from moslora.data.strict_json import parse_json
from moslora.errors import DataError, UsageError
from moslora.wording import did_you_mean, nearest

__all__ = [
    "DATA_FORMATS",
    "Example",
    "Fits",
    "Message",
    "answers_apart",
    "check_format",
    "interpret",
    "recognize",
    "refuse_faults",
    "to_examples",
]


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
        raise FieldError("fields 'messages' and 'conversations' are both given; remove one")
    column = given[0] if given else "messages"
    return {"messages": _with_answer(_turns(row, column), column)}


def _prompt_completion(row: _Row) -> dict[str, Any]:
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        quoted = [replace(m, trained=False) for m in _turns(row, "prompt", in_prompt=True)]
        return {"messages": _with_answer((*quoted, *_turns(row, "completion")), "completion", len(quoted))}
    if isinstance(row.get("prompt"), list) != isinstance(row.get("completion"), list):
        kinds = f"{kind_of(row.get('prompt'))} and {kind_of(row.get('completion'))}"
        raise FieldError(f"fields 'prompt' and 'completion' are {kinds}; expected both text or both lists")
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


SYSTEM = "system"
SHAPES = {
    # ShareGPT's name is the other one.
    "messages": _Shape(
        ("messages",), _conversation, optional=(SYSTEM, *OF_TEMPLATES), other_name="conversations"
    ),
    "prompt-completion": _Shape(
        ("prompt", "completion"), _prompt_completion, optional=(SYSTEM, *OF_TEMPLATES)
    ),
    # LLM-Adapters' data repeat the output's last word as the answer.
    "alpaca": _Shape(
        ("instruction", "output"),
        _alpaca,
        optional=("input", SYSTEM, *OF_TEMPLATES),
        harmless=("answer",),
    ),
    "text": _Shape(("text",), lambda row: {"text": _text(row, "text")}),
}
DATA_FORMATS = ("auto", *SHAPES)


def to_examples(
    records: Records, format: str = "auto", reasoning: str = "keep", system_turn: str = "keep"
) -> list[Example]:
    """Interpret rows: conversations, prompt and completion, Alpaca's columns, or text.

    Args:
        records: Rows, as :func:`read_records` gives them.
        format: One of ``DATA_FORMATS``; ``"auto"`` decides by the columns and refuses rows that fit more than one.
        reasoning: What is done with thoughts: ``"keep"``, ``"inline"`` or ``"drop"``, as ``with_thoughts`` has it.
        system_turn: What is done with system turns: ``"keep"``, ``"user"`` or ``"drop"``, as ``with_system`` has it.

    Returns:
        One example per row, in order.

    Raises:
        DataError: If a row does not fit, naming place and field, or has keys that nobody reads.
        UsageError: If ``format`` is unknown.
    """
    check_format(format)
    name = recognize(records) if format == "auto" else format
    examples, faults, unread = interpret(records, name, format == "auto", reasoning, system_turn)
    refuse_faults(faults, unread, name)
    return examples


def check_format(format: str) -> None:
    """Refuse a format that is unknown.

    Args:
        format: ``data.format``.

    Raises:
        UsageError: If it is.
    """
    if format not in DATA_FORMATS:
        hint = did_you_mean(format, DATA_FORMATS)
        raise UsageError(f"format={format!r} is unknown.{hint} Choose one of {listed(DATA_FORMATS)}.")


def interpret(
    records: Records, name: str, is_guessed: bool, reasoning: str, system_turn: str
) -> tuple[list[Example], Faults, Unread]:
    """Interpret rows of a known format.

    Args:
        records: Rows.
        name: Their format.
        is_guessed: Whether the columns said so, so that those of the other formats are not left aside.
        reasoning, system_turn: As for ``to_examples``.

    Returns:
        The examples, the faults of the other rows, and the keys that nobody reads.
    """
    shape = SHAPES[name]
    # Who names a format says that the columns of the others are not meant.
    others = () if is_guessed else tuple(c for s in SHAPES.values() for c in (*s.required, s.other_name))
    read = {*shape.required, *shape.optional, shape.other_name}
    known = {*shape.harmless, *others}
    faults, unread = Faults(records.source), Unread()
    examples = []
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            examples.append(_example(place, row, shape, read, (reasoning, system_turn)))
        except RecursionError:
            faults.add(place, "has too many nested levels")
        except FieldError as problem:
            fitting = [other for other in _fitting_shapes(row) if other != name]
            mixed = f" (the row fits format {fitting[0]!r}, the file {name!r})" if fitting else ""
            faults.add(place, f"{problem}{mixed}")
        else:
            unread.add(place, unread_keys(row, read, known))
    return examples, faults, unread


def refuse_faults(faults: Faults, unread: Unread, name: str) -> None:
    """Raise one error for all that ``interpret`` found.

    Args:
        faults, unread: From there.
        name: The format.

    Raises:
        DataError: If there is anything.
    """
    advice = f"Correct or remove these rows (read as data.format={name}); none was skipped."
    if unread:
        advice = f"{advice if faults.count else 'Rename or remove these fields.'} {unread.advice()}"
    for fault in unread.faults():
        faults.add("", fault)
    faults.raise_if_any(advice)


def _example(place: str, row: _Row, shape: _Shape, own: set[str], choices: tuple[str, str]) -> Example:
    fields = shape.build(row)
    reasoning, system_turn = choices
    if SYSTEM in own and system_turn != "drop" and not says_nothing(row.get(SYSTEM)):
        fields = _with_system(fields, checked_text(row[SYSTEM], SYSTEM))
    if fields.get("messages"):
        messages = with_system(fields["messages"], system_turn)
        fields["messages"] = tuple(with_thoughts(message, reasoning) for message in messages)
    elif fields.get("completion") is not None:
        fields["completion"] = with_thoughts(Message("assistant", fields["completion"]), reasoning).content
    if any(row.get(column) is not None for column in OF_TEMPLATES) and OF_TEMPLATES[0] in own:
        fields["template_arguments"] = _template_arguments(row)
    return Example(place, **fields, extra={key: value for key, value in row.items() if key not in own})


def _with_system(fields: dict[str, Any], system: str) -> dict[str, Any]:
    """Put what a row has in a column ``system`` before everything else."""
    messages = fields.get("messages")
    if messages is None:  # prompt and completion as text
        messages = (Message("user", fields["prompt"]), Message("assistant", fields["completion"]))
    if any(message.role == "system" for message in messages):
        raise FieldError(f"field {SYSTEM!r} and a system turn of the conversation are both given; remove one")
    prompt = fields.get("prompt")
    before = {} if prompt is None else {"prompt": f"{system}\n\n{prompt}"}
    return {**fields, "messages": (Message("system", system), *messages), **before}


def answers_apart(example: Example) -> list[Example]:
    """Make an example of each answer of a conversation that is learned: the turns up to it, with it alone learned.

    Args:
        example: Any example.

    Returns:
        In the order of the answers; the example itself where there is but one.
    """
    turns = example.messages or ()
    learned = [i for i, message in enumerate(turns) if message.role == "assistant" and message.trained]
    if len(learned) < 2:
        return [example]
    return [
        replace(
            example,
            place=f"{example.place}, turn {at}",
            messages=(*(replace(turn, trained=False) for turn in turns[:at]), turns[at]),
        )
        for at in learned
    ]


def _fitting_shapes(row: _Row) -> list[str]:
    return [name for name, shape in SHAPES.items() if shape.fits(row)]


@dataclass
class Fits:
    """Which formats the rows of a file fit, by their columns.

    Attributes:
        counts: How many rows fit each.
        ambiguous: The place of the first row that fits more than one, and the names of these.
    """

    counts: Counter[str] = field(default_factory=Counter)
    ambiguous: tuple[str, list[str]] | None = None

    def add(self, records: Records) -> None:
        """Count rows.

        Args:
            records: Rows that come after those that were counted.
        """
        for place, row in zip(records.places, records.rows, strict=True):
            names = _fitting_shapes(row)
            self.counts.update(names)
            if len(names) > 1 and self.ambiguous is None:
                self.ambiguous = (place, names)

    def merge(self, later: Fits) -> None:
        """Count what another has counted of later rows."""
        self.counts.update(later.counts)
        self.ambiguous = self.ambiguous or later.ambiguous

    def decide(self, source: str, place: str, row: _Row) -> str:
        """Return the one format that the rows have.

        Args:
            source: What was read.
            place: Of the first row.
            row: The first row.

        Raises:
            DataError: If rows fit more than one, or none.
        """
        if self.ambiguous is not None:
            fault = f"{self.ambiguous[0]}: the columns {listed(row)} fit more than one format"
            ways = " or ".join(f"data.format={name}" for name in self.ambiguous[1])
            raise DataError(source, [fault], f"Choose one: {ways}.")
        if self.counts:
            return self.counts.most_common(1)[0][0]
        closeness = {
            name: sum(bool(_similar_column(column, row) or column in row) for column in shape.required)
            for name, shape in SHAPES.items()
        }
        best = max(closeness, key=lambda name: closeness[name] / len(SHAPES[name].required))
        if closeness[best]:
            return best
        known = "; ".join(" + ".join(shape.required) for shape in SHAPES.values())
        fault = f"{place}: the columns {listed(row)} are not those of a known format ({known})"
        raise DataError(source, [fault], "Rename the columns.")


def recognize(records: Records) -> str:
    """Return the one format that rows have, by their columns.

    Args:
        records: Rows.

    Raises:
        DataError: If they fit more than one, or none.
    """
    fits = Fits()
    fits.add(records)
    return fits.decide(records.source, records.places[0], records.rows[0])


def _similar_column(name: str, names: Iterable[str]) -> str | None:
    """Return the column that ``name`` may be misspelled as, among those that no shape reads."""
    return _similar(name, tuple(names))


@lru_cache(maxsize=16)  # rows of a file have the same columns
def _similar(name: str, names: tuple[str, ...]) -> str | None:
    known = {column for shape in SHAPES.values() for column in (*shape.required, *shape.optional)}
    return nearest(name, [n for n in names if n not in known], 0.75)


def _missing(name: str, row: _Row) -> FieldError:
    near = _similar_column(name, [str(key) for key in row])
    return FieldError(
        f"field {name!r} is missing; " + (f"rename {near!r}" if near else f"found {listed(row)}")
    )


def _template_arguments(row: _Row) -> dict[str, Any]:
    """Return the variables that a row gives to the chat template, without the nulls with which tables fill gaps."""
    arguments = row.get("chat_template_kwargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise FieldError(f"field 'chat_template_kwargs' is {kind_of(arguments)}; expected an object")
    variables = {} if arguments is None else dict(without_nulls(arguments))
    if says_nothing(row.get("tools")):
        return variables
    tools = row["tools"]
    if isinstance(tools, str):  # tables of Arrow cannot hold them otherwise
        try:
            tools = parse_json(tools)
        except ValueError as problem:
            raise FieldError(f"field 'tools' is not JSON: {problem}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise FieldError("field 'tools' is not a list of objects, one for each tool")
    if "tools" in variables:
        raise FieldError("fields 'tools' and 'chat_template_kwargs.tools' are both given; remove one")
    return {**variables, "tools": without_nulls(tools)}


def _text(row: _Row, column: str, empty: bool = False) -> str:
    if column not in row:
        raise _missing(column, row)
    return checked_text(row[column], column, empty)


def _turns(row: _Row, column: str, in_prompt: bool = False) -> tuple[Message, ...]:
    if column not in row:
        raise _missing(column, row)
    if not isinstance(row[column], list):
        raise FieldError(f"field {column!r} is {kind_of(row[column])}; expected a list of messages")
    if not row[column]:
        raise FieldError(f"field {column!r} is an empty list; expected messages")
    return tuple(read_turn(value, f"{column}[{index}]", in_prompt) for index, value in enumerate(row[column]))


def _with_answer(messages: tuple[Message, ...], column: str, start: int = 0) -> tuple[Message, ...]:
    """Check that there is an answer to learn, and a question before it."""
    if not any(message.role == "assistant" for message in messages[start:]):
        roles = listed(message.role for message in messages[start:])
        raise FieldError(f"field {column!r} has no assistant turn (roles: {roles}); nothing could be learned")
    if not any(message.role == "assistant" and message.trained for message in messages[start:]):
        raise FieldError(f"field {column!r} marks every answer as not to be learned; remove the row")
    if messages[0].role == "assistant":
        raise FieldError(
            f"field {column!r} opens with an assistant turn, which answers no question; remove it"
        )
    return messages


# For rows of other tasks, which read the same fields.
read_text, read_turns, read_template_arguments = _text, _turns, _template_arguments
