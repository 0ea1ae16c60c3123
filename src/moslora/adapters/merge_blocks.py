"""The bytes of a merge: shards copied with some tensors changed on the way, and read again for the proof.

A weight passes in blocks that stay in a processor's cache: read, widened, ``+= left · right``, rounded, written. So
memory does not grow with the model, and each byte moves as often as in a copy. Pieces of a shard are independent, and
run in as many threads as torch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from moslora.adapters.beside import Replacement
from moslora.core.finite import all_finite
from moslora.errors import ModelError, ProofError
from moslora.models.shards import DTYPES, Stored
from moslora.wording import evenly_spaced

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Change", "Seen", "check_change", "in_threads", "write_shard"]

BLOCK = 1 << 18  # entries of a weight in hand at once: 1 MB of float32
PIECE = 1 << 22  # entries that one thread takes at a time
COPIED = 1 << 24  # bytes that one thread copies at a time
PROOF_BLOCK = 1 << 14  # entries that are read again at once
PROOF_BLOCKS = 16  # of them, evenly over each weight
Result = TypeVar("Result")


@dataclass(frozen=True)
class Change:
    """One tensor to change: ``weight += scale · left · middle · right``, the weight seen as a matrix.

    Attributes:
        module: Whose it is.
        stored: Where it is.
        left: Shape ``(rows, r)``, as the adapter has it.
        middle: Shape ``(r, r)``.
        right: Shape ``(r, columns)``.
        scale: The adapter's.
    """

    module: str
    stored: Stored
    left: Tensor
    middle: Tensor
    right: Tensor
    scale: float

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        import torch

        found = getattr(torch, DTYPES[self.stored.dtype])
        assert isinstance(found, torch.dtype)
        return found

    @property
    def rows(self) -> int:
        """The matrix's rows."""
        return len(self.left)

    @property
    def columns(self) -> int:
        """The matrix's columns."""
        return self.right.shape[1]

    @property
    def end(self) -> int:
        """The first byte after the weight."""
        return self.offset(self.rows)

    def offset(self, row: int) -> int:
        """Return the first byte of a row."""
        return self.stored.start + row * self.columns * self.dtype.itemsize

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return two factors of the change, ``(rows, r)`` and ``(r, columns)``, float64."""
        return self.scale * self.left.double(), self.middle.double() @ self.right.double()

    def blocks(self, entries: int, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield first and last row of each block of about so many entries, between two rows."""
        end = self.rows if last is None else last
        step = max(1, entries // self.columns)
        for start in range(first, end, step):
            yield start, min(start + step, end)

    def room(self, rows: int) -> Tensor:
        """Return memory for so many rows, in the weight's dtype."""
        import torch

        return torch.empty(rows, self.columns, dtype=self.dtype)

    def read(self, file: IO[bytes], first: int, last: int, room: Tensor) -> Tensor:
        """Read a block of rows, in the weight's dtype, into memory that holds at least as many."""
        rows = room[: last - first]
        data = bytes_of(rows)
        file.seek(self.offset(first))
        if file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ModelError(
                f"{self.stored.shard} ended in the middle of {self.module}; it changed meanwhile."
            )
        return rows


@dataclass(frozen=True)
class Seen:
    """What reading some rows of a written weight again has shown.

    Attributes:
        checked: How many entries.
        ratio: Largest error over what rounding explains.
        relative: Largest error over the largest entry.
        kept: Share of ΔW that survived the rounding; None where ΔW is zero there.
    """

    checked: int
    ratio: float
    relative: float
    kept: float | None


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor as bytes."""
    import torch

    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]


def in_threads(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run tasks in as many threads as torch has, each by itself on one; the first error ends all.

    Args:
        tasks: Anything that spends its time outside of Python.

    Returns:
        Their results, in their order.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) < 2:
        return [task() for task in tasks]
    try:
        with (
            ThreadPoolExecutor(
                min(threads, len(tasks)), initializer=partial(torch.set_num_threads, 1)
            ) as pool,
            _nothing_left(pool),
        ):
            return list(pool.map(lambda task: task(), tasks))
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _nothing_left(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Take back what has not begun, however the block ends."""
    try:
        yield
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write_shard(source: Path, target: Path, changes: Sequence[Change | Replacement]) -> list[str]:
    """Copy a shard with some of its tensors changed.

    Args:
        source: The base's.
        target: The new one; must not exist.
        changes: In the order of the file.

    Returns:
        Modules of which rounding left no entry changed.

    Raises:
        ModelError: If the shard is shorter than its header says.
        ProofError: If a weight would have infinite values.
    """
    size = source.stat().st_size
    with target.open("xb") as file:
        file.truncate(size)
    tasks: list[Callable[[], str | None]] = []
    at = 0
    for change in changes:
        tasks += _copies(source, target, at, change.stored.start)
        if isinstance(change, Replacement):
            tasks.append(partial(_put, target, change))
        else:
            pieces = change.blocks(PIECE)
            tasks += [partial(_add, source, target, change, first, last) for first, last in pieces]
        at = change.end
    tasks += _copies(source, target, at, size)
    changed = set(in_threads(tasks))
    return [one.module for one in changes if isinstance(one, Change) and one.module not in changed]


def _copies(source: Path, target: Path, start: int, end: int) -> list[Callable[[], None]]:
    return [
        partial(_copy, source, target, first, min(first + COPIED, end)) for first in range(start, end, COPIED)
    ]


def _copy(source: Path, target: Path, start: int, end: int) -> None:
    """Copy some bytes to the same place in another file."""
    with source.open("rb", buffering=0) as old_file, target.open("r+b", buffering=0) as new_file:
        old_file.seek(start)
        new_file.seek(start)
        buffer = memoryview(bytearray(min(end - start, 1 << 20)))
        while start < end:
            got = old_file.readinto(buffer[: end - start])
            if not got:
                raise ModelError(f"{source.name} ended at byte {start} of {end}; it changed meanwhile.")
            _write_all(new_file, buffer[:got])
            start += got


def _put(target: Path, replacement: Replacement) -> None:
    """Write a tensor that the adapter has whole."""
    with target.open("r+b", buffering=0) as file:
        file.seek(replacement.stored.start)
        _write_all(file, memoryview(replacement.bytes()))


def _write_all(file: IO[bytes], data: memoryview) -> None:
    """Write all of it; a write without a buffer may stop short."""
    while data:
        data = data[file.write(data) :]


def _add(source: Path, target: Path, change: Change, first: int, last: int) -> str | None:
    """Write some rows of a changed weight; return its module if an entry differs from the base's."""
    import torch

    wide = torch.promote_types(change.dtype, torch.float32)
    left, right = (side.to(wide) for side in change.sides())
    largest, differs = torch.finfo(change.dtype).max, False
    blocks = list(change.blocks(BLOCK, first, last))
    read, rounded = change.room(blocks[0][1] - first), change.room(blocks[0][1] - first)
    sums = torch.empty_like(rounded, dtype=wide)
    with source.open("rb", buffering=0) as old_file, target.open("r+b", buffering=0) as new_file:
        new_file.seek(change.offset(first))
        for start, end in blocks:
            old = change.read(old_file, start, end, read)
            new, result = sums[: end - start], rounded[: end - start]
            new.copy_(old).addmm_(left[start:end], right)
            least, most = (float(extreme) for extreme in torch.aminmax(new))  # NaN if there is one
            result.copy_(new)
            # Entries just above the largest number may still be rounded to it.
            if not (-largest <= least and most <= largest) and not all_finite(result):
                raise ProofError(
                    f"{change.module} would have NaN or infinite values in {change.stored.dtype}; nothing was "
                    "written. Check the base and the adapter's scale."
                )
            differs = differs or not torch.equal(result, old)
            _write_all(new_file, bytes_of(result))
    return change.module if differs else None


def check_change(folder: Path, place: Path, change: Change) -> Seen:
    """Read rows of a written weight again and compare them with float64.

    Args:
        folder: The base's.
        place: Of what was written.
        change: What was to be done.

    Returns:
        What was seen.
    """
    left, right = change.sides()
    sizes = left.abs(), right.abs()
    blocks = evenly_spaced(list(change.blocks(PROOF_BLOCK)), PROOF_BLOCKS)
    room = change.room(max(last - first for first, last in blocks))
    checked = 0
    largest = error = ratio = arrived = size = 0.0
    with (
        (folder / change.stored.shard).open("rb", buffering=0) as before,
        (place / change.stored.shard).open("rb", buffering=0) as after,
    ):
        for first, last in blocks:
            checked += (last - first) * change.columns
            old, found = (change.read(file, first, last, room).double() for file in (before, after))
            delta = left[first:last] @ right
            expected = old + delta
            allowed = _rounding(expected, sizes[0][first:last] @ sizes[1], change)
            largest = _larger(largest, float(expected.abs_().max()))
            off = found.sub(old).sub_(delta).abs_()
            error = _larger(error, float(off.max()))
            ratio = _larger(ratio, float(off.div_(allowed).max()))
            arrived += float(found.sub_(old).mul_(delta).sum())
            size += float(delta.square_().sum())
    return Seen(checked, ratio, error / largest if largest else error, arrived / size if size else None)


def _larger(one: float, other: float) -> float:
    """Return the larger of two, and NaN if one is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _rounding(expected: Tensor, sizes: Tensor, change: Change) -> Tensor:
    """Return how far each entry may be off: the product and the sum as computed, then one rounding.

    A product of r terms, its factors rounded beforehand, is off by less than ``(r + 4)·ε·Σ|left|·|right|``.
    """
    import torch

    info = torch.finfo(change.dtype)
    computed = torch.finfo(torch.promote_types(change.dtype, torch.float32)).eps
    magnitude = expected.abs()
    product = sizes.mul_((change.right.shape[0] + 4) * computed).add_(magnitude, alpha=computed)
    allowed: Tensor = product.mul_(1 + info.eps / 2).add_(magnitude, alpha=info.eps / 2)
    return allowed.add_(info.smallest_normal * info.eps)
