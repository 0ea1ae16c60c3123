"""Small random models, built in a moment and the same for a seed."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A two-layer Llama with grouped-query attention, untied, about 40k parameters."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A two-layer GPT-2, whose projections are transformers' Conv1D."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def tokens(rows: int = 2, length: int = 12, vocab: int = 64, seed: int = 0) -> torch.Tensor:
    """Random token ids, shape ``(rows, length)``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (rows, length), generator=generator)
