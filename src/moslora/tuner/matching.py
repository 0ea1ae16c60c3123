"""Which of an adapter's settings fit something in a model, told from names alone, before anything is adapted.

PEFT obeys the entries that fit and passes over the others, so that a misspelt name trains something else than was asked
for. And of two keys of a pattern that fit one module, it takes the first while it trains, but saves them sorted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moslora.adapters.factors import exact_pattern
from moslora.compat.targets import expand_targets, is_target
from moslora.compat.transformers import convert_targets
from moslora.patterns import check_patterns
from moslora.wording import did_you_mean

__all__ = ["Misfit", "UnfitSettingWarning", "find_misfits", "settle_overlaps"]

# What PEFT adds to modules_to_save by itself for these tasks; a model has one of them.
HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# What PEFT writes for an adapter that adapts nothing by its names.
DUMMY = "dummy-target-modules"
PATTERNS = ("rank_pattern", "alpha_pattern", "mixer_pattern")


class UnfitSettingWarning(UserWarning):
    """A setting of an adapter fits nothing in the model, so it does nothing."""


@dataclass(frozen=True)
class Misfit:
    """A setting that does nothing, or says two things of one module.

    Attributes:
        setting: The argument, such as ``"target_modules"``.
        problem: What is wrong with it, as the end of a sentence that begins with the argument's name.
        is_harmless: Whether it does what it says all the same, so that knowing it is enough.
    """

    setting: str
    problem: str
    is_harmless: bool = False

    def __str__(self) -> str:
        return f"{self.setting} {self.problem}"


class _Names:
    """The names of a model's modules and parameters, and those that a configuration adapts.

    Args:
        config: An adapter's configuration; it is not changed.
        model: The base, with or without weights, with or without other adapters.
    """

    def __init__(self, config: Any, model: nn.Module) -> None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        self.config = copy.copy(config)
        for name in (
            "target_modules",
            "target_parameters",
            *PATTERNS,
            "exclude_modules",
        ):
            setattr(self.config, name, copy.copy(getattr(config, name, None)))
        self.written = _listed(config.target_modules)
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type is not None:
            convert_targets(self.config, model, model_type)
        if self.config.target_modules is None:
            self.config.target_modules = KNOWN.get(model_type)
        expand_targets(self.config, model)
        clean = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        self.modules = list(dict.fromkeys(name.replace(".base_layer", "") for name in clean))
        self.parameters = list(
            dict.fromkeys(name.replace(".base_layer", "") for name, _ in model.named_parameters())
        )
        self.adapted = self.that_fit(self.config)
        wanted = self.config.target_parameters or ()
        self.adapted_parameters = [n for n in self.parameters if any(is_suffix(w, n) for w in wanted)]

    def that_fit(self, config: Any) -> list[str]:
        """Return the modules that a configuration adapts."""
        if config.target_modules is None:
            return []
        return [name for name in self.modules if is_target(config, name)]

    def without(self, **changes: Any) -> Any:
        """Return the configuration with other values."""
        changed = copy.copy(self.config)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed


def is_suffix(entry: str, name: str) -> bool:
    """Tell whether an entry of a list of targets fits a name, as PEFT reads it."""
    return name == entry or name.endswith(f".{entry}")


def _listed(value: Any) -> list[str]:
    return sorted(map(str, value)) if isinstance(value, list | tuple | set) else []


def find_misfits(config: Any, model: nn.Module) -> list[Misfit]:
    """List the settings of an adapter that fit nothing in a model, or say two things of one module.

    Args:
        config: An adapter's configuration; it is not changed.
        model: The base, with or without weights (on the meta device). It is not changed.

    Returns:
        One for each; empty if every entry does something.
    """
    check_patterns(vars(config), (name for name, _ in model.named_modules()), "The configuration")
    names = _Names(config, model)
    found = [*_targets(names), *_excluded(names), *_saved(names), *_parameters(names)]
    found += [*_layers(names), *_tokens(names, model), *_biases(names, model)]
    for setting in PATTERNS:
        found += _patterns(names, setting)
    return found


def _targets(names: _Names) -> Iterable[Misfit]:
    value = names.config.target_modules
    if isinstance(value, str) and not names.adapted and value != DUMMY:
        known = _choose(_ends(value, names.modules))
        yield Misfit("target_modules", f"is {value!r}, which fits no module of the base.{known}")
    # Of what was written, less what PEFT has other names for.
    for entry in sorted(set(_listed(value)) & set(names.written)):
        if any(is_suffix(entry, name) for name in names.adapted):
            continue
        if not any(is_suffix(entry, name) for name in names.modules):
            yield Misfit("target_modules", _fits_no(entry, "module", names.modules))
        elif reason := _why_left_out(names, entry):
            yield Misfit(
                "target_modules", f"has {entry!r}, but {reason} leaves out every module that it fits."
            )


def _why_left_out(names: _Names, entry: str) -> str | None:
    """Name the setting that takes all modules of a target; None if it was excluded or tied on purpose."""
    for setting in ("modules_to_save", "layers_to_transform"):
        if getattr(names.config, setting) is not None:
            adapted = names.that_fit(names.without(**{setting: None}))
            if any(is_suffix(entry, name) for name in adapted):
                return setting
    return None


def _excluded(names: _Names) -> Iterable[Misfit]:
    value = names.config.exclude_modules
    if isinstance(value, str) and value:
        if (fits := _compiled("exclude_modules", value, value)) and isinstance(fits, Misfit):
            yield fits
        elif not any(re.fullmatch(value, name) for name in names.modules):
            yield Misfit(
                "exclude_modules",
                f"is {value!r}, which fits no module of the base: nothing is left out by it.",
            )
    for entry in _listed(value):
        if not any(is_suffix(entry, name) for name in names.modules):
            yield Misfit("exclude_modules", _fits_no(entry, "module", names.modules))


def _saved(names: _Names) -> Iterable[Misfit]:
    task = str(getattr(names.config.task_type, "value", names.config.task_type))
    by_itself = HEADS_BY_TASK.get(task, ())
    for entry in _listed(names.config.modules_to_save):
        if entry not in by_itself and not any(name.endswith(entry) for name in names.modules):
            yield Misfit("modules_to_save", _fits_no(entry, "module", names.modules))


def _parameters(names: _Names) -> Iterable[Misfit]:
    for entry in _listed(names.config.target_parameters):
        if not any(is_suffix(entry, name) for name in names.parameters):
            yield Misfit("target_parameters", _fits_no(entry, "parameter", names.parameters))


def _layers(names: _Names) -> Iterable[Misfit]:
    value, patterns = names.config.layers_to_transform, names.config.layers_pattern
    if value is None or isinstance(names.config.target_modules, str):
        return
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        fits = _compiled("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", pattern)
        if isinstance(fits, Misfit):
            yield fits
            return
        if not any(fits.match(name) for name in names.modules):
            lists = {
                name.split(".")[-2] for name in names.modules if name.split(".")[-1].isdigit() and "." in name
            }
            yield Misfit(
                "layers_pattern",
                f"has {pattern!r}, which fits no list of layers of the base."
                f"{did_you_mean(pattern, lists) or _choose(lists)}",
            )
            return
    left = [value] if isinstance(value, int) else list(value)
    for index in dict.fromkeys(left):
        one = names.without(layers_to_transform=[index])
        if not any(is_target(one, name) for name in names.adapted):
            yield Misfit("layers_to_transform", f"has {index}, which is the index of no layer with a target.")


def _tokens(names: _Names, model: nn.Module) -> Iterable[Misfit]:
    value = names.config.trainable_token_indices
    if not value:
        return
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    for layer, tokens in value.items() if isinstance(value, Mapping) else [(None, value)]:
        if layer is not None and not any(name.endswith(layer) for name in names.modules):
            yield Misfit("trainable_token_indices", _fits_no(layer, "module", names.modules))
            continue
        module = embedding
        if layer is not None:
            module = next(m for n, m in model.named_modules(remove_duplicate=False) if n.endswith(layer))
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2:
            continue
        rows = int(getattr(module, "num_embeddings", weight.shape[0]))
        for token in tokens:
            if not 0 <= int(token) < rows:
                yield Misfit(
                    "trainable_token_indices",
                    f"has {token}, which is no token: the embedding has rows 0 to {rows - 1}.",
                )


def _biases(names: _Names, model: nn.Module) -> Iterable[Misfit]:
    value = names.config.bias
    if value == "none" or not names.adapted:
        return
    adapted = set(names.adapted)
    ends = (name.rpartition(".") for name in names.parameters)
    owners = [module for module, _, parameter in ends if parameter == "bias"]
    if not any(value == "all" or owner in adapted for owner in owners):
        whose = "the base has" if value == "all" else "the adapted modules have"
        yield Misfit("bias", f"is {value!r}, but {whose} no biases: nothing is trained by it. Leave it out.")


def _patterns(names: _Names, setting: str) -> Iterable[Misfit]:
    values: Mapping[str, Any] = getattr(names.config, setting) or {}
    fitted, wrong = _fitted(names, setting)
    yield from wrong
    for key in values:
        if not any(key in keys for keys in fitted.values()) and not any(repr(key) in str(w) for w in wrong):
            inner = key.removeprefix("^").removeprefix(r".*\.").removesuffix("$").replace("\\", "")
            yield Misfit(setting, _fits_no(key, "adapted module", names.adapted, inner))
    told = set()
    first = {keys[0] for keys in fitted.values()}
    for name, keys in fitted.items():
        other = next((key for key in keys if values[key] != values[keys[0]]), None)
        if other is None or (keys[0], other) in told:
            continue
        told.add((keys[0], other))
        count = {key: sum(key in own for own in fitted.values()) for key in (keys[0], other)}
        wide = max(count, key=lambda key: count[key])
        both = f"has {keys[0]!r} ({values[keys[0]]}) and {other!r} ({values[other]}), which both fit {name}"
        narrower = rf"^(?!{re.escape(name)}$)(.*[.])?" + wide.removeprefix("^")
        way = f"Let one of them fit it, as {narrower!r} does not, or give both one value."
        if values[sorted(keys)[0]] != values[keys[0]]:
            yield Misfit(
                setting, f"{both}: the first counts, and saving sorts them, so that the other would. {way}"
            )
        elif other not in first:
            yield Misfit(setting, f"{both}: the first counts, and the other never does. {way}")
        else:
            yield Misfit(setting, f"{both}: the first counts.", is_harmless=True)


def _fitted(names: _Names, setting: str) -> tuple[dict[str, list[str]], list[Misfit]]:
    """Return by module the keys of a pattern that fit it, in their order, and keys that cannot be read."""
    fitted: dict[str, list[str]] = {}
    wrong = []
    for key in getattr(names.config, setting) or {}:
        fits = _fitting(setting, key)
        if isinstance(fits, Misfit):
            wrong.append(fits)
            continue
        for name in (*names.adapted, *names.adapted_parameters):
            if fits(name):
                fitted.setdefault(name, []).append(key)
    return fitted, wrong


def _fitting(setting: str, key: str) -> Callable[[str], bool] | Misfit:
    """Return a function that tells whether a pattern's key fits a name, as PEFT reads it; plain names are quick."""
    start = key.startswith("^")
    plain = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
    if re.escape(plain) == key.removeprefix("^"):
        return (lambda name: name == plain) if start else (lambda name: is_suffix(plain, name))
    compiled = _compiled(setting, rf"(.*\.)?({key})$", key)
    return compiled if isinstance(compiled, Misfit) else lambda name: compiled.match(name) is not None


def _compiled(setting: str, pattern: str, written: str) -> re.Pattern[str] | Misfit:
    try:
        return re.compile(pattern)
    except re.error as error:
        return Misfit(setting, f"has {written!r}, which is not a regular expression: {error}.")


def _fits_no(entry: str, what: str, names: Iterable[str], like: str | None = None) -> str:
    like = entry if like is None else like
    known = _ends(like, names)
    hint = next((f" Did you mean {name!r}?" for name in sorted(known) if name.lower() == like.lower()), None)
    hint = hint or did_you_mean(like, known) or _choose(known)
    return f"has {entry!r}, which fits no {what} of the base.{hint}"


def _ends(like: str, names: Iterable[str]) -> set[str]:
    """Return the ends of names that are as long, in parts, as what was written."""
    depth = like.count(".") + 1
    known = {".".join(name.split(".")[-depth:]) for name in names}
    return {name for name in known if not name.split(".")[-1].isdigit()} or known


def _choose(known: Iterable[str]) -> str:
    shown = sorted(known)
    more = ", …" if len(shown) > 12 else ""
    return f" It has {', '.join(shown[:12])}{more}." if shown else ""


def settle_overlaps(config: Any, model: nn.Module) -> dict[str, list[str]]:
    """Write patterns of which two keys fit one module so that the order of keys does not matter.

    The first key that fits counts, as in PEFT, and still counts after the configuration is saved, which sorts keys.

    Args:
        config: An adapter's configuration, changed in place.
        model: The base, before it is adapted.

    Returns:
        By setting the keys that overlap with different values; empty if none do.
    """
    settings = [setting for setting in PATTERNS if len(getattr(config, setting, None) or {}) > 1]
    names = _Names(config, model) if settings else None
    found: dict[str, list[str]] = {}
    for setting in settings:
        assert names is not None
        values = getattr(config, setting)
        fitted, _ = _fitted(names, setting)
        torn = [keys for keys in fitted.values() if values[keys[0]] != values[sorted(keys)[0]]]
        if torn:
            setattr(config, setting, {exact_pattern(name): values[keys[0]] for name, keys in fitted.items()})
            found[setting] = sorted({key for keys in torn for key in keys})
    return found
