"""Stored examples as token ids and labels in Arrow files, and the counts of a set without a look at its tokens."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from moslora.data.batched import batched
from moslora.data.encoding import SHOWN_ROWS, Summary, encode_all, none_left, several_failed, summarized
from moslora.data.shapes import Example, answers_apart
from moslora.data.stored.cache import entry, key_of
from moslora.data.stored.examples import Stored, StoredExamples, read_examples
from moslora.data.stored.tables import open_tables, write_batches
from moslora.data.stored.workers import Workers
from moslora.data.tokenization import Encoded, Encoder, trained_count
from moslora.errors import EncodingError

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset

__all__ = ["EncodedSet", "each_apart", "encode_any", "encode_stored", "tokenizer_hash"]

FLAGS = ("cut", "without_end", "prompt_differs", "control_text", "loses_context", "misspelt")
NUMBERS = ("tokens", "trained_tokens", "full_length", "largest")
# What decides how a text becomes tokens, beside this package's code and the tokenizer.
LIBRARIES = ("transformers", "tokenizers", "jinja2")


def encode_any(examples: Sequence[Example], encoder: Encoder) -> tuple[Sequence[Encoded], Summary]:
    """Encode examples where they are: in memory, or in files.

    Args:
        examples: The examples.
        encoder: How to encode them.

    Returns:
        As ``encode_all``.

    Raises:
        EncodingError: As ``encode_all``.
    """
    if isinstance(examples, StoredExamples):
        return encode_stored(examples, encoder)
    return encode_all(examples, encoder)


def each_apart(examples: Sequence[Example]) -> Any:
    """Make an example of each answer of every conversation; stored ones are taken apart when they are encoded.

    Args:
        examples: In memory, or in files.
    """
    if isinstance(examples, StoredExamples):
        return examples
    return [one for example in examples for one in answers_apart(example)]


def encode_stored(examples: StoredExamples, encoder: Encoder) -> tuple[EncodedSet, Summary]:
    """Encode stored examples; errors and counts are those of ``encode_all``.

    Every example of a file is encoded, whichever of them are asked for, so that another split finds them.

    Args:
        examples: Some of the examples of one or several files.
        encoder: How to encode them.

    Returns:
        The encoded examples in order, without those dropped, and the counts.

    Raises:
        EncodingError: If examples cannot be encoded, naming the first and how many more; or if none is left.
    """
    parts = [_Part(one, encoder, examples.workers) for one in examples.parts]
    every = EncodedSet(parts, _rows_of(parts, examples.rows))
    numbers = {name: every.column(name) for name in (*NUMBERS, *FLAGS, "dropped", "failed", "is_start")}
    failed = numbers["failed"].nonzero()[0]
    if len(failed):
        told = [(every.place(at), every.problem(at)) for at in failed[: 1 + SHOWN_ROWS].tolist()]
        raise several_failed(told, len(failed))
    kept = every.select((~numbers["dropped"]).nonzero()[0])
    summary = _summary(every, numbers, encoder)
    if not len(kept):
        raise none_left(len(examples), encoder, summary.longest)
    return kept, summary


def _rows_of(parts: Sequence[_Part], rows: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Return which encoded rows come from examples: of a conversation whose answers are apart there are several."""
    import numpy

    if not any(part.is_apart for part in parts):
        return rows
    counts = numpy.concatenate([part.rows_of_each for part in parts])
    starts = numpy.concatenate([[0], numpy.cumsum(counts)])
    counts, starts = counts[rows], starts[rows]
    ends = numpy.cumsum(counts)
    within = numpy.arange(ends[-1] if len(ends) else 0) - numpy.repeat(ends - counts, counts)
    return numpy.repeat(starts, counts) + within  # type: ignore[no-any-return]


def _summary(every: EncodedSet, numbers: dict[str, Any], encoder: Encoder) -> Summary:
    kept = ~numbers["dropped"]
    counts = {"examples": int(kept.sum()), "dropped": int((~kept).sum())}
    counts |= {name: int(numbers[name].sum(where=kept)) for name in ("tokens", "trained_tokens")}
    flagged = {name: (numbers[name] & kept).nonzero()[0] for name in FLAGS} | {
        "dropped": (~kept).nonzero()[0]
    }
    counts |= {name: len(positions) for name, positions in flagged.items()}
    first = {
        name: [every.place(at) for at in positions[:SHOWN_ROWS].tolist()]
        for name, positions in flagged.items()
        if len(positions)
    }
    longest = int(numbers["full_length"].argmax()) if len(kept) else 0
    length = int(numbers["full_length"][longest]) if len(kept) else 0
    is_least = bool(numbers["is_start"][longest]) if length else False
    return summarized(encoder, counts, first, length, is_least)


@dataclass(frozen=True, eq=False)
class _Part:
    """The encoded rows of one file.

    Attributes:
        stored: Its examples.
        encoder: How they were encoded.
        workers: The processes that encode them, if they are not there yet.
    """

    stored: Stored
    encoder: Encoder
    workers: Workers

    @property
    def is_apart(self) -> bool:
        """Whether each answer of a conversation is an example of its own."""
        return self.encoder.train_on == "each"

    @cached_property
    def table(self) -> Dataset:
        """The rows, mapped into memory."""
        folder, _ = entry(
            self._key(),
            self._make,
            self.workers.check,
            lambda: self.workers.display.say("Another process tokenizes these data; waiting for it."),
        )
        files = [folder / f"tokens-{number:05}.arrow" for number in range(len(self.stored.counts))]
        return open_tables(files)

    @cached_property
    def rows_of_each(self) -> numpy.ndarray[Any, Any]:
        """How many rows each example has."""
        import numpy

        if not self.is_apart:
            return numpy.ones(sum(self.stored.counts), dtype=numpy.int64)
        firsts = self.table.data.column("is_first").to_numpy()
        starts = numpy.append(firsts.nonzero()[0], len(firsts))
        return numpy.diff(starts)

    def _key(self) -> str:
        encoder = self.encoder
        source = str(encoder.tokenizer.chat_template or "")
        return key_of(
            {
                "what": "tokens",
                "examples": self.stored.key,
                "tokenizer": tokenizer_hash(encoder.tokenizer),
                "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
                "template": encoder.template,
                "train_on": encoder.train_on,
                "max_length": encoder.max_length,
                "too_long": encoder.too_long,
                # A template may write the date.
                "date": time.strftime("%Y-%m-%d") if "strftime_now" in source else "",
            }
        )

    def _make(self, folder: Path) -> dict[str, Any]:
        encoder = batched(self.encoder)
        stop_ids = encoder.stop_ids  # before there are several processes

        def work(part: tuple[int, Path], check: Callable[[], None]) -> None:
            number, path = part

            def batches() -> Iterator[dict[str, Any]]:
                for examples in read_examples(path):
                    check()
                    yield _columns(examples, encoder, stop_ids, self.is_apart)

            write_batches(folder / f"tokens-{number:05}.arrow", _schema(), batches())

        files = self.stored.files
        label = f"Tokenizing {self.stored.name}".rstrip()
        for _ in self.workers.run(label, work, list(enumerate(files)), self.stored.counts):
            pass
        return {}


def _schema() -> Any:
    import pyarrow  # type: ignore[import-untyped]

    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema(
        [
            ("input_ids", ids),
            ("labels", ids),
            ("prompt_length", pyarrow.int32()),
            ("prompt_ids", ids),  # empty where the tokens begin with them
            ("answer", pyarrow.large_string()),
            ("place", pyarrow.string()),
            ("problem", pyarrow.string()),
            *((name, pyarrow.int32()) for name in NUMBERS),
            *((name, pyarrow.bool_()) for name in (*FLAGS, "dropped", "failed", "is_start", "is_first")),
        ]
    )


def _columns(
    examples: Sequence[Example], encoder: Any, stop_ids: frozenset[int], is_apart: bool
) -> dict[str, Any]:
    """Encode a batch of examples, as columns."""
    several = [answers_apart(example) if is_apart else [example] for example in examples]
    flat = [one for group in several for one in group]
    firsts = [not number for group in several for number in range(len(group))]
    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for example, whole, is_first in zip(flat, encoder.encode_many(flat), firsts, strict=True):
        row: dict[str, Any] = dict.fromkeys(columns, 0)
        row |= dict.fromkeys(("input_ids", "labels", "prompt_ids"), ())
        row |= {"answer": "", "place": example.place, "problem": "", "is_first": is_first}
        try:
            if isinstance(whole, EncodingError):
                raise whole
            row |= _row(whole, encoder.fit(whole), stop_ids)
        except EncodingError as problem:
            row |= {"failed": True, "problem": str(problem)}
        for name, value in row.items():
            columns[name].append(value)
    lists = {name: _as_lists(columns[name]) for name in ("input_ids", "labels", "prompt_ids")}
    flags = {name: list(map(bool, columns[name])) for name in (*FLAGS, "dropped", "failed", "is_start")}
    return {**columns, **lists, **flags}


def _row(whole: Encoded, fitted: Encoded | None, stop_ids: frozenset[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"full_length": whole.full_length, "is_start": whole.is_start}
    if fitted is None:
        return {**row, "dropped": True}
    ids, prompt = fitted.input_ids, fitted.prompt_ids
    return {
        **row,
        "input_ids": ids,
        "labels": fitted.labels,
        "prompt_length": len(prompt),
        "prompt_ids": () if ids[: len(prompt)] == prompt else prompt,
        "answer": fitted.answer,
        "tokens": len(ids),
        "trained_tokens": trained_count(fitted.labels),
        "largest": max(ids, default=0),
        "cut": fitted.was_cut,
        "without_end": stop_ids.isdisjoint(fitted.labels),
        "prompt_differs": fitted.prompt_differs,
        "control_text": fitted.control_text,
        "loses_context": fitted.loses_context,
        "misspelt": fitted.misspelt,
    }


def _as_lists(rows: Sequence[Sequence[int]]) -> Any:
    import numpy
    import pyarrow

    offsets = numpy.zeros(len(rows) + 1, dtype=numpy.int32)
    numpy.cumsum([len(row) for row in rows], out=offsets[1:])
    values = [numpy.asarray(row, dtype=numpy.int32) for row in rows]
    flat = numpy.concatenate(values) if values else numpy.zeros(0, dtype=numpy.int32)
    return pyarrow.ListArray.from_arrays(offsets, flat)


@dataclass(frozen=True, eq=False)
class EncodedSet(Sequence[Encoded]):
    """Encoded examples in files that are mapped into memory.

    Attributes:
        parts: The files.
        rows: Which rows of all parts these are, numbered through.
    """

    parts: Sequence[_Part]
    rows: numpy.ndarray[Any, Any]

    @cached_property
    def _table(self) -> Dataset:
        from datasets import concatenate_datasets

        tables = [part.table for part in self.parts]
        return tables[0] if len(tables) == 1 else concatenate_datasets(tables)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedSet: ...
    def __getitem__(self, index: int | slice) -> Encoded | EncodedSet:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        row = self._table[int(self.rows[index])]
        ids = row["input_ids"]
        return Encoded(
            input_ids=ids,
            labels=row["labels"],
            prompt_ids=row["prompt_ids"] or ids[: row["prompt_length"]],
            answer=row["answer"],
            was_cut=row["cut"],
            place=self._placed(self.rows[index], row["place"]),
            full_length=row["full_length"],
            prompt_differs=row["prompt_differs"],
            control_text=row["control_text"],
            is_start=row["is_start"],
            loses_context=row["loses_context"],
            misspelt=row["misspelt"],
        )

    def __iter__(self) -> Iterator[Encoded]:
        return (self[position] for position in range(len(self)))

    def select(self, positions: Any) -> EncodedSet:
        """Return some of these.

        Args:
            positions: Which, in the order that they shall have.
        """
        return replace(self, rows=self.rows[positions])

    def column(self, name: str) -> Any:
        """Return a column of numbers, one for each example.

        Args:
            name: Such as ``tokens``, ``trained_tokens`` or ``largest``.
        """
        return self._table.data.column(name).to_numpy()[self.rows]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return self.column("tokens").tolist()  # type: ignore[no-any-return]

    @property
    def trained_tokens(self) -> int:
        """Tokens that are trained on."""
        return int(self.column("trained_tokens").sum())

    def place(self, position: int) -> str:
        """Return where an example stands in its file."""
        row = int(self.rows[position])
        return self._placed(row, self._table.data.column("place")[row].as_py())

    def problem(self, position: int) -> str:
        """Return why an example cannot be encoded."""
        row = int(self.rows[position])
        return self._placed(row, self._table.data.column("problem")[row].as_py())

    def _placed(self, row: int, place: str) -> str:
        for part in self.parts:
            if row < len(part.table):
                return part.stored.placed(place)
            row -= len(part.table)
        raise IndexError(row)

    def as_dataset(self) -> Dataset:
        """Return token ids and labels as a data set that lies in files."""
        table = self._table.select_columns(["input_ids", "labels"])
        return table if _is_all(self.rows, len(table)) else table.select(self.rows)


def _is_all(rows: numpy.ndarray[Any, Any], count: int) -> bool:
    return len(rows) == count and bool((rows[1:] - rows[:-1] == 1).all()) and (not count or rows[0] == 0)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything that decides how a tokenizer turns text into tokens.

    Args:
        tokenizer: Of transformers.
    """
    if getattr(tokenizer, "is_fast", False):
        state = tokenizer.backend_tokenizer.to_str()
    else:
        from datasets.fingerprint import Hasher

        state = Hasher.hash(tokenizer)
    about = [
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        tokenizer.chat_template,
        {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        {
            name: repr(value)
            for name, value in sorted(tokenizer.init_kwargs.items())
            if name != "name_or_path"
        },
        state,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode()).hexdigest()
