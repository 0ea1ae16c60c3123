"""The section ``data`` of a recipe, with one file or several, and what all sections have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from moslora.wording import did_you_mean

__all__ = ["DataSection", "Name", "Section", "SourceSection", "Sources"]

Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """What all sections have in common."""

    # Strict, because YAML knows its types: ``seed: true`` is a mistake and not a 1.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


DataFormat = Literal["auto", "messages", "prompt-completion", "text", "alpaca"]


def _columns(columns: dict[str, str] | None) -> dict[str, str] | None:
    """Check the names and templates of ``data.columns``."""
    from moslora.data.naming import TARGETS, parse_template

    for target, source in (columns or {}).items():
        if target not in TARGETS:
            known = did_you_mean(target, TARGETS) or f" Those are {', '.join(TARGETS)}."
            raise ValueError(f"a mapping from columns that are read; {target!r} is none.{known}".rstrip("."))
        parse_template(source)
    return columns


Columns = Annotated[dict[Name, Name] | None, AfterValidator(_columns)]


class SourceSection(Section):
    """One file of several, with its weight and what differs from the section's settings."""

    path: Name
    weight: float = Field(default=1.0, gt=0)
    split: Name | None = None
    format: DataFormat | None = None
    columns: Columns = None
    limit: int | None = Field(default=None, ge=1)
    ignore: list[Name] | None = None
    subset: Name | None = None
    revision: Name | None = None


def _sources(value: Any) -> Any:
    """Check a file or a list of files; the words of pydantic for a union help nobody."""
    if isinstance(value, str):
        if not value:
            raise ValueError("a file or hub id; it is empty")
        return value
    if not isinstance(value, list):
        raise ValueError("a file or hub id, or a list of them; a mapping in the list has path and weight")
    if not value:
        raise ValueError("a list with a file in it")
    return [_source(item, number) for number, item in enumerate(value, start=1)]


def _source(item: Any, number: int) -> str | SourceSection:
    if isinstance(item, SourceSection) or (isinstance(item, str) and item):
        return item
    if not isinstance(item, dict):
        raise ValueError(f"a list of files and of mappings with path and weight; item {number} is {item!r}")
    try:
        return SourceSection.model_validate(item)
    except ValidationError as error:
        said = []
        for found in error.errors(include_url=False):
            key = ".".join(map(str, found["loc"]))
            if found["type"] == "extra_forbidden":
                hint = did_you_mean(key, SourceSection.model_fields) or " It is unknown."
                said.append(f"{key}.{hint}".rstrip("?."))
            elif found["type"] == "missing":
                said.append(f"no {key}")
            else:
                said.append(f"{key}: {found['msg'].removeprefix('Value error, ')}")
        raise ValueError(f"a list of usable files; item {number} has {'; '.join(said)}") from None


def _sources_or_none(value: Any) -> Any:
    return None if value is None else _sources(value)


def _as_written(value: Any) -> Any:
    """Return files as YAML has them, without settings that nobody gave."""
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    return value.model_dump(exclude_none=True) if isinstance(value, SourceSection) else value


_SERIALIZED = PlainSerializer(_as_written, return_type=Any)
# A file or hub id, or several.
Sources = str | list[str | SourceSection]


class DataSection(Section):
    """The examples: files or hub ids."""

    train: Annotated[Sources, PlainValidator(_sources), _SERIALIZED]
    heldout: Annotated[Sources | None, PlainValidator(_sources_or_none), _SERIALIZED] = None
    heldout_fraction: float = Field(default=0.1, gt=0, lt=0.5)
    train_split: Name = "train"
    heldout_split: Name | None = None
    format: DataFormat = "auto"
    columns: Columns = None
    template: Literal["auto", "chat", "plain"] = "auto"
    train_on: Literal["completions", "last", "each", "all"] = "completions"
    reasoning: Literal["keep", "inline", "drop"] = "keep"
    system_turn: Literal["keep", "user", "drop"] = "keep"
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    limit: int | None = Field(default=None, ge=1)
    ignore: list[Name] | None = None
    subset: Name | None = None
    revision: Name | None = None
    cache: Literal["auto", "always", "never"] = "auto"
