"""Write the demo's data: everyday requests to a smart home, and the JSON commands they mean.

    python recipes/home/generate.py        writes train.jsonl and heldout.jsonl beside this file

The same seed gives the same bytes. Nothing that carries meaning is shared by the two splits: every wording
in ``WORDINGS`` belongs to one of them, and so does every pair of a device and a room. Held-out examples of
the kind ``new-name`` go further and name devices, rooms or people that training never mentions.
What the JSON means is told in README.md.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

SEED = 2406
HERE = Path(__file__).resolve().parent
SPLITS = ("train", "heldout")
TRAIN_ROUNDS = 105
HELDOUT_ROUNDS = 20
SYSTEM = "Home"  # short on purpose: without one, chat templates insert a longer one of their own

# --- The house -------------------------------------------------------------------------------------------
# A device's family says what can be done with it. New names occur in held-out examples only.

FAMILIES = {
    "light": ("lamp", "ceiling light", "reading lamp", "floor lamp", "fairy lights", "spotlights"),
    "sound": ("radio", "TV", "stereo", "speakers"),
    "climate": ("heater", "radiator", "thermostat"),
    "air": ("fan", "humidifier", "air purifier"),
    "cover": ("blinds", "curtains", "window", "shutters"),
    "lock": ("door", "cupboard", "safe"),
    "machine": ("camera", "vacuum", "coffee machine", "charger"),
}
NEW_FAMILIES = {
    "light": ("chandelier", "lantern", "night light"),
    "sound": ("turntable", "soundbar"),
    "climate": ("fireplace", "boiler"),
    "air": ("ventilator", "ioniser"),
    "cover": ("awning", "skylight"),
    "lock": ("hatch", "wine cabinet"),
    "machine": ("projector", "fish tank", "printer"),
}
ROOMS = (
    "kitchen", "living room", "bedroom", "bathroom", "hallway", "office", "nursery", "dining room",
    "basement", "garage", "guest room", "laundry room", "workshop", "den",
)  # fmt: skip
NEW_ROOMS = ("attic", "conservatory", "pantry", "library", "sauna", "studio", "gym", "wine cellar")
PEOPLE = ("Mia", "Leo", "Emma", "Ben", "Anna", "Tom", "Julia", "Max", "Lena", "Paul", "Sarah", "David")
NEW_PEOPLE = ("Priya", "Otto", "Noor", "Yuki", "Ingrid", "Mateo")

FAMILY_OF = {
    name: family for table in (FAMILIES, NEW_FAMILIES) for family, names in table.items() for name in names
}
PLURAL = {"fairy lights", "spotlights", "speakers", "blinds", "curtains", "shutters"}
LEVELS = ("light", "sound", "climate", "air")  # families with a level that can be raised and lowered
ACTIONS = {
    family: {"cover": ("open", "close"), "lock": ("lock", "unlock")}.get(family, ("on", "off"))
    for family in FAMILIES
}
OPPOSITE = {"on": "off", "off": "on", "open": "close", "close": "open", "lock": "unlock", "unlock": "lock"}
CONDITIONS = (
    "rain", "no rain", "dark", "not dark", "wind", "no wind",
    "nobody home", "home", "home", "away", "below", "above",
)  # fmt: skip
COMPARATIVES = {
    ("light", "up"): "brighter", ("light", "down"): "dimmer",
    ("sound", "up"): "louder", ("sound", "down"): "quieter",
    ("climate", "up"): "warmer", ("climate", "down"): "cooler",
    ("air", "up"): "stronger", ("air", "down"): "weaker",
}  # fmt: skip

MINUTES = (5, 10, 15, 20, 25, 30, 40, 45, 60, 90, 120)  # delays and durations
SMALL_AND_LARGE = (10, 30)  # percent: what "a bit" and "a lot" mean

# --- The wordings: (train, held-out) ----------------------------------------------------------------------
# Lower-case slots stand inside a sentence, upper-case ones open it: {d} device, {a} {b} {c} whole commands,
# {v} value, {amount} "by 20 percent" or "a bit", {much} "20 percent" or "a bit", {when} time, {if} condition.

_WORDINGS = {
    # Plain commands, as imperatives.
    "on": (
        "turn on {d} | turn {d} on | switch on {d} | switch {d} on | put {d} on | power up {d}",
        "have {d} turned on | get {d} switched on | flip {d} on",
    ),
    "off": (
        "turn off {d} | turn {d} off | switch off {d} | switch {d} off | power down {d} | shut off {d}",
        "have {d} turned off | get {d} switched off | flip {d} off | shut down {d}",
    ),
    "open": ("open {d} | open up {d} | get {d} open", "pull {d} open | have {d} opened"),
    "close": ("close {d} | shut {d} | get {d} closed", "pull {d} shut | have {d} closed"),
    "lock": ("lock {d} | lock up {d} | get {d} locked", "have {d} locked | make sure {d} is locked"),
    "unlock": (
        "unlock {d} | get {d} unlocked | undo the lock on {d}",
        "have {d} unlocked | make sure {d} is unlocked",
    ),
    "set": (
        "set {d} to {v} | put {d} at {v} | change {d} to {v} | turn {d} to {v}",
        "bring {d} to {v} | adjust {d} to {v} | have {d} set to {v}",
    ),
    "up": (
        "turn {d} up {amount} | turn up {d} {amount} | raise {d} {amount} | "
        "make {d} {much} {more} | get {d} {much} {more}",
        "have {d} turned up {amount} | bring {d} up {amount} | have {d} {much} {more}",
    ),
    "down": (
        "turn {d} down {amount} | turn down {d} {amount} | lower {d} {amount} | "
        "make {d} {much} {more} | get {d} {much} {more}",
        "have {d} turned down {amount} | bring {d} down {amount} | have {d} {much} {more}",
    ),
    # Plain commands, as statements.
    "say on": (
        "I want {d} on. | {D} should be on. | I need {d} on now. | {D} can go on.",
        "I'd be happier with {d} on. | It would be nice to have {d} on.",
    ),
    "say off": (
        "I want {d} off. | {D} should be off. | I don't need {d} any more. | {D} can go off now.",
        "I'm done with {d}. | No need for {d} right now.",
    ),
    "say open": ("I want {d} open. | {D} should be open.", "I'd be happier with {d} open."),
    "say close": ("I want {d} closed. | {D} should be closed.", "I'd be happier with {d} shut."),
    "say lock": (
        "I want {d} locked. | {D} should be locked.",
        "{D} shouldn't stay unlocked. | I'd be happier with {d} locked.",
    ),
    "say unlock": (
        "I want {d} unlocked. | {D} should be unlocked.",
        "{D} shouldn't stay locked. | I'd be happier with {d} unlocked.",
    ),
    "say set": (
        "I want {d} at {v}. | {D} should be at {v}. | {V} is right for {d}. | "
        "{V} for {d}, please. | I like {d} best at {v}. | Let's have {v} on {d}.",
        "{V} would be perfect for {d}. | I'd say {v} for {d}.",
    ),
    "say up": (
        "I want {d} {much} {more}. | {D} should be {much} {more}. | {D} could be {much} {more}.",
        "I'd prefer {d} {much} {more}. | How about {d} {much} {more}?",
    ),
    "say down": (
        "I want {d} {much} {more}. | {D} should be {much} {more}. | {D} could be {much} {more}.",
        "I'd prefer {d} {much} {more}. | How about {d} {much} {more}?",
    ),
    # Around one command.
    "one": (
        "{A}. | {A}, please. | Please {a}. | Could you {a}? | Can you {a} for me? | Hey, {a}. | "
        "I'd like you to {a}. | {A}, will you? | Um, {a}, thanks. | Would you {a}, please? | "
        "I was wondering if you could {a}. | Be a dear and {a}. | One thing: {a}. | Let's {a}.",
        "Any chance you could {a}? | Do me a favour and {a}. | I need you to {a}. | "
        "Go ahead and {a}. | It's time to {a}. | Would you be so kind as to {a}? | Quick one: {a}. | "
        "{A}, cheers. | Would it be possible to {a}?",
    ),
    # Time.
    "at": (
        "at {t} | when it's {t} | at exactly {t} | when the clock says {t} | at about {t}",
        "as soon as it's {t} | at {t} sharp | once it's {t}",
    ),
    "after": (
        "in {duration} | {duration} from now | in about {duration} | with a delay of {duration} | {duration} later",
        "after {duration} | after waiting {duration}",
    ),
    "for": (
        "for {duration} | for just {duration} | for about {duration} | for the next {duration} | "
        "for {duration} altogether",
        "for only {duration} | for a total of {duration}",
    ),
    "timed": (
        "{A} {when}. | {A} {when}, please. | {When}, {a}. | Please {a} {when}. | "
        "Can you {a} {when}? | Hey, {when}, {a}. | Um, {a} {when}, thanks. | Remember to {a} {when}. | "
        "{When}, would you {a}? | {When}, we should {a}. | A job for you: {a} {when}.",
        "{When}, I'd like you to {a}. | Don't forget to {a} {when}. | Plan to {a} {when}. | "
        "Here's one for later: {a} {when}. | {A} {when}, cheers. | "
        "{When}, it would be good to {a}.",
    ),
    # Several commands. A time or condition said first holds for all of them.
    "two": (
        "{A} and {b}. | {A}, then {b}. | Please {a} and {b}. | Can you {a} and {b}? | "
        "{A}. Also, {b}. | {A}. And {b}, please. | I'm going out: {a} and {b}. | {A}; {b}. | "
        "A couple of wishes: {a}, {b}. | {A}, plus {b}. | {A}, and could you {b}? | "
        "Not only {a} but also {b}. | {A}. Next, {b}. | Both of these, please: {a}; {b}.",
        "First {a}, after that {b}. | {A}, and while you're at it, {b}. | "
        "Two things: {a}, and {b}. | {A}. Please {b} too. | I'd like you to {a} and to {b}.",
    ),
    "three": (
        "{A}, {b} and {c}. | {A}, {b}, and then {c}. | Please {a}, {b} and {c}. | {A}. Also {b}. And {c}. | "
        "{A}; {b}; {c}. | A few wishes: {a}, {b}, {c}. | {A}. Next, {b}. Last, {c}. | {A} plus {b} plus {c}.",
        "Three things: {a}, {b}, and {c}. | {A} and {b}, and finally {c}.",
    ),
    "both": (
        "{d} and {e} | {d} and also {e} | both {d} and {e} | {d} plus {e} | {d} along with {e} | "
        "{d} and, too, {e} | not just {d} but {e}",
        "{d} as well as {e} | {d} together with {e}",
    ),
    "both here": (
        "the {x} and the {y} in {room} | both the {x} and the {y} in {room} | "
        "the {x} plus the {y} in {room} | the {x} along with the {y} in {room}",
        "the {x} as well as the {y} in {room}",
    ),
    "first when": (
        "{When}, {a} and {b}. | {When}, please {a} and {b}. | {When}, {a}, then {b}. | "
        "{When}, would you {a} and also {b}? | {When}, {a}, plus {b}.",
        "{When}, I need you to {a} and {b}. | {When}, go ahead and {a}, and {b} too.",
    ),
    "second when": (
        "{A}. Then, {when}, {b}. | {A} now and {b} {when}. | {A} immediately; {b} {when}. | "
        "{A}. But {b} only {when}. | {A} at once, then {b} {when}.",
        "{A} right away, and {b} {when}. | {A} now. Later, {when}, {b}.",
    ),
    # Corrections: of the device, of the device within its room, of the room, of the value, of the action;
    # then one of two commands is taken back. {e} is the device meant, {w} the value meant.
    "fix device": (
        "{A}, no, {e}. | {A}. No wait, {e}. | {A}, sorry, I meant {e}. | {A}. Actually, {e} instead. | "
        "{A}. Not that, {e}. | {A}, er, {e}, I mean. | {A}. My mistake: {e}.",
        "{A}... oh no, sorry, {e}. | {A}, no, I mean {e}. | {A}. Wait, make that {e}.",
    ),
    "fix here": (
        "{A}, no, the {y}. | {A}. No wait, the {y}, not the {x}. | {A}, sorry, the {y} there. | "
        "{A}. Not the {x}, the {y}. | {A}, er, the {y}. | {A}. My mistake: the {y}.",
        "{A}. Wait, I mean the {y}. | {A}... no, the {y} in there.",
    ),
    "fix room": (
        "{A}, no, the {one} in {room}. | {A}. Sorry, I meant the {one} in {room}. | {A}, I mean in {room}. | "
        "{A}. Not that one, the {one} in {room}. | {A}, er, in {room}. | {A}. My mistake: in {room}.",
        "{A}. Oh wait, the {one} in {room}. | {A}... no, not there, in {room}.",
    ),
    "fix value": (
        "{A}, no, {w}. | {A}. Wait, {w}. | {A}, sorry, {w}. | {A}. Actually, better {w}. | "
        "{A}. Not so much, {w}. | {A}, er, {w}. | {A}. My mistake: {w}.",
        "{A}, or rather {w}. | {A}. Hm, make that {w}. | {A}... no, let's say {w} instead.",
    ),
    "fix action": (
        "{A}. No, the other way round, {b}. | {A}. Wait, no, {b}. | {A}, I mean, {b}. | "
        "{A}. On second thought, {b}. | {A}, er, {b} instead. | {A}. My mistake: {b}.",
        "{A}... sorry, no, {b}. | {A}. Hm, I changed my mind, {b}.",
    ),
    "keep first": (
        "{A} and {b}. Actually, forget the second one. | {A} and {b}. No, leave {e} alone. | "
        "{A}, but leave {e} alone. | {A} and {b}, no, just the first one. | {A}, but keep {e} as is.",
        "{A} and {b}... no, skip the second one. | {A}, but don't touch {e}.",
    ),
    "keep second": (
        "{A} and {b}. Actually, forget the first one. | {A} and {b}. No, leave {d} alone. | "
        "Leave {d} alone and {b}. | {A} and {b}, no, just the second one. | Keep {d} as is and {b}.",
        "{A} and {b}... no, skip the first one. | Don't touch {d}, just {b}.",
    ),
    # Conditions.
    "rain": (
        "if it rains | when it starts to rain | if there's rain | if it's raining",
        "in case it rains | as soon as there's rain | once it begins raining",
    ),
    "no rain": (
        "unless it rains | if it isn't raining | if there's no rain",
        "as long as it doesn't rain | unless there's rain",
    ),
    "dark": (
        "if it's dark | when it gets dark | when it's dark outside",
        "once it's dark out | as soon as it's dark",
    ),
    "not dark": ("unless it's dark | if it isn't dark", "as long as it isn't dark yet | while it's not dark"),
    "wind": (
        "if it's windy | when it gets windy | if there's wind",
        "in case it's windy | as soon as the wind picks up",
    ),
    "no wind": (
        "unless it's windy | if it isn't windy | if there's no wind",
        "as long as it isn't windy | unless there's wind",
    ),
    "nobody home": (
        "if nobody is home | when everyone has left | if the house is empty",
        "once the house is empty | as soon as nobody's home",
    ),
    "home": (
        "if {p} is home | when {p} gets home | when {p} comes home",
        "as soon as {p} is home | once {p} gets back home",
    ),
    "away": (
        "unless {p} is home | if {p} isn't home | when {p} is away",
        "as long as {p} isn't home | while {p} is away",
    ),
    "below": (
        "if it's colder than {n} degrees | when it drops below {n} degrees | if it's below {n} degrees",
        "in case it gets colder than {n} degrees | once the temperature falls below {n} degrees",
    ),
    "above": (
        "if it's warmer than {n} degrees | when it rises above {n} degrees | if it's above {n} degrees",
        "in case it gets warmer than {n} degrees | once the temperature climbs above {n} degrees",
    ),
    "conditional": (
        "{If}, {a}. | {A} {if}. | Please {a} {if}. | {If}, please {a}. | Can you {a} {if}? | {A} {if}, okay? | "
        "Remember to {a} {if}. | {If}, would you {a}? | {If}, we should {a}. | A job for you: {a} {if}.",
        "{If}, I'd like you to {a}. | Be sure to {a} {if}. | Here's a rule: {if}, {a}. | "
        "{A} {if}, got it? | {If}, it would be good to {a}.",
    ),
    "conditional two": (
        "{If}, {a} and {b}. | {If}, please {a} and {b}. | {If}, {a}, then {b}. | "
        "{If}, would you {a} and also {b}? | {If}, {a}, plus {b}. | {A} and {b}, both {if}.",
        "{If}, I need you to {a} and {b}. | {If}, go ahead and {a}, and {b} too.",
    ),
    "conditional timed": (
        "{If}, {a} {when}. | {If}, please {a} {when}. | {If}, would you {a} {when}? | {If}, we should {a} {when}.",
        "{If}, I'd like you to {a} {when}. | {If}, go ahead and {a} {when}.",
    ),
}
WORDINGS = {slot: tuple(tuple(side.split(" | ")) for side in sides) for slot, sides in _WORDINGS.items()}


# --- Commands and examples --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One command; None is not said. ``at`` is "HH:MM", ``after`` and ``for_`` are minutes."""

    do: str
    what: str
    room: str
    to: int | None = None
    by: int | None = None
    if_: str | None = None
    at: str | None = None
    after: int | None = None
    for_: int | None = None

    def to_dict(self) -> dict[str, str | int]:
        """Return what is said, in the canonical order of keys: when, then what.

        The action itself is the key of the device, which saves a fifth of the tokens of an answer.
        """
        values = {
            "if": self.if_,
            "at": self.at,
            "after": self.after,
            "for": self.for_,
            self.do: self.what,
            "in": self.room,
            "to": self.to,
            "by": self.by,
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Example:
    """A request, its one right answer, and what they were made of."""

    kind: str
    request: str
    commands: tuple[Command, ...]
    wordings: frozenset[str]  # every wording used, as "slot: wording"
    pairs: frozenset[tuple[str, str]]  # every (device, room) named, also those corrected away

    @property
    def answer(self) -> str:
        """The canonical JSON: an array of commands, no spaces."""
        return json.dumps([command.to_dict() for command in self.commands], separators=(",", ":"))

    def to_line(self) -> str:
        """Return the example as one line of JSONL."""
        turns = (("system", SYSTEM), ("user", self.request), ("assistant", self.answer))
        messages = [{"role": role, "content": content} for role, content in turns]
        return json.dumps({"messages": messages, "kind": self.kind}, ensure_ascii=False) + "\n"


def pairs_of_split() -> dict[str, list[tuple[str, str]]]:
    """Deal every (device, room) pair of known names to one split: three quarters to training."""
    rooms = (*ROOMS, *(f"{person}'s room" for person in PEOPLE))
    pairs = [(what, room) for names in FAMILIES.values() for what in names for room in rooms]
    random.Random(SEED).shuffle(pairs)
    cut = len(pairs) * 3 // 4
    return {"train": sorted(pairs[:cut]), "heldout": sorted(pairs[cut:])}


def pairs_with_new_names() -> list[tuple[str, str]]:
    """Every (device, room) pair with a new device, a new room, or both."""
    new_devices = [name for names in NEW_FAMILIES.values() for name in names]
    devices = [name for names in FAMILIES.values() for name in names]
    rooms = (*ROOMS, *(f"{person}'s room" for person in PEOPLE))
    new_rooms = (*NEW_ROOMS, *(f"{person}'s room" for person in NEW_PEOPLE))
    return [(what, room) for what in new_devices for room in (*rooms, *new_rooms)] + [
        (what, room) for what in devices for room in new_rooms
    ]


def values_of(do: str, what: str) -> Sequence[int]:
    """Return the values that ``set``, ``up`` or ``down`` may take: degrees for heating, else percent."""
    if FAMILY_OF[what] == "climate":
        return range(16, 27) if do == "set" else range(1, 5)
    return range(5, 101, 5) if do == "set" else range(5, 45, 5)


# --- Slots in words ---------------------------------------------------------------------------------------

_DURATIONS = {30: "half an hour", 60: "an hour"}
_FRACTIONS = {25: "a quarter", 50: "half", 100: "maximum"}


def capital(text: str) -> str:
    """Upper-case the first letter and nothing else."""
    return text[:1].upper() + text[1:]


def say_percent(rng: random.Random, value: int) -> str:
    """Say a percentage: "40 percent" or "40%"."""
    return rng.choice((f"{value} percent", f"{value}%"))


def say_duration(minutes: int) -> str:
    """Say a duration: "20 minutes", "half an hour", "an hour"."""
    return _DURATIONS.get(minutes, f"{minutes} minutes")


def say_time(rng: random.Random, hour: int, minute: int) -> str:
    """Say a time of day: "19:30" as often as "7:30 pm"."""
    half, twelve = ("am" if hour < 12 else "pm"), (hour - 1) % 12 + 1
    clock = f"{twelve}:{minute:02d} {half}" if minute else f"{twelve} {half}"
    return rng.choice((f"{hour:02d}:{minute:02d}", clock))


# --- Building examples ------------------------------------------------------------------------------------


class DeadEnd(Exception):  # noqa: N818 - not an error: a draw that leads nowhere and is made anew
    """No (device, room) pair of the split fits what was drawn so far."""


@dataclass
class Draft:
    """An example in the making: draws from one split's tables and remembers what it drew."""

    rng: random.Random
    split: str
    pool: list[tuple[str, str]]
    people: tuple[str, ...]
    wordings: set[str] = field(default_factory=set)
    pairs: set[tuple[str, str]] = field(default_factory=set)

    def wording(self, slot: str) -> str:
        """Draw one of the split's wordings for a slot."""
        wording = self.rng.choice(WORDINGS[slot][SPLITS.index(self.split)])
        self.wordings.add(f"{slot}: {wording}")
        return wording

    def fill(self, slot: str, **values: str) -> str:
        """Draw a wording and fill it; each value is also offered capitalised."""
        return self.wording(slot).format(
            **values, **{capital(key): capital(value) for key, value in values.items()}
        )

    def pair(self, accept: Callable[[str, str], bool] = lambda what, room: True) -> tuple[str, str]:
        """Draw a (device, room) pair not named yet in this request."""
        free = [pair for pair in self.pool if pair not in self.pairs and accept(*pair)]
        if not free:
            raise DeadEnd
        pair = self.rng.choice(free)
        self.pairs.add(pair)
        return pair

    def device(self, what: str, room: str) -> str:
        """Say a device: "the kitchen lamp" or "the lamp in the kitchen"."""
        if room.endswith("'s room"):
            return f"the {what} in {room}"
        return self.rng.choice((f"the {room} {what}", f"the {what} in the {room}"))

    def plain(self, families: tuple[str, ...] = tuple(FAMILIES)) -> Command:
        """Draw a command that only says what to do with which device."""
        family = self.rng.choice(families)
        what, room = self.pair(lambda what, room: FAMILY_OF[what] == family)
        return Command(self.rng.choice(ACTIONS[family]), what, room)

    def level(self) -> Command:
        """Draw a command that sets a level."""
        what, room = self.pair(lambda what, room: FAMILY_OF[what] in (*LEVELS, "cover"))
        return Command("set", what, room, to=self.rng.choice(values_of("set", what)))

    def relative(self) -> Command:
        """Draw a command that raises or lowers a level."""
        what, room = self.pair(lambda what, room: FAMILY_OF[what] in LEVELS)
        values = values_of("up", what)
        if FAMILY_OF[what] != "climate" and self.rng.random() < 0.4:  # as often as people are vague
            values = SMALL_AND_LARGE
        return Command(self.rng.choice(("up", "down")), what, room, by=self.rng.choice(values))

    def any_command(self) -> Command:
        """Draw a command of any sort, plain ones most often."""
        return self.rng.choice((self.plain, self.plain, self.plain, self.level, self.relative))()

    def value(self, command: Command) -> str:
        """Say the value of a ``set``."""
        to = command.to or 0
        if FAMILY_OF[command.what] == "climate":
            return f"{to} degrees"
        if to in _FRACTIONS and self.rng.random() < 0.6:
            return _FRACTIONS[to]
        return say_percent(self.rng, to)

    def amount(self, command: Command, vague: bool = True) -> tuple[str, str]:
        """Say how much a level changes, after a verb and before a comparative."""
        by, degrees = command.by or 0, FAMILY_OF[command.what] == "climate"
        small, large = SMALL_AND_LARGE
        vague = vague and not degrees  # "a bit warmer" is a matter of taste
        if by == small and vague:
            word = self.rng.choice(("a bit", "a little", "slightly"))
            return word, word
        if by == large and vague:
            return "a lot", "a lot"
        exact = (f"{by} degree" + "s" * (by > 1)) if degrees else say_percent(self.rng, by)
        return f"by {exact}", exact

    def slots(self, command: Command, device: str | None = None) -> dict[str, str]:
        """Return the words for a command's slots."""
        slots = {"d": device or self.device(command.what, command.room)}
        if command.do == "set":
            slots["v"] = self.value(command)
        if command.do in ("up", "down"):
            slots["amount"], slots["much"] = self.amount(command)
            slots["more"] = COMPARATIVES[FAMILY_OF[command.what], command.do]
        return slots

    def imperative(self, command: Command, device: str | None = None) -> str:
        """Say a command as an imperative."""
        return self.fill(command.do, **self.slots(command, device))

    def schedule(
        self, command: Command, slots: tuple[str, ...] = ("at", "after", "for")
    ) -> tuple[Command, str]:
        """Add a time, a delay or a duration to a command; return it and the words."""
        if command.do not in ("on", "open", "set", "unlock"):  # nothing can be switched off "for" an hour
            slots = tuple(slot for slot in slots if slot != "for")
        slot = self.rng.choice(slots)
        if slot == "at":
            hour = self.rng.randrange(24)
            minute = self.rng.choice((0, 0, 15, 30, 45, self.rng.randrange(5, 60, 5)))
            command = replace(command, at=f"{hour:02d}:{minute:02d}")
            words = self.fill("at", t=say_time(self.rng, hour, minute))
            if "for" in slots and self.rng.random() < 0.3:
                command, more = self.schedule(command, ("for",))
                words += f" {more}"
            return command, words
        minutes = self.rng.choice(MINUTES)
        words = self.fill(slot, duration=say_duration(minutes))
        return replace(command, **{"after": minutes} if slot == "after" else {"for_": minutes}), words

    def condition(self) -> tuple[str, str]:
        """Draw a condition and say it."""
        name = self.rng.choice(CONDITIONS)
        if name in ("home", "away"):
            person = self.rng.choice(self.people)
            return f"{person} {name}", self.fill(name, p=person)
        if name in ("below", "above"):
            degrees = self.rng.randint(12, 28)
            return f"{name} {degrees}", self.fill(name, n=str(degrees))
        return name, self.wording(name)


Built = tuple[str, tuple[Command, ...]]  # a request and its commands


def single(draft: Draft) -> Built:
    """One plain command."""
    return _one(draft, draft.plain())


def level(draft: Draft) -> Built:
    """One level to set."""
    return _one(draft, draft.level())


def relative(draft: Draft) -> Built:
    """One level to raise or lower."""
    return _one(draft, draft.relative())


def _one(draft: Draft, command: Command) -> Built:
    if draft.rng.random() < 0.3:
        return draft.fill(f"say {command.do}", **draft.slots(command)), (command,)
    return draft.fill("one", a=draft.imperative(command)), (command,)


def timed(draft: Draft) -> Built:
    """One command with a time, a delay or a duration."""
    command = draft.rng.choice((draft.plain, draft.plain, draft.level))()
    said = draft.imperative(command)
    command, when = draft.schedule(command)
    return draft.fill("timed", a=said, when=when), (command,)


def multi(draft: Draft) -> Built:
    """Two or three commands, said apart or sharing a verb, a room or a time."""
    form = draft.rng.choice(("two", "two", "three", "both", "both here", "first when", "second when"))
    if form == "three":
        commands = tuple(draft.plain() for _ in range(3))
        a, b, c = (draft.imperative(command) for command in commands)
        return draft.fill("three", a=a, b=b, c=c), commands
    if form in ("both", "both here"):
        first = draft.plain()
        same_room = form == "both here"
        what, room = draft.pair(
            lambda what, room: (
                ACTIONS[FAMILY_OF[what]] == ACTIONS[FAMILY_OF[first.what]]
                and (not same_room or room == first.room)
            )
        )
        if same_room:
            place = room if room.endswith("'s room") else f"the {room}"
            devices = draft.fill("both here", x=first.what, y=what, room=place)
        else:
            devices = draft.fill("both", d=draft.device(first.what, first.room), e=draft.device(what, room))
        second = replace(first, what=what, room=room)
        return draft.fill("one", a=draft.imperative(first, devices)), (first, second)
    first, second = draft.any_command(), draft.any_command()
    a, b = draft.imperative(first), draft.imperative(second)
    if form == "two":
        return draft.fill("two", a=a, b=b), (first, second)
    second, when = draft.schedule(second, ("at", "after"))
    if form == "first when":
        first = replace(first, at=second.at, after=second.after)
    return draft.fill(form, a=a, b=b, when=when), (first, second)


def correction(draft: Draft) -> Built:
    """A command that the speaker changes while speaking, or takes back; only what is meant counts."""
    form = draft.rng.choice(
        (
            "fix device",
            "fix here",
            "fix room",
            "fix value",
            "fix value",
            "fix action",
            "keep first",
            "keep second",
        )
    )
    if form == "fix value":
        wrong = draft.rng.choice((draft.level, draft.relative))()
        said = wrong.to or wrong.by
        other = draft.rng.choice([value for value in values_of(wrong.do, wrong.what) if value != said])
        meant = replace(wrong, to=other) if wrong.do == "set" else replace(wrong, by=other)
        value = draft.value(meant) if meant.do == "set" else draft.amount(meant, vague=False)[1]
        return draft.fill(form, a=draft.imperative(wrong), w=value), (meant,)
    first = draft.plain()
    device = draft.device(first.what, first.room)
    if form == "fix action":
        meant = replace(first, do=OPPOSITE[first.do])
        pronoun = "them" if first.what in PLURAL else "it"
        verb = {"on": "switch {} on", "off": "switch {} off"}.get(meant.do, meant.do + " {}").format(pronoun)
        return draft.fill(form, a=draft.imperative(first, device), b=verb), (meant,)
    if form.startswith("keep"):
        second = draft.plain()
        other = draft.device(second.what, second.room)
        a, b = draft.imperative(first, device), draft.imperative(second, other)
        return draft.fill(form, a=a, b=b, d=device, e=other), (first if form == "keep first" else second,)
    kin = {
        "fix here": lambda what, room: room == first.room,
        "fix room": lambda what, room: what == first.what,
    }
    fits = kin.get(form, lambda what, room: True)
    what, room = draft.pair(
        lambda what, room: ACTIONS[FAMILY_OF[what]] == ACTIONS[FAMILY_OF[first.what]] and fits(what, room)
    )
    request = draft.fill(
        form,
        a=draft.imperative(first, device),
        e=draft.device(what, room),
        x=first.what,
        y=what,
        one="ones" if what in PLURAL else "one",
        room=room if room.endswith("'s room") else f"the {room}",
    )
    return request, (replace(first, what=what, room=room),)


def condition(draft: Draft) -> Built:
    """One or two commands under a condition, sometimes with a delay or a duration."""
    form = draft.rng.choice(
        ("conditional", "conditional", "conditional", "conditional two", "conditional timed")
    )
    name, said = draft.condition()
    command = draft.any_command() if form == "conditional" else draft.plain()
    a = draft.imperative(command)
    if form == "conditional two":
        second = draft.plain()
        b = draft.imperative(second)
        return draft.fill(form, **{"if": said}, a=a, b=b), (
            replace(command, if_=name),
            replace(second, if_=name),
        )
    when = ""
    if form == "conditional timed":
        command, when = draft.schedule(command, ("after", "for"))
    return draft.fill(form, **{"if": said}, a=a, when=when), (replace(command, if_=name),)


KINDS: dict[str, Callable[[Draft], Built]] = {
    "single": single,
    "level": level,
    "relative": relative,
    "time": timed,
    "multi": multi,
    "correction": correction,
    "condition": condition,
}


# Training takes longer turns at the kinds that are harder to learn; held-out asks for plain commands and
# corrections twice as often as for the rest, as people do.
TRAIN_TURNS = (
    *("single", "multi", "condition", "time", "level", "correction", "relative"),
    *("multi", "condition", "relative", "time", "multi", "correction", "condition"),
)
HELDOUT_TURNS = (*KINDS, "new-name", "single", "correction")


def generate(split: str, heldout_rounds: int = HELDOUT_ROUNDS) -> Iterator[Example]:
    """Yield a split's examples, the kinds taking turns so that every prefix is a fair sample.

    Args:
        split: "train" or "heldout"; only the latter has the kind ``new-name``, built as any other kind but
            from pairs and people with new names.
        heldout_rounds: How often held-out kinds take turns, ten examples each time; those of fewer rounds come first.
    """
    rng = random.Random(f"{SEED}-{split}")
    known, new = pairs_of_split()[split], pairs_with_new_names()
    kinds = TRAIN_TURNS * TRAIN_ROUNDS if split == "train" else HELDOUT_TURNS * heldout_rounds
    borrowed = itertools.cycle(KINDS)  # new-name has no form of its own
    seen: set[str] = set()
    for kind in kinds:
        build = KINDS[kind if kind in KINDS else next(borrowed)]
        pool, people = (known, PEOPLE) if kind in KINDS else (new, NEW_PEOPLE)
        while True:
            draft = Draft(rng, split, pool, people)
            try:
                request, commands = build(draft)
            except DeadEnd:
                continue
            if request.lower() not in seen:
                break
        seen.add(request.lower())
        yield Example(kind, request, commands, frozenset(draft.wordings), frozenset(draft.pairs))


def write(folder: Path = HERE, heldout_rounds: int = HELDOUT_ROUNDS) -> None:
    """Write both files, each beside its name first, so that none is ever half there."""
    for split in SPLITS:
        target = folder / f"{split}.jsonl"
        partial = target.with_suffix(".jsonl.partial")
        partial.write_text(
            "".join(example.to_line() for example in generate(split, heldout_rounds)),
            encoding="utf-8",
            newline="\n",
        )
        partial.replace(target)


if __name__ == "__main__":
    write()
    for name in SPLITS:
        print(f"{HERE / name}.jsonl: {sum(1 for _ in generate(name))} examples")
