"""Guards of PEFT that are keyed on LoRA's type or classes, read in the installed source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Mamba2Config, Mamba2ForCausalLM

from moslora import MoSLoRAConfig
from moslora.compat.peft.guards import ASKED, MODULES, OF_OTHER_METHODS
from moslora.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(peft.__file__).parent
TYPES = {"peft_type", "PeftType", "peft_method", "LoraConfig", "LoraModel", "LoraLayer", "lora_like_types"}


def words(node: ast.AST) -> set[str]:
    found = set()
    for part in ast.walk(node):
        found |= {part.attr} if isinstance(part, ast.Attribute) else set()
        found |= {part.id} if isinstance(part, ast.Name) else set()
        found |= {part.value} if isinstance(part, ast.Constant) and isinstance(part.value, str) else set()
    return found


def questions(function: ast.AST) -> Iterator[set[str]]:
    """Yield the words of comparisons and isinstance calls that ask what an adapter is called."""
    for node in ast.walk(function):
        asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")
        if (asks or isinstance(node, ast.Compare)) and words(node) & (TYPES | {"LORA"}):
            yield words(node)


def functions(node: ast.AST, inside: str = "") -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield f"{inside}{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{inside}{child.name}.")
        else:
            yield from functions(child, inside)


def asked() -> dict[str, list[set[str]]]:
    found = {}
    for pattern in MODULES:
        for path in sorted(ROOT.glob(pattern)):
            for name, function in functions(ast.parse(path.read_text(encoding="utf-8"))):
                said = [words for words in questions(function) if not words & set(OF_OTHER_METHODS)]
                if said:
                    found[f"{path.relative_to(ROOT).as_posix()}:{name}"] = said
    return found


def test_every_question_of_peft_about_the_type_of_an_adapter_has_its_answer_here() -> None:
    strange = asked().keys() - ASKED.keys()
    assert not strange, (
        f"look what PEFT does there for LoRA, and enter it in compat/peft/guards.py: {strange}"
    )
    assert "tuners/tuners_utils.py:_check_lora_target_modules_mamba" in asked()


def mamba() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    }
    config = Mamba2Config(vocab_size=64, num_hidden_layers=1, eos_token_id=2, pad_token_id=0, **sizes)
    return Mamba2ForCausalLM(config).eval()


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"], ["in_proj", "conv1d"]])
def test_modules_that_lora_is_refused_are_refused_with_a_way_out(targets: Any) -> None:
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(mamba(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    with pytest.raises(UsageError, match=r"Name '(out_proj|conv1d)' in exclude_modules"):
        get_peft_model(mamba(), MoSLoRAConfig(target_modules=targets, task_type="CAUSAL_LM"))
    # The way out; and an adapter that moslora 0.1 let be trained is loaded still.
    out = MoSLoRAConfig(target_modules="all-linear", exclude_modules=["out_proj"], task_type="CAUSAL_LM")
    get_peft_model(mamba(), out)
    if targets == ["out_proj"]:
        with pytest.warns(UserWarning, match="out_proj of this Mamba2ForCausalLM cannot be adapted"):
            get_peft_model(mamba(), MoSLoRAConfig(target_modules=targets, inference_mode=True))
