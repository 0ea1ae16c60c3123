"""A tokenizer that lies beside an adapter goes with it: merge carries it, doctor compares it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tiny
from moslora.adapters.doctor import diagnose
from moslora.adapters.merge import merge
from moslora.cli import app
from moslora.errors import AdapterError
from moslora.models.tokenizer_files import read_tokenizer

OTHER = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "hi"}]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embedding has eight rows more than its tokenizer tokens, and a LoRA of it without a tokenizer."""
    root = tmp_path_factory.mktemp("own-tokenizer")
    tiny.save_chat_model(root / "base", vocab_size=267)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(root / "base")
    live = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    live.save_pretrained(root / "bare", save_embedding_layers=False)
    return root


def adapter_with(saved: Path, folder: Path, tokens: int = 0, template: str | None = None) -> Path:
    shutil.copytree(saved / "bare", folder)
    tokenizer = AutoTokenizer.from_pretrained(saved / "base")
    tokenizer.add_tokens([f"<tool{i}>" for i in range(tokens)])
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return folder


def levels(found: Any) -> dict[str, str]:
    return {finding.check: finding.level for finding in found.findings}


def encoded(folder: Path) -> tuple[Any, ...]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    return chat, tokenizer("a <tool0> b<tool1>")["input_ids"], len(tokenizer)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "added tokens": ({"tokens": 2}, "2 tokens more ('<tool0>', '<tool1>')"),
    "another template": ({"template": OTHER}, "another chat template"),
    "both": ({"tokens": 1, "template": OTHER}, "1 token more ('<tool0>'); another chat template"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_merge_carries_the_adapters_own_tokenizer_and_says_so(name: str, saved: Path, tmp_path: Path) -> None:
    changes, said = CHANGES[name]
    adapter = adapter_with(saved, tmp_path / "a", **changes)
    (tmp_path / "base").mkdir()
    shutil.copytree(saved / "base", tmp_path / "base", dirs_exist_ok=True)
    (tmp_path / "base" / "vocab.txt").write_text("stale")  # of the base's tokenizer alone
    shown = CliRunner().invoke(app, ["merge", str(tmp_path / "base"), str(adapter), str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert said in " ".join(shown.output.split())
    proof = json.loads((tmp_path / "out" / "moslora_proof.json").read_text())
    assert "; ".join(proof["tokenizer_differs"]) == said
    assert encoded(tmp_path / "out") == encoded(adapter) != encoded(saved / "base")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert levels(diagnose(adapter, str(saved / "base")))["tokenizer"] == "warning"


def test_a_tokenizer_that_says_the_same_and_none_at_all_are_told_apart(saved: Path, tmp_path: Path) -> None:
    adapter = adapter_with(saved, tmp_path / "a")
    proof = merge(saved / "base", adapter, tmp_path / "out")
    assert proof.tokenizer and not proof.tokenizer_differs
    assert levels(diagnose(adapter, str(saved / "base")))["tokenizer"] == "ok"
    assert not merge(saved / "base", saved / "bare", tmp_path / "two").tokenizer
    assert "tokenizer" not in levels(diagnose(saved / "bare", str(saved / "base")))
    assert encoded(tmp_path / "two") == encoded(saved / "base")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_alone_takes_the_place_of_the_bases(name: str, saved: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "a"
    shutil.copytree(saved / "bare", adapter)
    config = json.loads((saved / "base" / "tokenizer_config.json").read_text())
    text = OTHER if name.endswith("jinja") else json.dumps({**config, "chat_template": OTHER})
    (adapter / name).write_text(text)
    proof = merge(saved / "base", adapter, tmp_path / "out")
    assert proof.tokenizer_differs == ("another chat template",)
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.chat_template == OTHER
    assert merged("a b")["input_ids"] == AutoTokenizer.from_pretrained(saved / "base")("a b")["input_ids"]


def test_tokens_without_a_row_in_the_embedding_are_a_fault_with_two_ways_out(
    saved: Path, tmp_path: Path
) -> None:
    adapter = adapter_with(saved, tmp_path / "a", tokens=9)
    found = diagnose(adapter, str(saved / "base"))
    assert levels(found)["tokenizer"] == "error" and not found.is_usable
    with pytest.raises(AdapterError, match=r"1 tokens .*'<tool8>'.* which has 267.*resize_token_embeddings"):
        merge(saved / "base", adapter, tmp_path / "none")
    resized = AutoModelForCausalLM.from_pretrained(saved / "base")
    resized.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)))
    resized.save_pretrained(tmp_path / "resized")
    merge(tmp_path / "resized", adapter, tmp_path / "one")
    assert encoded(tmp_path / "one") == encoded(adapter)
    for file in read_tokenizer(adapter).names:  # type: ignore[union-attr]
        (adapter / file).unlink()
    merge(saved / "base", adapter, tmp_path / "two")
