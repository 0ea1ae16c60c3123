"""The rules of an engine, read from its file: what it refuses, leaves out, or applies only with an option.

Every file beside this one, ``vllm.yaml`` and its like, is of one version of the engine, and each of its lines says
where in the engine's source it was read. ``docs/serving.md`` has the table of what each was checked against.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["OUTCOMES", "Engine", "Model", "Names", "Rule", "read_engine"]

# What an engine does with the modules that a rule names → the level of the finding.
OUTCOMES: Mapping[str, str] = {
    "refused": "error",  # it says so and does not load the adapter
    "left out": "error",  # it loads the adapter and runs without them
    "wrong": "error",  # it loads the adapter and computes something else
    "unsure": "warning",  # some of its models apply them
    "flag": "note",  # it applies them, with an option
}


@dataclass(frozen=True)
class Rule:
    """One line of an engine's file.

    Attributes:
        check: What is looked at, in a word.
        of: The trait of the modules that it is about, a key of ``traits.TRAITS``.
        outcome: A key of ``OUTCOMES``.
        what: What the engine does, as a sentence; ``{modules}``, ``{count}`` and ``{r}`` are filled in.
        source: File and name in the engine's source.
        fix: What to do about it; a key of ``predict.FIXES`` or a sentence.
        flag: The option that a rule of outcome ``flag`` adds to the command.
        where: Facts of the base's model, by their name in ``Model``, that must hold for the rule to hold.
        besides: Last words of the paths of modules that it is not about.
    """

    check: str
    of: str
    outcome: str
    what: str
    source: str
    fix: str = ""
    flag: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    besides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """How an engine renames what a file calls a module, in this order, each pattern once.

    Attributes:
        regex: Replacement by regular expression.
        substr: By what may be anywhere in a name.
        prefix: By what a name may begin with.
        suffix: By what it may end with; such a name is a tensor's.
    """

    regex: Mapping[str, str | None] = field(default_factory=dict)
    substr: Mapping[str, str | None] = field(default_factory=dict)
    prefix: Mapping[str, str | None] = field(default_factory=dict)
    suffix: Mapping[str, str | None] = field(default_factory=dict)

    def rename(self, path: str) -> str | None:
        """Return the engine's path of a module; None if it has none.

        Args:
            path: As the file has it.
        """
        name = f"{path}.lora_A.weight"
        for pattern, new in self.regex.items():
            if re.search(pattern, name):
                if new is None:
                    return None
                name = re.sub(pattern, new, name)
        for part, new in self.substr.items():
            if part in name:
                if new is None:
                    return None
                name = name.replace(part, new, 1)
        for part, new in self.prefix.items():
            if name.startswith(part):
                if new is None:
                    return None
                name = name.replace(part, new, 1)
        for part, new in self.suffix.items():
            if name.endswith(part):
                if new is None:
                    return None
                name = new.join(name.rsplit(part, 1))
        return name.removesuffix(".lora_A.weight")


@dataclass(frozen=True)
class Model:
    """What an engine's class of a model says.

    Attributes:
        file: Where the class is, in the engine's source.
        lora: Whether it takes adapters at all.
        embeddings: Which of embedding and head it adapts, by the last word of their paths.
        experts: How files must hold its experts: ``apart``, each a module of three, or ``together``, as PEFT's
            ``target_parameters``; empty where it has none.
        language: What the paths of its language model begin with, in the engine; empty where that is all of it.
        tower: The same of what sees or hears, and of what connects it.
        tower_lora: Whether an option adapts those.
        text_names: Whether it takes names of the language model alone, too.
        names: How it renames a file's modules.
        pattern: Regular expression of the paths that it adapts, in the engine; empty for all.
    """

    file: str = ""
    lora: bool = True
    embeddings: tuple[str, ...] = ()
    experts: str = "apart"
    language: str = ""
    tower: tuple[str, ...] = ()
    tower_lora: bool = False
    text_names: bool = False
    names: Names = field(default_factory=Names)
    pattern: str = ""


@dataclass(frozen=True)
class Engine:
    """What is known of an engine.

    Attributes:
        name: What it calls itself.
        version: Of which the rules are.
        format: The format that it loads, one of ``formats.table.WRITTEN``; empty where that depends on the adapter.
        serve: The command that serves an adapter; ``{base}``, ``{adapter}`` and ``{flags}`` are filled in.
        rules: In the order in which they are tried; the first that names a module says what becomes of it.
        rank: Option, steps and default of the largest rank: ``flag``, ``of``, ``default``, ``source``.
        targets: Option that names the adapted modules: ``flag``, ``source``, ``fused`` (what the engine calls
            projections that it has in one).
        models: Its classes of models by what ``config.json`` says in ``architectures``; empty where it does not
            matter, or all are alike.
        unknown: What an architecture that is not in ``models`` means: an outcome, ``what`` and ``source``.
    """

    name: str
    version: str
    format: str = ""
    serve: str = ""
    rules: tuple[Rule, ...] = ()
    rank: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def read_engine(key: str) -> Engine:
    """Read the rules of an engine.

    Args:
        key: Its name on the command line, a key of ``targets.TARGETS``.

    Returns:
        What its file says.

    Raises:
        ValueError: If the file says what no rule can mean; a test reads them all.
    """
    import yaml

    name = f"{key.replace('.', '_')}.yaml"
    text = importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rules = tuple(_made(Rule, rule, name) for rule in found.pop("rules", ()))
    models = {
        architecture: _made(
            Model,
            {
                **about,
                "names": _made(Names, about.get("names", {}), name),
                "embeddings": tuple(about.get("embeddings", ())),
                "tower": tuple(about.get("tower", ())),
            },
            name,
        )
        for architecture, about in found.pop("models", {}).items()
    }
    engine: Engine = _made(Engine, {**found, "rules": rules, "models": models}, name)
    for rule in rules:
        if rule.outcome not in OUTCOMES or not rule.source:
            raise ValueError(
                f"{name}: the rule {rule.check!r} has the outcome {rule.outcome!r}, source {rule.source!r}."
            )
    return engine


def _made(kind: Any, values: Mapping[str, Any], name: str) -> Any:
    unknown = values.keys() - {one.name for one in fields(kind)}
    if unknown:
        raise ValueError(f"{name}: {sorted(unknown)} is not a field of {kind.__name__}.")
    return kind(**values)
