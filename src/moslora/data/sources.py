"""Several files as one set of examples, each with settings and a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.columns import without_keys
from moslora.data.files import Records, no_revision, read_records
from moslora.data.finding import locate
from moslora.data.naming import rename_columns
from moslora.data.shapes import Example, to_examples
from moslora.data.splitting import pick, share_draw
from moslora.data.stored.checking import Reading
from moslora.data.stored.examples import StoredExamples
from moslora.data.stored.reading import Place, large, read_stored
from moslora.data.stored.workers import Workers
from moslora.errors import DataError, UsageError

if TYPE_CHECKING:
    from moslora.recipe.data_section import DataSection, SourceSection

__all__ = ["Part", "Weighed", "read_alone", "read_sources", "weigh", "weighted"]


@dataclass(frozen=True)
class Part:
    """What one file gives.

    Attributes:
        records: Its rows, without what is ignored.
        present: Which entries of ``ignore`` some row has.
        examples: The rows, interpreted.
        weight: How often each example is in an epoch.
        name: What it is called beside the others.
    """

    records: Records
    present: set[str]
    examples: Sequence[Example]
    weight: float
    name: str


def read_sources(
    sources: str | Sequence[str | SourceSection],
    data: DataSection,
    split: str,
    limit: int | None,
    workers: Workers | None = None,
) -> list[Part]:
    """Read one file, or several.

    Args:
        sources: ``data.train`` or ``data.heldout``.
        data: The section, whose settings hold where a file has none of its own.
        split: Which split of folders and hub data sets.
        limit: Rows of each file, at most; None for all.
        workers: The processes that read what is too large for memory; None holds everything in memory.

    Returns:
        One part per file, all in memory or all in files. The places of several have their file's name before the line.

    Raises:
        DataError: If one cannot be used.
        UsageError: If several cannot; all are told.
    """
    if isinstance(sources, str):
        alone = _Source(sources, None, data, split, limit)
        _refuse_idle_revision([alone], data)
        return [alone.read(sources, workers if alone.is_large else None)]
    paths = _paths(sources)
    stems = [Path(path).name for path in paths]
    every = [
        _Source(path, None if isinstance(source, str) else source, data, split, limit)
        for source, path in zip(sources, paths, strict=True)
    ]
    _refuse_idle_revision(every, data)
    if not any(source.is_large for source in every):
        workers = None
    parts, problems = [], []
    for source, stem in zip(every, stems, strict=True):
        try:
            parts.append(source.read(stem if stems.count(stem) == 1 else source.path, workers, several=True))
        except DataError as problem:
            problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError("\n".join(map(str, problems)))
    return parts


def read_alone(source: str, data: DataSection, split: str, limit: int | None) -> Records:
    """Read the rows of one source into memory, for tasks that take one.

    Args:
        source: ``data.train`` or ``data.heldout``.
        data: The section, of which ``subset`` and ``revision`` count.
        split: Which split of folders and hub data sets.
        limit: Rows at most; None for all.

    Raises:
        DataError: If it cannot be used.
        UsageError: If nothing comes from the hub that could have a revision.
    """
    alone = _Source(source, None, data, split, limit)
    _refuse_idle_revision([alone], data)
    path, split, subset, revision = alone.place
    return read_records(path, split, limit, subset, revision)


def _refuse_idle_revision(sources: Sequence[_Source], data: DataSection) -> None:
    """Refuse a revision where nothing comes from the hub."""
    is_of_train = any(source.path in _paths(data.train) for source in sources)
    if data.revision is not None and is_of_train and not any(source.is_of_hub for source in sources):
        raise UsageError(no_revision(sources[0].path, data.revision))


def _paths(sources: str | Sequence[str | SourceSection]) -> list[str]:
    if isinstance(sources, str):
        return [sources]
    return [source if isinstance(source, str) else source.path for source in sources]


@dataclass(frozen=True)
class _Source:
    """A file or hub id with the settings that hold for it.

    Attributes:
        path: As the recipe has it.
        own: Its own settings; None if it has none.
        data: The section, whose settings hold otherwise.
        split, limit: As for ``read_sources``.
    """

    path: str
    own: SourceSection | None
    data: DataSection
    split: str
    limit: int | None

    def setting(self, key: str, default: Any) -> Any:
        """Return a setting of its own, or the section's."""
        value = getattr(self.own, key, None)
        return default if value is None else value

    @property
    def place(self) -> Place:
        """Where it is."""
        own = self.own
        revision = None if own is None else own.revision
        if revision is None and self.is_of_hub:
            revision = self.data.revision
        split, subset = self.setting("split", self.split), self.setting("subset", self.data.subset)
        return self.path, split, subset, revision

    @cached_property
    def is_of_hub(self) -> bool:
        """Whether it is a data set of the hub."""
        try:
            return locate(self.path, self.split) is None
        except (DataError, OSError, ValueError):
            return False  # whoever reads it says what is wrong

    @cached_property
    def is_large(self) -> bool:
        """Whether its examples are not held in memory."""
        if self.data.cache != "auto":
            return self.data.cache == "always"
        return large(self.place, self.setting("limit", self.limit))

    def read(self, name: str, workers: Workers | None, several: bool = False) -> Part:
        """Read it.

        Args:
            name: What it is called beside the others.
            workers: The processes that read it into files; None holds it in memory.
            several: Whether there are others, so that places begin with its name.
        """
        data = self.data
        source, split, subset, revision = self.place
        limit, columns = self.setting("limit", self.limit), self.setting("columns", data.columns)
        ignore, format = self.setting("ignore", data.ignore) or (), self.setting("format", data.format)
        weight = 1.0 if self.own is None else self.own.weight
        if workers is not None:
            reading = Reading(format, columns, list(ignore), limit, data.reasoning, data.system_turn)
            stored, records, present = read_stored(self.place, reading, workers, name if several else "")
            return Part(records, present, stored, weight, name)
        records, present = without_keys(read_records(source, split, limit, subset, revision), ignore)
        examples = to_examples(rename_columns(records, columns), format, data.reasoning, data.system_turn)
        if several:
            examples = [replace(example, place=f"{name}, {example.place}") for example in examples]
        return Part(records, present, examples, weight, name)


@dataclass(frozen=True)
class Weighed:
    """What a file gives to an epoch.

    Attributes:
        name: What it is called.
        examples: How many it has, held-out ones aside.
        weight: How often each is in an epoch.
        count: How many are in an epoch.
    """

    name: str
    examples: int
    weight: float
    count: int


def weigh(
    parts: Sequence[Part], train: Sequence[Example], seed: int
) -> tuple[Sequence[Example], list[Weighed]]:
    """Repeat each file's examples, or take a share of them, as its weight says.

    Args:
        parts: From ``read_sources``.
        train: The examples of all parts that are trained on, in order.
        seed: Another seed takes another share.

    Returns:
        The examples of an epoch, and what each file gives.
    """
    chosen: list[Sequence[Example]] = []
    weighed, left = [], {} if isinstance(train, StoredExamples) else {id(example) for example in train}
    start = 0
    for part in parts:
        own: Sequence[Example]
        if isinstance(train, StoredExamples):
            end = start + len(part.examples)
            own = train.select(((train.rows >= start) & (train.rows < end)).nonzero()[0])
            start = end
        else:
            own = [example for example in part.examples if id(example) in left]
        taken = weighted(own, part.weight, seed)
        chosen.append(taken)
        weighed.append(Weighed(part.name, len(own), part.weight, len(taken)))
    if isinstance(train, StoredExamples):
        rows = numpy_rows(chosen)
        return replace(train, rows=rows), weighed
    return [example for taken in chosen for example in taken], weighed


def numpy_rows(chosen: Sequence[Any]) -> Any:
    """Return the rows of stored examples of one table, one after the other."""
    import numpy

    return numpy.concatenate([taken.rows for taken in chosen])


def weighted(examples: Sequence[Example], weight: float, seed: int) -> Sequence[Example]:
    """Repeat examples, or take a share of them.

    Args:
        examples: Of one file.
        weight: How often each is there: 2 twice, 0.25 a quarter of them, 1.5 all and half of them again.
        seed: Another seed takes another share.

    Returns:
        The examples, in their order. Which are in a share depends on content and seed alone.
    """
    whole, rest = int(weight), weight - int(weight)
    count = round(rest * len(examples))
    if hasattr(examples, "share_draws"):
        import numpy

        every = numpy.arange(len(examples))
        chosen = numpy.argsort(examples.share_draws(seed), kind="stable")[:count] if count else every[:0]
        return pick(examples, numpy.concatenate([*[every] * whole, numpy.sort(chosen)]))  # type: ignore[no-any-return]
    draws = sorted(range(len(examples)), key=lambda number: (share_draw(examples[number], seed), number))
    share = set(draws[:count])
    return [*list(examples) * whole, *(e for number, e in enumerate(examples) if number in share)]
