"""The evaluator of rules: what an engine would do with every module of an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moslora.adapters.engines.rules import OUTCOMES, Engine, Model, Rule, read_engine
from moslora.adapters.engines.traits import TOWER, TRAITS
from moslora.adapters.factors import Adapter
from moslora.adapters.findings import Finding, some
from moslora.adapters.formats import experts

__all__ = ["FIXES", "Prediction", "predict"]

FIXES: Mapping[str, str] = {
    "merge": "Merge it (moslora merge BASE ADAPTER OUT), and serve the full model.",
    "merge live": "Load it on its base with PEFT, merge_and_unload(), and ship the full model.",
    "merge biases": (
        "If the base's layers have biases: moslora merge, and ship the full model. Else set lora_bias=False."
    ),
    "export": "moslora export ADAPTER OUT --for {engine} --base MODEL, which writes the form that it applies.",
}


@dataclass(frozen=True)
class Prediction:
    """What an engine would do with an adapter.

    Attributes:
        engine: The engine's key.
        version: Of the engine whose rules were read.
        applied: Paths of the modules that it applies.
        lost: The others, and what becomes of each: a key of ``rules.OUTCOMES``.
        unsure: Those of which some of its models apply.
        findings: What there is to say, each with its source.
        flags: Options of the command that it needs.
        command: That serves it; empty where it does not.
    """

    engine: str
    version: str
    applied: tuple[str, ...]
    lost: Mapping[str, str]
    unsure: tuple[str, ...]
    findings: tuple[Finding, ...]
    flags: tuple[str, ...] = ()
    command: str = ""

    @property
    def faults(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def is_whole(self) -> bool:
        """Whether it applies every module."""
        return not self.lost


@dataclass
class _Fate:
    """What was found so far of the modules, by path."""

    engine: Engine
    key: str
    adapter: Adapter
    lost: dict[str, str] = field(default_factory=dict)
    unsure: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    def decide(self, outcome: str, modules: list[str], check: str, what: str, source: str, fix: str) -> None:
        """Say what becomes of modules, unless something was said of them before."""
        new = [path for path in modules if path not in self.lost]
        if not new:
            return
        if outcome in ("refused", "left out", "wrong"):
            self.lost |= dict.fromkeys(new, outcome)
        elif outcome == "unsure":
            self.unsure += new
        text = what.format(
            modules=some(new), count=len(new), total=len(self.adapter.modules), r=_rank(self.adapter)
        )
        where = f" ({self.engine.name} {self.engine.version}: {source})"
        fix = FIXES.get(fix, fix).format(engine=self.key)
        self.findings.append(Finding(OUTCOMES[outcome], check, f"{text}{where}", fix))


def predict(key: str, adapter: Adapter, config: Mapping[str, Any] | None = None) -> Prediction:
    """Predict what an engine does with every module of an adapter, by its rules.

    Args:
        key: The engine's name on the command line.
        adapter: As the file that the engine reads has it, names included.
        config: The base's ``config.json``; None where it is not known. Rules about the engine's model need it.

    Returns:
        What it applies, and what not.
    """
    engine = read_engine(key)
    fate = _Fate(engine, key, adapter)
    model = _model(fate, config)
    for rule in engine.rules:
        _follow(rule, fate, model)
    if model is not None:
        _names(fate, model)
    _options(fate)
    applied = tuple(path for path in adapter.modules if path not in fate.lost)
    command = ""
    if not fate.lost and engine.serve:
        flags = "".join(f" {flag}" for flag in fate.flags)
        command = engine.serve.format(base="MODEL", adapter="ADAPTER", flags=flags)
    return Prediction(
        key,
        engine.version,
        applied,
        fate.lost,
        tuple(fate.unsure),
        tuple(fate.findings),
        tuple(fate.flags),
        command,
    )


def _rank(adapter: Adapter) -> int:
    return max((factors.r for factors in adapter.modules.values()), default=0)


def _model(fate: _Fate, config: Mapping[str, Any] | None) -> Model | None:
    """Find the engine's class of the base; say so where it has none, or takes no adapters."""
    engine = fate.engine
    named = (config or {}).get("architectures")
    if not engine.models or not isinstance(named, list) or not named:
        return None
    architecture, everything = str(named[0]), list(fate.adapter.modules)
    model = engine.models.get(architecture)
    if model is None:
        about = engine.unknown
        if not about:
            return None
        what = about["what"].format(architecture=architecture)
        fate.decide(about["outcome"], everything, "model", what, about["source"], about.get("fix", "merge"))
    elif not model.lora:
        what = f"{architecture} takes no adapters there."
        fate.decide("refused", everything, "model", what, model.file, "merge")
        return None
    return model


def _follow(rule: Rule, fate: _Fate, model: Model | None) -> None:
    if rule.where:
        if model is None:
            return
        for name, wanted in rule.where.items():
            if getattr(model, name) != wanted:
                return
    modules = [path for path in TRAITS[rule.of](fate.adapter) if path not in fate.lost]
    if rule.of in ("embedding", "head") and model is not None:
        modules = [path for path in modules if path.rpartition(".")[2] not in model.embeddings]
    modules = [path for path in modules if _last(path) not in rule.besides]
    if not modules:
        return
    if rule.outcome == "flag":
        fate.flags.append(rule.flag)
    fate.decide(rule.outcome, modules, rule.check, rule.what, rule.source, rule.fix)


def _last(path: str) -> str:
    """Return what kind of module a path is of, as options name it."""
    return experts.owner(path).removesuffix(".base_layer").rpartition(".")[2]


def _names(fate: _Fate, model: Model) -> None:
    """Hold each module's name, as the engine reads it, against where its model applies adapters."""
    lost: list[str] = []
    towers: list[str] = []
    for path in fate.adapter.modules:
        if path in fate.lost:
            continue
        name = model.names.rename(experts.owner(path))
        if name is not None and _is_tower(name, model):
            towers.append(path)
        elif name is None or not _is_applied(name, path, model):
            lost.append(path)
    if towers and model.tower_lora:
        flag = "--enable-tower-connector-lora"
        fate.flags.append(flag)
        what = f"{{count}} modules of what sees or hears ({{modules}}) need the option {flag}."
        fate.decide("flag", towers, "tower", what, model.file, "")
    elif towers:
        what = "{count} of {total} modules are of what sees or hears ({modules}), and are left out without a word."
        fate.decide("left out", towers, "tower", what, model.file, "merge")
    what = (
        "{count} of {total} modules ({modules}) come to names that its model does not have, and are left out without "
        "a word."
    )
    fate.decide("left out", lost, "names", what, model.file, "export")


def _is_tower(name: str, model: Model) -> bool:
    if model.tower:
        return name.startswith(model.tower) and not (model.language and name.startswith(model.language))
    return bool(model.language) and not name.startswith(model.language) and bool(TOWER.search(name))


def _is_applied(name: str, path: str, model: Model) -> bool:
    if model.pattern and not re.search(model.pattern, name):
        return False
    if not model.language or name.startswith(model.language):
        return True
    return model.text_names and path.startswith(("model.layers.", "layers.", "lm_head", "model.embed_tokens"))


def _options(fate: _Fate) -> None:
    """Add the options of rank and of targets."""
    about = fate.engine.rank
    r = _rank(fate.adapter)
    if about:
        room = next((step for step in about["of"] if step >= r), None) if about.get("of") else r
        if room is None:
            largest = about["of"][-1]
            fate.decide(
                "refused",
                list(fate.adapter.modules),
                "rank",
                f"Rank {{r}} is above its largest, {largest}.",
                about["source"],
                f"moslora export ADAPTER OUT --rank {largest}, which says what it costs.",
            )
        elif room > about.get("default", 0):
            flag = f"{about['flag']} {room}"
            fate.flags.append(flag)
            if about.get("of"):
                what = f"Rank {{r}} needs the option {flag}."
                fate.decide("flag", list(fate.adapter.modules), "rank", what, about["source"], "")
    if fate.engine.targets:
        fate.flags.append(
            f"{fate.engine.targets['flag']} {' '.join(_targets(fate.adapter, fate.engine.targets))}"
        )


def _targets(adapter: Adapter, about: Mapping[str, Any]) -> Iterator[str]:
    """Name the kinds of modules, as the option takes them."""
    fused: Mapping[str, str] = about.get("fused", {})
    yield from sorted({fused.get(last, last) for path in adapter.modules for last in [_last(path)]})
