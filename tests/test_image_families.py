"""Every family of pipelines that can be trained: the same recipe, what it learned in diffusers, and its pictures."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from PIL import Image

import moslora.training.callbacks
import moslora.training.run
from moslora.errors import MissingPackageError, Stopped
from moslora.tasks.image.autoencoders import AUTOENCODERS, autoencoder_of, latent_factor
from moslora.tasks.image.checks import warn_of_cut_prompts
from moslora.tasks.image.families.table import FAMILIES
from moslora.tasks.image.latents import encode
from moslora.tasks.image.pictures import PictureMaker
from moslora.training.run import resume, train
from moslora.training.run_directory import RunDirectory
from test_image import arguments, loaded, picture, prepared, quiet, stopping_at
from tiny_flow_pipelines import FLOW_PIPELINES
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torchvision|truncated|legacy behaviour).*",
    "ignore:__array__ implementation:DeprecationWarning",  # of diffusers' schedulers, by numpy
)
NEW = [name for name in FLOW_PIPELINES if name != "sd3"]
# Of the text encoders whose prompts are padded to the limit, which would be most of the time here.
TOKENS = {"flux2": 256, "klein": 64, "lumina2": 256, "sana": 64}
# What stops and resumes in every test run: time and words that differ most from the older families'.
QUICK = "z_image"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with captions of different lengths, and the pipelines as they are asked for."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    for number, words in enumerate(("a cat", "a x cat on the ice", "x")):
        picture(folder / "pictures" / f"{number}.png", 36 + 4 * number, 34, number)
        (folder / "pictures" / f"{number}.txt").write_text(words)
    return folder


def base(world: Path, name: str) -> Path:
    make, _ = FLOW_PIPELINES[name]
    if not (world / name).exists():
        make().save_pretrained(world / name)
    return world / name


def changes(world: Path, name: str, **more: object) -> dict[str, object]:
    base(world, name)
    side = FLOW_PIPELINES[name][1]
    tokens = {"task.max_sequence_length": TOKENS[name]} if name in TOKENS else {}
    return {"data.prompt": "null", "data.token": "x", "data.resolution": side, **tokens, **more}


@pytest.fixture(scope="module")
def models(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Loaded models with their examples, each loaded once; no test changes them."""
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            made[name] = loaded(world, tmp_path_factory.mktemp(name), name, **changes(world, name))[1]
        return made[name]

    return model


def drawn(pipeline: Any, name: str, seed: int = 5) -> torch.Tensor:
    """What a pipeline makes of a prompt in one step with its default guidance: more would amplify roundings."""
    side = FLOW_PIPELINES[name][1]
    found = pipeline(
        prompt="a cat",
        height=side,
        width=side,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **FAMILIES[type(pipeline).__name__].drawing,
    )
    return found.images.detach()


@pytest.mark.parametrize("name", NEW)
def test_a_run_ships_what_it_learned_and_diffusers_draws_the_same(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in ("qwen_image", "z_image"):
        # The fresh process costs seconds; two families, with lists and numbers among their arguments, stand for all.
        monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
        monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    shown = {"task.prompts": "['a x cat']", "trainer.learning_rate": 0.05}
    run = train(arguments(world, tmp_path, name, **changes(world, name, **shown)), quiet())
    record = run.read()
    assert record["status"] == "completed" and record["proofs"]["fold"]["passed"]
    if "reload" in record["proofs"]:
        assert record["proofs"]["reload"]["adapter_effect"] > 1e-3
    for stage in ("before", "after"):
        with Image.open(run.path / "pictures" / f"000-{stage}.png") as image:
            assert image.size == (FLOW_PIPELINES[name][1],) * 2
    tuned, fresh, plain = (FLOW_PIPELINES[name][0]() for _ in range(3))
    assert [path.name for path in run.adapter.iterdir() if path.is_dir()] == ["transformer"]
    PeftModel.from_pretrained(tuned.transformer, run.adapter / "transformer")
    fresh.load_lora_weights(run.lora, weight_name="pytorch_lora_weights.safetensors")
    found, expected, before = (drawn(pipeline, name) for pipeline in (fresh, tuned, plain))
    assert relative_error(found, expected) < MODEL
    assert relative_error(before, expected) > 10 * MODEL


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.trial]) for name in NEW]
)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    short = changes(world, name, **{"trainer.max_steps": 2, "task.loss_draws": 1})
    whole = train(arguments(world, tmp_path / "whole", name, **short), quiet())
    with monkeypatch.context() as patch:
        patch.setattr(
            moslora.training.callbacks, "Recorder", stopping_at(1, moslora.training.callbacks.Recorder)
        )
        with pytest.raises(Stopped):
            train(arguments(world, tmp_path / "parts", name, **short), quiet())
    resumed = resume(RunDirectory.open(tmp_path / "parts" / "run").path, quiet())
    one, two = (
        load_file(run.adapter / "transformer" / "adapter_model.safetensors") for run in (whole, resumed)
    )
    assert one.keys() == two.keys() and all(torch.equal(two[key], tensor) for key, tensor in one.items())


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_a_batch_of_prompts_of_different_lengths_is_the_mean_of_its_rows(
    name: str, models: Callable[[str], Any]
) -> None:
    model = models(name)
    rows, seeds = torch.tensor([0, 1, 2]), torch.tensor([11, 12, 13])
    together = model(rows, seeds)["loss"]
    alone = [model(rows[n : n + 1], seeds[n : n + 1])["loss"] for n in range(3)]
    assert relative_error(together, torch.stack(alone).mean()) < MODEL


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_the_denoiser_is_called_in_training_as_its_pipeline_calls_it(
    name: str, models: Callable[[str], Any]
) -> None:
    model = models(name)
    pipeline, family, side = model.pipeline, model.family, FLOW_PIPELINES[name][1]
    seen: dict[str, Any] = {}

    def remember(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        seen.update(args=args, kwargs=kwargs, out=out[0])

    hook = pipeline.transformer.register_forward_hook(remember, with_kwargs=True)
    without = {"guidance_scale": 0.0} if name == "z_image" else {"guidance_scale": 1.0}
    pipeline(
        prompt="a cat",
        height=side,
        width=side,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **({} if name == "qwen_image" else without),
        **family.drawing,
    )
    hook.remove()
    positional = {"sana": ("hidden_states",), "z_image": ("x", "t", "cap_feats")}.get(name, ())
    taken = {**dict(zip(positional, seen["args"], strict=True)), **seen["kwargs"]}
    t = torch.tensor([float(pipeline.scheduler.timesteps[0])])
    shape = model.examples[0][0][0].mean.shape
    ours = family.arguments(
        pipeline, torch.zeros(1, *shape), t, family.words(pipeline, ["a cat"], None), torch.zeros(1, 6)
    )
    for key, value in ours.items():
        if key in ("hidden_states", "x"):
            assert _shapes(taken[key]) == _shapes(value)
        elif key == "guidance":
            assert taken[key].shape == value.shape
        else:
            one, two = _tensors(value), _tensors(taken[key])
            assert len(one) == len(two) and all(
                torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(one, two, strict=True)
            ), key
    unknown = {key for key, value in taken.items() if value is not None} - ours.keys()
    harmless = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "guidance"}
    assert unknown <= harmless, "the pipeline gives the denoiser more than training does"
    assert family.unpack(pipeline, seen["out"], *shape[1:]).shape == (1, *shape)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value if isinstance(value, torch.Tensor) else torch.tensor(value)]


def _shapes(value: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in _tensors(value)]


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_our_pictures_are_those_of_the_pipeline(name: str, models: Callable[[str], Any]) -> None:
    model = models(name)
    pipeline, family, side = model.pipeline, model.family, FLOW_PIPELINES[name][1]
    mine = numpy.asarray(Image.open(io.BytesIO(PictureMaker(pipeline, family, side, 2).draw("a cat", 7))))
    theirs = pipeline(
        prompt="a cat",
        height=side,
        width=side,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        **family.drawing,
    ).images[0]
    assert mine.shape == (side, side, 3)
    assert numpy.abs(mine.astype(int) - numpy.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("name", FLOW_PIPELINES)
def test_latents_are_decoded_as_they_were_encoded(name: str) -> None:
    """Encoding and decoding scale by inverse numbers, and by the factor that the configuration says."""
    pipeline = FLOW_PIPELINES[name][0]()
    vae, side = pipeline.vae, FLOW_PIPELINES[name][1]
    mean, std = encode(vae, torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    factor = latent_factor({**vae.config, "_class_name": type(vae).__name__})
    assert mean.shape == std.shape and mean.shape[1:] == (side // factor,) * 2
    seen: list[torch.Tensor] = []
    vae.decode = lambda latents, **_: seen.append(latents) or type("Out", (), {"sample": latents})
    with torch.no_grad():
        autoencoder_of(vae).decode(vae, mean[None])
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        pixels = pixels.unsqueeze(2) if name == "qwen_image" else pixels
        found = vae.encode(pixels)
        raw = found.latent if name == "sana" else found.latent_dist.mean
    assert relative_error(seen[0], raw) < MODEL


def test_every_family_of_flow_matching_is_tried_here() -> None:
    made = {type(make()).__name__ for make, _ in FLOW_PIPELINES.values()} | {"FluxPipeline"}
    assert {kind for kind, family in FAMILIES.items() if family.is_flow} == made
    assert {type(make().vae).__name__ for make, _ in FLOW_PIPELINES.values()} == AUTOENCODERS.keys()


TARGETED = {
    "flux2": {"to_k", "to_out.0", "to_q", "to_v", "to_qkv_mlp_proj", "to_out"},
    "qwen_image": {"to_k", "to_out.0", "to_q", "to_v"},
    "z_image": {"to_k", "to_out.0", "to_q", "to_v"},
    "lumina2": {"to_k", "to_out.0", "to_q", "to_v"},
    "sana": {"to_k", "to_q", "to_v"},
}


@pytest.mark.parametrize("name", TARGETED)
def test_a_family_adapts_what_its_published_script_adapts(name: str, world: Path, tmp_path: Path) -> None:
    from moslora.tasks.image.adapters import adapted_modules

    task = prepared(world, tmp_path, name, **changes(world, name))
    modules = adapted_modules(task.files.skeleton("transformer"), task.adapter_settings, name)
    ends = {re.sub(r".*\.(?=[a-z_]+(\.\d+)?$)", "", module) for module in modules}
    assert ends == TARGETED[name]
    own = prepared(world, tmp_path, name, **changes(world, name, **{"adapter.target_modules": "[to_q]"}))
    assert own.adapter_settings["target_modules"] == ["to_q"]


def test_what_a_family_would_ignore_is_refused(world: Path, tmp_path: Path) -> None:
    for name, setting, message in (
        ("flux2", {"task.negative_prompt": "x"}, r"pipeline of FLUX\.2 takes none"),
        ("qwen_image", {"task.guidance_scale": 4}, "without one it takes no guidance"),
        ("z_image", {"scopes.text_encoders": "adapter"}, "reads prompts with a language model"),
        ("lumina2", {"data.resolution": 24}, "not a multiple of 16"),
        ("sana", {"task.noise_offset": 0.1}, "is for U-Nets"),
    ):
        with pytest.raises(ValueError, match=message):
            prepared(world, tmp_path, name, **changes(world, name, **setting))


def test_a_distilled_base_is_told_and_a_missing_package_named(world: Path, tmp_path: Path) -> None:
    import json
    import shutil

    copy = tmp_path / "base"
    shutil.copytree(base(world, "klein"), copy)
    index = json.loads((copy / "model_index.json").read_text())
    index["is_distilled"] = True
    (copy / "model_index.json").write_text(json.dumps(index))
    told = changes(world, "klein", model=copy)
    with pytest.raises(ValueError, match="distilled to do without"):
        prepared(world, tmp_path, "klein", **told, **{"task.guidance_scale": 4})
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MissingPackageError, match="needs torchvision"):
        prepared(world, tmp_path, "klein", **told)


@pytest.mark.parametrize("name", NEW)
def test_a_prompt_that_is_not_read_to_its_end_is_told(name: str, models: Callable[[str], Any]) -> None:
    model = models(name)
    warnings: list[str] = []
    warn_of_cut_prompts(model.pipeline, model.family, ["a cat", "a " * 600], 512, warnings.append)
    assert len(warnings) == 1 and "reads no further" in warnings[0]
