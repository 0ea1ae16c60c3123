"""Families of models: the table is what the models are, and a file is told by names and sizes or refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from moslora.adapters.factors import Factors
from moslora.adapters.formats.families import FAMILIES
from moslora.adapters.formats.family import Family, Module
from moslora.adapters.formats.placing import Named, families_of, place
from moslora.errors import AdapterError

BY_NAME = {family.name: family for family in FAMILIES}
# Small models of each family; more than one where the modules differ between its sizes.
MODELS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "FLUX.1": (
        "FluxTransformer2DModel",
        [{"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}],
    ),
    "FLUX.2": ("Flux2Transformer2DModel", [{"num_layers": 2, "num_single_layers": 2}]),
    "Chroma": ("ChromaTransformer2DModel", [{"num_layers": 2, "num_single_layers": 2}]),
    "Qwen-Image": ("QwenImageTransformer2DModel", [{"num_layers": 2}]),
    "Z-Image": ("ZImageTransformer2DModel", [{"n_layers": 2}]),
    "Lumina 2": ("Lumina2Transformer2DModel", [{"num_layers": 2}]),
    "SD3": ("SD3Transformer2DModel", [{"num_layers": 3, "dual_attention_layers": (0,)}]),
    "Wan": (
        "WanTransformer3DModel",
        [{"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120}, {"num_layers": 2}],
    ),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", [{"num_layers": 2, "num_single_layers": 2}]),
    "AuraFlow": ("AuraFlowTransformer2DModel", [{"num_mmdit_layers": 2, "num_single_dit_layers": 2}]),
    "LTX-Video": ("LTXVideoTransformer3DModel", [{"num_layers": 2}]),
    "SANA": ("SanaTransformer2DModel", [{"num_layers": 2}]),
    "PixArt": ("PixArtTransformer2DModel", [{"num_layers": 2, "sample_size": 128, "caption_channels": 4096}]),
}


def sizes(name: str) -> list[Module]:
    """Every linear layer and convolution of a family's models."""
    import diffusers

    cls, settings = MODELS[name]
    found = []
    for options in settings:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of where it imports from
            model = getattr(diffusers, cls)(**options)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                outputs, inputs = module.weight.shape[0], module.weight.flatten(1).shape[1]
                found.append(Module(path, False, inputs, outputs))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_a_family_is_the_model_that_diffusers_builds(name: str) -> None:
    modules = sizes(name)
    fit = BY_NAME[name].fit(modules)
    assert fit.fits, (fit.misfit, [module.path for module in fit.unknown])
    named = {re.sub(r"\d+", "#", module.path) for module in modules}
    lines = {entry.source for entry in BY_NAME[name].entries if entry.source == entry.targets[0][0]}
    assert not {line for line in lines if re.sub(r"\d+", "#", line) not in named}, "no module has such a name"


def test_every_family_has_a_model_here() -> None:
    assert MODELS.keys() == BY_NAME.keys()


def test_a_whole_model_is_of_one_family() -> None:
    for name in MODELS:
        modules = {m.path: factors(m.inputs, m.outputs) for m in sizes(name)}
        assert name in [family.name for family in families_of(modules)]
        if name != "Wan":
            assert [family.name for family in families_of(modules)] == [name]


def test_every_name_of_other_programs_is_of_the_size_of_its_parts() -> None:
    for family in FAMILIES:
        own = {entry.source for entry in family.entries if entry.source == entry.targets[0][0]}
        for entry in family.entries:
            assert {target for target, _ in entry.targets} <= own
            assert all(path.count("#") == entry.source.count("#") for path, _ in entry.targets)
        flat = [(entry.source.replace(".", "_"), entry.outputs) for entry in family.entries]
        assert len(set(flat)) == len(flat), f"two modules of {family.name} have one name in kohya's files"


def factors(inputs: int, outputs: int, r: int = 2) -> Factors:
    return Factors(torch.zeros(r, inputs), torch.eye(r), torch.zeros(outputs, r), 1.0)


def named(modules: Mapping[str, tuple[int, int]], is_flat: bool = False) -> list[Named]:
    return [(path, is_flat, factors(*size)) for path, size in modules.items()]


QKV = {"double_blocks.0.img_attn.qkv": (8, 24)}
TOLD: dict[str, tuple[dict[str, tuple[int, int]], set[str]]] = {
    "FLUX.1 by its MLP": (QKV | {"double_blocks.0.img_mlp.0": (8, 32)}, {"FLUX.1", "Chroma"}),
    "FLUX.2 by its MLP": (QKV | {"double_blocks.0.img_mlp.0": (8, 48)}, {"FLUX.2"}),
    "FLUX.1 by its fused layer": ({"single_blocks.3.linear1": (8, 56)}, {"FLUX.1", "Chroma", "HunyuanVideo"}),
    "FLUX.2 by its fused layer": ({"single_blocks.3.linear1": (8, 72)}, {"FLUX.2"}),
    "FLUX.1 by its modulation": (QKV | {"double_blocks.0.img_mod.lin": (8, 48)}, {"FLUX.1"}),
    "attention alone": (QKV, {"FLUX.1", "FLUX.2", "Chroma"}),
    "Qwen-Image": (
        {"transformer_blocks.0.attn.to_q": (8, 8), "transformer_blocks.0.img_mlp.net.2": (32, 8)},
        {"Qwen-Image"},
    ),
    "Z-Image": ({"layers.0.attention.qkv": (24, 72)}, {"Z-Image"}),
    "Lumina 2": ({"layers.0.attention.qkv": (24, 40)}, {"Lumina 2"}),
    "SD3": ({"joint_blocks.0.x_block.attn.qkv": (8, 24)}, {"SD3"}),
    "Wan": ({"blocks.0.self_attn.q": (8, 8), "blocks.1.ffn.0": (8, 20)}, {"Wan"}),
}


@pytest.mark.parametrize("case", TOLD)
@pytest.mark.parametrize("is_flat", [False, True], ids=["dots", "underscores"])
def test_a_family_is_told_by_names_and_sizes(case: str, is_flat: bool) -> None:
    modules, expected = TOLD[case]
    if is_flat:
        modules = {path.replace(".", "_"): size for path, size in modules.items()}
        expected = expected | ({"HunyuanVideo"} if case == "attention alone" else set())
    _, families = place("a.safetensors", named(modules, is_flat))
    assert {family.name for family in families} == expected


def test_names_with_sizes_of_no_family_are_refused_with_what_was_found() -> None:
    for modules in (
        {"double_blocks.0.img_attn.qkv": (8, 32)},
        QKV | {"double_blocks.0.img_attn.proj": (16, 16)},
        {"single_blocks.0.linear1": (8, 64)},
    ):
        with pytest.raises(
            AdapterError, match=r"names are those of FLUX.1.*inputs and .* outputs.*save it in"
        ):
            place("a.safetensors", named(modules))
    with pytest.raises(AdapterError, match=r"blocks.1.ffn.0 has 8 inputs and 24 outputs"):
        place("a", named({"blocks.0.ffn.0": (8, 20), "blocks.1.ffn.0": (8, 24)}))


def test_what_families_call_differently_is_refused_where_the_file_does_not_tell() -> None:
    with pytest.raises(
        AdapterError, match=r"Z-Image or of Lumina 2, which call layers.0.attention.out.*too few"
    ):
        place("a.safetensors", named({"layers.0.attention.out": (24, 24)}))
    with pytest.raises(AdapterError, match=r"may be of .*FLUX.2"):
        place("a.safetensors", named(QKV | {"time_in.in_layer": (4, 8)}))
    # One module more, and it is told.
    place("a.safetensors", named({"layers.0.attention.out": (24, 24), "layers.0.attention.qkv": (24, 72)}))


def test_a_module_that_no_family_has_is_refused_by_name() -> None:
    with pytest.raises(
        AdapterError, match=r"double_blocks.0.img_attn.norm is of no known model.*1 others of it are"
    ):
        place("a.safetensors", named(QKV | {"double_blocks.0.img_attn.norm": (8, 8)}))
    with pytest.raises(AdapterError, match=r"blocks.0.self_attn.q_proj is of no known model"):
        place("a.safetensors", named({"blocks.0.self_attn.q_proj": (8, 8)}))


def test_the_loader_of_a_family_and_its_text_encoders_are_diffusers() -> None:
    from diffusers.loaders import lora_pipeline

    for family in FAMILIES:
        if family.loader:
            loaded = getattr(lora_pipeline, family.loader)._lora_loadable_modules
            assert set(family.encoders) == {name for name in loaded if name.startswith("text_encoder")}
            assert "transformer" in loaded


def test_a_new_family_is_one_entry() -> None:
    family = Family("New", "tower.#.{left,right} 1 2\ntower.#.out 2 1", "floor.#.both = tower.#.[left right]")
    fit = family.fit([Module("floor_3_both", True, 5, 20), Module("tower_0_out", True, 10, 5)])
    assert fit.fits and fit.hidden == 5
    assert not family.fit([Module("floor.3.both", False, 5, 15)]).fits
