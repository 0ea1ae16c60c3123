"""LoRA's arguments mean what they mean in LoRA: the same modules, ranks, scales and trained parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import laws
import tiny
from moslora import MoSLoRAConfig
from moslora.export import export_adapter
from tolerances import MODEL, relative_error

ATTENTION = ["q_proj", "v_proj"]


def run(model: nn.Module) -> Tensor:
    return model(tiny.tokens()).logits


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": None},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": r".*\.layers\.1\..*(q_proj|up_proj)"},
        {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ATTENTION, "layers_to_transform": 1},
        {"target_modules": ATTENTION, "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ATTENTION, "rank_pattern": {r".*\.0\..*": 2}, "alpha_pattern": {"v_proj": 32}},
        {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "norm"]},
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 5]},
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
    ],
    ids=str,
)
def test_an_argument_means_what_it_means_in_lora(settings: dict[str, object]) -> None:
    laws.same_targets(tiny.llama, task_type="CAUSAL_LM", **settings)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_biases_are_trained_as_in_lora(bias: str) -> None:
    laws.same_targets(tiny.gpt2, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)


TRAINED_BESIDE = {
    "tokens": {"trainable_token_indices": [3, 5]},
    "module": {"modules_to_save": ["embed_tokens"]},
    "tied module": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's, of both
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("beside", TRAINED_BESIDE)
def test_what_is_trained_beside_the_factors_is_trained_as_in_lora_and_travels(
    beside: str, tmp_path: Path
) -> None:
    """On a base whose head is tied to its embedding, which is where it could go wrong."""
    settings = {"target_modules": ATTENTION, **TRAINED_BESIDE[beside]}
    tied = lambda: tiny.llama(tie_word_embeddings=True)  # noqa: E731
    trained = []
    for cls, own in ((MoSLoRAConfig, {"mixer": "identity", "train_mixer": False}), (LoraConfig, {})):
        model = laws.adapt(tied, cls, **settings, **own, init_lora_weights=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for seed in range(3):
            ids = tiny.tokens(seed=seed)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    ours, lora = trained
    with torch.no_grad():
        expected = run(ours)
        assert relative_error(expected, run(lora)) < MODEL
        assert relative_error(run(tied()), expected) > 100 * MODEL
        ours.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tied(), tmp_path)
        assert torch.equal(run(loaded), expected)
        export_adapter(tmp_path, tmp_path / "lora")
        plain = PeftModel.from_pretrained(tied(), tmp_path / "lora")
        assert type(plain.peft_config["default"]) is LoraConfig
        assert relative_error(run(plain), expected) < MODEL
        merged = loaded.merge_and_unload()
        assert relative_error(run(merged), expected) < MODEL
        if beside != "module":  # without ensure_weight_tying the embedding alone was trained
            assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@torch.no_grad()
def test_one_side_of_a_tie_is_adapted_as_in_lora_and_the_tie_is_left_alone(
    target: str, tmp_path: Path
) -> None:
    tied = lambda: tiny.llama(tie_word_embeddings=True)  # noqa: E731
    laws.same_targets(tied, target_modules=[target])
    model = laws.adapt(tied, target_modules=[target])
    expected = run(model)
    inner = model.get_base_model()
    embedding, head = (
        m.base_layer if hasattr(m, "base_layer") else m for m in (inner.model.embed_tokens, inner.lm_head)
    )
    assert embedding.weight is head.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(tied(), tmp_path)), expected)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"shares its weight.*Untie"):
            merge()
    assert torch.equal(run(model), expected)
    unloaded = model.unload()
    assert unloaded.lm_head.weight is unloaded.model.embed_tokens.weight


def test_tying_the_adapters_themselves_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"lm_head.*modules_to_save.*trainable_token_indices"):
        laws.adapt(
            lambda: tiny.llama(tie_word_embeddings=True),
            target_modules=["embed_tokens"],
            ensure_weight_tying=True,
        )


def test_target_parameters_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a list"):
        MoSLoRAConfig(target_parameters="experts.down_proj")
