"""The pinned versions can be installed by anybody, as far as that can be told without a network."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line and line[0] != "#"]
    assert all(found), "every line pins one version"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


def test_what_torch_pins_itself_is_not_pinned_again() -> None:
    """PyPI's builds of torch require one triton and one of each CUDA package; a CPU build requires none."""
    own = [name for name in pins() if name.startswith(("triton", "nvidia-", "cuda-", "pytorch-triton"))]
    assert not own


def test_every_pin_lies_in_the_range_that_the_project_asks_for() -> None:
    pinned = pins()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert requirement.specifier.contains(pinned[name]), f"{requirement} but {name}=={pinned[name]}"


def test_no_line_names_a_machine_or_an_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^-|://|@|[+]cpu", text, re.MULTILINE)
