"""Every error that this package raises on purpose, and the exit code of the command that ends with it.

Each also derives from the built-in error that says the same (``ValueError``, ``RuntimeError``, …), so that code
which catches those keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from moslora.wording import printable

__all__ = [
    "AdapterError",
    "BusyError",
    "DataError",
    "DiskFullError",
    "EncodingError",
    "ExistsError",
    "HubError",
    "MissingPackageError",
    "MoSLoRAError",
    "ModelError",
    "NotFoundError",
    "PictureError",
    "PlanError",
    "ProofError",
    "RecipeError",
    "Stopped",
    "TrainingError",
    "UsageError",
    "VersionError",
]


class MoSLoRAError(Exception):
    """Base of all errors of this package.

    Attributes:
        exit_code: What the command exits with: 2 for wrong input, 1 for a failed proof or run.
    """

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        # A traceback's last line is shown, too, and names of files and modules may hold anything.
        return printable(super().__str__())


class UsageError(MoSLoRAError, ValueError):
    """An argument or option does not fit, or two do not fit together."""


class AdapterError(MoSLoRAError, ValueError):
    """An adapter cannot be read or used: damaged, of another kind, or not for this base."""


class DataError(MoSLoRAError, ValueError):
    """Training or evaluation data cannot be used.

    Args:
        source: The file, directory or hub id, as the user wrote it.
        faults: One text per fault, its place first; the first few are enough.
        advice: What to do about it, one sentence.
        further: How many more faults there are.
    """

    def __init__(self, source: str, faults: Sequence[str], advice: str, further: int = 0) -> None:
        super().__init__(source, tuple(faults), advice, further)  # args, so that it survives pickling
        self.source, self.faults, self.advice, self.further = source, tuple(faults), advice, further

    def __str__(self) -> str:
        if len(self.faults) == 1 and not self.further:
            return printable(f"{self.source}: {self.faults[0]}. {self.advice}")
        count = len(self.faults) + self.further
        more = [f"and {self.further} more"] if self.further else []
        lines = "\n  ".join([f"{self.source}: {count} faults", *self.faults, *more])
        return printable(f"{lines}\n{self.advice}")


class EncodingError(MoSLoRAError, ValueError):
    """An example cannot be encoded: too long, or the chat template cannot render it."""


class ModelError(MoSLoRAError, ValueError):
    """A base model cannot be found, read or loaded."""


class RecipeError(MoSLoRAError, ValueError):
    """A recipe has an unknown key, a wrong value, or settings that contradict each other.

    Attributes:
        problems: Every problem, one line each.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PictureError(MoSLoRAError, ValueError):
    """A picture cannot be read, or the pictures of an example do not match its text."""


class PlanError(MoSLoRAError, ValueError):
    """The memory of a fine-tune cannot be counted."""


class NotFoundError(MoSLoRAError, FileNotFoundError):
    """A file or directory that was named does not exist; the message has the nearest name."""


class ExistsError(MoSLoRAError, FileExistsError):
    """Something exists where output would be written; nothing is overwritten."""


class DiskFullError(MoSLoRAError, OSError):
    """A file could not be written whole; the message says where, how much is free there, and how to continue."""

    exit_code = 1


class BusyError(MoSLoRAError, RuntimeError):
    """Another process is at work on the same run."""

    exit_code = 1


class MissingPackageError(MoSLoRAError, ImportError):
    """A package is needed that is not installed; the message has the command that installs it."""


class VersionError(MoSLoRAError, ImportError):
    """An installed package is older or newer than what is asked for needs."""


class ProofError(MoSLoRAError, RuntimeError):
    """What was written does not compute what it should; the message has both numbers."""

    exit_code = 1


class HubError(MoSLoRAError, RuntimeError):
    """The Hub cannot be reached, or refuses what was asked of it."""

    exit_code = 1


class TrainingError(MoSLoRAError, RuntimeError):
    """A training run ended without a result."""

    exit_code = 1


class Stopped(MoSLoRAError):  # noqa: N818 - not an error
    """A run was asked to stop by a signal, and left a checkpoint to resume from.

    Attributes:
        signal_number: The signal, such as ``signal.SIGINT``.
    """

    exit_code = 1

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
