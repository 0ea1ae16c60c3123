"""YAML as recipes read and write it: safe, of YAML 1.2's core schema, no key twice."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from pydantic_core import to_jsonable_python

from moslora.errors import RecipeError

MOST_VALUES = 100_000  # of a document, aliases written out; a rank for each module of a large model is 1000
CHARACTERS_OF_A_VALUE = 100  # a longer text counts as several values
LONGEST_INT = 100  # characters

# YAML 1.2's core schema. PyYAML speaks 1.1, where `no` is False, 1e-3 is a text and 010 is 8.
CORE_SCHEMA: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class Loader(yaml.SafeLoader):
    """Safe YAML with the core schema. A key that occurs twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse keys that are not plain names, or occur twice."""
        seen: dict[str, Any] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"a key must be a plain name, not {getattr(key, 'value', None)!r}",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                line = seen[key.value].line + 1
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} occurs twice; it was set in line {line}",
                    problem_mark=key.start_mark,
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: Any) -> Any:
        """Read a scalar. JSON, which is YAML, escapes a character beyond 16 bits as a pair that stands for one."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and re.search("[\ud800-\udbff][\udc00-\udfff]", value):
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return value

    def construct_core_int(self, node: Any) -> int:
        """Read an integer: decimal, ``0o17`` or ``0xff``."""
        text = node.value
        if len(text) > LONGEST_INT:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(text)} characters; put it in quotes if it is a text",
                problem_mark=node.start_mark,
            )
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what the loader above would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out, because a reader should not have to follow anchors."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Quote text that contains one of Unicode's own line breaks."""
        # Unicode's own line breaks fold into spaces in every style but this one, which escapes them.
        style = '"' if re.search(r"[\x85\u2028\u2029\ufeff]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def load_bounded(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Read one YAML document whose aliases, written out, stay within ``MOST_VALUES``.

    Args:
        text: The document. Nine levels of nine aliases are 400 bytes and 400 million values.
        loader: A safe loader.

    Raises:
        yaml.YAMLError: If it cannot be read, is nested too deeply, or has too many values.
    """
    reader = loader(text)
    try:
        node = reader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(
                f"its aliases stand for more than {MOST_VALUES} values, or for one that holds itself; write it without "
                "aliases"
            )
        return reader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        reader.dispose()


def _written_out(node: yaml.Node, counts: dict[int, float]) -> float:
    """Return how many values a node stands for, each alias counted as often as it occurs, texts by their length."""
    if id(node) not in counts:
        counts[id(node)] = math.inf  # it holds itself, if this is what its own parts find
        total = 1.0
        if isinstance(node, yaml.ScalarNode):
            total += len(node.value) / CHARACTERS_OF_A_VALUE
        for part in () if isinstance(node, yaml.ScalarNode) else node.value:
            total += sum(_written_out(one, counts) for one in (part if isinstance(part, tuple) else (part,)))
        counts[id(node)] = total
    return counts[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Read one YAML document; ``where`` opens the message of an error."""
    try:
        value = load_bounded(text, Loader)
        # Gives every alias its own copy, and refuses an anchor that holds itself.
        return to_jsonable_python(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise RecipeError(f"{where}: {at}{error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: {' '.join(str(error).split())}.") from None
    except ValueError as error:
        raise RecipeError(f"{where}: this cannot be read as YAML: {error}.") from None
    except RecursionError:
        raise RecipeError(f"{where}: it is nested too deeply to be a recipe.") from None
