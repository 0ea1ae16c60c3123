"""Layouts of image tools' LoRA files: each is read to what diffusers' loader makes of it, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import comfyui, diffusers, kohya
from moslora.adapters.formats.families import FAMILIES
from moslora.adapters.formats.keys import LAYOUTS
from moslora.adapters.formats.pipeline import COMPONENTS, join
from moslora.adapters.formats.reading import detect, read_adapter
from moslora.errors import AdapterError
from tolerances import MODEL, relative_error

Sizes = Mapping[str, tuple[int, int]]
KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


def lora(
    modules: Sizes, prefix: str = "", parts: tuple[str, str] = PEFT, alpha: float | None = None, r: int = 4
) -> dict[str, Tensor]:
    """Random factors of modules by name (inputs, outputs); underscores for dots where the prefix ends in one."""
    generator, tensors = torch.Generator().manual_seed(len(modules)), {}
    for path, (inputs, outputs) in modules.items():
        name = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        tensors[f"{name}.{parts[0]}"] = torch.randn(r, inputs, generator=generator)
        tensors[f"{name}.{parts[1]}"] = torch.randn(outputs, r, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def saved(folder: Path, tensors: Mapping[str, Tensor], name: str = "a.safetensors", **metadata: str) -> Path:
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name, metadata or None)
    return folder / name


def probed(deltas: Mapping[str, Factors]) -> dict[str, Tensor]:
    """ΔW of every module times three vectors, which is ΔW as far as a test can see, and small."""
    found = {}
    for name, f in deltas.items():
        x = torch.randn(f.A.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found[name] = f.scale * (f.B.double() @ (f.M.double() @ (f.A.double() @ x)))
    return found


def through_diffusers(loader: str, path: Path) -> dict[str, Tensor]:
    """What a pipeline's loader of diffusers makes of a file; a scale stands inside the factors or beside them."""
    from diffusers.loaders import lora_pipeline

    own = getattr(lora_pipeline, loader)
    options: dict[str, Any] = {"return_alphas": True} if loader == "FluxLoraLoaderMixin" else {}
    found = own.lora_state_dict(str(path), **options)
    tensors, alphas = found if options else (found, None)
    deltas = {}
    for key, A in tensors.items():
        if key.endswith(".lora_A.weight"):
            name, B = key.removesuffix(".lora_A.weight"), tensors[key.replace("lora_A", "lora_B")]
            r = A.shape[0]
            deltas[name] = Factors(A, torch.eye(r), B, float((alphas or {}).get(f"{name}.alpha", r)) / r)
    return probed(deltas)


def assert_alike(path: Path, expected: Mapping[str, Tensor]) -> None:
    found = probed(read_adapter(path).modules)
    assert found.keys() == expected.keys()
    for name, product in expected.items():
        assert relative_error(found[name], product) < MODEL, name


h = 8
DOUBLE = {
    "double_blocks.0.img_attn.qkv": (h, 3 * h),
    "double_blocks.0.txt_attn.qkv": (h, 3 * h),
    "double_blocks.0.img_attn.proj": (h, h),
    "double_blocks.1.txt_attn.proj": (h, h),
}
FLUX1 = DOUBLE | {
    "double_blocks.0.txt_mlp.2": (4 * h, h),
    "double_blocks.0.img_mod.lin": (h, 6 * h),
    "single_blocks.3.linear1": (h, 7 * h),
    "single_blocks.3.linear2": (5 * h, h),
    "single_blocks.3.modulation.lin": (h, 3 * h),
}
FLUX2 = DOUBLE | {
    "double_blocks.0.img_mlp.0": (h, 6 * h),
    "double_blocks.0.txt_mlp.2": (3 * h, h),
    "single_blocks.0.linear1": (h, 9 * h),
    "single_blocks.0.linear2": (4 * h, h),
}
QWEN = {
    "transformer_blocks.0.attn.to_q": (h, h),
    "transformer_blocks.0.attn.to_out.0": (h, h),
    "transformer_blocks.0.attn.add_k_proj": (h, h),
    "transformer_blocks.0.attn.to_add_out": (h, h),
    "transformer_blocks.1.img_mlp.net.0.proj": (h, 4 * h),
    "transformer_blocks.1.txt_mlp.net.2": (4 * h, h),
}
Z_IMAGE = {
    "layers.0.attention.to_q": (24, 24),
    "layers.0.attention.to_out.0": (24, 24),
    "layers.0.feed_forward.w1": (24, 64),
    "layers.1.feed_forward.w2": (64, 24),
    "noise_refiner.0.attention.to_k": (24, 24),
}
WAN = {
    f"blocks.0.{attention}.{name}": (h, h)
    for attention in ("self_attn", "cross_attn")
    for name in ("q", "k", "v", "o")
} | {"blocks.0.ffn.0": (h, 20), "blocks.0.ffn.2": (20, h)}
LUMINA = {
    f"{block}.0.{name}": size
    for block in ("layers", "noise_refiner", "context_refiner")
    for name, size in {
        "attention.qkv": (2304, 3840),
        "attention.out": (2304, 2304),
        "feed_forward.w1": (2304, 9216),
        "feed_forward.w2": (9216, 2304),
        "feed_forward.w3": (2304, 9216),
        "adaLN_modulation.1": (1024, 9216),
    }.items()
    if block != "context_refiner" or "adaLN" not in name
}
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (3072, 9216),
    "double_blocks.0.txt_attn_proj": (3072, 3072),
    "double_blocks.0.img_mlp.fc1": (3072, 12288),
    "double_blocks.0.txt_mod.linear": (3072, 18432),
    "single_blocks.0.linear1": (3072, 21504),
    "single_blocks.0.linear2": (15360, 3072),
    "single_blocks.0.modulation.linear": (3072, 9216),
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (h, 3 * h),
    "double_blocks.0.processor.qkv_lora2": (h, 3 * h),
    "double_blocks.0.processor.proj_lora1": (h, h),
    "double_blocks.0.processor.proj_lora2": (h, h),
    "single_blocks.1.processor.qkv_lora": (h, 3 * h),
    "single_blocks.1.processor.proj_lora": (5 * h, h),
}
# diffusers has these sizes in its code.
LARGE = {path: (inputs * 384, outputs * 384) for path, (inputs, outputs) in FLUX1.items()}
MIXTURE = {
    "transformer_blocks.0.attn.to_q": (h, h),
    "transformer_blocks.0.attn.add_k_proj": (h, h),
    "transformer_blocks.0.ff.net.2": (4 * h, h),
    "single_transformer_blocks.1.proj_mlp": (h, 4 * h),
    "single_transformer_blocks.1.norm.linear": (h, 3 * h),
}
# What diffusers' loaders read: which of them, the modules, and how they are named.
READ: dict[str, tuple[str, dict[str, Tensor]]] = {
    "kohya, FLUX.1": ("FluxLoraLoaderMixin", lora(LARGE, "lora_unet_", KOHYA, 1.0)),
    "ComfyUI, FLUX.1": ("FluxLoraLoaderMixin", lora(LARGE, "diffusion_model.", KOHYA, 1.0)),
    "xlabs": ("FluxLoraLoaderMixin", lora(XLABS, "", ("down.weight", "up.weight"))),
    # diffusers 0.42 takes no other modules of OneTrainer's files than attention rightly.
    "OneTrainer, FLUX.1": (
        "FluxLoraLoaderMixin",
        lora(
            {name: size for name, size in MIXTURE.items() if ".attn." in name},
            "lora_transformer_",
            KOHYA,
            1.0,
        ),
    ),
    "alpha beside lora_A": ("FluxLoraLoaderMixin", lora(MIXTURE, "transformer.", PEFT, 1.0)),
    "kohya, FLUX.2": ("Flux2LoraLoaderMixin", lora(FLUX2, "lora_unet_", KOHYA, 1.0)),
    "ai-toolkit, FLUX.2": ("Flux2LoraLoaderMixin", lora(FLUX2, "diffusion_model.")),
    "PEFT, FLUX.2": ("Flux2LoraLoaderMixin", lora(FLUX2, "base_model.model.")),
    "musubi-tuner, Qwen-Image": ("QwenImageLoraLoaderMixin", lora(QWEN, "lora_unet_", KOHYA, 1.0)),
    "ComfyUI, Qwen-Image": ("QwenImageLoraLoaderMixin", lora(QWEN, "diffusion_model.", PEFT, 1.0)),
    "bare, Qwen-Image": ("QwenImageLoraLoaderMixin", lora(QWEN, "", KOHYA, 1.0)),
    "musubi-tuner, Z-Image": ("ZImageLoraLoaderMixin", lora(Z_IMAGE, "lora_unet_", KOHYA, 1.0)),
    "ComfyUI, Z-Image": ("ZImageLoraLoaderMixin", lora(Z_IMAGE, "diffusion_model.")),
    "musubi-tuner, Wan": ("WanLoraLoaderMixin", lora(WAN, "lora_unet_", KOHYA, 1.0)),
    "ComfyUI, Wan": ("WanLoraLoaderMixin", lora(WAN, "diffusion_model.", KOHYA, 1.0)),
    "ComfyUI, Lumina 2": ("Lumina2LoraLoaderMixin", lora(LUMINA, "diffusion_model.", r=2)),
    "HunyuanVideo": ("HunyuanVideoLoraLoaderMixin", lora(HUNYUAN, "transformer.", r=2)),
    "ComfyUI, LTX-Video": (
        "LTXVideoLoraLoaderMixin",
        lora({"transformer_blocks.0.attn1.to_q": (h, h)}, "diffusion_model."),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_a_layout_is_read_to_what_diffusers_makes_of_it(case: str, tmp_path: Path) -> None:
    loader, tensors = READ[case]
    path = saved(tmp_path, tensors)
    assert_alike(path, through_diffusers(loader, path))


def test_the_last_layer_of_flux_has_its_halves_swapped_as_diffusers_swaps_them(tmp_path: Path) -> None:
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    last = {"final_layer.adaLN_modulation.1": (h, 2 * h), "double_blocks.0.img_mod.lin": (h, 6 * h)}
    path = saved(tmp_path, lora(last, "lora_unet_", KOHYA, 4.0))  # alpha is r: diffusers drops it here
    theirs = FluxLoraLoaderMixin.lora_state_dict(str(path))
    ours = read_adapter(path).modules["transformer.norm_out.linear"]
    assert torch.equal(ours.B, theirs["norm_out.linear.lora_B.weight"]) and ours.scale == 1.0
    assert torch.equal(ours.A, theirs["norm_out.linear.lora_A.weight"])


WRAPPED = {
    "default": ("lora_A.default.weight", "lora_B.default.weight", "transformer."),
    "another name": ("lora_A.style.weight", "lora_B.style.weight", "transformer."),
    "DDP": (*PEFT, "module.transformer."),
    "compiled": (*PEFT, "_orig_mod.transformer."),
    "FSDP": (*PEFT, "_fsdp_wrapped_module.transformer._fsdp_wrapped_module."),
    "state_dict": (*PEFT, "state_dict.transformer."),
    "pipe": (*PEFT, "pipe.transformer."),
    "DiffSynth": ("lora_A.default.weight", "lora_B.default.weight", "pipe.dit."),
    "PEFT outside": (*PEFT, "base_model.model.transformer."),
    "PEFT inside": (*PEFT, "transformer.base_model.model."),
    "PEFT alone": (*PEFT, "base_model.model."),
    "twice": (*PEFT, "module.base_model.model.transformer.base_model.model."),
    "model": (*PEFT, "model.diffusion_model."),
    "LyCORIS": (*KOHYA, "lycoris_"),
    "bare": (*PEFT, ""),
    "kohya's parts": (*KOHYA, "transformer."),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_a_program_leaves_around_its_model_changes_nothing(case: str, tmp_path: Path) -> None:
    a, b, prefix = WRAPPED[case]
    plain = read_adapter(saved(tmp_path, lora(MIXTURE, "transformer."), "plain.safetensors"))
    path = saved(tmp_path, lora(MIXTURE, prefix, (a, b)))
    assert_alike(path, probed(plain.modules))


def test_original_sd3_names_are_taken_apart_and_halves_put_in_diffusers_order(tmp_path: Path) -> None:
    modules = {
        "joint_blocks.0.x_block.attn.qkv": (h, 3 * h),
        "joint_blocks.0.context_block.attn.qkv": (h, 3 * h),
        "joint_blocks.0.x_block.mlp.fc1": (h, 4 * h),
        "joint_blocks.0.context_block.adaLN_modulation.1": (h, 6 * h),
        "joint_blocks.23.context_block.adaLN_modulation.1": (h, 2 * h),
        "final_layer.adaLN_modulation.1": (h, 2 * h),
    }
    tensors = lora(modules, "lora_unet_", KOHYA, 2.0)
    found = read_adapter(saved(tmp_path, tensors))
    deltas = {
        key.removesuffix(".alpha"): 0.5
        * tensors[key.replace("alpha", "lora_up.weight")].double()
        @ tensors[key.replace("alpha", "lora_down.weight")].double()
        for key in tensors
        if key.endswith(".alpha")
    }
    fused = deltas["lora_unet_joint_blocks_0_context_block_attn_qkv"]
    stem = "transformer.transformer_blocks"
    for n, name in enumerate(("add_q_proj", "add_k_proj", "add_v_proj")):
        part = found.delta_weight(f"{stem}.0.attn.{name}")
        assert relative_error(part, fused[n * h : (n + 1) * h]) < MODEL
    last = deltas["lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"]  # shift, then scale
    assert relative_error(found.delta_weight(f"{stem}.23.norm1_context.linear"), last.roll(h, 0)) < MODEL
    whole = deltas["lora_unet_joint_blocks_0_context_block_adaLN_modulation_1"]
    assert relative_error(found.delta_weight(f"{stem}.0.norm1_context.linear"), whole) < MODEL
    end = deltas["lora_unet_final_layer_adaLN_modulation_1"]
    assert relative_error(found.delta_weight("transformer.norm_out.linear"), end.roll(h, 0)) < MODEL


def test_two_transformers_of_wan_are_two_models(tmp_path: Path) -> None:
    modules = {"blocks.0.attn1.to_q": (h, h), "blocks.0.ffn.net.0.proj": (h, 20)}
    tensors = lora(modules, "transformer.") | lora(modules, "transformer_2.", r=2)
    path = saved(tmp_path, tensors)
    export_adapter(path, tmp_path / "lora", "lora")
    assert sorted(p.name for p in (tmp_path / "lora").iterdir() if p.is_dir()) == [
        "transformer",
        "transformer_2",
    ]
    with pytest.raises(AdapterError, match="Export the directory of each"):
        export_adapter(path, tmp_path / "b.safetensors", "diffusers")
    # The way out.
    export_adapter(tmp_path / "lora" / "transformer_2", tmp_path / "b.safetensors", "diffusers")
    written = read_adapter(tmp_path / "b.safetensors")
    assert relative_error(
        written.delta_weight("transformer.blocks.0.attn1.to_q"),
        read_adapter(path).delta_weight("transformer_2.blocks.0.attn1.to_q"),
    ) < (MODEL)


T5 = {"encoder.block.0.layer.0.SelfAttention.q": (h, h)}


def test_a_third_text_encoder_is_the_t5_of_the_pipeline_that_the_transformer_tells(tmp_path: Path) -> None:
    t5 = lora(T5, "lora_te3_", KOHYA, 1.0)
    flux = read_adapter(saved(tmp_path, t5 | lora(FLUX1, "lora_unet_", KOHYA, 1.0)))
    assert "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q" in flux.modules
    sd3 = {"joint_blocks.0.x_block.attn.qkv": (h, 3 * h)}
    found = read_adapter(saved(tmp_path, t5 | lora(sd3, "lora_unet_", KOHYA, 1.0)))
    assert "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q" in found.modules
    with pytest.raises(
        AdapterError, match=r"text_encoder_2 of FLUX.1's pipeline and text_encoder_3 of SD3's"
    ):
        read_adapter(saved(tmp_path, t5))


LDM = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks.3.0.emb_layers.1": "up_blocks.1.resnets.0.time_emb_proj",
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "diffusion_model.", "unet.", ""])
def test_a_unets_original_names_are_diffusers_behind_every_prefix(prefix: str, tmp_path: Path) -> None:
    path = saved(tmp_path, lora(dict.fromkeys(LDM, (h, h)), prefix))
    assert {f"unet.{name}" for name in LDM.values()} == read_adapter(path).modules.keys()
    same = saved(tmp_path, lora(dict.fromkeys(LDM.values(), (h, h)), prefix), "b.safetensors")
    assert {f"unet.{name}" for name in LDM.values()} == read_adapter(same).modules.keys()


def test_names_that_a_unet_and_wan_share_do_not_confuse_them(tmp_path: Path) -> None:
    path = saved(tmp_path, lora(WAN | {"time_embedding.0": (4, h), "time_embedding.2": (h, h)}, "lora_unet_"))
    assert "transformer.condition_embedder.time_embedder.linear_1" in read_adapter(path).modules


def test_names_of_a_family_that_is_not_known_stay_behind_diffusers_prefix_and_are_refused_elsewhere(
    tmp_path: Path,
) -> None:
    # Of diffusers' own models: some have single names that are another family's original ones.
    for modules in (
        {"blocks.0.attn.to_q": (h, h), "img_in": (4, h), "final_layer.linear": (h, 4)},
        {"double_blocks.0.attn.tower": (h, h)},
        {"img_in": (4, h), "transformer_blocks.0.attn.to_q": (h, h)},
    ):
        path = saved(tmp_path, lora(modules, "transformer."))
        assert {f"transformer.{name}" for name in modules} == read_adapter(path).modules.keys()
        out = tmp_path / f"{len(modules)}{next(iter(modules))}.safetensors"
        export_adapter(path, out, "diffusers")
        assert {key.rsplit(".lora", 1)[0] for key in load_file(out)} == {f"transformer.{n}" for n in modules}
    with pytest.raises(AdapterError, match=r"blocks.0.attn.to_q is of no known model.*transformer.PATH"):
        read_adapter(saved(tmp_path, lora({"blocks.0.attn.to_q": (h, h)}, "diffusion_model.")))


def test_a_language_models_lora_is_not_taken_for_an_image_models(tmp_path: Path) -> None:
    # Whisper's head has the name of FLUX's last layer.
    modules = {"model.decoder.layers.0.fc1": (h, h), "model.decoder.layers.0.fc2": (h, h), "proj_out": (h, 9)}
    for prefix in ("", "base_model.model."):
        with pytest.raises(AdapterError, match=r"of no known image model.*adapter_config.json"):
            detect(saved(tmp_path, lora(modules, prefix)))


def test_the_token_refiner_of_hunyuanvideo_is_taken_apart(tmp_path: Path) -> None:
    modules = HUNYUAN | {
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv": (3072, 9216),
        "txt_in.c_embedder.linear_1": (16, 3072),
    }
    stem = "transformer.context_embedder"
    found = read_adapter(saved(tmp_path, lora(modules, "lora_unet_", KOHYA, r=1))).modules
    assert {f"{stem}.token_refiner.refiner_blocks.1.attn.to_{x}" for x in "qkv"} < found.keys()
    assert f"{stem}.time_text_embed.text_embedder.linear_1" in found


# ---- alphas


def test_alphas_beside_factors_set_the_scale_module_by_module(tmp_path: Path) -> None:
    tensors = lora(MIXTURE, "transformer.", PEFT, 1.0)
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors[f"{name}.alpha"] = torch.tensor(8.0)
    del tensors["transformer.transformer_blocks.0.ff.net.2.alpha"]
    scales = {n: f.scale for n, f in read_adapter(saved(tmp_path, tensors)).modules.items()}
    assert scales.pop(name) == 2.0
    assert scales.pop("transformer.transformer_blocks.0.ff.net.2") == 1.0
    assert set(scales.values()) == {0.25}
    given = read_adapter(saved(tmp_path, tensors), 2.0).modules
    assert given["transformer.transformer_blocks.0.ff.net.2"].scale == 0.5 and given[name].scale == 2.0
    whole = lora(MIXTURE, "transformer.", PEFT, 1.0)
    with pytest.raises(AdapterError, match=r"says its alpha itself.*Leave --alpha out"):
        read_adapter(saved(tmp_path, whole), 2.0)
    said = json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})
    with pytest.raises(AdapterError, match="says the alphas of transformer twice"):
        read_adapter(saved(tmp_path, whole, lora_adapter_metadata=said))
    with pytest.raises(AdapterError, match="has 2 values; an alpha is one number"):
        read_adapter(saved(tmp_path, whole | {f"{name}.alpha": torch.ones(2)}))


def test_alphas_in_the_metadata_of_renamed_tensors_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, lora(FLUX1, "diffusion_model."), lora_adapter_metadata='{"transformer.r": 4}')
    with pytest.raises(AdapterError, match=r"names of ComfyUI and ai-toolkit.*left the ranks and alphas"):
        read_adapter(path)


# ---- refused by name


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "lycoris_"])
def test_loha_and_lokr_of_a_transformer_are_loras_of_a_higher_rank(prefix: str, tmp_path: Path) -> None:
    """By the formulas of LyCORIS: an entrywise product, and a Kronecker product of whole or factored matrices."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    flat = {name: name.replace(".", "_") if prefix.endswith("_") else name for name in QWEN}
    first, second, third = list(QWEN)[:3]
    assert len({first, second, third}) == 3
    expected: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}

    def add(name: str, delta: Tensor, alpha: float | None, **parts: Tensor) -> None:
        expected[f"transformer.{name}"] = delta
        tensors.update({f"{prefix}{flat[name]}.{part}": t for part, t in parts.items()})
        if alpha is not None:
            tensors[f"{prefix}{flat[name]}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)

    inputs, outputs = QWEN[first]
    a1, b1, a2, b2 = random(outputs, 2), random(2, inputs), random(outputs, 2), random(2, inputs)
    add(first, 3.0 * ((a1 @ b1) * (a2 @ b2)), 6, hada_w1_a=a1, hada_w1_b=b1, hada_w2_a=a2, hada_w2_b=b2)
    inputs, outputs = QWEN[second]
    w1, a, b = random(2, 2), random(outputs // 2, 1), random(1, inputs // 2)
    add(second, 0.5 * torch.kron(w1, a @ b), 0.5, lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b)
    inputs, outputs = QWEN[third]
    w1, w2 = random(2, 4), random(outputs // 2, inputs // 4)
    add(third, torch.kron(w1, w2), 1e10, lokr_w1=w1, lokr_w2=w2)  # an alpha that LyCORIS does not use there
    path = saved(tmp_path, tensors)
    found = read_adapter(path).modules
    assert found.keys() == expected.keys()
    for name, f in found.items():
        delta = f.scale * f.B.double() @ f.M.double() @ f.A.double()
        assert relative_error(delta, expected[name]) < MODEL, name
    assert found[f"transformer.{first}"].r == 4 and found[f"transformer.{second}"].r == 2
    # A lower rank is the nearest of that rank, and what it costs is said.
    proof = export_adapter(path, tmp_path / "low.safetensors", "diffusers", rank=2)
    singular = {name: torch.linalg.svdvals(delta) for name, delta in expected.items()}
    lost = sum(float((values[2:] ** 2).sum()) for values in singular.values())
    total = sum(float((values**2).sum()) for values in singular.values())
    assert proof.rank_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    part = f"{prefix}{flat[first]}.hada_w2_b"
    with pytest.raises(AdapterError, match="lacks hada_w2_b"):
        read_adapter(saved(tmp_path, {key: t for key, t in tensors.items() if key != part}))
    with pytest.raises(AdapterError, match="of a convolution, which is not turned into LoRA"):
        read_adapter(saved(tmp_path, {**tensors, part: torch.ones(2, inputs, 3, 3)}))


def test_loha_of_a_unet_is_refused_by_name(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    parts = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    path = saved(tmp_path, {f"{stem}.{name}": torch.ones(*shape) for name, shape in parts.items()})
    with pytest.raises(AdapterError, match=r"is of LoHa or LoKr in a unet.*program that trained it"):
        read_adapter(path)


def stem() -> str:
    return "diffusion_model.double_blocks.0.img_attn.proj"


OTHER_PARTS = {
    "hada_w1_a": "LoHa",
    "lokr_w2": "LoKr",
    "lokr_t2": "is of LoKr",
    "dora_scale": "is of DoRA",
    "lora_magnitude_vector": "is of DoRA",
    "oft_blocks": "is of OFT",
    "on_input": "IA3",
    "a1.weight": "is of GLoRA",
    "diff": "is of full weights",
    "diff_b": "is of full weights",
    "w_norm": "is of full weights",
    "set_weight": "is of full weights",
    "lora_B.bias": "is of a bias beside A or B",
    "lora_up.bias": "is of a bias beside A or B",
    "lora_new.weight": "is of an unknown method",
}


@pytest.mark.parametrize("part", OTHER_PARTS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "lycoris_", "transformer."])
def test_other_methods_are_refused_by_name_in_every_layout(prefix: str, part: str, tmp_path: Path) -> None:
    modules = {"transformer_blocks.0.attn.to_q": (h, h)}
    if part == "lora_magnitude_vector" and prefix == "transformer.":
        return  # diffusers' own name of it, which is read
    tensors = lora(modules, prefix)
    name = next(iter(tensors)).removesuffix(".lora_A.weight")
    for beside in ({}, tensors):
        path = saved(tmp_path, beside | {f"{name}.{part}": torch.ones(8)})
        if not beside and part == "lora_new.weight":
            continue
        with pytest.raises(AdapterError, match=OTHER_PARTS[part]) as caught:
            read_adapter(path)
        assert "program that trained it" in str(caught.value)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "transformer."])
def test_differences_of_zero_are_nothing(prefix: str, tmp_path: Path) -> None:
    modules = {"transformer_blocks.0.attn.to_q": (h, h)}
    tensors = lora(modules, prefix)
    name = next(iter(tensors)).removesuffix(".lora_A.weight")
    path = saved(tmp_path, tensors | {f"{name}.diff_b": torch.zeros(8), f"{name}.diff": torch.zeros(8, 8)})
    assert len(read_adapter(path).modules) == 1


def kept(path: Path, message: str, folder: Path) -> Path:
    """Run the line of Python that a message has."""
    code = message[message.index("from safetensors.torch import") :].split(" Prompts with")[0].rstrip(". ")
    out = folder / "alone.safetensors"
    code = code.replace("FILE", repr(str(path))).replace("OUT", repr(str(out)))
    exec(code, {})
    return out


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        ("bundle_emb.word.string_to_param.*", "textual inversion"),
        (
            "transformer.transformer_blocks.0.attn.to_q.base_layer.weight",
            "a trainer's checkpoint of model and",
        ),
        ("transformer.transformer_blocks.0.norm1.weight", "a trainer's checkpoint of model and LoRA"),
        ("optimizer.state.0.exp_avg", "is not a factor of LoRA, while other tensors"),
    ],
)
def test_what_is_bundled_with_a_lora_is_named_and_the_way_out_works(
    strange: str, message: str, tmp_path: Path
) -> None:
    path = saved(tmp_path, lora(MIXTURE, "transformer.") | {strange: torch.ones(8, 8)})
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(path)
    assert len(read_adapter(kept(path, str(caught.value), tmp_path)).modules) == len(MIXTURE)


def test_a_control_lora_is_named(tmp_path: Path) -> None:
    scale = {"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(8)}
    with pytest.raises(AdapterError, match=r"control LoRA of Black Forest Labs.*FluxControlPipeline"):
        read_adapter(saved(tmp_path, lora(FLUX1) | scale))


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    one = lora(MIXTURE, "diffusion_model.", ("lora_A.one.weight", "lora_B.one.weight"))
    two = lora(MIXTURE, "diffusion_model.", ("lora_A.two.weight", "lora_B.two.weight"))
    with pytest.raises(AdapterError, match="more than one adapter"):
        read_adapter(saved(tmp_path, one | two))


STRANGERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "checkpoint": (
        {"model.diffusion_model.input_blocks.0.0.weight": (2, 2)},
        "a whole checkpoint of an image",
    ),
    "embedding": ({"emb_params": (2, 8)}, "an embedding"),
    "SDXL embedding": ({"clip_l": (2, 8), "clip_g": (2, 8)}, "an embedding"),
    "VAE": ({"decoder.up_blocks.0.resnets.0.conv1.weight": (2, 2)}, "a VAE"),
    "original VAE": ({"first_stage_model.decoder.conv_in.weight": (2, 2)}, "a whole checkpoint|a VAE"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (2, 2)}, "a ControlNet"),
    "IP-Adapter": ({"ip_adapter.1.to_k_ip.weight": (2, 2)}, "an IP-Adapter"),
    "optimizer": ({"state.0.exp_avg": (2, 2)}, "an optimizer's state"),
    "MLX": ({"model.layers.0.self_attn.q_proj.lora_a": (2, 2)}, "an adapter of MLX"),
    "LLLite": ({"lllite_unet_input_blocks_4_1.down.0.weight": (2, 2)}, "a ControlNet"),
    "Cascade": ({"lora_prior_unet_down_blocks_0_1.lora_up.weight": (2, 2)}, "Stable Cascade"),
    "model": ({"model.layers.0.self_attn.q_proj.weight": (2, 2)}, "looks like the weights of a model"),
    "PEFT": (
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 2)},
        "of no known image model.*adapter_config.json",
    ),
    "trainer": (
        {
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": (2, 2),
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": (2, 2),
        },
        "a trainer's checkpoint of a whole model",
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_file_that_is_not_an_adapter_is_named(case: str, tmp_path: Path) -> None:
    shapes, message = STRANGERS[case]
    path = saved(tmp_path, {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(AdapterError, match=message):
        detect(path)


def test_a_directory_that_is_not_an_adapters_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    saved(whole, {"model.embed.weight": torch.ones(2, 2)}, "model.safetensors")
    with pytest.raises(AdapterError, match=r"holds a whole model \(model.safetensors\), not an adapter"):
        detect(whole)
    (whole / "model_index.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"holds a whole model \(model_index.json\)"):
        detect(whole)
    style = saved(whole, lora(MIXTURE, "lora_transformer_"), "style.safetensors")
    with pytest.raises(AdapterError, match=rf"give its file, {style}"):
        detect(whole)
    assert detect(style) == "kohya"


def test_a_file_of_another_format_is_named_by_its_bytes_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    torch.save({"lora": torch.ones(2)}, tmp_path / "a.pt")
    cases = {
        b"": "an empty file",
        b"GGUF\x03\x00\x00\x00": "is GGUF, which is written here but not read",
        (tmp_path / "a.npz").read_bytes(): "a zip file, as .*numpy",
        (tmp_path / "a.pt").read_bytes(): "Pickles .* are not opened",
        b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS",
        b"<!DOCTYPE html>": "a web page",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(AdapterError, match=message):
            detect(path)
    (tmp_path / "b.ckpt").write_bytes(b"something else")
    with pytest.raises(AdapterError, match=r"by its name a pickle.*not opened"):
        detect(tmp_path / "b.ckpt")
    save_file({}, path)
    with pytest.raises(AdapterError, match="without tensors"):
        detect(path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(AdapterError, match="index of a model in several files"):
        detect(index)


# ---- written


def factors(inputs: int, outputs: int) -> Factors:
    return Factors(torch.randn(2, inputs), torch.eye(2), torch.randn(outputs, 2), 1.0)


def test_names_of_the_original_code_are_not_written_as_diffusers(tmp_path: Path) -> None:
    adapter = join({"transformer": Adapter({path: factors(*size) for path, size in FLUX2.items()})})
    with pytest.raises(AdapterError, match="has the name of the model's original code"):
        diffusers.write(adapter, tmp_path / "a.safetensors")
    # The way out: as that code saves it, then imported.
    path = saved(tmp_path, lora(FLUX2, "diffusion_model."))
    export_adapter(path, tmp_path / "b.safetensors", "diffusers")


def test_kohya_is_written_for_names_of_a_unet_alone(tmp_path: Path) -> None:
    adapter = join({"unet": Adapter({"mid_block.attentions.0.proj_in": factors(h, h)})})
    kohya.write(adapter, tmp_path / "a.safetensors")
    for name in ("middle_block.1.proj_in", "transformer_blocks.0.attn.to_q", "tower"):
        adapter = join(
            {"unet": Adapter({name: factors(h, h), "mid_block.attentions.0.proj_in": factors(h, h)})}
        )
        with pytest.raises(AdapterError, match=rf"unet.{name} is not a module of a U-Net.*--to diffusers"):
            kohya.write(adapter, tmp_path / "b.safetensors")


def test_the_doctor_does_not_send_comfyuis_own_names_elsewhere(tmp_path: Path) -> None:
    for prefix in ("diffusion_model.", "lora_unet_"):
        findings = diagnose(saved(tmp_path, lora(FLUX2, prefix)), engines=["comfyui"]).findings
        said = next(f for f in findings if f.check == "comfyui: format")
        assert said.level == "note" and "which ComfyUI has too" in said.what


SMALL = {
    "FLUX.1": MIXTURE,
    "FLUX.2": {"transformer_blocks.0.ff.linear_in": (h, 6 * h), "transformer_blocks.0.attn.to_q": (h, h)},
    "Qwen-Image": QWEN,
    "Z-Image": Z_IMAGE,
    "Lumina 2": {"layers.0.attn.to_q": (h * 3, h * 3), "layers.0.attn.to_k": (h * 3, h)},
    "SD3": {"transformer_blocks.0.attn2.to_q": (h, h), "transformer_blocks.0.attn.to_q": (h, h)},
    "Wan": {"blocks.0.attn1.to_q": (h, h), "blocks.0.ffn.net.0.proj": (h, 20)},
    "HunyuanVideo": {"context_embedder.proj_in": (4, h), "single_transformer_blocks.0.attn.to_q": (h, h)},
    "AuraFlow": {"joint_transformer_blocks.0.attn.to_q": (h, h)},
    "LTX-Video": {"transformer_blocks.0.attn1.to_q": (h, h), "proj_in": (4, h)},
    "SANA": {"transformer_blocks.0.attn1.to_q": (h, h), "patch_embed.proj": (4, h)},
}


@pytest.mark.parametrize("family", SMALL)
def test_a_written_file_is_read_back_as_the_familys_own_pipeline_reads_it(
    family: str, tmp_path: Path
) -> None:
    source = saved(tmp_path, lora(SMALL[family], "transformer."))
    adapter = read_adapter(source)
    loader = next(own.loader for own in FAMILIES if own.name == family)
    assert diffusers._loader(adapter) == loader
    proof = export_adapter(source, tmp_path / "b.safetensors", "diffusers")
    assert proof.reader.startswith("diffusers") and proof.modules == len(SMALL[family])
    alone = tmp_path / "one" / "transformer"
    export_adapter(source, alone.parent, "lora")
    export_adapter(alone, tmp_path / "c.safetensors", "diffusers")  # recognized by its modules


def test_a_text_encoder_that_diffusers_passes_over_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    clip = {"text_model.encoder.layers.0.self_attn.q_proj": (h, h)}
    cases = {
        "a T5": lora(MIXTURE, "transformer.") | lora(T5, "text_encoder_2."),
        "the text_encoder of Qwen-Image": lora(QWEN, "transformer.") | lora(clip, "text_encoder."),
        "the text_encoder_2 of FLUX.1": lora(MIXTURE, "transformer.") | lora(clip, "text_encoder_2."),
    }
    for n, (what, tensors) in enumerate(cases.items()):
        source = saved(tmp_path, tensors, f"{n}.safetensors")
        with pytest.raises(AdapterError, match=rf"is of {what}.*without a word.*--to lora"):
            export_adapter(source, tmp_path / "out.safetensors", "diffusers")
        export_adapter(source, tmp_path / f"lora{n}", "lora")
        export_adapter(tmp_path / f"lora{n}" / "transformer", tmp_path / f"out{n}.safetensors", "diffusers")
    fine = saved(tmp_path, lora(MIXTURE, "transformer.") | lora(clip, "text_encoder."))
    export_adapter(fine, tmp_path / "fine.safetensors", "diffusers")
    mlp = lora({"text_model.encoder.layers.0.mlp.fc1": (h, h)}, "text_encoder.")
    with pytest.raises(AdapterError, match=r"diffusers cannot load .* an adapted attention .*--to lora"):
        export_adapter(saved(tmp_path, mlp), tmp_path / "mlp.safetensors", "diffusers")
    export_adapter(saved(tmp_path, mlp), tmp_path / "mlp", "lora")


def test_comfyui_is_written_for_families_whose_names_were_looked_up() -> None:
    def adapter(modules: Sizes) -> Adapter:
        return join({"transformer": Adapter({path: factors(*size) for path, size in modules.items()})})

    assert comfyui.best_format(adapter(MIXTURE)) == "diffusers"
    for modules in (QWEN, Z_IMAGE):
        assert comfyui.best_format(adapter(modules)) == "diffusers"
    assert comfyui.best_format(adapter(SMALL["FLUX.2"])) == "original"
    for name in ("Wan", "SANA"):
        with pytest.raises(
            AdapterError, match=rf"is .*{name}.*, and ComfyUI's names.*FLUX.1, .*Z-Image.*--to diffusers"
        ):
            comfyui.best_format(adapter(SMALL[name]))
    with pytest.raises(AdapterError, match="is no known family, by names and sizes"):
        comfyui.best_format(adapter({"transformer_blocks.0.attn.to_q": (8, 16)}))


def test_every_layout_and_family_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    for layout in LAYOUTS:
        if layout.prefix.rstrip(".") not in COMPONENTS:
            assert f"`{layout.prefix}`" in text, layout.prefix
    assert all(family.name in text for family in FAMILIES)
