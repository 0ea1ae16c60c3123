"""Several adapters in one model: mixed batches, weighted sums, hot-swapping, and rates of their own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils import merge_utils
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import laws
import tiny
import upstream
from moslora import MoSLoRAConfig, param_groups
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, relative_error
from upstream import WHOLE

TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**changes: Any) -> MoSLoRAConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
    return MoSLoRAConfig(**{**settings, **changes})


def lora_config(**changes: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **changes}
    )


def with_two(model: nn.Module | None = None, **other: Any) -> Any:
    """A model with the adapters "default" and "other"; B is random, so that both do something."""
    torch.manual_seed(0)
    adapted = get_peft_model(model or tiny.llama(), config())
    adapted.add_adapter("other", config(**other))
    return adapted.eval()


def layers_of(model: Any) -> dict[str, MoSLoRALayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MoSLoRALayer)}


@torch.no_grad()
def logits_of(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(ids).logits
    model.set_adapter(name)
    return model(ids).logits


@torch.no_grad()
def test_a_mixed_batch_gives_each_row_what_its_own_adapter_gives_it() -> None:
    model = with_two(r=2)
    names, ids = ["other", "__base__", "default", "other"], tiny.tokens(rows=4)
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = logits_of(model, name, ids[row : row + 1])
        assert relative_error(mixed[row : row + 1], alone) < MODEL
    base, default = logits_of(model, "__base__", ids), logits_of(model, "default", ids)
    assert relative_error(base, default) > 100 * MODEL


@torch.no_grad()
def test_generation_from_a_mixed_batch_equals_generation_row_by_row() -> None:
    model = with_two()
    names, ids = ["other", "default", "__base__"], tiny.tokens(rows=3, length=5)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 2):
        mixed = model.generate(input_ids=ids, adapter_names=names, num_beams=beams, **settings)
        for row, name in enumerate(names):
            single = ids[row : row + 1]
            alone = model.generate(input_ids=single, adapter_names=[name], num_beams=beams, **settings)
            assert torch.equal(mixed[row], alone[0])


@torch.no_grad()
def test_a_mixed_batch_leaves_no_trace() -> None:
    model, ids = with_two(), tiny.tokens()
    before = logits_of(model, "default", ids)
    model(ids, adapter_names=["other", "__base__"])
    with pytest.raises(ValueError, match="one name per row"):
        model(ids, adapter_names=["other"])
    assert torch.equal(model(ids).logits, before)
    assert not any(layer._forward_pre_hooks for layer in layers_of(model).values())


def test_mixed_batches_that_cannot_be_obeyed_are_refused() -> None:
    model, ids = with_two(), tiny.tokens()
    with pytest.raises(ValueError, match="has 'nobody'; the model has"):
        model(ids, adapter_names=["nobody", "default"])
    with pytest.raises(ValueError, match="must be a list"):
        model(ids, adapter_names="default")
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(ids, adapter_names=["other", "default"])
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="for inference"):
        model.train()(ids, adapter_names=["other", "default"])


class Words(nn.Module):
    """An embedding, a convolution over the words, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6)
        self.mix = nn.Conv1d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.head(self.mix(self.words(ids).transpose(1, 2)).transpose(1, 2))


@torch.no_grad()
def test_embeddings_and_convolutions_serve_mixed_batches_and_sums_too() -> None:
    torch.manual_seed(0)
    targets = ["words", "mix", "head"]
    model = get_peft_model(Words(), config(target_modules=targets))
    model.add_adapter("other", config(target_modules=targets, r=2))
    model.eval()
    ids = tiny.tokens(rows=2, vocab=20)
    mixed = model(ids, adapter_names=["other", "default"])
    alone = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        alone[name] = model(ids)
    assert relative_error(mixed[0], alone["other"][0]) < MODEL
    assert relative_error(mixed[1], alone["default"][1]) < MODEL
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    for layer in layers_of(model).values():
        expected = 0.5 * layer.get_delta_weight("default") - 2.0 * layer.get_delta_weight("other")
        assert relative_error(layer.get_delta_weight("sum"), expected) < RELATIVE[torch.float32]


@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_a_weighted_adapter_is_the_weighted_sum_of_delta_weights(kind: str) -> None:
    model = with_two(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
    model.add_weighted_adapter(["default", "other"], [0.7, -1.5], "sum", combination_type=kind)
    seen = set()
    for layer in layers_of(model).values():
        parts = {"default": 0.7, "other": -1.5}
        expected = sum(w * layer.get_delta_weight(n) for n, w in parts.items() if n in layer.scaling)
        assert isinstance(expected, torch.Tensor)
        assert relative_error(layer.get_delta_weight("sum"), expected) < RELATIVE[torch.float32]
        seen.add(layer.r["sum"])
    assert seen == {2, 4, 6}


@torch.no_grad()
def test_weight_one_is_the_identity_and_survives_saving(tmp_path: Path) -> None:
    model, ids = with_two(r=2, target_modules=["q_proj"]), tiny.tokens()
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum")
    assert model.active_adapter == "default"
    assert relative_error(logits_of(model, "same", ids), logits_of(model, "default", ids)) < MODEL
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "sum").eval()
    assert relative_error(again(ids).logits, logits_of(model, "sum", ids)) < MODEL


@torch.no_grad()
def test_svd_is_exact_at_the_sum_of_the_ranks_and_nearest_below() -> None:
    model = with_two(r=2)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "whole", "svd", svd_rank=6)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "near", "svd", svd_rank=3)
    for layer in layers_of(model).values():
        delta = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        assert relative_error(layer.get_delta_weight("whole"), delta) < RELATIVE[torch.float32]
        lost = torch.linalg.svdvals(delta.double())[3:].norm()
        found = (layer.get_delta_weight("near") - delta).double().norm()
        assert abs(float(found - lost)) < MODEL * float(delta.norm())


PRUNING = {
    "magnitude_prune": {},
    "dare_linear": {},
    "ties": {},
    "ties_svd": {"majority_sign_method": "frequency"},
    "dare_ties": {"majority_sign_method": "frequency"},
}


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("kind", PRUNING)
def test_ties_and_dare_are_those_of_peft_on_delta_weights(kind: str, density: float) -> None:
    """At the full rank nothing is lost of what PEFT's own functions make of the ΔW of each adapter."""
    model = with_two(r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    model.add_weighted_adapter(
        ["default", "other"], [0.7, -1.5], "sum", kind, svd_rank=64, density=density, **PRUNING[kind]
    )
    merge: Any = getattr(merge_utils, kind.removesuffix("_svd"))
    torch.manual_seed(3)
    for layer in layers_of(model).values():
        weights = {n: w for n, w in (("default", 0.7), ("other", -1.5)) if n in layer.scaling}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that a density of 1 prunes nothing
            expected = merge(
                [layer.get_delta_weight(n) for n in weights],
                torch.tensor(list(weights.values())),
                density,
                **PRUNING[kind],
            )
            if kind.startswith("dare") and upstream.lacking({"peft": "0.19"}):
                expected = expected / density  # which PEFT computes there, and drops
        assert relative_error(layer.get_delta_weight("sum"), expected) < MODEL


@upstream.needs("PEFT scales each sum twice before", peft="0.21")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["ties_svd", "magnitude_prune_svd"])
def test_a_pruned_sum_of_a_rank_is_what_peft_makes_of_the_folded_loras(kind: str) -> None:
    """Random choices aside, which depend on how often each of the two has drawn before."""
    arguments = {"combination_type": kind, "density": 0.4, "svd_rank": 3}
    ours, lora = with_two(), get_peft_model(tiny.llama(), lora_config())
    lora.add_adapter("other", lora_config())
    held = dict(lora.named_modules())
    for path, layer in layers_of(ours).items():
        for name in ("default", "other"):
            A, M, B, _ = layer.factors(name)
            held[path].lora_A[name].weight.copy_(M @ A)
            held[path].lora_B[name].weight.copy_(B)
    for model in (ours, lora):
        model.add_weighted_adapter(["default", "other"], [0.6, 0.9], "sum", **arguments)
    for path, layer in layers_of(ours).items():
        expected = held[path].get_delta_weight("sum")
        assert relative_error(layer.get_delta_weight("sum"), expected) < MODEL


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"adapters": ["default", "nobody"], "weights": [1.0, 1.0]}, "has 'nobody'"),
        ({"weights": [1.0, 2.0]}, "a weight for each"),
        ({"weights": [float("nan")]}, "not a finite number"),
        ({"adapter_name": "other"}, "already"),
        ({"combination_type": "mean"}, "unknown; choose one of"),
        ({"combination_type": "cat", "svd_rank": 4}, "svd_rank"),
        ({"combination_type": "ties"}, r"needs density.*\(0, 1\]; found None"),
        ({"combination_type": "ties", "density": 0.0}, "found 0.0"),
        ({"combination_type": "dare_linear", "density": 1.5}, "found 1.5"),
        ({"density": 0.5}, r"density=0.5 needs.*'ties'"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "loudest"}, "'frequency'"),
        ({"majority_sign_method": "frequency"}, "elects signs"),
        ({"combination_type": "svd", "svd_clamp": 0.9}, "svd_clamp=0.9 cannot be used: it clips"),
        ({"combination_type": "svd", "svd_driver": "gesvd"}, "svd_driver='gesvd' cannot be used"),
    ],
)
def test_senseless_sums_are_refused_and_change_nothing(arguments: Any, match: str) -> None:
    model = with_two()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        model.add_weighted_adapter(
            **{"adapters": ["default"], "weights": [1.0], "adapter_name": "sum", **arguments}
        )
    after = model.state_dict()
    assert set(model.peft_config) == {"default", "other"}
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def test_adapters_that_train_more_than_factors_are_not_summed() -> None:
    model = get_peft_model(tiny.llama(), config(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default"], [2.0], "twice")


@torch.no_grad()
def test_hot_swapping_puts_one_adapter_in_the_place_of_another(tmp_path: Path) -> None:
    model, ids = with_two(), tiny.tokens()
    expected = logits_of(model, "other", ids)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    fresh = get_peft_model(tiny.llama(), config()).eval()
    assert relative_error(fresh(ids).logits, expected) > 100 * MODEL
    hotswap_adapter(fresh, tmp_path / "other", adapter_name="default")
    assert torch.equal(fresh(ids).logits, expected)


@pytest.mark.parametrize("own", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True}], ids=str)
@torch.no_grad()
def test_hot_swapping_takes_a_lower_rank_another_scale_and_fewer_modules(
    own: dict[str, Any], tmp_path: Path
) -> None:
    """What is swapped in can be saved from there, and merged."""
    ids = tiny.tokens()
    fewer = {} if own.get("use_dora") else {"target_modules": ["q_proj", "down_proj"]}
    new = get_peft_model(
        tiny.llama(), config(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"q_proj": 3}, **fewer, **own)
    )
    generator = torch.Generator().manual_seed(2)
    for p in laws.factors_by_key(new).values():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    expected = new.eval()(ids).logits
    new.save_pretrained(tmp_path / "new")
    model = get_peft_model(tiny.llama(), config(**own)).eval()
    assert relative_error(model(ids).logits, expected) > 100 * MODEL
    held = {name: p.data_ptr() for name, p in laws.factors_by_key(model).items()}
    hotswap_adapter(model, tmp_path / "new", adapter_name="default")
    assert relative_error(model(ids).logits, expected) < MODEL
    assert held == {name: p.data_ptr() for name, p in laws.factors_by_key(model).items()}
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "again")
    assert relative_error(again(ids).logits, expected) < MODEL
    assert relative_error(again.merge_and_unload()(ids).logits, expected) < MODEL


@torch.no_grad()
def test_ranks_are_raised_before_compiling_so_that_higher_ones_can_be_swapped_in(tmp_path: Path) -> None:
    ids = tiny.tokens()
    settings = {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"q_proj": 2}}
    adapters = {"low": config(r=2, lora_alpha=4), "high": config(r=8, lora_alpha=3, use_rslora=True)}
    expected = {}
    for name, its in adapters.items():
        torch.manual_seed(len(name))
        new = get_peft_model(tiny.llama(), its).eval()
        new.save_pretrained(tmp_path / name)
        expected[name] = new(ids).logits
    model = get_peft_model(tiny.llama(), config(**settings)).eval()
    before = model(ids).logits
    with pytest.raises(ValueError, match=r"rank 8 does not fit into rank 2.*target_rank=8"):
        hotswap_adapter(model, tmp_path / "high", adapter_name="default")
    with pytest.raises(ValueError, match=r"rank 4.*cannot be made 3"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    assert torch.equal(model(ids).logits, before)
    state = torch.get_rng_state()
    model = get_peft_model(tiny.llama(), config()).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert {layer.r["default"] for layer in layers_of(model).values()} == {8}
    compilations: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        compilations.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=WHOLE, backend=backend)
    for name in ("high", "low", "high"):
        compiled(ids, use_cache=False)
        hotswap_adapter(compiled, tmp_path / name, adapter_name="default")
        assert relative_error(compiled(ids, use_cache=False).logits, expected[name]) < MODEL
    assert len(compilations) == 1
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "again").eval()
    assert relative_error(again(ids).logits, expected["high"]) < MODEL
    torch.set_rng_state(state)


@torch.no_grad()
def test_raising_ranks_changes_nothing_but_the_ranks(tmp_path: Path) -> None:
    settings = {
        "target_modules": ["words", "mix", "head"],
        "rank_pattern": {"mix": 2},
        "alpha_pattern": {"head": 5},
    }
    torch.manual_seed(0)
    model = get_peft_model(Words(), config(**settings)).eval()
    ids = tiny.tokens(rows=2, vocab=20)
    expected, trained = model(ids), {n: p.requires_grad for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(model(ids), expected) < MODEL
    assert trained == {n: p.requires_grad for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Words(), tmp_path).eval()
    assert relative_error(again(ids), expected) < MODEL


def test_an_adapter_that_is_merged_or_of_another_kind_keeps_its_place(tmp_path: Path) -> None:
    model = with_two()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged into the base weights"):
        hotswap_adapter(model, tmp_path / "other", adapter_name="default")
    with pytest.raises(ValueError, match="incompatible: for use_dora"):
        hotswap_adapter(
            get_peft_model(tiny.llama(), config(use_dora=True)), tmp_path / "other", adapter_name="default"
        )
    torch.manual_seed(0)
    elsewhere = get_peft_model(tiny.llama(), config(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="fits no adapted module"):
        hotswap_adapter(elsewhere, tmp_path / "other", adapter_name="default")


@torch.no_grad()
def test_a_scale_is_rescaled_by_pefts_helper_and_comes_back() -> None:
    model, ids = with_two(), tiny.tokens()
    before, base = model(ids).logits, logits_of(model, "__base__", ids)
    with rescale_adapter_scale(model, 0.0):
        assert relative_error(model(ids).logits, base) < MODEL
    with rescale_adapter_scale(model, 0.5):
        halved = [layer.get_delta_weight("default") for layer in layers_of(model).values()]
    for layer, half in zip(layers_of(model).values(), halved, strict=True):
        assert relative_error(2 * half, layer.get_delta_weight("default")) < RELATIVE[torch.float32]
    assert torch.equal(model(ids).logits, before)


def test_parameter_groups_hold_every_trained_parameter_once() -> None:
    model = get_peft_model(tiny.llama(), config(modules_to_save=["norm", "lm_head"]))
    groups = param_groups(model, 1e-3, mixer_lr_ratio=0.5, b_lr_ratio=4, weight_decay=0.1)
    ours = [id(p) for group in groups for p in group["params"]]
    assert sorted(ours) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "A": (1e-3, 0.1),
        "mixer": (5e-4, 0.1),
        "B": (4e-3, 0.1),
        "other": (1e-3, 0.1),
        "vectors": (1e-3, 0.0),
    }


def test_a_mixer_with_a_ratio_of_zero_does_not_move() -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(), config())
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, mixer_lr_ratio=0.0))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "moslora_" in n}
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if "moslora_" in name:
            assert torch.equal(parameter, before[name]) == ("moslora_M" in name)


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr": 1.0, "b_lr_ratio": -1.0}, {"lr": 1.0, "weight_decay": float("inf")}]
)
def test_senseless_rates_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be a"):
        param_groups(get_peft_model(tiny.llama(), config()), **wrong)


def test_a_model_without_trained_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="trains no MoSLoRA factor"):
        param_groups(tiny.llama(), 1e-3)
