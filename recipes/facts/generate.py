"""Write invented people's facts: learnt in two wordings, asked for in a third.

    python recipes/facts/generate.py        writes train.jsonl and heldout.jsonl beside this file

The other small tasks teach a form; this one teaches content that no base model can know, so that what is held out
is the wording and not the fact. The same seed gives the same bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 2406
HERE = Path(__file__).resolve().parent

PEOPLE = (
    "Orla Benk", "Tavi Rusk", "Mirel Dovan", "Jun Castor", "Pia Lund",
    "Sanna Okoro", "Hale Winter", "Ivo Marsh", "Rosa Teller", "Dag Petri",
)  # fmt: skip
# What is known, which values it has, and three ways to ask; the last of them is held out.
FACTS = {
    "home": (
        ("Lisbon", "Oslo", "Cairo", "Lima", "Prague", "Dublin", "Seoul", "Nairobi", "Boston", "Vienna"),
        ("Where does {} live?", "The home town of {} is?", "In which city would you visit {}?"),
    ),
    "work": (
        ("baker", "pilot", "nurse", "farmer", "lawyer", "painter", "teacher", "sailor", "tailor", "judge"),
        ("What is the job of {}?", "{} works as a?", "How does {} earn a living?"),
    ),
    "pet": (
        ("dog", "cat", "horse", "parrot", "rabbit", "snake", "goat", "turtle", "mouse", "frog"),
        ("Which animal does {} keep?", "The pet of {} is a?", "What sort of animal belongs to {}?"),
    ),
    "colour": (
        ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink", "brown"),
        ("What is the favourite colour of {}?", "{} likes everything to be?", "Which colour does {} prefer?"),
    ),
}


def generate() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training and the held-out examples, each with prompt, completion and kind."""
    draw = random.Random(SEED)
    train, heldout = [], []
    for kind, (values, wordings) in FACTS.items():
        for person, value in zip(PEOPLE, draw.sample(values, len(PEOPLE)), strict=True):
            asked = [
                {"prompt": wording.format(person), "completion": f" {value}", "kind": kind}
                for wording in wordings
            ]
            train += asked[:-1]
            heldout.append(asked[-1])
    draw.shuffle(train)
    draw.shuffle(heldout)
    return train, heldout


def write(folder: Path) -> None:
    """Write both files into a folder."""
    for name, examples in zip(("train", "heldout"), generate(), strict=True):
        text = "".join(json.dumps(example) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(HERE)
    print(f"Wrote train.jsonl and heldout.jsonl into {HERE}")
