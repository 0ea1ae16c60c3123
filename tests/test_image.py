"""Subjects learned from a few pictures: what is learned, exported and shown, on tiny random pipelines."""

from __future__ import annotations

import json
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from PIL import Image

import moslora.training.callbacks
import moslora.training.reload_proof.proof
import moslora.training.run
import tiny_pipelines
from moslora.display import Display
from moslora.errors import RecipeError, Stopped
from moslora.recipe.loading import load_recipe
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.tasks.image.crops import Crop, cut, plan_crops
from moslora.tasks.image.folders import read_folder
from moslora.tasks.image.latents import Shot
from moslora.tasks.image.noise import Flow, Noising
from moslora.tasks.image.pipeline import check_variant
from moslora.tasks.image.prompts import fill
from moslora.tasks.image.randomness import seed_of
from moslora.tasks.image.task import ImageTask
from moslora.training.run import check, resume, train
from moslora.training.run_directory import RunDirectory
from tolerances import MODEL, relative_error

RECIPES = Path(__file__).parents[1] / "recipes"

# What transformers and diffusers say of pictures without torchvision, and of the 16 tokens of these tokenizers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torchvision|truncated|legacy behaviour).*",
    "ignore:__array__ implementation:DeprecationWarning",  # of diffusers' schedulers, by numpy
)


def picture(path: Path, width: int = 24, height: int = 20, seed: int = 0, mode: str = "RGB") -> Path:
    values = numpy.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_pipelines.sdxl().save_pretrained(folder / "sdxl")
    tiny_pipelines.flux().save_pretrained(folder / "flux")
    (folder / "pictures").mkdir()
    for number in range(3):
        picture(folder / "pictures" / f"{number}.png", 24 + 4 * number, 20, number)
    return folder


def quiet() -> Display:
    return Display(quiet=True)


def arguments(world: Path, out: Path, base: str = "sdxl", **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "task": "image",
        "model": world / base,
        "data": world / "pictures",
        "data.prompt": "a {} {}",
        "data.token": "x",
        "data.class_name": "cat",
        "data.resolution": 16,
        "task.inference_steps": 2,
        "task.loss_draws": 2,
        "trainer.max_steps": 3,
        "trainer.learning_rate": 0.01,
        "output": out / "run",
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def prepared(world: Path, out: Path, base: str = "sdxl", **changes: object) -> ImageTask:
    task = ImageTask(load_recipe(arguments(world, out, base, **changes)), quiet(), lambda: None)
    task.read()
    task.prepare()
    return task


def loaded(world: Path, out: Path, base: str = "sdxl", **changes: object) -> tuple[ImageTask, Any]:
    task = prepared(world, out, base, **changes)
    return task, task.load()


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A whole run, the text encoders adapted too."""
    changes = {
        "scopes.text_encoders": "adapter",
        "task.prompts": "['a {} {} on ice']",
        "trainer.gradient_accumulation_steps": 2,
    }
    return train(arguments(world, tmp_path_factory.mktemp("runs"), **changes), quiet())


def test_a_run_ends_with_three_forms_of_one_adapter_all_proven(finished: RunDirectory, world: Path) -> None:
    record = finished.read()
    assert record["status"] == "completed"
    assert record["proofs"].keys() == {"fold", "kohya", "reload"}
    assert all(proof["passed"] for proof in record["proofs"].values())
    assert record["proofs"]["reload"]["reader"] == "diffusers"
    assert record["metrics"]["before"]["loss"] != record["metrics"]["after"]["loss"]
    native = tiny_pipelines.sdxl()
    base = tiny_pipelines.outputs(native)
    for name in base:
        PeftModel.from_pretrained(getattr(native, name), finished.adapter / name)
    expected = tiny_pipelines.outputs(native)
    for file in (finished.lora / "pytorch_lora_weights.safetensors", finished.path / "kohya.safetensors"):
        fresh = tiny_pipelines.sdxl()
        fresh.load_lora_weights(file.parent, weight_name=file.name)
        found = tiny_pipelines.outputs(fresh)
        for name in base:
            assert relative_error(found[name], expected[name]) < MODEL, (file.name, name)
            assert relative_error(base[name], expected[name]) > 10 * MODEL, name


def test_the_report_shows_pictures_and_does_not_call_training_pictures_held_out(
    finished: RunDirectory,
) -> None:
    page = finished.report.read_text()
    assert page.count("data:image/webp;base64,") == 2 and "a x cat on ice" in page
    assert "img-src data:" in page  # or the browser shows none of them
    assert "load_lora_weights" in page and "Loss on training pictures" in page
    assert "held-out examples" not in page and "Held-out loss" not in page
    one, two = (finished.path / "pictures" / f"000-{stage}.png" for stage in ("before", "after"))
    with Image.open(one) as image:
        assert image.size == (16, 16)
    assert one.read_bytes() != two.read_bytes()


def test_flux_is_trained_by_flow_matching_and_loads_into_a_fresh_pipeline(
    world: Path, tmp_path: Path
) -> None:
    run = train(arguments(world, tmp_path, "flux", **{"trainer.max_steps": 2}), quiet())
    assert run.read()["proofs"].keys() == {"fold", "reload"}
    assert not (run.path / "kohya.safetensors").exists()
    assert run.read()["proofs"]["reload"]["adapter_effect"] > 1e-4


@pytest.mark.parametrize("base", ["sd", "sd3"])
def test_the_other_families_learn_and_ship_what_they_learned(
    base: str, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fresh process costs seconds; here a fresh pipeline stands for it.
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    getattr(tiny_pipelines, base)().save_pretrained(tmp_path / base)
    scopes = {"scopes.text_encoders": "adapter", "task.prompts": "[a cat]"}
    run = train(arguments(tmp_path, tmp_path, base, data=world / "pictures", **scopes), quiet())
    tuned, fresh, plain = (getattr(tiny_pipelines, base)() for _ in range(3))
    parts = [path.name for path in run.adapter.iterdir() if path.is_dir()]
    assert len(parts) == {"sd": 2, "sd3": 3}[base]
    for name in parts:
        PeftModel.from_pretrained(getattr(tuned, name), run.adapter / name)
    fresh.load_lora_weights(run.lora, weight_name="pytorch_lora_weights.safetensors")
    found, expected, before = (tiny_pipelines.latents(p) for p in (fresh, tuned, plain))
    assert relative_error(found, expected) < MODEL
    assert relative_error(before, expected) > 10 * MODEL


def stopping_at(step: int, honest: Any) -> Any:
    def recorder(run: Any, log: Any) -> Any:
        found = honest(run, log)
        on_step_end = found.on_step_end

        def stop(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step:
                run.stop.received = signal.SIGTERM
            return on_step_end(args, state, control, **kwargs)

        found.on_step_end = stop
        return found

    return recorder


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.adapter / "unet" / "adapter_model.safetensors")


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is proven after training has tests of its own.
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    changes = {
        "trainer.max_steps": 5,
        "trainer.gradient_accumulation_steps": 2,
        "adapter.lora_dropout": 0.2,
        "data.crop": "random",
        "data.flip": "true",
    }
    whole = train(arguments(world, tmp_path / "whole", **changes), quiet())
    with monkeypatch.context() as patch:
        patch.setattr(
            moslora.training.callbacks, "Recorder", stopping_at(2, moslora.training.callbacks.Recorder)
        )
        with pytest.raises(Stopped):
            train(arguments(world, tmp_path / "parts", **changes), quiet())
    parts = RunDirectory.open(tmp_path / "parts" / "run")
    checkpoint = parts.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 2
    assert (checkpoint.path / "adapter_model.safetensors").stat().st_size < 100_000  # without the base
    resumed = resume(parts.path, quiet())
    assert resumed.read()["status"] == "completed"
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())
    # Twelve lines of cause: other noise would have moved the weights elsewhere.
    other = train(arguments(world, tmp_path / "other", **changes, **{"trainer.data_seed": 1}), quiet())
    assert not all(torch.equal(weights(other)[name], tensor) for name, tensor in weights(whole).items())


def drawing(monkeypatch: pytest.MonkeyPatch, also: Any = lambda run: None) -> list[str]:
    """Count pictures as they are made, and let each use up randomness of every kind."""
    honest, made = ImageTask.draw, []

    def make(task: ImageTask, prompt: str, seed: int) -> bytes:
        content = honest(task, prompt, seed)
        torch.rand(3), numpy.random.rand(), random.random()
        made.append(prompt)
        also(task)
        return content

    monkeypatch.setattr(ImageTask, "draw", make)
    return made


def test_pictures_on_the_way_leave_training_as_it_is_and_none_is_made_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    changes = {"trainer.max_steps": 5, "adapter.lora_dropout": 0.2, "trainer.learning_rate": 0.05}
    shown = {**changes, "task.prompts": "['a {} {} on ice', 'a red {} {}']", "task.pictures_every": 2}
    plain = train(arguments(world, tmp_path / "plain", **changes), quiet())
    made = drawing(monkeypatch)
    whole = train(arguments(world, tmp_path / "whole", **shown), quiet())
    assert len(made) == 2 * 4  # base, steps 2 and 4, tuned
    assert all(torch.equal(weights(whole)[name], tensor) for name, tensor in weights(plain).items())
    record = whole.read()
    during = record["pictures"]["during"]
    assert list(during) == ["2", "4"] and [p["file"] for p in during["4"]] == [
        "pictures/000-step-4.png",
        "pictures/001-step-4.png",
    ]
    files = [
        whole.path / "pictures" / f"000-{stage}.png" for stage in ("before", "step-2", "step-4", "after")
    ]
    assert len({file.read_bytes() for file in files}) == 4
    assert record["timing"]["pictures_seconds"] > 0
    page = whole.report.read_text()
    assert page.count("data:image/webp;base64,") == 8
    assert page.index("<span>base<") < page.index("<span>step 2<") < page.index("<span>step 4<")

    def stop(task: ImageTask) -> None:
        if len(made) == 3:  # the first of step 2
            task.raise_if_stopped.__self__.received = signal.SIGTERM  # type: ignore[attr-defined]

    made.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ImageTask, "draw", ImageTask.draw)
        drawing(patch, stop)
        made_before = made
        with pytest.raises(Stopped):
            train(arguments(world, tmp_path / "parts", **shown), quiet())
    parts = RunDirectory.open(tmp_path / "parts" / "run")
    checkpoint = parts.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 2
    assert len(parts.read()["pictures"]["during"]["2"]) == 1 and len(made_before) == 3
    made.clear()
    resumed = resume(parts.path, quiet())
    assert made == ["a red x cat", "a x cat on ice", "a red x cat", "a x cat on ice", "a red x cat"]
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(plain).items())
    for stage in ("step-2", "step-4", "after"):
        for number in ("000", "001"):
            one, two = (run.path / "pictures" / f"{number}-{stage}.png" for run in (whole, resumed))
            assert one.read_bytes() == two.read_bytes()


def test_a_batch_is_the_mean_of_its_rows_so_that_accumulation_is_a_larger_batch(
    world: Path, tmp_path: Path
) -> None:
    _, model = loaded(world, tmp_path)
    rows, seeds = torch.tensor([0, 2, 1]), torch.tensor([seed_of("row", n) for n in range(3)])
    together = model(rows, seeds)["loss"]
    alone = [model(rows[n : n + 1], seeds[n : n + 1])["loss"] for n in range(3)]
    assert relative_error(together, torch.stack(alone).mean()) < MODEL


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_noise_targets_and_weights_are_those_of_diffusers(prediction: str, gamma: float | None) -> None:
    from diffusers import DDPMScheduler, EulerDiscreteScheduler
    from diffusers.training_utils import compute_snr

    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    theirs = DDPMScheduler(prediction_type=prediction, **schedule)
    ours = Noising(EulerDiscreteScheduler(prediction_type=prediction, **schedule), "uniform", gamma)
    clean, noise = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t = ours.timesteps(torch.tensor([0.0, 0.2, 0.5, 0.9, 0.9999]))
    assert t.tolist() == [0, 200, 500, 900, 999]
    noisy, target, weight = ours.apply(clean, noise, t)
    assert relative_error(noisy, theirs.add_noise(clean, noise, t)) < MODEL
    wanted = noise if prediction == "epsilon" else theirs.get_velocity(clean, noise, t)
    assert relative_error(target, wanted) < MODEL
    snr = compute_snr(theirs, t)
    capped = torch.ones(5) if gamma is None else snr.clamp(max=gamma)
    divided = torch.ones(5) if gamma is None else snr if prediction == "epsilon" else snr + 1
    assert relative_error(weight, capped / divided) < MODEL


def test_flow_matching_keeps_the_schedulers_shift() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = Flow(theirs, "uniform")
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = ours.timesteps(torch.tensor([0.1, 0.5, 0.99]))
    noisy, target, weight = ours.apply(clean, noise, t)
    assert relative_error(noisy, theirs.scale_noise(clean, t, noise)) < MODEL
    assert torch.equal(target, noise - clean) and torch.equal(weight, torch.ones(3))
    assert Flow(theirs).timesteps(torch.tensor([0.5]))[0] == theirs.timesteps[500]


def test_prior_preservation_makes_its_pictures_once_and_adds_their_weighted_loss(
    world: Path, tmp_path: Path
) -> None:
    place = tmp_path / "class"
    place.mkdir()
    picture(place / "own.png", 16, 16)
    prior = {
        "data.class_images": place,
        "data.class_prompt": "a {class_name}",
        "data.class_count": 3,
        "task.prior_weight": 0.5,
    }
    task = prepared(world, tmp_path, **prior)
    before = task.hashes()
    assert len(task.class_pictures.missing) == 2 and [p.name for p in place.iterdir()] == ["own.png"]
    model: Any = task.load()
    assert len(model.prior) == 3 and len(list(place.glob("generated-*.png"))) == 2
    again = prepared(world, tmp_path, **prior)
    assert not again.class_pictures.missing and again.hashes() == before  # so that a run can be resumed
    row, seed = torch.tensor([0]), torch.tensor([5])
    alone = model.eval()(row, seed)["loss"]
    total = model.train()(row, seed)["loss"]
    assert total > alone
    model.prior_weight = 0.0
    assert relative_error(model(row, seed)["loss"], alone) < MODEL
    picture(place / "generated-00001.png", 16, 16, seed=9)
    with pytest.raises(ValueError, match=r"generated-00001\.png is not what was generated"):
        prepared(world, tmp_path, **prior)
    with pytest.raises(ValueError, match="name another folder"):
        prepared(world, tmp_path, **{**prior, "data.class_prompt": "a dog"})


def test_pictures_that_cannot_be_used_are_named_all_at_once(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    picture(folder / "good.jpg")
    picture(folder / "grey.png", mode="L")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    picture(folder / "huge.png", 300, 200)
    Image.fromarray(numpy.zeros((9, 9), dtype=numpy.uint16)).save(folder / "deep.png")
    with pytest.raises(ValueError, match=r"(?s)3 faults.*broken\.png.*deep\.png.*huge\.png.*bad_images=skip"):
        read_folder(folder, "a cat", 10_000, False)
    found = read_folder(folder, "a cat", 10_000, True)
    assert [p.path.name for p in found.pictures] == ["good.jpg", "grey.png"] and len(found.skipped) == 3
    for wrong, message in (
        (tmp_path / "none", "does not exist"),
        (world, "pictures, sdxl.*not searched"),
    ):
        with pytest.raises(ValueError, match=message):
            read_folder(wrong, "a cat", 10_000, True)


def test_captions_come_from_files_beside_or_from_metadata_and_none_may_lack(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a {token}\nsleeping\n")
    with pytest.raises(ValueError, match=r"b\.png has no caption"):
        read_folder(tmp_path, None, 10_000, False)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x eating"}\n')
    found = read_folder(tmp_path, None, 10_000, False, name_words=lambda text: fill(text, "x", None))
    assert [p.prompt for p in found.pictures] == ["a x sleeping", "x eating"]
    assert read_folder(tmp_path, "one prompt", 10_000, False).unread == 2
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "x"}\n{"file_name": 3}\n')
    with pytest.raises(ValueError, match=r"(?s)line 1: c\.png is not a picture.*line 2: expected an object"):
        read_folder(tmp_path, None, 10_000, False)


def test_prompts_take_token_and_class_in_any_of_the_usual_forms() -> None:
    forms = ("a {} {} here", "a {0} {1} here", "a {token} {class_name} here", "a x cat here")
    assert {fill(form, "x", "cat") for form in forms} == {"a x cat here"}
    for wrong in ("{} {} {}", "a {subject}", "a {", "{class_name}"):
        with pytest.raises(ValueError, match="place"):
            fill(wrong, "x", None)


def test_lines_of_the_published_list_of_prompts_are_taken_as_they_are(world: Path, tmp_path: Path) -> None:
    lines = ["'a {0} {1} on the beach'.format(unique_token, class_token),", "a red {} {}"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    task = prepared(world, tmp_path, **{"task.prompts_file": tmp_path / "prompts.txt"})
    assert task.prompts == ["a x cat on the beach", "a red x cat"]
    (tmp_path / "prompts.txt").write_text("Classes\n\nprompt_list = [\n" + lines[0] + "\n]")
    with pytest.raises(ValueError, match=r"task\.published_prompts=object"):
        prepared(world, tmp_path, **{"task.prompts_file": tmp_path / "prompts.txt"})


@pytest.mark.parametrize("kind", ["object", "live"])
def test_the_25_published_prompts_need_one_key(kind: str, world: Path, tmp_path: Path) -> None:
    task = prepared(world, tmp_path, **{"task.published_prompts": kind, "task.prompts": "['a red {} {}']"})
    assert len(task.prompts) == 25 and task.prompts[0] == "a red x cat"  # which is one of theirs
    assert ("a x cat in a chef outfit" in task.prompts) == (kind == "live")
    assert ("a x cat on top of a mirror" in task.prompts) == (kind == "object")


def test_squares_are_cut_where_the_size_conditions_say(world: Path, tmp_path: Path) -> None:
    task, model = loaded(world, tmp_path, **{"data.flip": "true"})
    shots: list[Shot] = model.examples[1][0]  # 28 × 20 pixels, resized to 22 × 16
    assert [s.sizes.tolist() for s in shots] == [[20, 28, 0, 3, 16, 16]] * 2
    with Image.open(task.train_folder.pictures[1].path) as image:
        plain, mirrored = (
            cut(image, 16, Crop(left, 0, flipped)) for left, flipped in ((1, False), (5, True))
        )
    assert torch.equal(plain, mirrored.flip(2)) and plain.shape == (3, 16, 16) and plain.abs().max() <= 1
    crops = plan_crops(task.train_folder.pictures[1], 16, "random", 50, False, 0)
    assert {c.left for c in crops} == set(range(7)) and {c.top for c in crops} == {0}


def test_what_cannot_be_exported_or_trained_is_refused_before_anything_is_loaded(
    world: Path, tmp_path: Path
) -> None:
    for changes, message in (
        ({"adapter.use_dora": "true"}, "adapter.use_dora cannot be set for task=image"),
        ({"task.max_new_tokens": 3}, "task.max_new_tokens is unknown"),
        ({"trainer.packing": "true"}, "trainer.packing is unknown"),
        ({"adapter.target_modules": "[to_Q]"}, "names no module of .*it has .*to_q"),
        ({"data.resolution": 15}, "not a multiple of 2"),
        ({"data.class_prompt": "a cat"}, "needs both data.class_images"),
        ({"model": world / "sdxl" / "unet"}, "not a diffusers pipeline"),
        ({"data.token": "null"}, r"has a place for data\.token"),
        (
            {"task.prompts": "[a]", "task.pictures_every": 3},
            "task.pictures_every=3, but training has 3 steps",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(world, tmp_path, **changes)
    with pytest.raises(ValueError, match="is for U-Nets"):
        prepared(world, tmp_path, "flux", **{"task.snr_gamma": 5})
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionInpaintPipeline; task=image trains"):
        prepared(world, tmp_path, model=other)


def test_a_pipeline_without_some_of_its_weights_is_not_filled_up_with_noise(
    world: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "sdxl", tmp_path / "cut")
    file = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_out.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_out\.weight"):
        loaded(tmp_path, tmp_path, "cut", data=world / "pictures")


def test_the_published_recipe_says_what_was_published_and_can_be_tried_dry(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = RECIPES / "sdxl-dreambooth.yaml"
    recipe: Any = load_recipe([str(path)])
    adapter, trainer = recipe.adapter, resolve_trainer_arguments(recipe, "cuda")
    assert (adapter["r"], adapter["lora_alpha"], adapter["mixer"]) == (4, 4, "orthogonal")
    assert adapter["init_lora_weights"] == "gaussian"
    assert set(adapter["target_modules"]) == {"to_q", "to_k", "to_v", "to_out.0"}
    assert (trainer["learning_rate"], trainer["lr_scheduler_type"], trainer["max_steps"]) == (
        1e-4,
        "constant",
        500,
    )
    assert (trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]) == (1, 4)
    assert trainer["fp16"] and not trainer["bf16"] and recipe.seed == 0 and recipe.data.resolution == 1024
    check(
        [str(path), f"model={world / 'sdxl'}", f"data.train={world / 'pictures'}", f"output={tmp_path}/x"],
        Display(),
    )
    shown = " ".join(capsys.readouterr().out.split())
    counted = sum(p.numel() for p in tiny_pipelines.sdxl().unet.parameters())
    assert f"unet {counted:,} 7,680" in shown and "Training 7,680 parameters beside a base of" in shown
    assert all(f"{name} " in shown for name in ("text_encoder", "text_encoder_2", "vae"))
    assert "“a photo of ikat cat”" in shown and "48 of its modules are adapted" in shown
    assert "Nothing was trained" in shown and not list(tmp_path.iterdir())


# For every key of the recipe's own sections: a setting in which it would do nothing, and what is said of it then.
IDLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "task.pictures_per_prompt": ("sdxl", {"task.pictures_per_prompt": 2}, "pictures_per_prompt: no pictures"),
    "task.pictures_every": ("sdxl", {"task.pictures_every": 2}, "about pictures of prompts"),
    "task.inference_steps": (
        "sdxl",
        {"task.inference_steps": 2},
        "task.inference_steps: no pictures will be made",
    ),
    "task.guidance_scale": (
        "flux",
        {"task.guidance_scale": 3.0, "task.prompts": "[a]"},
        "distilled to do without",
    ),
    "task.negative_prompt": (
        "sdxl",
        {"task.negative_prompt": "bad", "task.guidance_scale": 1.0, "task.prompts": "[a]"},
        "which is no guidance",
    ),
    "task.max_sequence_length": (
        "sdxl",
        {"task.max_sequence_length": 8},
        "for T5 and language models, and SDXL has none",
    ),
    "task.clip_model": ("sdxl", {"task.clip_model": "{clip}"}, "about pictures of prompts"),
    "task.dino_model": ("sdxl", {"task.dino_model": "{dino}"}, "about pictures of prompts"),
    "task.snr_gamma": ("flux", {"task.snr_gamma": 5}, "is for U-Nets"),
    "task.noise_offset": ("flux", {"task.noise_offset": 0.1}, "is for U-Nets"),
    "task.prior_weight": ("sdxl", {"task.prior_weight": 0.5}, "weighs the class's pictures"),
    "model.revision": ("sdxl", {"model.revision": "main"}, "only hub ids have revisions"),
    "model.variant": ("sdxl", {"model.variant": "fp16"}, r"no weights of model\.variant=fp16; it has null"),
    "data.token": ("sdxl", {"data.prompt": "a cat"}, r"data\.token=x fills no place"),
    "data.class_name": ("sdxl", {"data.prompt": "a {token}"}, r"data\.class_name=cat fills no place"),
    "data.crop": ("sdxl", {"data.crop": "random", "data": "{squares}"}, "every picture is a square"),
    "data.crops": ("sdxl", {"data.crops": 8}, r"data\.crops=8 counts random squares"),
    "data.class_count": ("sdxl", {"data.class_count": 5}, "counts the class's pictures"),
    "data.class_images": ("sdxl", {"data.class_images": "{squares}"}, "set both or none"),
    "data.class_prompt": ("sdxl", {"data.class_prompt": "a cat"}, "set both or none"),
    "scopes.text_encoders_r": ("sdxl", {"scopes.text_encoders_r": 2}, "text_encoders: adapter"),
    "scopes.text_encoders_alpha": ("sdxl", {"scopes.text_encoders_alpha": 2}, "text_encoders: adapter"),
    "adapter.target_modules": (
        "sdxl",
        {"adapter.target_modules": "[to_q, to_K]"},
        "has 'to_K', which fits no module .* 'to_k'",
    ),
    "adapter.exclude_modules": ("sdxl", {"adapter.exclude_modules": "[nothing]"}, "has 'nothing'"),
    "adapter.rank_pattern": (
        "sdxl",
        {"adapter.rank_pattern": "{q_proj: 2}"},
        "has 'q_proj', which fits no adapted",
    ),
    "adapter.alpha_pattern": (
        "sdxl",
        {"adapter.alpha_pattern": "{conv_in: 2}"},
        "has 'conv_in', which fits no",
    ),
    "trainer.label_smoothing_factor": ("sdxl", {"trainer.label_smoothing_factor": 0.1}, "has no labels"),
    "trainer.num_train_epochs": (
        "sdxl",
        {"trainer.num_train_epochs": 3},
        "num_train_epochs is ignored",
    ),
}
# Those that something comes of in every setting.
HEARD = {
    *("task.kind", "task.prompts", "task.prompts_file", "task.published_prompts", "task.loss_draws"),
    *("task.timesteps", "model.name", "model.dtype", "data.train", "data.heldout", "data.prompt"),
    *(
        "data.resolution",
        "data.flip",
        "data.buckets",
        "data.subjects",
        "data.caption_dropout",
        "data.bad_images",
        "data.max_pixels",
        "data.limit",
        "data.ignore",
        "scopes.text_encoders",
    ),
}


@pytest.mark.parametrize("key", sorted(IDLE))
def test_a_key_that_would_do_nothing_is_refused_or_said(
    key: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, changes, said = IDLE[key]
    for name, config in (("clip", {"model_type": "clip"}), ("dino", {"model_type": "vit"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "preprocessor_config.json").write_text("{}")
    (tmp_path / "squares").mkdir()
    picture(tmp_path / "squares" / "a.png", 32, 32)
    places = {"{squares}": tmp_path / "squares", "{clip}": tmp_path / "clip", "{dino}": tmp_path / "dino"}
    settings = {k: places.get(str(v), v) for k, v in changes.items()}
    if "task.inference_steps" not in settings:
        settings = {"task.inference_steps": 25, **settings}
    try:
        task = ImageTask(load_recipe(arguments(world, tmp_path, base, **settings)), Display(), lambda: None)
        task.read()
        task.prepare()
        if key == "model.variant":
            check_variant(task.files, task.variant)
    except ValueError as error:
        found = str(error)
    else:
        found = capsys.readouterr().out
    assert re.search(said, " ".join(found.split())), found


def test_several_subjects_are_learned_with_their_own_words(world: Path, tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    picture(tmp_path / "dog" / "a.png", 24, 24, 7)
    other = {"path": str(tmp_path / "dog"), "token": "y", "class_name": "dog"}
    several = {
        "data.subjects": json.dumps([other, {**other, "prompt": "{} sits"}]),
        "task.prompts": "['a {} {} on ice', 'nothing']",
    }
    task = prepared(world, tmp_path, **several)
    words = [p.prompt for p in task.train_folder.pictures]
    assert words == ["a x cat"] * 3 + ["a y dog", "y sits"]
    assert task.prompts == ["a x cat on ice", "nothing", "a y dog on ice"]
    alone = prepared(world, tmp_path)
    assert alone.hashes()["data"] != task.hashes()["data"]
    assert Path(load_recipe([*arguments(world, tmp_path, **several)]).data.subjects[0].path).is_absolute()
    for wrong, message in (
        ([{"token": "y"}], "path"),
        ([{**other, "tokens": "y"}], "tokens"),
        ([{**other, "token": None}], r"has a place for data\.token"),
        ([{**other, "path": str(tmp_path / "none")}], "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(world, tmp_path, **{**several, "data.subjects": json.dumps(wrong)})
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "clip" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="photos of one subject"):
        prepared(world, tmp_path, **several, **{"task.clip_model": tmp_path / "clip"})


def test_every_key_of_the_recipe_was_thought_of() -> None:
    recipe: Any = load_recipe(["task=image", "model=org/x", "data=pics"])
    sections = {name: getattr(recipe, name) for name in ("task", "model", "data", "scopes")}
    keys = {f"{name}.{key}" for name, section in sections.items() for key in type(section).model_fields}
    own = {key for key in IDLE if key.split(".")[0] in sections}
    assert own | HEARD == keys and not own & HEARD


def test_files_of_a_variant_are_read_and_the_proof_is_told_of_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tiny_pipelines.sdxl(seed=3).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ValueError, match=r"no weights of model\.variant=null; it has fp16"):
        loaded(world, tmp_path, model=tmp_path / "half")
    # A plain VAE and no other of it: it is read as it is. A plain U-Net beside: it is not read.
    for file in (tmp_path / "half" / "vae").glob("*.fp16.safetensors"):
        file.unlink()
    plain = tiny_pipelines.sdxl(seed=4)
    plain.vae.save_pretrained(tmp_path / "half" / "vae")
    plain.unet.save_pretrained(tmp_path / "half" / "unet")
    task, model = loaded(world, tmp_path, **{"model": tmp_path / "half", "model.variant": "fp16"})
    for name, other in (("unet", half), ("text_encoder", half), ("vae", plain)):
        found, expected = (getattr(p, name).state_dict() for p in (model.pipeline, other))
        assert all(torch.equal(found[k], tensor.float()) for k, tensor in expected.items()), name
    commands: list[list[str]] = []

    def ran(command: list[str], *_: Any) -> Any:
        commands.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(moslora.training.reload_proof.proof, "run_script", ran)
    with pytest.raises(KeyboardInterrupt):
        moslora.training.reload_proof.proof.prove_reload(
            *({}, [], task.place, "float32", "cpu", tmp_path, print, task.auto_class, None, "diffusers"),
            variant=task.variant,
        )
    assert commands[0][-2:] == ["StableDiffusionXLPipeline", "fp16"]


@pytest.mark.parametrize("key", ["quantization=nf4", "attn_implementation=sdpa", "trust_remote_code=true"])
def test_what_only_language_models_have_is_refused_and_not_ignored(key: str) -> None:
    with pytest.raises(RecipeError, match=f"model.{key.partition('=')[0]}"):
        load_recipe(["task=image", "model=org/x", "data=pics", f"model.{key}"])


def test_epochs_count_pictures_and_a_kind_has_its_own_defaults() -> None:
    recipe = load_recipe(["task=image", "model=org/x", "data=pics"])
    arguments = resolve_trainer_arguments(recipe, "cpu")
    assert (arguments["max_steps"], arguments["per_device_train_batch_size"]) == (500, 1)
    assert "max_length" not in arguments
    counted = load_recipe(["task=image", "model=org/x", "data=pics", "trainer.num_train_epochs=3"])
    assert "max_steps" not in resolve_trainer_arguments(counted, "cpu")
    with pytest.raises(RecipeError, match=r"'reward'\. Did you mean 'image'"):
        load_recipe(["task=imago", "model=org/x", "data=pics"])


def test_the_run_directory_of_pictures_keeps_its_recipe_readable(finished: RunDirectory) -> None:
    again = load_recipe([str(finished.recipe)])
    assert again.task.kind == "image" and again.trainer["max_steps"] == 3
    assert (
        json.loads((finished.adapter / "unet" / "adapter_config.json").read_text())["peft_type"] == "MOSLORA"
    )
    assert (finished.adapter / "unet" / "moslora_start.safetensors").is_file()
