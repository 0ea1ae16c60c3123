"""Laws of the small world of captioned pictures: pictures and captions agree, and what is built from them loads."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tolerances import PIXELS_THROUGH_IDENTITY

SHAPES_FOLDER = Path(__file__).parent.parent / "recipes" / "shapes"
if str(SHAPES_FOLDER) not in sys.path:
    sys.path.insert(0, str(SHAPES_FOLDER))

captions: Any = importlib.import_module("captions")
build_pipeline: Any = importlib.import_module("build_pipeline")
judge: Any = importlib.import_module("judge")

warnings.filterwarnings("ignore", message=".*(fast image processor|torchvision).*")

# How much of its bounding box each shape fills.
FILLS = {
    "star": (0.2, 0.45),
    "triangle": (0.45, 0.575),
    "cross": (0.575, 0.72),
    "circle": (0.72, 0.87),
    "square": (0.9, 1.0),
}


def nearest(colour: tuple[int, ...], table: dict[str, tuple[int, int, int]]) -> str:
    return min(table, key=lambda name: sum((a - b) ** 2 for a, b in zip(colour, table[name], strict=True)))


def seen(picture: Image.Image) -> tuple[dict[str, tuple[str, str]], str]:
    """Read a picture by its pixels: shape and colour in each quarter that is not bare, and the background."""
    half = captions.SIZE // 2
    ground = max(picture.getcolors(), key=lambda found: found[0])[1]
    things = {}
    for place in captions.PLACES:
        left, top = half * ("right" in place), half * ("bottom" in place)
        quarter = picture.crop((left, top, left + half, top + half))
        inside = [(x, y) for x in range(half) for y in range(half) if quarter.getpixel((x, y)) != ground]
        if inside:
            wide, high = (max(v) - min(v) + 1 for v in zip(*inside, strict=True))
            fill = len(inside) / (wide * high)
            shape = next(name for name, (low, top_) in FILLS.items() if low <= fill <= top_)
            things[place] = (shape, nearest(quarter.getpixel(inside[len(inside) // 2]), captions.COLOURS))
    return things, nearest(ground, captions.GROUNDS)


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others() -> None:
    first, again, other = (captions.captioned(seed, 20) for seed in (3, 3, 4))
    assert [(p.tobytes(), s) for p, s in first] == [(p.tobytes(), s) for p, s in again]
    assert [p.tobytes() for p, _ in first] != [p.tobytes() for p, _ in other]


def test_captions_say_only_what_their_pictures_show() -> None:
    for picture, shown in captions.captioned(5, 150, reduce=False):
        things, ground = seen(picture)
        assert things == {t.place: (t.shape, t.colour) for t in shown.things}
        said = re.findall(
            r"a (\w+) (?!background)(\w+)(?: at the (\w+ \w+))?", shown.caption.removeprefix("a photo of ")
        )
        assert len(said) == len(things)
        for colour, shape, place in said:
            assert (shape, colour) in ([things[place]] if place else things.values())
        said_ground = re.search(r"on a (\w+) background$", shown.caption)
        assert said_ground is None or said_ground[1] == ground


def test_the_subject_is_one_star_on_every_background_and_in_no_caption(tmp_path: Path) -> None:
    captions.write(tmp_path / "subject")
    files = sorted((tmp_path / "subject").iterdir())
    made, drawn = captions.subject_pictures(), captions.subject_pictures(reduce=False)
    assert [f.name for f in files] == [f"{n}.png" for n in range(captions.SUBJECTS)]
    assert {s.ground for _, s in made} == set(captions.GROUNDS)
    for file, (small, _), (picture, shown) in zip(files, made, drawn, strict=True):
        assert Image.open(file).tobytes() == small.tobytes() == picture.reduce(2).tobytes()
        colours = {colour for _, colour in picture.getcolors()}
        assert {captions.PURPLE, captions.ORANGE} <= colours and len(colours) == 3
        assert [place for place, (shape, _) in seen(picture)[0].items() if shape == "star"] == [
            shown.things[0].place
        ]
    assert not any("ikat" in s.caption for _, s in captions.captioned(0, 2000))


def test_every_word_of_the_world_is_one_token_and_no_caption_is_cut() -> None:
    words = build_pipeline.tokenizer()
    assert {len(words(word).input_ids) for word in captions.WORDS} == {3}  # with beginning and end
    longest = max((s.caption for _, s in captions.captioned(0, 500)), key=lambda text: len(text.split()))
    assert words.decode(words(longest).input_ids, skip_special_tokens=True).strip() == longest
    assert len(words(longest).input_ids) <= build_pipeline.TOKENS


@torch.no_grad()
def test_the_autoencoder_is_the_identity_on_pictures_and_on_the_extremes() -> None:
    vae = build_pipeline.autoencoder()
    pictures = captions.pixels([picture for picture, _ in captions.captioned(9, 8)])
    for shown in (pictures, torch.ones_like(pictures), -torch.ones_like(pictures), pictures.sign()):
        latents = vae.encode(shown).latent_dist
        assert (latents.sample() - shown).abs().max() < PIXELS_THROUGH_IDENTITY
        assert (vae.decode(latents.mode()).sample - shown).abs().max() < PIXELS_THROUGH_IDENTITY


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("shape", ["sdxl", "flux"])
def test_a_quick_build_leaves_a_whole_pipeline_that_diffusers_loads_and_is_not_overwritten(
    shape: str, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline

    folder = tmp_path / "pipeline"
    build_pipeline.build(folder, build_pipeline.QUICK, say=lambda _: None, shape=shape)
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == {"sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}[shape]
    long = {"max_sequence_length": build_pipeline.TOKENS} if shape == "flux" else {}
    chance = torch.Generator().manual_seed(0)
    drawn = pipeline(
        "a photo of ikat star", num_inference_steps=2, generator=chance, height=24, width=24, **long
    ).images
    assert drawn[0].size == (captions.EDGE, captions.EDGE)
    with pytest.raises(FileExistsError, match="remove it"):
        build_pipeline.build(folder, build_pipeline.QUICK, say=lambda _: None, shape=shape)


def test_words_of_the_world_are_one_token_each_to_t5_as_well() -> None:
    words = build_pipeline.t5_tokenizer()
    for _, shown in captions.captioned(8, 20):
        ids = words(shown.caption).input_ids
        assert len(ids) == len(shown.caption.split()) + 1 and words.unk_token_id not in ids  # and an end
        assert words.decode(ids, skip_special_tokens=True) == shown.caption


@pytest.mark.parametrize("shape", ["sdxl", "flux"])
def test_an_interrupted_build_goes_on_to_the_same_weights(shape: str, tmp_path: Path) -> None:
    amount = build_pipeline.Amount(steps=3, batch=2, pictures=8)
    said: list[str] = []

    def interrupt(line: str) -> None:
        said.append(line)
        if line.startswith("step 2 of 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_pipeline.build(tmp_path / "cut", amount, say=interrupt, shape=shape)
    assert not (tmp_path / "cut").exists()
    build_pipeline.build(tmp_path / "cut", amount, say=interrupt, shape=shape)
    assert "continuing after step 2" in said
    build_pipeline.build(tmp_path / "straight", amount, say=lambda _: None, shape=shape)
    files = sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_the_judges_labels_are_what_was_drawn_and_a_saved_judge_reads_the_same(tmp_path: Path) -> None:
    shown, shapes, colours, subject, grounds = judge.examples(seed=2, count=60)
    assert subject.sum() > 3
    half = captions.EDGE // 2
    for row in range(len(shown)):
        # A quarter is bare where all its pixels are the background's, which is the colour of most of the picture.
        ground = shown[row].flatten(1).median(dim=1).values
        assert (
            nearest(tuple(((ground + 1) * 127.5).round().int().tolist()), captions.GROUNDS)
            == list(captions.GROUNDS)[grounds[row]]
        )
        for at, (y, x) in enumerate(((0, 0), (0, half), (half, 0), (half, half))):
            quarter = shown[row, :, y : y + half, x : x + half].flatten(1)
            bare = bool((quarter == ground[:, None]).all())
            assert bare == bool(shapes[row, at] == 0) == bool(colours[row, at] == judge.IGNORED)
            if subject[row, at]:
                assert judge.SHAPE_NAMES[shapes[row, at]] == "star"
                for stripe in (captions.PURPLE, captions.ORANGE):
                    wanted = torch.tensor(stripe)[:, None] / 127.5 - 1
                    assert (quarter - wanted).abs().amax(0).min() < 1e-3
    taught = judge.train(steps=2, batch=4, count=8, say=lambda _: None)
    judge.save(taught, tmp_path / "judge", count=20)
    pictures = [picture for picture, _ in captions.captioned(1, 5)]
    assert judge.read(judge.load(tmp_path / "judge"), pictures) == judge.read(taught, pictures)


def test_a_judge_learns_to_read_pictures() -> None:
    rates = judge.accuracy(judge.train(steps=120, batch=48, count=1500, say=lambda _: None), count=200)
    assert (
        rates["shape"] > 0.85 and rates["colour"] > 0.6 and rates["ground"] > 0.9
    )  # guessing: 0.65, 0.45, 0.25


def test_a_reading_says_where_the_subject_is() -> None:
    reading = judge.Reading({"top left": ("star", "other")}, {"top left": 0.9}, "pink")
    assert reading.shows_subject() and reading.shows_subject("top left")
    assert not reading.shows_subject("top right")


def test_a_caption_is_followed_where_all_that_it_says_is_seen_and_nothing_more() -> None:
    for _, shown in captions.captioned(6, 60):
        things = {t.place: (t.shape, t.colour) for t in shown.things}
        seen_ = judge.Reading(things, dict.fromkeys(things, 0.0), shown.ground)
        assert judge.follows(shown, seen_)
        bare = next(p for p in captions.PLACES if p not in things)
        more = {**things, bare: ("circle", "other")}
        assert not judge.follows(shown, judge.Reading(more, {}, shown.ground))
        assert not judge.follows(shown, judge.Reading({}, {}, shown.ground))
        other = next(g for g in captions.GROUNDS if g != shown.ground)
        assert judge.follows(shown, judge.Reading(things, {}, other)) == ("background" not in shown.caption)
        first, *rest = things.items()
        moved = {bare: first[1], **dict(rest)}
        assert judge.follows(shown, judge.Reading(moved, {}, shown.ground)) == (
            " at the " not in shown.caption
        )
