"""Runs of ``task: preference``: every loss trains, stops, resumes, folds and reloads; what is measured is right."""

from __future__ import annotations

import copy
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import moslora
import moslora.training.callbacks
import tiny
from moslora import MoSLoRAConfig
from moslora.data.tokenization import IGNORED
from moslora.display import Display
from moslora.errors import EncodingError, RecipeError, Stopped, UsageError
from moslora.recipe.loading import load_recipe
from moslora.recipe.preferences import LOSSES
from moslora.recipe.schema import PreferenceTaskSection
from moslora.tasks.preference.rewards import negative_log_sigmoid, reference_of, score_preferences
from moslora.tasks.preference.task import PreferenceTask
from moslora.training.run import check, resume, train
from test_train import stop_at, weights
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# One loss of each of TRL's trainers: they differ in what they save, restore and hand to the model. Those of the two
# with a reference are held bit by bit against a run that was not stopped.
OF_EACH_TRAINER = ("dpo", "kto", "simpo", "orpo")
WITH_REFERENCE = OF_EACH_TRAINER[:2]


def pairs(count: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"say {i % 5} {i}",
            "chosen": json.dumps({"n": i % 5}),
            "rejected": f"no idea, {i}" if i % 2 else "no",
        }
        for i in range(count)
    ]


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def nothing_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than a run; one test looks at it."""
    if "leaves" not in request.node.name:
        monkeypatch.setattr(moslora.training.run, "write_report", lambda *_, **__: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    save_rows(folder / "train.jsonl", pairs(20))
    save_rows(folder / "heldout.jsonl", [{**row, "prompt": f"{row['prompt']}!"} for row in pairs(5)])
    return folder


def arguments(world: Path, out: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "task": "preference",
        "model": world / "base",
        "data": world / "train.jsonl",
        "data.heldout": world / "heldout.jsonl",
        "task.generate_examples": 2,
        "task.max_new_tokens": 4,
        "adapter.r": 4,
        "trainer.max_steps": 4,
        "trainer.learning_rate": "5e-3",
        "trainer.save_steps": 100,
        "output.dir": out,
        "output.name": "run",
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def quiet() -> Display:
    return Display(quiet=True)


def prepared(world: Path, out: Path, **changes: object) -> PreferenceTask:
    task = PreferenceTask(load_recipe(arguments(world, out, **changes)), quiet(), lambda: None)
    task.read()
    task.prepare()
    return task


def test_the_recipe_names_every_loss() -> None:
    choices = typing.get_args(PreferenceTaskSection.model_fields["loss"].annotation)
    assert set(choices) == set(LOSSES)


# Of TRL's DPO trainer: runs of these differ in one formula of TRL's.
ALIKE = (
    "hinge",
    "robust",
    "exo",
    "nca",
    "bco",
    "sppo",
    "aot",
    "aot-unpaired",
    "apo-down",
    "discopop",
    "dpo-norm",
)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(name, marks=[] if name in (*OF_EACH_TRAINER, "ipo") else [pytest.mark.trial])
        for name in LOSSES
        if name not in WITH_REFERENCE
    ],
)
def test_a_run_of_each_loss_trains_stops_resumes_folds_and_reloads(
    loss: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        train(arguments(world, tmp_path, **{"task.loss": loss, "task.generate_examples": 0}), quiet())
    record = resume(tmp_path / "run", quiet()).read()
    assert record["status"] == "completed"
    assert record["proofs"]["fold"]["passed"] and record["proofs"]["reload"]["passed"]
    assert record["proofs"]["reload"]["adapter_effect"] > 1e-3
    one, two = record["metrics"]["before"], record["metrics"]["after"]
    # DiscoPOP's loss falls to the other side where the margin is near 0: its authors note that it is not convex.
    assert (
        (two["loss"] < one["loss"]) == (two["reward_margin"] > one["reward_margin"]) == (loss != "discopop")
    )


@pytest.mark.parametrize("loss", [*ALIKE, "apo-zero", "apo-zero-unpaired", "cpo"])
def test_each_other_loss_takes_steps_and_its_fold_loads_in_stock_peft(
    loss: str, world: Path, tmp_path: Path
) -> None:
    task = prepared(
        world, tmp_path, **{"task.loss": loss, "trainer.max_steps": 2, "trainer.report_to": "none"}
    )
    base = task.load()
    trainer: Any = task.build_trainer(base, task.adapter_config(base), tmp_path / "out", [])
    task.begin(trainer, None)
    trainer.train()
    trainer.model.eval().save_pretrained(tmp_path / "adapter")
    moslora.export(tmp_path / "adapter", tmp_path / "lora")
    [ids] = task.probe()[:1]
    stock = PeftModel.from_pretrained(task.load(), tmp_path / "lora").eval()
    with torch.no_grad():
        tuned, again, plain = (m(input_ids=ids).logits for m in (trainer.model, stock, task.load()))
    assert relative_error(again, tuned) < MODEL and relative_error(plain, tuned) > 1e-4


@pytest.mark.parametrize(
    "loss", [*WITH_REFERENCE, *(pytest.param(x, marks=pytest.mark.trial) for x in ("simpo", "orpo"))]
)
def test_a_run_that_was_stopped_ends_with_the_weights_of_one_that_was_not(
    loss: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"task.loss": loss, "task.generate_examples": 0}
    whole = train(arguments(world, tmp_path / "whole", **own), quiet())
    stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        train(arguments(world, tmp_path / "parts", **own), quiet())
    computed: list[int] = []
    original = moslora.tasks.preference.reference._compute
    monkeypatch.setattr(
        moslora.tasks.preference.reference, "_compute", lambda *a: computed.append(1) or original(*a)
    )
    parts = resume(tmp_path / "parts" / "run", quiet())
    assert not computed  # the reference was found again
    one, two = weights(whole), weights(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    record = parts.read()
    assert record["status"] == "completed" and record["proofs"]["reload"]["passed"]
    assert record["metrics"]["after"] == whole.read()["metrics"]["after"]


def test_a_run_leaves_what_it_measured_on_pairs(world: Path, tmp_path: Path) -> None:
    run = train(arguments(world, tmp_path), quiet())
    metrics = run.read()["metrics"]
    assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["before"]["reward_accuracy"] == 0.5 and metrics["before"]["kl"] == 0
    assert metrics["after"].keys() >= {
        *("loss", "reward_accuracy", "reward_margin", "prefers_chosen", "chosen_logp", "rejected_logp"),
        *("kl", "answer_tokens"),
    }
    assert metrics["after"]["kl"] > 0
    assert metrics["unit"] == "held-out pairs"
    assert metrics["intervals"]["after"].keys() >= {"reward_accuracy", "prefers_chosen"}
    log = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    page = run.report.read_text(encoding="utf-8")
    assert "Preferred answer is more probable" in page and "<p>Preferred answers have" in page
    answers = [json.loads(line) for line in run.predictions.read_text().splitlines()]
    assert [answer["place"] for answer in answers] == ["line 1", "line 2"]
    assert answers[0]["reference"] == '{"n": 0}'
    lineage = json.loads((run.lora / "moslora_lineage.json").read_text())
    assert lineage["task"] == "preference" and lineage["loss"] == "dpo" and lineage["steps"] == 4


STARTS: dict[str, dict[str, Any]] = {
    "kaiming": {},
    "orthogonal": {"mixer": "orthogonal"},
    "identity": {"mixer": "identity"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
    "random": {"init_lora_weights": False},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("start", STARTS)
def test_the_reference_is_exactly_the_base_for_every_start(start: str) -> None:
    base = tiny.llama()
    expected = copy.deepcopy(base)
    config = MoSLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **STARTS[start])
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # as if it had been trained
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = tiny.tokens(2, 12)
    with torch.no_grad(), reference_of(model, None):
        reference = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(reference, expected(input_ids=ids).logits)
        assert not torch.equal(reference, model(input_ids=ids).logits)


@pytest.mark.parametrize("start", ["orthogonal", "identity", "pissa", "DoRA"])
def test_the_first_dpo_loss_is_log_2_for_every_start(start: str, world: Path, tmp_path: Path) -> None:
    own = {f"adapter.{name}": json.dumps(value) for name, value in STARTS[start].items()}
    task = prepared(world, tmp_path, **own)
    model = task.load()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path / "out", [])
    task.begin(trainer, None)
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "dpo-norm", "kto", "simpo", "cpo", "orpo"])
def test_rewards_are_those_of_the_trainer(loss: str, world: Path, tmp_path: Path) -> None:
    task = prepared(world, tmp_path, **{"task.loss": loss, "adapter.init_lora_weights": "false"})
    model = task.load()
    trainer: Any = task.build_trainer(model, task.adapter_config(model), tmp_path / "out", [])
    task.begin(trainer, None)
    trainer.model.eval()
    judged: Any = task.train_set
    scored = score_preferences(trainer.model, judged, "cpu", task.pad_id)
    margins = [one.margin(task.loss_of_recipe, task.beta) for one in scored]
    wanted = trainer_margin(trainer, loss, task)
    assert sum(margins) / len(margins) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def trainer_margin(trainer: Any, loss: str, task: PreferenceTask) -> float:
    """The mean margin of the training rows by TRL's own numbers: what it logs, or its loss solved for the margin."""
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        if loss in ("cpo", "simpo", "orpo"):
            logps = trainer.concatenated_forward(trainer.model, batch)[:2]
            if loss == "orpo":
                return float(trainer.odds_ratio_loss(*logps)[4])
            _, chosen, rejected = trainer.cpo_loss(*logps)
            return float((chosen - rejected).mean())
        trainer.compute_loss(trainer.model, batch)
    logged = {name: values[-1] for name, values in trainer._metrics["eval"].items() if values}
    if loss == "kto":
        return float(logged["rewards/chosen"] - logged["rewards/rejected"])
    if loss == "dpo":
        return float(logged["rewards/margins"])
    # Means over tokens: TRL logs sums, so the lengths divide them here.
    total = 0.0
    with torch.no_grad():
        for row in rows:
            one = trainer.data_collator([row])
            trainer._metrics["eval"].clear()
            trainer.compute_loss(trainer.model, one)
            for side, sign in (("chosen", 1), ("rejected", -1)):
                tokens = sum(label != IGNORED for label in row[f"{side}_labels"])
                total += sign * trainer._metrics["eval"][f"rewards/{side}"][-1] / tokens
    scale = 1 / task.beta if loss == "ipo" else 1.0
    return total * scale / len(rows)


def test_kl_and_log_probabilities_are_those_of_the_logits(world: Path, tmp_path: Path) -> None:
    task = prepared(world, tmp_path)
    base: Any = task.load()
    config = MoSLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    judged: Any = task.heldout_set
    for one, found in zip(judged, score_preferences(model, judged, "cpu", task.pad_id), strict=True):
        for row, side in ((one.chosen, found.chosen), (one.rejected, found.rejected)):
            assert side is not None
            ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                p = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
                q = base(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
            at = [i - 1 for i, label in enumerate(row.labels) if label != IGNORED]
            tokens = ids[0, 1:]
            assert side.logp == pytest.approx(float(sum(p[i, tokens[i]] for i in at)), rel=1e-5)
            assert side.reference == pytest.approx(float(sum(q[i, tokens[i]] for i in at)), rel=1e-5)
            assert side.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1)[at].sum()), rel=1e-3, abs=1e-6)
            assert side.tokens == len(at)


def test_what_is_compared_is_the_answer_and_its_end_of_turn(world: Path, tmp_path: Path) -> None:
    task = prepared(world, tmp_path)
    row: Any = task.train_set[0]
    for side, text in ((row.chosen, '{"n": 0}'), (row.rejected, "no")):
        compared = [
            token for token, label in zip(side.input_ids, side.labels, strict=True) if label != IGNORED
        ]
        assert task.tokenizer.decode(compared) == f"{text}<|im_end|>"
        assert side.labels[-1] != IGNORED  # nothing comes after it that no answer depends on


def test_labeled_answers_are_learned_by_kto_alone(world: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(12)
        for side in ("chosen", "rejected")
    ]
    data = save_rows(tmp_path / "labels.jsonl", rows)
    own = {"data": data, "data.heldout": "null"}
    with pytest.raises(UsageError, match=r"line 1: has one answer and a label.*task\.loss=kto"):
        check(arguments(world, tmp_path, **own), quiet())
    run = train(arguments(world, tmp_path, **own, **{"task.loss": "kto"}), quiet())
    metrics = run.read()["metrics"]
    assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert "prefers_chosen" not in metrics["after"] and metrics["unit"] == "held-out preferences"


def test_a_fall_of_both_log_probabilities_is_said(world: Path, tmp_path: Path) -> None:
    task = prepared(world, tmp_path)
    one = {"chosen_logp": -50.0, "rejected_logp": -60.0, "reward_margin": 0.0, "answer_tokens": 10.0}
    two = {"chosen_logp": -70.0, "rejected_logp": -99.0, "reward_margin": 1.9, "answer_tokens": 21.0}
    from moslora.tasks.task import Evaluation

    notes = task.notes(Evaluation(one, 5), Evaluation(two, 5))
    assert "fell from -50.0 to -70.0" in notes[0] and "fell further" in notes[0]
    assert "grew from 10 to 21 tokens" in notes[1]
    assert task.notes(Evaluation(two, 5), Evaluation(one, 5)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task.loss": "dop"}, r"Did you mean 'dpo'"),
        ({"task.reference": "none"}, r"task\.loss=dpo compares with a reference"),
        ({"task.loss": "orpo", "task.reference": "base"}, r"has no reference"),
        ({"task.reference": "start"}, r"needs adapter\.start_from"),
        ({"adapter.lora_dropout": 0.1}, r"adapter\.lora_dropout=0\.1 would do nothing"),
        ({"adapter.bias": "all"}, r"a trained bias of the base stays on"),
        ({"trainer.beta": 0.2}, r"set task\.beta"),
        ({"trainer.loss_type": "[ipo]"}, r"set task\.loss"),
        ({"trainer.sync_ref_model": "true"}, r"stays as it is"),
        ({"task.beta": 0}, r"task\.beta is 0"),
        ({"task.loss": "kto", "trainer.per_device_train_batch_size": 1}, r"Set 2 or more"),
        ({"task.loss": "robust", "trainer.label_smoothing": 0.5}, r"below 0\.5"),
        ({"data.train_on": "all"}, r"train_on"),
        ({"trainer.simpo_gamma": 1.0}, r"trainer\.simpo_gamma is unknown"),
        ({"trainer.packing": "true"}, r"trainer\.packing is unknown"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, object], message: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(arguments(world, tmp_path, **changes))


def test_an_adapter_on_the_head_is_refused_before_anything_is_loaded(world: Path, tmp_path: Path) -> None:
    own = {"adapter.target_modules": "[q_proj, lm_head]"}
    with pytest.raises(RecipeError, match="adapts the output head"):
        train(arguments(world, tmp_path, **own), quiet())
    assert not (tmp_path / "run").exists()


def test_a_pair_of_the_same_tokens_is_refused_by_row(world: Path, tmp_path: Path) -> None:
    rows = [*pairs(3), {"prompt": "hm", "chosen": "yes\u00a0", "rejected": "yes \u00a0"}]
    data = save_rows(tmp_path / "same.jsonl", [*rows[:3], {"prompt": "hm", "chosen": "a", "rejected": "a\n"}])
    with pytest.raises(moslora.DataError, match=r"line 4: fields 'chosen' and 'rejected' say the same"):
        check(arguments(world, tmp_path, **{"data": data, "data.heldout": "null"}), quiet())


def test_a_row_beyond_the_limit_is_named(world: Path, tmp_path: Path) -> None:
    rows = [*pairs(3), {"prompt": "hm", "chosen": "a" * 300, "rejected": "b"}]
    own = {"data": save_rows(tmp_path / "long.jsonl", rows), "trainer.max_length": 64}
    with pytest.raises(EncodingError, match=r"line 4 \(chosen\): has 3\d\d tokens"):
        check(arguments(world, tmp_path, **own, **{"data.too_long": "refuse"}), quiet())
    said = io_display()
    check(arguments(world, tmp_path, **own, **{"data.too_long": "drop"}), said[0])
    assert "were dropped" in said[1]()


def io_display() -> tuple[Display, Callable[[], str]]:
    import io

    stream = io.StringIO()
    return Display(stream), stream.getvalue


def test_the_preview_marks_both_answers(world: Path, tmp_path: Path) -> None:
    display, text = io_display()
    check(arguments(world, tmp_path), display)
    assert '⟦{"n": 0}<|im_end|>⟧' in text() and "⟦no<|im_end|>⟧" in text()
    assert "what is made less likely" in text()


def test_objects_of_a_script_are_trained_on(world: Path, tmp_path: Path) -> None:
    model = tiny.llama(0, vocab_size=259, max_position_embeddings=256, bos_token_id=None, eos_token_id=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = moslora.train(
        task="preference",
        model=model,
        tokenizer=tiny.tokenizer(),
        data=pairs(12),
        heldout=[{**row, "prompt": f"{row['prompt']}!"} for row in pairs(3)],
        adapter={"r": 2},
        trainer={"max_steps": 2, "learning_rate": 5e-3},
        output=tmp_path / "run",
        settings=["task.generate_examples=0"],
    )
    assert run.metrics["after"].keys() >= {"loss", "prefers_chosen"}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_is_evaluated_on_pairs(world: Path, tmp_path: Path) -> None:
    run = train(arguments(world, tmp_path, **{"trainer.max_steps": 2, "task.generate_examples": 0}), quiet())
    report = moslora.evaluate(
        str(world / "base"),
        adapter=run.lora,
        data=str(world / "heldout.jsonl"),
        settings=["task=preference", "task.generate_examples=0"],
    )
    found = {measure.name: measure for measure in report.measures}
    after = run.read()["metrics"]["after"]
    assert found["loss"].base == pytest.approx(math.log(2), abs=1e-6)
    assert found["loss"].tuned == pytest.approx(after["loss"], rel=1e-4)
    assert found["prefers_chosen"].tuned == pytest.approx(after["prefers_chosen"])


def test_methods_are_compared_on_pairs_and_those_without_a_reference_are_refused(
    world: Path, tmp_path: Path
) -> None:
    own = {"trainer.max_steps": 2, "task.generate_examples": 0}
    moslora.compare(
        settings=arguments(world, tmp_path, **own),
        methods=["lora", "moslora"],
        seeds=2,
        learning_rates=[5e-3],
    )
    cells = [json.loads(f.read_text()) for f in tmp_path.rglob("cells/*_*_*.json")]
    assert {(cell["method"], cell["status"]) for cell in cells} == {("lora", "done"), ("moslora", "done")}
    for method, reason in (("pissa", "takes its start out of the base"), ("full", "overwrites the base")):
        with pytest.raises(UsageError, match=f"Method {method} cannot be compared.*{reason}"):
            moslora.compare(
                settings=arguments(world, tmp_path, **own), methods=["lora", method], learning_rates=[5e-3]
            )


def test_the_loss_of_a_margin_is_stable() -> None:
    assert negative_log_sigmoid(0) == pytest.approx(math.log(2))
    assert negative_log_sigmoid(-1e4) == 1e4 and negative_log_sigmoid(1e4) == 0
