"""EVA's start: PEFT computes the components, by the same call as for LoRA, and its LoRA is the judge."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)
from torch import Tensor, nn

import laws
import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE
from moslora.adapters.export import export_adapter
from moslora.errors import RecipeError
from moslora.recipe.loading import load_recipe
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, relative_error

# What PEFT says to its own.
pytestmark = pytest.mark.filterwarnings(
    "ignore:lora with eva initialization used with low_cpu_mem_usage=False"
)
TARGETS = ["q_proj", "down_proj", "up_proj"]
SETTINGS = {"init_lora_weights": "eva", "r": 4, "lora_alpha": 6, "target_modules": TARGETS}


def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


def data(batches: int = 3) -> list[dict[str, Tensor]]:
    rows = [tiny.tokens(rows=4, length=16, seed=seed) for seed in range(batches)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def fresh(cls: type = MoSLoRAConfig, **changes: object) -> PeftModel:
    torch.manual_seed(1)
    config = {"eva_config": EvaConfig(rho=2.0, tau=0.9), **SETTINGS, **changes}
    return get_peft_model(tiny.llama(), cls(**config)).eval()


def begun(cls: type = MoSLoRAConfig, **changes: object) -> PeftModel:
    model = fresh(cls, **changes)
    initialize_lora_eva_weights(model, data(), show_progress_bar=False)
    return model


def layers(model: nn.Module) -> dict[str, MoSLoRALayer]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MoSLoRALayer)}


@torch.no_grad()
def move(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return model


@pytest.mark.parametrize("adjusts", [True, False])
@pytest.mark.parametrize("whiten", [True, False])
def test_ranks_scales_and_components_are_those_of_pefts_lora(adjusts: bool, whiten: bool) -> None:
    eva = {"rho": 2.0, "tau": 0.9, "adjust_scaling_factors": adjusts, "whiten": whiten}
    ours, lora = (
        begun(cls, **more, eva_config=EvaConfig(**eva))
        for cls, more in ((MoSLoRAConfig, {"mixer": "identity"}), (LoraConfig, {}))
    )
    assert torch.equal(run(ours), run(tiny.llama()))
    judged = dict(lora.named_modules())
    found = layers(ours)
    assert {n for n, m in judged.items() if hasattr(m, "lora_A")} == found.keys()
    assert len({layer.r["default"] for layer in found.values()}) > 1, "no rank was redistributed"
    for name, layer in found.items():
        other = judged[name]
        assert (layer.r, layer.scaling) == (other.r, other.scaling)
        assert torch.equal(layer.moslora_A["default"].weight, other.lora_A["default"].weight)
        assert not layer.moslora_B["default"].weight.any() and layer.moslora_A["default"].weight.any()
    for model in (ours, lora):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
        run(model).square().mean().backward()
    assert relative_error(run(ours), run(lora)) < MODEL
    gradients = laws.factors_by_key(ours)
    for name, p in laws.factors_by_key(lora).items():
        assert relative_error(gradients[name.replace("lora_", "moslora_")].grad, p.grad) < MODEL


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "identity", "a callable"])
@pytest.mark.parametrize("match_scale", [False, True])
@torch.no_grad()
def test_it_begins_at_the_base_with_the_mixer_asked_for(mixer: str, match_scale: bool) -> None:
    model = begun(
        mixer=(lambda r: torch.eye(r).roll(1, 0)) if mixer == "a callable" else mixer, match_scale=match_scale
    )
    assert torch.equal(run(model), run(tiny.llama()))
    for layer in layers(model).values():
        A, M, _, _ = layer.factors("default")
        assert relative_error(A @ A.T, torch.eye(len(A))) < 1000 * RELATIVE[torch.float32]
        assert A.dtype == M.dtype == torch.float32 and M.isfinite().all()
        if match_scale:
            assert relative_error((M @ A).norm(), A.norm()) < RELATIVE[torch.float32]
        elif mixer in ("orthogonal", "a callable"):
            assert relative_error(M @ M.T, torch.eye(len(M))) < RELATIVE[torch.float32]
    trained = {n.split("moslora_")[1][0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "M", "B"}


@torch.no_grad()
def test_nothing_runs_before_it_has_begun() -> None:
    model = fresh()
    with pytest.raises(
        ValueError, match=r"has no values: .*initialize_lora_eva_weights\(model, dataloader\)"
    ):
        run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(tiny.llama()))


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_it_is_saved_loaded_switched_merged_and_exported(dora: bool, tmp_path: Path) -> None:
    model = move(begun(use_dora=dora, rank_pattern={"up_proj": 6}))
    expected, base = run(model), run(tiny.llama())
    assert relative_error(base, expected) > 100 * MODEL
    model.save_pretrained(tmp_path / "native")
    said = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    assert said["init_lora_weights"] == "eva" and said["eva_config"]["rho"] == 2.0
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native", low_cpu_mem_usage=low)
        assert torch.equal(run(again.eval()), expected)
        assert again.peft_config["default"].eva_config == EvaConfig(rho=2.0, tau=0.9)
    by_transformers = tiny.llama()
    by_transformers.load_adapter(str(tmp_path / "native"))
    assert torch.equal(run(by_transformers), expected)
    proof = export_adapter(tmp_path / "native", tmp_path / "lora")
    assert proof.max_relative_error <= FOLD_TOLERANCE
    theirs = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora").eval()
    assert type(theirs.peft_config["default"]) is LoraConfig
    assert relative_error(run(theirs), expected) < MODEL
    assert torch.equal(run(copy.deepcopy(model)), expected)
    model.add_adapter("other", MoSLoRAConfig(target_modules=["q_proj"], init_lora_weights=False, r=2))
    if not dora:
        model.add_weighted_adapter(["default"], [1.0], "same")
        model.set_adapter("same")
        assert relative_error(run(model), expected) < MODEL
    model.set_adapter("other")
    assert not torch.equal(run(model), expected)
    model.set_adapter("default")
    assert torch.equal(run(model), expected)
    model.merge_adapter()
    assert relative_error(run(model), expected) < MODEL
    model.unmerge_adapter()
    assert relative_error(run(model.merge_and_unload(safe_merge=True)), expected) < MODEL


@torch.no_grad()
def test_modules_that_get_nothing_are_left_without_the_adapter(tmp_path: Path) -> None:
    model = fresh()
    parts = {n: torch.eye(3, layer.in_features) for n, layer in layers(model).items()}
    gone = [name for name in parts if "layers.0" in name and "q_proj" not in name]
    parts |= {name: part[:0] for name, part in parts.items() if name in gone}
    initialize_lora_eva_weights(model, eva_state_dict=parts)
    assert layers(model).keys() == parts.keys() - set(gone)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in gone)
    expected = run(move(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert layers(loaded).keys() == layers(model).keys() and torch.equal(run(loaded), expected)
    flat = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    config = MoSLoRAConfig(init_lora_weights="eva", r=2, target_modules=r"0|1\.\d")
    model = get_peft_model(flat, config)
    model.add_adapter("other", MoSLoRAConfig(r=2, target_modules=r"0|1\.\d"))
    parts = {"0": torch.eye(2, 6), "1.0": torch.eye(1, 5), "1.1": torch.empty(0, 4)}
    initialize_lora_eva_weights(model, eva_state_dict=parts)
    last = model.base_model.model[1][1]
    assert list(last.scaling) == ["other"] and last.active_adapters == []
    assert not last.moslora_B["other"].weight.requires_grad
    assert model.peft_config["default"].target_modules == r"(0|1\.0)"
    model.save_pretrained(tmp_path / "flat", selected_adapters=["default"])
    plain = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    again = PeftModel.from_pretrained(plain, tmp_path / "flat")
    ranks = {name: layer.r["default"] for name, layer in layers(again).items()}
    assert {name.removeprefix("base_model.model."): r for name, r in ranks.items()} == {"0": 2, "1.0": 1}


@torch.no_grad()
def test_bases_in_low_precision_and_factors_without_memory_begin_alike() -> None:
    config = MoSLoRAConfig(**SETTINGS, eva_config={"rho": 2.0, "tau": 0.9})
    torch.manual_seed(1)
    model = get_peft_model(tiny.llama().bfloat16(), config, low_cpu_mem_usage=True).eval()
    assert all(p.is_meta for p in laws.factors_by_key(model).values())
    initialize_lora_eva_weights(model, data(), show_progress_bar=False)
    assert all(p.dtype == torch.float32 for p in laws.factors_by_key(model).values())
    assert torch.equal(run(model), run(tiny.llama().bfloat16()))
    move(model)
    assert not torch.equal(run(model), run(tiny.llama().bfloat16()))


@torch.no_grad()
def test_only_layers_of_the_adapter_itself_share_its_ranks() -> None:
    model = fresh(target_modules=["q_proj"])
    model.add_adapter("other", MoSLoRAConfig(target_modules=["embed_tokens", "v_proj"], r=2))
    found = get_eva_state_dict(model, data(), show_progress_bar=False)
    assert len(found) == 2 and all("q_proj" in name for name in found)
    assert sum(map(len, found.values())) == 2 * 4
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert torch.equal(run(model), run(tiny.llama()))


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = fresh(mixer="two-subspace")
    name = next(iter(layers(model)))
    good = {n: torch.eye(4, layer.in_features) for n, layer in layers(model).items()}
    for change, message in (
        ({"model.layers.9.q_proj": torch.eye(4)}, "1 components fit no adapted module"),
        ({name: torch.eye(4)}, r"of shape \(4, 4\), or not finite"),
        ({name: good[name] * float("nan")}, "or not finite"),
        ({name: good[name][:3]}, r"EVA gave a module rank 3.*rho=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize_lora_eva_weights(model, eva_state_dict={**good, **change})
        assert all(layer.r == {"default": 4} and layer.unfilled for layer in layers(model).values())
    good.pop(name)
    with pytest.warns(UserWarning, match="1 modules have no components of their own"):
        initialize_lora_eva_weights(model, eva_state_dict=good)
    with torch.no_grad():
        assert torch.equal(run(model), run(tiny.llama()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_lora_weights": "eva", "eva_config": 5}, "must be a peft.EvaConfig"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho"),
    ],
)
def test_configurations_without_a_meaning_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSLoRAConfig(**arguments)


def test_a_configuration_of_eva_for_another_start_is_told_of() -> None:
    with pytest.warns(UserWarning, match="eva_config is without effect"):
        assert MoSLoRAConfig(eva_config=EvaConfig(rho=1.0)).eva_config is None
    for neutral in (None, {}, EvaConfig(), dataclasses.asdict(EvaConfig())):
        assert MoSLoRAConfig(eva_config=neutral).eva_config is None
    assert MoSLoRAConfig(init_lora_weights="eva").eva_config == EvaConfig()


def test_other_layers_and_recipes_cannot_begin_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be used with this Embedding: it is there for linear layers"):
        get_peft_model(
            nn.Sequential(nn.Embedding(8, 4)), MoSLoRAConfig(**{**SETTINGS, "target_modules": ["0"]})
        )
    with pytest.raises(RecipeError, match=r"adapter\.init_lora_weights=eva cannot be set"):
        load_recipe(["model=org/base", "data=org/examples", "adapter.init_lora_weights=eva"])


def test_pefts_own_lora_is_left_as_it_is() -> None:
    assert peft.initialize_lora_eva_weights is initialize_lora_eva_weights
    model = begun(LoraConfig)
    with torch.no_grad():
        assert torch.equal(run(model), run(tiny.llama()))
