"""Examples that lie in Arrow files: a sequence that holds one batch in memory at a time.

Numbers that a split needs (a draw of each example, a hash of its prompt) are computed once, by several processes, and
kept beside the examples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from moslora.data.messages import Message
from moslora.data.shapes import Example, answers_apart
from moslora.data.splitting import draw_of, mark_of, prompt_of, share_draw
from moslora.data.stored.tables import BATCH, open_tables, read_batches, write_batches
from moslora.data.stored.workers import Workers
from moslora.files import replaced_file

if TYPE_CHECKING:
    import numpy

__all__ = [
    "Stored",
    "StoredExamples",
    "StoredPlaces",
    "joined",
    "places_of",
    "read_examples",
    "write_examples",
]

DRAWS: dict[str, Callable[[Example, int], float | int]] = {
    "split": draw_of,
    "weight": lambda example, seed: int(share_draw(example, seed)[:16], 16),
}


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples.

    Args:
        path: The file.
        examples: They are written in their order.
    """
    import pyarrow  # type: ignore[import-untyped]

    schema = pyarrow.schema(
        {"place": pyarrow.string(), "example": pyarrow.large_string(), "prompt": pyarrow.uint64()}.items()
    )
    write_batches(
        path,
        schema,
        (
            {
                "place": [example.place for example in batch],
                "example": [_as_json(example) for example in batch],
                "prompt": [mark_of(prompt_of(example)) for example in batch],
            }
            for batch in (examples[at : at + BATCH] for at in range(0, len(examples), BATCH))
        ),
    )


def _as_json(example: Example) -> str:
    turns = None
    if example.messages is not None:
        turns = [
            [m.role, m.content, m.trained, m.flag, m.reasoning, [dict(c) for c in m.calls], m.name, m.call_id]
            for m in example.messages
        ]
    own = [turns, example.prompt, example.completion, example.text, dict(example.template_arguments)]
    # Other columns may hold what JSON does not have, as the times of a table; they are shown and never learned.
    return json.dumps([*own, dict(example.extra)], ensure_ascii=False, default=str)


def _from_json(place: str, text: str) -> Example:
    turns, prompt, completion, whole, arguments, extra = json.loads(text)
    messages = None
    if turns is not None:
        messages = tuple(
            Message(role, content, trained, flag, reasoning, tuple(calls), name, call_id)
            for role, content, trained, flag, reasoning, calls, name, call_id in turns
        )
    return Example(place, messages, prompt, completion, whole, arguments, extra)


def read_examples(path: Path) -> Iterator[list[Example]]:
    """Read examples batch by batch.

    Args:
        path: From ``write_examples``.
    """
    for batch in read_batches(path):
        places, texts = batch.column("place").to_pylist(), batch.column("example").to_pylist()
        yield [_from_json(place, text) for place, text in zip(places, texts, strict=True)]


@dataclass(frozen=True)
class Stored:
    """The examples of one file or data set, checked and written.

    Attributes:
        key: The name of their entry in the cache.
        folder: The entry.
        counts: How many examples each of its files has.
        name: What their places begin with; empty if the file is alone.
    """

    key: str
    folder: Path
    counts: Sequence[int]
    name: str = ""

    @property
    def files(self) -> list[Path]:
        """The files with examples, in order."""
        return [self.folder / f"examples-{number:05}.arrow" for number in range(len(self.counts))]

    def placed(self, place: str) -> str:
        """Return a place as messages have it."""
        return f"{self.name}, {place}" if self.name else place

    @cached_property
    def table(self) -> Any:
        """The examples, mapped into memory."""
        return open_tables(self.files)

    def numbers(self, kind: str, seed: int, workers: Workers) -> numpy.ndarray[Any, Any]:
        """Return a number of each example that depends on its content and the seed alone.

        Args:
            kind: A key of ``DRAWS``.
            seed: Another seed gives other numbers.
            workers: Compute them, if they are not there yet.
        """
        import numpy

        place = self.folder / f"{kind}-{seed}.npy"
        count = sum(self.counts)
        try:
            found = numpy.load(place, allow_pickle=False)
            if len(found) == count:
                return found  # type: ignore[no-any-return]
        except (OSError, ValueError, EOFError):
            pass
        draw, kind_of_number = DRAWS[kind], "uint64" if kind == "weight" else "float64"

        def work(path: Path, check: Callable[[], None]) -> Any:
            drawn: list[float | int] = []
            for examples in read_examples(path):
                check()
                drawn += [draw(example, seed) for example in examples]
            return numpy.array(drawn, dtype=kind_of_number)

        label = f"Splitting {self.name}".rstrip()
        parts = list(workers.run(label, work, self.files, self.counts))
        numbers: numpy.ndarray[Any, Any] = numpy.concatenate(parts)
        with replaced_file(place) as part, part.open("wb") as file:
            numpy.save(file, numbers)
        return numbers


@dataclass(frozen=True, eq=False)
class StoredExamples(Sequence[Example]):
    """Examples of one or several files, or some of them.

    Attributes:
        parts: The files.
        rows: Which examples of all parts these are, numbered through.
        workers: The processes that work on them.
    """

    parts: Sequence[Stored]
    rows: numpy.ndarray[Any, Any]
    workers: Workers = field(repr=False, compare=False)

    @cached_property
    def starts(self) -> list[int]:
        """The number of the first example of each part, and of all."""
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + sum(part.counts))
        return starts

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> StoredExamples: ...
    def __getitem__(self, index: int | slice) -> Example | StoredExamples:
        if isinstance(index, slice):
            return replace(self, rows=self.rows[index])
        return next(iter(self._read([int(self.rows[index])])))

    def __iter__(self) -> Iterator[Example]:
        for at in range(0, len(self.rows), BATCH):
            yield from self._read(self.rows[at : at + BATCH].tolist())

    def _read(self, rows: Sequence[int]) -> list[Example]:
        found = []
        for row in rows:
            number, at = self.part_of(row)
            part = self.parts[number]
            stored = part.table[at]
            found.append(_from_json(part.placed(stored["place"]), stored["example"]))
        return found

    def part_of(self, row: int) -> tuple[int, int]:
        """Return which part an example is of, and which of its examples it is.

        Args:
            row: Its number among all.
        """
        for number, (start, end) in enumerate(pairwise(self.starts)):
            if row < end:
                return number, row - start
        raise IndexError(row)

    def select(self, positions: Any) -> StoredExamples:
        """Return some of these.

        Args:
            positions: Which, in the order that they shall have.
        """
        import numpy

        return replace(self, rows=self.rows[numpy.asarray(positions, dtype=numpy.int64)])

    def draws(self, seed: int) -> numpy.ndarray[Any, Any]:
        """Return each one's draw for a split, as ``draw_of`` has it."""
        return self._numbers("split", seed)

    def share_draws(self, seed: int) -> numpy.ndarray[Any, Any]:
        """Return numbers in the order of each one's ``share_draw``."""
        return self._numbers("weight", seed)

    def _numbers(self, kind: str, seed: int) -> numpy.ndarray[Any, Any]:
        import numpy

        found = [part.numbers(kind, seed, self.workers) for part in self.parts]
        return numpy.concatenate(found)[self.rows]  # type: ignore[no-any-return]

    def prompts(self) -> numpy.ndarray[Any, Any]:
        """Return ``mark_of`` each one's prompt."""
        return self.column("prompt")  # type: ignore[no-any-return]

    def column(self, name: str) -> Any:
        """Return a column of numbers."""
        import numpy

        columns = [part.table.data.column(name).to_numpy() for part in self.parts]
        return numpy.concatenate(columns)[self.rows]


def joined(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """Return the examples of several files as one sequence.

    Args:
        parts: Either all in memory, or none.
    """
    import numpy

    if not all(isinstance(part, StoredExamples) for part in parts):
        return [example for part in parts for example in part]
    stored: list[StoredExamples] = list(parts)  # type: ignore[arg-type]
    rows, start = [], 0
    for part in stored:
        rows.append(part.rows + start)
        start += part.starts[-1]
    own = [one for part in stored for one in part.parts]
    return StoredExamples(own, numpy.concatenate(rows), stored[0].workers)


class StoredPlaces(Mapping[str, Example]):
    """Stored examples by their place.

    Args:
        examples: Few enough that their places fit in memory, as held-out ones.
        apart: Whether each answer of a conversation is an example of its own.
    """

    def __init__(self, examples: StoredExamples, apart: bool) -> None:
        self._examples, self._apart = examples, apart

    @cached_property
    def _numbers(self) -> dict[str, int]:
        numbers: dict[str, int] = {}
        for position, row in enumerate(self._examples.rows.tolist()):
            number, at = self._examples.part_of(row)
            part = self._examples.parts[number]
            numbers[part.placed(part.table[at]["place"])] = position
        return numbers

    def __getitem__(self, place: str) -> Example:
        position = self._numbers.get(place)
        if position is not None:
            return self._examples[position]
        whole = self._examples[self._numbers[place.rpartition(", turn ")[0]]] if self._apart else None
        for example in answers_apart(whole) if whole is not None else ():
            if example.place == place:
                return example
        raise KeyError(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def places_of(examples: Iterable[Example], apart: bool = False) -> Mapping[str, Example]:
    """Return examples by their place.

    Args:
        examples: In memory or stored.
        apart: As for ``StoredPlaces``.
    """
    if isinstance(examples, StoredExamples):
        return StoredPlaces(examples, apart)
    return {example.place: example for example in examples}
