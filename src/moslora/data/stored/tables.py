"""Arrow files: written batch by batch, read as streams by workers, and mapped into memory everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["open_tables", "read_batches", "write_batches"]

BATCH = 512  # rows of a batch, which is decoded at once


def write_batches(path: Path, schema: Any, batches: Iterable[Mapping[str, Any]]) -> None:
    """Write a file in Arrow's stream format, which ``datasets`` reads.

    Args:
        path: The file.
        schema: A ``pyarrow.Schema``.
        batches: Columns by name, each a sequence or a ``pyarrow.Array``.
    """
    import pyarrow  # type: ignore[import-untyped]

    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for columns in batches:
            arrays = [
                columns[name]
                if isinstance(columns[name], pyarrow.Array)
                else pyarrow.array(columns[name], schema.field(name).type)
                for name in schema.names
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))


def read_batches(path: Path) -> Iterator[Any]:
    """Read a file without mapping it, so that what was read is freed.

    Args:
        path: From ``write_batches``.

    Yields:
        ``pyarrow.RecordBatch``.
    """
    import pyarrow

    with pyarrow.OSFile(str(path), "rb") as file, pyarrow.ipc.open_stream(file) as reader:
        yield from reader


def open_tables(paths: Sequence[Path]) -> Dataset:
    """Map files into memory as one data set.

    Args:
        paths: Files of one schema, in order; at least one.
    """
    from datasets import Dataset, concatenate_datasets

    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])
