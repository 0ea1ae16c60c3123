"""The parts of the image task, each used without a task and without a recipe."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

import tiny_pipelines
from moslora.errors import AdapterError, RecipeError, Stopped, UsageError
from moslora.recipe.schema import ImageDataSection, ImageTaskSection
from moslora.tasks.image.adapters import adapted_modules, denoiser_config
from moslora.tasks.image.checks import check_idle_keys
from moslora.tasks.image.crops import plan_crops
from moslora.tasks.image.denoising import Denoising
from moslora.tasks.image.folders import Folder, read_folder
from moslora.tasks.image.latents import encode_picture
from moslora.tasks.image.noise import make_schedule
from moslora.tasks.image.pictures import PictureMaker, draw_pictures, plan_pictures
from moslora.tasks.image.pipeline import PipelineFiles, find_pipeline, load_pipeline, open_pipeline
from moslora.tasks.image.prior import ClassPictures
from moslora.tasks.image.scoring import measure_loss
from moslora.tasks.image.trainer import make_trainer

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
