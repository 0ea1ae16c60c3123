"""A form made from the recipe's schema, and its way to YAML and back.

The fields are those of the sections' own classes and of the configurations that ``adapter`` and ``trainer`` hold, with
their types, defaults and help, so that a new key of a recipe is in the form without a line here.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from moslora.errors import RecipeError
from moslora.recipe.checking import ADAPTER_DEFAULTS_OF
from moslora.recipe.data_section import SourceSection
from moslora.recipe.field_types import fields_of
from moslora.recipe.keys import MANAGED, UNFIT
from moslora.recipe.overrides import expand_shorthands
from moslora.recipe.schema import ADAPTER_DEFAULTS, RECIPES
from moslora.recipe.trainer_arguments import (
    TRAINER_DEFAULTS,
    TRAINER_DEFAULTS_OF,
    trainer_config,
    trainer_of,
)
from moslora.recipe.yaml_core import Dumper, parse_yaml

__all__ = [
    "KINDS",
    "MISSING",
    "UNSET",
    "Field",
    "fields_of_kind",
    "merged_text",
    "other_places",
    "sections_of",
    "to_text",
    "value_at",
    "with_task",
    "with_value",
]

KINDS = tuple(RECIPES)
UNSET = "(default)"  # a choice that leaves the key out
MISSING: Any = object()  # of a key that is not set; null is a value, as in trainer.max_length


@dataclass(frozen=True)
class Field:
    """A key of a recipe, as the form has it.

    Attributes:
        place: ``section.key``, or the key of a recipe itself.
        kind: ``"choice"``, ``"switch"``, ``"text"`` for what stands as it is, ``"names"`` for one name or a list in
            brackets, ``"value"`` for what is read as YAML.
        choices: Of a choice.
        default: What holds if it is not set; None if nothing or if it has to be set.
        help: A sentence or two on it; empty if nobody wrote any.
        is_usual: Whether the form shows it without being asked.
    """

    place: str
    kind: Literal["choice", "switch", "text", "names", "value"]
    choices: tuple[str, ...] = ()
    default: Any = None
    help: str = ""
    is_usual: bool = True

    @property
    def section(self) -> str:
        """Its section."""
        return self.place.partition(".")[0]

    @property
    def key(self) -> str:
        """Its key in the section."""
        return self.place.partition(".")[2] or self.place

    def to_widget(self, value: Any) -> Any:
        """Return a recipe's value as the form shows it.

        Args:
            value: ``MISSING`` if it is not set.
        """
        if self.kind == "switch":
            return bool(self.default if value in (MISSING, None) else value)
        if self.kind == "choice":
            return UNSET if value in (MISSING, None) else str(value)
        if value is MISSING or (value is None and self.kind == "text"):
            return ""
        return value if isinstance(value, str) and self.kind in ("text", "names") else _inline(value)

    def from_widget(self, shown: Any, before: Any) -> Any:
        """Return what the form shows as a recipe's value.

        Args:
            shown: What the form shows.
            before: The recipe's value before; ``MISSING`` if it was not set.

        Returns:
            The value; ``MISSING`` if it is not set.

        Raises:
            RecipeError: If it cannot be read.
        """
        if self.kind == "switch":
            return MISSING if before is MISSING and bool(shown) == bool(self.default) else bool(shown)
        text = "" if shown is None else str(shown).strip()
        if not text or text == UNSET:
            return MISSING
        is_plain = self.kind in ("text", "choice") or (self.kind == "names" and text[0] not in "[{")
        return text if is_plain else parse_yaml(text, self.place)


def _inline(value: Any) -> str:
    """Write a value as YAML on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _said(value: Any) -> str:
    return "not set" if value is MISSING else _inline(value)


# --- The fields ---------------------------------------------------------------------------------------------


def fields_of_kind(kind: str, loss: str | None = None) -> dict[str, list[Field]]:
    """Return the fields of a recipe by section.

    Args:
        kind: Of the task.
        loss: Its ``task.loss``, on which the trainer depends.
    """
    recipe = RECIPES.get(kind, RECIPES["text"])
    found: dict[str, list[Field]] = {}
    for section, info in recipe.model_fields.items():
        model = _section_class(info.annotation)
        if section == "mix" or section == "start_from":
            continue  # a mix is started from its adapters; start_from stands in the adapter's section
        if section == "adapter":
            found[section] = _adapter_fields(kind)
        elif section == "trainer":
            found[section] = _trainer_fields(kind, loss)
        elif model is None:
            found[section] = [Field(section, "value", default=info.get_default(call_default_factory=True))]
        else:
            found[section] = [
                _field(f"{section}.{key}", one.annotation, None if one.is_required() else one.get_default())
                for key, one in model.model_fields.items()
                if f"{section}.{key}" != "task.kind"  # which decides on the form, and is chosen above it
            ]
    return found


def _section_class(annotation: Any) -> Any:
    """Return the class of a section; None if it is a plain value."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if hasattr(kind, "model_fields")]
    return kinds[0] if kinds and kinds[0] is not SourceSection else None


def _adapter_fields(kind: str) -> list[Field]:
    from moslora.tuner.config import MoSLoRAConfig

    defaults = {**ADAPTER_DEFAULTS, **ADAPTER_DEFAULTS_OF.get(kind, {})}
    notes = _documented(MoSLoRAConfig.__doc__ or "")
    start = Field("adapter.start_from", "text", help="An adapter to go on from: its folder or file.")
    return [*_of_config("adapter", MoSLoRAConfig, kind, defaults, {**notes}), start]


def _trainer_fields(kind: str, loss: str | None) -> list[Field]:
    defaults = {name: one.cpu for name, one in TRAINER_DEFAULTS.items()} | TRAINER_DEFAULTS_OF.get(kind, {})
    notes = {name: one.reason for name, one in TRAINER_DEFAULTS.items()}
    config = trainer_config(trainer_of(kind, loss))
    also = ("max_steps", "gradient_accumulation_steps")  # what a step is
    return _of_config("trainer", config, kind, defaults, notes, also)


def _of_config(
    section: str,
    config: Any,
    kind: str,
    defaults: Mapping[str, Any],
    notes: Mapping[str, str],
    also: Sequence[str] = (),
) -> list[Field]:
    """Return the arguments of a configuration, those first that have a default of ours."""
    refused = {*(UNFIT.get(kind, {}).get(section, ())), *(place.partition(".")[2] for place in MANAGED)}
    own = {one.name: one for one in dataclasses.fields(config)}
    found = []
    for name, hint in fields_of(config).items():
        if name in refused or f"{section}.{name}" in MANAGED:
            continue
        default = defaults.get(name, _default_of(own[name]))
        text = notes.get(name) or _first_sentence(str(own[name].metadata.get("help", "")))
        usual = name in defaults or name in also
        found.append(_field(f"{section}.{name}", hint, default, text, usual))
    order = {name: number for number, name in enumerate([*defaults, *also])}
    return sorted(found, key=lambda one: order.get(one.key, len(order)))


def _default_of(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return None
    value = getattr(value, "value", value)  # of an enum
    return value if isinstance(value, bool | int | float | str | list | None) else None


def _field(place: str, hint: Any, default: Any, text: str = "", is_usual: bool = True) -> Field:
    kinds = set(_plain_types(hint)) - {type(None)}
    enums = [one for one in kinds if isinstance(one, type) and issubclass(one, enum.Enum)]
    listed = [*_literals(hint), *(member.value for one in enums for member in one)]
    choices = tuple(dict.fromkeys(map(str, listed)))
    shown = default if isinstance(default, bool | int | float | str | list | None) else None
    if kinds == {bool} and isinstance(default, bool):
        return Field(place, "switch", (), shown, text, is_usual)
    if choices and not kinds - {*enums, *((str,) if enums else ())}:
        return Field(place, "choice", choices, shown, text, is_usual)
    if kinds == {str}:
        return Field(place, "text", (), shown, text, is_usual)
    is_names = str in kinds and all(one is str or typing.get_origin(one) in (list, set) for one in kinds)
    return Field(place, "names" if is_names else "value", (), shown, text, is_usual)


def _plain_types(hint: Any) -> Iterator[Any]:
    """Yield the types of a union that are no Literal; of annotated ones what is annotated."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _plain_types(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType):
        for one in typing.get_args(hint):
            yield from _plain_types(one)
    elif origin is not Literal:
        yield hint


def _literals(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) is Literal:
        yield from typing.get_args(hint)
    else:
        for one in typing.get_args(hint):
            yield from _literals(one)


def _documented(docstring: str) -> dict[str, str]:
    """Return the first sentence on each argument of a docstring in Google's style."""
    _, _, block = docstring.partition("Args:\n")
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", block, re.MULTILINE)
    return {name: _first_sentence(text.replace("``", "")) for name, text in entries}


def _first_sentence(text: str) -> str:
    line = " ".join(text.split())
    end = re.search(r"\.(?=\s|$)", line)
    line = line[: end.end()] if end else line
    return line if len(line) <= 200 else line[:199] + "…"


def other_places(fields: Mapping[str, Sequence[Field]], sections: Mapping[str, Any]) -> list[str]:
    """Return the keys that the form does not show until they are asked for.

    Args:
        fields: From ``fields_of_kind``.
        sections: Of the recipe; what is set in it is shown.
    """
    return [
        one.place
        for group in fields.values()
        for one in group
        if not one.is_usual and value_at(sections, one.place) is MISSING
    ]


# --- YAML ---------------------------------------------------------------------------------------------------


def sections_of(text: str) -> dict[str, Any]:
    """Read a recipe's text into its sections, shorthands written out; nothing else is checked.

    Args:
        text: YAML.

    Raises:
        RecipeError: If it is not YAML, or not a mapping.
    """
    value = parse_yaml(text, "the recipe") if text.strip() else {}
    if not isinstance(value, dict):
        raise RecipeError("A recipe has sections, as in the line: model: smollm2-135m-instruct")
    return expand_shorthands({str(key): item for key, item in value.items()})


def to_text(sections: Mapping[str, Any]) -> str:
    """Write sections as YAML, in the order of the schema.

    Args:
        sections: Of a recipe; empty ones are left out.
    """
    order = [*RECIPES["vision"].model_fields]
    names = sorted(sections, key=lambda name: order.index(name) if name in order else len(order))
    kept = {name: sections[name] for name in names if sections[name] not in ({}, None)}
    if not kept:
        return ""
    return yaml.dump(kept, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def value_at(sections: Mapping[str, Any], place: str) -> Any:
    """Return what a recipe has at a place; ``MISSING`` if nothing.

    Args:
        sections: Of the recipe.
        place: ``section.key`` or a key of the recipe itself.
    """
    section, _, key = place.partition(".")
    value = sections.get(section, MISSING)
    if not key:
        return value
    return value.get(key, MISSING) if isinstance(value, Mapping) else MISSING


def with_value(sections: Mapping[str, Any], place: str, value: Any) -> dict[str, Any]:
    """Return sections with a place set; ``MISSING`` takes the key out.

    Args:
        sections: Of the recipe.
        place: As for ``value_at``.
        value: What to set.
    """
    section, _, key = place.partition(".")
    changed = dict(sections)
    inner = (
        changed if not key else dict(changed[section]) if isinstance(changed.get(section), Mapping) else {}
    )
    name = key or section
    if value is MISSING:
        inner.pop(name, None)
    else:
        inner[name] = value
    if key:
        changed[section] = inner
    return changed


def with_task(text: str, kind: str) -> str:
    """Return a recipe's text with another kind of task; what that kind has no key for is taken out.

    Args:
        text: YAML.
        kind: Of the task.
    """
    sections = sections_of(text)
    known = {one.place for group in fields_of_kind(kind).values() for one in group} | {"task.kind"}
    kept: dict[str, Any] = {}
    for name, section in sections.items():
        if isinstance(section, Mapping) and name not in ("mix", "adapter", "trainer"):
            section = {key: value for key, value in section.items() if f"{name}.{key}" in known}
        elif isinstance(section, Mapping) and name != "mix":
            section = {key: value for key, value in section.items() if f"{name}.{key}" in known or "." in key}
        kept[name] = section
    return to_text(with_value(kept, "task.kind", kind))


def merged_text(text: str, before: Mapping[str, Any], fields: Sequence[Field], shown: Sequence[Any]) -> str:
    """Return a recipe's text with what was changed in the form.

    Text and form may both have changed since the form was made; where they changed the same key to different values,
    nobody can say which is meant.

    Args:
        text: The text as it stands.
        before: The sections that the form was made from.
        fields: The form's.
        shown: What the form shows, one for each.

    Raises:
        RecipeError: If a value cannot be read, or the two contradict each other.
    """
    sections, problems = sections_of(text), []
    changed = False
    for field, widget in zip(fields, shown, strict=True):
        old, now = value_at(before, field.place), value_at(sections, field.place)
        if widget == field.to_widget(old):
            continue
        try:
            value = field.from_widget(widget, old)
        except RecipeError as error:
            problems += error.problems
            continue
        if value == now:
            continue
        if now != old:
            problems.append(
                f"{field.place} is {_said(now)} in the text and {_said(value)} in the form. Change one of them, or "
                "fill the form from the text."
            )
            continue
        sections, changed = with_value(sections, field.place, value), True
    if problems:
        raise RecipeError(problems)
    return to_text(sections) if changed else text
