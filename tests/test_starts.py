"""Starts beyond LoRA's own: principal components and a QR of the base weight, and orthogonal."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import laws
import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.arithmetic import FOLD_TOLERANCE
from moslora.adapters.doctor import diagnose
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.directory import WEIGHTS
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.inspection import inspect_adapter
from moslora.adapters.merge import merge
from moslora.errors import AdapterError
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, relative_error

BUILDERS = {
    "llama": (tiny.llama, ["q_proj", "down_proj"]),
    "gpt2, Conv1D": (tiny.gpt2, ["c_attn", "c_proj"]),
}
PISSA = {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}
OLORA = {**PISSA, "init_lora_weights": "olora"}
SUBTRACTED = pytest.mark.parametrize("start", ["pissa", "olora"])


def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


def layers(model: nn.Module) -> list[MoSLoRALayer]:
    return [module for module in model.modules() if isinstance(module, MoSLoRALayer)]


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    """Everything that is trained moves, in a few large steps; magnitudes in small ones, for none may come near zero."""
    groups: dict[float, list[nn.Parameter]] = {5.0: [], 1.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[1.0 if "magnitude" in name else 5.0].append(parameter)
    optimizer = torch.optim.SGD([{"params": held, "lr": lr} for lr, held in groups.items() if held], lr=5.0)
    for seed in range(steps):
        ids = tiny.tokens(seed=seed)
        with torch.enable_grad():
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(kind: str = "llama", **settings: object) -> PeftModel:
    build, targets = BUILDERS[kind]
    return train(laws.adapt(build, target_modules=targets, **{**PISSA, **settings}))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_factors_start_as_the_principal_part_and_change_nothing(kind: str, rslora: bool) -> None:
    build, targets = BUILDERS[kind]
    base = build()
    model = laws.adapt(build, target_modules=targets, **PISSA, use_rslora=rslora)
    assert torch.equal(run(model), run(base))
    for layer in layers(model):
        A, M, B = layer.held_factors("default")
        weight = layer.get_base_weight()
        assert torch.equal(weight, base.get_submodule(name_of(model, layer)).weight)
        weight = weight.T if layer.fan_in_fan_out else weight
        U, S, Vh = torch.linalg.svd(weight)
        part = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        assert relative_error(layer.scaling["default"] * B @ M @ A, part) < MODEL
        assert torch.equal(M, torch.diag(M.diag())) and relative_error(A @ A.T, torch.eye(4)) < MODEL
        assert not layer.get_delta_weight("default").any()


def name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is layer).removeprefix("base_model.model.")


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("mixer", ["identity", "kaiming", torch.eye(4).flip(0)], ids=["I", "kaiming", "own"])
@torch.no_grad()
def test_olora_starts_from_a_qr_and_changes_nothing_whatever_m_is(kind: str, mixer: object) -> None:
    build, targets = BUILDERS[kind]
    base = build()
    settings = {**OLORA, "target_modules": targets, "match_scale": mixer == "kaiming"}
    model = laws.adapt(build, mixer=mixer, **settings)
    assert torch.equal(run(model), run(base))
    for layer in layers(model):
        A, M, B = layer.held_factors("default")
        weight = layer.get_base_weight()
        assert torch.equal(weight, base.get_submodule(name_of(model, layer)).weight)
        Q, R = torch.linalg.qr(weight.T if layer.fan_in_fan_out else weight)
        assert torch.equal(B, Q[:, :4]) and torch.equal(A, R[:4])
        assert not layer.get_delta_weight("default").any()
        if mixer == "identity":
            assert torch.equal(M, torch.eye(4))
        elif mixer == "kaiming":
            assert relative_error((M @ A).norm(), A.norm()) < RELATIVE[torch.float32]
        else:
            assert torch.equal(M, mixer)


def test_olora_with_m_the_identity_is_pefts() -> None:
    """PEFT's takes s·B·A out of the base weight; outputs and gradients are equal up to the rounding of that."""
    settings = {**OLORA, "target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    ours = laws.adapt(tiny.llama, mixer="identity", **settings)
    lora = laws.adapt(tiny.llama, LoraConfig, **settings)
    held, judged = laws.factors_by_key(ours), laws.factors_by_key(lora)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name, p in judged.items():
            own = held[name.replace("lora_", "moslora_")]
            assert torch.equal(own, p)
            p += 0.1 * torch.randn(p.shape, generator=generator)
            own.copy_(p)
    assert relative_error(run(ours), run(tiny.llama())) > 100 * MODEL
    outs = [run(model) for model in (ours, lora)]
    assert relative_error(*outs) < MODEL
    for out in outs:
        out.square().mean().backward()
    for name, p in judged.items():
        assert relative_error(held[name.replace("lora_", "moslora_")].grad, p.grad) < MODEL


@SUBTRACTED
def test_gradients_are_those_of_the_factors_on_the_residual(start: str) -> None:
    """The judge takes the principal part out of the weight, as PiSSA does, and runs A, M and B as a chain."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 5)).double()
    config = MoSLoRAConfig(**{**PISSA, "init_lora_weights": start}, target_modules=["0"])
    layer = get_peft_model(copy.deepcopy(base), config).base_model.model[0]
    A, M, B = layer.held_factors("default")
    s = layer.scaling["default"]
    with torch.no_grad():
        residual = base[0].weight - s * B @ M @ A
        for factor in (A, M, B):
            factor += 0.1 * torch.randn_like(factor)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = nn.functional.linear(x, residual, base[0].bias) + s * (x @ A.T @ M.T @ B.T)
    found = layer(x)
    assert relative_error(found, expected) < RELATIVE[torch.float64]
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    grads = [torch.autograd.grad((out * weights).sum(), (A, M, B)) for out in (found, expected)]
    assert all(relative_error(a, b) < RELATIVE[torch.float64] for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@SUBTRACTED
def test_it_is_saved_loaded_switched_and_merged_exactly(
    kind: str, dora: bool, trainable: bool, start: str, tmp_path: Path
) -> None:
    build, targets = BUILDERS[kind]
    model = trained(kind, use_dora=dora, train_mixer=trainable, init_lora_weights=start)
    with torch.no_grad():
        base, expected = run(build()), run(model)
        assert relative_error(base, expected) > 100 * MODEL
        model.save_pretrained(tmp_path)
        said = json.loads((tmp_path / "adapter_config.json").read_text())
        assert said["init_lora_weights"] == start
        assert said["mixer"] == ("singular-values" if start == "pissa" else "orthogonal")
        for low in (False, True):
            loaded = PeftModel.from_pretrained(
                build(), tmp_path, low_cpu_mem_usage=low, is_trainable=trainable
            )
            assert torch.equal(run(loaded.eval()), expected)
        moving = {
            n.split("moslora_")[1].split(".")[0] for n, p in loaded.named_parameters() if p.requires_grad
        }
        assert moving == ({"A", "M", "B", *["magnitude_vector"] * dora} if trainable else set())
        assert torch.equal(run(copy.deepcopy(model)), expected)
        model.add_adapter("other", MoSLoRAConfig(r=2, target_modules=targets, init_lora_weights=False))
        assert torch.equal(run(model), expected)
        model.set_adapter("other")
        assert not torch.equal(run(model), expected)
        model.set_adapter("default")
        assert not any("start" in n for n, p in model.named_parameters() if p.requires_grad)
        with model.disable_adapter():
            assert torch.equal(run(model), base)
        model.merge_adapter()
        assert relative_error(run(model), expected) < MODEL
        model.unmerge_adapter()
        assert relative_error(run(model), expected) < MODEL
        assert relative_error(run(model.merge_and_unload(safe_merge=True)), expected) < MODEL


@pytest.mark.parametrize("kind", BUILDERS)
@SUBTRACTED
@torch.no_grad()
def test_its_fold_is_a_plain_lora_of_twice_the_rank(kind: str, start: str, tmp_path: Path) -> None:
    build, targets = BUILDERS[kind]
    model = trained(kind, rank_pattern={targets[1]: 2}, use_rslora=True, init_lora_weights=start)
    expected = run(model)
    model.save_pretrained(tmp_path / "native")
    proof = export_adapter(tmp_path / "native", tmp_path / "lora")
    assert proof.max_relative_error <= FOLD_TOLERANCE
    theirs = PeftModel.from_pretrained(build(), tmp_path / "lora").eval()
    assert type(theirs.peft_config["default"]) is LoraConfig
    assert relative_error(run(theirs), expected) < MODEL
    at_rest = read_adapter(tmp_path / "native")
    for layer in layers(model):
        delta = layer.get_delta_weight("default").double()
        delta = delta.T if layer.fan_in_fan_out else delta
        found = at_rest.modules[name_of(model, layer)]
        assert found.r == 2 * layer.r["default"]
        assert relative_error(found.delta_weight(), delta, layer.get_base_weight().double()) < MODEL
    export_adapter(tmp_path / "native", tmp_path / "again", to="native")
    again = PeftModel.from_pretrained(build(), tmp_path / "again").eval()
    assert relative_error(run(again), expected) < MODEL


@SUBTRACTED
@torch.no_grad()
def test_merging_on_disk_and_looking_at_it_know_the_start(start: str, tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = trained(init_lora_weights=start)
    expected = run(model)
    model.save_pretrained(tmp_path / "native")
    merge(tmp_path / "base", tmp_path / "native", tmp_path / "merged")
    merged = type(tiny.llama()).from_pretrained(tmp_path / "merged")
    assert relative_error(run(merged), expected) < MODEL
    assert "twice the rank" in inspect_adapter(tmp_path / "native").note
    found = diagnose(tmp_path / "native", None, ["peft"])
    assert found.is_usable and any(f.check == "start" for f in found.findings)
    model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    assert relative_error(run(model), expected) < MODEL


@pytest.mark.parametrize("part", ["moslora_start_A", "moslora_start_M", "moslora_start_B", "moslora_start"])
@SUBTRACTED
def test_a_file_that_lost_its_start_is_refused(part: str, start: str, tmp_path: Path) -> None:
    trained(init_lora_weights=start).save_pretrained(tmp_path)
    kept = {name: t for name, t in load_file(tmp_path / WEIGHTS).items() if part not in name}
    save_file(kept, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match="have their start whole"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"start_\w.*missing from the checkpoint"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_a_start_that_the_configuration_does_not_tell_of_is_refused(tmp_path: Path) -> None:
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "init_lora_weights": True, "mixer": "kaiming"})
    )
    with pytest.raises(AdapterError, match="have their start whole"):
        read_adapter(tmp_path)
    with pytest.raises(ValueError, match="fits no adapted module"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


@torch.no_grad()
def test_a_low_precision_base_and_a_randomised_decomposition_lose_nothing() -> None:
    for settings in (PISSA, OLORA):
        base = tiny.llama().to(torch.bfloat16)
        expected = run(base)
        torch.manual_seed(3)
        model = get_peft_model(base, MoSLoRAConfig(**settings, target_modules=["q_proj"]))
        for layer in layers(model):
            assert not layer.get_delta_weight("default").any()
            assert all(factor.dtype == torch.float32 for factor in layer.factors("default")[:3])
        assert relative_error(run(model).float(), expected.float()) < 2**-7  # one rounding to bfloat16
    state = torch.get_rng_state()
    settings = {**PISSA, "init_lora_weights": "pissa_niter_4"}
    model = laws.adapt(tiny.llama, target_modules=["q_proj"], **settings)
    assert relative_error(run(model), run(tiny.llama())) < MODEL
    assert not torch.equal(torch.get_rng_state(), state)  # A and B drew, as in every other start


@SUBTRACTED
@torch.no_grad()
def test_a_configuration_of_a_saved_adapter_starts_nothing(start: str, tmp_path: Path) -> None:
    trained(init_lora_weights=start).save_pretrained(tmp_path)
    model = get_peft_model(tiny.llama(), MoSLoRAConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"no file was loaded.*new configuration"):
        run(model)


@pytest.mark.parametrize(
    "settings",
    [
        *(PISSA, {**PISSA, "use_dora": True}, OLORA, {**OLORA, "mixer": torch.eye(4).flip(0)}),
        *({"r": 4, "mixer": torch.eye(4).flip(0)}, {"r": 4, "use_dora": True}),
    ],
    ids=["pissa", "pissa, DoRA", "olora", "olora, custom", "custom", "DoRA"],
)
@torch.no_grad()
def test_transformers_own_methods_save_and_load_them(settings: dict[str, object], tmp_path: Path) -> None:
    """They leave inference_mode as it is, so a file may not say that it is one."""
    model = tiny.llama()
    model.add_adapter(MoSLoRAConfig(target_modules=["q_proj"], **settings))
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is False
    again = tiny.llama()
    again.load_adapter(str(tmp_path))
    assert torch.equal(run(again), run(model)) and not torch.equal(run(again), run(tiny.llama()))


ORTHOGONAL = {"init_lora_weights": "orthogonal", "r": 8}


@torch.no_grad()
def test_an_orthogonal_start_with_m_the_identity_is_pefts() -> None:
    build, targets = BUILDERS["llama"]
    ours = laws.adapt(build, target_modules=targets, mixer="identity", **ORTHOGONAL)
    lora = laws.adapt(build, LoraConfig, target_modules=targets, **ORTHOGONAL)
    judged = laws.factors_by_key(lora)
    for name, p in laws.factors_by_key(ours).items():
        if "_M." not in name:
            assert torch.equal(p, judged[name.replace("moslora_", "lora_")])


@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "gaussian", "two-subspace", torch.eye(8).flip(0)])
@pytest.mark.parametrize("match_scale", [False, True])
def test_an_orthogonal_start_changes_nothing_and_learns_at_once(mixer: object, match_scale: bool) -> None:
    build, targets = BUILDERS["llama"]
    settings = {"target_modules": targets, "mixer": mixer, "match_scale": match_scale, **ORTHOGONAL}
    model = laws.adapt(build, **settings)
    plain = laws.adapt(build, **{**settings, "mixer": "identity"})
    with torch.no_grad():
        assert relative_error(run(model), run(build())) < MODEL
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for layer, other in zip(layers(model), layers(plain), strict=True):
        A, M, B, _ = layer.factors("default")
        size = B.abs() @ M.abs() @ A.abs()
        assert relative_error(B @ M @ A, torch.zeros_like(size), size) < RELATIVE[torch.float32]
        learning = [factor for factor in layer.held_factors("default") if factor.requires_grad]
        # Two subspaces have B·M = 0 here, so A follows after B's first step, as in a start with B = 0.
        assert all(factor.grad.any() for factor in (learning[1:] if mixer == "two-subspace" else learning))
        # The same law: A is what LoRA's would be, B as large, of half the rank.
        A0, _, B0, _ = other.factors("default")
        assert torch.equal(A, A0) and relative_error(B.norm(), B0.norm()) < MODEL
        assert torch.linalg.matrix_rank(B.double(), rtol=1e-5) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_lora_weights": "pissa", "mixer": "gaussian"}, r"mixer='gaussian'.*Leave both out"),
        ({"init_lora_weights": "pissa", "mixer": torch.eye(8)}, "mixer='custom'"),
        ({"init_lora_weights": "pissa", "match_scale": True}, "match_scale=True"),
        ({"init_lora_weights": "pissa_niter_x"}, r"choose True.*pissa_niter_\["),
        ({"mixer": "singular-values"}, "Leave mixer out and set"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r=3 is odd"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 5}}, "q=5 is odd"),
    ],
)
def test_starts_without_a_meaning_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSLoRAConfig(**arguments)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            nn.Conv2d(4, 4, 1),
            {},
            "cannot be used with this Conv2d: it is there for linear layers.*exclude_modules",
        ),
        (nn.Embedding(8, 4), {}, "cannot be used with this Embedding"),
        (nn.MultiheadAttention(4, 2), {}, "cannot be used with this MultiheadAttention"),
        (nn.Linear(4, 3), {"r": 4}, r"needs 4 components.*\(3, 4\) has 3"),
        (nn.Linear(4, 3), {"r": 4, "init_lora_weights": "olora"}, r"needs 4 components.*\(3, 4\) has 3"),
        (nn.Linear(4, 3), {"lora_alpha": 0}, "divides by alpha / r"),
    ],
)
def test_layers_and_ranks_without_such_a_start_are_refused(
    model: nn.Module, settings: dict[str, object], message: str
) -> None:
    config = MoSLoRAConfig(**{"r": 2, "init_lora_weights": "pissa", "target_modules": ["0"], **settings})
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(model), config)
