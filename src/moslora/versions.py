"""Which versions of PEFT, transformers and TRL this package knows, and what it does about others.

The library is tested with what ``KNOWN`` says, at both ends (``make test-lowest``, ``make test-latest``); what is lost
on older ones is in ``docs/versions.md``. A newer one than that is one warning, because most of them work. The command
needs ``FOR_THE_COMMAND``, and checks that before it starts.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from functools import cache

from moslora.errors import VersionError

__all__ = [
    "FOR_THE_COMMAND",
    "KNOWN",
    "installed",
    "is_at_least",
    "need",
    "require_for_command",
    "unknown",
    "warn_once",
]

# From the first, which is tested, to the second, which is not out yet; as pyproject.toml has them.
KNOWN: dict[str, tuple[str, str]] = {
    "peft": ("0.18", "0.22"),
    "transformers": ("4.57", "6"),
    "trl": ("1.0", "2"),
}
# What the command's own tasks are written for: names of configuration fields, data collators, readers of models.
FOR_THE_COMMAND: dict[str, str] = {"peft": "0.21", "transformers": "5.20", "trl": "1.16"}

_told: list[str] = []


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with.

    Args:
        version: As ``"0.21.2"`` or ``"6.0.0.dev0"``.
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@cache
def installed(package: str) -> str | None:
    """Return the version of a package that is installed; None if it is not.

    Args:
        package: Its name in the package index.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_at_least(package: str, version: str) -> bool:
    """Tell whether a package is installed in a version or a later one.

    Args:
        package: Its name.
        version: The version.
    """
    return numbers(installed(package) or "0") >= numbers(version)


def unknown() -> list[str]:
    """Return what is installed and not known, each as a part of a sentence."""
    found = []
    for package, (first, beyond) in KNOWN.items():
        version = installed(package)
        if version is not None and not numbers(first) <= numbers(version) < numbers(beyond):
            found.append(f"{package} {version} (known: {first} to below {beyond})")
    return found


def warn_once(reason: str, outlook: str = "Most things may work. If something does not, install") -> None:
    """Warn that what is installed may not fit; of one reason once in a process.

    Args:
        reason: What was found, a sentence.
        outlook: What follows for the user, as the beginning of the sentence that names what to install.
    """
    if reason in _told:
        return
    _told.append(reason)
    ranges = " ".join(
        f"'{package}>={first},<{beyond}'" for package, (first, beyond) in KNOWN.items() if installed(package)
    )
    warnings.warn(
        f"{reason} {outlook} what this version of moslora is tested with: pip install {ranges}, or a newer moslora.",
        stacklevel=3,
    )


def check() -> None:
    """Warn if a version is installed that is not known; ``import moslora`` does it."""
    found = unknown()
    if found:
        warn_once(f"moslora does not know {' and '.join(found)}.")


def need(package: str, version: str, what: str, instead: str = "") -> str:
    """Say what an older version lacks.

    Args:
        package: Its name.
        version: The first that has it.
        what: What cannot be done, as the beginning of a sentence.
        instead: What else could be done, a sentence.

    Returns:
        The message of an error.
    """
    return (
        f"{what} needs {package} {version} or later, and {installed(package)} is installed. Install a newer one: "
        f"pip install '{package}>={version}'.{f' {instead}' if instead else ''}"
    )


def require_for_command() -> None:
    """Refuse to run the command's tasks with versions that they are not written for.

    Raises:
        VersionError: With what is installed and what to install.
    """
    missing = [
        f"{package} {version} or later ({installed(package) or 'none'} is installed)"
        for package, version in FOR_THE_COMMAND.items()
        if not is_at_least(package, version)
    ]
    if missing:
        wanted = " ".join(f"'{package}>={version}'" for package, version in FOR_THE_COMMAND.items())
        raise VersionError(
            f"The command needs {', '.join(missing)}. Run pip install {wanted}, or use the library alone, which works "
            "with older ones: get_peft_model(model, moslora.MoSLoRAConfig(...))."
        )
