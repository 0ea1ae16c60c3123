"""A trained bias on B: PEFT's LoRA is the judge of outputs, gradients, merged weights and exported files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import laws
import tiny
from moslora import MoSLoRAConfig, param_groups
from moslora.adapters.arithmetic import FOLD_TOLERANCE
from moslora.adapters.combine import combine
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.directory import CONFIG, WEIGHTS
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.inspection import inspect_adapter
from moslora.adapters.merge import merge
from moslora.core import ops
from moslora.errors import AdapterError
from moslora.training.mix import open_mix
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, relative_error

BIASED = {"lora_bias": True, "lora_alpha": 6}
# What PEFT's LoRA says of every layer with groups, and both say where the base has no bias.
pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True"),
]


def lines(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 6, bias=bias), nn.Tanh(), nn.Linear(6, 5, bias=bias)).eval()


def pictures(kind: type[nn.Module], groups: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers = [kind(4, 8, 3, padding=1, groups=groups), nn.Tanh(), kind(8, 4, 2, stride=2, groups=groups)]
    return nn.Sequential(*layers).eval()


def numbers(*shape: int) -> laws.Run:
    def run(model: nn.Module) -> Tensor:
        x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
        return model(x.to(next(p.dtype for p in model.parameters())))

    return run


def read(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


def biased_llama() -> nn.Module:
    return tiny.llama(attention_bias=True, mlp_bias=True)


KINDS = {
    "Linear": (lines, numbers(4, 7), ["0", "2"]),
    "Linear without a bias": (lambda: lines(False), numbers(4, 7), ["0", "2"]),
    "gpt2, Conv1D": (tiny.gpt2, read, ["c_attn", "c_proj"]),
    "Conv1d": (lambda: pictures(nn.Conv1d), numbers(4, 6), ["0", "2"]),
    "Conv2d": (lambda: pictures(nn.Conv2d), numbers(4, 6, 6), ["0", "2"]),
    "Conv2d, groups": (lambda: pictures(nn.Conv2d, 2), numbers(4, 6, 6), ["0", "2"]),
}
MERGEABLE = [kind for kind in KINDS if kind not in ("Linear without a bias", "Conv2d, groups")]


def saved(folder: Path, kind: str = "llama", **settings: object) -> PeftModel:
    """An adapter whose biases have moved, saved."""
    build, _, targets = KINDS.get(kind, (biased_llama, read, ["q_proj", "down_proj"]))
    model = laws.adapt(build, **{"target_modules": targets, **BIASED, **settings})
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", ["identity", "kaiming"])
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_and_gradients_are_those_of_pefts_lora_with_the_mixer_folded(
    kind: str, mixer: str, fused: bool
) -> None:
    build, run, targets = KINDS[kind]
    with ops.fusing(fused):
        laws.hold_to_lora(
            build, run, target_modules=targets, mixer=mixer, fan_in_fan_out="gpt2" in kind, **BIASED
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_lives_through_everything(kind: str, tmp_path: Path) -> None:
    build, run, targets = KINDS[kind]
    laws.live_through(build, run, tmp_path, kind in MERGEABLE, target_modules=targets, **BIASED)
    assert json.loads((tmp_path / CONFIG).read_text())["lora_bias"] is True
    held = load_file(tmp_path / WEIGHTS)
    assert {key.rpartition(".moslora_")[2] for key in held} == {"A.weight", "M.weight", "B.weight", "B.bias"}


@pytest.mark.parametrize("kind", MERGEABLE)
@torch.no_grad()
def test_merged_weights_and_biases_are_those_of_pefts_lora(kind: str) -> None:
    build, _, targets = KINDS[kind]
    settings = {"target_modules": targets, "fan_in_fan_out": "gpt2" in kind, **BIASED}
    ours = laws.adapt(lambda: build().double(), mixer="identity", **settings)
    lora = laws.adapt(lambda: build().double(), LoraConfig, **settings)
    held = laws.factors_by_key(ours)
    for name, p in laws.factors_by_key(lora).items():
        p.copy_(held[name.replace("lora_", "moslora_")])
    merged = [model.merge_and_unload(safe_merge=True).state_dict() for model in (ours, lora)]
    assert merged[0].keys() == merged[1].keys()
    before = build().state_dict()
    for name, tensor in merged[0].items():
        assert relative_error(tensor, merged[1][name]) < RELATIVE[torch.float64]
    changed = {name for name in before if not torch.equal(before[name].double(), merged[0][name])}
    assert len(changed) == 2 * sum(name.endswith(".bias") for name in changed) > 0


@torch.no_grad()
def test_it_starts_at_zero_or_as_pefts_does() -> None:
    for init in (True, "gaussian", "olora"):
        model = laws.adapt(lines, target_modules=["0", "2"], **BIASED, init_lora_weights=init)
        biases = [p for name, p in model.named_parameters() if name.endswith("moslora_B.default.bias")]
        assert len(biases) == 2 and not any(p.any() for p in biases)
    ours = laws.adapt(lines, target_modules=["0", "2"], **BIASED)
    lora = laws.adapt(lines, LoraConfig, target_modules=["0", "2"], **BIASED)
    judged = laws.factors_by_key(lora)
    for name, p in laws.factors_by_key(ours).items():
        assert "_M." in name or torch.equal(p, judged[name.replace("moslora_", "lora_")])


@torch.no_grad()
def test_a_base_without_a_bias_is_told_of_and_not_merged_into() -> None:
    with pytest.warns(UserWarning, match="Linear that has no bias of its own.*not merged"):
        model = laws.adapt(lambda: lines(False), target_modules=["0"], **BIASED)
    mixed = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5, bias=False)).eval()
    model = laws.adapt(lambda: mixed, target_modules=["0", "1"], **BIASED)
    before = copy.deepcopy(model.state_dict())
    for call in (model.merge_adapter, model.merge_and_unload, model.base_model.model[1].merge):
        with pytest.raises(ValueError, match=r"bias on B.*has no bias to add it to; nothing was changed"):
            call()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_bias_that_is_not_finite_is_not_merged_safely() -> None:
    model = laws.adapt(lines, target_modules=["0"], **BIASED)
    layer = model.base_model.model[0]
    layer.moslora_B["default"].bias[1] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinite values into the bias; nothing was changed"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


@torch.no_grad()
def test_several_adapters_rows_sums_and_copies_have_their_own_biases() -> None:
    model = laws.adapt(biased_llama, target_modules=["q_proj", "down_proj"], **BIASED)
    more = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False}
    model.add_adapter("other", MoSLoRAConfig(lora_bias=True, **more))
    model.add_adapter("plain", MoSLoRAConfig(**more))
    ids, names = tiny.tokens(rows=4), ["default", "__base__", "other", "plain"]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            alone = biased_llama()(ids).logits
        else:
            model.set_adapter(name)
            alone = model(ids).logits
        assert relative_error(mixed[row], alone[row]) < MODEL
    model.base_model.set_adapter(["default", "other", "plain"])
    together = read(model)
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["default", "other", "plain"], [1.0] * 3, kind, kind, svd_rank=None)
        model.set_adapter(kind)
        if kind == "cat":
            assert relative_error(read(model), together) < MODEL
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        expected = sum(layer.scaling[n] * layer.bias_on_B(n) for n in ("default", "other"))
        assert relative_error(layer.bias_on_B(kind), expected) < RELATIVE[torch.float32]
    with pytest.raises(ValueError, match=r"a bias on B \(lora_bias=True\) has none"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "ties", "ties", density=0.5)
    model.base_model.set_adapter(["default", "other", "plain"])
    model.merge_adapter()
    assert relative_error(read(model), together) < MODEL
    model.unmerge_adapter()
    assert relative_error(read(model), together) < MODEL


@torch.no_grad()
def test_every_way_of_loading_brings_the_bias(tmp_path: Path) -> None:
    expected = read(saved(tmp_path / "one"))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(biased_llama(), tmp_path / "one", low_cpu_mem_usage=low)
        assert torch.equal(read(loaded.eval()), expected)
    by_transformers = biased_llama()
    by_transformers.load_adapter(str(tmp_path / "one"))
    assert torch.equal(read(by_transformers), expected)
    swapped = laws.adapt(biased_llama, seed=5, target_modules=["q_proj", "down_proj"], **BIASED)
    assert relative_error(read(swapped), expected) > 100 * MODEL
    hotswap_adapter(swapped, str(tmp_path / "one"), adapter_name="default")
    assert torch.equal(read(swapped), expected)
    smaller = saved(tmp_path / "two", target_modules=["q_proj"], r=2, lora_alpha=5)
    hotswap_adapter(swapped, str(tmp_path / "two"), adapter_name="default")
    assert relative_error(read(swapped), read(smaller)) < MODEL
    prepare_model_for_compiled_hotswap(smaller, target_rank=8)
    assert relative_error(read(smaller), read(swapped)) < MODEL
    without = laws.adapt(biased_llama, target_modules=["q_proj", "down_proj"], lora_alpha=6)
    with pytest.raises(ValueError, match="lora_bias"):
        hotswap_adapter(without, str(tmp_path / "one"), adapter_name="default")


@torch.no_grad()
def test_all_biases_of_the_base_and_those_of_two_adapters_are_kept_apart(tmp_path: Path) -> None:
    model = laws.adapt(biased_llama, target_modules=["q_proj"], bias="all", **BIASED)
    model.add_adapter("other", MoSLoRAConfig(target_modules=["q_proj"], lora_bias=True, r=2))
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            p.add_(0.1)
    expected = read(model)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / WEIGHTS)
    assert not any("other" in name for name in names) and any("down_proj.bias" in name for name in names)
    assert torch.equal(read(PeftModel.from_pretrained(biased_llama(), tmp_path).eval()), expected)


def test_low_precision_autocast_and_dropout_know_the_bias() -> None:
    settings = {"target_modules": ["q_proj", "down_proj"], **BIASED}
    laws.in_low_precision(biased_llama, read, torch.bfloat16, **settings)
    laws.in_low_precision(biased_llama, read, torch.bfloat16, True, **settings)
    laws.in_low_precision(*KINDS["Conv2d"][:2], torch.bfloat16, target_modules=["0"], **BIASED)
    model = laws.adapt(lines, target_modules=["0"], lora_dropout=0.4, **BIASED).train()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.moslora_B["default"].weight.zero_()  # what is dropped counts for nothing, the bias does
        x = torch.randn(3, 7)
        expected = layer.base_layer(x) + layer.scaling["default"] * layer.moslora_B["default"].bias
        assert relative_error(layer(x), expected) < RELATIVE[torch.float32]
    groups = {g["name"]: g for g in param_groups(model, 1e-3, b_lr_ratio=2, weight_decay=0.1)}
    of_bias = groups["B bias"]
    assert (of_bias["lr"], of_bias["weight_decay"]) == (groups["B"]["lr"], 0)
    assert [id(p) for p in of_bias["params"]] == [id(layer.moslora_B["default"].bias)]


@torch.no_grad()
def test_an_offloaded_bias_is_found_to_run_and_to_merge() -> None:
    model = laws.adapt(biased_llama, target_modules=["q_proj", "down_proj"], **BIASED)
    expected = read(model)
    whole = {n: m for n, m in model.named_modules() if isinstance(m, MoSLoRALayer)}
    biases = {name: layer.bias_on_B("default").clone() for name, layer in whole.items()}
    model = cpu_offload(model, "cpu")
    assert relative_error(read(model), expected) < MODEL
    for name, layer in whole.items():
        assert layer.moslora_B["default"].bias.is_meta
        assert relative_error(layer.bias_on_B("default"), biases[name]) < RELATIVE[torch.float32]
        assert layer.factors("default")[2].any()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.attend = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["words"]},
            r"cannot be used with this Embedding: its B is a parameter.*exclude_modules",
        ),
        ({"target_modules": ["attend"]}, "cannot be used with this MultiheadAttention.*lora_bias=False"),
        ({"target_modules": [], "target_parameters": ["words.weight"]}, "added to the parameter weight"),
        ({"target_modules": ["words"], "use_dora": True}, "cannot be used with use_dora=True"),
    ],
)
def test_where_there_is_no_place_for_a_bias_it_is_refused(settings: dict[str, object], message: str) -> None:
    model = Words()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoSLoRAConfig(r=2, lora_bias=True, **settings))
    assert type(model.attend.out_proj).__module__.startswith("torch.")


# --- At rest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_export_is_a_lora_with_a_bias_that_stock_peft_runs_alike(kind: str, tmp_path: Path) -> None:
    build, run, targets = KINDS[kind]
    model = saved(tmp_path / "native", kind, use_rslora=True, rank_pattern={targets[0]: 2})
    expected = run(model)
    proof = export_adapter(tmp_path / "native", tmp_path / "lora")
    assert proof.reader.startswith("peft") and proof.max_relative_error <= FOLD_TOLERANCE
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert (config["peft_type"], config["lora_bias"]) == ("LORA", True)
    theirs = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    assert type(theirs.peft_config["default"]) is LoraConfig
    assert relative_error(run(theirs), expected) < MODEL
    export_adapter(tmp_path / "lora", tmp_path / "lifted", to="native")
    lifted = PeftModel.from_pretrained(build(), tmp_path / "lifted").eval()
    assert relative_error(run(lifted), expected) < MODEL


# What PEFT 0.21 says of its own.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
@torch.no_grad()
def test_what_stock_peft_saved_with_a_bias_is_read(tmp_path: Path) -> None:
    lora = laws.adapt(biased_llama, LoraConfig, target_modules=["q_proj"], **BIASED)
    lora.save_pretrained(tmp_path / "theirs")
    export_adapter(tmp_path / "theirs", tmp_path / "ours", to="native")
    ours = PeftModel.from_pretrained(biased_llama(), tmp_path / "ours").eval()
    assert relative_error(read(ours), read(lora)) < MODEL


@torch.no_grad()
def test_sums_ranks_starts_and_merges_on_disk_carry_the_bias(tmp_path: Path) -> None:
    base = biased_llama()
    base.save_pretrained(tmp_path / "base")
    model = saved(tmp_path / "one")
    merge(tmp_path / "base", tmp_path / "one", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert relative_error(read(merged), read(model)) < MODEL
    saved(tmp_path / "two", target_modules=["q_proj", "v_proj"], r=2)
    combine([tmp_path / "one", tmp_path / "two"], [1.0, -0.5], tmp_path / "sum")
    found = [read_adapter(tmp_path / name).modules for name in ("one", "two", "sum")]
    for name, factors in found[2].items():
        parts = [w * f[name].scaled_bias() for w, f in zip((1.0, -0.5), found, strict=False) if name in f]
        assert relative_error(factors.scaled_bias(), sum(parts)) < RELATIVE[torch.float32]
    plain = {"target_modules": ["v_proj"], "r": 2}
    laws.adapt(biased_llama, **plain).save_pretrained(tmp_path / "plain")
    combine([tmp_path / "one", tmp_path / "plain"], [1.0, 1.0], tmp_path / "padded")
    padded = read_adapter(tmp_path / "padded").modules
    assert not padded["model.layers.0.self_attn.v_proj"].bias.any()
    export_adapter(tmp_path / "one", tmp_path / "narrow", rank=2)
    narrow = read_adapter(tmp_path / "narrow").modules
    for name, factors in found[0].items():
        assert relative_error(narrow[name].scaled_bias(), factors.scaled_bias()) < RELATIVE[torch.float32]
    begun = saved(tmp_path / "begun", init_lora_weights="pissa")
    for p in laws.factors_by_key(begun).values():
        if p.requires_grad:
            p.add_(0.1)
    begun.save_pretrained(tmp_path / "begun")
    export_adapter(tmp_path / "begun", tmp_path / "plain-begun")
    theirs = PeftModel.from_pretrained(biased_llama(), tmp_path / "plain-begun").eval()
    assert relative_error(read(theirs), read(begun)) < MODEL


def test_what_cannot_hold_a_bias_refuses_it_by_name(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")  # without biases
    model = laws.adapt(tiny.llama, target_modules=["q_proj"], **BIASED)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "native")
    source, out = tmp_path / "native", tmp_path / "out"
    for to, suffix in (("gguf", ".gguf"), ("diffusers", ".safetensors"), ("kohya", ".safetensors")):
        with pytest.raises(AdapterError, match=r"a bias on B \(lora_bias=True\)\..*--to lora"):
            export_adapter(source, out.with_suffix(suffix), to=to)
    with pytest.raises(AdapterError, match=r"trains mixers and nothing else"):
        open_mix([source, source])
    with pytest.raises(AdapterError, match=r"the base has no model.layers.0.self_attn.q_proj.bias"):
        merge(tmp_path / "base", source, out)
    assert not out.exists()
    assert "which the figures leave out" in inspect_adapter(source).note
    findings = diagnose(source, str(tmp_path / "base"), ["peft", "vllm", "sglang", "llama.cpp"]).findings
    errors = {f.check: f.fix for f in findings if f.level == "error"}
    engines = ("vllm", "sglang", "llama.cpp")
    applied = {f"{engine}: applied" for engine in engines}  # of how many modules, none
    assert errors.keys() - applied == {*(f"{engine}: bias on B" for engine in engines), "llama.cpp: format"}
    assert applied < errors.keys()
    assert all("lora_bias=False" in errors[check] for check in errors.keys() - applied)
    assert any(f.check == "bias" and f.level == "note" for f in findings)


@pytest.mark.parametrize("to", ["native", "lora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(n for n in t if n.endswith("B.bias"))), r"lora_bias=True, and 3 of 4 modules"),
        (
            lambda t: t.update({n: x[:-1] for n, x in t.items() if n.endswith("B.bias")}),
            "bias on B is of shape",
        ),
        (
            lambda t: t.update(
                {n.replace("B.", "A."): x.clone() for n, x in t.items() if n.endswith("B.bias")}
            ),
            "A.bias",
        ),
    ],
    ids=["lost", "cut", "on A"],
)
def test_a_file_whose_biases_are_not_whole_is_refused(to: str, change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    saved(tmp_path / "one")
    export_adapter(tmp_path / "one", tmp_path / "two", to=to)
    tensors = load_file(tmp_path / "two" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "two" / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "two")
    if to == "native":
        with pytest.raises(ValueError, match="does not fit this model; nothing was loaded"):
            PeftModel.from_pretrained(biased_llama(), tmp_path / "two")
