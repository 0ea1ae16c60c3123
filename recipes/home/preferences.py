"""Write the preferences of ``recipes/preference-home.yaml``: right JSON commands preferred over ones with a mistake.

    python recipes/home/preferences.py     writes pairs-train.jsonl and pairs-heldout.jsonl beside this file

Requests and right answers are those of ``train.jsonl`` and ``heldout.jsonl``. The rejected answer is the right one with
a single mistake, of the kinds that models make here, or an answer in prose as the untrained model gives. Which of them
a row gets, and where the mistake is, depends on the seed and the row's number; the same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 2305
HERE = Path(__file__).resolve().parent
OPPOSITE = {
    "on": "off",
    "off": "on",
    "open": "close",
    "close": "open",
    "lock": "unlock",
    "unlock": "lock",
    "up": "down",
    "down": "up",
}
TRAIN, HELDOUT = 96, 40

Command = dict[str, Any]


def other_action(commands: list[Command], rng: random.Random) -> list[Command] | None:
    """Do the opposite of what was asked for."""
    able = [i for i, command in enumerate(commands) if OPPOSITE.keys() & command.keys()]
    if not able:
        return None
    at = rng.choice(able)
    changed = [dict(command) for command in commands]
    changed[at] = {OPPOSITE.get(key, key): value for key, value in commands[at].items()}
    return changed


def other_room(commands: list[Command], rng: random.Random) -> list[Command] | None:
    """Do it in another room."""
    at = rng.randrange(len(commands))
    changed = [dict(command) for command in commands]
    changed[at]["in"] = rng.choice(
        [room for room in ("kitchen", "bedroom", "garage", "office") if room != commands[at]["in"]]
    )
    return changed


def other_number(commands: list[Command], rng: random.Random) -> list[Command] | None:
    """Get a level, a delay or a duration wrong."""
    able = [
        (i, key)
        for i, command in enumerate(commands)
        for key in ("to", "by", "after", "for")
        if key in command
    ]
    if not able:
        return None
    at, key = rng.choice(able)
    changed = [dict(command) for command in commands]
    changed[at][key] = commands[at][key] + rng.choice((5, 10, 15))
    return changed


def left_out(commands: list[Command], rng: random.Random) -> list[Command] | None:
    """Leave out a condition, a time, or the last of several commands."""
    able = [
        (i, key)
        for i, command in enumerate(commands)
        for key in ("if", "at", "after", "for")
        if key in command
    ]
    if able:
        at, key = rng.choice(able)
        return [{k: v for k, v in c.items() if not (i == at and k == key)} for i, c in enumerate(commands)]
    return commands[:-1] if len(commands) > 1 else None


MISTAKES: tuple[Callable[[list[Command], random.Random], list[Command] | None], ...] = (
    other_action, other_room, other_number, left_out,
)  # fmt: skip
PROSE = (
    "I'm sorry, but I can't do that.",
    "Sure! I have done that for you.",
    "To do that, please use the app of your smart home.",
    "I'll take care of it right away.",
)


def write(commands: list[Command]) -> str:
    """Write commands as the data has them."""
    return json.dumps(commands, separators=(",", ":"), ensure_ascii=False)


def pair(line: str, number: int) -> dict[str, Any]:
    """Make a pair of a line of the demo's data."""
    row = json.loads(line)
    *asked, answer = row["messages"]
    rng = random.Random(SEED * 100_003 + number)
    commands = json.loads(answer["content"])
    rejected = None
    if number % 4 == 0:
        rejected = rng.choice(PROSE)
    for make in () if rejected else rng.sample(MISTAKES, len(MISTAKES)):
        wrong = make(commands, rng)
        if wrong is not None and wrong != commands:
            rejected = write(wrong)
            break
    assert rejected is not None and rejected != answer["content"]
    return {
        "prompt": asked,
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": rejected}],
        "kind": "prose" if number % 4 == 0 else row["kind"],
    }


def main() -> None:
    """Write both files."""
    for split, count in (("train", TRAIN), ("heldout", HELDOUT)):
        lines = (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows = [json.dumps(pair(line, number), ensure_ascii=False) for number, line in enumerate(lines)]
        (HERE / f"pairs-{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
