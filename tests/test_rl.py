"""MoSLoRAConfig in TRL's GRPO and RLOO: the policy that generates is the adapted model, its reference is the base."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moslora
import tiny
from moslora import MoSLoRAConfig
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
PROMPTS = ["say 1 ", "say 2 "]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_chat_model(tmp_path_factory.mktemp("base"))


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def build(
    name: str, base: Path, folder: Path, model: Any, peft_config: Any, **settings: Any
) -> tuple[Any, list[Any]]:
    """A trainer whose policy is greedy, and the completions that its reward was asked about."""
    seen: list[Any] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return [float(sum(ids) % 7) for ids in completion_ids]

    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder),
        **{
            "beta": 0.3,
            "top_k": 1,  # so that what is generated is known
            "max_completion_length": NEW_TOKENS,
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            **settings,
        },
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft_config,
    )
    return trainer, seen


def greedy(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
                                pad_token_id=0)  # fmt: skip
    return [int(token) for token in out[0, ids.shape[1] :]]


def mean_kl(policy: Any, base: Any, tokenizer: Any, completions: list[list[int]], name: str) -> float:
    """The trainers' estimates of the KL, from plain forwards: of Schulman's k3 in GRPO, of the log-ratio in RLOO."""
    terms = []
    for prompt, answer in zip([p for p in PROMPTS for _ in range(2)], completions, strict=True):
        asked = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([asked + list(answer)])
        with torch.no_grad():
            p, q = (m.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1) for m in (policy, base))
        at = torch.arange(len(asked) - 1, ids.shape[1] - 1)
        one, two = (x[at, ids[0, at + 1]] for x in (p, q))
        terms.append((two - one).exp() - (two - one) - 1 if name == "GRPO" else one - two)
    return float(torch.cat(terms).mean())


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_the_adapted_model_generates_and_the_base_is_its_reference(
    name: str, base: Path, tmp_path: Path
) -> None:
    config = MoSLoRAConfig(
        r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer, seen = build(name, base, tmp_path, load(base), config)
    policy, plain, tokenizer = trainer.model, load(base), trainer.processing_class
    wanted = {prompt: greedy(policy, tokenizer, prompt) for prompt in PROMPTS}
    expected = mean_kl(policy, plain, tokenizer, [wanted[p] for p in PROMPTS for _ in range(2)], name)
    trainer.train()
    assert all(wanted[prompt] != greedy(plain, tokenizer, prompt) for prompt in PROMPTS)
    assert {tuple(ids) for ids in seen} == {tuple(ids) for ids in wanted.values()}
    logged = next(line for line in trainer.state.log_history if "kl" in line)
    assert logged["kl"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_an_adapter_that_is_trained_further_is_its_own_reference_and_the_result_folds(
    name: str, base: Path, tmp_path: Path
) -> None:
    config = MoSLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load(base), config).save_pretrained(tmp_path / "start")
    model = PeftModel.from_pretrained(load(base), tmp_path / "start", is_trainable=True)
    trainer, _ = build(name, base, tmp_path, model, None)
    trainer.train()
    logged = next(line for line in trainer.state.log_history if "kl" in line)
    assert logged["kl"] == pytest.approx(0, abs=1e-6)  # at the first step both are the start
    trainer.model.save_pretrained(tmp_path / "tuned", selected_adapters=["default"])
    moslora.export(tmp_path / "tuned", tmp_path / "lora")
    ids = tiny.tokens(1, 8)
    stock = PeftModel.from_pretrained(load(base), tmp_path / "lora").eval()
    with torch.no_grad():
        assert relative_error(stock(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits) < MODEL


def test_the_script_of_the_documentation_trains_on_exact_match(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[1] / "recipes" / "home" / "reinforce.py"
    spec = importlib.util.spec_from_file_location("home_reinforce", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    right, wrong, prose = '[{"on":"lamp","in":"den"}]', '[{"off":"lamp","in":"den"}]', "Sure!"
    answers = [[{"role": "assistant", "content": text}] for text in (right, f" {right} ", wrong, prose)]
    assert script.exact_match(answers, [right] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert script.well_formed(answers, [right] * 4) == [0.1, 0.1, 0.1, 0.0]
    config = MoSLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(base), config).save_pretrained(tmp_path / "start")
    script.main(
        ["--model", str(base), "--adapter", str(tmp_path / "start"), "--out", str(tmp_path / "out"), "--steps", "1",
         "--generations", "2", "--prompts", "1", "--new-tokens", "3", "--heldout", "2"]
    )  # fmt: skip
    assert (tmp_path / "out" / "lora" / "adapter_config.json").is_file()
    assert "exact match" in capsys.readouterr().out
