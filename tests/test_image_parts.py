"""The parts of the image task, each used without a task and without a recipe."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import get_peft_model
from PIL import Image

import tiny_pipelines
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.errors import AdapterError, RecipeError, Stopped, UsageError
from moslora.recipe.schema import ImageDataSection, ImageTaskSection
from moslora.tasks.image.adapters import adapted_modules, denoiser_config
from moslora.tasks.image.checks import check_idle_keys
from moslora.tasks.image.crops import Crop, bucket_size, cut, has_one_crop, plan_crops
from moslora.tasks.image.denoising import Denoising
from moslora.tasks.image.folders import Folder, Picture, read_folder
from moslora.tasks.image.latents import encode_picture
from moslora.tasks.image.noise import make_schedule
from moslora.tasks.image.pictures import PictureMaker, draw_pictures, plan_pictures
from moslora.tasks.image.pipeline import PipelineFiles, find_pipeline, load_pipeline, open_pipeline
from moslora.tasks.image.prior import ClassPictures
from moslora.tasks.image.scoring import measure_loss
from moslora.tasks.image.trainer import make_trainer
from tolerances import MODEL, relative_error

# What transformers and diffusers say of pictures without torchvision, and of the 16 tokens of these tokenizers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torchvision|truncated|legacy behaviour).*",
    "ignore:__array__ implementation:DeprecationWarning",  # of diffusers' schedulers, by numpy
)

ADAPTER = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"]}


def png(seed: int, side: int = 16) -> bytes:
    values = numpy.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=numpy.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PipelineFiles:
    folder = tmp_path_factory.mktemp("base") / "sdxl"
    tiny_pipelines.sdxl().save_pretrained(folder)
    return open_pipeline(find_pipeline(str(folder)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number, 20))
    return read_folder(folder, "a cat", 10_000, False)


def denoising(files: PipelineFiles, pictures: Folder) -> Denoising:
    pipeline = load_pipeline(files, "cpu")
    model = Denoising(pipeline, files.family, make_schedule(pipeline.scheduler, False), torch.float32)
    model.requires_grad_(False)
    for picture in pictures.pictures:
        crops = plan_crops(picture, 16, "center", 1, False, seed=0)
        model.examples.append(
            (encode_picture(pipeline.vae, picture, 16, crops, max_pixels=10_000), picture.prompt)
        )
    model.encode_prompts([prompt for _, prompt in model.examples])
    return model


def test_a_pipeline_is_loaded_and_draws_the_pictures_of_diffusers(files: PipelineFiles) -> None:
    pipeline = load_pipeline(files, "cpu")
    assert files.kind == "StableDiffusionXLPipeline" and files.resolution() == 16
    assert not any(p.requires_grad for p in pipeline.unet.parameters()) and not pipeline.unet.training
    maker = PictureMaker(pipeline, files.family, files.resolution(), steps=2, guidance_scale=3.0)
    with Image.open(io.BytesIO(maker.draw("a cat", 7))) as image:
        drawn = numpy.asarray(image).astype(int)
    settings: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
    generator = torch.Generator().manual_seed(7)
    theirs = tiny_pipelines.sdxl()("a cat", generator=generator, output_type="np", **settings).images[0]
    assert abs(drawn - (theirs * 255).round()).max() <= 1  # one step of 8 bits, by another order of rounding
    shown = draw_pictures(maker.draw, plan_pictures(["a cat"], 2, seed=7))
    assert [picture.seed for picture in shown] == [7, 8] and shown[0].data == maker.draw("a cat", 7)
    assert shown[0].data != shown[1].data


def test_a_denoiser_is_trained_and_its_checkpoint_has_the_adapter_alone(
    files: PipelineFiles, pictures: Folder, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import TrainingArguments

    model = denoising(files, pictures)
    model.adapt({"unet": denoiser_config(ADAPTER)})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=0.05,
        save_steps=1,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = make_trainer(model, arguments, pictures=3, measured=range(3), seed=5)
    assert arguments.max_steps == 3 and sorted(trainer.train_dataset[k]["picture"] for k in range(3)) == [
        0,
        1,
        2,
    ]
    before = measure_loss(model.eval(), range(3), count=2, seed=0)
    trainer.train()
    after = measure_loss(model.eval(), range(3), count=2, seed=0)
    assert after != before and measure_loss(model, range(3), count=2, seed=0) == after
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    last = tmp_path / "checkpoint-3"
    assert load_file(last / "adapter_model.safetensors").keys() == trained.keys()
    trainer.load_weights(tmp_path / "checkpoint-1")
    assert not all(torch.equal(p, trained[n]) for n, p in model.named_parameters() if p.requires_grad)
    trainer.load_weights(last)
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters() if p.requires_grad)
    other = denoising(files, pictures)
    other.adapt({"unet": denoiser_config({**ADAPTER, "target_modules": ["to_k"]})})
    with pytest.raises(AdapterError, match="is the checkpoint of another adapter"):
        make_trainer(other, arguments, 3, range(3), 5).load_weights(last)


def test_modules_are_listed_before_any_weight_is_read(files: PipelineFiles) -> None:
    skeleton = files.skeleton("unet")
    assert all(p.is_meta for p in skeleton.parameters())
    modules = adapted_modules(skeleton, ADAPTER, "the unet")
    assert modules and {name.rpartition(".")[2] for name in modules} == {"to_q", "to_v"}
    with pytest.raises(
        RecipeError, match=r"rank_pattern has 'to_k', which fits no adapted module of the unet"
    ):
        adapted_modules(skeleton, {**ADAPTER, "rank_pattern": {"to_k": 1}}, "the unet")


def test_a_bucket_has_a_pictures_shape_and_no_more_pixels_than_the_square() -> None:
    for resolution, step, coarse in ((512, 16, 64), (1024, 32, 64), (96, 16, 16), (16, 2, 2)):
        assert bucket_size(700, 700, resolution, step) == (resolution, resolution)
        for width, height in ((1600, 900), (900, 1600), (3000, 1000), (1000, 990), (160, 10)):
            wide, high = bucket_size(width, height, resolution, step)
            assert wide % coarse == high % coarse == 0 and wide * high <= resolution**2
            assert max(wide, high) <= 2 * resolution and bucket_size(height, width, resolution, step) == (
                high,
                wide,
            )
    assert bucket_size(1600, 900, 512, 16) == (640, 384)
    picture = Picture(Path("a.png"), "a", "0", 40, 20)
    (crop,) = plan_crops(picture, (24, 12), "center", 4, False, 0)
    assert crop == Crop(0, 0, False) and has_one_crop(picture, (24, 12))
    assert not has_one_crop(picture, (16, 16))
    image = Image.fromarray(numpy.arange(40 * 20 * 3, dtype=numpy.uint8).reshape(20, 40, 3))
    assert cut(image, (24, 12), crop).shape == (3, 12, 24)


def test_rows_of_different_sizes_are_each_as_they_are_alone(files: PipelineFiles, tmp_path: Path) -> None:
    for number, size in enumerate(((16, 16), (32, 16), (16, 16), (16, 32))):
        values = numpy.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=numpy.uint8)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    pipeline = load_pipeline(files, "cpu")
    model = Denoising(pipeline, files.family, make_schedule(pipeline.scheduler, False), torch.float32)
    for picture in read_folder(tmp_path, "a cat", 10_000, False).pictures:
        size = bucket_size(picture.width, picture.height, 16, files.step)
        crops = plan_crops(picture, size, "center", 1, False, seed=0)
        model.examples.append((encode_picture(pipeline.vae, picture, size, crops, 10_000), picture.prompt))
    shapes = [tuple(shots[0].mean.shape[1:]) for shots, _ in model.examples]
    assert shapes[0] == shapes[2] and len(set(shapes)) == 3
    # SDXL is told the sizes: the picture's, the crop's corner, the crop's.
    assert model.examples[1][0][0].sizes.tolist() == [16, 32, 0, 0, shapes[1][0] * 2, shapes[1][1] * 2]
    model.encode_prompts(["a cat"])
    rows, seeds = torch.arange(4), torch.tensor([1, 2, 3, 4])
    draws = [model.draw(model.examples[n], torch.Generator().manual_seed(n)) for n in range(4)]
    with torch.no_grad():
        together, alone = model.losses(draws), torch.cat([model.losses([draw]) for draw in draws])
        assert relative_error(together, alone) < MODEL
        assert relative_error(model.eval()(rows, seeds)["loss"], _mean(model, seeds)) < MODEL


def _mean(model: Denoising, seeds: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(torch.tensor([n]), seeds[n : n + 1])["loss"] for n in range(4)]).mean()


def test_words_are_dropped_in_training_alone_and_as_often_as_asked(
    files: PipelineFiles, pictures: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = denoising(files, pictures)
    model.encode_prompts([""])
    seen: list[str] = []
    monkeypatch.setattr(
        model, "losses", lambda draws: (seen.extend(d.prompt for d in draws), torch.zeros(len(draws)))[1]
    )
    rows, seeds = torch.zeros(200, dtype=torch.long), torch.arange(200)
    noises = [model.draw(model.examples[0], torch.Generator().manual_seed(n)).noise for n in range(3)]
    for dropout, training in ((0.0, True), (0.3, False), (0.3, True)):
        seen.clear()
        model.caption_dropout = dropout
        model.train(training)(rows, seeds)
        assert (seen.count("") > 0) is (training and dropout > 0)
    assert 35 < seen.count("") < 85 and set(seen) == {"", "a cat"}
    again = list(seen)
    seen.clear()
    model(rows, seeds)
    assert seen == again  # so that a resumed run drops the same
    # Noise and timesteps are those of a run that drops nothing.
    assert all(
        torch.equal(model.draw(model.examples[0], torch.Generator().manual_seed(n)).noise, noises[n])
        for n in range(3)
    )


def test_class_pictures_that_an_interruption_left_out_are_generated_later(tmp_path: Path) -> None:
    folder, seeds = tmp_path / "class", []

    def draw(prompt: str, seed: int) -> bytes:
        seeds.append(seed)
        return png(seed)

    def open_class(prompt: str = "a cat") -> ClassPictures:
        return ClassPictures(
            folder,
            prompt,
            3,
            "base",
            lambda path, limit: read_folder(path, prompt, 10_000, False, limit=limit),
        )

    def stop() -> None:
        raise Stopped(2)

    first = open_class()
    assert first.missing == [0, 1, 2] and first.pictures is None and not folder.exists()
    with pytest.raises(Stopped):
        first.generate(draw, seed=4, checkpoint=stop)
    (folder / ".generated-00001.png.1-0.part.png").write_bytes(b"cut off")  # what a killed process leaves
    again = open_class()
    assert again.missing == [1, 2]
    again.generate(draw, seed=4)
    assert not again.missing and again.pictures is not None and len(again.pictures.pictures) == 3
    assert seeds == [1_000_004, 1_000_005, 1_000_006] and again.fingerprint() == "generated"
    assert len(json.loads((folder / "generated.json").read_text())["files"]) == 3
    with pytest.raises(UsageError, match="generated with the prompt 'a cat', not 'a dog'"):
        open_class("a dog")


def test_settings_are_checked_without_data_or_model() -> None:
    warnings: list[str] = []
    task, data = ImageTaskSection(inference_steps=3), ImageDataSection(train="pictures")
    check_idle_keys(task, data, {"max_steps": 5, "num_train_epochs": 2}, [], warnings.append)
    assert len(warnings) == 2 and "no pictures will be made" in warnings[0]
    with pytest.raises(RecipeError) as raised:
        check_idle_keys(ImageTaskSection(prior_weight=0.5, pictures_every=2), data, {}, [], warnings.append)
    assert len(raised.value.problems) == 2


def test_methods_are_compared_on_pictures_and_the_base_is_whole_after_each(tmp_path: Path) -> None:
    from moslora.comparison.compare import compare
    from moslora.display import Display

    tiny_pipelines.flux().save_pretrained(tmp_path / "flux")
    for folder, count in (("train", 5), ("held", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.png").write_bytes(png(number + 10 * (folder == "held"), 20))
    recipe = {
        "task": "image",
        "model": tmp_path / "flux",
        "data": tmp_path / "train",
        "data.heldout": tmp_path / "held",
        "data.prompt": "a cat",
        "data.resolution": 16,
        "task.loss_draws": 2,
    }
    arguments = [f"{key}={value}" for key, value in recipe.items()]
    options: dict[str, Any] = {"methods": ["lora", "moslora"], "rates": [0.05], "steps": 2, "seeds": 2}
    warnings: list[str] = []
    display = Display(quiet=True)
    display.warn = warnings.append  # type: ignore[method-assign]
    folder, verdict = compare(arguments, display, **options, out=tmp_path / "out")
    assert verdict is not None and not warnings  # or the base would have been loaded anew
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("cells/*moslora*.json"))]
    assert [cell["status"] for cell in cells] == ["done", "done"]
    assert [len(cell["test"]) for cell in cells] == [2, 2] and len(cells[0]["validation"]) == 1
    losses = {method.name: [point.test for point in method.points] for method in verdict.methods}
    assert len({loss for own in losses.values() for loss in own}) == 4 and verdict.base_loss > 0
    page = (folder / "report.html").read_text()
    assert "as mean squared error" in page and "nats" not in page
    for change, message in (
        ("scopes.text_encoders=adapter", "methods are put into the denoiser alone"),
        ("data.heldout=null", "set data.heldout, a folder"),
    ):
        with pytest.raises(UsageError, match=message):
            compare([*arguments, change], Display(quiet=True), **options, out=tmp_path / "other")
    with pytest.raises(UsageError, match="trains adapters, and full is none"):
        compare(
            arguments, Display(quiet=True), **{**options, "methods": ["lora", "full"]}, out=tmp_path / "x"
        )


def test_a_pipeline_and_an_adapter_on_it_are_evaluated_on_the_same_noise(tmp_path: Path) -> None:
    import moslora

    base = tmp_path / "flux"
    tiny_pipelines.flux().save_pretrained(base)
    for folder, count in (("train", 2), ("held", 3)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.png").write_bytes(png(number + 10 * (folder == "held"), 20))
    recipe = {
        "task": {"kind": "image", "loss_draws": 2},
        "model": str(base),
        "data": {
            "train": str(tmp_path / "train"),
            "heldout": str(tmp_path / "held"),
            "prompt": "a cat",
            "resolution": 16,
        },
    }
    pipeline = tiny_pipelines.flux()
    torch.manual_seed(0)
    model = get_peft_model(
        pipeline.transformer, MoSLoRAConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moslora_B" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "adapter" / "transformer")
    file = tmp_path / "style.safetensors"
    export_adapter(tmp_path / "adapter", file, "diffusers")
    reports = [
        moslora.evaluate(str(base), recipe=recipe, adapter=adapter, predictions=tmp_path / f"{n}.jsonl")
        for n, adapter in enumerate((tmp_path / "adapter", file))
    ]
    loss, again = (report["loss"] for report in reports)
    assert loss.items == 3 and loss.tuned != loss.base and loss.low is not None
    assert (
        again.base == loss.base
        and relative_error(torch.tensor(again.tuned), torch.tensor(loss.tuned)) < MODEL
    )
    assert reports[0].activity.modules == 4
    assert "active in 4 modules; it changes outputs of the denoiser" in " ".join(str(reports[0]).split())
    rows = [json.loads(line) for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rows] == ["0.png", "1.png", "2.png"] and rows[0]["prompt"] == "a cat"
    alone = moslora.evaluate(str(base), recipe=recipe, limit=1)
    assert alone["loss"].items == 1 and alone["loss"].base == rows[0]["base_loss"]
    with pytest.raises(AdapterError, match="neither directories of a pipeline's models"):
        moslora.evaluate(str(base), recipe=recipe, adapter=tmp_path / "adapter" / "transformer")
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "adapter" / "transformer", tmp_path / "other" / "unet")
    with pytest.raises(AdapterError, match="is for unet, and this pipeline has no unet"):
        moslora.evaluate(str(base), recipe=recipe, adapter=tmp_path / "other")
    with pytest.raises(UsageError, match="no answers that metrics could judge"):
        moslora.evaluate(str(base), recipe=recipe, metrics={"exact": lambda a, b: a == b})
