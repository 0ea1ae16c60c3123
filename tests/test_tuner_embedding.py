from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import laws
import tiny
from moslora.core.mixers import MIXERS
from tolerances import RELATIVE, relative_error


def words(vocab: int = 20, dim: int = 8, scale: float | None = None, **changes: object) -> nn.Module:
    """An embedding and a layer on it."""
    torch.manual_seed(0)
    if scale is None:
        embedding: nn.Module = nn.Embedding(vocab, dim, **changes)
    else:
        embedding = Gemma3TextScaledWordEmbedding(vocab, dim, padding_idx=0, embed_scale=scale)
        nn.init.normal_(embedding.weight)
    return nn.Sequential(embedding, nn.Tanh(), nn.Linear(dim, 6)).eval()


def run(model: nn.Module, vocab: int = 20) -> Tensor:
    # Repeated tokens, and the padding token 0.
    return model(torch.tensor([[0, 1, 2, 2, 3, vocab - 1], [5, 0, 2, 4, 1, 1]]))


@given(
    vocab=st.integers(6, 30),
    dim=st.integers(1, 9),
    r=st.sampled_from([2, 4, 10]),
    scale=st.sampled_from([None, 1.0, 7.5]),
    padding_idx=st.sampled_from([None, 0, 2]),
    mixer=st.sampled_from(sorted(MIXERS)),
)
def test_outputs_and_gradients_are_those_of_lora_with_the_mixer_folded(
    vocab: int, dim: int, r: int, scale: float | None, padding_idx: int, mixer: str
) -> None:
    changes = {"padding_idx": padding_idx} if scale is None else {}

    @torch.no_grad()
    def as_trained(model: nn.Module) -> None:
        layer = model.base_model.model[0]
        if layer.base_layer.padding_idx is not None:  # starts at zero and has no gradient, so it stays
            layer.factors("default")[0][:, layer.base_layer.padding_idx] = 0

    laws.hold_to_lora(
        lambda: words(vocab, dim, scale, **changes),
        lambda model: run(model, vocab),
        prepare=as_trained,
        target_modules=["0", "2"],
        r=r,
        mixer=mixer,
        train_mixer=True,
    )


@pytest.mark.parametrize("scale", [None, 7.5])
def test_an_embedding_lives_as_a_linear_layer_does(scale: float | None, tmp_path: Path) -> None:
    laws.live_through(lambda: words(scale=scale), run, tmp_path, target_modules=["0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_rounds_and_nothing_more(dtype: torch.dtype, autocast: bool) -> None:
    laws.in_low_precision(lambda: words(scale=7.5), run, dtype, autocast, target_modules=["0"])


def test_gradients_scaled_by_frequency_are_loras() -> None:
    laws.hold_to_lora(
        lambda: words(scale_grad_by_freq=True), run, target_modules=["0"], mixer="gaussian", train_mixer=False
    )


def test_an_embedding_with_sparse_gradients_trains_with_dense_ones() -> None:
    grads = []
    for sparse in (False, True):
        model = laws.adapt(lambda sparse=sparse: words(sparse=sparse), target_modules=["0"])
        run(model).square().sum().backward()
        grads.append([p.grad.to_dense() for p in laws.factors_by_key(model).values()])
    assert all(relative_error(a, b) < RELATIVE[torch.float32] for a, b in zip(*grads, strict=True))


def test_an_embedding_that_rewrites_its_rows_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"max_norm=1.0.*max_norm=None.*modules_to_save"):
        laws.adapt(lambda: words(max_norm=1.0), target_modules=["0"])


@torch.no_grad()
def test_match_scale_keeps_the_factor_that_is_not_zero() -> None:
    model = laws.adapt(words, target_modules=["0"], match_scale=True, init_lora_weights=True)
    A, M, B, _ = model.base_model.model[0].factors("default")
    assert not A.any() and relative_error((B @ M).norm(), B.norm()) < RELATIVE[torch.float32]


def test_all_three_factors_learn() -> None:
    model = laws.adapt(words, target_modules=["0"], init_lora_weights=True).train()
    start = {name: p.detach().clone() for name, p in laws.factors_by_key(model).items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(p, start[name]) for name, p in laws.factors_by_key(model).items())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@torch.no_grad()
def test_a_language_model_with_adapted_embedding_and_head_is_saved_and_merged(tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    model = laws.adapt(tiny.llama, **settings)
    expected = model(tiny.tokens()).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(loaded(tiny.tokens()).logits, expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative_error(merged(tiny.tokens()).logits, expected) < laws.MODEL


def test_the_same_embeddings_are_adapted_as_in_lora() -> None:
    for settings in (
        {"target_modules": ["embed_tokens"]},
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "rank_pattern": {"embed_tokens": 2},
            "use_rslora": True,
        },
        {"target_modules": r".*(embed_tokens|v_proj)", "alpha_pattern": {"embed_tokens": 3}},
    ):
        laws.same_targets(tiny.llama, **settings)
