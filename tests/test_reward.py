"""Reward models: pairs train a scalar head, which stops, resumes, folds and reloads in stock PEFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import moslora.training.run
import tiny
import tiny_labeled
from moslora.comparison.compare import compare
from moslora.display import Display
from moslora.errors import DataError, EncodingError, RecipeError, Stopped
from moslora.evaluation.evaluate import evaluate
from moslora.recipe.loading import load_recipe
from moslora.tasks import find_task
from moslora.training.run import check, resume, train
from moslora.training.run_directory import RunDirectory
from test_train import stop_at
from tiny_labeled import write

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    tiny.save_chat_model(folder / "base")
    write(folder / "pairs.jsonl", tiny_labeled.pairs(24))
    write(folder / "heldout.jsonl", tiny_labeled.pairs(10, seed=7))
    return folder


def arguments(world: Path, out: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "task": "reward",
        "model": world / "base",
        "data": world / "pairs.jsonl",
        "data.heldout": world / "heldout.jsonl",
        "adapter.r": 4,
        "trainer.max_steps": 6,
        "trainer.per_device_train_batch_size": 4,
        "trainer.learning_rate": "1e-2",
        "trainer.save_steps": 100,
        "output": out / "run",
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def quiet() -> Display:
    return Display(quiet=True)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train(arguments(world, tmp_path_factory.mktemp("runs")), quiet())


def test_stock_peft_gives_the_rewards_that_were_measured(finished: RunDirectory, world: Path) -> None:
    record = finished.read()
    assert record["proofs"]["fold"]["passed"] and record["proofs"]["reload"]["passed"]
    config = AutoConfig.from_pretrained(finished.lora)
    model = AutoModelForSequenceClassification.from_pretrained(world / "base", config=config)
    model = PeftModel.from_pretrained(model, finished.lora).eval()
    tokenizer = tiny.tokenizer()
    margins = []
    for row in tiny_labeled.pairs(10, seed=7):
        rewards = []
        for name in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[name]}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            with torch.inference_mode():
                rewards.append(float(model(**tokenizer(text, return_tensors="pt")).logits[0, 0]))
        margins.append(rewards[0] - rewards[1])
    after = record["metrics"]["after"]
    assert after["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert after["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert after["loss"] == pytest.approx(loss, abs=1e-4)
    assert after["loss"] < record["metrics"]["before"]["loss"]


def test_the_page_shows_whether_margins_can_be_believed(finished: RunDirectory) -> None:
    page = finished.report.read_text(encoding="utf-8")
    assert "Reliability" in page and "Expected calibration error" in page
    assert "always preferring the longer answer" in page
    baseline = finished.read()["metrics"]["baseline"]
    assert baseline["loss"] == math.log(2) and baseline["accuracy"] == 1.0  # the data prefer the longer one


def test_a_run_that_was_stopped_goes_on_to_the_same_head(
    finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        train(arguments(world, tmp_path), quiet())
    again = resume(tmp_path / "run", quiet())
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (finished, again))
    assert one.keys() == two.keys() and any("score" in name for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_the_measured_loss_is_the_trained_one(world: Path, tmp_path: Path) -> None:
    """TRL's own loss over the held-out pairs, before any step."""
    given = arguments(
        world, tmp_path, **{"trainer.eval_strategy": "steps", "trainer.per_device_eval_batch_size": 10}
    )
    task: Any = find_task("reward")(load_recipe(given), quiet(), lambda: None)
    task.read()
    task.prepare()
    model = task.load()
    measured = task.loss(model, "base")
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path / "out", [])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "b "},
            r"line 25: fields 'chosen' and 'rejected' say the same",
        ),
        ({"prompt": "a", "chosen": "b"}, r"line 25: field 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, r"line 25: field 'rejected' is a number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "score": 3}, r"field 'score' would be ignored"),
    ],
)
def test_pairs_that_prefer_nothing_are_refused_by_row(
    row: dict[str, Any], complaint: str, world: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", [*tiny_labeled.pairs(24), row])
    with pytest.raises((DataError, EncodingError), match=complaint):
        check(arguments(world, tmp_path, data=data, **{"data.heldout": world / "heldout.jsonl"}), quiet())


def test_dropout_that_would_do_nothing_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter.lora_dropout=0.1 would do nothing"):
        load_recipe(arguments(world, tmp_path, **{"adapter.lora_dropout": 0.1}))


def test_reward_models_are_evaluated_and_compared(
    finished: RunDirectory, world: Path, tmp_path: Path
) -> None:
    after = finished.read()["metrics"]["after"]
    report = evaluate(
        str(world / "base"),
        quiet(),
        adapter=finished.lora,
        data=str(world / "heldout.jsonl"),
        settings=["task=reward"],
    )
    assert report["accuracy"].tuned == after["accuracy"]
    assert report["margin"].tuned == pytest.approx(after["margin"], rel=1e-4)
    _, verdict = compare(
        arguments(world, tmp_path),
        quiet(),
        seeds=2,
        rates=[1e-2],
        steps=1,
        validation=6,
        methods=["lora", "moslora"],
        out=tmp_path / "c",
    )
    assert verdict is not None and verdict.complete


def test_messages_and_implicit_prompts_are_pairs_too(world: Path, tmp_path: Path) -> None:
    rows = []
    for pair in tiny_labeled.pairs(8):
        asked = {"role": "user", "content": pair["prompt"]}
        sides = {
            name: [asked, {"role": "assistant", "content": pair[name]}] for name in ("chosen", "rejected")
        }
        rows.append(sides)
    found = []
    for data in (
        write(tmp_path / "implicit.jsonl", rows),
        write(tmp_path / "plain.jsonl", tiny_labeled.pairs(8)),
    ):
        task: Any = find_task("reward")(
            load_recipe(arguments(world, tmp_path, data=data)), quiet(), lambda: None
        )
        task.read()
        task.prepare()
        found.append([(pair.chosen_ids, pair.rejected_ids) for pair in task.train_set])
    assert found[0] == found[1]


def test_a_reward_model_starts_from_supervised_fine_tuning_with_a_fresh_head(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in tiny_labeled.pairs(12)]
    given = [f"model={world / 'base'}", f"data={write(tmp_path / 'sft.jsonl', rows)}", "adapter.r=4"]
    more = ["trainer.max_steps=2", "trainer.learning_rate=1e-2", "task.generate_examples=0"]
    taught = train([*given, *more, f"output={tmp_path / 'sft'}"], quiet())
    changes = {"trainer.max_steps": 1, "trainer.learning_rate": "1e-12"}
    start = [s for s in arguments(world, tmp_path, **changes) if "adapter.r=" not in s]
    run = train([*start, f"adapter.start_from={taught.adapter}"], quiet())
    one, two = (load_file(r.adapter / "adapter_model.safetensors") for r in (taught, run))
    assert one.keys() < two.keys() and {name for name in two if name not in one} == {
        "base_model.model.score.weight"
    }
    assert max(float((tensor - two[name]).abs().max()) for name, tensor in one.items()) < 1e-9
