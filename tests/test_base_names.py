"""Names: one module is one module, however a file, a version of transformers or a wrapper spells it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
import tiny_vision
import upstream
from moslora import MoSLoRAConfig
from moslora.adapters.combine import combine
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.fit import fit_to_base, targets_module
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.inspection import inspect_adapter
from moslora.adapters.merge import merge
from moslora.compat.checkpoint_names import names_in_memory
from moslora.compat.peft.loading import load_whole
from moslora.errors import AdapterError, ModelError, ProofError
from moslora.evaluation.active import with_adapter
from moslora.models.in_memory import stored_name
from moslora.models.module_names import PLAIN
from moslora.models.shards import open_weights
from moslora.training.mix import open_mix

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tiny.tokens()).logits
    return found.double()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def respell(source: Path, out: Path, change: Callable[[str], str], **config: Any) -> Path:
    """Copy an adapter with other names of its tensors, and maybe another configuration."""
    shutil.copytree(source, out)
    tensors = {change(key): tensor for key, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    said = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**said, **config}))
    return out


def with_stock_peft(model: Any, adapter: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing keys: what is loaded is looked at
        return logits(PeftModel.from_pretrained(model, adapter))


# --- Wrappers' names in the keys ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a plain LoRA and a native adapter on it."""
    root = tmp_path_factory.mktemp("llama")
    tiny.llama().save_pretrained(root / "base")
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(1)
    for name, config in (
        ("lora", LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)),
        ("native", MoSLoRAConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)),
    ):
        model = get_peft_model(load(root / "base"), config)
        model.save_pretrained(root / name)
        torch.save(logits(model), root / f"{name}.pt")
    return root


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def behind(outer: str) -> Callable[[str], str]:
    return lambda key: key.replace(PREFIX, PREFIX + outer, 1)


# How it came about → what it does to a key.
WRAPPED: dict[str, Callable[[str], str]] = {
    "torch.compile": behind("_orig_mod."),
    "torch.compile of a layer": lambda key: key.replace(".self_attn.", "._orig_mod.self_attn."),
    "torch.compile around the PEFT model": lambda key: f"_orig_mod.{key}",
    "DDP": behind("module."),
    "DDP around the PEFT model": lambda key: f"module.{key}",
    "DDP around torch.compile": behind("module._orig_mod."),
    "FSDP": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "activation checkpointing": lambda key: key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "FSDP with checkpointing": lambda key: key.replace(
        ".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."
    ),
    "a PEFT model in a PEFT model": behind(PREFIX),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "an outer model": behind("llm."),
    "an outer model around the PEFT model": lambda key: f"policy.{key}",
    "the model without its head": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
}  # fmt: skip


@pytest.mark.parametrize("how", WRAPPED)
def test_what_a_wrapper_left_in_names_is_said_and_the_base_gets_the_whole_adapter(
    how: str, llama: Path, tmp_path: Path
) -> None:
    bad = respell(llama / "lora", tmp_path / "bad", WRAPPED[how])
    live = torch.load(llama / "lora.pt")
    diagnosis = diagnose(bad, str(llama / "base"), ["peft"])
    applied = apart(with_stock_peft(load(llama / "base"), bad), live) < 1e-5
    assert applied == (how == "the adapter's name")  # of which PEFT makes nothing, as long as it is "default"
    assert diagnosis.is_usable == applied and not diagnosis.verdict.startswith("Sound")
    if not applied:
        with pytest.raises(ProofError, match="does not fit this base"):
            load_whole(load(llama / "base"), bad)
    proof = export_adapter(bad, tmp_path / "lora")
    assert proof.notes and proof.held_against == str(llama / "base")
    assert apart(with_stock_peft(load(llama / "base"), tmp_path / "lora"), live) < 1e-5
    assert diagnose(tmp_path / "lora", str(llama / "base"), ["peft"]).verdict.startswith("Sound for peft")


@pytest.mark.parametrize(
    "how", ["torch.compile", "DDP", "a PEFT model in a PEFT model", "the adapter's name"]
)
def test_native_adapters_are_read_the_same(how: str, llama: Path, tmp_path: Path) -> None:
    bad = respell(llama / "native", tmp_path / "bad", WRAPPED[how])
    assert merge(llama / "base", bad, tmp_path / "merged").notes
    assert apart(logits(load(tmp_path / "merged")), torch.load(llama / "native.pt")) < 1e-5
    if how != "the adapter's name":
        with pytest.raises((ProofError, AdapterError), match="does not fit"):
            load_whole(load(llama / "base"), bad)


def test_without_a_base_the_verdict_says_what_was_not_checked(llama: Path, tmp_path: Path) -> None:
    away = respell(llama / "lora", tmp_path / "away", lambda key: key, base_model_name_or_path="not/here")
    assert "not held against a base" in diagnose(away, None, ["peft"]).verdict
    bad = respell(away, tmp_path / "bad", WRAPPED["torch.compile"])
    assert not diagnose(bad, None, ["peft"]).is_usable
    proof = export_adapter(bad, tmp_path / "lora")
    assert proof.held_against is None and "_orig_mod." in proof.notes[0]
    assert (
        apart(with_stock_peft(load(llama / "base"), tmp_path / "lora"), torch.load(llama / "lora.pt")) < 1e-5
    )


def test_patterns_of_a_configuration_lose_wrappers_names_too(llama: Path, tmp_path: Path) -> None:
    inner = WRAPPED["torch.compile of a layer"]
    ranks = {r"layers\.0\._orig_mod\.self_attn\.q_proj": 4, "layers.1._orig_mod.self_attn.v_proj": 4}
    names = sorted(
        {
            inner(key).removeprefix(PREFIX).rpartition(".lora_")[0]
            for key in load_file(llama / "lora" / WEIGHTS)
        }
    )
    bad = respell(
        llama / "lora", tmp_path / "bad", inner, r=2, lora_alpha=4, rank_pattern={**ranks, r".*": 4},
        alpha_pattern={".*": 8}, target_modules=names,
    )  # fmt: skip
    export_adapter(bad, tmp_path / "lora")
    assert (
        apart(with_stock_peft(load(llama / "base"), tmp_path / "lora"), torch.load(llama / "lora.pt")) < 1e-5
    )


def test_files_of_diffusers_lose_wrappers_names_too(tmp_path: Path) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = {"lora_A": torch.randn(2, 8), "lora_B": torch.randn(8, 2)}
    for name, outer in (("good", "unet."), ("bad", "unet._orig_mod.")):
        named = {f"{path}.{part}.weight".replace("unet.", outer, 1): tensor for part, tensor in parts.items()}
        save_file(named, tmp_path / f"{name}.safetensors")
    good, bad = (read_adapter(tmp_path / f"{name}.safetensors") for name in ("good", "bad"))
    assert set(bad.modules) == set(good.modules) == {path}
    assert bad.notes and not good.notes
    assert export_adapter(tmp_path / "bad.safetensors", tmp_path / "native", "native").notes == bad.notes


def test_two_adapters_in_one_file_and_two_tensors_of_one_name_are_refused(
    llama: Path, tmp_path: Path
) -> None:
    tensors = load_file(llama / "lora" / WEIGHTS)
    several = {
        key.replace(".weight", f".{name}.weight"): t.clone()
        for name in ("a", "b")
        for key, t in tensors.items()
    }
    bad = respell(llama / "lora", tmp_path / "several", lambda key: key)
    save_file(several, bad / WEIGHTS)
    with pytest.raises(AdapterError, match="holds 2 adapters, a, b"):
        read_adapter(bad)
    twice = {**tensors, **{WRAPPED["FSDP"](key): tensor.clone() for key, tensor in tensors.items()}}
    save_file(twice, bad / WEIGHTS)
    with pytest.raises(AdapterError, match="Two tensors of the adapter are"):
        read_adapter(bad)


class Honest(nn.Module):
    """A model whose part is really called ``module``, as DDP's is."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict(
            {"head": nn.Linear(8, 4, bias=False), "body": nn.Linear(8, 8, bias=False)}
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module["head"](self.module["body"](x))
        return found


@pytest.mark.parametrize("is_known", [False, True], ids=["no base", "a base"])
def test_an_honest_module_called_module_keeps_its_name(is_known: bool, tmp_path: Path) -> None:
    base, x = Honest(), torch.randn(3, 8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["head", "body"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    live = model(x).detach()
    if is_known:  # even where PEFT noted nothing of the class: the base decides
        folder = tmp_path / "base"
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in Honest().state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "honest", "architectures": ["Honest"]}))
        said = {"auto_mapping": None, "base_model_name_or_path": str(folder)}
        respell(tmp_path / "adapter", tmp_path / "known", lambda key: key, **said)
    source = tmp_path / ("known" if is_known else "adapter")
    proof = export_adapter(source, tmp_path / "lora")
    assert not proof.notes and (proof.held_against is not None) == is_known
    fresh = Honest()
    fresh.load_state_dict(unadapted(base))
    again = PeftModel.from_pretrained(fresh, tmp_path / "lora")
    assert torch.allclose(again(x), live, atol=1e-6)


def unadapted(model: nn.Module) -> dict[str, Tensor]:
    return {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}


# --- One module, two spellings ------------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj", "down_proj", "fc1", "qkv"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a family's base in hub layout and an adapter of stock PEFT on it, once each."""
    root = tmp_path_factory.mktemp("families")

    def make(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            (save_mllama if name == "mllama" else tiny_vision.FAMILIES[name])(folder / "base")
            torch.manual_seed(1)
            config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
            model = get_peft_model(load_family(folder / "base"), config)
            model.save_pretrained(folder / "new")
            torch.save(logits(model), folder / "live.pt")
            on_disk = spelled_as_on_disk(model.get_base_model(), folder / "base")
            respell(folder / "new", folder / "old", lambda key: old_name(key, on_disk))
        return folder

    return make


def save_mllama(folder: Path) -> None:
    """Mllama, which no task reads: layers of the language model that look at the picture."""
    text = {**tiny_vision.SIZES, "num_key_value_heads": 1, "vocab_size": 260, "max_position_embeddings": 256}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "cross_attention_layers": [1]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 1}
    vision |= {
        "supported_aspect_ratios": [[1, 1]],
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }
    tiny_vision.seed()
    config = transformers.MllamaConfig(text_config=text, vision_config=vision)
    transformers.MllamaForConditionalGeneration(config).save_pretrained(folder)


def load_family(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def spelled_as_on_disk(model: Any, folder: Path) -> dict[str, str]:
    """Return paths of modules on disk, which are those in memory of an older transformers, by those in memory."""
    base = load_family(folder)
    named = names_in_memory(base, load_file(folder / "model.safetensors"))
    weights = {names[0]: key for key, (names, _) in named.items() if key.endswith(".weight")}
    return {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in weights.items()}


def old_name(key: str, on_disk: Mapping[str, str]) -> str:
    path, _, part = key.removeprefix(PREFIX).partition(".lora_")
    return f"{PREFIX}{on_disk[path]}.lora_{part}"


@pytest.mark.parametrize("name", [*tiny_vision.FAMILIES, "mllama"])
def test_merging_into_a_base_in_hub_layout_is_what_stock_peft_computes(
    name: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families(name)
    live, base = torch.load(folder / "live.pt"), folder / "base"
    assert not merge(base, folder / "new", tmp_path / "merged").notes
    assert apart(logits(load_family(tmp_path / "merged")), live) < 1e-5
    assert diagnose(folder / "new", str(base), ["peft"]).verdict.startswith("Sound for peft")
    found = inspect_adapter(folder / "new", str(base))
    assert all(report.relative_norm for report in found.modules)


MOVED = ["llava", "llava_next", "internvl", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma", "mllama"]


@pytest.mark.parametrize("name", MOVED)
@upstream.needs("names moved again, and are converted, in transformers 5", transformers="5")
def test_an_adapter_of_old_names_is_not_called_sound_and_is_exported_under_todays(
    name: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families(name)
    live, base = torch.load(folder / "live.pt"), folder / "base"
    # Of some families PEFT (since 0.19) converts names of the language model, but not those of the vision tower.
    with pytest.raises(ProofError, match="does not fit this base"):
        load_whole(load_family(base), folder / "old")
    assert not diagnose(folder / "old", str(base), ["peft"]).is_usable
    export_adapter(folder / "old", tmp_path / "lora", base=str(base))
    assert apart(with_stock_peft(load_family(base), tmp_path / "lora"), live) < 1e-5
    assert merge(base, folder / "old", tmp_path / "merged").notes
    assert apart(logits(load_family(tmp_path / "merged")), live) < 1e-5
    combine([folder / "new", folder / "old"], [0.25, 0.75], tmp_path / "sum", base=str(base))
    assert apart(with_stock_peft(load_family(base), tmp_path / "sum"), live) < 1e-5


@upstream.needs("PEFT converts names since 0.19", transformers="5", peft="0.19")
def test_old_names_that_peft_itself_converts_are_usable_with_a_word_on_them(
    families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families("llava")
    text = respell(folder / "old", tmp_path / "text", lambda key: key, exclude_modules=".*vision_tower.*")
    tensors = {key: tensor for key, tensor in load_file(text / WEIGHTS).items() if "vision_tower" not in key}
    save_file(tensors, text / WEIGHTS)
    assert (
        apart(logits(load_whole(load_family(folder / "base"), text)), torch.load(folder / "live.pt")) < 1e-5
    )
    verdict = diagnose(text, str(folder / "base"), ["peft"]).verdict
    assert verdict.startswith("Usable for peft, with 1 thing")


@upstream.needs("names moved again, and are converted, in transformers 5", transformers="5")
def test_both_spellings_are_not_added_where_no_base_says_that_they_are_one(
    families: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = families("qwen2_5_vl")
    parts = [
        respell(folder / name, tmp_path / name, lambda key: key, base_model_name_or_path="not/here")
        for name in ("old", "new")
    ]
    with pytest.raises(AdapterError, match="an old and a new name of transformers"):
        combine(parts, [0.5, 0.5], tmp_path / "sum")
    with pytest.raises(AdapterError, match="an old and a new name of transformers"):
        open_mix(parts)
    assert set(open_mix([folder / "old", folder / "new"]).whole.modules) == set(
        read_adapter(parts[1]).modules
    )
    # One adapter with a module under both names has two ΔW for it.
    both = {**load_file(parts[0] / WEIGHTS), **load_file(parts[1] / WEIGHTS)}
    save_file(both, parts[0] / WEIGHTS)
    with pytest.raises(AdapterError, match="are one module of"):
        merge(folder / "base", parts[0], tmp_path / "merged")


def test_a_model_in_memory_is_known_as_the_folder_it_came_from_whatever_the_layout(
    families: Callable[[str], Path],
) -> None:
    base = families("qwen2_5_vl") / "base"
    model = load_family(base)
    assert stored_name(model) == str(base)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert stored_name(model) is None


def test_types_called_plain_have_the_names_on_disk_in_memory() -> None:
    for kind in sorted(PLAIN):
        config = transformers.AutoConfig.for_model(kind)
        changes = {
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "pad_token_id": 0,
        }
        changes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        config = type(config)(**changes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        names = list(model.state_dict())
        assert names_in_memory(model, names) == {name: ((name,), False) for name in names}
        assert all(name.startswith(("model.", "lm_head.")) for name in names)


# --- Both directions, and what lies beside the factors ------------------------------------------------------


@pytest.fixture(scope="module")
def of_other_depth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A base of so many layers and an adapter on it."""
    root = tmp_path_factory.mktemp("depths")
    for layers in (1, 2):
        tiny.llama(num_hidden_layers=layers).save_pretrained(root / str(layers) / "base")
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(load(root / str(layers) / "base"), config)
        model.save_pretrained(root / str(layers) / "adapter")
    return lambda layers: root / str(layers)


@pytest.mark.parametrize(
    ("adapter", "base", "message"), [(2, 1, "have no place in"), (1, 2, "has no factors for")]
)
def test_an_adapter_of_another_depth_is_refused_by_every_verb(
    adapter: int, base: int, message: str, of_other_depth: Callable[[int], Path], tmp_path: Path
) -> None:
    one, other = of_other_depth(adapter) / "adapter", of_other_depth(base) / "base"
    for refuse in (
        lambda: merge(other, one, tmp_path / "merged"),
        lambda: export_adapter(one, tmp_path / "lora", base=str(other)),
        lambda: combine([one, one], [1, 1], tmp_path / "sum", base=str(other)),
    ):
        with pytest.raises(ModelError, match=message):
            refuse()
    assert any(message in f.what for f in diagnose(one, str(other)).findings if f.level == "error")
    assert message in inspect_adapter(one, str(other)).note
    with pytest.raises(ProofError, match="does not fit this base"):  # what every evaluation loads by
        with_adapter(load(other), one)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_was_cut_on_purpose_says_so_and_is_taken(
    of_other_depth: Callable[[int], Path], tmp_path: Path
) -> None:
    names = ["layers.0.self_attn.q_proj"]
    cut = respell(of_other_depth(1) / "adapter", tmp_path / "cut", lambda key: key, target_modules=names)
    merge(of_other_depth(2) / "base", cut, tmp_path / "merged")
    live = with_stock_peft(load(of_other_depth(2) / "base"), cut)
    assert apart(logits(load(tmp_path / "merged")), live) < 1e-5


@pytest.mark.parametrize("what", ["head", "embedding", "unknown", "magnitude of tokens"])
def test_tensors_beside_the_factors_are_held_against_the_base(what: str, llama: Path, tmp_path: Path) -> None:
    key, shape = {
        "head": ("lm_head.weight", (70, 32)),
        "embedding": ("model.embed_tokens.weight", (70, 32)),
        "unknown": ("model.projector.weight", (4, 4)),
        "magnitude of tokens": ("model.embed_tokens.token_adapter.trainable_tokens_delta", (2, 16)),
    }[what]
    bad = respell(llama / "lora", tmp_path / "bad", lambda key: key, modules_to_save=["lm_head"])
    save_file({**load_file(llama / "lora" / WEIGHTS), f"{PREFIX}{key}": torch.ones(shape)}, bad / WEIGHTS)
    assert any(key in f.what for f in diagnose(bad, str(llama / "base")).findings if f.level == "error")
    for refuse in (
        lambda: merge(llama / "base", bad, tmp_path / "merged"),
        lambda: export_adapter(bad, tmp_path / "lora", base=str(llama / "base")),
    ):
        with pytest.raises(ModelError, match=key.replace(".", r"\.")):
            refuse()
    with pytest.raises(ProofError, match="does not fit this base"):
        load_whole(load(llama / "base"), bad)


def test_factors_of_another_width_are_misshapen(llama: Path, tmp_path: Path) -> None:
    tiny.llama(hidden_size=16).save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="another shape"):
        merge(tmp_path / "base", llama / "lora", tmp_path / "merged")
    with pytest.raises(ModelError, match="another shape"):
        export_adapter(llama / "lora", tmp_path / "lora", base=str(tmp_path / "base"))
    with pytest.raises(ProofError, match="size mismatch"):
        load_whole(load(tmp_path / "base"), llama / "lora")


def test_a_whole_adapter_loads_whole_with_what_it_trains_in_full(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    for kind in (LoraConfig, MoSLoRAConfig):
        folder = tmp_path / kind.__name__
        model = get_peft_model(load(llama / "base"), kind(init_lora_weights=False, **options))
        model.save_pretrained(folder)
        assert apart(logits(load_whole(load(llama / "base"), folder)), logits(model)) == 0
        assert diagnose(folder, str(llama / "base")).is_usable


def test_a_new_head_of_a_task_is_no_fault_whatever_its_size(llama: Path, tmp_path: Path) -> None:
    base = str(llama / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert diagnose(tmp_path / "adapter", base, ["peft"]).verdict.startswith("Sound for peft")
    assert not export_adapter(tmp_path / "adapter", tmp_path / "lora", base=base).notes


def test_an_adapter_of_a_model_without_its_head_is_held_against_that_class(
    llama: Path, tmp_path: Path
) -> None:
    base = str(llama / "base")
    config = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="FEATURE_EXTRACTION"
    )
    get_peft_model(transformers.AutoModel.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    assert diagnose(tmp_path / "adapter", base, ["peft"]).verdict.startswith("Sound for peft")
    assert not merge(base, tmp_path / "adapter", tmp_path / "merged").notes


def test_names_of_gpt2_without_transformer_on_disk_are_those_with_it_in_memory(tmp_path: Path) -> None:
    tiny.gpt2().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    short = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(short, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    options: dict[str, Any] = {
        "target_modules": ["c_attn", "c_proj"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(load(tmp_path / "base"), LoraConfig(r=2, init_lora_weights=False, **options))
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert apart(logits(load(tmp_path / "merged")), logits(model)) < 1e-5


def test_targets_are_matched_as_peft_matches_them() -> None:
    assert targets_module({"target_modules": ["q_proj"]}, "model.layers.0.q_proj")
    assert not targets_module({"target_modules": ["q_proj"]}, "model.layers.0.xq_proj")
    assert targets_module({"target_modules": r".*\.[qv]_proj"}, "layers.0.q_proj")
    assert not targets_module(
        {"target_modules": ["q_proj"], "exclude_modules": ["0.q_proj"]}, "layers.0.q_proj"
    )


def test_layers_that_a_configuration_leaves_out_are_not_missing_and_the_others_are() -> None:
    config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    assert targets_module(config, "model.layers.1.q_proj")
    assert not targets_module(config, "model.layers.0.q_proj")
    assert targets_module({"target_modules": "all-linear"}, "model.layers.0.q_proj")


@upstream.needs("PEFT converts experts of their own since 0.19", transformers="5", peft="0.19")
def test_experts_that_are_modules_on_disk_alone_merge_there_as_peft_loads_them(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"lora_alpha": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(load(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"], **options))
    model.save_pretrained(tmp_path / "adapter")
    # As transformers 4 had them, and PEFT's adapters of that time.
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    for expert in (0, 1):
        for name, rows, columns in (("w1", 48, 32), ("w2", 32, 48), ("w3", 48, 32)):
            path = f"{PREFIX}model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, columns)
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, 2)
    targets = ["q_proj", "w1", "w2", "w3"]
    old = respell(tmp_path / "adapter", tmp_path / "old", lambda key: key, target_modules=targets)
    save_file(tensors, old / WEIGHTS)
    live = with_stock_peft(load(tmp_path / "base"), old)  # PEFT warns of a pattern that it made itself
    merge(tmp_path / "base", old, tmp_path / "merged")
    assert apart(logits(load(tmp_path / "merged")), live) < 1e-5
    assert diagnose(old, str(tmp_path / "base"), ["peft"]).verdict.startswith("Sound for peft")


@upstream.needs("experts are one tensor in memory since transformers 5", transformers="5")
def test_weights_that_are_put_together_of_several_on_disk_are_not_merged_into(llama: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    folder = llama / "mixtral"
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    weights = open_weights(folder)
    fit = fit_to_base(read_adapter(llama / "lora"), weights, "mixtral")
    converted = [name for name, tensor in fit.names.tensors.items() if tensor.is_converted]
    assert len(converted) == 4 and not fit.faults
    with pytest.raises(ModelError, match="so it cannot be merged into on disk"):
        replace(
            fit, names=replace(fit.names, tensors={"a.weight": fit.names.tensors[converted[0]]})
        ).stored_name("a")
