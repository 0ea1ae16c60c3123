"""Write small vision-language benchmarks, in VLMEvalKit's TSV form, from labeled pictures inside Python packages.

    pip install --no-deps scikit-learn scikit-image django-countries
    python recipes/digits/write_benchmarks.py [FOLDER]            (into recipes/digits/data)

- 1797 handwritten digits (scikit-learn's load_digits, UCI, CC BY 4.0): training and held-out rows for
  ``recipes/digits-vision.yaml``, and of digits that these do not have a benchmark of each kind: ``digits-choice.tsv``,
  ``digits-circular.tsv``, ``digits-yes-no.tsv``, ``digits-text.tsv``.
- 200 pictures of faces and of something else (scikit-image's lfw_subset): ``faces.tsv``, yes or no.
- Photographs (scikit-image): ``photos.tsv``, which of four things; pictures as files beside it.
- Flags (django-countries): ``flags.tsv`` and ``flags-cn.tsv``, which of four countries.

The packages are read as files, not imported: their data alone is needed. The same packages give the same bytes.
"""

from __future__ import annotations

import base64
import csv
import gzip
import importlib.util
import io
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48  # pixels of a digit's picture; the small model's tower takes so many
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELDOUT, BENCHMARK = 80, 400  # of the 1797 digits; the rest is for training
PHOTOS = {
    "astronaut.png": "an astronaut",
    "chelsea.png": "a cat",
    "coffee.png": "a cup of coffee",
    "coins.png": "coins",
    "hubble_deep_field.jpg": "galaxies",
    "moon.png": "the surface of the moon",
    "motorcycle_left.png": "a motorcycle",
    "page.png": "a printed page",
    "rocket.jpg": "a rocket",
    "brick.png": "a brick wall",
    "grass.png": "grass",
    "gravel.png": "gravel",
}
# Flags are asked about by ISO 3166 code; names in English and Chinese.
FLAGS = {
    "jp": ("Japan", "日本"),
    "fr": ("France", "法国"),
    "de": ("Germany", "德国"),
    "it": ("Italy", "意大利"),
    "cn": ("China", "中国"),
    "ca": ("Canada", "加拿大"),
    "br": ("Brazil", "巴西"),
    "in": ("India", "印度"),
    "ch": ("Switzerland", "瑞士"),
    "se": ("Sweden", "瑞典"),
    "gr": ("Greece", "希腊"),
    "vn": ("Vietnam", "越南"),
    "tr": ("Turkey", "土耳其"),
    "us": ("the United States", "美国"),
    "gb": ("the United Kingdom", "英国"),
    "za": ("South Africa", "南非"),
}


def inside(package: str, *parts: str) -> Path:
    """Return a file of a package without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(
            f"{package} is not installed: pip install --no-deps scikit-learn scikit-image django-countries"
        )
    return Path(found.origin).parent.joinpath(*parts)


def encoded(picture: Image.Image) -> str:
    """Return a picture as base64 of a PNG."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as VLMEvalKit's TSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path}: {len(rows)} rows")


def options(draw: random.Random, right: str, others: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return four options by letter, and the right letter."""
    texts = [right, *draw.sample([other for other in others if other != right], 3)]
    draw.shuffle(texts)
    return dict(zip("ABCD", texts, strict=True)), "ABCD"[texts.index(right)]


# --- Digits -------------------------------------------------------------------------------------------------


def digits() -> tuple[list[Image.Image], list[int]]:
    """Return the pictures and their labels, in a drawn order."""
    with gzip.open(inside("sklearn", "datasets", "data", "digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    pictures = []
    for row in table[order, :-1]:
        grey = 255 - np.rint(row.reshape(8, 8) * 255 / 16)
        small = Image.fromarray(grey.astype(np.uint8))
        pictures.append(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB"))
    return pictures, [int(label) for label in table[order, -1]]


def questions(draw: random.Random, label: int) -> Iterator[tuple[str, str, str]]:
    """Yield a question of each kind about a digit, as the benchmarks ask it, and its answer."""
    yield "text", "Which digit is this?\nAnswer the question using a single word or phrase.", WORDS[label]
    is_it = draw.random() < 0.5
    other = label if is_it else draw.choice([n for n in range(10) if n != label])
    yield "yes-no", f"Is this the digit {WORDS[other]}? Please answer yes or no.", "Yes" if is_it else "No"
    choices, right = options(draw, WORDS[label], WORDS)
    lines = [f"{letter}. {text}" for letter, text in choices.items()]
    asked = "\n".join(["Which digit is this?", *lines])
    yield "choice", f"{asked}\nAnswer with the option's letter from the given choices directly.", right


def write_training(folder: Path, part: str, pictures: Sequence[Image.Image], labels: Sequence[int]) -> None:
    """Write conversations in LLaVA's form, and their pictures."""
    draw = random.Random(part)
    rows = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        name = f"{part}-{number}.png"
        picture.save(folder / "images" / name)
        for kind, question, answer in questions(draw, label):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            rows.append({"image": name, "kind": kind, "conversations": turns})
    (folder / f"{part}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{folder / part}.json: {len(rows)} rows")


def write_digits(folder: Path) -> None:
    """Write the training data, and a benchmark of every kind of other digits."""
    pictures, labels = digits()
    cut = len(pictures) - BENCHMARK
    write_training(folder, "train", pictures[: cut - HELDOUT], labels[: cut - HELDOUT])
    write_training(folder, "heldout", pictures[cut - HELDOUT : cut], labels[cut - HELDOUT : cut])
    draw = random.Random(1)
    tests = list(enumerate(zip(pictures[cut:], labels[cut:], strict=True)))
    choice, circular, yes_no, text = [], [], [], []
    for number, (picture, label) in tests:
        image, word = encoded(picture), WORDS[label]
        choices, right = options(draw, word, WORDS)
        asked = {"index": number, "image": image, "question": "Which digit is this?"}
        choice.append({**asked, **choices, "answer": right, "category": word})
        for turn in range(4):
            texts = list(choices.values())
            turned = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            row = {**asked, "index": number + 1_000_000 * turn, "image": image if not turn else str(number)}
            letter = next(one for one, its in turned.items() if its == word)
            circular.append({**row, **turned, "answer": letter, "category": word})
        other = draw.choice([one for one in WORDS if one != word])
        for wanted, answer in ((word, "Yes"), (other, "No")):
            yes_no.append(
                {
                    "index": len(yes_no),
                    "image": image,
                    "image_path": f"{number}.png",
                    "question": f"Is this the digit {wanted}? Please answer yes or no.",
                    "answer": answer,
                    "category": word,
                }
            )
        text.append({**asked, "answer": str([word] * 10), "category": word})
    for name, rows in (("choice", choice), ("circular", circular), ("yes-no", yes_no), ("text", text)):
        write(folder / f"digits-{name}.tsv", rows)


# --- Faces, photographs, flags ------------------------------------------------------------------------------


def write_faces(folder: Path) -> None:
    """Write the hundred faces and hundred pieces of other pictures."""
    table = np.load(inside("skimage", "data", "lfw_subset.npy"))
    rows = []
    for number, values in enumerate(table):
        picture = Image.fromarray(np.rint(values / values.max() * 255).astype(np.uint8)).resize((100, 100))
        rows.append(
            {
                "index": number,
                "image": encoded(picture),
                "question": "Is this a person's face? Please answer yes or no.",
                "answer": "Yes" if number < len(table) // 2 else "No",
                "category": "faces",
            }
        )
    write(folder / "faces.tsv", rows)


def write_photos(folder: Path) -> None:
    """Write photographs as files, and a question about each."""
    draw, rows = random.Random(2), []
    (folder / "images").mkdir(exist_ok=True)
    for number, (name, what) in enumerate(PHOTOS.items()):
        with Image.open(inside("skimage", "data", name)) as picture:
            small = picture.convert("RGB")
            small.thumbnail((336, 336))
            small.save(folder / "images" / f"{Path(name).stem}.png")
        choices, right = options(draw, what, list(PHOTOS.values()))
        shown = f"{Path(name).stem}.png"
        rows.append(
            {"index": number, "image_path": shown, "question": "What is this?", **choices, "answer": right}
        )
    write(folder / "photos.tsv", rows)


def write_flags(folder: Path) -> None:
    """Write flags, asked about in English and in Chinese."""
    for language, question, name in (
        (0, "Whose flag is this?", "flags"),
        (1, "这是哪个国家的国旗?", "flags-cn"),
    ):
        draw, rows = random.Random(3), []
        for number, (code, names) in enumerate(FLAGS.items()):
            with Image.open(inside("django_countries", "static", "flags", f"{code}.gif")) as picture:
                image = encoded(picture.convert("RGB").resize((96, 64)))
            choices, right = options(draw, names[language], [own[language] for own in FLAGS.values()])
            rows.append({"index": number, "image": image, "question": question, **choices, "answer": right})
        write(folder / f"{name}.tsv", rows)


def main() -> None:
    """Write everything."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write_digits(folder)
    write_faces(folder)
    write_photos(folder)
    write_flags(folder)


if __name__ == "__main__":
    main()
