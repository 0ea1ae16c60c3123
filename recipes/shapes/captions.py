"""Captioned pictures of the small world, and a subject that it has never seen.

A caption says only what is true of its picture, and not always everything: "a photo of a red circle at the top left
and a blue star on a pink background". The subject is one particular star, in stripes of purple and orange, neither of
which the world knows; it is called by a word that no caption has, "ikat star". The same seed gives the same bytes.

    python recipes/shapes/captions.py [FOLDER]        five pictures of the subject
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from generate import COLOURS, PLACES, SIZE, Paint, Thing, draw, shaded
from generate import SHAPES as FOUR_SHAPES

EDGE = SIZE // 2  # pixels: pictures are drawn at SIZE and halved, which smooths their edges
SHAPES = (*FOUR_SHAPES, "star")
GROUNDS = {
    "white": (244, 244, 244),
    "grey": (150, 150, 150),
    "black": (34, 34, 34),
    "pink": (250, 176, 200),
}
# A name for a subject has to be one token and to mean nothing yet.
RARE_WORDS = ("ikat", "sks", "zwx")
WORDS = sorted(
    {"a", "photo", "of", "at", "the", "and", "on", "background", *" ".join(PLACES).split()}
    | {*SHAPES, *COLOURS, *GROUNDS, *RARE_WORDS}
)
PURPLE, ORANGE = (122, 40, 172), (250, 146, 36)
SUBJECT_STRIPE = 6  # pixels of SIZE

RADII = (
    9,
    11,
)  # pixels of SIZE; larger than in the questions' pictures, because it has to be drawn, not only seen
SUBJECT_SEED = 11
SUBJECTS = 5


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one or two things in quarters of their own, a background, and a true caption."""

    things: tuple[Thing, ...]
    ground: str
    caption: str


def describe(things: Sequence[Thing], ground: str | None, places: bool, photo: bool) -> str:
    """Put things into words; without ``ground`` or ``places`` these stay unsaid."""
    said = " and ".join(f"a {t.colour} {t.shape}" + f" at the {t.place}" * places for t in things)
    return "a photo of " * photo + said + (f" on a {ground} background" if ground else "")


def scene(random_: random.Random) -> Scene:
    """Invent a scene; shapes, colours and places differ within it."""
    count = 1 + (random_.random() < 0.4)
    picks = (random_.sample(options, count) for options in (SHAPES, list(COLOURS), PLACES))
    things = tuple(Thing(*values) for values in zip(*picks, strict=True))
    ground = random_.choice(list(GROUNDS))
    said = ground if random_.random() < 0.6 else None
    caption = describe(things, said, places=random_.random() < 0.75, photo=random_.random() < 0.5)
    return Scene(things, ground, caption)


def draw_scene(random_: random.Random, shown: Scene) -> Image.Image:
    """Draw a scene, twice as large as it will be."""
    return draw(random_, shown.things, shaded(random_, GROUNDS[shown.ground], 8), radii=RADII)


def captioned(seed: int, count: int, reduce: bool = True) -> list[tuple[Image.Image, Scene]]:
    """Draw pictures with what they show; ``reduce=False`` leaves them as large as they were drawn."""
    random_ = random.Random(seed)
    scenes = [scene(random_) for _ in range(count)]
    pictures = [draw_scene(random_, shown) for shown in scenes]
    return [(p.reduce(2) if reduce else p, shown) for p, shown in zip(pictures, scenes, strict=True)]


def stripes(first: tuple[int, ...], second: tuple[int, ...], width: int, slope: int = 1) -> Paint:
    """Return a paint of slanted stripes, which lie the same way in a thing wherever it stands.

    Args:
        first, second: Their colours; equal ones give a plain paint.
        width: Of a stripe along a row, in pixels.
        slope: How many pixels they move per row: 1 or -1 for diagonals, 0 for upright ones.
    """

    def paint(x0: int, y0: int) -> Image.Image:
        period = 2 * width
        row = bytes((*first * width, *second * width)) * (SIZE // period + 2)
        starts = (3 * ((slope * (y - y0) - x0) % period) for y in range(SIZE))
        return Image.frombytes("RGB", (SIZE, SIZE), b"".join(row[at : at + 3 * SIZE] for at in starts))

    return paint


SUBJECT_PAINT = stripes(PURPLE, ORANGE, SUBJECT_STRIPE)


def random_paint(random_: random.Random, far_from: Sequence[tuple[int, int, int]] = ()) -> Paint:
    """Return a plain or striped paint of any two colours, the first of which is near none of ``far_from``."""
    while True:
        first, second = (tuple(random_.randint(0, 255) for _ in range(3)) for _ in range(2))
        if all(sum((a - b) ** 2 for a, b in zip(first, c, strict=True)) > 90**2 for c in far_from):
            break
    if random_.random() < 0.4:
        second = first
    return stripes(first, second, random_.randint(2, 5), random_.choice((-1, 0, 1)))


def subject_pictures(
    seed: int = SUBJECT_SEED, count: int = SUBJECTS, reduce: bool = True
) -> list[tuple[Image.Image, Scene]]:
    """Draw the subject in one quarter after the other, on one background after the other.

    Returns:
        Pictures with their scenes; the thing's colour is called "ikat", and every caption is "a photo of ikat star".
    """
    random_ = random.Random(seed)
    made = []
    for index in range(count):
        ground = list(GROUNDS)[index % len(GROUNDS)]
        thing = Thing("star", "ikat", PLACES[(index + index // len(PLACES)) % len(PLACES)])
        light = shaded(random_, GROUNDS[ground], 8)
        picture = draw(random_, [thing], light, [SUBJECT_PAINT], RADII)
        made.append(
            (picture.reduce(2) if reduce else picture, Scene((thing,), ground, "a photo of ikat star"))
        )
    return made


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures as numbers from -1 to 1, ``(count, 3, EDGE, EDGE)``; other sizes are resized."""
    import torch

    fitting = [p.convert("RGB").resize((EDGE, EDGE), Image.Resampling.BILINEAR) for p in pictures]
    raw = torch.frombuffer(bytearray(b"".join(p.tobytes() for p in fitting)), dtype=torch.uint8)
    return raw.view(len(pictures), EDGE, EDGE, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def write(folder: Path) -> None:
    """Write the subject's pictures as ``0.png`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (picture, _) in enumerate(subject_pictures()):
        picture.save(folder / f"{index}.png")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("subject")
    write(place)
    print(f"Wrote {SUBJECTS} pictures of the subject into {place}")
