"""Training data of any supported file, as examples; what is bad is named, and never skipped in silence.

file, folder or hub id ──read_records──▶ Records ──to_examples──▶ Examples ──split_heldout──▶ train, held out
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from moslora.errors import DataError

__all__ = [
    "FORMATS",
    "Example",
    "Message",
    "Records",
    "overlap",
    "parse_json",
    "prompt_of",
    "read_records",
    "split_heldout",
    "to_examples",
]

SHOWN = 5  # faults spelled out in one error; the rest are counted
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BOM = b"\xef\xbb\xbf"

REFUSED = {
    ".gz": "it is compressed, and line numbers and its hash would be those of other bytes: run gunzip on it",
    ".bz2": "it is compressed: run bunzip2 on it",
    ".xz": "it is compressed: run unxz on it",
    ".zst": "it is compressed: run unzstd on it",
    ".zip": "it is an archive: unpack it",
    ".tar": "it is an archive: unpack it",
    ".xlsx": "spreadsheets have no single table: save the sheet as CSV",
    ".txt": 'plain text has no rows: write one {"text": …} per line into a .jsonl file',
    ".arrow": "save it as Parquet: dataset.to_parquet(…)",
    ".pkl": "unpickling a file runs the code in it: save the rows as JSONL",
    ".pickle": "unpickling a file runs the code in it: save the rows as JSONL",
}

# The roles of ShareGPT stand beside the usual ones.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

# These would change what the model sees or learns, so dropping them would be wrong in silence.
UNREAD_COLUMNS = {
    "system": "put it into the conversation as a first message with role 'system', or rename the column",
    "tools": "tool definitions are not supported: remove the column",
    "history": "write earlier turns as 'messages'",
    "image": "images need task=vision: remove the column to train on the text alone",
    "images": "images need task=vision: remove the column to train on the text alone",
}
UNREAD_IN_MESSAGES = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight", "train")


class _FieldError(ValueError):
    """What is wrong with one row; the caller knows where the row stands."""


@dataclass
class _Faults:
    """Collects faults while reading goes on, so that one error names several."""

    source: str
    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, what: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {what}" if place else what)

    def raise_if_any(self, advice: str) -> None:
        if self.count:
            raise DataError(self.source, self.first, advice, self.count - len(self.first))


@dataclass(frozen=True)
class Records:
    """Rows as a file holds them, not yet interpreted.

    Attributes:
        rows: Column name to value, one mapping per row.
        places: Where each row stands, e.g. ``"line 17"`` (JSONL, CSV) or ``"row 17"``; both count from 1.
        source: The file that was read, or the hub id.
        sha256: Hash of the file's bytes; of the rows as JSON for a hub id.
    """

    rows: list[dict[str, Any]]
    places: list[str]
    source: str
    sha256: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``"system"``, ``"user"`` or ``"assistant"``.
        content: Its text.
        trained: Whether an assistant's turn is learned; false for turns that a prompt quotes.
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """One training example: as a conversation, as prompt and completion, as text, or in both first forms.

    Attributes:
        place: Where it stands in the file.
        messages: The conversation, for a chat template.
        prompt: What comes before ``completion`` in plain layout.
        completion: What is learned in plain layout.
        text: Text that is learned as a whole.
        extra: The other columns, untouched.
    """

    place: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


# ---- reading ---------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Parse JSON by the letter: no NaN, no infinite number, no key twice, no half of a character.

    Args:
        text: One JSON document, white space around it allowed.

    Returns:
        The value, as ``json.loads`` gives it.

    Raises:
        ValueError: With the fault and, for bad syntax, line and column.
    """
    try:
        value = _STRICT.decode(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a lone half would only fail much later, in a tokenizer
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        line = f"line {problem.lineno}, " if problem.lineno > 1 else ""
        raise ValueError(f"{problem.msg} ({line}column {problem.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("a \\ud… escape without its other half, which is no character") from None
    except RecursionError:
        raise ValueError("too many levels inside one another") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} appears twice in one object")
    return keys


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"number {digits} is too large")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)

_Rows = Iterator[tuple[str, Any]]  # place, value


def _decode(raw: bytes, start: int) -> str:
    """Decode UTF-8 that stands ``start`` bytes into its file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        offset = start + problem.start
        raise ValueError(f"byte 0x{raw[problem.start]:02x} at offset {offset} is not UTF-8") from None


def _read_json_lines(file: BinaryIO, faults: _Faults) -> _Rows:
    start = 0
    for number, raw in enumerate(file, 1):
        body = raw.removeprefix(BOM) if number == 1 else raw
        try:
            line = _decode(body, start + len(raw) - len(body))
            if line.strip():
                yield f"line {number}", parse_json(line)
        except ValueError as problem:
            looks_whole = number == 1 and body.strip() in (b"[", b"{")
            hint = "; the file looks like one JSON document: name it .json" if looks_whole else ""
            faults.add(f"line {number}", f"{problem}{hint}")
        start += len(raw)


def _read_json(file: BinaryIO, faults: _Faults) -> _Rows:
    raw = file.read()
    body = raw.removeprefix(BOM)
    try:
        text = _decode(body, len(raw) - len(body))
        value = parse_json(text) if text.strip() else []
    except ValueError as problem:
        is_lines = "Extra data" in str(problem) and body.lstrip().startswith(b"{")
        hint = "; the file looks like JSON Lines: name it .jsonl" if is_lines else ""
        faults.add("", f"{problem}{hint}")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if isinstance(rows, list):
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    else:
        what = f"an object with keys {_names(value)}" if isinstance(value, dict) else _kind(value)
        faults.add("", f'the document is {what}; expected a list of objects, or {{"data": [...]}}')


def _read_csv(file: BinaryIO, faults: _Faults, delimiter: str = ",") -> _Rows:
    raw = file.read()
    body = raw.removeprefix(BOM)
    limit = csv.field_size_limit(2**31 - 1)  # the module's 128 KiB are less than one long document
    try:
        text = _decode(body, len(raw) - len(body))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = next((row for row in reader if row), [])
        if problem := _header_fault(header, delimiter):
            faults.add(f"line {max(reader.line_num, 1)}", problem)
            return
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield f"line {line}", dict(zip(header, cells, strict=True))
            elif cells:
                faults.add(f"line {line}", f"has {len(cells)} fields; the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as problem:
        faults.add(f"line {reader.line_num}", f"{problem}")
    except ValueError as problem:
        faults.add("", f"{problem}")
    finally:
        csv.field_size_limit(limit)


def _header_fault(header: list[str], delimiter: str) -> str:
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        return f"column {twice[0]!r} appears twice in the header"
    if len(header) == 1 and (other := next((c for c in ",;\t|" if c != delimiter and c in header[0]), "")):
        way = {"\t": "name the file .tsv", ",": "name the file .csv"}.get(other, "save it with commas")
        return f"the header is the one column {_quote(header[0])}; the separator seems to be {other!r}: {way}"
    return ""


def _read_tsv(file: BinaryIO, faults: _Faults) -> _Rows:
    return _read_csv(file, faults, delimiter="\t")


def _read_parquet(file: BinaryIO, faults: _Faults) -> _Rows:
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except Exception as problem:  # pyarrow raises a dozen types; each means that the file cannot be read
        faults.add(f"after row {number}" if number else "", f"not readable as Parquet: {problem}")


READERS: dict[str, Callable[[BinaryIO, _Faults], _Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def read_records(source: str, split: str = "train", limit: int | None = None) -> Records:
    """Read the rows of a file, a folder or a hub data set.

    Args:
        source: A ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; a folder with
            one such file named after ``split``; or a hub id ``org/name``, when no such path exists.
        split: Which split of a folder or hub data set.
        limit: Read at most this many rows (at least 1); all by default.

    Returns:
        At least one row.

    Raises:
        DataError: If the source is missing, unreadable, empty, or holds a row that is no object.
        ValueError: If ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} reads nothing; give 1 or more, or leave it out.")
    try:
        path = _locate(source, split)
        if path is None:
            return _read_hub(source, split, limit)
        return _read_file(path, limit)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise DataError(source, [f"cannot be read: {reason}"], "Check the path and its rights.") from problem


def _read_file(path: Path, limit: int | None) -> Records:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        near = difflib.get_close_matches(suffix, READERS, 1)
        reason = REFUSED.get(suffix) or (f"did you mean {near[0]}?" if near else "its format is unknown")
        raise DataError(
            str(path), [f"{suffix or 'no extension'} is not read; {reason}"], f"Read are {_names(READERS)}."
        )
    faults = _Faults(str(path))
    rows: list[dict[str, Any]] = []
    places = []
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not file.tell():
            raise DataError(str(path), ["the file is empty"], "Put at least one row into it.")
        file.seek(0)
        for place, row in islice(READERS[suffix](file, faults), limit):
            if isinstance(row, dict):
                rows.append(row)
                places.append(place)
            else:
                faults.add(place, f"is {_kind(row)}; expected an object with named fields")
    faults.raise_if_any("Correct or remove what is named; no row was skipped.")
    if not rows:
        raise DataError(str(path), ["the file holds no rows"], "Put at least one row into it.")
    return Records(rows, places, str(path), sha256)


def _locate(source: str, split: str) -> Path | None:
    """Return the file to read, or None when ``source`` is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _file_of_split(path, split)
    if path.exists():
        return path
    looks_like_file = path.suffix.lower() in {*READERS, *REFUSED} or path.parent.is_dir()
    if HUB_ID.fullmatch(source) and not looks_like_file:
        return None
    if not path.parent.is_dir():
        raise DataError(source, [f"there is no folder {path.parent}"], "Check the path.")
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, 0.5)
    hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path, or give a hub id org/name."
    raise DataError(source, ["there is no such file or folder"], hint)


def _file_of_split(folder: Path, split: str) -> Path:
    # The hub's own layout names a single shard train-00000-of-00001.parquet.
    shard = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
    readable = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in READERS and not f.name.startswith(".")
    )
    found = [f for f in readable if shard.fullmatch(f.stem)]
    if len(found) == 1:
        return found[0]
    if found:
        fault = f"{len(found)} files hold the split {split!r}: {_names(f.name for f in found)}"
        raise DataError(str(folder), [fault], "Name the one to read, or join them into one.")
    if readable:
        fault = f"no file is named after the split {split!r}; found {_names(f.name for f in readable)}"
        raise DataError(
            str(folder), [fault], f"Name a file itself, or rename one to {split}{readable[0].suffix}."
        )
    fault = "the folder is empty" if not any(folder.iterdir()) else "no file in the folder can be read"
    raise DataError(str(folder), [fault], f"Put {split}.jsonl into it; read are {_names(READERS)}.")


def _read_hub(source: str, split: str, limit: int | None) -> Records:
    from datasets import load_dataset

    advice = "Check the name, the split and the network, or give a file; no code of a data set is ever run."
    try:
        table = load_dataset(source, split=split if limit is None else f"{split}[:{limit}]")
        rows = [dict(row) for row in table]
    except Exception as problem:  # the hub's client has dozens, from HTTP errors to missing configurations
        fault = f"not on disk, and not loaded from the hub as a data set: {_quote(str(problem), 300)}"
        raise DataError(source, [fault], advice) from problem
    if not rows:
        raise DataError(source, [f"the split {split!r} holds no rows"], advice)
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return Records(rows, [f"row {n}" for n in range(1, len(rows) + 1)], source, sha256.hexdigest())


# ---- rows to examples ------------------------------------------------------------------------------------

_Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Shape:
    required: tuple[str, ...]
    build: Callable[[_Row], dict[str, Any]]
    optional: tuple[str, ...] = ()
    other_name: str = ""  # another column that may stand for the one required

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
        quoted = [Message(m.role, m.content, trained=False) for m in _turns(row, "prompt")]
        return {"messages": _with_answer((*quoted, *_turns(row, "completion")), "completion", len(quoted))}
    if isinstance(row.get("prompt"), list) != isinstance(row.get("completion"), list):
        kinds = f"{_kind(row.get('prompt'))} and {_kind(row.get('completion'))}"
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
    "messages": _Shape(("messages",), _conversation, other_name="conversations"),  # ShareGPT's name
    "prompt-completion": _Shape(("prompt", "completion"), _prompt_completion),
    "alpaca": _Shape(("instruction", "output"), _alpaca, optional=("input",)),
    "text": _Shape(("text",), lambda row: {"text": _text(row, "text")}),
}
FORMATS = ("auto", *SHAPES)


def to_examples(records: Records, format: str = "auto") -> list[Example]:
    """Interpret rows: conversations, prompt and completion, Alpaca's columns, or text.

    Args:
        records: Rows, as :func:`read_records` gives them.
        format: One of ``FORMATS``; ``"auto"`` tells by the columns and refuses what fits more than one.

    Returns:
        One example per row, in order.

    Raises:
        DataError: If a row does not fit, naming place and field.
        ValueError: If ``format`` is unknown.
    """
    if format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"format={format!r} is unknown; {hint}Choose one of {_names(FORMATS)}.")
    name = _recognise(records) if format == "auto" else format
    shape = SHAPES[name]
    faults = _Faults(records.source)
    examples = []
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            examples.append(_example(place, row, shape))
        except _FieldError as problem:
            others = [other for other in _fitting(row) if other != name]
            mixed = f" (the row fits format {others[0]!r}, the file {name!r})" if others else ""
            faults.add(place, f"{problem}{mixed}")
    faults.raise_if_any(f"Correct or remove these rows (read as data.format={name}); none was skipped.")
    return examples


def _example(place: str, row: _Row, shape: _Shape) -> Example:
    own = {*shape.required, *shape.optional, shape.other_name}
    fields = shape.build(row)
    for column, way in UNREAD_COLUMNS.items():
        if fields.get("text") is None and column not in own and row.get(column):
            raise _FieldError(f"field {column!r} would be left unread; {way}")
    return Example(place, **fields, extra={key: value for key, value in row.items() if key not in own})


def _fitting(row: _Row) -> list[str]:
    return [name for name, shape in SHAPES.items() if shape.fits(row)]


def _recognise(records: Records) -> str:
    """Return the one format that the rows have, by their columns."""
    fits = [_fitting(row) for row in records.rows]
    for place, names in zip(records.places, fits, strict=True):
        if len(names) > 1:
            fault = f"{place}: the columns {_names(records.rows[0])} fit more than one format"
            ways = " or ".join(f"data.format={name}" for name in names)
            raise DataError(records.source, [fault], f"Say which one is meant: {ways}.")
    counts = Counter(name for names in fits for name in names)
    if counts:
        return counts.most_common(1)[0][0]
    row = records.rows[0]
    closeness = {n: sum(bool(_near(c, row) or c in row) for c in s.required) for n, s in SHAPES.items()}
    best = max(closeness, key=lambda name: closeness[name] / len(SHAPES[name].required))
    if closeness[best]:
        return best
    known = "; ".join(" + ".join(shape.required) for shape in SHAPES.values())
    fault = f"{records.places[0]}: the columns {_names(row)} are none of those known ({known})"
    raise DataError(records.source, [fault], "Rename the columns.")


def _near(name: str, names: Iterable[str]) -> str:
    known = {column for shape in SHAPES.values() for column in (*shape.required, *shape.optional)}
    return next(iter(difflib.get_close_matches(name, [n for n in names if n not in known], 1, 0.75)), "")


def _missing(name: str, row: _Row) -> _FieldError:
    near = _near(name, [str(key) for key in row])
    return _FieldError(
        f"field {name!r} is missing; " + (f"rename {near!r}" if near else f"found {_names(row)}")
    )


def _text(row: _Row, column: str, empty: bool = False) -> str:
    if column not in row:
        raise _missing(column, row)
    return _checked_text(row[column], column, empty)


def _checked_text(value: Any, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise _FieldError(f"field {where!r} is {_kind(value)}; expected text")
    if not (empty or value.strip()):
        raise _FieldError(f"field {where!r} is empty; expected text")
    return value


def _turns(row: _Row, column: str) -> tuple[Message, ...]:
    if column not in row:
        raise _missing(column, row)
    if not isinstance(row[column], list):
        raise _FieldError(f"field {column!r} is {_kind(row[column])}; expected a list of messages")
    if not row[column]:
        raise _FieldError(f"field {column!r} is an empty list; expected messages")
    return tuple(_turn(value, f"{column}[{index}]") for index, value in enumerate(row[column]))


def _turn(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise _FieldError(f"field {where!r} is {_kind(value)}; expected an object with role and content")
    role_key = "role" if value.get("role") is not None or "from" not in value else "from"
    text_key = "content" if value.get("content") is not None or "value" not in value else "value"
    for key in (role_key, text_key):
        if key not in value:
            near = difflib.get_close_matches(key, [str(name) for name in value], 1)
            found = f"rename {near[0]!r}" if near else f"found {_names(value)}"
            raise _FieldError(f"field {where + '.' + key!r} is missing; {found}")
    role = _checked_text(value[role_key], f"{where}.{role_key}")
    if role not in ROLES:
        hint = "; tool calls are not supported" if role in ("tool", "function", "ipython") else ""
        raise _FieldError(
            f"field {f'{where}.{role_key}'!r} is {_quote(role)}; expected one of {_names(ROLES)}{hint}"
        )
    unread = next((key for key in UNREAD_IN_MESSAGES if value.get(key) not in (None, "", [])), None)
    if unread:
        raise _FieldError(f"field {f'{where}.{unread}'!r} is not supported, and would be left unread")
    # An empty system or user turn is odd but harmless; an empty answer teaches silence.
    return Message(
        ROLES[role], _checked_text(value[text_key], f"{where}.{text_key}", ROLES[role] != "assistant")
    )


def _with_answer(messages: tuple[Message, ...], column: str, start: int = 0) -> tuple[Message, ...]:
    """Check that there is an answer to learn and something that it answers."""
    if not any(message.role == "assistant" for message in messages[start:]):
        roles = _names(message.role for message in messages[start:])
        raise _FieldError(
            f"field {column!r} has no assistant turn (roles: {roles}); nothing could be learned"
        )
    if messages[0].role == "assistant":
        raise _FieldError(f"field {column!r} opens with an assistant turn, which answers nothing; remove it")
    return messages


# ---- held-out examples -----------------------------------------------------------------------------------


def prompt_of(example: Example) -> str:
    """Return what identifies the prompt of an example: everything before its last answer, or its text."""
    if example.text is not None:
        return example.text
    if example.messages is None:
        return example.prompt or ""
    last = max(i for i, message in enumerate(example.messages) if message.role == "assistant")
    return json.dumps([(message.role, message.content) for message in example.messages[:last]])


def split_heldout(
    examples: Sequence[Example],
    fraction: float,
    seed: int,
    identity: Callable[[Example], Sequence[str]] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Split by a hash of each example's content, so that later additions do not move what is there.

    Equal examples land on one side. The share held out is ``fraction`` on average; where chance leaves a side
    empty, the nearest example crosses over.

    Args:
        examples: At least two that differ.
        fraction: Share to hold out, between 0 and 1.
        seed: Another seed is another split.
        identity: What makes examples equal, such as the pictures that they show; their content if None.

    Returns:
        Training and held-out examples, both in the order given, none empty.

    Raises:
        ValueError: If ``fraction`` is out of range, or fewer than two examples differ.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1, both excluded.")
    draws = [_draw(_content(e) if identity is None else list(identity(e)), seed) for e in examples]
    if len(set(draws)) < 2:
        raise ValueError(
            f"{len(examples)} examples with {len(set(draws))} distinct cannot be split in two; add some."
        )
    lowest, highest = min(draws), max(draws)
    held = [draw == lowest or (draw < fraction and draw != highest) for draw in draws]
    train = [example for example, out in zip(examples, held, strict=True) if not out]
    return train, [example for example, out in zip(examples, held, strict=True) if out]


def _content(example: Example) -> list[Any]:
    turns = [astuple(message) for message in example.messages or ()]
    return [turns, example.prompt, example.completion, example.text]


def _draw(content: Sequence[Any], seed: int) -> float:
    """Return a number in [0, 1) that depends on content and seed alone."""
    written = json.dumps([seed, *content])
    return int.from_bytes(hashlib.sha256(written.encode()).digest()[:6], "big") / 2**48


def overlap(train: Iterable[Example], heldout: Iterable[Example]) -> int:
    """Return how many held-out examples have a prompt that training has too."""
    seen = {prompt_of(example) for example in train}
    return sum(prompt_of(example) in seen for example in heldout)


# ---- words for errors ------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text",
             list: "a list", dict: "an object"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def _quote(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def _names(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")
