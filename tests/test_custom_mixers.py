"""Mixers given as a tensor or a callable: what they start, what is saved of them, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import laws
import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.reading import read_adapter
from moslora.core.mixers import draw_mixer
from moslora.tuner.layer import MoSLoRALayer
from tolerances import MODEL, RELATIVE, relative_error
from upstream import WHOLE

TARGETS = ["q_proj", "down_proj"]
M4 = torch.tensor([[0.0, 2, 0, 0], [1, 0, 0, 0], [0, 0, -1, 3], [0, 0, 0.5, 1]])


def rotation(r: int, generator: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(r, r), generator=generator)


def mixers(model: nn.Module) -> list[Tensor]:
    return [m.factors("default")[1].detach() for m in model.modules() if isinstance(m, MoSLoRALayer)]


def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


def test_a_tensor_is_every_mixers_start_and_is_copied() -> None:
    given = M4.double().requires_grad_() * 1  # no leaf, which cannot be deep-copied
    config = MoSLoRAConfig(r=4, target_modules=TARGETS, mixer=given)
    given.detach().zero_()
    found = mixers(get_peft_model(tiny.llama(), config))
    assert len(found) == 4 and all(torch.equal(M, M4) for M in found)


def test_a_callable_serves_every_rank_and_may_take_a_generator() -> None:
    ranks = {"rank_pattern": {"down_proj": 2}}
    plain = laws.adapt(tiny.llama, target_modules=TARGETS, mixer=torch.eye, **ranks)
    assert {len(M) for M in mixers(plain)} == {4, 2} and all(
        torch.equal(M, torch.eye(len(M))) for M in mixers(plain)
    )
    drawn = laws.adapt(tiny.llama, target_modules=TARGETS, mixer=rotation, **ranks)
    again = laws.adapt(tiny.llama, target_modules=TARGETS, mixer=rotation, **ranks)
    for one, two in zip(mixers(drawn), mixers(again), strict=True):
        assert torch.equal(one, two)
        assert relative_error(one @ one.T, torch.eye(len(one))) < RELATIVE[torch.float32]
    assert not torch.equal(mixers(drawn)[0], mixers(drawn)[2])


def test_a_default_of_a_callable_is_not_taken_for_a_generator() -> None:
    assert torch.equal(draw_mixer(lambda r, size=3.0: size * torch.eye(r), 2), 3 * torch.eye(2))
    assert torch.equal(draw_mixer(lambda r, *, generator: torch.eye(r), 2), torch.eye(2))


def test_a_callable_that_draws_from_torchs_generator_leaves_a_as_loras() -> None:
    models = [
        laws.adapt(tiny.llama, target_modules=TARGETS, init_lora_weights=True, mixer=mixer)
        for mixer in (lambda r: torch.randn(r, r), "kaiming")
    ]
    starts = [[m.factors("default")[0] for m in model.modules() if hasattr(m, "factors")] for model in models]
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))
    drawn = mixers(models[0])
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("mixer", [M4, rotation], ids=["tensor", "callable"])
@pytest.mark.parametrize("learn", [None, False])
def test_a_custom_mixer_lives_through_everything(mixer: object, learn: bool | None, tmp_path: Path) -> None:
    ranks = {"rank_pattern": {".*": 8}} if callable(mixer) else {"r": 4}
    laws.live_through(
        tiny.llama, run, tmp_path, target_modules=TARGETS, mixer=mixer, train_mixer=learn, **{"r": 4, **ranks}
    )
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["mixer"] == "custom" and said["train_mixer"] is (learn is None)


@pytest.mark.parametrize("learn", [True, False])
def test_a_custom_mixer_has_the_gradients_of_any_other(learn: bool) -> None:
    laws.hold_to_lora(
        tiny.llama, run, target_modules=TARGETS, mixer=torch.eye(4) + M4.abs(), train_mixer=learn
    )


def test_match_scale_rescales_a_given_mixer() -> None:
    model = laws.adapt(tiny.llama, target_modules=TARGETS, mixer=M4, match_scale=True, init_lora_weights=True)
    for layer in model.modules():
        if isinstance(layer, MoSLoRALayer):
            A, M, _, _ = layer.factors("default")
            assert relative_error((M @ A).norm(), A.norm()) < RELATIVE[torch.float32]
            assert relative_error(M / M.norm(), M4 / M4.norm()) < RELATIVE[torch.float32]


def test_experts_have_each_their_own_draw() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ti,eoi->to", x, self.weight)

    settings = {"r": 2, "target_modules": [], "target_parameters": ["0.weight"]}
    model = get_peft_model(nn.Sequential(Experts()), MoSLoRAConfig(**settings, mixer=rotation))
    (M,) = mixers(model)
    assert M.shape == (3, 2, 2) and not torch.equal(M[0], M[1])


@torch.no_grad()
def test_a_saved_custom_adapter_goes_on_training_and_exports(tmp_path: Path) -> None:
    model = laws.adapt(tiny.llama, target_modules=TARGETS, mixer=M4)
    model.save_pretrained(tmp_path / "native")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native", is_trainable=True).eval()
    assert torch.equal(run(loaded), run(model))
    assert any("moslora_M" in n for n, p in loaded.named_parameters() if p.requires_grad)
    compiled = torch.compile(
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "native"), fullgraph=WHOLE, backend="aot_eager"
    )
    assert relative_error(compiled(tiny.tokens(), use_cache=False).logits, run(model)) < MODEL
    export_adapter(tmp_path / "native", tmp_path / "again", to="native")
    files = [read_adapter(tmp_path / name).modules for name in ("native", "again")]
    assert all(
        torch.equal(getattr(f, x), getattr(files[1][n], x)) for n, f in files[0].items() for x in "AMB"
    )
    export_adapter(tmp_path / "native", tmp_path / "lora")
    assert relative_error(run(PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")), run(model)) < MODEL


def test_a_configuration_without_its_values_starts_nothing(tmp_path: Path) -> None:
    laws.adapt(tiny.llama, target_modules=TARGETS, mixer=M4).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny.llama(), config)
    for use in (run, lambda m: m.merge_and_unload()):
        with pytest.raises(ValueError, match=r"has no values.*from_pretrained.*tensor, a callable or a name"):
            use(model)
    config.mixer = M4
    assert all(torch.equal(M, M4) for M in mixers(get_peft_model(tiny.llama(), config)))
    with pytest.raises(ValueError, match="give them again"):
        MoSLoRAConfig(mixer="custom")


def test_a_configuration_with_a_given_mixer_is_copied_compared_and_turned_into_json() -> None:
    configs = [MoSLoRAConfig(r=4, target_modules=["q_proj"], mixer=mixer) for mixer in (M4, torch.eye)]
    for config in configs:
        twin = copy.deepcopy(config)
        assert twin == config and json.loads(json.dumps(twin.to_dict()))["mixer"] == "custom"
        found = mixers(get_peft_model(tiny.llama(), twin))
        assert all(torch.equal(M, M4 if config is configs[0] else torch.eye(4)) for M in found)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (torch.eye(3), r"r=4.*shape \(3, 3\).*must be a dense real one of shape \(4, 4\).*callable"),
        (torch.zeros(4, 4), r"is zero.*every gradient"),
        (torch.full((4, 4), float("nan")), "NaN or infinite"),
        (torch.eye(4, dtype=torch.complex64), "must be a dense real one"),
        ([[1.0]], r"is a list; it must be a name, a torch\.Tensor"),
        (7, "is a int"),
    ],
)
def test_a_tensor_that_is_no_mixer_is_refused_at_once(mixer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSLoRAConfig(r=4, mixer=mixer)


def test_a_tensor_for_one_rank_is_refused_with_another_in_rank_pattern() -> None:
    with pytest.raises(ValueError, match=r"rank_pattern\['v_proj'\]=2.*callable"):
        MoSLoRAConfig(r=4, mixer=M4, rank_pattern={"v_proj": 2})


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (lambda r: torch.ones(r), r"shape \(4,\)"),
        (lambda r: "eye", "is a str"),
        (lambda r: torch.zeros(r, r), "is zero"),
        (lambda r: torch.eye(r) / 0, "NaN or infinite"),
    ],
)
def test_what_a_callable_returns_is_held_to_the_same(mixer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny.llama(), MoSLoRAConfig(r=4, target_modules=TARGETS, mixer=mixer))
