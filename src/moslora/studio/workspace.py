"""The folders that the page may read and write: one to work in, and those that were given beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.errors import UsageError
from moslora.files import refuse_undecodable

__all__ = ["Workspace"]

# Below the folder, for what the page itself keeps: recipes that were started, what processes wrote, uploads.
PRIVATE = ".moslora-studio"
# Of a folder, at most; whoever names a home directory does not wait for minutes.
MOST_FOLDERS = 5000
DEEPEST = 5
# Folders that hold no runs, adapters or data of their own.
PASSED_OVER = {"checkpoints", "node_modules", "site-packages", "__pycache__"}


@dataclass(frozen=True)
class Workspace:
    """The folders of a page.

    Attributes:
        root: Where the page works: what it writes is below it.
        others: Folders that may be read, too.
    """

    root: Path
    others: tuple[Path, ...] = ()

    @classmethod
    def open(cls, root: Path, others: tuple[Path, ...] = ()) -> Workspace:
        """Check the folders, and make the first one if it does not exist.

        Args:
            root: Where the page works.
            others: Folders that may be read, too.

        Raises:
            UsageError: If one is not a folder.
        """
        refuse_undecodable(root.absolute())
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is a file. Name the folder that the studio works in.")
        for other in others:
            if not other.is_dir():
                raise UsageError(f"--allow {other} is not a folder.")
        root.mkdir(parents=True, exist_ok=True)
        return cls(root.resolve(), tuple(other.resolve() for other in others))

    @property
    def private(self) -> Path:
        """Where the page keeps what is its own; made when it is asked for."""
        folder = self.root / PRIVATE
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def runs(self) -> Path:
        """Where new runs go."""
        return self.root / "runs"

    def holds(self, path: Path) -> bool:
        """Say whether a path, links followed, is in one of the folders.

        Args:
            path: Any path.
        """
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a link to itself
            return False
        return any(real.is_relative_to(folder) for folder in (self.root, *self.others))

    def find(self, text: str) -> Path:
        """Return the path that a person named.

        Args:
            text: Absolute, or from the folder on.

        Raises:
            UsageError: If it is outside of the folders.
        """
        if not text or "\0" in text:
            raise UsageError("No file or folder is named.")
        path = self.root / os.path.expanduser(text)  # noqa: PTH111 - Path's raises for a user that does not exist
        if not self.holds(path):
            raise UsageError(self._outside(text))
        return path

    def new(self, text: str) -> Path:
        """Return where something new is to be written, below the folder that the page works in.

        Args:
            text: From the folder on.

        Raises:
            UsageError: If it would be elsewhere, or something is there.
        """
        path = self.find(text)
        if not path.resolve().is_relative_to(self.root):
            raise UsageError(f"{text} is outside of {self.root}, where the studio writes.")
        if os.path.lexists(path):
            raise UsageError(f"{text} exists, and nothing is overwritten. Choose another name.")
        return path

    def shown(self, path: Path) -> str:
        """Return a path as the page shows it: from the folder on, if it is in there."""
        try:
            return str(path.relative_to(self.root))
        except ValueError:
            return str(path)

    def check(self, sections: Mapping[str, Any]) -> None:
        """Refuse a recipe that names a file or folder outside of the folders.

        Args:
            sections: Of a recipe.

        Raises:
            UsageError: Naming the keys.
        """
        outside = [
            f"{place}: {self._outside(text)}" for place, text in _texts(sections) if self._leads_out(text)
        ]
        if outside:
            raise UsageError("\n".join(outside))

    def _leads_out(self, text: str) -> bool:
        """Say whether a text is a path that leads elsewhere; most texts are no path at all."""
        if not text or "\n" in text or "\0" in text or len(text) > 4096:
            return False
        path = Path(os.path.expanduser(text))  # noqa: PTH111
        if path.is_absolute():
            # A prompt may begin with a slash; a path begins with something that exists.
            is_path = len(path.parts) < 2 or os.path.lexists(Path(*path.parts[:2]))
        else:
            is_path = ".." in path.parts or os.path.lexists(self.root / path)
        return is_path and not self.holds(self.root / path)

    def _outside(self, text: str) -> str:
        folders = ", ".join(str(folder) for folder in (self.root, *self.others))
        return (
            f"{text} is outside of what this page may read ({folders}). Copy it there, or start the studio with "
            "--allow FOLDER."
        )

    def walk(self) -> Iterator[tuple[Path, set[str]]]:
        """Yield folders below the folder with the names of what is in them; what a run holds is not entered."""
        pending, seen = [(self.root, 0)], 0
        while pending and seen < MOST_FOLDERS:
            folder, depth = pending.pop()
            seen += 1
            try:
                with os.scandir(folder) as found:
                    entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
            except OSError:
                continue
            names = {name for name, _ in entries}
            yield folder, names
            if depth == DEEPEST:
                continue
            inner = {"lora", "adapter"} if "run.json" in names else None
            pending += [
                (folder / name, depth + 1)
                for name, is_folder in entries
                if is_folder
                and not name.startswith(".")
                and name not in PASSED_OVER
                and (inner is None or name in inner)
            ]


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, place)
