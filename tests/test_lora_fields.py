"""A LoRA whose configuration changes what its factors mean is read as PEFT runs it, or refused with a way out."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
import upstream
from moslora.adapters.combine import combine
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.configuration import LORA, MOSLORA
from moslora.adapters.formats.lora_fields import (
    HARMLESS,
    READ,
    REFUSED,
    STARTS,
    check_fields,
    check_native_fields,
    is_off,
    start_of,
)
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.inspection import inspect_adapter
from moslora.adapters.merge import merge
from moslora.errors import AdapterError, ModelError, ProofError
from moslora.training.mix import open_mix
from tolerances import MODEL, relative_error

TARGETS = ["q_proj", "down_proj"]
BUILD: dict[str, Callable[[], Any]] = {"llama": tiny.llama, "gpt2": tiny.gpt2}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# --- The tables ---------------------------------------------------------------------------------------------


def test_every_field_of_the_installed_peft_is_in_one_table() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields <= {*READ, *HARMLESS, *REFUSED}
    assert LORA.keys() <= {*READ, *HARMLESS, *REFUSED}
    assert not (
        READ.keys() & HARMLESS.keys() | READ.keys() & REFUSED.keys() | HARMLESS.keys() & REFUSED.keys()
    )


@upstream.needs("variants are told by metadata", peft="0.20")
def test_what_peft_calls_a_variant_is_refused_or_has_a_reason() -> None:
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants - REFUSED.keys() == {"use_dora", "velora_config", "monteclora_config"}
    starts = next(f for f in dataclasses.fields(LoraConfig) if f.name == "init_lora_weights")
    assert set(starts.metadata.get("lora_variants", ())) <= STARTS.keys()


def test_what_the_installed_peft_writes_by_default_is_read() -> None:
    assert check_fields("a", {**LoraConfig().to_dict(), "target_modules": ["q"]}) == ""
    check_native_fields("a", {name: field.default for name, field in MOSLORA.items()}, MOSLORA)


ON: dict[str, Any] = {
    "layer_replication": [[0, 2], [1, 2]],
    "use_qalora": True,
    "use_bdlora": {},
    "kasa_config": {"beta": 0.1},
    "arrow_config": {},
    "alora_invocation_tokens": [3, 4],
    "megatron_config": {"a": 1},
    "enable_lora": [True, False],
    "lora_use_mixer": True,
    "use_moslora": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_makes_another_method_refuses_by_name(name: str) -> None:
    with pytest.raises(AdapterError, match=f"not a plain LoRA: {name} is set") as caught:
        check_fields("a", {name: ON[name]})
    assert REFUSED[name].way_out in str(caught.value)
    assert check_fields("a", {name: None}) == check_fields("a", {name: False}) == ""


@pytest.mark.parametrize("value", [True, 1, 0.5, "on", [1], {"a": 1}, 0])
def test_an_unknown_field_that_is_set_refuses_by_name(value: object) -> None:
    for check in (lambda c: check_fields("a", c), lambda c: check_native_fields("a", c, MOSLORA)):
        with pytest.raises(AdapterError, match=r"use_newlora=.* unknown here.*remove it"):
            check({"use_newlora": value})


@pytest.mark.parametrize("value", [None, False, [], {}, "", "none"])
def test_an_unknown_field_that_switches_nothing_on_is_passed_over(value: object) -> None:
    assert is_off(value)
    assert check_fields("a", {"use_newlora": value}) == ""


KINDS: dict[Any, str | None] = {
    True: "",
    None: "",
    "gaussian": "",
    "Gaussian": "",
    "eva": "",
    "orthogonal": "",
    "mica": "",
    "pissa": "pissa",
    "OLoRA": "olora",
    "pissa_niter_4": None,
    "pissa_4": None,
    "PiSSA": None,  # PEFT knows it in small letters alone
    "corda": None,
    "lora_ga": None,
    "loftq": None,
    "newstart": None,
    4: None,
}


@pytest.mark.parametrize("value", KINDS, ids=str)
def test_a_start_is_kept_subtracted_or_refused(value: Any) -> None:
    wanted = KINDS[value]
    if wanted is not None:
        assert check_fields("a", {"init_lora_weights": value}) == wanted
        return
    with pytest.raises(AdapterError, match=r"init_lora_weights=.*(PEFT|Update moslora)"):
        check_fields("a", {"init_lora_weights": value})
    assert start_of(value) is None or start_of(value)[1].changes_base  # type: ignore[index]


# --- PiSSA and OLoRA ----------------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=tiny.tokens()).logits.double()


@torch.no_grad()
def save_trained(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter that PEFT began on a base, and that was moved from its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        torch.manual_seed(1)
        model = get_peft_model(load(base), LoraConfig(**{**arguments, **changes}))
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_" in name:
                weight += 0.02 * torch.randn(weight.shape)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name, build in BUILD.items():
        build().save_pretrained(root / name)
    tiny.llama(7).to(torch.bfloat16).save_pretrained(root / "bfloat16")
    return {name: root / name for name in (*BUILD, "bfloat16")}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "pissa, rsLoRA and patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "olora with a magnitude": ("llama", {"init_lora_weights": "olora", "use_dora": True}),
    "pissa with a magnitude": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa of an embedding": (
        "llama",
        {"init_lora_weights": "pissa", "target_modules": ["embed_tokens", "v_proj", "down_proj"]},
    ),
    "olora beside a head": ("llama", {"init_lora_weights": "olora", "modules_to_save": ["lm_head"]}),
    "pissa of GPT-2": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn", "c_proj"]}),
    "olora of a square Conv1D": ("gpt2", {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_start_taken_out_of_the_base_is_subtracted_as_peft_runs_it(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    kind, changes = CASES[name]
    base, adapter = bases[kind], save_trained(bases[kind], tmp_path / "a", **changes)
    wanted = logits(PeftModel.from_pretrained(load(base), adapter))
    export_adapter(adapter, tmp_path / "lora", base=str(base))
    exported = logits(PeftModel.from_pretrained(load(base), tmp_path / "lora"))
    plain = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**plain, "init_lora_weights": True}))
    forgotten = logits(PeftModel.from_pretrained(load(base), adapter))
    assert relative_error(exported, wanted) < MODEL < 100 * MODEL < relative_error(forgotten, wanted)


@pytest.mark.parametrize("outer", ["_orig_mod.model.", "module.model.", ""], ids=repr)
def test_a_start_is_computed_under_the_names_that_the_base_has(
    outer: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, adapter = bases["llama"], save_trained(bases["llama"], tmp_path / "a", init_lora_weights="pissa")
    wanted = logits(PeftModel.from_pretrained(load(base), adapter))
    file = adapter / "adapter_model.safetensors"
    tensors = {
        key.replace("base_model.model.model.", f"base_model.model.{outer}"): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    proof = export_adapter(adapter, tmp_path / "lora", base=str(base))
    assert proof.start and proof.notes and proof.held_against == str(base)
    assert relative_error(logits(PeftModel.from_pretrained(load(base), tmp_path / "lora")), wanted) < MODEL
    merged = merge(base, adapter, tmp_path / "merged")
    assert merged.start and merged.notes
    assert relative_error(logits(load(tmp_path / "merged")), wanted) < MODEL


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_every_verb_knows_a_start_that_the_file_does_not_hold(
    start: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    adapter = save_trained(base, tmp_path / "a", init_lora_weights=start)
    wanted = logits(PeftModel.from_pretrained(load(base), adapter))
    proof = merge(base, adapter, tmp_path / "merged")
    assert str(base) in proof.start
    assert relative_error(logits(load(tmp_path / "merged")), wanted) < MODEL
    export_adapter(adapter, tmp_path / "native", "native", base=str(base))
    export_adapter(tmp_path / "native", tmp_path / "lora")
    assert relative_error(logits(PeftModel.from_pretrained(load(base), tmp_path / "lora")), wanted) < MODEL
    summed = combine([adapter, adapter], [0.5, 0.5], tmp_path / "sum", base=str(base))
    assert all(str(base) in text for text in summed.starts)
    assert relative_error(logits(PeftModel.from_pretrained(load(base), tmp_path / "sum")), wanted) < MODEL
    looked = inspect_adapter(adapter, str(base))
    assert {report.rank for report in looked.modules} == {8} and str(base) in looked.note
    found = diagnose(adapter, str(base), ["peft", "vllm"])
    levels = {finding.check: finding.level for finding in found.findings}
    assert (
        levels["start"] == "warning" and levels["peft: format"] == "ok" and levels["vllm: format"] == "error"
    )
    assert "Sound" not in found.verdict


def test_the_base_that_an_adapter_names_is_used_if_it_is_a_folder_and_that_is_said(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_trained(bases["llama"], tmp_path / "a", init_lora_weights="pissa")
    assert f"{bases['llama']}, which it names" in export_adapter(adapter, tmp_path / "lora").start
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "some/base"})
    )
    with pytest.raises(AdapterError, match=r"Give --base MODEL.*\(it names some/base\).*path_initial_model"):
        read_adapter(adapter)


def test_a_base_in_half_precision_is_decomposed_as_peft_does(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["bfloat16"]
    adapter = save_trained(base, tmp_path / "a", init_lora_weights="pissa")
    wanted = PeftModel.from_pretrained(load(base).float(), adapter).merge_and_unload().state_dict()
    merge(base, adapter, tmp_path / "merged")
    merged = load(tmp_path / "merged").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(merged[name], wanted[name].to(torch.bfloat16))


def test_a_start_on_another_base_is_noticed(bases: dict[str, Path], tmp_path: Path) -> None:
    tiny.llama(5).save_pretrained(tmp_path / "other")
    adapter = save_trained(bases["llama"], tmp_path / "a", init_lora_weights="pissa")
    texts = [finding.what for finding in diagnose(adapter, str(tmp_path / "other")).findings]
    assert any("as if the start were another base's" in text for text in texts)


def test_a_start_that_the_weight_does_not_determine_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_trained(bases["llama"], tmp_path / "a", init_lora_weights="pissa")
    model = tiny.llama()
    torch.nn.init.orthogonal_(model.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path / "orthogonal")
    with pytest.raises(ProofError, match="not determined by the base's weight"):
        read_adapter(adapter, base=str(tmp_path / "orthogonal"))


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_start_that_cannot_be_subtracted_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_trained(
        bases["llama"], tmp_path / "a", init_lora_weights="pissa", target_modules=["q_proj", "lm_head"]
    )
    tiny.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ModelError, match=r"lm_head shares its weight.*merge_and_unload"):
        read_adapter(adapter, base=str(tmp_path / "tied"))
    rewrite_config(tmp_path / "tied", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"quantized weights.*merge_and_unload"):
        read_adapter(adapter, base=str(tmp_path / "tied"))
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="Name the base that the adapter was trained on"):
        read_adapter(adapter, base=str(tmp_path / "wide"))


# --- The ways out -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_converting_with_peft_gives_a_plain_lora_of_the_base(
    start: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    model = get_peft_model(
        load(bases["llama"]), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=start)
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight += 0.02
    wanted = logits(model)
    model.save_pretrained(
        tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    export_adapter(tmp_path / "out", tmp_path / "lora")
    got = logits(PeftModel.from_pretrained(load(bases["llama"]), tmp_path / "lora"))
    assert relative_error(got, wanted) < MODEL


@torch.no_grad()
def test_a_base_saved_as_the_start_changed_it_goes_with_a_plain_lora(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_trained(bases["llama"], tmp_path / "a", init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterError, match="set init_lora_weights to true"):
        read_adapter(adapter)
    live = PeftModel.from_pretrained(load(bases["llama"]), adapter)
    wanted = logits(live)
    live.unload().save_pretrained(tmp_path / "changed")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    merge(tmp_path / "changed", adapter, tmp_path / "merged")
    assert relative_error(logits(load(tmp_path / "merged")), wanted) < MODEL


@torch.no_grad()
def test_a_stacked_base_written_out_takes_the_adapter_as_a_plain_lora(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_trained(bases["llama"], tmp_path / "a", layer_replication=[[0, 2], [0, 2]])
    with pytest.raises(AdapterError, match="layer_replication is set"):
        export_adapter(adapter, tmp_path / "lora")
    wanted = logits(PeftModel.from_pretrained(load(bases["llama"]), adapter))
    source = load_file(bases["llama"] / "model.safetensors")
    stacked = {n: t for n, t in source.items() if ".layers." not in n}
    for new, old in enumerate((0, 1, 0, 1)):
        mark = f".layers.{old}."
        stacked |= {n.replace(mark, f".layers.{new}."): t.clone() for n, t in source.items() if mark in n}
    (tmp_path / "stacked").mkdir()
    save_file(stacked, tmp_path / "stacked" / "model.safetensors", metadata={"format": "pt"})
    config = (bases["llama"] / "config.json").read_text()
    (tmp_path / "stacked" / "config.json").write_text(config)
    rewrite_config(tmp_path / "stacked", num_hidden_layers=4, layer_types=None)
    own = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**own, "layer_replication": None}))
    merge(tmp_path / "stacked", adapter, tmp_path / "merged")
    assert relative_error(logits(load(tmp_path / "merged")), wanted) < MODEL


@torch.no_grad()
@pytest.mark.parametrize("name", ["use_bdlora", "kasa_config"])
def test_a_variant_that_is_refused_is_merged_by_peft(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    import peft

    kinds = {"use_bdlora": "BdLoraConfig", "kasa_config": "KasaConfig"}
    if not hasattr(peft.tuners.lora.config, kinds[name]):
        pytest.skip(f"this PEFT has no {name}")
    settings = {"target_modules_bd_a": ["q_proj"], "nblocks": 2} if name == "use_bdlora" else {}
    value = getattr(peft.tuners.lora.config, kinds[name])(**settings)
    adapter = save_trained(bases["llama"], tmp_path / "a", target_modules=["q_proj"], **{name: value})
    with pytest.raises(AdapterError, match=f"{name} is set.*merge_and_unload"):
        export_adapter(adapter, tmp_path / "lora")
    live = PeftModel.from_pretrained(load(bases["llama"]), adapter)
    wanted = logits(live)
    assert relative_error(logits(live.merge_and_unload()), wanted) < MODEL


@torch.no_grad()
@pytest.mark.parametrize("name", ["VeloraConfig", "MontecloraConfig"])
def test_what_acts_in_training_alone_is_read_without_it(
    name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    import peft

    if not hasattr(peft.tuners.lora.config, name):
        pytest.skip(f"this PEFT has no {name}")
    value = getattr(peft.tuners.lora.config, name)()
    field = f"{name.removesuffix('Config').lower()}_config"
    adapter = save_trained(bases["llama"], tmp_path / "a", target_modules=["q_proj"], **{field: value})
    wanted = logits(PeftModel.from_pretrained(load(bases["llama"]), adapter))
    export_adapter(adapter, tmp_path / "lora")
    assert all(
        "lora_A" in key or "lora_B" in key for key in load_file(tmp_path / "lora/adapter_model.safetensors")
    )
    assert (
        relative_error(logits(PeftModel.from_pretrained(load(bases["llama"]), tmp_path / "lora")), wanted)
        < MODEL
    )


CHOOSING: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ["down_proj"]},
    "exclude_modules": {"exclude_modules": ["q_proj"]},
    "layers_to_transform": {"layers_to_transform": [0]},
    "modules_to_save": {"modules_to_save": ["mlp"]},
}


@pytest.mark.parametrize("name", CHOOSING)
def test_factors_that_peft_passes_over_are_refused(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_trained(bases["llama"], tmp_path / "a", init_lora_weights=False)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **CHOOSING[name]}))
    with pytest.raises(AdapterError, match=r"PEFT passes over 2 of 4 modules.*name them in target_modules"):
        read_adapter(adapter)
    nothing_else = {"exclude_modules": None, "layers_to_transform": None, "modules_to_save": None}
    path.write_text(json.dumps({**config, **nothing_else}))
    assert len(read_adapter(adapter).modules) == 4


def test_other_layouts_refuse_what_changes_the_meaning_of_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    said = {"unet.r": 2, "unet.lora_alpha": 2, "unet.init_lora_weights": "pissa"}
    tensors = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(AdapterError, match=r"unet began with init_lora_weights='pissa'.*fuse_lora"):
        read_adapter(tmp_path / "a.safetensors")
    said = {**said, "unet.init_lora_weights": True, "unet.layer_replication": [[0, 1]]}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(AdapterError, match="layer_replication is set"):
        read_adapter(tmp_path / "b.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    own = {
        f"{prefix}.lora_A.weight": A,
        f"{prefix}.lora_AB.weight": torch.eye(2),
        f"{prefix}.lora_B.weight": B,
    }
    for change in ({"init_lora_weights": "pissa"}, {"enable_lora": [True]}, {"use_newlora": 3}):
        folder = tmp_path / next(iter(change))
        folder.mkdir()
        save_file(own, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], **change}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterError, match=next(iter(change))):
            read_adapter(folder)


@torch.no_grad()
def test_a_pipelines_pissa_is_fused_by_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import tiny_pipelines

    pipeline = tiny_pipelines.sdxl()
    pipeline.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
    pipeline.unet.add_adapter(config)
    for name, weight in pipeline.unet.named_parameters():
        if "lora_" in name:
            weight += 0.05
    wanted = tiny_pipelines.outputs(pipeline)["unet"]
    own = {"unet_lora_layers": get_peft_model_state_dict(pipeline.unet)}
    about = {"unet_lora_adapter_metadata": config.to_dict()}
    type(pipeline).save_lora_weights(tmp_path / "lora", **own, **about)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with pytest.raises(AdapterError, match=r"load_lora_weights\(…, low_cpu_mem_usage=False\)"):
        read_adapter(file)
    fused = type(pipeline).from_pretrained(tmp_path / "base")
    fused.load_lora_weights(file, low_cpu_mem_usage=False)
    fused.fuse_lora()
    fused.unload_lora_weights()
    fused.save_pretrained(tmp_path / "full")
    got = tiny_pipelines.outputs(type(pipeline).from_pretrained(tmp_path / "full"))["unet"]
    assert relative_error(got, wanted) < MODEL


@pytest.mark.parametrize("change", [{"pissa": True}, {"loraga": True}, {"new": 1}, {"scaling": 7.0}], ids=str)
def test_paddles_fields_are_read_harmless_or_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = "llama.layers.0.self_attn.q_proj"
    tensors = {f"{path}.lora_A": torch.randn(6, 2), f"{path}.lora_B": torch.randn(2, 5)}
    save_file(tensors, tmp_path / "lora.safetensors")
    config = {
        "r": 2,
        "lora_alpha": 4,
        "scaling": 2.0,
        "lora_plus_scale": 4.0,
        "pissa": False,
        "dtype": "bfloat16",
    }
    (tmp_path / "lora_config.json").write_text(json.dumps(config))
    assert len(read_adapter(tmp_path).modules) == 1
    (tmp_path / "lora_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterError, match=f"{next(iter(change))} is set|scale is 7"):
        read_adapter(tmp_path)


def test_adapters_that_began_with_pissa_are_mixed_on_their_base(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = save_trained(bases["llama"], tmp_path / "a", init_lora_weights="pissa")
    whole = read_adapter(adapter, base=str(bases["llama"]))
    mix = open_mix([adapter], [2.0], base=str(bases["llama"]))
    for name, factors in whole.modules.items():
        assert relative_error(mix.whole.modules[name].delta_weight(), 2 * factors.delta_weight()) < MODEL
