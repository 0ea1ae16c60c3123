"""The mixer learns whatever dtype trainers hold it in, and files, merges and neighbors see M and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from moslora import MoSLoRAConfig
from moslora.tuner.layer import MoSLoRALayer
from tolerances import RELATIVE, relative_error

TARGETS = ["q_proj", "v_proj", "embed_tokens"]
# Below a bfloat16 step of an entry of M at its start, 1/4, and above one of an entry near zero.
RATE = 2e-4


def adapted(cls: type = MoSLoRAConfig, base: nn.Module | None = None, **settings: object) -> PeftModel:
    base = tiny.llama() if base is None else base
    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **settings}
    return get_peft_model(base, cls(**settings))


def cast_one_by_one(model: PeftModel) -> None:
    """What TRL does over a quantized base: ``param.data = …`` of all that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def cast_whole(model: PeftModel) -> None:
    model.to(torch.bfloat16)


CASTS: dict[str, Callable[[PeftModel], None]] = {"one by one": cast_one_by_one, "whole": cast_whole}


def train(model: PeftModel, steps: int = 5, rate: float = RATE, **settings: object) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, **settings)
    for step in range(steps):
        ids = tiny.tokens(rows=4, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def mixers(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """M of every layer, in float32 at least, copied."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoSLoRALayer) and adapter in m.scaling}
    return {name: layer.factors(adapter)[1].detach().clone().float() for name, layer in layers.items()}


def share_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    moved = [(before[name] != after[name]).flatten() for name in before]
    return float(torch.cat(moved).float().mean())


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("mixer", ["kaiming", "orthogonal", "identity"])
def test_every_entry_of_a_mixer_moves_after_a_cast_to_bfloat16(cast: str, mixer: str) -> None:
    model = adapted(mixer=mixer, init_lora_weights=False)
    CASTS[cast](model)
    before = mixers(model)
    train(model)
    after = mixers(model)
    assert share_moved(before, after) > 0.99
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    # The test has teeth: rounding these steps to bfloat16, M itself, moves a part of the entries only.
    stuck = {name: torch.equal(M.bfloat16(), after[name].bfloat16()) for name, M in before.items()}
    coarse = share_moved(
        {n: M.bfloat16() for n, M in before.items()}, {n: M.bfloat16() for n, M in after.items()}
    )
    assert mixer == "identity" or stuck or coarse < 0.9


@pytest.mark.parametrize("grad_mode", ["train", "eval"])
def test_it_moves_in_a_low_precision_base_that_was_adapted_without_autocast(grad_mode: str) -> None:
    """As ``unet.add_adapter`` does on a bfloat16 U-Net."""
    base = tiny.llama().to(torch.bfloat16)
    torch.manual_seed(1)
    config = MoSLoRAConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    getattr(model, grad_mode)()
    before = mixers(model)
    train(model)
    assert share_moved(before, mixers(model)) > 0.99


def test_in_float32_nothing_is_split() -> None:
    model = adapted(target_modules=["q_proj"]).train()
    names = dict(model.named_parameters())
    train(model)
    assert dict(model.named_parameters()).keys() == names.keys()
    assert not any("mixer_start" in name for name in model.state_dict())
    layer = next(m for m in model.modules() if isinstance(m, MoSLoRALayer))
    assert layer.factors("default")[1] is layer.moslora_M["default"].weight


@pytest.mark.parametrize("cast", CASTS)
def test_splitting_changes_no_output(cast: str) -> None:
    model = adapted(init_lora_weights=False)
    CASTS[cast](model)
    ids = tiny.tokens()
    with torch.no_grad():
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        before = mixers(model)
        model.train()
        model.eval()
        assert all(torch.equal(M, mixers(model)[name]) for name, M in before.items())
        split = model(ids).logits
    # Rounded as a whole, where it is not split yet, it is the same to the rounding of bfloat16.
    if cast == "one by one":
        plain = adapted(init_lora_weights=False)
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.data = weights[name].clone()
            assert relative_error(plain(ids).logits, split) < 1e3 * RELATIVE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_file_of_a_split_mixer_has_m_itself_and_loads_everywhere(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = adapted(init_lora_weights=False)
    cast_one_by_one(model)
    train(model, rate=1e-3)
    expected = mixers(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
        model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("mixer_start" in name for name in tensors)
    held = {n.removeprefix("base_model.model."): t for n, t in tensors.items() if "_M" in n}
    assert len(held) == len(expected)
    for name, M in expected.items():
        path = name.removeprefix("base_model.model.")
        [found] = [t for n, t in held.items() if n.startswith(f"{path}.moslora")]
        assert found.dtype == torch.float32 and torch.equal(found, M)
    again = PeftModel.from_pretrained(tiny.llama().to(dtype), tmp_path, is_trainable=True)
    for name, M in mixers(again).items():
        assert relative_error(M, expected[name]) < RELATIVE[torch.float32]
    # Loaded into a model whose mixers are split already, they are M still, and continue learning.
    other = adapted(mixer="orthogonal")
    cast_one_by_one(other)
    other.train()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    for name, M in mixers(other).items():
        assert relative_error(M, expected[name]) < 2.0**-16  # start and change, eight bits each
    before = mixers(other)
    train(other)
    assert share_moved(before, mixers(other)) > 0.99


def test_transformers_own_loader_reads_the_file_of_a_split_mixer(tmp_path: Path) -> None:
    model = adapted(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    cast_one_by_one(model)
    train(model, rate=1e-3)
    model.save_pretrained(tmp_path)
    again = tiny.llama()
    again.load_adapter(str(tmp_path))
    own = {f"base_model.model.{name}": M for name, M in mixers(again).items()}
    assert own.keys() == mixers(model).keys()
    for name, M in mixers(model).items():
        assert relative_error(own[name], M) < RELATIVE[torch.float32]


def test_a_hot_swap_into_a_split_mixer_gives_the_new_m(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    new = adapted(mixer="orthogonal", **settings)
    new.save_pretrained(tmp_path)
    model = adapted(**settings).to(torch.bfloat16).train()
    assert any("mixer_start" in name for name in model.state_dict())
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    for name, M in mixers(new).items():
        begun = M.bfloat16().float()  # in the start; the trained weight holds what that leaves
        assert torch.equal(mixers(model)[name], begun + (M - begun).bfloat16().float())


def test_resuming_from_whole_state_dicts_is_exact_and_of_trained_parameters_alone_is_said() -> None:
    model = adapted(init_lora_weights=False).to(torch.bfloat16)
    train(model)
    state = copy.deepcopy(model.state_dict())
    other = adapted(mixer="orthogonal").to(torch.bfloat16)
    other.load_state_dict(state)
    assert all(torch.equal(M, mixers(other)[name]) for name, M in mixers(model).items())
    unsplit = adapted(mixer="orthogonal")
    unsplit.load_state_dict(state)
    assert all(torch.equal(M, mixers(unsplit)[name]) for name, M in mixers(model).items())
    trained = {name: state[name] for name, p in model.named_parameters() if p.requires_grad}
    with pytest.warns(UserWarning, match="was loaded without .*mixer_start"):
        other.load_state_dict(trained, strict=False)


def test_state_dicts_of_earlier_versions_are_read(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    old = {
        n.replace("moslora_magnitude_vector", "moslora_magnitude"): t for n, t in model.state_dict().items()
    }
    other = adapted(target_modules=["q_proj"], use_dora=True, mixer="orthogonal")
    other.load_state_dict(old)
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_weight_decay_draws_a_split_mixer_to_its_start_and_a_float32_one_to_zero() -> None:
    """Without gradients only the decay acts; docs/maths.md says so."""
    norms = []
    for cast in (lambda model: None, cast_one_by_one):
        model = adapted(init_lora_weights=False)
        cast(model)
        model.train()
        before = mixers(model)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=1.0
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = mixers(model)
        norms.append([float(after[n].norm() / before[n].norm()) for n in before])
    assert all(ratio == pytest.approx(0.9, rel=1e-5) for ratio in norms[0])
    assert all(ratio == pytest.approx(1.0, rel=2.0**-8) for ratio in norms[1])


def test_an_adapter_beside_a_split_one_can_be_copied_from_it_by_name() -> None:
    """As TRL's DPOTrainer makes its reference."""
    model = adapted(target_modules=["q_proj"], init_lora_weights=False).to(torch.bfloat16)
    train(model)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    for name, M in mixers(model, "default").items():
        assert torch.equal(mixers(model, "ref")[name], M)


def test_merging_a_split_mixer_is_merging_m() -> None:
    model = adapted(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    cast_one_by_one(model)
    train(model, rate=1e-2)
    ids = tiny.tokens()
    with torch.no_grad():
        model.eval()
        expected, base = model(ids).logits, tiny.llama()(ids).logits
        merged = model.merge_and_unload()(ids).logits
    # The live update runs in bfloat16 factors; a lost start would be as large as the update.
    assert relative_error(merged, expected, base) < 0.01 < relative_error(expected, base)


def test_its_magnitude_is_spared_by_trl_and_moves() -> None:
    """TRL leaves parameters named ``lora_magnitude_vector`` in float32; so it does ours."""
    shares = {}
    for cls in (LoraConfig, MoSLoRAConfig):
        model = adapted(cls, target_modules=["q_proj"], use_dora=True)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
        train(model)
        after = {n: p.detach() for n, p in model.named_parameters() if "magnitude" in n}
        shares[cls] = share_moved(before, after)
    assert shares[MoSLoRAConfig] == shares[LoraConfig] == 1.0


def test_the_state_dict_of_trained_parameters_alone_saves_m() -> None:
    """What is gathered for saving may lack the start, which is frozen; the model has it."""
    model = adapted(target_modules=["q_proj"], init_lora_weights=False).to(torch.bfloat16)
    train(model)
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    saved = get_peft_model_state_dict(model, state_dict=state)
    for name, M in mixers(model).items():
        [found] = [t for n, t in saved.items() if n.startswith(f"{name}.moslora_M")]
        assert torch.equal(found, M)
