from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import laws
import tiny
import upstream
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.core.mixers import MIXERS
from tolerances import MODEL, RELATIVE, relative_error

# PEFT looks for a pattern's parameter among the modules, with LoRA as with MoSLoRA.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=8, decoder_sparse_step=1)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, num_local_experts=4, layer_types=["full_attention"] * 2)
    ),
}
# Of the others, experts were modules of their own before.
KINDS = [
    pytest.param(
        kind, marks=() if kind == "gpt-oss" else upstream.needs("no parameters before", transformers="5")
    )
    for kind in MODELS
]
ANY = "mixtral" if upstream.versions.is_at_least("transformers", "5") else "gpt-oss"
as_lora = upstream.needs(
    "LoRA has A and B the other way round, and other names, before", peft="0.20", transformers="5"
)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def build(kind: str, experts: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    if upstream.versions.is_at_least("transformers", "5"):
        model.set_experts_implementation(experts)  # the grouped kernels know no float64
    for p in model.parameters():  # transformers starts some at zero, and routers so that ties are near
        nn.init.normal_(p, std=0.3)
    return model


def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens(), use_cache=False).logits


@as_lora
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixer", ["identity", "kaiming"])
def test_outputs_and_gradients_are_those_of_lora_with_the_mixers_folded(kind: str, mixer: str) -> None:
    laws.hold_to_lora(
        lambda: build(kind), run, target_modules=["q_proj"], target_parameters=BOTH, mixer=mixer, r=3
    )


@upstream.needs("there is one adapter of parameters before", peft="0.20")
@pytest.mark.parametrize("kind", KINDS)
def test_experts_live_as_a_linear_layer_does(kind: str, tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "target_parameters": BOTH}
    laws.live_through(lambda: build(kind), run, tmp_path, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_trains_with_float32_factors(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    """No noise is bounded here: one token routed otherwise by rounding changes its whole output."""
    model = laws.adapt(
        lambda: build(kind, "grouped_mm").to(torch.float32 if autocast else dtype), target_parameters=BOTH
    )
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        run(model).float().square().mean().backward()
    for name, p in laws.factors_by_key(model).items():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all(), name


class Stack(nn.Module):
    """One matrix for each expert; every expert sees every input."""

    def __init__(self, experts: int, out: int, inputs: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.randn(experts, *((inputs, out) if is_transposed else (out, inputs))))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight if self.is_transposed else self.weight.mT)  # (experts, n, out)


@given(
    experts=st.integers(1, 4),
    out=st.integers(1, 6),
    inputs=st.integers(1, 6),
    r=st.sampled_from([2, 4]),
    is_transposed=st.booleans(),
    mixer=st.sampled_from(sorted(MIXERS)),
)
def test_each_expert_has_its_own_mixer_in_every_shape(
    experts: int, out: int, inputs: int, r: int, is_transposed: bool, mixer: str
) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": Stack(experts, out, inputs, is_transposed)}).double()
    x = torch.randn(5, inputs, dtype=torch.float64)
    weight = base["experts"].weight.detach().clone()
    model = laws.adapt(
        lambda: base,
        target_modules=[],
        target_parameters=["experts.weight"],
        r=r,
        mixer=mixer,
        train_mixer=True,
    )
    layer = model.base_model.model["experts"]
    A, M, B, scale = layer.factors("default")
    assert M.shape == (experts, r, r)
    expected = torch.stack(
        [
            x @ ((w if is_transposed else w.T) + scale * (b @ m @ a).T)
            for w, a, m, b in zip(weight, A, M, B, strict=True)
        ]
    )
    assert relative_error(layer(x), expected) < RELATIVE[torch.float64]
    if MIXERS[mixer].learned and mixer != "identity" and experts > 1:
        assert not torch.equal(M[0], M[1])
    layer.merge(safe_merge=True)
    assert relative_error(layer(x), expected) < RELATIVE[torch.float64]
    assert torch.equal(layer(x), base["experts"].base_layer(x))


@as_lora
def test_a_matrix_that_is_no_modules_own_is_adapted_as_in_lora() -> None:
    settings = {"target_modules": [], "target_parameters": ["gate.weight"]}  # the router
    laws.hold_to_lora(lambda: build(ANY), run, **settings)
    laws.same_targets(lambda: build(ANY), **settings)


@as_lora
def test_the_same_parameters_are_adapted_as_in_lora() -> None:
    for settings in (
        {"target_modules": ["q_proj"], "target_parameters": BOTH},
        {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "use_rslora": True},
        {"target_modules": None, "target_parameters": BOTH},
        {"target_modules": "all-linear", "target_parameters": BOTH},
        {"target_modules": ["q_proj", "w1", "w2", "w3"]},  # the names before transformers 5
        {"target_modules": r".*\.(v_proj|w2)"},
    ):
        laws.same_targets(lambda: build(ANY), **settings)


@as_lora
@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys did not match:RuntimeWarning"
)  # PEFT's, of both
def test_ranks_and_alphas_of_parameters_follow_their_patterns_as_in_lora() -> None:
    laws.same_targets(
        lambda: build(ANY),
        target_modules=[],
        target_parameters=BOTH,
        rank_pattern={"experts.down_proj": 2},
        alpha_pattern={"layers.1.mlp.experts.gate_up_proj": 5},
    )


@upstream.needs("a second one is refused, whatever its parameters, before", peft="0.20")
def test_adapters_of_other_parameters_are_refused() -> None:
    model = laws.adapt(lambda: build(ANY), target_modules=[], target_parameters=BOTH)
    with pytest.raises(ValueError, match="must name the same ones"):
        model.add_adapter("other", MoSLoRAConfig(target_modules=[], target_parameters=BOTH[:1]))


def test_dropout_on_a_parameter_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="lora_dropout=0"):
        laws.adapt(lambda: build(ANY), target_parameters=BOTH, lora_dropout=0.1)


def test_a_quantised_parameter_is_refused_with_the_way_out() -> None:
    def quantised() -> nn.Module:
        model = build(ANY)
        for layer in model.model.layers:
            experts = layer.mlp.experts
            experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
        return model

    with pytest.raises(ValueError, match=r"float8_e4m3fn.*16 or 32 bits"):
        laws.adapt(quantised, target_modules=[], target_parameters=BOTH)


class Doubled(nn.Module):
    """A parametrization of what it is given, without a dtype of its own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.float() * 2


@pytest.mark.parametrize(
    ("dtype", "match"),
    [(torch.float32, r"computed, by a parametrization \(Doubled\).*remove_parametrizations"),
     (torch.uint8, r"quantized \(torch.uint8\).*16 or 32 bits")],
)  # fmt: skip
def test_a_computed_parameter_is_called_what_it_is(dtype: torch.dtype, match: str) -> None:
    """A parametrization stands for a quantized parameter (bitsandbytes' experts) or for anything else."""

    def computed() -> nn.Module:
        model = build(ANY)
        for layer in model.model.layers:
            experts = layer.mlp.experts
            experts.down_proj = nn.Parameter(experts.down_proj.to(dtype), requires_grad=False)
            parametrize.register_parametrization(experts, "down_proj", Doubled(), unsafe=True)
        return model

    with pytest.raises(ValueError, match=match):
        laws.adapt(computed, target_modules=[], target_parameters=["model.layers.0.mlp.experts.down_proj"])


def test_a_vector_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(16,\).*a matrix or a stack"):
        laws.adapt(lambda: build(ANY), target_modules=[], target_parameters=["norm.weight"])


@as_lora
@torch.no_grad()
def test_an_adapted_matrix_is_exported_for_stock_peft(tmp_path: Path) -> None:
    """Its name is in target_parameters alone; without it PEFT would drop the tensors without a word."""
    model = laws.adapt(lambda: build(ANY), target_modules=["q_proj"], target_parameters=["gate.weight"])
    model.save_pretrained(tmp_path / "native")
    export_adapter(tmp_path / "native", tmp_path / "lora")
    plain = PeftModel.from_pretrained(build(ANY), tmp_path / "lora")
    assert type(plain.peft_config["default"]) is LoraConfig
    assert relative_error(run(plain), run(model)) < MODEL
