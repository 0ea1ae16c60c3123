"""LoftQ's start: an adapter on a quantized base begins as what quantization took from the weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft import LoftQConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import kinds
from moslora import MoSLoRAConfig, replace_lora_weights_loftq
from moslora.adapters.arithmetic import FOLD_TOLERANCE
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.errors import RecipeError
from moslora.recipe.loading import load_recipe
from moslora.tuner.layer import MoSLoRALayer
from test_tuner_quantized import Packed
from tolerances import MODEL, RELATIVE, relative_error

# PEFT knows no sizes of layers that are not its own, and says so when it guesses them right.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
SETTINGS = {"init_lora_weights": "loftq", "r": 4, "lora_alpha": 8, "target_modules": ["0", "2", "3"]}


def unquantized() -> nn.Module:
    """Coarse values, of which 64ths take a good part; the last layer is not quantized."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.Linear(8, 6)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.1)
    return model


def quantized() -> nn.Module:
    model = unquantized()
    for i in (0, 2):
        model[i] = Packed(model[i])
    return model


def run(model: nn.Module) -> Tensor:
    return model(torch.randn(5, 12, generator=torch.Generator().manual_seed(4)))


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with kinds.packed_is_known():
        yield


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "base" / "model.safetensors"
    path.parent.mkdir()
    save_file(dict(unquantized().state_dict()), path)
    return str(path)


def fresh(**changes: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(quantized(), MoSLoRAConfig(**{**SETTINGS, **changes})).eval()


def begun(weights: str, **changes: object) -> PeftModel:
    model = fresh(**changes)
    replace_lora_weights_loftq(model, weights)
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


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@torch.no_grad()
def test_it_begins_as_the_principal_part_of_what_was_lost(
    weights: str, rslora: bool, low_cpu_mem_usage: bool
) -> None:
    whole, config = unquantized(), MoSLoRAConfig(**SETTINGS, use_rslora=rslora)
    model = get_peft_model(quantized(), config, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    replace_lora_weights_loftq(model, weights)
    for name, layer in layers(model).items():
        A, M, B, s = layer.factors("default")
        W = whole.get_submodule(name.removeprefix("base_model.model.")).weight
        lost = W - layer.get_base_weight()
        if not name.endswith(("0", "2")):
            assert not lost.any() and not B.any() and torch.equal(M, torch.eye(4)) and A.any()
            continue
        U, S, Vh = torch.linalg.svd(lost)
        assert relative_error(s * B @ M @ A, (U[:, :4] * S[:4]) @ Vh[:4]) < MODEL
        assert torch.equal(M, torch.diag(M.diag())) and relative_error(B.T @ B, torch.eye(4)) < MODEL
        left = float((lost - s * B @ M @ A).norm())
        assert (
            abs(left / float(S[4:].norm()) - 1) < 100 * RELATIVE[torch.float32] and left < 0.9 * lost.norm()
        )
    assert (run(model) - run(whole)).norm() < 0.9 * (run(quantized()) - run(whole)).norm()
    trained = {n.split("moslora_")[1][0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "M", "B"}


@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_it_is_saved_loaded_switched_merged_and_exported(dora: bool, weights: str, tmp_path: Path) -> None:
    started = begun(weights, use_dora=dora)
    plain = begun(weights)
    assert (
        relative_error(run(started), run(plain)) < MODEL
    )  # a magnitude begins as the norm of what has begun
    model = move(started)
    expected = run(model)
    model.save_pretrained(tmp_path / "native")
    said = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    assert (said["init_lora_weights"], said["mixer"]) == ("loftq", "singular-values")
    for low in (False, True):
        again = PeftModel.from_pretrained(quantized(), tmp_path / "native", low_cpu_mem_usage=low)
        assert torch.equal(run(again.eval()), expected)
    proof = export_adapter(tmp_path / "native", tmp_path / "lora")
    assert proof.max_relative_error <= FOLD_TOLERANCE
    ranks = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert ranks["r"] == 4 and ranks["init_lora_weights"] is True  # nothing is subtracted, so no rank more
    export_adapter(tmp_path / "lora", tmp_path / "lifted", to="native")
    export_adapter(tmp_path / "native", tmp_path / "again", to="native")
    for name in ("lifted", "again"):
        assert relative_error(run(PeftModel.from_pretrained(quantized(), tmp_path / name)), expected) < MODEL
    assert diagnose(tmp_path / "native", None, ["peft"]).is_usable
    assert torch.equal(run(copy.deepcopy(model)), expected)
    model.add_adapter("other", MoSLoRAConfig(target_modules=["0"], init_lora_weights=False, r=2))
    model.set_adapter("other")
    assert not torch.equal(run(model), expected)
    model.set_adapter("default")
    assert torch.equal(run(model), expected)
    if not dora:
        model.add_weighted_adapter(["default"], [1.0], "same")
        model.set_adapter("same")
        assert relative_error(run(model), expected) < MODEL


@torch.no_grad()
def test_nothing_runs_before_it_has_begun_and_pefts_own_name_begins_it(weights: str) -> None:
    model = fresh()
    with pytest.raises(ValueError, match=r"has no values: .*replace_lora_weights_loftq\(model, path\)"):
        run(model)
    with model.disable_adapter():
        assert torch.equal(run(model), run(quantized()))
    peft.replace_lora_weights_loftq(model, model_path=str(Path(weights).parent))
    assert torch.equal(run(model), run(begun(weights)))
    lora = get_peft_model(unquantized(), LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"bitsandbytes must be installed|No bnb LoRA module"):
        peft.replace_lora_weights_loftq(lora, weights)  # theirs is as it was


@torch.no_grad()
def test_a_callback_may_take_a_start_back(weights: str) -> None:
    asked = []

    def keep(model: nn.Module, path: str) -> bool:
        asked.append(path)
        return path == "2"

    model = fresh()
    replace_lora_weights_loftq(model, weights, callback=keep)
    assert asked == ["0", "2"]
    first, second, _ = layers(model).values()
    assert not first.moslora_B["default"].weight.any() and second.moslora_B["default"].weight.any()
    assert torch.equal(first.factors("default")[1], torch.eye(4))
    started = begun(weights)
    before = run(started)
    replace_lora_weights_loftq(started, weights, callback=lambda *_: False)
    assert torch.equal(run(started), before)


@torch.no_grad()
def test_a_configuration_of_plain_lora_becomes_one_of_loftq(weights: str, tmp_path: Path) -> None:
    model = begun(weights, init_lora_weights=True)
    assert torch.equal(run(model), run(begun(weights)))
    model.save_pretrained(tmp_path / "one")
    assert torch.equal(run(PeftModel.from_pretrained(quantized(), tmp_path / "one")), run(model))


@torch.no_grad()
def test_another_base_is_refused_or_told_of(weights: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapted layer of this base is quantized.*load_in_4bit=True"):
        get_peft_model(unquantized(), MoSLoRAConfig(**SETTINGS))
    begun(weights).save_pretrained(tmp_path / "one")
    with pytest.warns(UserWarning, match="Load the base quantized as in training"):
        PeftModel.from_pretrained(unquantized(), tmp_path / "one")
    with pytest.raises(ValueError, match=r"no file was loaded"):
        run(get_peft_model(quantized(), MoSLoRAConfig.from_pretrained(tmp_path / "one")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, w: replace_lora_weights_loftq(m, w, "other"), r"no adapter 'other'; it has \['default'\]"),
        (lambda m, w: m.merge_adapter() or replace_lora_weights_loftq(m, w), "Call unmerge_adapter"),
        (
            lambda m, w: replace_lora_weights_loftq(fresh(init_lora_weights=True, mixer="gaussian"), w),
            "mixer='gaussian'",
        ),
        (lambda m, w: replace_lora_weights_loftq(fresh(r=9), w), r"rank 9 with a scale.*Set r to 8 at most"),
        (
            lambda m, w: replace_lora_weights_loftq(fresh(target_modules=["3"], init_lora_weights=True), w),
            "No quantized",
        ),
    ],
    ids=["name", "merged", "mixer", "rank", "nothing"],
)
def test_what_has_no_meaning_is_refused(change: Callable[..., None], message: str, weights: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(begun(weights), weights)


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"0.weight is of shape \(3, 3\) in the file, and of \(16, 12\)"):
        replace_lora_weights_loftq(fresh(), str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loftq_config": LoftQConfig(loftq_iter=2)}, "loftq_iter=2: more iterations quantize"),
        ({"loftq_config": 4}, r"must be a peft\.LoftQConfig"),
        ({"mixer": "gaussian"}, "makes M singular values"),
    ],
)
def test_configurations_without_a_meaning_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSLoRAConfig(init_lora_weights="loftq", **arguments)


def test_a_configuration_of_loftq_travels_and_is_told_of_where_it_does_nothing() -> None:
    config = MoSLoRAConfig(init_lora_weights="loftq", loftq_config=LoftQConfig())
    assert config.to_dict()["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    with pytest.warns(UserWarning, match="loftq_config is without effect"):
        assert MoSLoRAConfig(loftq_config={"loftq_bits": 8}).loftq_config == {}
    for neutral in (None, {}, LoftQConfig(), {"loftq_bits": 4, "loftq_iter": 1}):
        assert MoSLoRAConfig(loftq_config=neutral).loftq_config == {}
    with pytest.raises(RecipeError, match=r"adapter\.init_lora_weights=loftq cannot be set"):
        load_recipe(["model=org/base", "data=org/examples", "adapter.init_lora_weights=loftq"])
