"""DoRA's magnitude on a mixer: PEFT's DoRA is the judge of outputs, gradients, merged weights and exported files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

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
from moslora.errors import AdapterError
from moslora.tuner import dora
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, SNR_DB, relative_error, snr_db
from upstream import WHOLE

DORA = {"use_dora": True, "lora_alpha": 6}
# What PEFT's LoRA says of every such layer.
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")


def pictures(kind: type[nn.Module] = nn.Conv2d, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(kind(3, 6, 3, padding=1, **settings), nn.ReLU(), kind(6, 4, 2, stride=2)).eval()


def grouped(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        kind(3, 4, 1),
        nn.ReLU(),
        kind(4, 8, 3, padding=1, groups=2),
        kind(8, 4, 1, groups=4, bias=False),
    ]
    return nn.Sequential(*layers).eval()


def look(dims: int) -> laws.Run:
    def run(model: nn.Module) -> Tensor:
        x = torch.randn(2, 3, *(8,) * dims, generator=torch.Generator().manual_seed(1))
        return model(x.to(next(model.parameters()).dtype))

    return run


def words(scale: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    embedding: nn.Module = nn.Embedding(20, 8, padding_idx=0)
    if scale is not None:
        embedding = Gemma3TextScaledWordEmbedding(20, 8, padding_idx=0, embed_scale=scale)
    nn.init.normal_(embedding.weight)
    return nn.Sequential(embedding, nn.Tanh(), nn.Linear(8, 6)).eval()


def spell(model: nn.Module) -> Tensor:
    return model(torch.tensor([[3, 1, 2, 2, 3, 19], [5, 7, 2, 4, 1, 1]]))  # repeated tokens


def read(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


KINDS = {
    "llama": (tiny.llama, read, ["q_proj", "v_proj", "down_proj"]),
    "gpt2, Conv1D with biases": (tiny.gpt2, read, ["c_attn", "c_proj"]),
    "Conv1d": (lambda: pictures(nn.Conv1d), look(1), ["0", "2"]),
    "Conv2d without bias": (lambda: pictures(nn.Conv2d, bias=False), look(2), ["0", "2"]),
    "Conv3d": (lambda: pictures(nn.Conv3d), look(3), ["0", "2"]),
    "Conv1d, groups": (lambda: grouped(nn.Conv1d), look(1), ["2", "3"]),
    "Conv2d, groups": (lambda: grouped(nn.Conv2d), look(2), ["2", "3"]),
    "Embedding": (words, spell, ["0", "2"]),
    "Embedding with a scale": (lambda: words(7.5), spell, ["0"]),
}


def move_magnitudes(model: nn.Module) -> None:
    """Away from the norms, by the same values in both libraries."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.linspace(0.7, 1.4, p.numel(), dtype=p.dtype).view_as(p))


def pair(kind: str, dtype: torch.dtype = torch.float64, **settings: object) -> tuple[nn.Module, nn.Module]:
    """Our model and PEFT's LoRA with the folded factors, both with moved magnitudes."""
    build, _, targets = KINDS[kind]
    whole = lambda: build().to(dtype)  # noqa: E731
    settings["fan_in_fan_out"] = "gpt2" in kind
    ours = laws.adapt(whole, target_modules=targets, **DORA, **settings)
    lora_settings = {k: v for k, v in settings.items() if k not in ("mixer", "train_mixer")}
    lora = laws.adapt(whole, LoraConfig, target_modules=targets, **DORA, **lora_settings)
    for model in (ours, lora):
        move_magnitudes(model)
    held, judged = laws.factors_by_key(ours), laws.factors_by_key(lora)
    with torch.no_grad():
        for name, p in held.items():
            if "_A." in name:
                composed = laws.compose(held[name.replace("_A", "_M", 1)], p)
                judged[name.replace("moslora_", "lora_")].copy_(composed)
            elif "_B." in name or "magnitude" in name:
                judged[name.replace("moslora_", "lora_")].copy_(p)
    return ours, lora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", ["identity", "kaiming"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_those_of_pefts_dora(kind: str, mixer: str, dropout: float) -> None:
    run = KINDS[kind][1]
    ours, lora = pair(kind, mixer=mixer, lora_dropout=dropout)
    if mixer == "identity" and "gpt2" not in kind:  # GPT-2 has dropout of its own, in another order
        ours.train()
        lora.train()
    outs = []
    for model in (ours, lora):
        torch.manual_seed(7)
        out = run(model)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        outs.append(out)
    assert relative_error(*outs) < RELATIVE[torch.float64]
    held, judged = laws.factors_by_key(ours), laws.factors_by_key(lora)
    largest = max(float(p.grad.abs().max()) for p in judged.values())
    for name, p in held.items():
        if "_M." in name:
            continue
        other = name.replace("moslora_", "lora_")
        expected = judged[other].grad
        if "_A." in name:
            M = held[name.replace("_A", "_M", 1)]
            dM, expected = laws.chain(M, p, expected)
            assert relative_error(M.grad, dM, laws.size_of(dM, largest)) < RELATIVE[torch.float64], name
        size = laws.size_of(expected, largest)
        assert relative_error(p.grad, expected, size) < RELATIVE[torch.float64], name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "groups" not in kind])
@torch.no_grad()
def test_merged_weights_are_those_of_pefts_dora(kind: str) -> None:
    merged = [model.merge_and_unload(safe_merge=True).state_dict() for model in pair(kind)]
    assert merged[0].keys() == merged[1].keys()
    assert all(
        relative_error(merged[0][name], merged[1][name]) < RELATIVE[torch.float64] for name in merged[0]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_magnitude_lives_through_everything(kind: str, tmp_path: Path) -> None:
    build, run, targets = KINDS[kind]
    laws.live_through(build, run, tmp_path, "groups" not in kind, target_modules=targets, use_dora=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True


@pytest.mark.parametrize(
    "kind", ["llama", "Conv2d without bias", "Conv2d, groups", "Embedding", "Embedding with a scale"]
)
@torch.no_grad()
def test_magnitudes_travel_and_start_as_the_norms(kind: str, tmp_path: Path) -> None:
    build, run, targets = KINDS[kind]
    model = laws.adapt(build, target_modules=targets, **DORA)
    for layer in model.modules():
        if isinstance(layer, MoSLoRALayer) and "groups" not in kind:
            weight = layer.base_layer.weight + layer.low_rank_delta("default")
            weight = weight.T if isinstance(layer.base_layer, nn.Embedding) else weight  # (out, in, …)
            m = layer.moslora_magnitude_vector["default"].weight
            assert relative_error(m.flatten(), weight.flatten(1).norm(dim=1)) < RELATIVE[torch.float32]
    plain = laws.adapt(build, target_modules=targets, lora_alpha=6)
    assert relative_error(run(model), run(plain)) < MODEL  # W' starts as W0 + ΔW
    move_magnitudes(model)
    expected = run(model)
    assert relative_error(run(plain), expected) > 100 * MODEL
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(build(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(run(loaded), expected)


@torch.no_grad()
def test_several_adapters_add_what_each_changes_merged_or_not_and_leave_again() -> None:
    model = laws.adapt(tiny.llama, target_modules=["q_proj"], **DORA)
    more = {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": False}
    model.add_adapter("dora", MoSLoRAConfig(use_dora=True, **more))
    model.add_adapter("plain", MoSLoRAConfig(**more))
    move_magnitudes(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    base = layer.base_layer.weight.clone()
    deltas = {name: layer.get_delta_weight(name) for name in ("default", "dora", "plain")}
    x = torch.randn(3, 32)
    model.base_model.set_adapter(list(deltas))
    whole = base + sum(deltas.values())
    assert relative_error(layer(x), x @ whole.T) < RELATIVE[torch.float32]
    for order in (["default", "plain", "dora"], ["dora", "default", "plain"], ["plain", "dora"]):
        layer.merge(adapter_names=order)
        expected = base + sum(deltas[name] for name in order)
        assert relative_error(layer.base_layer.weight, expected) < MODEL
        # What an adapter changes is told by the base without what is merged into it.
        assert relative_error(layer.get_delta_weight("dora"), deltas["dora"], base) < MODEL
        layer.unmerge()
        assert relative_error(layer.base_layer.weight, base) < MODEL and not layer.merged_gains
        layer.base_layer.weight.copy_(base)


@torch.no_grad()
def test_rows_of_a_mixed_batch_have_their_own_magnitudes() -> None:
    model = laws.adapt(tiny.llama, target_modules=["q_proj", "down_proj", "embed_tokens"], **DORA)
    model.add_adapter("plain", MoSLoRAConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    move_magnitudes(model)
    ids, names = tiny.tokens(rows=3), ["default", "__base__", "plain"]
    mixed = model(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(ids).logits
        else:
            model.set_adapter(name)
            alone = model(ids).logits
        assert relative_error(mixed[row], alone[row]) < MODEL


def test_a_low_precision_base_starts_exactly_and_trains_in_float32() -> None:
    with torch.no_grad():
        base = tiny.llama().to(torch.bfloat16)
        expected = read(base)
        model = get_peft_model(base, MoSLoRAConfig(target_modules=["q_proj"], use_dora=True))
        assert torch.equal(read(model), expected)
    laws.in_low_precision(tiny.llama, read, torch.bfloat16, target_modules=["q_proj", "down_proj"], **DORA)
    laws.in_low_precision(tiny.llama, read, torch.bfloat16, True, target_modules=["q_proj"], **DORA)
    for kind in ("Embedding with a scale", "Conv2d, groups"):
        build, run, targets = KINDS[kind]
        laws.in_low_precision(build, run, torch.bfloat16, target_modules=targets, **DORA)


def test_checkpointing_compiling_and_groups_know_the_magnitude() -> None:
    model = laws.adapt(tiny.llama, target_modules=["q_proj"], **DORA)
    move_magnitudes(model)
    compiled = torch.compile(model, fullgraph=WHOLE, backend="aot_eager")
    with torch.no_grad():
        found = compiled(tiny.tokens(), use_cache=False).logits
        assert relative_error(found, read(model)) < MODEL
    groups = {group["name"]: group for group in param_groups(model, 1e-3, weight_decay=0.1)}
    vectors = {id(p) for p in groups["vectors"]["params"]}
    assert vectors == {id(p) for n, p in model.named_parameters() if "magnitude" in n}
    conv = laws.adapt(pictures, target_modules=["0"], **DORA)
    groups = {group["name"]: group for group in param_groups(conv, 1e-3, weight_decay=0.1)}
    assert groups["vectors"]["weight_decay"] == 0 and len(groups["vectors"]["params"]) == 1


def test_a_quantised_base_has_the_gain_of_what_it_stands_for_after_it_ran_too(tmp_path: Path) -> None:
    """PEFT is no reference: after one pass on a CPU it takes norms of reordered weights, off by a third."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny.llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    load = type(tiny.llama()).from_pretrained
    base, dense = load(tmp_path, quantization_config=config, device_map={"": "cpu"}), load(tmp_path)
    for name, module in base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            stored = module.weight
            unpacked = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
            dense.get_submodule(name).weight.data = unpacked.float()
    gains = []
    for built in (base, dense):
        model = laws.adapt(lambda built=built: built, target_modules=["q_proj"], **DORA)
        move_magnitudes(model)
        with torch.no_grad():
            read(model)
        layers = [m for m in model.modules() if isinstance(m, MoSLoRALayer)]
        gains.append(torch.cat([dora.gain(layer, "default").flatten() for layer in layers]))
    # To run, bitsandbytes rounds a block's scale to bfloat16.
    assert snr_db(gains[0], gains[1]) > SNR_DB[torch.bfloat16]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.attend = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["attend"]}, "cannot be used with this MultiheadAttention.*exclude_modules"),
        ({"target_modules": [], "target_parameters": ["words.weight"]}, "cannot be used with this"),
    ],
)
def test_other_layers_are_refused_with_the_reason(settings: dict[str, object], message: str) -> None:
    model = Words()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoSLoRAConfig(r=2, use_dora=True, **settings))
    assert type(model.attend.out_proj).__module__.startswith("torch.")


def test_an_output_of_zeros_is_refused_for_it_has_no_direction() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    with pytest.raises(ValueError, match=r"1 outputs of a Linear have none but zeros"):
        get_peft_model(model, MoSLoRAConfig(r=2, use_dora=True, target_modules=["0"]))


def test_a_weighted_sum_is_refused_with_the_way_out() -> None:
    model = laws.adapt(tiny.llama, target_modules=["q_proj"], **DORA)
    with pytest.raises(ValueError, match=r"not a product of factors.*Activate the adapters together"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


# --- At rest -------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=["llama", "gpt2, Conv1D with biases", "Conv2d without bias", "Conv2d, groups", "Embedding"]
)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Tensor]:
    """A trained native DoRA adapter: its kind, where it is, and what it makes of an input."""
    build, run, targets = KINDS[request.param]
    ranks = {"rank_pattern": {targets[0]: 2}, "use_rslora": True}
    model = laws.adapt(build, target_modules=targets, **DORA, **ranks)
    move_magnitudes(model)
    model.save_pretrained(tmp_path / "native")
    with torch.no_grad():
        return request.param, tmp_path / "native", run(model)


@torch.no_grad()
def test_the_export_is_a_dora_adapter_that_stock_peft_runs_alike(
    saved: tuple[str, Path, Tensor], tmp_path: Path
) -> None:
    kind, folder, expected = saved
    build, run, _ = KINDS[kind]
    proof = export_adapter(folder, tmp_path / "lora")
    assert proof.has_magnitudes and proof.reader.startswith("peft")
    assert proof.max_relative_error <= FOLD_TOLERANCE
    config = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", True)
    theirs = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    assert type(theirs.peft_config["default"]) is LoraConfig
    assert relative_error(run(theirs), expected) < MODEL
    export_adapter(tmp_path / "lora", tmp_path / "lifted", to="native")
    lifted = PeftModel.from_pretrained(build(), tmp_path / "lifted").eval()
    assert relative_error(run(lifted), expected) < MODEL
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("lora", "lifted"))
    for name, tensor in one.items():
        if "magnitude" in name:
            again = two[name.replace("lora_magnitude_vector", "moslora_magnitude_vector") + ".weight"]
            assert torch.equal(tensor, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(n for n in t if "magnitude" in n)), r"use_dora=True, and 3 of 4 modules"),
        (lambda t: [t.pop(n) for n in list(t) if "magnitude" in n], r"use_dora=True, and 0 of 4 modules"),
        (lambda t: t.update({n: x[:-1] for n, x in t.items() if "magnitude" in n}), "does not fit B"),
    ],
)
@pytest.mark.parametrize("to", ["native", "lora"])
def test_a_file_that_lost_a_magnitude_is_refused(to: str, change, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    laws.adapt(tiny.llama, target_modules=["q_proj", "v_proj"], **DORA).save_pretrained(tmp_path / "one")
    export_adapter(tmp_path / "one", tmp_path / "two", to=to)
    tensors = load_file(tmp_path / "two" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "two" / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / "two")
    if to == "native":
        with pytest.raises(ValueError, match="does not fit this model; nothing was loaded"):
            PeftModel.from_pretrained(tiny.llama(), tmp_path / "two")


def test_what_cannot_hold_a_magnitude_refuses_it_and_names_the_way_out(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = laws.adapt(tiny.llama, target_modules=["q_proj"], **DORA)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "native")
    source, out, way_out = (
        tmp_path / "native",
        tmp_path / "out",
        r"DoRA's magnitude.*--to lora.*merge_and_unload",
    )
    for to, suffix in (("gguf", ".gguf"), ("kohya", ".safetensors")):
        with pytest.raises(AdapterError, match=way_out):
            export_adapter(source, out.with_suffix(suffix), to=to)
    with pytest.raises(AdapterError, match=way_out):
        export_adapter(source, out, rank=2)
    with pytest.raises(AdapterError, match=way_out):
        combine([source, source], [1, 1], out)
    with pytest.raises(AdapterError, match=way_out):
        merge(tmp_path / "base", source, out)
    with pytest.raises(AdapterError, match="depends on the base's weights"):
        read_adapter(source).delta_weight("model.layers.0.self_attn.q_proj")
    assert not out.exists()
    assert "before that" in inspect_adapter(source).note
    findings = diagnose(source, str(tmp_path / "base"), ["peft", "vllm", "sglang", "llama.cpp"]).findings
    errors = {f.check: f.fix for f in findings if f.level == "error"}
    applied = {
        f"{engine}: applied" for engine in ("vllm", "sglang", "llama.cpp")
    }  # of how many modules, none
    assert errors.keys() - applied == {"vllm: DoRA", "sglang: DoRA", "llama.cpp: DoRA", "llama.cpp: format"}
    assert applied < errors.keys()
    assert all("merge_and_unload()" in errors[check] for check in errors.keys() - applied)
    assert any(f.check == "DoRA" and f.level == "note" for f in findings)


@torch.no_grad()
def test_autocast_adapter_dtype_false_leaves_the_magnitude_in_the_dtype_of_the_factors(
    tmp_path: Path,
) -> None:
    """As in PEFT's LoRA. What is lost by training it there is said; where nothing is trained, nothing."""
    settings = {"target_modules": ["q_proj"], "use_dora": True, "r": 4}
    base = lambda: tiny.llama().to(torch.bfloat16)  # noqa: E731
    lora = get_peft_model(base(), LoraConfig(**settings), autocast_adapter_dtype=False)
    with pytest.warns(UserWarning, match="magnitude is held in torch.bfloat16.*round to nothing"):
        ours = get_peft_model(base(), MoSLoRAConfig(**settings), autocast_adapter_dtype=False)
    for model in (ours, lora):
        assert {p.dtype for p in laws.factors_by_key(model).values()} == {torch.bfloat16}
    get_peft_model(base(), MoSLoRAConfig(**settings)).save_pretrained(tmp_path)
    for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=autocast)
        assert {p.dtype for p in laws.factors_by_key(loaded).values()} == {expected}
