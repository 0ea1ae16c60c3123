"""diffusers' own training scripts with one name changed: checkpoints, resuming, the last save, stock loaders.

``Script`` does what the scripts do between ``add_adapter`` and the end, with their calls and in their order; LoRA is
the control that it does so rightly. Of the two dozen scripts, five differ in what they call:

    dreambooth/train_dreambooth_lora_sdxl.py       both text encoders; convert_state_dict_to_diffusers at every save
    dreambooth/train_dreambooth_lora.py            one text encoder
    text_to_image/train_text_to_image_lora.py      converts at the end only
    dreambooth/train_dreambooth_lora_sd3.py        converts nothing
    dreambooth/train_dreambooth_lora_flux.py       converts nothing, passes metadata
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

# By name and before anything of this package, as the scripts do.
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import (
    _collate_lora_metadata,
    _set_state_dict_into_text_encoder,
    cast_training_params,
)
from diffusers.utils import (
    convert_all_state_dict_to_peft,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moslora
import tiny_pipelines
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.export import export_adapter
from moslora.adapters.formats import diffusers as diffusers_files
from moslora.adapters.formats import kohya
from moslora.adapters.formats.pipeline_checkpoint import FOLDER, find
from moslora.adapters.formats.reading import read_adapter
from moslora.cli import app
from moslora.compat import diffusers as compat_diffusers
from moslora.errors import AdapterError
from moslora.tuner import pipelines
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj"]
FILE = "pytorch_lora_weights.safetensors"


def as_it_is(tensors: Any) -> Any:
    return tensors


@dataclass(frozen=True)
class Family:
    """What one of the scripts calls.

    Attributes:
        build: Makes the pipeline.
        denoiser: What the script trains besides text encoders.
        encoders: The text encoders that it trains.
        reader: Whose ``lora_state_dict`` it reads checkpoints with; None for the pipeline's own.
        at_checkpoints, at_the_end: What it turns tensors with before it saves them.
        passes_metadata: Whether it saves the configurations with them.
    """

    build: Callable[[], Any]
    denoiser: str
    encoders: tuple[str, ...] = ()
    reader: Any = None
    at_checkpoints: Callable[[Any], Any] = as_it_is
    at_the_end: Callable[[Any], Any] = as_it_is
    passes_metadata: bool = False


convert = convert_state_dict_to_diffusers
CLIPS = ("text_encoder", "text_encoder_2")
FAMILIES = {
    "sdxl": Family(tiny_pipelines.sdxl, "unet", CLIPS, StableDiffusionLoraLoaderMixin, convert, convert),
    "sd": Family(tiny_pipelines.sd, "unet", CLIPS[:1], StableDiffusionLoraLoaderMixin, convert, convert),
    "text to image": Family(tiny_pipelines.sd, "unet", at_the_end=convert),
    "sd3": Family(tiny_pipelines.sd3, "transformer", CLIPS),
    "flux": Family(tiny_pipelines.flux, "transformer", CLIPS[:1], passes_metadata=True),
}


def outputs(pipeline: Any, names: tuple[str, ...], seed: int = 5) -> dict[str, torch.Tensor]:
    """One call of each model, with inputs from a seed; with gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    kind, x, time = type(pipeline).__name__, draw(1, 4, 8, 8), torch.tensor([500])
    called: dict[str, Callable[[], Any]] = {
        "StableDiffusionXLPipeline": lambda: pipeline.unet(
            x,
            time,
            draw(1, 8, 32),
            added_cond_kwargs={"text_embeds": draw(1, 16), "time_ids": draw(1, 6)},
        ),
        "StableDiffusionPipeline": lambda: pipeline.unet(x, time, draw(1, 8, 16)),
        "StableDiffusion3Pipeline": lambda: pipeline.transformer(x, draw(1, 8, 32), draw(1, 32), time),
        "FluxPipeline": lambda: pipeline.transformer(
            hidden_states=draw(1, 16, 4),
            encoder_hidden_states=draw(1, 8, 32),
            pooled_projections=draw(1, 16),
            timestep=time / 1000,
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
        ),
    }
    found = {names[0]: called[kind]().sample}
    for name in names[1:]:
        ids = torch.randint(0, 200, (1, 8), generator=generator)
        found[name] = getattr(pipeline, name)(ids, output_hidden_states=True).hidden_states[-2]
    return found


class Script:
    """A script of diffusers, from its models to its last save."""

    def __init__(self, family: Family, config_class: Any, **changes: Any) -> None:
        self.family, self.pipeline = family, family.build()
        self.names = (family.denoiser, *family.encoders)
        self.models = {name: getattr(self.pipeline, name) for name in self.names}
        torch.manual_seed(3)
        settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian", **changes}
        for name, model in self.models.items():
            model.requires_grad_(False)
            targets = ATTENTION if name == family.denoiser else CLIP
            model.add_adapter(config_class(target_modules=targets, **settings))
            model.train()
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.register_save_state_pre_hook(self.save_model_hook)
        self.accelerator.register_load_state_pre_hook(self.load_model_hook)
        cast_training_params(list(self.models.values()), dtype=torch.float32)
        trained = [p for model in self.models.values() for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01)
        *models, self.optimizer = self.accelerator.prepare(*self.models.values(), optimizer)
        self.models = dict(zip(self.names, models, strict=True))
        self.step = 0

    def name_of(self, model: Any) -> str:
        own = self.accelerator.unwrap_model(model)
        return next(n for n, m in self.models.items() if self.accelerator.unwrap_model(m) is own)

    def save_model_hook(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        to_save = {}
        for model in models:
            tensors = get_peft_model_state_dict(self.accelerator.unwrap_model(model))
            to_save[self.name_of(model)] = self.family.at_checkpoints(tensors)
            weights.pop()
        self.save(output_dir, to_save)

    def save(self, output_dir: Any, tensors: dict[str, Any]) -> None:
        models = {name: self.accelerator.unwrap_model(model) for name, model in self.models.items()}
        metadata = _collate_lora_metadata(models) if self.family.passes_metadata else {}
        layers = {f"{name}_lora_layers": found for name, found in tensors.items()}
        type(self.pipeline).save_lora_weights(save_directory=output_dir, **layers, **metadata)

    def load_model_hook(self, models: list[Any], input_dir: str) -> None:
        found = {}
        while len(models) > 0:
            model = models.pop()
            found[self.name_of(model)] = self.accelerator.unwrap_model(model)
        tensors = (self.family.reader or type(self.pipeline)).lora_state_dict(input_dir)
        tensors = tensors[0] if isinstance(tensors, tuple) else tensors
        prefix = f"{self.family.denoiser}."
        own = {f"{k.replace(prefix, '')}": v for k, v in tensors.items() if k.startswith(prefix)}
        own = convert_unet_state_dict_to_peft(own)
        incompatible = set_peft_model_state_dict(found[self.family.denoiser], own, adapter_name="default")
        assert not getattr(incompatible, "unexpected_keys", None)
        for name in self.family.encoders:
            _set_state_dict_into_text_encoder(tensors, prefix=f"{name}.", text_encoder=found[name])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            found = outputs(self.pipeline, self.names, seed=self.step).values()
            self.accelerator.backward(sum(output.square().mean() for output in found))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def resume(self, folder: Path, step: int) -> None:
        self.accelerator.load_state(str(folder))
        self.step = step

    def finish(self, output_dir: Path) -> dict[str, torch.Tensor]:
        """Save, as the scripts do after the last step; return what the models give."""
        models = {name: self.accelerator.unwrap_model(model) for name, model in self.models.items()}
        tensors = {name: get_peft_model_state_dict(m.to(torch.float32)) for name, m in models.items()}
        self.save(output_dir, {name: self.family.at_the_end(found) for name, found in tensors.items()})
        with torch.no_grad():
            return outputs(self.pipeline, self.names)

    def factors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": tensor.clone()
            for name, model in self.models.items()
            for key, tensor in get_peft_model_state_dict(self.accelerator.unwrap_model(model)).items()
        }


@torch.no_grad()
def loaded(family: Family, folder: Path) -> dict[str, torch.Tensor]:
    """What a fresh pipeline gives with what lies in a folder, as the scripts try it at their end."""
    pipeline = family.build()
    if folder.is_dir():
        pipeline.load_lora_weights(folder)
    return outputs(pipeline, (family.denoiser, *family.encoders))


@pytest.mark.parametrize("method", [LoraConfig, MoSLoRAConfig])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_script_with_one_name_changed_saves_resumes_and_is_loaded(
    tmp_path: Path, name: str, method: Any
) -> None:
    family = FAMILIES[name]
    script = Script(family, method)
    script.train(2)
    script.accelerator.save_state(str(tmp_path / "checkpoint-2"))
    script.train(2)
    at_the_end = script.finish(tmp_path / "out")
    expected = script.factors()

    resumed = Script(family, method)
    resumed.resume(tmp_path / "checkpoint-2", 2)
    resumed.train(2)
    found = resumed.factors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected), "it went on from elsewhere"

    bare, with_it = loaded(family, tmp_path / "none"), loaded(family, tmp_path / "out")
    for model, output in at_the_end.items():
        assert relative_error(bare[model], output) > 100 * MODEL, model
        # No metadata, and alpha is not r: LoRA's own files are then read at another scale, ours have it in B.
        if method is MoSLoRAConfig or family.passes_metadata:
            assert relative_error(with_it[model], output) < MODEL, model


def test_a_script_with_dora_saves_resumes_and_is_loaded(tmp_path: Path) -> None:
    family = FAMILIES["text to image"]
    script = Script(family, MoSLoRAConfig, use_dora=True)
    script.train(2)
    script.accelerator.save_state(str(tmp_path / "checkpoint-2"))
    expected, at_the_end = script.factors(), script.finish(tmp_path / "out")
    assert relative_error(loaded(family, tmp_path / "out")["unet"], at_the_end["unet"]) < MODEL
    resumed = Script(family, MoSLoRAConfig, use_dora=True)
    resumed.resume(tmp_path / "checkpoint-2", 2)
    found = resumed.factors()
    assert any("magnitude" in key for key in expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What the script for SDXL left, and what its models gave."""
    folder = tmp_path_factory.mktemp("sdxl")
    script = Script(FAMILIES["sdxl"], MoSLoRAConfig)
    script.train(2)
    return folder, script.finish(folder)


IN_ANOTHER_PROCESS = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
import tiny_pipelines
pipeline = tiny_pipelines.sdxl()
pipeline.load_lora_weights(sys.argv[2])
torch.save(tiny_pipelines.outputs(pipeline), sys.argv[3])
assert "moslora" not in sys.modules
"""


def test_a_process_without_this_package_runs_what_the_script_saved(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = sdxl
    arguments = [str(Path(__file__).parent), str(folder), str(tmp_path / "found.pt")]
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    fresh = tiny_pipelines.sdxl()
    moslora_parts = read_adapter(folder / FOLDER)
    assert {path.partition(".")[0] for path in moslora_parts.modules} == {"unet", *CLIPS}
    from peft import PeftModel

    for name in ("unet", *CLIPS):
        PeftModel.from_pretrained(getattr(fresh, name), folder / FOLDER / name).eval()
    expected = tiny_pipelines.outputs(fresh)
    assert all(relative_error(found[name], expected[name]) < MODEL for name in expected)


def test_the_option_for_kohya_s_format_gives_the_same_update(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = sdxl
    save_file(
        convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(folder / FILE))),
        tmp_path / "kohya.safetensors",
    )
    found = distance(diffusers_files.read(folder / FILE), kohya.read(tmp_path / "kohya.safetensors"))
    assert found.max_relative_error < FOLD_TOLERANCE


def test_what_lies_beside_the_file_is_exported_to_every_format(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, _ = sdxl
    for to in ("kohya", "diffusers"):
        proof = export_adapter(folder / FOLDER, tmp_path / f"{to}.safetensors", to)
        assert proof.source == "native" and proof.max_relative_error < FOLD_TOLERANCE
    again = distance(
        diffusers_files.read(folder / FILE), diffusers_files.read(tmp_path / "diffusers.safetensors")
    )
    assert again.max_relative_error < FOLD_TOLERANCE


def small_unet(**settings: Any) -> Any:
    """A pipeline whose U-Net carries an adapter that shows."""
    pipeline = tiny_pipelines.sd()
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False, **settings}
    pipeline.unet.add_adapter(MoSLoRAConfig(**chosen))
    return pipeline


def save(pipeline: Any, folder: Path, **others: Any) -> None:
    pipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), **others)


def fetch(pipeline: Any, folder: Path, **others: Any) -> dict[str, torch.Tensor]:
    tensors, _ = type(pipeline).lora_state_dict(folder, **others)
    return {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}


def same_tensors(one: Path, two: Path) -> bool:
    ours, theirs = load_file(one), load_file(two)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / FOLDER).rename(folder / "elsewhere"),
        lambda folder: save_file(
            {k: t * 1.01 for k, t in load_file(folder / FILE).items()}, folder / FILE, {"format": "pt"}
        ),
    ],
    ids=["the mixers are gone", "the file is another"],
)
def test_a_fold_is_not_taken_for_the_adapter_that_it_was_made_of(tmp_path: Path, harm: Any) -> None:
    pipeline = small_unet()
    save(pipeline, tmp_path)
    before = get_peft_model_state_dict(pipeline.unet)
    harm(tmp_path)
    with pytest.raises(AdapterError, match="a plain LoRA, in which the mixers are folded"):
        set_peft_model_state_dict(pipeline.unet, fetch(pipeline, tmp_path))
    after = get_peft_model_state_dict(pipeline.unet)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    pipeline = small_unet()
    save(pipeline, tmp_path)
    weights = tmp_path / FOLDER / "unet" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(AdapterError, match="damaged or cut off"):
        set_peft_model_state_dict(pipeline.unet, fetch(pipeline, tmp_path))
    weights.write_bytes(whole)
    (tmp_path / FOLDER / "belongs_to.json").write_text("{")
    with pytest.raises(AdapterError, match="is damaged"):
        fetch(pipeline, tmp_path)


def test_two_files_of_one_folder_keep_their_own_mixers_and_saving_again_replaces_them(tmp_path: Path) -> None:
    one, two = small_unet(), small_unet(mixer="orthogonal", r=2)
    save(one, tmp_path, weight_name="one.safetensors")
    save(two, tmp_path, weight_name="two.safetensors")
    save(two, tmp_path)
    save(one, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(FOLDER, f"one.{FOLDER}", "one.safetensors", FILE, f"two.{FOLDER}", "two.safetensors")
    ]
    for pipeline, names in (
        (one, {"weight_name": "one.safetensors"}),
        (two, {"weight_name": "two.safetensors"}),
        (one, {}),
    ):
        expected = get_peft_model_state_dict(pipeline.unet)
        expected = {key: tensor.clone() for key, tensor in expected.items()}
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        set_peft_model_state_dict(pipeline.unet, fetch(pipeline, tmp_path, **names))
        found = get_peft_model_state_dict(pipeline.unet)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_file_is_never_there_without_the_mixers_that_belong_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, original = [], pipelines.save_tensors

    def spy(path: Path, tensors: Any, metadata: Any) -> None:
        original(path, tensors, metadata)
        found.append(find(tmp_path, load_file(path)))

    monkeypatch.setattr(pipelines, "save_tensors", spy)
    for pipeline in (small_unet(), small_unet(mixer="orthogonal")):
        moslora.save_for_diffusers(tmp_path, unet=pipeline.unet)
    assert len(found) == 2 and all(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == [FOLDER, FILE]


def test_copies_of_the_tensors_are_kept_and_the_way_to_their_scale_is_told(tmp_path: Path) -> None:
    pipeline = small_unet()
    copies = {key: t.clone() for key, t in get_peft_model_state_dict(pipeline.unet).items()}
    with pytest.raises(AdapterError, match=r"the scale is not known.*--alpha N"):
        pipeline.save_lora_weights(tmp_path / "bare", unet_lora_layers=copies)
    assert [p.name for p in (tmp_path / "bare").rglob("*") if p.is_file()] == ["tensors.safetensors"]
    # With the configuration beside them they are saved as the adapter's own are.
    metadata = _collate_lora_metadata({"unet": pipeline.unet})
    pipeline.save_lora_weights(tmp_path / "told", unet_lora_layers=copies, **metadata)
    save(pipeline, tmp_path / "own")
    assert same_tensors(tmp_path / "told" / FILE, tmp_path / "own" / FILE)


def test_an_adapter_of_another_kind_beside_ours_is_saved_as_it_was(tmp_path: Path) -> None:
    pipeline = small_unet()
    settings = {"r": 2, "lora_alpha": 2, "target_modules": CLIP, "init_lora_weights": False}
    pipeline.text_encoder.add_adapter(LoraConfig(**settings))
    layers = {
        "unet_lora_layers": convert(get_peft_model_state_dict(pipeline.unet)),
        "text_encoder_lora_layers": convert(get_peft_model_state_dict(pipeline.text_encoder)),
    }
    with torch.no_grad():
        expected = outputs(pipeline, ("unet", "text_encoder"))
    both = _collate_lora_metadata({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    for place, metadata in (("without", {}), ("with", both)):
        pipeline.save_lora_weights(tmp_path / place, **layers, **metadata)
        fresh = tiny_pipelines.sd()
        fresh.load_lora_weights(tmp_path / place)
        with torch.no_grad():
            found = outputs(fresh, ("unet", "text_encoder"))
        assert all(relative_error(found[name], expected[name]) < MODEL for name in expected)
    assert [p.name for p in (tmp_path / "with" / FOLDER).iterdir() if p.is_dir()] == ["unet"]


def test_what_a_file_of_diffusers_cannot_hold_is_kept_natively(tmp_path: Path) -> None:
    pipeline = small_unet(bias="moslora_only")
    with pytest.raises(AdapterError, match=r"LoRA file was not written.*What was trained is in"):
        save(pipeline, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [FOLDER]
    assert read_adapter(tmp_path / FOLDER).extra


def test_a_start_from_principal_components_is_subtracted_in_the_fold(tmp_path: Path) -> None:
    pipeline = small_unet(init_lora_weights="pissa")
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        expected = outputs(pipeline, ("unet",))["unet"]
    save(pipeline, tmp_path)
    fresh = tiny_pipelines.sd()
    fresh.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert relative_error(outputs(fresh, ("unet",))["unet"], expected) < MODEL


def test_a_loop_of_one_s_own_saves_and_resumes_in_two_lines(tmp_path: Path) -> None:
    pipeline = small_unet()
    pipeline.text_encoder.add_adapter(MoSLoRAConfig(r=2, target_modules=CLIP, init_lora_weights=False))
    models = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    moslora.save_for_diffusers(tmp_path, **models)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in models.items()}
    pipeline.save_lora_weights(tmp_path / "script", **layers)
    assert same_tensors(tmp_path / FILE, tmp_path / "script" / FILE)
    expected = {name: get_peft_model_state_dict(model) for name, model in models.items()}
    other = small_unet()
    other.text_encoder.add_adapter(MoSLoRAConfig(r=2, target_modules=CLIP))
    moslora.resume_for_diffusers(tmp_path, unet=other.unet, text_encoder=other.text_encoder)
    for name, tensors in expected.items():
        found = get_peft_model_state_dict(getattr(other, name))
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with pytest.raises(AdapterError, match=r"nothing for vae; it has text_encoder, unet"):
        moslora.resume_for_diffusers(tmp_path, vae=other.unet)
    with pytest.raises(ValueError, match="carries no MoSLoRA adapter"):
        moslora.save_for_diffusers(tmp_path / "none", unet=tiny_pipelines.sd().unet)
    with pytest.raises(TypeError, match="models by their names"):
        moslora.save_for_diffusers(tmp_path / "none")


DOCS = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text(encoding="utf-8")


def test_the_page_on_scripts_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_pipelines.sd().save_pretrained(tmp_path / "base-pipeline")
    monkeypatch.chdir(tmp_path)
    lines, loop = re.findall(r"^```python\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["LoraConfig"] is MoSLoRAConfig
    assert names["set_peft_model_state_dict"] is set_peft_model_state_dict
    exec(loop, {})
    (command,) = re.findall(r"^moslora (.*)$", DOCS, re.MULTILINE)
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0 and "Wrote style.safetensors: kohya" in done.output, done.output


def test_a_diffusers_that_is_not_known_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_diffusers, "_originals", {})
    monkeypatch.setattr(compat_diffusers, "_find", lambda name: None)
    with pytest.warns(UserWarning, match=r"moslora\.save_for_diffusers\(folder, unet=unet\)"):
        small_unet()
