from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from moslora import MoSLoRAConfig
from moslora.display import Display
from moslora.errors import ProofError
from moslora.evaluation.commonsense.protocols import PROTOCOLS
from moslora.evaluation.commonsense.questions import eval_prompt, extract, read_questions, write_training_file
from moslora.evaluation.evaluate import evaluate
from moslora.evaluation.results import show
from moslora.metrics.choices import score_choices
from tolerances import MODEL


def row(task: str, answer: str) -> dict[str, str]:
    """A question in the published form."""
    bodies = {
        "ARC-Easy": "Please choose the correct answer to the question: Which is red?\n\nAnswer1: the sky "
        "Answer2: blood Answer3: grass\n\nAnswer format: answer1/answer2/answer3",
        "boolq": "Please answer the following question with true or false, question: is ice cold?\n\n"
        "Answer format: true/false",
    }
    return {
        "instruction": bodies[task],
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    # Room for the published prompts, which have hundreds of bytes.
    model = tiny.llama(0, vocab_size=259, max_position_embeddings=1024, bos_token_id=None, eos_token_id=2)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    tiny.save_chat_data(folder / "heldout.jsonl", 8)
    for task, answers in (("ARC-Easy", ["answer2", "answer1", "answer3"]), ("boolq", ["true", "false"])):
        (folder / "tasks" / task).mkdir(parents=True)
        rows = [row(task, answer) for answer in answers]
        (folder / "tasks" / task / "test.json").write_text(json.dumps(rows))
    return folder


def save_adapter(world: Path, out: Path, config: Any, learned: bool = True) -> Path:
    torch.manual_seed(1)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(world / "base"), config)
    if learned:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "_B" in name:
                    parameter.normal_(std=0.3)
    adapted.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def adapter(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = MoSLoRAConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    return save_adapter(world, tmp_path_factory.mktemp("adapter") / "a", config)


def quiet() -> Display:
    return Display(quiet=True)


def test_base_and_adapter_are_measured_on_the_same_items(world, adapter, tmp_path):
    out = tmp_path / "items.jsonl"
    report = evaluate(
        str(world / "base"),
        quiet(),
        adapter=adapter,
        data=str(world / "heldout.jsonl"),
        settings=["task.metric=json", "task.max_new_tokens=4", "task.generate_examples=3"],
        predictions=out,
    )
    loss, match, *costs = report.measures
    assert [measure.name for measure in costs] == ["loss_general", "kl_general"]
    items = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(items) == loss.items == 8 and match.items == 3
    by_hand = [i["tuned_loss"] - i["base_loss"] for i in items]
    assert loss.difference == pytest.approx(sum(by_hand) / 8)
    assert loss.low < loss.difference < loss.high and loss.tuned != loss.base
    assert [i["base_ok"] is not None for i in items] == [True] * 3 + [False] * 5
    assert report.activity.effect > 0 and report.activity.learned
    show(report, quiet())


def test_a_loss_is_what_transformers_computes(world, tmp_path):
    texts = ["one text", "another, and longer one", "three"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = evaluate(str(world / "base"), quiet(), data=str(data))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(world / "base").eval(), tiny.tokenizer()
    losses = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.inference_mode():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert [p["base_loss"] for p in report.predictions] == pytest.approx(losses, rel=MODEL)


def test_an_adapter_that_learned_nothing_is_said_to(world, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    zero = save_adapter(world, tmp_path / "zero", config, learned=False)
    report = evaluate(str(world / "base"), quiet(), adapter=zero, data=str(world / "heldout.jsonl"))
    assert (report.activity.effect, report.activity.learned) == (0, False)
    assert (report.measures[0].difference, report.measures[0].p) == (0, 1)


def test_an_adapter_that_is_not_felt_fails(world, adapter, monkeypatch):
    import peft.peft_model

    original = peft.peft_model.PeftModel.from_pretrained.__func__

    def deaf(cls: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, *args, **kwargs)
        model.base_model.disable_adapter_layers()
        model.base_model.enable_adapter_layers = lambda: None
        return model

    monkeypatch.setattr(peft.peft_model.PeftModel, "from_pretrained", classmethod(deaf))
    with pytest.raises(ProofError, match="not applied"):
        evaluate(str(world / "base"), quiet(), adapter=adapter, data=str(world / "heldout.jsonl"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_commonsense_tasks_are_judged_by_every_protocol(world, adapter, protocol):
    report = evaluate(
        str(world / "base"),
        quiet(),
        adapter=adapter,
        data=str(world / "tasks"),
        tasks=["ARC-Easy", "boolq"],
        protocol=protocol,
    )
    assert [(m.name, m.items) for m in report.measures] == [("ARC-Easy", 3), ("boolq", 2)]
    for measure in report.measures:
        own = [p for p in report.predictions if p["place"].startswith(measure.name)]
        assert measure.base == sum(p["base_ok"] for p in own) / len(own)
        assert measure.tuned == sum(p["tuned_ok"] for p in own) / len(own)
        assert measure.fixed - measure.broken == pytest.approx((measure.tuned - measure.base) * len(own))
    show(report, quiet())


def test_protocols_stand_side_by_side_on_the_same_items(world, adapter):
    out = io.StringIO()
    both = "label,published"
    settings: dict[str, Any] = {
        "adapter": adapter,
        "data": str(world / "tasks"),
        "tasks": ["ARC-Easy", "boolq"],
    }
    report = evaluate(str(world / "base"), quiet(), protocol=both, **settings)
    for protocol in both.split(","):
        own = [m for m in report.measures if m.protocol == protocol]
        assert own == evaluate(str(world / "base"), quiet(), protocol=protocol, **settings).measures
    show(report, Display(out))
    text = out.getvalue()
    labels = {(p["protocol"], p["place"]): p["tuned_label"] for p in report.predictions}
    places = [place for protocol, place in labels if protocol == "label"]
    same = sum(labels["label", p] == labels["published", p] for p in places) / len(places)
    assert f"label and published choose the same answer on {same:.0%}" in text
    # A random model says no label that the pattern finds.
    assert [m.unread for m in report.measures if m.protocol == "published"] == [3, 2]
    # Others' figures stand beside, and are said to be of other models.
    assert "85.13 %" in text and "of other models" in text and "90.5 %" in text


def test_commonsense_takes_the_tasks_that_are_there_and_says_which_are_not(world):
    out = io.StringIO()
    report = evaluate(str(world / "base"), Display(out), data=str(world / "tasks"), tasks=["commonsense"])
    assert {m.name for m in report.measures} == {"ARC-Easy", "boolq"}
    assert "without piqa" in out.getvalue()


def test_sharing_the_prompt_changes_no_score():
    model, tokenizer = tiny.llama(2, vocab_size=259, max_position_embeddings=256), tiny.tokenizer()
    prompt, choices = "Question: which?\nAnswer:", [" a", " a longer one", " the third of them"]
    shared = score_choices(model, tokenizer, prompt, choices, "cpu")
    whole = score_choices(model, tokenizer, prompt, choices, "cpu", share_prompt=False)
    assert shared == pytest.approx(whole, rel=MODEL)
    # And both are the sum that the definition gives, text by text.
    ids = tokenizer(prompt + choices[1], return_tensors="pt")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.inference_mode():
        likely = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
    by_hand = sum(float(likely[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))
    assert shared[1] == pytest.approx(by_hand, rel=MODEL)


def test_questions_are_taken_apart_as_they_are_written(world):
    arc, *_ = read_questions(world / "tasks", "ARC-Easy")
    assert (arc.stem, arc.answer) == ("Which is red?", "answer2")
    assert arc.choices == {"answer1": "the sky", "answer2": "blood", "answer3": "grass"}
    boolq, *_ = read_questions(world / "tasks", "boolq")
    assert (boolq.stem, boolq.choices) == ("is ice cold?", {"true": "true", "false": "false"})


def test_the_published_prompt_keeps_its_white_space(world):
    question = read_questions(world / "tasks", "boolq")[0]
    lines = eval_prompt(question).split("\n")
    assert lines[0].endswith("completes the request. ")  # one space, and the training prompt has two
    assert lines[2] == " " * 16 + "### Instruction:"
    assert lines[-1] == " " * 16 and lines[-2] == " " * 16 + "### Response:"


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("ARC-Easy", "answer3, not answer1", "answer3"),
        ("ARC-Easy", "Answer3", ""),
        ("hellaswag", "ending5", ""),
        ("boolq", "well\n### Response:\ntrue", ""),
    ],
)
def test_an_answer_is_extracted_as_published(task, text, answer):
    assert extract(task, text) == answer


def test_training_data_take_the_published_prompt(tmp_path):
    source = tmp_path / "train.json"
    source.write_text(json.dumps([row("boolq", "true"), {**row("boolq", "false"), "input": "{braces}"}]))
    assert write_training_file(source, tmp_path / "out.jsonl") == 2
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["prompt"].split("\n")[0].endswith("request.  ") and first["completion"].endswith("true")
    assert "### Input:\n" + " " * 16 + "{braces}" in second["prompt"]


def test_what_cannot_be_evaluated_is_refused(world, adapter, tmp_path):
    base = str(world / "base")
    with pytest.raises(ValueError, match="Nothing to evaluate"):
        evaluate(base, quiet())
    with pytest.raises(ValueError, match="choose from"):
        evaluate(base, quiet(), data=str(world / "tasks"), tasks=["ARC-Eazy"])
    with pytest.raises(ValueError, match=r"task\.metric=json would not be used"):
        evaluate(base, quiet(), data=str(world / "tasks"), tasks=["ARC-Easy"], settings=["task.metric=json"])
    with pytest.raises(ValueError, match="does not exist"):
        evaluate(base, quiet(), data=str(world / "tasks"), tasks=["piqa"])
    with pytest.raises(ValueError, match="not an adapter directory"):
        evaluate(base, quiet(), data=str(world / "heldout.jsonl"), adapter=tmp_path)
    with pytest.raises(FileExistsError):
        evaluate(base, quiet(), data=str(world / "heldout.jsonl"), predictions=world / "heldout.jsonl")
