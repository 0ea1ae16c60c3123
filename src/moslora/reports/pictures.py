"""Pictures of a run as thumbnails inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from moslora.reports.formatting import section_of
from moslora.training.run_directory import RunDirectory
from moslora.wording import evenly_spaced

THUMBNAIL = 320  # pixels; the pictures themselves lie beside the report
# Of pictures that questions are about: how many are shown of one example, and bytes of one and of all in a page.
SEEN, SEEN_BYTES, ALL_SEEN_BYTES = 4, 100_000, 2_000_000
SERIES = 8  # steps on the way that are shown; the others lie beside the report
SERIES_THUMBNAIL = 224


def picture_rows(run: RunDirectory, pictures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what base and tuned model drew, and the model on the way, by prompt and seed.

    Each is small, as a data URI; None where one is missing.
    """
    before, after = (pictures.get(stage) or [] for stage in ("before", "after"))
    during = section_of(pictures, "during")
    steps = evenly_spaced(sorted(int(step) for step in during), SERIES)
    stages = [("base", before), *((f"step {step}", during[str(step)]) for step in steps), ("tuned", after)]
    size = THUMBNAIL if not steps else SERIES_THUMBNAIL
    rows = []
    for number, shown in enumerate(before):
        files = [(who, found[number].get("file") if number < len(found) else None) for who, found in stages]
        cells = [(who, _thumbnail(run, file, size)) for who, file in files]
        rows.append({"prompt": shown.get("prompt"), "seed": shown.get("seed"), "cells": cells})
    return rows


def _thumbnail(run: RunDirectory, file: str | None, size: int) -> str | None:
    path = run.path / file if file else None
    if path is None or not path.is_file():
        return None
    data, kind = path.read_bytes(), "png"
    try:
        from PIL import Image
    except ImportError:
        pass  # the whole picture then
    else:
        with Image.open(path, formats=("PNG", "WEBP")) as image:  # what a run writes
            small = image.convert("RGB")
            small.thumbnail((size, size))
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=85)
        data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def with_thumbnails(run: RunDirectory, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the small pictures that questions are about beside them, as data URIs, as many as a page can hold."""
    left = ALL_SEEN_BYTES
    for group in groups:
        for line in group["lines"]:
            files = line["thumbnails"] if isinstance(line["thumbnails"], list) else []
            shown = []
            for file in files[:SEEN]:
                uri = _small_copy(run, file)
                if uri is not None and len(uri) <= left:
                    left -= len(uri)
                    shown.append(uri)
            line["seen"], line["unseen"] = shown, len(files) - len(shown)
    return groups


def _small_copy(run: RunDirectory, file: Any) -> str | None:
    path = (run.path / file).resolve() if isinstance(file, str) else None
    if path is None or path.suffix != ".webp" or not path.is_file():
        return None
    if not path.is_relative_to(run.path.resolve()) or path.stat().st_size > SEEN_BYTES:
        return None
    return f"data:image/webp;base64,{base64.b64encode(path.read_bytes()).decode()}"
