"""Advise: the rules applied to a recipe, as a table with reasons and sources, and overrides to paste."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.advice.rules import RULES, Rule, known_kinds
from moslora.advice.situation import Situation
from moslora.advice.sources import GUESS, SOURCES
from moslora.display import Display, Printable
from moslora.wording import one_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Advice", "Recommendation", "advise_on", "short_form"]


@dataclass(frozen=True)
class Recommendation:
    """One setting, as the recipe has it and as is advised.

    Attributes:
        key: The setting.
        recipe: What the recipe has, as a text.
        is_default: Whether that is a default that the recipe does not name.
        advised: What is advised, as a text.
        fits: Whether the recipe is as advised; None where nothing can be said of that.
        why: The reason.
        sources: Keys of ``SOURCES``; empty for a guess of ours.
        is_guess: Whether it is our guess, in whole or in part.
        overrides: Settings that bring the recipe there.
        dissent: What others found that does not agree, with the source.
        ours: What we measured ourselves; empty if nothing.
    """

    key: str
    recipe: str
    is_default: bool
    advised: str
    fits: bool | None
    why: str
    sources: tuple[str, ...]
    is_guess: bool
    overrides: tuple[str, ...]
    dissent: tuple[str, ...]
    ours: str

    @property
    def source(self) -> str:
        """Keys of the sources; that it is a guess is said."""
        named = ", ".join(self.sources)
        if not named:
            return GUESS
        return f"{named}; in part {GUESS}" if self.is_guess else named


@dataclass(frozen=True, repr=False)
class Advice(Printable):
    """What to try.

    Attributes:
        target: The recipe, as it was named.
        situation: What the advice is given on.
        recommendations: One for each setting.
        notes: What could not be found out, as sentences.
        settings: Settings of the caller's, which stand before the overrides in what is to be pasted.
    """

    target: str
    situation: Situation
    recommendations: tuple[Recommendation, ...]
    notes: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Settings that bring the recipe to what is advised, as on the command line."""
        return [setting for one in self.recommendations for setting in one.overrides]

    @property
    def sources(self) -> dict[str, str]:
        """The sources that are named, by their keys."""
        named = {key for one in self.recommendations for key in one.sources}
        return {key: text for key, text in SOURCES.items() if key in named}

    def show(self, display: Display) -> None:
        """Write what is known, the table, who disagrees, the sources, and what to paste."""
        display.say(self.about)
        display.show(_table(self.recommendations))
        for one in self.recommendations:
            if one.ours:
                display.say(f"Ours, {one.key}: {one.ours}")
        for one in self.recommendations:
            for text in one.dissent:
                display.say(f"Against it, {one.key}: {text}")
        for key, text in self.sources.items():
            display.say(f"[{key}] {text}")
        for note in self.notes:
            display.say(note)
        if self.overrides:
            display.say()
            display.say(f"To try it: moslora train {self.command_tail}", style="bold")
        else:
            display.say("Nothing that could be checked differs from what is advised.")

    @property
    def about(self) -> str:
        """What the advice is given on, in a sentence."""
        s = self.situation
        parts = [f"task: {s.kind}", s.model]
        if s.hidden:
            parts.append(f"{s.architecture}, width {s.hidden}")
        if s.trained:
            parts.append(f"{s.trained:,} trained parameters")
        if s.examples is not None:
            tokens = (
                ""
                if s.tokens is None
                else f", {'about ' if s.is_estimate else ''}{s.tokens:,} trained tokens"
            )
            parts.append(f"{s.examples:,} rows{tokens}")
        if s.steps is not None:
            parts.append(f"{s.steps:,} steps of {s.rows} rows on one device")
        return "; ".join(parts) + "."

    @property
    def command_tail(self) -> str:
        """The recipe and the overrides, ready to paste behind ``moslora train``."""
        return shlex.join([*([self.target] if self.target else []), *self.settings, *self.overrides])

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        situation = dataclasses.asdict(self.situation)
        situation.pop("recipe")
        return {
            "target": self.target,
            "situation": {
                **situation,
                "given": sorted(self.situation.given),
                "steps": self.situation.steps,
                "rows": self.situation.rows,
            },
            "recommendations": [
                {**dataclasses.asdict(one), "source": one.source} for one in self.recommendations
            ],
            "overrides": self.overrides,
            "sources": self.sources,
            "notes": list(self.notes),
        }


def advise_on(situation: Situation, target: str = "") -> Advice:
    """Apply the rules to a situation.

    Args:
        situation: What is known.
        target: The recipe, as it was named.
    """
    notes, kind = list(situation.notes), situation.kind
    if kind not in known_kinds():
        notes.append(
            f"No rule is for task: {kind}. The advice is that for text, and whether it holds here is {GUESS}."
        )
    wanted = kind if kind in known_kinds() else "text"
    found = [
        recommendation
        for rule in RULES
        if wanted in rule.kinds and (recommendation := _apply(rule, situation, wanted != kind)) is not None
    ]
    return Advice(target, situation, tuple(found), tuple(notes))


def _apply(rule: Rule, situation: Situation, is_elsewhere: bool) -> Recommendation | None:
    proposal = rule.propose(situation)
    if proposal is None:
        return None
    return Recommendation(
        key=rule.key,
        recipe=_as_text(situation.recipe.get(rule.key)),
        is_default=rule.key not in situation.given,
        advised=proposal.text,
        fits=proposal.fits,
        why=f"{rule.why} {proposal.why}".strip(),
        sources=rule.sources,
        is_guess=proposal.is_guess or not rule.sources or is_elsewhere,
        overrides=proposal.overrides,
        dissent=tuple(f"{one.text} [{one.source}: {SOURCES[one.source]}]" for one in rule.dissent),
        ours=rule.ours,
    )


def short_form(advice: Advice, display: Display) -> None:
    """Write advice in a few lines, for a dry run.

    Args:
        advice: The advice.
        display: Where to.
    """
    differs = [one for one in advice.recommendations if one.fits is False]
    if not differs:
        display.say(
            "Advice: nothing that was checked differs from it. moslora advise shows reasons and sources."
        )
        return
    for one in differs:
        default = " (default)" if one.is_default else ""
        display.say(f"Advice: {one.key} is {one.recipe}{default}; advised {one.advised} [{one.source}].")
    display.say(f"Reasons and sources: moslora advise. To try it: {shlex.join(advice.overrides)}")


def _as_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple | set):
        return one_line(", ".join(map(str, value)), 60)
    return one_line(value, 60)


def _table(recommendations: Sequence[Recommendation]) -> Table:
    """Lay out the advice; a mark says whether the recipe is as advised."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("", width=1)
    for name, ratio in (("key", 4), ("recipe", 3), ("advised", 4), ("why", 10), ("source", 2)):
        table.add_column(name, overflow="fold", ratio=ratio)
    marks = {True: ("✓", "green"), False: ("→", "bold yellow"), None: ("·", "dim")}
    for one in recommendations:
        mark, style = marks[one.fits]
        default = "\n(default)" if one.is_default and one.recipe != "–" else ""
        table.add_row(
            Text(mark, style=style),
            Text(one.key),
            Text(one.recipe + default),
            Text(one.advised, style=style if one.fits is False else ""),
            Text(one.why),
            Text(one.source, style="italic" if one.is_guess else ""),
        )
    return table
