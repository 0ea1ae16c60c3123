from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn

import laws
from moslora.core.mixers import MIXERS
from tolerances import MODEL, RELATIVE, relative_error

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def stack(dims: int = 2, **changes: object) -> nn.Module:
    """Two convolutions with a nonlinearity between them."""
    torch.manual_seed(0)
    first = CONVS[dims](4, 8, 3, padding=1)
    settings = {"kernel_size": 3, "stride": 2, "padding": 1, **changes}
    return nn.Sequential(first, nn.GELU(), CONVS[dims](8, 12, **settings), nn.Flatten()).eval()


def run(model: nn.Module, dims: int = 2, size: int = 5) -> Tensor:
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(3)
    return model(torch.randn(2, 4, *(size,) * dims, generator=generator, dtype=torch.float64).to(dtype))


@given(
    dims=st.sampled_from([1, 2, 3]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "valid"]),
    groups=st.sampled_from([1, 2, 4]),
    mixer=st.sampled_from(sorted(MIXERS)),
    bias=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_lora_with_the_mixer_folded(
    dims: int, kernel: int, stride: int, padding: int | str, groups: int, mixer: str, bias: bool
) -> None:
    settings = {"kernel_size": kernel, "stride": stride, "padding": padding, "groups": groups, "bias": bias}

    def check() -> None:
        laws.hold_to_lora(
            lambda: stack(dims, **settings),
            lambda model: run(model, dims),
            target_modules=["0", "2"],
            mixer=mixer,
            train_mixer=True,
        )

    if groups > 1:
        with pytest.warns(UserWarning, match="Merging is not supported"):  # PEFT's own word on groups
            check()
    else:
        check()


@pytest.mark.parametrize("dims", CONVS)
def test_a_convolution_lives_as_a_linear_layer_does(dims: int, tmp_path: Path) -> None:
    laws.live_through(lambda: stack(dims), lambda m: run(m, dims), tmp_path, target_modules=["0", "2"])


@given(
    dims=st.sampled_from([1, 2, 3]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same"]),
    dilation=st.integers(1, 2),
    padding_mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
)
@pytest.mark.filterwarnings("ignore:.*cannot be exported:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@torch.no_grad()
def test_merging_keeps_the_output_whatever_the_convolution(
    dims: int, kernel: int, stride: int, padding: int | str, dilation: int, padding_mode: str
) -> None:
    settings = {
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else stride,
        "padding": padding,
        "dilation": dilation,
        "padding_mode": padding_mode,
    }
    model = laws.adapt(lambda: stack(dims, **settings).double(), target_modules=["2"])
    expected = run(model, dims, size=6)
    model.merge_adapter(safe_merge=True)
    assert relative_error(run(model, dims, size=6), expected) < RELATIVE[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_rounds_and_nothing_more(dtype: torch.dtype, autocast: bool) -> None:
    laws.in_low_precision(stack, run, dtype, autocast, target_modules=["0", "2"])


def test_a_convolution_that_lora_would_compute_otherwise_is_named_with_the_reason() -> None:
    for changes, reason in (({"dilation": 2}, "dilation"), ({"padding_mode": "circular"}, "padding mode")):
        with pytest.warns(UserWarning, match=rf"'2'.*{reason}.*merge"):
            model = laws.adapt(lambda changes=changes: stack(**changes), target_modules=["0", "2"])
        assert list(model.peft_config["default"].unlike_lora) == ["2"]


@torch.no_grad()
def test_pefts_lora_does_compute_those_otherwise() -> None:
    """The reason for the warning: if this fails, PEFT has learned to, and the warning can go."""
    build = lambda: stack(padding="same", stride=1, dilation=2)  # noqa: E731
    with pytest.warns(UserWarning, match="dilation"):
        ours = laws.adapt(build, target_modules=["2"], mixer="identity")
    lora = laws.adapt(build, LoraConfig, target_modules=["2"])
    theirs = laws.factors_by_key(lora)
    for name, p in laws.factors_by_key(ours).items():
        if "moslora_M" not in name:
            theirs[name.replace("moslora_", "lora_")].copy_(p)
    assert relative_error(run(lora), run(ours)) > 0.01
    lora.merge_adapter()
    assert relative_error(run(lora), run(ours)) < MODEL


@pytest.mark.parametrize("groups", [2, 4])
@torch.no_grad()
def test_a_grouped_convolution_folds_but_does_not_merge(groups: int, tmp_path: Path) -> None:
    build = lambda: stack(groups=groups)  # noqa: E731
    laws.live_through(build, run, tmp_path, mergeable=False, target_modules=["2"])
    model = laws.adapt(build, target_modules=["2"])
    before = model.base_model.model[2].base_layer.weight.clone()
    for safe in (False, True):
        with pytest.raises(ValueError, match=rf"{groups} groups.*export"):
            model.merge_adapter(safe_merge=safe)
    assert torch.equal(model.base_model.model[2].base_layer.weight, before)


def test_a_rank_that_groups_cannot_split_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"r=6.*4 groups.*multiple of 4.*rank_pattern"):
        laws.adapt(lambda: stack(groups=4), target_modules=["2"], r=6)


def test_the_same_convolutions_are_adapted_as_in_lora() -> None:
    for settings in (
        {"target_modules": r"[02]"},
        {"target_modules": ["0", "2"], "exclude_modules": ["0"]},
        {
            "target_modules": ["0", "2"],
            "rank_pattern": {"0": 2},
            "alpha_pattern": {"2": 3},
            "use_rslora": True,
        },
        {"target_modules": ["0"], "modules_to_save": ["2"]},
        {"target_modules": ["0"], "bias": "lora_only"},
    ):
        laws.same_targets(stack, **settings)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    model = laws.adapt(stack, target_modules=["2"], lora_dropout=0.5)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))
