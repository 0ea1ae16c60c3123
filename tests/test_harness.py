"""Tasks of lm-eval, from a file, offline; skipped where it is not installed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import moslora
import tiny
from moslora import MoSLoRAConfig
from moslora.display import Display
from moslora.errors import ProofError
from moslora.evaluation.evaluate import evaluate
from moslora.evaluation.results import show
from moslora.metrics.choices import score_choices

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it brings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    docs = [
        {"question": f"which comes after {n}", "choices": [str(n + 1), "none of them", "a"], "gold": n % 3}
        for n in range(7)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "tiny_choices.yaml").write_text(
        f"""task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "docs.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    torch.manual_seed(1)
    config = MoSLoRAConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "_B" in name:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(folder / "adapter")
    return folder


def run(world: Path, **options: Any) -> Any:
    task = str(world / "tiny_choices.yaml")
    return evaluate(
        str(world / "base"), Display(quiet=True), adapter=world / "adapter", harness=[task], **options
    )


def test_a_task_of_the_harness_gives_what_its_definition_gives_with_the_adapter_and_without(world, tmp_path):
    report = run(world, predictions=tmp_path / "items.jsonl")
    (accuracy,) = [m for m in report.measures if m.name == "tiny_choices acc"]
    tokenizer = tiny.tokenizer()
    docs = [json.loads(line) for line in (world / "docs.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(world / "base").eval()
    for found, adapted in ((accuracy.base, False), (accuracy.tuned, True)):
        if adapted:
            model = PeftModel.from_pretrained(model, world / "adapter").eval()
        right = []
        for doc in docs:
            prompt = f"Question: {doc['question']}\nAnswer:"
            scores = score_choices(model, tokenizer, prompt, [f" {c}" for c in doc["choices"]], "cpu")
            right.append(scores.index(max(scores)) == doc["gold"])
        assert found == sum(right) / len(right)
    assert accuracy.items == 7 and report.activity.effect > 0 and report.activity.learned
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert sum(item["tuned_ok"] for item in items) / 7 == accuracy.tuned
    for doc, item in zip(docs, items, strict=True):
        assert item["reference"] == doc["choices"][doc["gold"]]  # in words, not as likelihoods
        assert {item["base"], item["tuned"]} <= set(doc["choices"])
        assert item["tuned_ok"] == (item["tuned"] == item["reference"])
        assert item["base_ok"] == (item["base"] == item["reference"])
    show(report, Display(quiet=True))


def test_a_harness_that_ignores_the_adapter_fails(world, monkeypatch):
    from moslora.evaluation.lm_eval_harness import Harness

    original = Harness.run

    def deaf(self: Any, model: Any, tokenizer: Any) -> Any:
        if not hasattr(model, "disable_adapter"):
            return original(self, model, tokenizer)
        with model.disable_adapter():
            return original(self, model, tokenizer)

    monkeypatch.setattr(Harness, "run", deaf)
    with pytest.raises(ProofError, match="not applied in the evaluation"):
        run(world)


def test_what_the_harness_does_not_know_is_refused(world, tmp_path):
    base, quiet = str(world / "base"), Display(quiet=True)
    with pytest.raises(ValueError, match="Did you mean 'arc_easy'"):
        evaluate(base, quiet, harness=["arc_eazy"])
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(base, quiet, harness=["no/such.yaml"])
    with pytest.raises(ValueError, match="brings its own data"):
        evaluate(base, quiet, harness=["arc_easy"], data="x.jsonl")


def test_a_loaded_model_gives_the_harness_what_its_folder_gives(world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"lm_eval": [world / "tiny_choices.yaml"], "adapter": world / "adapter"}
    report = moslora.evaluate(model, tiny.tokenizer(), **options)
    assert report.measures == moslora.evaluate(world / "base", **options).measures
    assert not hasattr(model, "peft_config") and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
