"""Quantised bases, through PEFT's one mechanism: those that are installed for real, any other by its contract."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import laws
import tiny
import upstream
from moslora import MoSLoRAConfig, replace_lora_weights_loftq
from moslora.adapters.export import export_adapter
from moslora.compat.lookup import find
from moslora.compat.peft import quantization
from moslora.tuner.linear import MoSLoRALinear
from tolerances import MODEL, RELATIVE, relative_error

# Where PEFT has no backends yet, layers are called and read, and what needs a backend says so.
quantization_utils: Any = find("peft.utils.quantization_utils")
with_backends = upstream.needs("PEFT has no backends for quantized layers before", peft="0.20")


def plain() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 64)


def bitsandbytes_4bit() -> nn.Module:
    import bitsandbytes as bnb

    source = plain()
    linear = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(source.weight.data, requires_grad=False, quant_type="nf4")
    linear.bias = source.bias
    return nn.ModuleDict({"linear": linear.to("cpu")})


def bitsandbytes_8bit() -> nn.Module:
    import bitsandbytes as bnb

    source = plain()
    linear = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
    linear.weight = bnb.nn.Int8Params(source.weight.data, requires_grad=False, has_fp16_weights=False)
    linear.bias = source.bias
    return nn.ModuleDict({"linear": linear.to("cpu")})


def torchao_int8() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.ModuleDict({"linear": plain()})
    quantize_(model, Int8WeightOnlyConfig())
    # Where transformers keeps how it quantised, and where PEFT looks for it.
    config = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    model.hf_quantizer = SimpleNamespace(quantization_config=config)
    return model


def hqq_8bit() -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=8, group_size=64)
    return nn.ModuleDict({"linear": HQQLinear(plain(), config, compute_dtype=torch.float32, device="cpu")})


BACKENDS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "bitsandbytes 4-bit": ("bitsandbytes", bitsandbytes_4bit),
    "bitsandbytes 8-bit": ("bitsandbytes", bitsandbytes_8bit),
    "torchao int8": ("torchao", torchao_int8),
    "HQQ 8-bit": ("hqq", hqq_8bit),
}


@pytest.fixture(params=BACKENDS)
def build(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    package, function = BACKENDS[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return lambda: function().eval()  # bitsandbytes computes otherwise in training


def run(model: nn.Module) -> Tensor:
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    return inner["linear"](torch.randn(5, 128, generator=torch.Generator().manual_seed(4)))


@pytest.mark.parametrize("mixer", ["identity", "kaiming"])
def test_outputs_and_gradients_are_those_of_lora_with_the_mixer_folded(
    build: Callable[[], nn.Module], mixer: str
) -> None:
    laws.hold_to_lora(build, run, torch.float32, target_modules=["linear"], mixer=mixer)


def test_a_quantised_layer_lives_as_a_plain_one_does(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    laws.live_through(build, run, tmp_path, mergeable=False, target_modules=["linear"])


@torch.no_grad()
def test_merging_costs_one_quantisation_more(build: Callable[[], nn.Module]) -> None:
    """After running, too, for bitsandbytes reorders its weights as it runs; and the bias stays."""
    base_error = relative_error(run(build()), run(nn.ModuleDict({"linear": plain()})))
    model = laws.adapt(build, target_modules=["linear"])
    live = run(model)
    adapted = model.base_model.model["linear"]
    kind = type(adapted.get_base_layer())
    model.merge_adapter(safe_merge=True)
    assert adapted.merged and type(adapted.get_base_layer()) is kind
    # The sum is quantised as the base was, so it is off by about as much; twice, since the update widens it.
    assert 0 < relative_error(run(model), live) < 2 * base_error
    model.unmerge_adapter()
    assert relative_error(run(model), live) < 3 * base_error
    assert type(model.merge_and_unload()["linear"]) is kind


@torch.no_grad()
def test_safe_merging_refuses_nan_and_changes_nothing(build: Callable[[], nn.Module]) -> None:
    model = laws.adapt(build, target_modules=["linear"])
    adapted = model.base_model.model["linear"]
    before = adapted.get_base_weight().clone()
    adapted.moslora_M["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(adapted.get_base_weight(), before) and not adapted.merged


def test_torchao_without_its_configuration_trains_and_refuses_to_merge() -> None:
    pytest.importorskip("torchao")

    def build() -> nn.Module:
        model = torchao_int8()
        del model.hf_quantizer
        return model

    model = laws.adapt(build, target_modules=["linear"])
    run(model).sum().backward()
    expected = run(model)
    with pytest.raises(ValueError, match="TorchAoConfig"):
        model.merge_adapter()
    assert torch.equal(run(model), expected)


def test_a_language_model_loaded_in_4_bits_trains_and_travels(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # bitsandbytes' fast path on some CPUs needs multiples of 32.
    tiny.llama(hidden_size=64, intermediate_size=64, num_key_value_heads=4).save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
            device_map={"": "cpu"},
            dtype=torch.float32,
        )

    def prepare(model: nn.Module) -> nn.Module:
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    ids = tiny.tokens()
    model = laws.adapt(lambda: prepare(base()), target_modules="all-linear").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(prepare(base()), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_base_in_four_bits_begins_nearer_to_the_whole_one_by_loftq(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = tiny.llama(hidden_size=64, intermediate_size=64)
    source.save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
        )

    ids = tiny.tokens()
    expected, coarse = source(ids).logits, base()(ids).logits
    config = MoSLoRAConfig(init_lora_weights="loftq", target_modules="all-linear", r=16, lora_alpha=32)
    model = get_peft_model(base(), config).eval()
    replace_lora_weights_loftq(model, str(tmp_path / "base"))
    found = model(ids).logits
    assert (found - expected).norm() < 0.9 * (coarse - expected).norm()
    model.save_pretrained(tmp_path / "native")
    export_adapter(tmp_path / "native", tmp_path / "lora")
    plain = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert type(plain.peft_config["default"]) is LoraConfig and plain.peft_config["default"].r == 16
    assert relative_error(plain(ids).logits, found) < MODEL


@torch.no_grad()
def test_a_bias_on_b_is_merged_beside_a_quantized_weight(build: Callable[[], nn.Module]) -> None:
    model = laws.adapt(build, target_modules=["linear"], lora_bias=True)
    layer = model.base_model.model["linear"]
    before, own = layer.get_base_layer().bias.clone(), layer.scaling["default"] * layer.bias_on_B("default")
    model.merge_adapter(safe_merge=True)
    assert relative_error(layer.get_base_layer().bias, before + own) < RELATIVE[torch.float32]
    model.unmerge_adapter()
    assert relative_error(layer.get_base_layer().bias, before) < RELATIVE[torch.float32]


class Packed(nn.Module):
    """A quantised layer of no library's: 64ths, in int8."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.register_buffer("packed", (source.weight.data * 64).round().to(torch.int8))
        self.register_buffer("qweight", self.packed)  # as PEFT looks for a device

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.packed.to(x.dtype) / 64).T


class PackedBackend(getattr(quantization_utils, "QuantizationBackend", object)):
    """PEFT's contract, and nothing else."""

    layer_type = "linear"
    supports_merge = True
    backend_name = "packed"

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        return base_layer.packed.float() / 64

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        peft_layer.get_base_layer().packed = (weight_data * 64).round().to(torch.int8)


def packed() -> nn.Module:
    return nn.ModuleDict({"linear": Packed(plain())})


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    def know(backend: Any) -> None:
        def resolve(base_layer: nn.Module, **_: object) -> Any:
            return backend if isinstance(base_layer, Packed) else None

        monkeypatch.setattr(quantization, "resolve_quantization_backend", resolve)

    return know


# PEFT knows no sizes of layers that are not its own, and says so when it guesses them right.
unknown_to_peft = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


@with_backends
@unknown_to_peft
@torch.no_grad()
def test_any_backend_of_pefts_contract_is_served(contract: Callable[[Any], None], tmp_path: Path) -> None:
    contract(PackedBackend())
    laws.live_through(packed, run, tmp_path, mergeable=False, target_modules=["linear"])
    model = laws.adapt(packed, target_modules=["linear"])
    adapted = model.base_model.model["linear"]
    assert type(adapted) is MoSLoRALinear
    before = adapted.get_base_weight()
    model.merge_adapter(safe_merge=True)
    merged = adapted.get_base_weight()
    assert float((merged - (before + adapted.get_delta_weight("default"))).abs().max()) <= 1 / 128 + MODEL
    assert adapted.base_layer.packed.dtype == torch.int8


@with_backends
@unknown_to_peft
def test_a_backend_that_cannot_write_trains_and_refuses_to_merge_with_the_way_out(
    contract: Callable[[Any], None],
) -> None:
    contract(quantization_utils.ForwardOnlyQuantizationBackend("gptq"))
    model = laws.adapt(packed, target_modules=["linear"])
    expected = run(model)
    expected.sum().backward()
    assert all(p.grad is not None for p in laws.factors_by_key(model).values())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"gptq.*export.*16 or 32 bits"):
            merge()
    assert torch.equal(run(model), expected)


@with_backends
@unknown_to_peft
def test_a_backend_for_another_kind_of_layer_is_refused(
    contract: Callable[[Any], None],
) -> None:
    backend = PackedBackend()
    backend.layer_type = "recurrent"
    contract(backend)
    with pytest.raises(TypeError, match=r"Packed, which MoSLoRA cannot adapt"):
        laws.adapt(packed, target_modules=["linear"])


def test_autocast_over_a_quantised_base_rounds_and_nothing_more(build: Callable[[], nn.Module]) -> None:
    model = laws.adapt(build, target_modules=["linear"])
    exact = run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = run(model)
    assert relative_error(rounded.float(), exact) < 2**-6  # bfloat16 keeps 8 bits, and two products
    assert RELATIVE[torch.float32] < relative_error(rounded.float(), exact)
