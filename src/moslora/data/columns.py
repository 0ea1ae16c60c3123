"""What each key of a row and of a message is for: read, obeyed, known to be harmless, or refused with a way out.

A key that nobody reads is refused, because what it says (this answer is bad, these tools are offered) would be lost
in silence. ``data.ignore`` drops keys on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moslora.data.faults import listed
from moslora.data.files import Records
from moslora.wording import nearest

__all__ = [
    "CALLS",
    "FLAGS",
    "HARMLESS",
    "OF_TEMPLATES",
    "THOUGHTS",
    "Unread",
    "idle_entry",
    "says_nothing",
    "unread_keys",
    "without_keys",
]

# Keys that nobody reads and nobody misses, by the reason: none is part of what a model sees or of what it learns.
HARMLESS_BECAUSE: dict[str, tuple[str, ...]] = {
    "it names the row": (
        *("id", "_id", "idx", "index", "uid", "uuid", "guid", "row_id", "example_id", "sample_id", "item_id"),
        *("prompt_id", "question_id", "conversation_id", "conv_id", "dialogue_id", "message_id"),
        *("__index_level_0__", "Unnamed: 0"),  # pandas' own
    ),
    "it says where the row comes from": (
        *(
            "source",
            "data_source",
            "dataset",
            "dataset_name",
            "origin",
            "url",
            "license",
            "author",
            "split",
            "subset",
        ),
        *(
            "created",
            "created_at",
            "updated_at",
            "date",
            "timestamp",
            "version",
            "model",
            "model_name",
            "generator",
        ),
    ),
    "it says what the row is about": (
        *(
            "kind",
            "category",
            "categories",
            "subcategory",
            "topic",
            "subject",
            "domain",
            "type",
            "tag",
            "tags",
        ),
        *("language", "lang", "difficulty", "level"),
    ),
    "it counts or identifies what is there anyway": (
        *("num_turns", "n_turns", "length", "num_tokens", "n_tokens", "token_count", "hash", "sha256", "md5"),
    ),
    "it is a note": ("metadata", "meta", "comment", "comments", "note", "notes"),
}
HARMLESS: dict[str, str] = {key: why for why, keys in HARMLESS_BECAUSE.items() for key in keys}

# Keys of a message for an assistant's thoughts, and for the tools that it calls.
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts")
CALLS = ("tool_calls", "function_call")
_THOUGHTS = "thoughts are read in an assistant's message, not beside the conversation"
_CALLS = "calls of tools are read in an assistant's message, not beside the conversation"
# What to do about keys that are often met, instead of dropping them.
WAYS: dict[str, str] = {
    "system": "plain text has no system turn",
    "history": "write earlier turns as 'messages'",
    "image": "images need task=vision: remove the column to train on the text alone",
    "images": "images need task=vision: remove the column to train on the text alone",
    "context": "put it into the prompt",
    "documents": "give them as chat_template_kwargs: {documents: …}",
    "enable_thinking": "give it as chat_template_kwargs: {enable_thinking: …}",
    "reasoning_content": _THOUGHTS,
    "reasoning": _THOUGHTS,
    "thinking": _THOUGHTS,
    "thoughts": _THOUGHTS,
    "tool_calls": _CALLS,
    "tool_call_id": _CALLS,
    "function_call": _CALLS,
    "chosen": "pairs of answers need task=preference",
    "rejected": "pairs of answers need task=preference",
    "mask": "say weight: 0 or weight: 1 instead, which can be read in one way only",
    "label": "remove the rows that are not to be learned, then drop the column",
    "weight": "examples are weighted alike: remove those that are not to be learned, then drop the column",
}
# Flags of a message that say whether it is learned, and whether true means that it is.
FLAGS: dict[str, bool] = {
    **dict.fromkeys(("weight", "train", "training", "trainable", "trained", "learn"), True),
    **dict.fromkeys(("loss", "loss_mask", "step_loss_mask"), True),
    "masked": False,
}
CONVERSATIONS = frozenset(("messages", "conversations", "prompt", "completion", "chosen", "rejected"))
OF_MESSAGES = frozenset(("role", "content", "from", "value", *THOUGHTS, *CALLS, "tool_call_id"))
OF_TOOLS = frozenset(("tool", "function", "ipython", "observation"))  # whose name says which tool
# Columns that go to the chat template, where there is one.
OF_TEMPLATES = ("tools", "chat_template_kwargs")


def says_nothing(value: Any, levels: int = 20) -> bool:
    """Return whether a value says as little as an absent key: null, empty, or made of such; tables fill gaps so."""
    if value is None or (isinstance(value, str) and not value):
        return True
    if not levels or not isinstance(value, Mapping | list | tuple):
        return False
    return all(
        says_nothing(one, levels - 1) for one in (value.values() if isinstance(value, Mapping) else value)
    )


def _unread_of_turns(turns: Any, column: str) -> Iterator[tuple[str, str]]:
    """Yield keys of messages that nobody reads, as ``messages.name`` and as ``messages[3].name``."""
    for index, turn in enumerate(turns if isinstance(turns, list) else ()):
        if not isinstance(turn, Mapping):
            continue
        for key, value in turn.items():
            known = key in OF_MESSAGES or key in FLAGS or key in HARMLESS
            known = known or (key == "name" and (turn.get("role") or turn.get("from")) in OF_TOOLS)
            if not known and not says_nothing(value):
                yield f"{column}.{key}", f"{column}[{index}].{key}"


def unread_keys(
    row: Mapping[str, Any], read: Iterable[str], known: Iterable[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yield what nobody reads of a row.

    Args:
        row: Named fields.
        read: Columns that are read; messages in them are looked at too.
        known: Columns that are left aside knowingly.

    Yields:
        The key as ``data.ignore`` takes it, and where it is, as ``messages[3].name``.
    """
    for column, value in row.items():
        if column in read:
            if column in CONVERSATIONS:
                yield from _unread_of_turns(value, column)
        elif column not in known and column not in HARMLESS and not says_nothing(value):
            yield str(column), str(column)


class Unread:
    """Collects keys that nobody reads, each once, with the first row that has it and the number of rows."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}
        self._rows: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._first)

    def add(self, place: str, keys: Iterable[tuple[str, str]]) -> None:
        """Note the keys of a row, as ``unread_keys`` gives them."""
        for key, where in dict(keys).items():
            self._first.setdefault(key, (place, where))
            self._rows[key] = self._rows.get(key, 0) + 1

    def merge(self, later: Unread) -> None:
        """Note what another has collected of later rows."""
        for key, first in later._first.items():
            self._first.setdefault(key, first)
            self._rows[key] = self._rows.get(key, 0) + later._rows[key]

    def faults(self) -> list[str]:
        """Return one fault per key, in words."""
        return [
            f"{place}: field {where!r} would be ignored{self._others(key)}{self._way(key)}"
            for key, (place, where) in self._first.items()
        ]

    def _others(self, key: str) -> str:
        more = self._rows[key] - 1
        return f" (and in {more} more row{'s' if more > 1 else ''})" if more else ""

    def _way(self, key: str) -> str:
        way = WAYS.get(key.rpartition(".")[2])
        return f"; {way}" if way else ""

    def advice(self) -> str:
        """Return how all of them are dropped on purpose."""
        return f"To drop what nobody reads: data.ignore=[{listed(self._first)}]."


def without_keys(records: Records, ignore: Sequence[str]) -> tuple[Records, set[str]]:
    """Drop keys from rows.

    Args:
        records: Rows.
        ignore: Columns, or keys of the objects in a column with dots between: ``messages.weight``, also in lists.

    Returns:
        The rows without them, and which of ``ignore`` some row had.
    """
    present: set[str] = set()
    if not ignore:
        return records, present
    rows = records.rows
    for key in ignore:
        rows = [_without(row, key, key, present) for row in rows]
    return replace(records, rows=rows), present


def _without(value: Any, path: str, key: str, present: set[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, path, key, present) for item in value]
    if not isinstance(value, dict):
        return value
    if path in value:  # a column's own name may have dots
        present.add(key)
        return {name: item for name, item in value.items() if name != path}
    head, _, rest = path.partition(".")
    if not rest or head not in value:
        return value
    return {**value, head: _without(value[head], rest, key, present)}


def idle_entry(key: str, records: Records) -> str:
    """Return what to say about an entry of ``data.ignore`` that no row has."""
    names = {str(name) for row in records.rows[:100] for name in row}
    names |= {
        f"{column}.{name}"
        for row in records.rows[:100]
        for column, turns in row.items()
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict)
        for name in turn
    }
    near = nearest(key, sorted(names))
    return f"data.ignore has {key!r}, which no row has." + (f" Did you mean {near!r}?" if near else "")
