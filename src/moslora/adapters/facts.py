"""What may be so of an adapter alone, and what each verb makes of it: one table, so that no two verbs differ.

``doctor`` lists every fact at its level; a verb that a fact stops refuses with the same words; the others do their work
and say it. ``tests/test_facts.py`` tries each fact with each verb, and each piece of advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.findings import Finding, some
from moslora.errors import AdapterError

__all__ = ["FACTS", "LARGE_SCALE", "Fact", "facts_of", "is_untrained", "refuse", "to_say"]

# Beyond this alpha / r training usually diverges or the number is a slip; the paper's largest is 2.
LARGE_SCALE = 16.0
# Of the smallest to the largest singular value of a mixer: below it a direction of the rank is lost.
SINGULAR = 1e-4


@dataclass(frozen=True)
class Fact:
    """Something that may be so.

    Attributes:
        level: Of ``doctor``'s finding, one of ``findings.LEVELS``.
        check: What was looked at, in a word.
        what: What is so; may name ``{count}``, ``{of}`` and ``{names}`` of modules, and ``{span}`` of scales.
        fix: What to do about it.
        stops: Verbs that cannot do their work.
        is_said: Whether the other verbs say it of what they write, rather than leave it to ``doctor``.
    """

    level: str
    check: str
    what: str
    fix: str = ""
    stops: tuple[str, ...] = ()
    is_said: bool = False


FACTS: dict[str, Fact] = {
    "untrained": Fact(
        "error",
        "trained",
        "ΔW is zero: the adapter was not trained in any of its {of} modules, so it changes nothing.",
        "Take a later checkpoint, or train it.",
        stops=("merge",),
        is_said=True,
    ),
    "partly untrained": Fact(
        "warning",
        "trained",
        "ΔW is zero in {count} of {of} modules: {names}.",
        "Were they frozen, or never reached? moslora inspect shows all modules.",
        is_said=True,
    ),
    "trained": Fact("ok", "trained", "ΔW is not zero in any module."),
    "alpha of zero": Fact(
        "error",
        "scale",
        "alpha / r is 0 in {count} of {of} modules, so that they change nothing: {names}.",
        "Set lora_alpha (or its entry of alpha_pattern) in adapter_config.json to that of the training.",
        is_said=True,
    ),
    "alpha below zero": Fact(
        "warning",
        "scale",
        "alpha / r is below 0 in {count} of {of} modules, so that what they learned is taken away: {names}.",
        "If that is not intended, set lora_alpha in adapter_config.json to that of the training.",
        is_said=True,
    ),
    "large alpha": Fact(
        "warning",
        "scale",
        "alpha / r is {span}, large in {names}.",
        "Is this lora_alpha intended? Usual values of alpha / r are 1 and 2.",
    ),
    "usual alpha": Fact("ok", "scale", "alpha / r is {span}."),
    "singular mixers": Fact(
        "warning",
        "mixer",
        "M is nearly singular in {count} of {of} modules with mixers, so part of the rank is lost: {names}.",
        "A smaller rank would do (moslora export ADAPTER OUT --rank R), or a smaller rate for M in another training.",
    ),
    "singular mixers with magnitudes": Fact(
        "warning",
        "mixer",
        "M is nearly singular in {count} of {of} modules with mixers, so part of the rank is lost: {names}.",
        "A smaller rank would do, or a smaller rate for M, in another training.",
    ),
    "whole mixers": Fact("ok", "mixer", "{of} mixers, all of full rank."),
    "magnitudes": Fact(
        "note",
        "DoRA",
        "It has DoRA's magnitude: the factors turn the rows of the weight, a vector is their lengths. Figures "
        "of ΔW are of "
        "s·B·M·A.",
    ),
    "biases": Fact(
        "note",
        "bias",
        "It has a bias on B (lora_bias=True): h = W0·x + s·(B·M·A·x + b). Figures of ΔW leave it out.",
    ),
    "tensors beside": Fact(
        "note",
        "beside",
        "{count} tensors beside the factors (bias, modules_to_save): {names}.",
    ),
    "unlike LoRA": Fact(
        "warning",
        "layers",
        "{count} modules that a plain LoRA would compute otherwise: {names}.",
        "Load it on its base with PEFT (import moslora first), call merge_and_unload(), and save the model: "
        "full weights.",
    ),
}


@dataclass(frozen=True)
class Found:
    """A fact of an adapter.

    Attributes:
        name: A key of ``FACTS``.
        modules: Of which modules or tensors it is so.
        of: Of how many.
        span: Its scales, as a text.
    """

    name: str
    modules: Sequence[str]
    of: int
    span: str = ""

    @property
    def fact(self) -> Fact:
        """The entry of the table."""
        return FACTS[self.name]

    @property
    def what(self) -> str:
        """What is so, with its modules."""
        return self.fact.what.format(
            count=len(self.modules), of=self.of, names=some(self.modules), span=self.span
        )

    @property
    def finding(self) -> Finding:
        """The same as ``doctor`` says it."""
        return Finding(self.fact.level, self.fact.check, self.what, self.fact.fix)


def is_untrained(factors: Factors) -> bool:
    """Tell whether a module changes nothing: its ΔW is zero, and neither a magnitude nor a bias says otherwise.

    (A magnitude may be trained while B is still zero, and only the base tells by how much.)

    Args:
        factors: Of the module.
    """
    has_moved_bias = factors.bias is not None and factors.scale != 0 and bool(factors.bias.any())
    return factors.magnitude is None and not has_moved_bias and factors.is_zero()


def facts_of(adapter: Adapter) -> list[Found]:
    """Return what is so of an adapter, whatever its base.

    Args:
        adapter: The adapter.
    """
    return [
        *_beyond_factors(adapter),
        *_trained(adapter),
        *_scales(adapter),
        *_mixers(adapter),
        *_beside(adapter),
    ]


def refuse(adapter: Adapter, verb: str) -> None:
    """Refuse what stops a verb.

    Args:
        adapter: What it would work on.
        verb: Its name.

    Raises:
        AdapterError: With the fact, and what to do.
    """
    for found in _said(adapter):
        if verb in found.fact.stops:
            raise AdapterError(f"{found.what} {found.fact.fix}")


def to_say(adapter: Adapter) -> tuple[str, ...]:
    """Return what a verb says of an adapter that it writes, one text each.

    Args:
        adapter: What was read.
    """
    return tuple(f"{found.what} {found.fact.fix}" for found in _said(adapter) if found.fact.is_said)


def _said(adapter: Adapter) -> list[Found]:
    """What verbs say or refuse: cheaper than all facts."""
    return [*_trained(adapter), *_scales(adapter)]


def _beyond_factors(adapter: Adapter) -> Iterator[Found]:
    if adapter.has_magnitudes:
        yield Found("magnitudes", [], len(adapter.modules))
    if adapter.has_biases:
        yield Found("biases", [], len(adapter.modules))


def _trained(adapter: Adapter) -> Iterator[Found]:
    """Scales of zero are facts of their own."""
    scaled = {name: factors for name, factors in adapter.modules.items() if factors.scale != 0}
    zero = [name for name, factors in scaled.items() if is_untrained(factors)]
    if not scaled:
        return
    is_all = len(zero) == len(scaled) and not adapter.extra
    name = "untrained" if is_all else "partly untrained" if zero else "trained"
    yield Found(name, zero, len(adapter.modules))


def _scales(adapter: Adapter) -> Iterator[Found]:
    scales = {name: factors.scale for name, factors in adapter.modules.items()}
    least, most = min(scales.values()), max(scales.values())
    span = f"{least:g}" if least == most else f"{least:g} to {most:g}"
    odd: dict[str, Iterable[str]] = {
        "alpha of zero": (name for name, scale in scales.items() if scale == 0),
        "alpha below zero": (name for name, scale in scales.items() if scale < 0),
        "large alpha": (name for name, scale in scales.items() if abs(scale) > LARGE_SCALE),
    }
    found = [Found(fact, names, len(scales), span) for fact, of in odd.items() if (names := list(of))]
    yield from found or [Found("usual alpha", [], len(scales), span)]


def _mixers(adapter: Adapter) -> Iterator[Found]:
    import torch

    mixed = {name: factors for name, factors in adapter.modules.items() if not factors.is_folded}
    flat = []
    for name, factors in mixed.items():
        values = torch.linalg.svdvals(factors.M.double())
        if values[-1] < SINGULAR * values[0]:
            flat.append(name)
    fact = "singular mixers with magnitudes" if adapter.has_magnitudes else "singular mixers"
    if flat:
        yield Found(fact, flat, len(mixed))
    elif mixed:
        yield Found("whole mixers", [], len(mixed))


def _beside(adapter: Adapter) -> Iterator[Found]:
    if adapter.extra:
        yield Found("tensors beside", sorted(adapter.extra), len(adapter.extra))
    parts = adapter.config.get("components", {"": adapter.config}).values()
    unlike = sorted(name for part in parts for name in part.get("unlike_lora") or {})
    if unlike:
        yield Found("unlike LoRA", unlike, len(adapter.modules))
