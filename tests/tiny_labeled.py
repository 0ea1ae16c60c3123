"""Small random encoders with tokenizers, and labeled data that they learn in a few steps."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

import tiny

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
}
OWN: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 90, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "modernbert": {
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "attn_implementation": "sdpa",
        "reference_compile": False,
    },
}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?"


def word_tokenizer(token_types: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters with BERT's special tokens, in pieces as ``##a``."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *LETTERS[:26], *(f"##{letter}" for letter in LETTERS[:26]), *"0123456"]
    inner = Tokenizer(models.WordPiece(vocab={p: i for i, p in enumerate(pieces[:64])}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=[*names, "token_type_ids"] if token_types else names,
        model_max_length=80,
    )


def save_encoder(folder: Path, family: str = "bert", seed: int = 0) -> Path:
    """A two-layer encoder as it comes from pretraining, with the head of a masked language model."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **OWN[family]})
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    word_tokenizer(token_types=family == "bert").save_pretrained(folder)
    return folder


def save_model(folder: Path, family: str) -> Path:
    """An encoder, or for ``llama`` a decoder."""
    return tiny.save_chat_model(folder) if family == "llama" else save_encoder(folder, family)


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of a few letters."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice("abcdef ") for _ in range(draw.randint(6, 12))).strip() or "a"] = None
    return list(found)


def rows_of(problem: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose label can be read off their text."""
    texts = sentences(count, seed)
    if problem == "tokens":
        return [
            {"tokens": words, "tags": ["B-X" if "a" in word else "O" for word in words]}
            for text in texts
            for words in [text.split() or ["a"]]
        ]
    if problem == "pairs":
        other = sentences(count, seed + 1)
        return [
            {"text": one, "text_pair": two, "label": "same" if one[0] == two[0] else "other"}
            for one, two in zip(texts, other, strict=True)
        ]
    if problem == "multi-label":
        return [{"text": t, "label": [letter for letter in "abc" if letter in t[:4]]} for t in texts]
    if problem == "regression":
        return [{"text": t, "label": 5 * t.count("a") / len(t)} for t in texts]
    return [{"text": t, "label": "yes" if t[0] in "abc" else "no"} for t in texts]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Preferences for the longer answer."""
    return [
        {"prompt": text, "chosen": f"long {text}", "rejected": text[:2] or "x"}
        for text in sentences(count, seed)
    ]
