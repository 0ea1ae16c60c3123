"""What a picture file may be: the formats that are documented, one frame, 8 bits; all else has a message."""

from __future__ import annotations

import ast
import io
import json
import subprocess
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy
import PIL.EpsImagePlugin
import pytest
from PIL import Image

import moslora
from moslora.data.files import read_records
from moslora.data.pictures import FORMATS, SUFFIXES, open_image
from moslora.data.writing import write_rows
from moslora.errors import DataError, PictureError
from moslora.tasks.image.folders import read_folder

RED = Image.new("RGB", (6, 4), "red")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EndComments\nshowpage\n"


@pytest.fixture(autouse=True)
def no_program_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a picture started a program")

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", refuse)
    for name in ("Popen", "run", "check_call"):
        monkeypatch.setattr(subprocess, name, refuse)


def saved(kind: str, picture: Image.Image = RED, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def deep_png() -> bytes:
    """RGB with 16 bits a channel, which Pillow reads as 8 without a word."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (2).to_bytes(4, "big") * 2
    rows = zlib.compress((b"\0" + b"\x12\x34" * 6) * 2)
    head = chunk(b"IHDR", size + bytes([16, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def deep_tiff() -> bytes:
    samples = numpy.full((2, 2, 3), 0x1234, "<u2").tobytes()
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, 3, 134),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 140),
    ]
    tags += [(277, 3, 1, 3), (278, 3, 1, 2), (279, 4, 1, 24), (284, 3, 1, 1)]
    words = b"".join(
        t.to_bytes(2, "little") + k.to_bytes(2, "little") + n.to_bytes(4, "little") + v.to_bytes(4, "little")
        for t, k, n, v in tags
    )
    head = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + words + bytes(4)
    return head.ljust(134, b"\0") + (16).to_bytes(2, "little") * 3 + samples


def frames(kind: str) -> bytes:
    return saved(kind, save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])


REFUSED = {
    "EPS": (EPS, "is an EPS or PostScript file"),
    "EPS for DOS": (b"\xc5\xd0\xd3\xc6" + bytes(60), "is an EPS file"),
    "GIF": (saved("GIF"), "is a GIF"),
    "animated GIF": (frames("GIF"), "is a GIF"),
    "animated WebP": (frames("WEBP"), "has 2 frames"),
    "animated PNG": (frames("PNG"), "has 2 frames"),
    "TIFF of two pages": (frames("TIFF"), "has 2 frames"),
    "PNG of 16 bits": (deep_png(), "has 16 bits a channel"),
    "TIFF of 16 bits": (deep_tiff(), "has 16 bits a channel"),
    "gray PNG of 16 bits": (saved("PNG", Image.new("I;16", (4, 4))), "is of mode I;16"),
    "PPM": (saved("PPM"), "no picture of a supported format"),
    "TGA": (saved("TGA"), "no picture of a supported format"),
    "icon": (saved("ICO"), "is an icon"),
    "PDF": (b"%PDF-1.4\n", "is a PDF"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG"),
    "AVIF": (b"\0\0\0\x20ftypavif" + bytes(40), "is an AVIF"),
    "HEIC": (b"\0\0\0\x20ftypheic" + bytes(40), "is a HEIC"),
    "text": (b"hello", "no picture of a supported format"),
    "nothing": (b"", "no picture of a supported format"),
    "PNG cut off": (saved("PNG")[:50], "is broken"),
    "bomb": (saved("PNG", Image.new("1", (8000, 2000))), "more than data.max_pixels=1000"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_what_is_no_picture_of_a_documented_format_is_refused_whatever_its_name(
    what: str, name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    content, message = REFUSED[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PictureError, match=message):
        open_image(tmp_path / name, 1000)
    assert not recwarn.list


def test_a_picture_beyond_pillows_own_limit_has_a_message(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(saved("PNG", Image.new("1", (20000, 9000))))
    with pytest.raises(PictureError, match="is too large: Image size"):
        open_image(tmp_path / "a.png", 10**9)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_documented_format_is_read(kind: str, tmp_path: Path) -> None:
    how = {"save_all": True, "append_images": [RED]} if kind == "MPO" else {}
    (tmp_path / "a").write_bytes(saved(kind, **how))
    red, green, blue = open_image(tmp_path / "a", 1000).getpixel((2, 2))
    assert red > 250 and green < 5 and blue < 5


def test_pictures_of_other_formats_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.gif", "c.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(saved("PNG"))
    with pytest.raises(DataError, match=r"b\.gif is not of a supported format(.|\n)*c\.HEIC is not"):
        read_folder(tmp_path, "a thing", 1000, skip_bad=False)
    found = read_folder(tmp_path, "a thing", 1000, skip_bad=True)
    assert [p.path.name for p in found.pictures] == ["a.png"] and len(found.skipped) == 2


def as_dataset(content: bytes) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    row = {"text": "x", "image": {"bytes": content, "path": None}}
    return datasets.Dataset.from_list([row], features=features)


def test_pictures_in_a_dataset_are_opened_no_other_way(tmp_path: Path) -> None:
    write_rows(as_dataset(saved("JPEG")), tmp_path / "a.jsonl", "data")
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert open_image(Path(row["image"]), 1000).size == RED.size and row["text"] == "x"
    for what in ("EPS", "animated GIF", "PNG of 16 bits", "text"):
        with pytest.raises(DataError, match=f"row 1: .*{REFUSED[what][1]}"):
            write_rows(as_dataset(REFUSED[what][0]), tmp_path / "b.jsonl", "data")
    many = datasets.Features(
        {"images": datasets.Sequence(datasets.Image()), "who": {"face": datasets.Image()}}
    )
    stored = {"bytes": saved("PNG"), "path": None}
    table = datasets.Dataset.from_list([{"images": [stored, stored], "who": {"face": stored}}], features=many)
    write_rows(table, tmp_path / "c.jsonl", "data")
    row = json.loads((tmp_path / "c.jsonl").read_text())
    assert row["images"] == [row["who"]["face"]] * 2


def test_pictures_of_a_hub_data_set_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: as_dataset(EPS))
    assert read_records("org/pictures").rows[0]["image"]["bytes"] == EPS


def test_picture_objects_are_saved_upright_or_refused_by_row(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = Image.open(io.BytesIO(saved("JPEG", exif=exif)))
    good = [turned, RED, RED.convert("CMYK"), RED.convert("YCbCr"), RED.convert("L"), RED.convert("P")]
    write_rows([{"image": picture} for picture in good], tmp_path / "a.jsonl", "data")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [open_image(Path(row["image"]), 1000).size for row in rows] == [(4, 6), *[(6, 4)] * 5]
    for bad, message in (
        (Image.open(io.BytesIO(frames("GIF"))), "the GIF picture has 2 frames"),
        (Image.open(io.BytesIO(EPS)), "the EPS picture is a drawing"),
        (Image.new("F", (4, 4)), "mode F"),
    ):
        with pytest.raises(DataError, match=f"row 1: .*{message}"):
            write_rows([{"image": bad}], tmp_path / "b.jsonl", "data")


def test_pillow_is_told_which_formats_wherever_it_opens_a_picture() -> None:
    found = []
    for path in Path(moslora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                found.append((path.name, [keyword.arg for keyword in node.keywords]))
    assert len(found) >= 3 and all(keywords == ["formats"] for _, keywords in found), found


def test_the_documentation_names_the_formats_that_are_read() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert all(f"`{suffix}`" in text for suffix in SUFFIXES)
    assert all(word in text for word in ("GIF", "16 bits", "frames", "MPO"))
