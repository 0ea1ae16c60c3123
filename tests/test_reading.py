"""Factors that are offloaded are brought in by calling what holds them; what is nowhere is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tiny
from moslora import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, relative_error

LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SETTINGS: dict[str, dict[str, object]] = {
    "linear": LINEAR,
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA": {**LINEAR, "use_dora": True},
    "PiSSA": {**LINEAR, "init_lora_weights": "pissa"},
}


def adapted(cls: type = MoSLoRAConfig, **settings: object) -> PeftModel:
    base = tiny.llama()
    torch.manual_seed(1)
    model = get_peft_model(
        base, cls(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings})
    ).eval()
    with torch.no_grad():  # so that a start from components has moved
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def on_cpu(model: PeftModel, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device="cpu")


def on_disk(model: PeftModel, folder: Path) -> nn.Module:
    return disk_offload(model, folder, execution_device="cpu")


def half_on_disk(model: PeftModel, folder: Path) -> nn.Module:
    inner = "base_model.model.model"
    places = {f"{inner}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
    places |= {"base_model.model.lm_head": "cpu", f"{inner}.layers.1": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("offload", [on_cpu, on_disk, half_on_disk])
@torch.no_grad()
def test_an_offloaded_model_computes_what_it_computes_in_memory(
    offload: Callable[[PeftModel, Path], nn.Module], kind: str, tmp_path: Path
) -> None:
    ids = tiny.tokens()
    model = adapted(**SETTINGS[kind])
    expected, base = model(ids).logits, tiny.llama()(ids).logits
    assert relative_error(expected, base) > 100 * MODEL
    model = offload(model, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert relative_error(model(ids).logits, expected) < MODEL


@torch.no_grad()
def test_an_offloaded_split_mixer_is_whole(tmp_path: Path) -> None:
    model = adapted(**LINEAR).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.train()
    model.eval()
    ids = tiny.tokens()
    expected = model(ids).logits
    assert any("mixer_start" in name for name in model.state_dict())
    found = on_cpu(model, tmp_path)(ids).logits
    # Through the modules the products round to bfloat16 one by one.
    assert relative_error(found, expected) < 0.01


class Mixture(nn.Module):
    """Experts held as one tensor, and an attention: what torch reads without calling a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.attention(x, x, x, need_weights=False)[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.weight)


@torch.no_grad()
def test_offloaded_attentions_and_experts_are_adapted(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = MoSLoRAConfig(
        r=4, target_modules=["attention"], target_parameters=["experts.weight"], init_lora_weights=False
    )
    with pytest.warns(UserWarning, match="cannot be exported"):
        model = get_peft_model(Mixture(), config).eval()
    x = torch.randn(2, 5, 16)
    expected = model(x)
    assert relative_error(expected, Mixture().eval()(x)) > 100 * MODEL
    model = cpu_offload(model, execution_device="cpu")
    assert relative_error(model(x), expected) < MODEL


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_factors_without_values_are_an_error(kind: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny.llama(), MoSLoRAConfig(r=4, **SETTINGS[kind]), low_cpu_mem_usage=True)
    assert any(p.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="has no values here"):
        model(tiny.tokens())


def test_on_the_meta_device_everything_is_without_values() -> None:
    with torch.device("meta"):
        layer = nn.Sequential(nn.Linear(8, 8))
    model = get_peft_model(layer, MoSLoRAConfig(r=2, target_modules=["0"]))
    assert model(torch.empty(3, 8, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("use_dora", [False, True])
def test_hooks_on_factors_are_called_and_change_no_gradient(use_dora: bool) -> None:
    settings = {**LINEAR, "use_dora": use_dora}
    results = []
    for hooked in (False, True):
        model = adapted(**settings)
        seen: list[nn.Module] = []
        if hooked:
            for layer in model.modules():
                if isinstance(layer, MoSLoRALayer):
                    layer.moslora_A["default"].register_forward_hook(
                        lambda module, *_, to=seen: to.append(module)
                    )
        ids = tiny.tokens()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert bool(seen) == hooked
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (one, first), (two, second) = results
    assert relative_error(one, two) < RELATIVE[torch.float32]
    for name, gradient in first.items():
        assert relative_error(second[name], gradient) < MODEL, name


def test_lora_is_the_control(tmp_path: Path) -> None:
    """Where accelerate offloads a plain LoRA, nothing changes; so it is not the offloading that is tested above."""
    ids = tiny.tokens()
    model = adapted(LoraConfig, **LINEAR)
    with torch.no_grad():
        expected = model(ids).logits
        assert relative_error(on_cpu(model, tmp_path)(ids).logits, expected) < MODEL
