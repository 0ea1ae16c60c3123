from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import laws
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.core.mixers import MIXERS
from moslora.errors import AdapterError
from tolerances import MODEL, RELATIVE, relative_error
from upstream import WHOLE

# What PEFT's LoRA does otherwise is said at every start, and tested once.
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be exported:UserWarning")


class Attend(nn.Module):
    """Attention from a query to another sequence, then a linear layer."""

    def __init__(self, width: int = 16, heads: int = 2, **changes: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(width, heads, **changes)
        self.linear = nn.Linear(width, 6)

    def forward(self, query: Tensor, memory: Tensor, **kwargs: object) -> Tensor:
        out, weights = self.attention(query, memory, memory, **kwargs)
        return (
            torch.cat([self.linear(out).flatten(), weights.flatten()])
            if weights is not None
            else self.linear(out)
        )


def run(model: nn.Module, width: int = 16, heads: int = 2, **kwargs: object) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(5)
    query, memory = (
        torch.randn(4, 4, width, generator=generator, dtype=torch.float64).to(dtype) for _ in "qm"
    )
    return model(query, memory, **kwargs)


def add_out_proj_once(lora: nn.Module) -> None:
    """PEFT adds out_proj's update itself, and then has its layer add it again (pull request 3774)."""
    out_proj = lora.base_model.model.attention.base_layer.out_proj
    out_proj.merge = out_proj.unmerge = lambda *args, **kwargs: None


@torch.no_grad()
def test_pefts_lora_adds_out_proj_twice_so_it_is_said_and_not_exported(tmp_path: Path) -> None:
    """The reason for the warning: if this fails, PEFT has been mended, and the warning can go."""
    lora = laws.adapt(Attend, LoraConfig, target_modules=["attention"])
    out_proj = lora.base_model.model.attention.base_layer.out_proj
    before, delta = out_proj.base_layer.weight.clone(), out_proj.get_delta_weight("default")
    lora.base_model.model.attention.merge()
    assert relative_error(out_proj.base_layer.weight, before + 2 * delta) < MODEL
    with pytest.warns(UserWarning, match=r"'attention'.*out_proj twice.*merge"):
        ours = laws.adapt(Attend, target_modules=["attention"])
    assert list(ours.peft_config["default"].unlike_lora) == ["attention"]
    ours.save_pretrained(tmp_path / "native")
    with pytest.raises(AdapterError, match=r"attention cannot be written as a plain LoRA.*merge_and_unload"):
        export_adapter(tmp_path / "native", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@given(
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([4, 8]),
    bias=st.booleans(),
    add_bias_kv=st.booleans(),
    add_zero_attn=st.booleans(),
    batch_first=st.booleans(),
    need_weights=st.booleans(),
    masked=st.booleans(),
    mixer=st.sampled_from(sorted(MIXERS)),
)
def test_outputs_and_gradients_are_those_of_lora_with_the_mixers_folded(
    heads: int,
    width: int,
    bias: bool,
    add_bias_kv: bool,
    add_zero_attn: bool,
    batch_first: bool,
    need_weights: bool,
    masked: bool,
    mixer: str,
) -> None:
    changes = {
        "bias": bias,
        "add_bias_kv": add_bias_kv,
        "add_zero_attn": add_zero_attn,
        "batch_first": batch_first,
    }
    kwargs: dict[str, object] = {"need_weights": need_weights}
    if masked:
        kwargs["key_padding_mask"] = torch.tensor([[False, False, False, True]] * 4)
    laws.hold_to_lora(
        lambda: Attend(width, heads, **changes).eval(),
        lambda model: run(model, width, heads, **kwargs),
        target_modules=["attention"],
        judge=add_out_proj_once,
        mixer=mixer,
        train_mixer=True,
    )


def test_attention_lives_as_a_linear_layer_does(tmp_path: Path) -> None:
    laws.live_through(lambda: Attend().eval(), run, tmp_path, target_modules=["attention", "linear"])


@torch.no_grad()
def test_each_projection_is_merged_for_itself() -> None:
    model = laws.adapt(lambda: Attend().eval(), target_modules=["attention"])
    expected = run(model)
    attention = model.base_model.model.attention
    for layer in (attention, attention.base_layer.out_proj):
        layer.merge()
        assert relative_error(run(model), expected) < MODEL
    attention.unmerge()
    assert relative_error(run(model), expected) < MODEL


def test_the_same_attentions_are_adapted_as_in_lora_and_start_the_same() -> None:
    for settings in (
        {"target_modules": ["attention"]},
        {"target_modules": ["attention", "linear"], "rank_pattern": {"attention": 2}, "use_rslora": True},
    ):
        laws.same_targets(lambda: Attend().eval(), **settings)
        ours, lora = (
            laws.factors_by_key(laws.adapt(lambda: Attend().eval(), cls, **settings, init_lora_weights=True))
            for cls in (MoSLoRAConfig, LoraConfig)
        )
        assert all(torch.equal(p, ours[name.replace("lora_", "moslora_")]) for name, p in lora.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_as_merging_does(dtype: torch.dtype) -> None:
    laws.in_low_precision(lambda: Attend().eval(), run, dtype, target_modules=["attention"])


def test_autocast_rounds_and_nothing_more() -> None:
    laws.in_low_precision(lambda: Attend().eval(), run, torch.bfloat16, True, target_modules=["attention"])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    results = []
    for checkpointed in (False, True):
        model = laws.adapt(lambda: Attend().eval(), target_modules=["attention"])
        call = (
            (lambda m: torch.utils.checkpoint.checkpoint(run, m, use_reentrant=False))
            if checkpointed
            else run
        )
        call(model).square().sum().backward()
        results.append([p.grad for p in laws.factors_by_key(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_compiles_whole() -> None:
    model = laws.adapt(lambda: Attend().eval(), target_modules=["attention"])
    compiled = torch.compile(model, fullgraph=WHOLE, backend="aot_eager")
    assert relative_error(run(compiled), run(model)) < MODEL


def test_dropout_that_does_nothing_is_said() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 does nothing"):
        laws.adapt(Attend, target_modules=["attention"], lora_dropout=0.1)


def test_separate_projections_are_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"kdim=8.*modules_to_save"):
        laws.adapt(lambda: Attend(kdim=8), target_modules=["attention"])


@pytest.mark.parametrize("targets", [["out_proj"], "all-linear"])
def test_a_projection_that_torch_never_calls_is_refused_with_the_way_out(targets: object) -> None:
    with pytest.raises(
        ValueError, match=r"attention.out_proj.*do nothing.*'attention' in target_modules.*exclude"
    ):
        laws.adapt(Attend, target_modules=targets)
    laws.adapt(Attend, target_modules="all-linear", exclude_modules=["out_proj"])
    laws.adapt(Attend, target_modules=["attention", "out_proj"])


def encoder(norm_first: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    return nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)}
    ).eval()


def encode(model: nn.Module, masked: bool = False) -> Tensor:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    out = inner["encoder"](x, src_key_padding_mask=mask)
    return out[:, :3]  # where nothing is masked


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # the base's own shortcut
@pytest.mark.parametrize("targets", [["self_attn"], ["linear1"], ["self_attn", "linear2"]])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_torchs_encoder_layers_do_not_pass_adapters_by(
    targets: list[str], norm_first: bool, masked: bool
) -> None:
    build = lambda: encoder(norm_first)  # noqa: E731
    base = encode(build(), masked)
    model = laws.adapt(build, target_modules=targets)
    out = encode(model, masked)
    assert relative_error(out, base) > 100 * MODEL
    with torch.enable_grad():
        assert (
            relative_error(encode(model.train(), masked).detach(), out) > 0
        )  # dropout: torch calls every module
    model.eval()
    merged = model.merge_and_unload()
    assert relative_error(encode(merged, masked), out) < MODEL
    assert not any(m._forward_pre_hooks for m in merged.modules())
    assert merged["encoder"].use_nested_tensor is (not norm_first)


@torch.no_grad()
def test_pefts_lora_is_passed_by_there() -> None:
    """The reason for the hooks: if this fails, PEFT or torch has changed, and they can go."""
    model = laws.adapt(encoder, LoraConfig, target_modules=["self_attn", "linear1"])
    assert relative_error(encode(model), encode(encoder())) < RELATIVE[torch.float32]
