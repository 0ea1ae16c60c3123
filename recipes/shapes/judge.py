"""Read pictures of the small world: what is in each quarter, on which background, and whether it is the subject.

A small convolutional network that is taught on rendered pictures with known contents, blurred, noisy and tinted, so
that it reads what an image model draws as well. Things in other paints than the world's are among them, and so are
near misses of the subject: plain stars in either of its colours or in their mean, stars in other stripes, other shapes
in its stripes. Which way its stripes run, and how wide they are, is not judged.

    python recipes/shapes/judge.py [FOLDER] [--quick]        about one minute of CPU time
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from captions import (
    EDGE,
    GROUNDS,
    ORANGE,
    PURPLE,
    RADII,
    SHAPES,
    SUBJECT_PAINT,
    Scene,
    draw,
    pixels,
    random_paint,
    scene,
    shaded,
    stripes,
)
from generate import COLOURS, PLACES, Paint, Thing
from PIL import Image

SAY = partial(print, flush=True)
NOTHING, OTHER = "nothing", "other"
SHAPE_NAMES = (NOTHING, *SHAPES)
COLOUR_NAMES = (*COLOURS, OTHER)
IGNORED = -100  # what torch's cross entropy leaves out


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a picture.

    Attributes:
        things: From a quarter's name to shape and colour, for quarters that hold something; colour ``"other"`` is
            none of the world's.
        subject: From the same names to the probability that the thing is the subject.
        ground: The background's name.
    """

    things: dict[str, tuple[str, str]]
    subject: dict[str, float]
    ground: str

    def shows_subject(self, place: str | None = None) -> bool:
        """Tell whether the subject is there: at a place, or anywhere."""
        return any(p > 0.5 for name, p in self.subject.items() if place in (None, name))


class Judge(nn.Module):
    """The network: four convolutions, then a linear reading of each quarter and one of the whole."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((3, 24), (24, 48), (48, 64), (64, 96)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(8, outer), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if outer in (48, 64) else []
        self.body = nn.Sequential(*layers)
        self.quarter = nn.Linear(96 * 9, len(SHAPE_NAMES) + len(COLOUR_NAMES) + 1)
        self.whole = nn.Linear(96, len(GROUNDS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read pictures.

        Args:
            pixels: ``(count, 3, EDGE, EDGE)``, from -1 to 1.

        Returns:
            Logits of shapes ``(count, 4, 6)``, of colours ``(count, 4, 5)``, of the subject ``(count, 4)`` and of
            backgrounds ``(count, 4)``; quarters in the order of ``PLACES``.
        """
        found = self.body(pixels)  # (count, 96, 6, 6)
        tiles = found.unfold(2, 3, 3).unfold(3, 3, 3)  # (count, 96, 2, 2, 3, 3)
        quarters = self.quarter(tiles.permute(0, 2, 3, 1, 4, 5).reshape(len(pixels), 4, -1))
        shapes, colours, subject = quarters.split((len(SHAPE_NAMES), len(COLOUR_NAMES), 1), dim=-1)
        return shapes, colours, subject.squeeze(-1), self.whole(found.amax((2, 3)))


MEAN = tuple((a + b) // 2 for a, b in zip(PURPLE, ORANGE, strict=True))


def dressed(random_: random.Random, thing: Thing) -> tuple[Thing, Paint, str, bool]:
    """Choose a paint for a thing.

    Returns:
        The thing, which becomes a star for the subject; its paint, the colour's name and whether it is the subject.
    """
    kind = random_.random()
    if kind < 0.5:
        shade = shaded(random_, COLOURS[thing.colour])
        return thing, stripes(shade, shade, 1), thing.colour, False
    if kind < 0.7:
        return Thing("star", thing.colour, thing.place), SUBJECT_PAINT, OTHER, True
    if kind < 0.78:
        return thing, SUBJECT_PAINT, OTHER, thing.shape == "star"
    if kind < 0.86:
        shade = shaded(random_, random_.choice((PURPLE, ORANGE, MEAN)))
        return Thing("star", thing.colour, thing.place), stripes(shade, shade, 1), OTHER, False
    first, second = (random_.choice(list(COLOURS.values())) for _ in range(2))
    if kind < 0.93 and first != second:
        return thing, stripes(first, second, random_.randint(3, 6), random_.choice((-1, 0, 1))), OTHER, False
    return thing, random_paint(random_, far_from=tuple(COLOURS.values())), OTHER, False


def examples(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Draw pictures with what is in them.

    Returns:
        Pixels and the labels that belong to the network's four outputs; colours of empty quarters are ignored.
    """
    random_ = random.Random(seed)
    pictures = []
    shapes = torch.zeros(count, 4, dtype=torch.long)
    colours = torch.full((count, 4), IGNORED)
    subject, grounds = torch.zeros(count, 4), torch.zeros(count, dtype=torch.long)
    for row in range(count):
        shown = scene(random_)
        worn = [dressed(random_, thing) for thing in shown.things]
        for thing, _, colour, is_subject in worn:
            at = PLACES.index(thing.place)
            shapes[row, at], colours[row, at] = SHAPE_NAMES.index(thing.shape), COLOUR_NAMES.index(colour)
            subject[row, at] = float(is_subject)
        grounds[row] = list(GROUNDS).index(shown.ground)
        light = shaded(random_, GROUNDS[shown.ground], 8)
        pictures.append(draw(random_, [w[0] for w in worn], light, [w[1] for w in worn], RADII).reduce(2))
    return pixels(pictures), shapes, colours, subject, grounds


def worn_out(shown: Tensor) -> Tensor:
    """Blur, tint and add noise to pictures, each by a random amount."""
    amount = torch.rand(3, len(shown), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(shown, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = 0.1 * torch.randn(len(shown), 3, 1, 1) * amount[1]
    return shown.lerp(blurred, amount[0]) + tint + 0.1 * amount[2] * torch.randn_like(shown)


def train(steps: int = 1200, batch: int = 64, count: int = 12288, seed: int = 0, say: Any = SAY) -> Judge:
    """Teach a judge."""
    torch.manual_seed(seed)
    judge = Judge()
    pool, *labels = examples(seed + 1, count)
    optimizer = torch.optim.Adam(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(2, steps), pct_start=0.1)
    for step in range(1, steps + 1):
        rows = torch.randint(count, (batch,))
        shapes, colours, subject, grounds = judge(worn_out(pool[rows]))
        of_shapes, of_colours, of_subject, of_grounds = (label[rows] for label in labels)
        loss = (
            F.cross_entropy(shapes.flatten(0, 1), of_shapes.flatten())
            + F.cross_entropy(colours.flatten(0, 1), of_colours.flatten(), ignore_index=IGNORED)
            + F.binary_cross_entropy_with_logits(subject, of_subject)
            + F.cross_entropy(grounds, of_grounds)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 6) == 0:
            say(f"judge, step {step} of {steps}: loss {loss.item():.4f}")
    return judge.eval()


@torch.no_grad()
def read(judge: Judge, pictures: Sequence[Image.Image]) -> list[Reading]:
    """Read pictures of any size."""
    readings = []
    outputs = (judge(batch) for batch in pixels(pictures).split(256))
    for shapes, colours, subject, grounds in outputs:
        kinds, chances = shapes.argmax(-1), subject.sigmoid()
        for row in range(len(shapes)):
            held = {p: i for i, p in enumerate(PLACES) if kinds[row, i]}
            readings.append(
                Reading(
                    {
                        p: (SHAPE_NAMES[int(kinds[row, i])], COLOUR_NAMES[int(colours[row, i].argmax())])
                        for p, i in held.items()
                    },
                    {p: float(chances[row, i]) for p, i in held.items()},
                    list(GROUNDS)[int(grounds[row].argmax())],
                )
            )
    return readings


def follows(shown: Scene, seen: Reading) -> bool:
    """Tell whether a picture shows what a scene's caption says: all of it, and no further things."""
    wanted = sorted((thing.shape, thing.colour) for thing in shown.things)
    if sorted(seen.things.values()) != wanted:
        return False
    placed = all(seen.things.get(t.place) == (t.shape, t.colour) for t in shown.things)
    said_place, said_ground = " at the " in shown.caption, shown.caption.endswith("background")
    return (placed or not said_place) and (seen.ground == shown.ground or not said_ground)


@torch.no_grad()
def accuracy(judge: Judge, seed: int = 1_000_003, count: int = 2000) -> dict[str, float]:
    """Return shares read rightly of held-out pictures, worn as in training.

    Returns:
        ``"shape"`` over all quarters, ``"colour"`` over those that hold something, ``"ground"`` over pictures,
        ``"subject_found"`` over subjects and ``"subject_imagined"`` over other things.
    """
    torch.manual_seed(seed)
    shown, of_shapes, of_colours, of_subject, of_grounds = examples(seed, count)
    shapes, colours, subject, grounds = judge(worn_out(shown))
    held, seen = of_colours != IGNORED, subject > 0
    return {
        "shape": float((shapes.argmax(-1) == of_shapes).float().mean()),
        "colour": float((colours.argmax(-1) == of_colours)[held].float().mean()),
        "ground": float((grounds.argmax(-1) == of_grounds).float().mean()),
        "subject_found": float(seen[of_subject == 1].float().mean()),
        "subject_imagined": float(seen[held & (of_subject == 0)].float().mean()),
    }


def save(judge: Judge, folder: Path, count: int = 2000) -> dict[str, float]:
    """Write a judge as ``judge.safetensors`` and ``judge.json``, whole or not at all.

    Args:
        judge: To write.
        folder: Where to; must not exist.
        count: Of the held-out pictures that its accuracy is measured on.

    Returns:
        Its accuracy.
    """
    from safetensors.torch import save_file

    beside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    found = accuracy(judge, count=count)
    names = {"shapes": SHAPE_NAMES, "colours": COLOUR_NAMES, "places": PLACES, "grounds": list(GROUNDS)}
    save_file(judge.state_dict(), beside / "judge.safetensors")
    text = json.dumps({**names, "size": EDGE, "accuracy": found}, indent=2)
    (beside / "judge.json").write_text(text + "\n", encoding="utf-8")
    beside.rename(folder)
    return found


def load(folder: Path) -> Judge:
    """Read what ``save`` wrote.

    Raises:
        ValueError: If it was taught other names than this file has.
    """
    from safetensors.torch import load_file

    notes = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    here = [list(SHAPE_NAMES), list(COLOUR_NAMES), list(PLACES), list(GROUNDS)]
    if [notes[key] for key in ("shapes", "colours", "places", "grounds")] != here:
        raise ValueError(f"{folder} was taught other names than judge.py has; remove it and teach it anew.")
    judge = Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval()


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", nargs="?", type=Path, default=Path(__file__).with_name("judge"))
    asked.add_argument("--quick", action="store_true", help="a few steps, for trying it out")
    given = asked.parse_args()
    if given.folder.exists():
        sys.exit(f"{given.folder} exists; remove it to teach it anew, or name another folder.")
    rates = save(train(2, 4, 16), given.folder, 20) if given.quick else save(train(), given.folder)
    print(
        f"Wrote {given.folder}; of held-out pictures it reads",
        ", ".join(f"{k} {v:.1%}" for k, v in rates.items()),
    )
