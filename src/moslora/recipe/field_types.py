"""Values against the types of a configuration's fields, and both in words."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import to_jsonable_python

from moslora.recipe.keys import MANAGED, MISNAMED, MISSING
from moslora.recipe.schema import RECIPES, SECTIONS_OF
from moslora.wording import did_you_mean

__all__ = ["check_fields", "convert", "explain_all", "fields_of", "value_in_words"]

MOST_EXPLAINED = 20  # unknown keys of a section


def fields_of(config: Any) -> dict[str, Any]:
    """Return the type of every argument of a dataclass."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def check_fields(
    section: str, values: Mapping[str, Any], fields: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Check names and types against a dataclass's, and return the values as those types."""
    checked: dict[str, Any] = {}
    unknown = [name for name in values if name not in fields and f"{section}.{name}" not in MANAGED]
    explained = set(unknown[:MOST_EXPLAINED])  # a search for the nearest name takes milliseconds each
    if len(unknown) > MOST_EXPLAINED:
        problems.append(f"{section} has {len(unknown) - MOST_EXPLAINED} more unknown keys.")
    for name, value in values.items():
        place = f"{section}.{name}"
        if place in MANAGED:
            problems.append(f"{place} cannot be set: {MANAGED[place]}.")
        elif name not in fields:
            if name in explained:
                problems.append(_unknown(place, fields))
        else:
            try:
                checked[name] = convert(value, fields[name])
            except ValueError as error:
                problems.append(f"{place} is {value_in_words(value)}, but must be {error}")
    return checked


def convert(value: Any, hint: Any) -> Any:
    """Convert a value to a field's type, or raise a ValueError that says what the type is."""
    kinds = typing.get_args(hint) or (hint,)
    choices = [str(c.value) for kind in kinds if _is_enum(kind) for c in kind]
    if choices and isinstance(value, str):
        # The union of an enum and str takes any text, and complains when the trainer is made.
        if value not in choices:
            raise ValueError(f"one of {', '.join(sorted(choices))}.{did_you_mean(value, choices)}")
        return value
    config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=config)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    try:
        # Pydantic takes true for 1.
        if isinstance(value, bool) and bool not in kinds and value not in _literals(hint):
            raise ValueError(f"{_expected(hint)}.")
        return to_jsonable_python(adapter.validate_python(value))
    except ValidationError:
        raise ValueError(f"{_expected(hint)}.") from None


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _literals(hint: Any) -> list[Any]:
    """Return the values of every Literal in a type."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [value for kind in typing.get_args(hint) for value in _literals(kind)]


EXPECTED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
    Any: "anything",
}
EXPECTED_OF: dict[Any, Callable[[tuple[Any, ...]], str]] = {
    dict: lambda _: "a mapping",
    list: lambda kinds: f"a list (of {_expected(kinds[0])})" if kinds else "a list",
    set: lambda kinds: f"a list (of {_expected(kinds[0])})" if kinds else "a list",
    tuple: lambda _: "a list",
    Literal: lambda values: " or ".join(repr(value) for value in values),
    typing.Union: lambda kinds: " or ".join(dict.fromkeys(_expected(kind) for kind in kinds)),
    types.UnionType: lambda kinds: " or ".join(dict.fromkeys(_expected(kind) for kind in kinds)),
}


def _expected(hint: Any) -> str:
    """Say a type in words."""
    origin = typing.get_origin(hint) or hint
    if origin in EXPECTED_OF:
        return EXPECTED_OF[origin](typing.get_args(hint))
    if _is_enum(hint):
        return f"one of {', '.join(sorted(str(choice.value) for choice in hint))}"
    return EXPECTED.get(hint, getattr(hint, "__name__", str(hint)))


TYPE_WORDS: dict[type, str] = {
    str: "a text",
    bool: "a truth value",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
}


def value_in_words(value: Any) -> str:
    """Write a value and its type, for messages."""
    text = repr(value)
    short = text if len(text) <= 60 else text[:57] + "..."
    return "null" if value is None else f"{short} ({TYPE_WORDS.get(type(value), type(value).__name__)})"


def _unknown(place: str, names: Iterable[str]) -> str:
    """Say that a key is unknown, and which was probably meant."""
    names = list(names)
    if place in MISNAMED:
        return f"{place} is unknown; set {MISNAMED[place]}."
    hint = did_you_mean(place.rpartition(".")[2], names)
    if hint:
        return f"{place} is unknown.{hint}"
    if place.startswith("trainer."):
        of = "TRL's SFTConfig" if "packing" in names else "transformers' TrainingArguments"
        return f"{place} is unknown; the names are those of {of}."
    return f"{place} is unknown; choose one of {', '.join(sorted(names))}."


def explain_all(errors: Sequence[Any], kind: str) -> list[str]:
    """Put pydantic's errors in words, of many unknown keys the first ones."""
    unknown = [number for number, found in enumerate(errors) if found["type"] == "extra_forbidden"]
    left_out = set(unknown[MOST_EXPLAINED:])
    problems = [explain(found, kind) for number, found in enumerate(errors) if number not in left_out]
    return [*problems, *([f"{len(left_out)} more keys are unknown."] if left_out else [])]


def explain(found: Any, kind: str) -> str:
    """Put one of pydantic's errors in words."""
    *outer, name = [str(part) for part in found["loc"]]
    place = ".".join([*outer, name])
    model: type[BaseModel] = SECTIONS_OF[kind][outer[0]] if outer else RECIPES[kind]
    value = found["input"]
    match found["type"]:
        case "extra_forbidden":
            return _unknown(place, model.model_fields)
        case "missing":
            return f"{place} is missing; {MISSING[outer[0] if outer else name]}."
        case "model_type":
            return f"{place} is {value_in_words(value)}, but must be a mapping, or one name."
        case "literal_error":
            choices = typing.get_args(model.model_fields[name].annotation)
            hint = did_you_mean(value, choices)
            return f"{place} is {value_in_words(value)}, but must be {found['ctx']['expected']}.{hint}"
        case "value_error":
            return f"{place} is {value_in_words(value)}, but must be {found['ctx']['error']}."
        case "string_unicode":
            return (
                f"{place} is {value_in_words(value)}, a name that is not UTF-8, which a recipe cannot hold. Rename the "
                "file or folder, as with: mv OLD NEW (a shell completes OLD with Tab)."
            )
        case "string_type":
            return f"{place} is {value_in_words(value)}, but must be a text; put it in quotes."
    message = found["msg"].replace("dictionary", "mapping").replace("Input should", "it should")
    message = message.replace("String should", "it should")
    return f"{place} is {value_in_words(value)}; {message}."
