"""``metrics.jsonl``: one JSON line per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moslora.errors import ExistsError, UsageError
from moslora.files import write_text
from moslora.training.json_values import NotFiniteError, json_value

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Appends one JSON line per logged step, on disk before :meth:`append` returns.

    A NaN or infinite value is written as ``null`` and named under ``"not_finite"``: a loss that diverged
    is news, and must neither stop the log nor make it invalid JSON.

    Args:
        path: The ``metrics.jsonl``.
        resume_step: The step training continues from. Lines past it, which the lost part of the run wrote,
            are dropped. None starts a new log.

    Raises:
        FileExistsError: If there is a log already and ``resume_step`` is None.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if resume_step is not None:
            lines = read_metrics(self.path) if self.path.exists() else []
            kept = [line for line in lines if line.get("step", 0) <= resume_step]
            write_text(self.path, "".join(_json_line(line) for line in kept))
        elif self.path.exists():
            raise ExistsError(f"{self.path} exists already; give resume_step to continue with it.")
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, step: int, **values: Any) -> None:
        """Write the line of ``step``.

        Args:
            step: Optimiser steps done.
            **values: Numbers and strings, such as ``loss=0.7, learning_rate=1e-3``.

        Raises:
            TypeError: If a value has no form in JSON; names the key.
        """
        line: dict[str, Any] = {"step": int(step)}
        not_finite = []
        for key, value in values.items():
            try:
                line[key] = json_value(value, key)
            except NotFiniteError:
                line[key] = None
                not_finite.append(key)
        if not_finite:
            line["not_finite"] = not_finite
        self._file.write(_json_line(line))
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``, also while it is being written.

    Args:
        path: The file.

    Returns:
        One dict per line. A last line without its newline was cut off by a kill and is left out.

    Raises:
        ValueError: If any other line is not a JSON object; names the line.
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    return [_parsed_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _json_line(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _parsed_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}, line {number} is not JSON ({error}); remove or restore it.") from error
    if not isinstance(document, dict):
        raise UsageError(f"{path}, line {number} is a {type(document).__name__}, not an object; remove it.")
    return document
