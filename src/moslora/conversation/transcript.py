"""A transcript: one JSON object a line, appended whole or not at all, whoever else writes there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moslora.errors import UsageError
from moslora.files import locked, refuse_undecodable

__all__ = ["Transcript"]


class Transcript:
    """A file that lines are appended to; nothing in it is changed.

    Args:
        path: The file; made at the first line if it does not exist.

    Raises:
        UsageError: If it is there and is not a transcript, or its folder does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_undecodable(path.absolute())
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise UsageError(f"{path} is not a file, so no transcript can be kept there. Name a file.")
        if not path.parent.is_dir():
            raise UsageError(
                f"There is no folder {path.parent} for the transcript. Make it, or name another place."
            )
        if path.exists() and not _is_transcript(path):
            raise UsageError(
                f"{path} exists and is not a transcript (a JSON object a line). Name another file."
            )

    def append(self, value: Mapping[str, Any]) -> None:
        """Append a line, in one write; after a line that was cut off it begins a new one.

        Args:
            value: Of JSON's types.

        Raises:
            OSError: If there is no room; the file is as it was then.
        """
        line = json.dumps(value, ensure_ascii=True).encode() + b"\n"
        with locked(self.path.absolute().parent):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":
                    line = b"\n" + line
                done = 0
                try:
                    while done < len(line):
                        done += os.write(file, line[done:])
                except OSError:
                    os.ftruncate(file, size)
                    raise
                os.fsync(file)
            finally:
                os.close(file)


def _is_transcript(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    if not first.strip():
        return not path.stat().st_size
    if not first.endswith(b"\n"):
        return first.startswith(b"{")  # cut off by a kill
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False
