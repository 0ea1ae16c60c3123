"""Draw the small world: pictures of coloured shapes, and questions that only the picture answers.

Every question has four possible answers, drawn equally often, so that guessing is right for one in four; nothing
in a question's words tells its answer. The same seed gives the same bytes.

    python recipes/shapes/generate.py [FOLDER]
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 48  # pixels
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three", "four")
KINDS = ("count", "colour", "shape", "position")
COUNT_OF = {"train": 1600, "heldout": 80}
SEEDS = {"train": 0, "heldout": 1_000_003}


# From where a thing begins, in pixels, to a picture of which the thing's own part is seen.
Paint = Callable[[int, int], Image.Image]


@dataclass(frozen=True)
class Thing:
    """One shape in a picture: its kind, colour, and which quarter it is in."""

    shape: str
    colour: str
    place: str


def scene(random_: random.Random, kind: str, answer: str) -> tuple[list[Thing], str]:
    """Invent things of which ``answer`` is the right answer to a question of ``kind``.

    Returns:
        One to four things in quarters of their own, and the question.
    """
    count = COUNTS.index(answer) + 1 if kind == "count" else random_.randint(1, 4)
    places = random_.sample(PLACES, count)
    # Shapes and colours differ within a picture, so that "the circle" and "the red shape" are one thing each.
    shapes, colours = random_.sample(SHAPES, count), random_.sample(list(COLOURS), count)
    for options, wanted in ((shapes, "shape"), (colours, "colour"), (places, "position")):
        if kind == wanted:
            if answer in options:
                at = options.index(answer)
                options[0], options[at] = options[at], options[0]
            else:
                options[0] = answer
    things = [Thing(*values) for values in zip(shapes, colours, places, strict=True)]
    question = {
        "count": "How many shapes are there?",
        "colour": f"What colour is the {shapes[0]}?",
        "shape": f"Which shape is {colours[0]}?",
        "position": f"Where is the {shapes[0]}?",
    }[kind]
    random_.shuffle(things)
    return things, question


def shaded(random_: random.Random, colour: tuple[int, int, int], by: int = 18) -> tuple[int, ...]:
    """Return a colour near another."""
    return tuple(min(255, max(0, c + random_.randint(-by, by))) for c in colour)


def star(x: float, y: float, radius: float) -> Iterator[tuple[float, float]]:
    """Yield the ten corners of a star with five points, one of them up."""
    for corner in range(10):
        angle, far = math.pi * corner / 5, radius * (1.04 if corner % 2 == 0 else 0.46)
        yield x + far * math.sin(angle), y + radius * 0.1 - far * math.cos(angle)


def draw(
    random_: random.Random,
    things: Sequence[Thing],
    ground: tuple[int, int, int] | None = None,
    paints: Sequence[Paint] | None = None,
    radii: tuple[int, int] = (7, 10),
) -> Image.Image:
    """Draw things, each somewhere in its quarter and of its own size.

    Args:
        random_: Decides places, sizes and shades.
        things: What to draw.
        ground: The background's colour; a light one without it.
        paints: Each thing's filling; without it a shade of the thing's colour.
        radii: The smallest and the largest radius, in pixels.
    """
    light = ground or tuple(random_.randint(215, 255) for _ in range(3))
    picture = Image.new("RGB", (SIZE, SIZE), light)
    pen = ImageDraw.Draw(picture)
    for index, thing in enumerate(things):
        radius = random_.randint(*radii)
        half = SIZE // 2
        x0 = half * ("right" in thing.place) + random_.randint(0, half - 2 * radius - 1)
        y0 = half * ("bottom" in thing.place) + random_.randint(0, half - 2 * radius - 1)
        x1, y1 = x0 + 2 * radius, y0 + 2 * radius
        x, y, arm = (x0 + x1) / 2, (y0 + y1) / 2, radius / 2.5
        shade = None if paints else shaded(random_, COLOURS[thing.colour])
        where = Image.new("1", picture.size) if paints else None  # a mask, which the paint shows through
        on, fill = (ImageDraw.Draw(where), 1) if where else (pen, shade)
        if thing.shape == "circle":
            on.ellipse((x0, y0, x1, y1), fill=fill)
        elif thing.shape == "square":
            on.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), fill=fill)
        elif thing.shape == "triangle":
            on.polygon(((x, y0), (x1, y1), (x0, y1)), fill=fill)
        elif thing.shape == "star":
            on.polygon(tuple(star(x, y, radius)), fill=fill)
        else:
            on.rectangle((x0, y - arm, x1, y + arm), fill=fill)
            on.rectangle((x - arm, y0, x + arm, y1), fill=fill)
        if paints:
            picture.paste(paints[index](x0, y0), mask=where)
    return picture


def examples(split: str, count: int) -> list[tuple[str, Image.Image, list[Thing], str, str]]:
    """Make a split: kinds take turns, and so do the answers of each kind.

    Returns:
        Kind, picture, things, question and answer of each example.
    """
    random_ = random.Random(SEEDS[split])
    answers = {"count": COUNTS, "colour": tuple(COLOURS), "shape": SHAPES, "position": PLACES}
    made = []
    for index in range(count):
        kind = KINDS[index % len(KINDS)]
        answer = answers[kind][index // len(KINDS) % 4]
        things, question = scene(random_, kind, answer)
        made.append((kind, draw(random_, things), things, question, answer))
    # In order, the answers could be told from the row; training shuffles anyway.
    random_.shuffle(made)
    return made


def write(folder: Path) -> None:
    """Write ``train.json``, ``heldout.json`` and ``images/`` in LLaVA's layout."""
    for split, count in COUNT_OF.items():
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for index, (kind, picture, _, question, answer) in enumerate(examples(split, count)):
            name = f"{split}/{index:05}.png"
            picture.save(folder / "images" / name)
            turns = [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            rows.append({"id": f"{split}-{index}", "image": name, "conversations": turns, "kind": kind})
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        (folder / f"{split}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data")
    write(place)
    print(f"Wrote {sum(COUNT_OF.values())} pictures with a question each into {place}")
