"""A recipe on the page: read from a file, held against the folders, checked, planned, advised on, and started."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.api.advising import advise
from moslora.api.planning import plan
from moslora.api.previewing import DataPreview, preview
from moslora.display import Display
from moslora.errors import RecipeError, UsageError
from moslora.files import write_text
from moslora.models.names import PACKAGED
from moslora.recipe.building import build_recipe
from moslora.recipe.loading import read_recipe_file
from moslora.recipe.overrides import expand_shorthands, override
from moslora.recipe.paths import anchor
from moslora.studio.form import MISSING, sections_of, to_text, value_at, with_value
from moslora.studio.jobs import Job, Jobs
from moslora.studio.runs import Library
from moslora.studio.workspace import Workspace

__all__ = ["Advised", "Recipes"]

EMPTY = "task:\n  kind: text\n"


@dataclass(frozen=True)
class Advised:
    """A piece of advice that can be taken.

    Attributes:
        settings: ``section.key=value``.
        label: What it is, and why, in a line.
    """

    settings: tuple[str, ...]
    label: str


class Recipes:
    """Recipes of a workspace.

    Args:
        workspace: The folders.
        library: What is below them.
        jobs: The commands that the page starts.
    """

    def __init__(self, workspace: Workspace, library: Library, jobs: Jobs) -> None:
        self.workspace = workspace
        self.library = library
        self.jobs = jobs

    # ---- what there is to choose -------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Return names of base models: packaged ones, and folders of the workspace."""
        return [*PACKAGED, *map(self.workspace.shown, self.library.find().models)]

    def data(self) -> list[str]:
        """Return files that may hold examples."""
        return [self.workspace.shown(path) for path in self.library.find().data]

    def files(self) -> list[str]:
        """Return recipes of the workspace."""
        return [self.workspace.shown(path) for path in self.library.find().recipes]

    def read(self, name: str) -> str:
        """Return a recipe file's text with the paths in it made absolute, so that it means the same elsewhere.

        Args:
            name: From the page's folder on, or absolute.

        Raises:
            RecipeError, UsageError: If it cannot be read, or is outside of the folders.
        """
        path = self.workspace.find(name)
        sections = expand_shorthands(read_recipe_file(path))
        for section, values in sections.items():
            anchor(section, values, (path.parent, self.workspace.root))
        return to_text(self._shortened(sections))

    def of_run(self, path: Path) -> str:
        """Return the recipe of a run, to start another one from.

        Args:
            path: The run's directory.
        """
        sections = expand_shorthands(read_recipe_file(path / "recipe.yaml"))
        return to_text(self._shortened(with_value(sections, "output.dir", MISSING)))

    def _shortened(self, value: Any) -> Any:
        """Write paths below the folder from there on, where commands that the page starts work."""
        if isinstance(value, Mapping):
            return {key: self._shortened(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._shortened(item) for item in value]
        start = f"{self.workspace.root}{os.sep}"
        return value.removeprefix(start) if isinstance(value, str) and value != start else value

    def take_upload(self, file: Path) -> str:
        """Copy an uploaded file into the workspace, under a name that is free.

        Args:
            file: Where the upload is.

        Returns:
            Its name from the page's folder on.

        Raises:
            UsageError: If it is empty.
        """
        import shutil

        if not file.is_file() or not file.stat().st_size:
            raise UsageError(f"{file.name} is empty.")
        folder = self.workspace.root / "data"
        folder.mkdir(exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "-", file.stem, flags=re.ASCII).strip("-.") or "upload"
        for number in range(1, 10_000):
            place = folder / f"{stem}{'' if number == 1 else f'-{number}'}{file.suffix.lower()}"
            try:
                with place.open("xb") as target, file.open("rb") as source:
                    shutil.copyfileobj(source, target)
            except FileExistsError:
                continue
            except BaseException:
                place.unlink(missing_ok=True)
                raise
            self.library.find(is_fresh=True)
            return self.workspace.shown(place)
        raise UsageError(f"{folder} is full of files called {stem}.")

    # ---- what a recipe means here --------------------------------------------------------------------------------

    def prepared(self, text: str) -> dict[str, Any]:
        """Return a recipe's sections with paths as they are from the page's folder, runs below it.

        Args:
            text: YAML.

        Raises:
            RecipeError: If it cannot be read.
            UsageError: If it names something outside of the folders.
        """
        sections = sections_of(text)
        self.workspace.check(sections)
        for section, values in sections.items():
            anchor(section, values, (self.workspace.root,))
        folder = value_at(sections, "output.dir")
        name = "runs" if folder in (MISSING, None) else str(folder)
        place = self.workspace.find(name)
        if not place.resolve().is_relative_to(self.workspace.root):
            raise UsageError(
                f"output.dir={name} is outside of {self.workspace.root}, where the studio writes."
            )
        return with_value(sections, "output.dir", str(place))

    def check(self, text: str) -> dict[str, Any]:
        """Check a recipe's keys and values, and return its sections.

        Args:
            text: YAML.

        Raises:
            RecipeError, UsageError: With everything that is wrong.
        """
        sections = self.prepared(text)
        missing = [key for key in ("model", "data") if not sections.get(key)]
        if missing:
            raise RecipeError([f"{key}: nothing is chosen yet." for key in missing])
        build_recipe(sections)
        return sections

    def look(self, text: str, display: Display) -> DataPreview:
        """Read the data as training would.

        Args:
            text: YAML.
            display: Where to tell of it.
        """
        return preview(self.check(text), progress=display)

    def plan(self, text: str) -> Any:
        """Count the memory that a recipe takes; data may be missing still.

        Args:
            text: YAML.
        """
        return plan(self.prepared(text))

    def advise(self, text: str) -> Any:
        """Hold a recipe against what is known.

        Args:
            text: YAML.
        """
        return advise(self.prepared(text))

    @staticmethod
    def pieces(advice: Any) -> list[Advised]:
        """Return the advice that differs from the recipe, as what can be taken by a click.

        Args:
            advice: From ``advise``.
        """
        return [
            Advised(tuple(one.overrides), f"{', '.join(one.overrides)}: {one.why}")
            for one in advice.recommendations
            if one.overrides and one.fits is not True
        ]

    def with_settings(self, text: str, settings: Sequence[str]) -> str:
        """Return a recipe's text with settings over it, as on the command line.

        Args:
            text: YAML.
            settings: ``section.key=value``.

        Raises:
            RecipeError: If one cannot be read.
        """
        sections = sections_of(text)
        problems: list[str] = []
        override(sections, settings, self.workspace.root, problems)
        if problems:
            raise RecipeError(problems)
        return to_text(sections)

    # ---- start ---------------------------------------------------------------------------------------------------

    def start(self, text: str) -> Job:
        """Start a training in a process of its own.

        Args:
            text: YAML.

        Returns:
            The command, running.

        Raises:
            RecipeError, UsageError: If the recipe is wrong; nothing is started.
        """
        sections = self.check(text)
        name = _name_of(sections)
        return self.jobs.start(f"train {name}", ["train", str(self.write(sections, name))])

    def write(self, sections: Mapping[str, Any], name: str) -> Path:
        """Write a recipe where commands that the page starts read it.

        Args:
            sections: Of the recipe.
            name: Of the file, more or less.
        """
        folder = self.workspace.private / "recipes"
        folder.mkdir(exist_ok=True)
        plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "recipe"
        path = folder / f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1_000_000:06d}.yaml"
        write_text(path, to_text(sections))
        return path


def _name_of(sections: Mapping[str, Any]) -> str:
    name = value_at(sections, "output.name")
    kind = value_at(sections, "task.kind")
    return str(name) if isinstance(name, str) else str(kind) if isinstance(kind, str) else "text"
