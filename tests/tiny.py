"""Small random models, built in a moment and the same for a seed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


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


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, 259 tokens, with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def save_chat_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    settings = {"vocab_size": 259, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 2}
    model = llama(seed, **{**settings, **changes})
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_chat_data(path: Path, count: int = 24) -> Path:
    """Requests with JSON answers, one per line."""
    lines = []
    for index in range(count):
        answer = json.dumps({"n": index % 5})
        messages = [
            {"role": "user", "content": f"say {index % 5} {index}"},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages, "kind": "even" if index % 2 == 0 else "odd"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_gguf(path: Path, model: LlamaForCausalLM, template: str = CHAT_TEMPLATE) -> Path:
    """A Llama of 260 tokens as a GGUF file, in Q8_0 where its widths allow, with a byte-level tokenizer."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = list(bytes_to_unicode().values())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*special, *letters, "th"])
    writer.add_token_merges(["t h"])
    writer.add_token_types([3] * 3 + [1] * 257)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        fits = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
