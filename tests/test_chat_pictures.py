"""Laws of pictures side by side: what is drawn and answered is what the run itself drew and answered."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tiny_pipelines
from moslora.api.chatting import kind_of_run, open_gallery, open_viewing
from moslora.display import Display
from moslora.errors import PictureError, UsageError
from moslora.training.run import train
from moslora.training.run_directory import RunDirectory
from test_vision import arguments as vision_arguments
from test_vision import world as vision_world  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("drawn")
    tiny_pipelines.sdxl().save_pretrained(folder / "sdxl")
    (folder / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (24, 24), (90 * number, 40, 200)).save(folder / "pictures" / f"{number}.png")
    settings = {
        "task": "image", "model": folder / "sdxl", "data": folder / "pictures", "data.prompt": "a cat",
        "data.resolution": 16, "task.prompts": "['a cat on ice']", "task.inference_steps": 2, "trainer.max_steps": 4,
        "trainer.learning_rate": "1e-1", "scopes.text_encoders": "adapter", "output.dir": folder, "output.name": "run",
    }  # fmt: skip
    return train([f"{key}={value}" for key, value in settings.items()], Display(quiet=True))


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


def test_each_draws_what_the_run_drew_of_the_same_prompt_and_seed(drawn: RunDirectory) -> None:
    assert kind_of_run(drawn.path) == "image"
    pictures = drawn.read()["pictures"]
    gallery = open_gallery([drawn.path])
    found = dict(gallery.draw("a cat on ice", pictures["before"][0]["seed"]))
    assert list(found) == ["base", "run"]
    for name, stage in (("base", "before"), ("run", "after")):
        wanted = (drawn.path / pictures[stage][0]["file"]).read_bytes()
        # diffusers applies the factors where the run had the live adapter: a rounding to 8 bits may fall otherwise.
        assert np.abs(pixels(found[name]) - pixels(wanted)).max() <= 1, name
    assert np.abs(pixels(found["base"]) - pixels(found["run"])).max() > 1
    again = dict(gallery.draw("a cat on ice", pictures["before"][0]["seed"]))
    assert again == found
    assert [name for name, _ in gallery.draw("a", 1, lambda: True)] == []
    for prompt, seed in ((" ", 0), ("a", -1)):
        with pytest.raises(UsageError):
            next(gallery.draw(prompt, seed))


def test_each_answers_about_a_picture_as_in_the_runs_own_measurement(
    vision_world: Path,  # noqa: F811
    tmp_path: Path,
    drawn: RunDirectory,
) -> None:
    run = train(vision_arguments(vision_world, tmp_path), Display(quiet=True))
    said: list[str] = []
    display = Display(io.StringIO())
    display.say = lambda text="", style=None: said.append(text)  # type: ignore[method-assign]
    viewing = open_viewing([run.path], display)
    assert any("proven active" in line for line in said)
    predictions = [json.loads(line) for line in run.predictions.read_text(encoding="utf-8").splitlines()]
    assert any(one["base"] != one["tuned"] for one in predictions)
    for number, one in enumerate(predictions):
        color = ("white", "black")[number // 2]
        answers = dict(viewing.ask(f"Which? {number % 2}", (vision_world / f"{color}.png").read_bytes()))
        assert answers == {"base": one["base"], "run": one["tuned"]}
    with pytest.raises(PictureError):
        next(viewing.ask("Which?", b"not a picture"))
    with pytest.raises(UsageError, match="task: image"):
        open_viewing([run.path, drawn.path])
