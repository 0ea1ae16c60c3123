"""Transformers' LoRA files in the names of the models' own code: what ComfyUI, sd-scripts and ai-toolkit look for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_pipelines
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import comfyui, kohya, original
from moslora.adapters.formats.families import FAMILIES
from moslora.adapters.formats.original_names import family_of, in_original_names
from moslora.adapters.formats.pipeline import join
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.errors import AdapterError
from test_families import MODELS, factors, sizes
from test_image_families import drawn
from test_layouts import probed, through_diffusers
from tiny_flow_pipelines import FLOW_PIPELINES
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:.*(torchvision|truncated|legacy behaviour).*")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "read-comfyui.json").read_text(encoding="utf-8"))
WRITTEN = [family for family in FAMILIES if family.native is not None]
MAKE = {name: make for name, (make, _) in FLOW_PIPELINES.items()} | {"flux": tiny_pipelines.flux}


def adapted(name: str, folder: Path, targets: Any = "all-linear") -> Any:
    """A pipeline whose transformer has a random adapter, saved in ``folder/transformer``."""
    pipeline = MAKE[name]()
    torch.manual_seed(3)
    config = MoSLoRAConfig(r=2, lora_alpha=3, target_modules=targets, mixer="kaiming")
    model = get_peft_model(pipeline.transformer, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "moslora_" in key:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder / "transformer")
    return pipeline


ATTENTION = (
    r".*\.(to_[qkv]|to_out\.0|to_qkv_mlp_proj|add_[qkv]_proj|to_add_out)|single_.*\.(proj_mlp|proj_out)"
)


@pytest.mark.parametrize("to", ["original", "kohya"])
@pytest.mark.parametrize("name", ["flux", "flux2", "klein", "qwen_image", "z_image", "lumina2", "sd3"])
def test_what_is_written_means_the_same_when_it_is_read(name: str, to: str, tmp_path: Path) -> None:
    adapted(name, tmp_path, ATTENTION)
    path = tmp_path / "style.safetensors"
    proof = export_adapter(tmp_path / "transformer", path, to)
    family = family_of(read_adapter(tmp_path / "transformer"))
    assert proof.max_relative_error < 1e-6
    assert proof.reader.startswith("diffusers" if to in family.converted else "moslora")
    assert detect(path) == ("kohya" if to == "kohya" else "original")
    with safe_open(path, "pt") as file:
        begins = {"kohya": "lora_unet_", "original": "diffusion_model."}[to]
        assert all(key.startswith(begins) for key in list(file.keys()))
    source, again = (read_adapter(p) for p in (tmp_path / "transformer", path))
    bare = {key.removeprefix("transformer."): f for key, f in again.modules.items()}
    for module, delta in probed(source.modules).items():
        assert relative_error(probed({module: bare[module]})[module], delta) < MODEL
    # Rows of a fused projection that were not adapted are zero, whatever their module is called.
    assert all(not f.B.any() for module, f in bare.items() if module not in source.modules)


@pytest.mark.parametrize("to", ["original", "kohya"])
@pytest.mark.parametrize("name", ["flux", "flux2", "klein", "qwen_image", "z_image", "lumina2", "sd3"])
def test_a_part_of_what_is_fused_is_written_with_zeros_beside_it(name: str, to: str, tmp_path: Path) -> None:
    adapted(name, tmp_path, r".*(to_q|to_v)")
    proof = export_adapter(tmp_path / "transformer", tmp_path / "style.safetensors", to)
    source = read_adapter(tmp_path / "transformer")
    assert proof.modules == len(source.modules) and proof.max_relative_error < 1e-6


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("flux2", "original"),
        ("klein", "kohya"),
        ("qwen_image", "original"),
        ("qwen_image", "kohya"),
        ("z_image", "original"),
        ("z_image", "kohya"),
    ],
)
def test_diffusers_draws_from_such_a_file_what_the_live_adapter_draws(
    name: str, to: str, tmp_path: Path
) -> None:
    live = adapted(name, tmp_path, ATTENTION)
    export_adapter(tmp_path / "transformer", tmp_path / "style.safetensors", to)
    fresh = MAKE[name]()
    before = drawn(fresh, name)
    fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
    expected = drawn(live, name)
    assert relative_error(drawn(fresh, name), expected) < 10 * MODEL
    assert relative_error(before, expected) > 100 * MODEL


def test_diffusers_reads_kohyas_flux_of_the_published_size(tmp_path: Path) -> None:
    """Its converter has FLUX.1's sizes written into it, so a small model cannot show it."""
    path = tmp_path / "a.safetensors"
    hidden, generator = 3072, torch.Generator().manual_seed(0)
    names = {f"transformer_blocks.0.attn.{name}": hidden for name in ("to_q", "to_k", "to_v", "to_out.0")}
    names |= {f"single_transformer_blocks.0.attn.{name}": hidden for name in ("to_q", "to_k", "to_v")}
    names |= {
        "single_transformer_blocks.0.proj_mlp": 4 * hidden,
        "transformer_blocks.0.ff.net.0.proj": 4 * hidden,
    }
    modules = {
        name: Factors(
            torch.randn(2, hidden, generator=generator),
            torch.eye(2),
            torch.randn(outputs, 2, generator=generator),
            0.5,
        )
        for name, outputs in names.items()
    }
    kohya.write(Adapter(modules, {"auto_mapping": {"base_model_class": "FluxTransformer2DModel"}}), path)
    found = through_diffusers("FluxLoraLoaderMixin", path)
    for name, delta in probed(modules).items():
        assert relative_error(found[f"transformer.{name}"], delta) < MODEL


def whole(name: str, **config: Any) -> Adapter:
    """An adapter on every linear layer of a model of the published sizes, without values to speak of."""
    modules = {m.path: factors(m.inputs, m.outputs, 1) for m in sizes(name)}
    return Adapter(modules, {"auto_mapping": {"base_model_class": MODELS[name][0]}, **config})


@pytest.mark.parametrize("name", GOLDEN["families"])
def test_names_are_those_that_comfyui_looks_up(name: str) -> None:
    """``read-comfyui.json`` has the names of its own table, and which rows of a layer each module is."""
    table = GOLDEN["families"][name]
    part = whole(name)
    family = family_of(part)
    fit = family.fit([m for m in sizes(name) if m.path in part.modules])
    assert fit.hidden is not None
    for diffusers, (native, start, length) in table.items():
        path = diffusers.replace("#", "1")
        if path not in part.modules:
            continue
        one = torch.ones(part.modules[path].B.shape[0], 1)
        alone = Adapter({path: Factors(part.modules[path].A, torch.eye(1), one, 1.0)}, part.config)
        ((found, factors_),) = in_original_names(alone, family).items()
        assert found == native.replace("#", "1"), path
        rows = factors_.B[:, 0].nonzero().flatten()
        if length:
            assert (int(rows[0]), len(rows)) == (start * fit.hidden, length * fit.hidden), path
        else:
            assert len(rows) == len(one), path


def test_every_module_of_a_written_family_has_a_name_or_is_refused() -> None:
    missing = {}
    for family in WRITTEN:
        part = whole(family.name)
        for path, one in part.modules.items():
            if "Conv" in str(one.form):
                continue
            try:
                in_original_names(Adapter({path: one}, part.config), family)
            except AdapterError:
                missing.setdefault(family.name, []).append(path)
    assert missing == {
        "FLUX.2": ["norm_out.linear"],
        "Lumina 2": [
            "time_caption_embed.timestep_embedder.linear_1",
            "time_caption_embed.timestep_embedder.linear_2",
            "time_caption_embed.caption_embedder.1",
            "norm_out.linear_1",
            "norm_out.linear_2",
        ],
    }


def test_the_class_that_peft_notes_decides_between_families_that_look_alike(tmp_path: Path) -> None:
    attention = {"transformer_blocks.0.attn.to_q": factors(8, 8)}
    with pytest.raises(AdapterError, match=r"may be of FLUX\.1, FLUX\.2.*calls them differently"):
        family_of(Adapter(attention))
    for name in ("FLUX.1", "FLUX.2", "Qwen-Image", "SD3"):
        config = {"auto_mapping": {"base_model_class": MODELS[name][0]}}
        assert family_of(Adapter(attention, config)).name == name
    wrong = {"auto_mapping": {"base_model_class": "ZImageTransformer2DModel"}}
    with pytest.raises(AdapterError, match=r"says that it is of a ZImageTransformer2DModel .* are not"):
        family_of(Adapter(attention, wrong))
    sana = {"auto_mapping": {"base_model_class": "SanaTransformer2DModel"}}
    with pytest.raises(AdapterError, match=r"of SANA, whose original names are not written. Write --to"):
        family_of(Adapter({"transformer_blocks.0.attn1.to_q": factors(8, 8)}, sana))
    with pytest.raises(AdapterError, match="of no family that is known"):
        family_of(Adapter({"transformer_blocks.0.attn.to_z": factors(8, 8)}))


def test_every_transformer_that_diffusers_trains_is_told_by_its_class() -> None:
    for family in FAMILIES:
        assert MODELS[family.name][0] in family.classes


def test_what_such_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    part = whole("FLUX.1")
    modules = {path: part.modules[path] for path in list(part.modules)[:4]}
    both = join({"transformer": Adapter(modules, part.config), "text_encoder": Adapter(modules)})

    with pytest.raises(AdapterError, match="of text_encoder, and a file of original names is written for a"):
        original.write(both, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="for a transformer alone"):
        kohya.write(both, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_comfyui_gets_the_form_that_it_applies_whole() -> None:
    expected = {
        "FLUX.1": "diffusers",
        "SD3": "diffusers",
        "Qwen-Image": "diffusers",
        "Z-Image": "diffusers",
        "FLUX.2": "original",
        "Lumina 2": "original",
    }
    for name, format_ in expected.items():
        adapter = join({"transformer": whole(name)})
        assert comfyui.best_format(adapter) == format_
        assert not comfyui.passed_over(adapter, format_)
    # What ComfyUI's table lacks of a diffusers file.
    lost = comfyui.passed_over(join({"transformer": whole("Lumina 2")}), "diffusers")
    assert len(lost) == len(whole("Lumina 2").modules)


def test_ranks_are_one_in_the_whole_file(tmp_path: Path) -> None:
    """diffusers takes the first module's alpha for all where a file says none."""
    adapted("z_image", tmp_path, r".*\.(to_[qkv]|to_out\.0)")
    path = tmp_path / "a.safetensors"
    export_adapter(tmp_path / "transformer", path, "kohya")
    assert {t.shape[0] for key, t in load_file(path).items() if "lora_down" in key} == {6}
