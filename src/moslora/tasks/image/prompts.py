"""Prompts: templates with places for the subject's token and class, and the prompts that pictures are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moslora.errors import RecipeError
from moslora.tasks.image.published_prompts import DREAMBOOTH_PROMPTS

__all__ = ["Subject", "evaluation_prompts", "fill", "places", "read_prompts_file"]

PLACE = re.compile(r"\{(0|1|token|class_name)?\}")
# A line of DreamBooth's published list is Python: 'a {0} {1} …'.format(unique_token, class_token),
LISTED = re.compile(r"^(['\"])(.*)\1\.format\(unique_token, class_token\),?$")


class Subject:
    """What a run learns: fills prompt templates with its token and class.

    Args:
        token: Names the subject, as ``ikat``; None without a name.
        class_name: Its class, as ``cat``; None if no template has a place for it.

    Attributes:
        used: Which of ``"token"`` and ``"class_name"`` a filled template had a place for.
    """

    def __init__(self, token: str | None, class_name: str | None) -> None:
        self.token, self.class_name = token, class_name
        self.used: set[str] = set()

    def fill(self, template: str) -> str:
        """Return a prompt; see the function ``fill``."""
        self.used |= places(template)
        return fill(template, self.token, self.class_name)


def fill(template: str, token: str | None, class_name: str | None) -> str:
    """Put the subject's token and class into a prompt.

    Args:
        template: Words, with ``{}`` for the token and a second one for the class, or ``{0}`` and ``{1}``, or
            ``{token}`` and ``{class_name}``.
        token: Names the subject, as ``ikat``.
        class_name: Its class, as ``cat``.

    Returns:
        The prompt.

    Raises:
        RecipeError: If a value for a place is missing, or there are other braces.

    Example:
        >>> fill("a {0} {1} in the jungle", "ikat", "cat")
        'a ikat cat in the jungle'
    """
    values = {"0": token, "1": class_name, "token": token, "class_name": class_name}
    order = iter(("token", "class_name"))

    def put(place: re.Match[str]) -> str:
        name = place[1] or next(order, "")
        if not name:
            raise RecipeError(
                f"{template!r} has more than two places {{}}; they are the token's and the class's."
            )
        value = values[name]
        if value is None:
            key = {"0": "token", "1": "class_name"}.get(name, name)
            raise RecipeError(f"{template!r} has a place for data.{key}, which the recipe does not set.")
        return value

    prompt = PLACE.sub(put, template)
    if "{" in prompt or "}" in prompt:
        raise RecipeError(
            f"{template!r} has braces that are not a place; write {{}}, {{token}} or {{class_name}}."
        )
    return prompt


def places(template: str) -> set[str]:
    """Return which of ``token`` and ``class_name`` a template has a place for."""
    order = iter(("token", "class_name"))
    numbered = {"0": "token", "1": "class_name"}
    names = (place[1] or next(order, "") for place in PLACE.finditer(template))
    return {numbered.get(name, name) for name in names} - {""}


def evaluation_prompts(
    subject: Subject,
    templates: Sequence[str] = (),
    published: str = "none",
    prompts_file: str | Path | None = None,
) -> list[str]:
    """Return the prompts that pictures are made of, before and after training.

    Args:
        subject: Fills the templates.
        templates: The recipe's own.
        published: A key of ``DREAMBOOTH_PROMPTS``; ``"none"`` adds none.
        prompts_file: A text file with one template a line.

    Returns:
        The prompts in this order, each once.

    Raises:
        RecipeError: If the file cannot be used, or a template cannot be filled.
    """
    listed = [] if prompts_file is None else read_prompts_file(Path(prompts_file))
    return list(
        dict.fromkeys(map(subject.fill, [*templates, *DREAMBOOTH_PROMPTS.get(published, ()), *listed]))
    )


def read_prompts_file(path: Path) -> list[str]:
    """Read templates, one a line; lines of DreamBooth's published lists are taken as they are.

    Args:
        path: A text file, UTF-8.

    Raises:
        RecipeError: If it does not exist, is empty, or is DreamBooth's whole file.
    """
    if not path.is_file():
        raise RecipeError(f"task.prompts_file: {path} does not exist.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if any(line.startswith("prompt_list") for line in lines):
        raise RecipeError(
            f"task.prompts_file: {path} is DreamBooth's whole published file, with classes and two lists. Set "
            "task.published_prompts=object or =live instead, or keep only the prompts of one list."
        )
    templates = [LISTED.sub(r"\2", line) for line in lines if line]
    if not templates:
        raise RecipeError(f"task.prompts_file: {path} is empty; write one prompt a line.")
    return templates
