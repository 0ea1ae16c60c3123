"""Answers, pictures and thumbnails in a run directory."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora.files import replaced_file, write_text
from moslora.tasks.task import Answer, Shown
from moslora.training.context import RunContext

# Small copies of the pictures that questions are about: how many at most, and their longer side in pixels.
SMALL_COPIES, SMALL = 200, 320


def save_pictures(run: RunContext, stage: str, pictures: Sequence[Shown]) -> list[Shown]:
    """Write pictures into the run directory, each whole or not at all."""
    return [save_shown(run, f"{number:03d}-{stage}", shown) for number, shown in enumerate(pictures)]


def save_shown(run: RunContext, name: str, shown: Shown) -> Shown:
    """Write a picture that a model made, and return it with its place in the run directory."""
    return Shown(shown.prompt, shown.seed, save_picture(run, f"{name}.png", shown.data))


def save_picture(run: RunContext, name: str, data: bytes) -> str:
    """Write a picture whole or not at all; return where, from the run directory on."""
    path = run.directory.path / "pictures" / name
    path.parent.mkdir(exist_ok=True)
    with replaced_file(path) as part:
        part.write_bytes(data)
    return f"pictures/{name}"


def write_predictions(run: RunContext, before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Write both models' answers side by side, one JSON object per held-out example."""
    lines: list[dict[str, Any]] = [
        {
            "place": tuned.place,
            "prompt": tuned.prompt,
            "reference": tuned.reference,
            "base": base.text,
            "tuned": tuned.text,
            "base_ok": base.correct,
            "tuned_ok": tuned.correct,
            "kind": tuned.kind,
        }
        for base, tuned in zip(before, after, strict=True)
    ]
    small = _save_thumbnails(run, list(dict.fromkeys(file for answer in after for file in answer.pictures)))
    for line, answer in zip(lines, after, strict=True):
        if answer.pictures:
            line["pictures"] = list(answer.pictures)
            line["thumbnails"] = [small.get(file) for file in answer.pictures]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(run.directory.predictions, text)


def _save_thumbnails(run: RunContext, files: Sequence[str]) -> dict[str, str]:
    """Keep small copies of pictures in the run directory, named by what they show, for the report."""
    from moslora.data.pictures import open_image

    kept: dict[str, str] = {}
    for file in files[:SMALL_COPIES]:
        try:
            picture = open_image(Path(file), run.recipe.data.max_pixels)  # type: ignore[attr-defined]
        except ValueError:
            continue  # gone since it was asked about; the report says so
        picture.thumbnail((SMALL, SMALL))
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=85)
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        kept[file] = save_picture(run, f"{digest[:16]}.webp", buffer.getvalue())
    return kept
