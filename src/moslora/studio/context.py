"""What the tabs of a page have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.studio.adapters import Adapters
from moslora.studio.comparisons import Comparisons
from moslora.studio.jobs import Jobs
from moslora.studio.recipes import Recipes
from moslora.studio.runs import Library
from moslora.studio.talks import Talks
from moslora.studio.workspace import Workspace

__all__ = ["Studio"]


@dataclass
class Studio:
    """A workspace with all that is done in it.

    Attributes:
        workspace: The folders.
        library: What is below them.
        jobs: Commands that were started.
        recipes, comparisons, adapters, talks: What the tabs do.
        downloads: Where files are packed.
        opening: The text of the recipe that the form begins with.
        shared: Components that more than one tab needs, by name.
    """

    workspace: Workspace
    library: Library
    jobs: Jobs
    recipes: Recipes
    comparisons: Comparisons
    adapters: Adapters
    talks: Talks
    downloads: Path
    opening: str
    shared: dict[str, Any]

    @classmethod
    def of(cls, workspace: Workspace, downloads: Path, opening: str) -> Studio:
        """Put a workspace and what is done in it together.

        Args:
            workspace: The folders.
            downloads: Where files are packed.
            opening: The text of the recipe that the form begins with.
        """
        library, jobs = Library(workspace), Jobs(workspace)
        recipes = Recipes(workspace, library, jobs)
        return cls(
            workspace,
            library,
            jobs,
            recipes,
            Comparisons(recipes),
            Adapters(recipes),
            Talks(workspace),
            downloads,
            opening,
            {},
        )
