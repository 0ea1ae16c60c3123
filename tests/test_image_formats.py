"""Adapters of image pipelines: what is written runs in diffusers as it ran live, and what others wrote is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import tiny_pipelines
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE, distance
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import TOLERANCES, export_adapter
from moslora.adapters.factors import Adapter, Factors, Form
from moslora.adapters.formats import comfyui, diffusers, kohya, through_diffusers
from moslora.adapters.formats.pipeline import join, split
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.adapters.formats.table import FORMATS
from moslora.errors import AdapterError, ProofError
from tolerances import MODEL, relative_error

UNET = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj", "proj_in", "ff.net.0.proj", "conv_in"]
CLIP = ["q_proj", "v_proj", "out_proj", "fc1"]
FLUX = ["to_q", "to_out.0", "add_k_proj", "proj_mlp", "proj_out", "ff.net.2", "norm.linear"]


def adapt(pipeline: Any, folder: Path, targets: dict[str, list[str]]) -> Any:
    """Adapt models of a pipeline with mixers, random in every factor, and save each natively."""
    torch.manual_seed(1)
    for name, modules in targets.items():
        config = MoSLoRAConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=modules,
            rank_pattern={name: 2 for name in ("to_v", "fc1", "proj_mlp") if name in modules},
            init_lora_weights=False,
        )
        model = get_peft_model(getattr(pipeline, name), config).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "moslora_B" in key:
                    p.mul_(2)  # so that the adapter shows
        model.save_pretrained(folder / name)
    return pipeline


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A native adapter on the UNet and both text encoders, and what the models give with it."""
    folder = tmp_path_factory.mktemp("sdxl") / "native"
    targets = {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP}
    return folder, tiny_pipelines.outputs(adapt(tiny_pipelines.sdxl(), folder, targets))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_the_file_gives_a_fresh_pipeline_what_the_live_adapter_gave(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, to: str
) -> None:
    native, expected = sdxl
    proof = export_adapter(native, tmp_path / "style.safetensors", to)
    assert proof.reader.startswith("diffusers ") and proof.max_relative_error <= FOLD_TOLERANCE
    fresh = tiny_pipelines.sdxl()
    base = tiny_pipelines.outputs(fresh)
    fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
    found = tiny_pipelines.outputs(fresh)
    for name in expected:
        assert relative_error(found[name], expected[name]) < MODEL, name
        assert relative_error(base[name], expected[name]) > 100 * MODEL, name


def test_flux_runs_from_its_file_and_has_a_kohya_form_for_its_transformer_alone(tmp_path: Path) -> None:
    live = adapt(tiny_pipelines.flux(), tmp_path / "native", {"transformer": FLUX, "text_encoder": CLIP})
    expected = tiny_pipelines.latents(live)
    export_adapter(tmp_path / "native", tmp_path / "style.safetensors", "diffusers")
    fresh = tiny_pipelines.flux()
    base = tiny_pipelines.latents(fresh)
    fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert relative_error(tiny_pipelines.latents(fresh), expected) < MODEL
    assert relative_error(base, expected) > 100 * MODEL
    with pytest.raises(AdapterError, match=r"for a transformer alone. Export ADAPTER/transformer by itself"):
        export_adapter(tmp_path / "native", tmp_path / "k.safetensors", "kohya")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "style.safetensors"]


def test_one_model_alone_is_recognised_by_its_modules(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    for component in ("unet", "text_encoder"):
        out = tmp_path / f"{component}.safetensors"
        export_adapter(sdxl[0] / component, out, "diffusers")
        assert {key.partition(".")[0] for key in load_file(out)} == {component}


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_an_imported_file_loads_onto_the_models_with_peft(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, to: str
) -> None:
    native, expected = sdxl
    export_adapter(native, tmp_path / "style.safetensors", to)
    assert detect(tmp_path / "style.safetensors") == to
    export_adapter(tmp_path / "style.safetensors", tmp_path / "again", "native")
    export_adapter(tmp_path / "style.safetensors", tmp_path / "lora", "lora")
    for folder in ("again", "lora"):
        pipeline = tiny_pipelines.sdxl()
        for part in ("unet", "text_encoder", "text_encoder_2"):
            PeftModel.from_pretrained(getattr(pipeline, part), tmp_path / folder / part).eval()
        found = tiny_pipelines.outputs(pipeline)
        assert all(relative_error(found[name], expected[name]) < MODEL for name in expected)


# ---- read, written, read


def pipeline_adapter(seed: int, ranks: list[int], dtype: torch.dtype = torch.float32) -> Adapter:
    """A UNet's and a text encoder's modules of given ranks, mixers and scales at random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(r: int, form: Form = Form()) -> Factors:  # noqa: B008  frozen
        columns = 6 * torch.Size(form.kernel).numel()
        A, M, B = (torch.randn(*s, generator=generator).to(dtype) for s in ((r, columns), (r, r), (5, r)))
        return Factors(A, M, B, float(torch.rand((), generator=generator)) + 0.1, form)

    conv = Form("conv", (3, 3))
    unet = {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0": draw(ranks[0]),
        "mid_block.resnets.0.conv1": draw(ranks[1], conv),
        "up_blocks.1.attentions.0.proj_in": draw(ranks[2], Form("conv", (1, 1))),
    }
    clip = {
        "encoder.layers.1.self_attn.q_proj": draw(ranks[3]),
        "encoder.layers.1.self_attn.out_proj": draw(ranks[1]),
        "encoder.layers.0.mlp.fc2": draw(ranks[0]),
    }
    return join({"unet": Adapter(unet), "text_encoder": Adapter(clip)})


RANKS = st.lists(st.integers(1, 5), min_size=4, max_size=4)


@pytest.mark.parametrize("to", ["diffusers", "kohya", "native", "lora"])
@given(st.integers(0, 2**16), RANKS)
def test_reading_what_was_written_gives_the_pipelines_adapter(
    tmp_path_factory: pytest.TempPathFactory, to: str, seed: int, ranks: list[int]
) -> None:
    before = pipeline_adapter(seed, ranks)
    folder = tmp_path_factory.mktemp("rwr")
    places = [folder / f"{n}.safetensors" if FORMATS[to].suffix else folder / str(n) for n in (1, 2)]
    format_, at = FORMATS[to], before
    assert format_.write is not None and format_.read is not None
    for place in places:
        if not format_.suffix:
            place.mkdir()
        format_.write(at, place)
        at = read_adapter(place)
        assert distance(before, at).max_relative_error <= FOLD_TOLERANCE
    for one in sorted(p for p in folder.rglob("*.safetensors") if str(p).startswith(str(places[0]))):
        two = Path(str(one).replace(str(places[0]), str(places[1])))
        assert one.read_bytes() == two.read_bytes(), "written again, it is another file"


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@given(st.integers(0, 2**16), RANKS)
def test_diffusers_takes_modules_of_different_ranks_at_their_scales(
    tmp_path_factory: pytest.TempPathFactory, to: str, seed: int, ranks: list[int]
) -> None:
    before = pipeline_adapter(seed, ranks)
    out = tmp_path_factory.mktemp("ranks") / "a.safetensors"
    format_ = FORMATS[to]
    assert format_.write is not None and format_.read_back is not None
    format_.write(before, out)
    found, reader = format_.read_back(out, before)
    assert reader.startswith("diffusers") and distance(before, found).max_relative_error <= FOLD_TOLERANCE


def test_without_equal_ranks_diffusers_would_take_kohya_scales_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Why ranks are filled up, and that the proof would see it: alpha = r of each module is right, and not enough.
    monkeypatch.setattr(kohya, "pad", lambda factors, r: factors)
    before = pipeline_adapter(0, [4, 2, 4, 2])
    kohya.write(before, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for key in tensors:
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(float(tensors[key.replace(".alpha", ".lora_down.weight")].shape[0]))
    save_file(tensors, tmp_path / "b.safetensors")
    assert distance(before, kohya.read(tmp_path / "b.safetensors")).max_relative_error <= FOLD_TOLERANCE
    found, _ = kohya.read_with_diffusers(tmp_path / "b.safetensors", before)
    assert distance(before, found).max_relative_error > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_is_what_the_file_has_and_its_rounding_is_within_its_bound(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, dtype: str
) -> None:
    out = tmp_path / "style.safetensors"
    proof = export_adapter(sdxl[0], out, "diffusers", dtype=dtype)
    assert {str(t.dtype) for t in load_file(out).values()} == {f"torch.{dtype}"}
    assert 1e-5 < proof.max_relative_error <= TOLERANCES[dtype]


# ---- what others wrote


def kohya_file(path: Path, modules: dict[str, tuple[int, ...]], seed: int = 0, **parts: Any) -> Path:
    """A file as kohya's trainers write it: by flat name (in, out, *kernel), rank 4, alpha 2."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (n_in, n_out, *kernel) in modules.items():
        ones = (1,) * len(kernel)
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, n_in, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(n_out, 4, *ones, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file({**tensors, **parts}, path)
    return path


ORIGINAL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (8, 8),
    "lora_unet_input_blocks_5_0_in_layers_2": (8, 8, 3, 3),
    "lora_unet_input_blocks_3_0_op": (8, 8, 3, 3),
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (8, 8),
    "lora_unet_middle_block_2_out_layers_3": (8, 8, 3, 3),
    "lora_unet_output_blocks_4_1_transformer_blocks_1_attn2_to_out_0": (8, 8),
    "lora_unet_output_blocks_3_0_skip_connection": (8, 8, 1, 1),
    "lora_unet_output_blocks_2_2_conv": (8, 8, 3, 3),
    "lora_unet_output_blocks_1_0_emb_layers_1": (8, 8),
    "lora_te1_text_model_encoder_layers_3_self_attn_k_proj": (8, 8),
    "lora_te1_text_model_encoder_layers_3_self_attn_out_proj": (8, 8),
    "lora_te2_text_model_encoder_layers_7_mlp_fc2": (8, 8),
}


def test_the_original_unets_names_are_turned_to_those_that_diffusers_turns_them_to(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin

    path = kohya_file(tmp_path / "sd.safetensors", ORIGINAL)
    judge, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        str(path), unet_config=SimpleNamespace(layers_per_block=2)
    )
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = convert_unet_state_dict_to_peft({k: v for k, v in judge.items() if k.startswith("unet.")})
    texts = convert_state_dict_to_peft({k: v for k, v in judge.items() if not k.startswith("unet.")})
    theirs = {
        k.replace("text_encoder.text_model.", "text_encoder.").replace(".processor", ""): v
        for k, v in {**unet, **texts}.items()
    }
    ours = kohya.read(path)
    assert {f"{name}.lora_{x}.weight" for name in ours.modules for x in "AB"} == theirs.keys()
    for name, factors in ours.modules.items():
        assert factors.scale == 0.5
        assert torch.equal(factors.A, theirs[f"{name}.lora_A.weight"].flatten(1))
        assert torch.equal(factors.B, theirs[f"{name}.lora_B.weight"].flatten(1))


def test_flux_with_fused_projections_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    path = kohya_file(
        tmp_path / "flux.safetensors",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": (8, 24),
            "lora_unet_double_blocks_0_txt_attn_qkv": (8, 24),
            "lora_unet_double_blocks_0_img_attn_proj": (8, 8),
            "lora_unet_double_blocks_0_txt_mlp_2": (32, 8),
            "lora_unet_double_blocks_0_img_mod_lin": (8, 48),
            "lora_unet_single_blocks_3_linear2": (40, 8),
            "lora_unet_single_blocks_3_modulation_lin": (8, 24),
        },
    )
    theirs = FluxLoraLoaderMixin.lora_state_dict(str(path))
    ours = kohya.read(path)
    assert {f"{name}.lora_{x}.weight" for name in ours.modules for x in "AB"} == theirs.keys()
    for name, factors in ours.modules.items():
        A, B = (theirs[f"{name}.lora_{x}.weight"].double() for x in "AB")
        assert relative_error(factors.delta_weight(), B @ A) < FOLD_TOLERANCE


def test_a_core_between_the_factors_is_folded_into_the_convolution(tmp_path: Path) -> None:
    name = "lora_unet_mid_block_resnets_0_conv1"
    core = torch.randn(4, 4, 3, 3)
    path = kohya_file(
        tmp_path / "locon.safetensors", {name: (6, 5, 1, 1)}, **{f"{name}.lora_mid.weight": core}
    )
    tensors = {key: t.double() for key, t in load_file(path).items()}
    x = torch.randn(1, 6, 7, 7, dtype=torch.float64)
    conv = torch.nn.functional.conv2d
    # As LyCORIS runs it: down, core, up, one after the other.
    h = conv(x, tensors[f"{name}.lora_down.weight"])
    expected = 0.5 * conv(conv(h, core.double()), tensors[f"{name}.lora_up.weight"])
    (factors,) = kohya.read(path).modules.values()
    assert factors.form == Form("conv", (3, 3))
    found = conv(x, factors.delta_weight().view(5, 6, 3, 3))
    assert relative_error(found, expected) < FOLD_TOLERANCE


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("hada_w1_a", "LoHa or LoKr of a convolution"),
        ("lokr_w1", "LoHa or LoKr of a convolution"),
        ("dora_scale", "is of DoRA"),
        ("lora_extra.weight", "an unknown method"),
    ],
)
def test_other_methods_in_kohya_names_are_refused_by_name(tmp_path: Path, part: str, message: str) -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    path = kohya_file(tmp_path / "a.safetensors", {name: (6, 5)}, **{f"{name}.{part}": torch.ones(4)})
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"lora_unet_tower_0_attn_qkv": (6, 5)}, "tower_0_attn_qkv is of no known model"),
        ({"lora_unet_double_blocks_0_img_attn_norm": (6, 5)}, "img_attn_norm is of no known model"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkv": (6, 5)},
            "names are those of FLUX.1.* and its sizes are not",
        ),
        (
            {"lora_unet_mid_block_attentions_0_proj_in": (6, 5), "lora_unet_tower_0_attn_qkv": (6, 5)},
            "tower_0_attn_qkv is not a module of a U-Net of Stable Diffusion, while others",
        ),
        ({"lora_te1_text_model_tower_0_fc1": (6, 5)}, "of no known text encoder: 'tower'"),
    ],
)
def test_names_of_other_models_are_refused(
    tmp_path: Path, modules: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(kohya_file(tmp_path / "a.safetensors", modules))


def test_older_diffusers_files_are_read_as_diffusers_reads_them(tmp_path: Path) -> None:
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    stem = "unet.mid_block.attentions.0.transformer_blocks.0"
    tensors = {
        f"{stem}.attn1.processor.to_q_lora.down.weight": torch.randn(3, 6),
        f"{stem}.attn1.processor.to_q_lora.up.weight": torch.randn(5, 3),
        f"{stem}.attn2.processor.to_out_lora.down.weight": torch.randn(3, 6),
        f"{stem}.attn2.processor.to_out_lora.up.weight": torch.randn(5, 3),
        f"{stem}.ff.net.0.proj.lora.down.weight": torch.randn(3, 6),
        f"{stem}.ff.net.0.proj.lora.up.weight": torch.randn(5, 3),
    }
    save_file(tensors, tmp_path / "old.safetensors")
    judge = {k.replace(".processor", ""): v for k, v in convert_unet_state_dict_to_peft(tensors).items()}
    found = diffusers.read(tmp_path / "old.safetensors")
    assert {f"{name}.lora_{x}.weight" for name in found.modules for x in "AB"} == judge.keys()
    assert all(
        torch.equal(f.A, judge[f"{n}.lora_A.weight"]) and f.scale == 1 for n, f in found.modules.items()
    )


def test_the_authors_sdxl_file_keeps_its_mixer(tmp_path: Path) -> None:
    # Their script saves lora_AB through diffusers, whose loader then drops it.
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    A, M, B = torch.randn(4, 6), torch.randn(4, 4), torch.randn(5, 4)
    save_file(
        {f"{stem}.lora_A.weight": A, f"{stem}.lora_AB.weight": M, f"{stem}.lora_B.weight": B},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    (factors,) = read_adapter(tmp_path / "pytorch_lora_weights.safetensors").modules.values()
    assert relative_error(factors.delta_weight(), (B @ M @ A).double()) < FOLD_TOLERANCE
    with pytest.raises(AdapterError, match="give its file"):
        read_adapter(tmp_path)


# Their fork's names, through diffusers' own renaming: what their script for SDXL saved.
AUTHORS = {
    "unet": {
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": 4,
        "mid_block.attentions.0.proj_in": 4,
    },
    "text_encoder": {"text_model.encoder.layers.1.self_attn.out_proj": 4},
}


def authors_file(path: Path, to_kohya: bool = False, **beside: torch.Tensor) -> dict[str, Any]:
    """Write a file as the authors' script does; return A, M and B by path."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils import (
        convert_all_state_dict_to_peft,
        convert_state_dict_to_diffusers,
        convert_state_dict_to_kohya,
    )

    generator, factors, layers = torch.Generator().manual_seed(2), {}, {}
    for component, modules in AUTHORS.items() if not to_kohya else [("unet", AUTHORS["unet"])]:
        tensors = {}
        for module, r in modules.items():
            shapes = {"A": (r, 6), "AB": (r, r), "B": (5, r)}
            own = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
            tensors.update({f"{module}.lora_{name}.weight": tensor for name, tensor in own.items()})
            factors[f"{component}.{module}"] = own
        layers[f"{component}_lora_layers"] = convert_state_dict_to_diffusers(tensors)
    layers["unet_lora_layers"].update(beside)
    StableDiffusionXLLoraLoaderMixin.save_lora_weights(path.parent, weight_name=path.name, **layers)
    if to_kohya:
        save_file(convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(path))), path)
    return factors


@pytest.mark.parametrize("to_kohya", [False, True], ids=["diffusers", "kohya"])
def test_the_authors_mixers_are_read_under_the_names_that_diffusers_gave_them(
    tmp_path: Path, to_kohya: bool
) -> None:
    path = tmp_path / "style.safetensors"
    factors = authors_file(path, to_kohya)
    mark = "lora_downB" if to_kohya else "lora.downB"
    assert any(mark in name for name in load_file(path)), "the renaming is gone"
    assert to_kohya or any("lora_linear_layer.downB" in name for name in load_file(path))
    found = read_adapter(path)
    assert len(found.modules) == len(factors) and detect(path) == ("kohya" if to_kohya else "diffusers")
    for module, own in factors.items():
        module = module.replace("text_encoder.text_model.", "text_encoder.")
        expected = (own["B"].double() @ own["AB"].double()) @ own["A"].double()
        assert relative_error(found.delta_weight(module), expected) < FOLD_TOLERANCE
    export_adapter(path, tmp_path / "again", "native")
    again = read_adapter(tmp_path / "again")
    for module, own in found.modules.items():
        assert all(torch.equal(getattr(own, x), getattr(again.modules[module], x)) for x in "AMB")
    assert again.config["components"]["unet"]["mixer"] == "kaiming"


def test_modules_that_the_authors_fork_leaves_without_a_mixer_are_plain_lora_and_others_are_refused(
    tmp_path: Path,
) -> None:
    # In their fork convolutions have none.
    conv = {"mid_block.resnets.0.conv1.lora_A.weight": torch.randn(4, 6, 3, 3)}
    conv["mid_block.resnets.0.conv1.lora_B.weight"] = torch.randn(5, 4, 1, 1)
    authors_file(tmp_path / "conv.safetensors", **conv)
    found = read_adapter(tmp_path / "conv.safetensors").modules["unet.mid_block.resnets.0.conv1"]
    assert found.is_folded and torch.equal(found.B, torch.squeeze(list(conv.values())[1]))
    for to_kohya in (False, True):
        path = tmp_path / f"{to_kohya}.safetensors"
        authors_file(path, to_kohya)
        tensors = load_file(path)
        lost = next(name for name in tensors if ("downB" in name and "proj_in" in name) or "lora_AB" in name)
        del tensors[lost]
        save_file(tensors, path)
        with pytest.raises(AdapterError, match=r"proj_in.*has no mixer while other linear layers have one"):
            read_adapter(path)
    # A text encoder without any is a plain LoRA beside a U-Net with them.
    tensors = {
        k: t for k, t in load_file(tmp_path / "conv.safetensors").items() if "linear_layer.downB" not in k
    }
    save_file(tensors, tmp_path / "plain.safetensors")
    parts = split(read_adapter(tmp_path / "plain.safetensors"))
    assert parts["text_encoder"].is_folded and not parts["unet"].is_folded


def test_dora_beside_the_authors_mixers_is_refused_because_their_fork_leaves_the_mixers_out(
    tmp_path: Path,
) -> None:
    name = next(iter(AUTHORS["unet"]))
    path = tmp_path / "style.safetensors"
    authors_file(path, **{f"{name}.lora_magnitude_vector": torch.ones(5)})
    with pytest.raises(AdapterError, match="runs DoRA without the mixers"):
        read_adapter(path)


def test_an_alpha_is_taken_where_a_file_does_not_tell_it_and_refused_where_it_does(tmp_path: Path) -> None:
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    bare = {
        f"{stem}.{module}.{name}.weight": torch.randn(*shape)
        for module, r in (("to_q", 4), ("to_v", 2))
        for name, shape in (("moslora_A", (r, 6)), ("moslora_M", (r, r)), ("moslora_B", (5, r)))
    }
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(AdapterError, match=r"does not say rank and alpha of unet.*--alpha N"):
        read_adapter(tmp_path / "bare.safetensors")
    found = read_adapter(tmp_path / "bare.safetensors", 8)
    assert {name.rpartition(".")[2]: f.scale for name, f in found.modules.items()} == {
        "to_q": 2.0,
        "to_v": 4.0,
    }
    proof = export_adapter(tmp_path / "bare.safetensors", tmp_path / "told.safetensors", "diffusers", alpha=8)
    assert proof.max_relative_error < FOLD_TOLERANCE
    assert distance(found, read_adapter(tmp_path / "told.safetensors")).max_relative_error < FOLD_TOLERANCE

    plain = {k.replace("moslora_", "lora_"): t for k, t in bare.items() if "moslora_M" not in k}
    save_file(plain, tmp_path / "plain.safetensors")
    assert {f.scale for f in read_adapter(tmp_path / "plain.safetensors").modules.values()} == {1.0}
    assert {f.scale for f in read_adapter(tmp_path / "plain.safetensors", 8).modules.values()} == {2.0, 4.0}
    kohya_file(tmp_path / "k.safetensors", {"lora_unet_mid_block_attentions_0_proj_in": (6, 5)})
    without = {k: t for k, t in load_file(tmp_path / "k.safetensors").items() if not k.endswith(".alpha")}
    save_file(without, tmp_path / "k-bare.safetensors")
    assert {f.scale for f in read_adapter(tmp_path / "k-bare.safetensors", 2).modules.values()} == {0.5}

    export_adapter(tmp_path / "told.safetensors", tmp_path / "native", "native")
    for name in ("told.safetensors", "k.safetensors", "native"):
        with pytest.raises(AdapterError, match=r"says its alpha.*Leave --alpha out"):
            read_adapter(tmp_path / name, 8)
    for value in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="is not an alpha"):
            read_adapter(tmp_path / "bare.safetensors", value)


# ---- DoRA, which diffusers reads of denoisers


def test_dora_of_a_unet_runs_from_a_diffusers_file_and_of_a_text_encoder_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(1)
    live = tiny_pipelines.sdxl()
    targets = ["to_q", "to_out.0", "conv1", "ff.net.0.proj"]
    config = {"r": 4, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False}
    model = get_peft_model(
        live.unet, MoSLoRAConfig(target_modules=targets, rank_pattern={"conv1": 2}, **config)
    )
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "magnitude" in key:
                p.mul_(1 + torch.rand_like(p))
    model.eval().save_pretrained(tmp_path / "native" / "unet")
    expected = tiny_pipelines.outputs(live)["unet"]
    proof = export_adapter(tmp_path / "native", tmp_path / "style.safetensors", "diffusers")
    assert proof.has_magnitudes and proof.reader.startswith("diffusers")
    fresh = tiny_pipelines.sdxl()
    fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert relative_error(tiny_pipelines.outputs(fresh)["unet"], expected) < MODEL
    export_adapter(tmp_path / "style.safetensors", tmp_path / "again", "lora")
    model = PeftModel.from_pretrained(tiny_pipelines.sdxl().unet, tmp_path / "again" / "unet").eval()
    fresh = tiny_pipelines.sdxl()
    fresh.unet = model
    assert relative_error(tiny_pipelines.outputs(fresh)["unet"], expected) < MODEL

    model = get_peft_model(
        tiny_pipelines.sdxl().text_encoder, MoSLoRAConfig(target_modules=["q_proj"], **config)
    )
    model.save_pretrained(tmp_path / "text" / "text_encoder")
    with pytest.raises(AdapterError, match="In a text_encoder diffusers would load it without its magnitude"):
        export_adapter(tmp_path / "text", tmp_path / "text.safetensors", "diffusers")


def test_diffusers_loses_dora_s_magnitude_in_a_text_encoder(tmp_path: Path) -> None:
    # Why that is refused: its own adapter, saved and loaded by itself.
    torch.manual_seed(1)
    live = tiny_pipelines.sdxl()
    live.text_encoder.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=CLIP[:3], use_dora=True, init_lora_weights=False)
    )
    with torch.no_grad():
        for key, p in live.text_encoder.named_parameters():
            if "magnitude" in key:
                p.mul_(1 + torch.rand_like(p))
    expected = tiny_pipelines.outputs(live)["text_encoder"]
    live.save_lora_weights(tmp_path, text_encoder_lora_layers=get_peft_model_state_dict(live.text_encoder))
    fresh = tiny_pipelines.sdxl()
    fresh.load_lora_weights(tmp_path)
    assert relative_error(tiny_pipelines.outputs(fresh)["text_encoder"], expected) > 100 * MODEL


# ---- ComfyUI

SDXL_SIZES = {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15_SIZES = {"attention_head_dim": 8, "cross_attention_dim": 768}


def of_model(component: str, model: torch.nn.Module) -> Adapter:
    """An adapter on every linear layer and convolution of a model without values."""
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            outputs, inputs = module.weight.flatten(1).shape
            modules[path] = Factors(torch.ones(1, inputs), torch.ones(1, 1), torch.ones(outputs, 1), 1.0)
    return join({component: Adapter(modules)})


@pytest.mark.parametrize(
    ("name", "adapted", "applied"),
    [("sdxl", 794, 234), ("sd 1.5", 282, 154), ("flux", 504, 504), ("sd3", 341, 341), ("clip", 72, 72)],
)
def test_comfyui_applies_of_a_diffusers_file_all_but_the_attention_of_unets(
    name: str, adapted: int, applied: int
) -> None:
    # docs/formats.md has these numbers.
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        component, model = {
            "sdxl": lambda: ("unet", UNet2DConditionModel(**SDXL_SIZES)),
            "sd 1.5": lambda: ("unet", UNet2DConditionModel(**SD15_SIZES)),
            "flux": lambda: ("transformer", FluxTransformer2DModel(guidance_embeds=True)),
            "sd3": lambda: ("transformer", SD3Transformer2DModel(num_layers=24)),
            "clip": lambda: ("text_encoder", CLIPTextModel(CLIPTextConfig())),
        }[name]()
    adapter = of_model(component, model)
    left_out = comfyui.passed_over(adapter, "diffusers")
    assert (len(adapter.modules), len(adapter.modules) - len(left_out)) == (adapted, applied)
    assert all(".to_" in path for path in left_out)
    assert comfyui.best_format(adapter) == ("kohya" if component == "unet" else "diffusers")
    assert not comfyui.passed_over(adapter, comfyui.best_format(adapter))


def test_what_comfyui_has_no_names_for_is_told() -> None:
    one = torch.ones(1, 1)
    factors = Factors(one, one, one, 1.0)
    adapter = join(
        {
            "transformer": Adapter(
                {"blocks.0.attn1.to_q": factors, "transformer_blocks.0.attn.to_q": factors}
            ),
            "text_encoder_2": Adapter({"encoder.block.0.layer.0.SelfAttention.q": factors}),
        }
    )
    assert sorted(comfyui.passed_over(adapter, "diffusers")) == [
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
        "transformer.blocks.0.attn1.to_q",
    ]


def test_an_export_for_comfyui_has_the_form_that_it_applies_whole(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    assert export_adapter(sdxl[0], tmp_path / "style.safetensors", engine="comfyui").target == "kohya"
    adapt(tiny_pipelines.flux(), tmp_path / "flux", {"transformer": FLUX})
    flux = tmp_path / "flux.safetensors"
    assert export_adapter(tmp_path / "flux", flux, engine="comfyui").target == "diffusers"
    export_adapter(sdxl[0], tmp_path / "diffusers.safetensors", "diffusers")

    def said(path: Path) -> Any:
        return next(f for f in diagnose(path, engines=["comfyui"]).findings if f.check == "comfyui: format")

    assert said(flux).level == said(tmp_path / "style.safetensors").level == "ok"
    assert said(sdxl[0]).level == "warning" and "--to kohya" in said(sdxl[0]).fix
    lost = said(tmp_path / "diffusers.safetensors")
    assert lost.level == "error" and "would leave out" in lost.what and ".to_" in lost.what
    with pytest.raises(ValueError, match="Give one"):
        export_adapter(sdxl[0], tmp_path / "both", "lora", engine="comfyui")
    with pytest.raises(ValueError, match="Did you mean 'comfyui'"):
        export_adapter(sdxl[0], tmp_path / "both", engine="comfy")


def test_metadata_says_the_scale_and_without_it_alpha_is_the_rank(tmp_path: Path) -> None:
    stem = "unet.mid_block.resnets.0.time_emb_proj"
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 6), f"{stem}.lora_B.weight": torch.randn(5, 4)}
    said = json.dumps({"unet.r": 4, "unet.lora_alpha": 10, "unet.use_rslora": True})
    save_file(tensors, tmp_path / "with.safetensors", metadata={"lora_adapter_metadata": said})
    save_file(tensors, tmp_path / "without.safetensors")
    scales = [
        next(iter(read_adapter(tmp_path / f"{name}.safetensors").modules.values())).scale
        for name in ("with", "without")
    ]
    assert scales == [5.0, 1.0]


# ---- what has no place in a file


def test_what_image_files_cannot_hold_is_refused_and_nothing_is_written(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    unet = split(read_adapter(sdxl[0]))["unet"]
    name = next(iter(unet.modules))
    grouped = Factors(torch.randn(2, 8), torch.eye(2), torch.randn(4, 2), 1.0, Form("conv", (1, 1), 2))
    refused = {
        "not a factor": Adapter(unet.modules, unet.config, {"bias": torch.ones(1)}),
        "of a form": Adapter({**unet.modules, name: grouped}, unet.config),
        "not a module of a diffusers pipeline": Adapter({"model.layers.0.q_proj": grouped}, unet.config),
    }
    for message, adapter in refused.items():
        for format_ in (diffusers, kohya):
            with pytest.raises(AdapterError, match=message):
                format_.write(adapter, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        export_adapter(sdxl[0], tmp_path / "style", "kohya")
    assert not list(tmp_path.iterdir())


def test_what_diffusers_would_pass_over_in_a_kohya_file_is_not_written(tmp_path: Path) -> None:
    whole = split(pipeline_adapter(0, [2, 2, 2, 2]))["text_encoder"]
    less = Adapter({n: f for n, f in whole.modules.items() if not n.endswith("out_proj")}, whole.config)
    with pytest.raises(AdapterError, match="q_proj adapted and no out_proj"):
        kohya.write(less, tmp_path / "a.safetensors")
    # That it is so, and would be seen: the same file, written past the check.
    kohya.write(whole, tmp_path / "b.safetensors")
    kept = {k: t for k, t in load_file(tmp_path / "b.safetensors").items() if "out_proj" not in k}
    save_file(kept, tmp_path / "c.safetensors")
    assert (
        distance(less, split(kohya.read(tmp_path / "c.safetensors"))["text_encoder"]).max_relative_error
        < FOLD_TOLERANCE
    )
    with pytest.raises(AdapterError, match=r"Lost: .*q_proj"):
        distance(less, kohya.read_with_diffusers(tmp_path / "c.safetensors", less)[0])


def test_a_file_that_says_otherwise_fails_the_proof_and_leaves_nothing(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers, "as_stored", lambda f: {"A": 1.01 * f.A, "B": f.B})
    monkeypatch.setattr(diffusers, "flatten", lambda a: Adapter({n: f.fold() for n, f in a.modules.items()}))
    one = Adapter(
        {"mid_block.attentions.0.proj_in": Factors(torch.ones(2, 6), torch.eye(2), torch.ones(5, 2), 3.0)}
    )
    FORMATS["native"].write(one, _made(tmp_path / "native"))  # type: ignore[misc]
    with pytest.raises(ProofError, match="Nothing was left"):
        export_adapter(tmp_path / "native", tmp_path / "a.safetensors", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["native"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_files_that_are_no_adapter_say_what_to_give_instead(tmp_path: Path) -> None:
    save_file({"model.embed.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "old.pt").write_bytes(b"\x80")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for name, message in (
        ("model.safetensors", "no names of diffusers' or kohya's"),
        ("old.pt", "not opened"),
        ("a.gguf", "written here but not read"),
    ):
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path / name)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@given(st.integers(0, 900), st.binary(min_size=1, max_size=8), st.integers(0, 40))
def test_garbage_in_a_file_never_gives_half_an_adapter_or_another_error(
    tmp_path_factory: pytest.TempPathFactory, to: str, at: int, garbage: bytes, cut: int
) -> None:
    whole = pipeline_adapter(0, [2, 2, 2, 2])
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    format_ = FORMATS[to]
    assert format_.write is not None
    format_.write(whole, path)
    data = bytearray(path.read_bytes())
    data[at : at + len(garbage)] = garbage
    path.write_bytes(data[: len(data) - cut])
    try:
        found = read_adapter(path)
    except AdapterError:
        return
    # A name may have become another's, a value another number; what is read is whole.
    assert all(f.A.shape[0] == f.M.shape[0] == f.B.shape[1] for f in found.modules.values())
    assert len(found.modules) == len(whole.modules)


CHANGES = {
    "drop": lambda t: None,
    "flat": lambda t: t.flatten(),
    "point": lambda t: t.flatten()[0],
    "turned": lambda t: t.T if t.ndim == 2 else t,
    "more": lambda t: t.unsqueeze(0),
    "deep": lambda t: t.view(*t.shape, *(1,) * (7 - t.ndim)),
    "cut": lambda t: t[: max(1, t.shape[0] - 1)] if t.ndim else t,
    "wide": lambda t: torch.cat([t, t]) if t.ndim else t,
    "integer": lambda t: t.to(torch.int8),
    "boolean": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "double": lambda t: t.double(),
    "nothing": lambda t: t.flatten()[:0],
    "not a number": lambda t: torch.full_like(t, float("nan")),
    "infinite": lambda t: torch.full_like(t, float("inf")),
}


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
@given(st.data())
def test_tensors_that_are_no_factors_are_refused_or_read_whole(
    tmp_path_factory: pytest.TempPathFactory, to: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shapes")
    format_ = FORMATS[to]
    assert format_.write is not None
    format_.write(pipeline_adapter(0, [2, 2, 2, 2]), folder / "a.safetensors")
    tensors = load_file(folder / "a.safetensors")
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        changed = CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](tensors.pop(key))
        if changed is not None:
            tensors[key] = changed.contiguous()
    save_file(tensors, folder / "b.safetensors")
    try:
        found = read_adapter(folder / "b.safetensors")
    except AdapterError:
        return
    assert all(f.A.shape[0] == f.M.shape[0] == f.B.shape[1] for f in found.modules.values())
    assert all(f.delta_weight().isfinite().all() for f in found.modules.values())


def test_without_diffusers_the_proof_says_that_our_own_reader_made_it(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(through_diffusers, "is_installed", lambda: False)
    for to in ("diffusers", "kohya"):
        proof = export_adapter(sdxl[0], tmp_path / f"{to}.safetensors", to)
        assert proof.reader == "moslora" and proof.max_relative_error <= FOLD_TOLERANCE


def test_a_full_disk_leaves_no_file(
    sdxl: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moslora.adapters.formats.tensors.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export_adapter(sdxl[0], tmp_path / "a.safetensors", "kohya")
    assert not list(tmp_path.iterdir())
