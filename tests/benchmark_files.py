"""TSV files of every kind of picture benchmark, as VLMEvalKit has them, with small drawn pictures."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

COLORS = ("red", "green", "blue", "white")


def picture(color: str, side: int = 16) -> str:
    """A picture of one color, as base64 of a PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows as a TSV with the columns of all of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, delimiter="\t", lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def circular(path: Path, questions: int = 3) -> Path:
    """Every question once per rotation of its options; later rotations show the first one's picture by its index."""
    rows = []
    for turn in range(len(COLORS)):
        for question in range(questions):
            color = COLORS[question % 4]
            options = [COLORS[(number + turn) % 4] for number in range(4)]
            rows.append(
                {
                    "index": question + 1 + 1_000_000 * turn,
                    "image": picture(color) if turn == 0 else str(question + 1),
                    "question": "Which color?",
                    **dict(zip("ABCD", options, strict=True)),
                    "answer": "ABCD"[options.index(color)],
                    "category": ("bright", "dark")[question % 2],
                    "l2-category": "color",
                    "split": "dev",
                }
            )
    return write(path, rows)


def choices(path: Path) -> Path:
    """Single questions: with a hint, with the option None, with a list of two pictures, and one without a picture."""
    red, blue = picture("red"), picture("blue")
    rows = [
        {"index": 0, "image": red, "question": "Which color?", "A": "red", "B": "None", "answer": "A"},
        {
            "index": 1,
            "image": blue,
            "hint": "Look.",
            "question": 'A "color"?',
            "A": "1",
            "B": "2",
            "answer": "B",
        },
        {
            "index": 2,
            "image": str([red, blue]),
            "question": "Same?\nOr not?",
            "A": "yes",
            "B": "no",
            "answer": "B",
        },
        {"index": 3, "image": "0", "question": "Which?", "A": "red", "B": "blue", "C": "NA", "answer": "A"},
        {"index": 4, "image": "", "question": "Which?", "A": "red", "B": "blue", "answer": "A"},
    ]
    return write(path, rows)


def yes_no(path: Path) -> Path:
    """Two questions about each picture, in two categories of MME."""
    rows = []
    for number, color in enumerate(COLORS):
        for asked in (color, COLORS[number - 1]):
            rows.append(
                {
                    "index": len(rows),
                    "image": picture(color),
                    "image_path": f"{color}.png",
                    "question": f"Is it {asked}? Please answer yes or no.",
                    "answer": "Yes" if asked == color else "No",
                    "category": ("color", "existence")[number % 2],
                }
            )
    return write(path, rows)


def texts(path: Path, answers: Sequence[str]) -> Path:
    """Questions whose answers are texts."""
    rows = [
        {"index": number, "image": picture(COLORS[number % 4]), "question": "What is it?", "answer": answer}
        for number, answer in enumerate(answers)
    ]
    return write(path, rows)


def hallusion(path: Path) -> Path:
    """Two questions about each of two figures of a set: set, figure and question are parts of the index."""
    rows = [
        {
            "index": f"VD_x_{number}_1_{figure}_{question}",
            "image": picture(COLORS[figure]),
            "question": "Is it red?",
            "answer": "Yes" if figure == 0 else "No",
            "category": "VD",
            "l2-category": "color",
        }
        for number, (figure, question) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1)))
    ]
    return write(path, rows)


def math_vista(path: Path) -> Path:
    """A question with options, and one with a number, which only a judge scores."""
    rows = [
        {
            "index": 1,
            "image": picture("red"),
            "question": "Which color?",
            "question_type": "multi_choice",
            "answer_type": "text",
            "choices": str(["red", "blue"]),
            "answer": "red",
            "answer_option": "A",
            "task": "figure question answering",
        },
        {
            "index": 2,
            "image": picture("blue"),
            "question": "How many?",
            "question_type": "free_form",
            "answer_type": "integer",
            "answer": "1",
            "task": "figure question answering",
        },
    ]
    return write(path, rows)
