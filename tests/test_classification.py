"""Classification: every kind of labels trains, stops, resumes, folds and reloads in stock PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

import moslora
import moslora.training.run
import tiny_labeled
from moslora.comparison.compare import compare
from moslora.display import Display
from moslora.errors import DataError, EncodingError, ModelError, RecipeError, Stopped, UsageError
from moslora.evaluation.evaluate import evaluate
from moslora.recipe.loading import load_recipe
from moslora.tasks import find_task
from moslora.training.run import check, resume, train
from moslora.training.run_directory import RunDirectory
from test_train import stop_at
from tiny_labeled import rows_of, write
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PROBLEMS = ("single-label", "pairs", "multi-label", "regression", "tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    for family in ("bert", "roberta", "deberta-v2", "modernbert", "llama"):
        tiny_labeled.save_model(folder / family, family)
    for problem in PROBLEMS:
        write(folder / f"{problem}.jsonl", rows_of(problem, 48))
        write(folder / f"{problem}-heldout.jsonl", rows_of(problem, 16, seed=7))
    return folder


def arguments(world: Path, out: Path, problem: str, family: str, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "task": "classification",
        "model": world / family,
        "data": world / f"{problem}.jsonl",
        "data.heldout": world / f"{problem}-heldout.jsonl",
        "adapter.r": 4,
        "trainer.max_steps": 6,
        "trainer.per_device_train_batch_size": 8,
        "trainer.learning_rate": "1e-2",
        "trainer.save_steps": 100,
        "output": out / f"{problem}-{family}",
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def quiet() -> Display:
    return Display(quiet=True)


def prepared(*settings: str, display: Display | None = None) -> Any:
    recipe = load_recipe(list(settings))
    task = find_task("classification")(recipe, display or quiet(), lambda: None)
    task.read()
    task.prepare()
    return task


def reloaded(run: RunDirectory, base: Path, kind: str) -> Any:
    """Load a run's LoRA as the documentation says."""
    config = AutoConfig.from_pretrained(run.lora)
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(base, config=config)
    return PeftModel.from_pretrained(model, run.lora).eval()


# One family for each problem, so that each of both is trained, folded and reloaded once.
@pytest.mark.parametrize(
    ("problem", "family"),
    [
        ("single-label", "bert"),
        ("pairs", "deberta-v2"),
        ("multi-label", "roberta"),
        ("regression", "modernbert"),
        ("tokens", "llama"),
    ],
)
def test_a_head_and_its_fold_are_what_stock_peft_loads(
    problem: str, family: str, world: Path, tmp_path: Path
) -> None:
    run = train(arguments(world, tmp_path, problem, family), quiet())
    record = run.read()
    assert record["status"] == "completed"
    assert record["proofs"]["fold"]["max_relative_error"] <= 1e-6 and record["proofs"]["reload"]["passed"]
    before, after = record["metrics"]["before"], record["metrics"]["after"]
    assert before.keys() == after.keys() and record["metrics"]["baseline"].keys() <= after.keys()
    kind = "TokenClassification" if problem == "tokens" else "SequenceClassification"
    assert record["base"]["auto_class"] == f"AutoModelFor{kind}"
    model = reloaded(run, world / family, kind)
    rows = rows_of(problem, 16, seed=7)
    if problem == "tokens":
        assert model.config.id2label == {0: "B-X", 1: "O"}
        return
    tokenizer = AutoTokenizer.from_pretrained(world / family)
    with torch.inference_mode():
        logits = [
            model(**tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")).logits[0]
            for row in rows
        ]
    if problem == "regression":
        squares = [(float(found[0]) - row["label"]) ** 2 for found, row in zip(logits, rows, strict=True)]
        assert sum(squares) / len(squares) == pytest.approx(after["loss"], rel=1e-4)
        return
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if problem == "multi-label":
        said = [{names[i] for i, logit in enumerate(found) if logit > 0} for found in logits]
        share = sum(set(row["label"]) == labels for row, labels in zip(rows, said, strict=True)) / len(rows)
        assert share == pytest.approx(after["exact_match"])
        return
    right = [names[int(found.argmax())] == row["label"] for found, row in zip(logits, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(after["accuracy"])
    page = run.report.read_text(encoding="utf-8")
    assert (
        "Confusion matrix" in page
        and "without a model" in page
        and "AutoConfig.from_pretrained(lora)" in page
    )


def test_a_run_that_was_stopped_goes_on_to_the_same_head_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    whole = train(arguments(world, tmp_path / "whole", "single-label", "bert"), quiet())
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        train(arguments(world, tmp_path / "cut", "single-label", "bert"), quiet())
    again = resume(tmp_path / "cut" / "single-label-bert", quiet())
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, again))
    assert one.keys() == two.keys() and any("classifier" in name for name in one)
    assert any("pooler" in name for name in one)  # a masked language model has none
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_accumulated_batches_have_the_loss_of_one_batch(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own models ignore how many examples a step has, and sum the losses of its batches."""
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    found = []
    for rows, accumulated in ((8, 1), (4, 2)):
        changes = {
            "trainer.per_device_train_batch_size": rows,
            "trainer.gradient_accumulation_steps": accumulated,
            "trainer.optim": "sgd",
            "trainer.max_steps": 2,
        }
        given = arguments(world, tmp_path / f"{rows}", "regression", "llama", **changes)
        found.append(load_file(train(given, quiet()).adapter / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        assert relative_error(found[1][name], tensor) < MODEL, name


def test_the_loss_is_transformers_own(world: Path, tmp_path: Path) -> None:
    for problem, family in (
        ("single-label", "bert"),
        ("multi-label", "bert"),
        ("regression", "bert"),
        ("tokens", "bert"),
    ):
        task = prepared(*arguments(world, tmp_path, problem, family))
        model = task.load()
        total, parts = 0.0, 0
        for encoded in task.heldout_set:
            given = {"input_ids": torch.tensor([encoded.input_ids])}
            given["token_type_ids"] = torch.tensor([encoded.token_type_ids])
            kind = torch.long if problem in ("single-label", "tokens") else torch.float
            with torch.inference_mode():
                loss = model(**given, labels=torch.tensor([encoded.label], dtype=kind)).loss
            count = len(encoded.heads) or (len(encoded.label) if problem == "multi-label" else 1)
            total, parts = total + float(loss) * count, parts + count
        assert task.loss(model, "base") == pytest.approx(total / parts, rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_changes_no_prediction(family: str, world: Path, tmp_path: Path) -> None:
    task = prepared(*arguments(world, tmp_path, "regression", family))
    model = task.load()
    together = task.score(model, task.heldout_set, "all")
    alone = [task.score(model, [encoded], "one")[0] for encoded in task.heldout_set]
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_a_tag_is_learned_at_the_first_token_of_its_word(world: Path, tmp_path: Path) -> None:
    for family in ("bert", "llama"):
        task = prepared(*arguments(world, tmp_path, "tokens", family))
        for encoded, example in zip(task.heldout_set, task.heldout_examples, strict=True):
            assert len(encoded.heads) == len(example.words)
            for word, position, tag in zip(example.words, encoded.heads, example.label, strict=True):
                piece = task.tokenizer.decode([encoded.input_ids[position]]).removeprefix("##")
                assert word.startswith(piece.strip()) and piece.strip()
                assert task.labels.names[encoded.label[position]] == tag
            scored = [label for label in encoded.label if label != -100]
            assert len(scored) == len(example.words)


def test_a_fresh_head_is_drawn_from_the_seed_alone(world: Path, tmp_path: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        task = prepared(*arguments(world, tmp_path, "single-label", "bert", seed=seed))
        torch.rand(3)  # what was drawn before has no part in it
        model: Any = task.load()
        assert set(task.fresh) == {"classifier", "bert.pooler"}
        heads.append(model.classifier.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_a_weight_that_is_missing_beside_the_head_is_an_error(world: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(world / "bert", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("layer.0.output.dense.weight"))
    save_file({name: t for name, t in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    task = prepared(*arguments(world, tmp_path, "single-label", "bert", model=tmp_path / "broken"))
    with pytest.raises(ModelError, match=r"1 missing keys"):
        task.load()


# --- A head that the base has -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentiment(world: Path) -> Path:
    """A base with a trained head of two labels."""
    folder = world / "sentiment"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        world / "bert", num_labels=2, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "bert").save_pretrained(folder)
    return folder


def test_a_trained_head_is_trained_on_with_its_own_labels(
    sentiment: Path, world: Path, tmp_path: Path
) -> None:
    task = prepared(*arguments(world, tmp_path, "single-label", "bert", model=sentiment))
    assert task.labels.names == ("yes", "no")  # not sorted
    model: Any = task.load()
    assert task.fresh == ()
    stored = load_file(sentiment / "model.safetensors")
    assert torch.equal(model.classifier.weight, stored["classifier.weight"])
    new = prepared(
        *arguments(world, tmp_path, "single-label", "bert", model=sentiment, **{"task.head": "new"})
    )
    assert new.labels.names == ("no", "yes")
    assert not torch.equal(new.load().classifier.weight, stored["classifier.weight"])


def test_a_head_of_another_size_is_refused_before_anything_is_loaded(
    sentiment: Path, world: Path, tmp_path: Path
) -> None:
    rows = [{"text": f"{'abc'[i % 3]} {i}", "label": "xyz"[i % 3]} for i in range(9)]
    data = write(tmp_path / "three.jsonl", rows)
    changes = {"model": sentiment, "data": data, "data.labels": "[x, y, z]"}
    given = arguments(world, tmp_path, "single-label", "bert", **changes)
    with pytest.raises(UsageError, match=r"in this order|trained head of 2 outputs"):
        check([setting for setting in given if not setting.startswith("data.heldout")], quiet())
    run = train([*(s for s in given if not s.startswith("data.heldout")), "task.head=new"], quiet())
    assert run.read()["proofs"]["reload"]["passed"]
    assert AutoConfig.from_pretrained(run.lora).num_labels == 3


# --- Data ---------------------------------------------------------------------------------------------------

GOOD = [{"text": f"a {i}", "label": "yes" if i % 2 else "no"} for i in range(8)]


@pytest.mark.parametrize(
    ("rows", "settings", "complaint"),
    [
        ([*GOOD, {"text": " ", "label": "no"}], [], r"line 9: field 'text' is empty"),
        (
            [*GOOD, {"text": "b", "label": 3}],
            [],
            r"line 9: field 'label' is a whole number, and at line 1 it is text",
        ),
        (
            [*GOOD, {"text": "b", "label": "yse"}],
            ["data.labels=[no, yes]"],
            r"line 9: the label 'yse'.*Did you mean",
        ),
        ([*GOOD, {"text": "b"}], [], r"line 9: field 'label' is missing"),
        ([*GOOD, {"text": "b", "label": "no", "weight": 2}], [], r"field 'weight' would be ignored"),
        ([*GOOD, {"text": "b", "text_pair": "c", "label": "no"}], [], r"line 9: field 'text_pair' is given"),
        (GOOD, ["data.labels=[no, yes, maybe]"], r"no training example has the label 'maybe'"),
        (
            [{"text": f"a {i}", "label": i % 2 * 2} for i in range(8)],
            [],
            r"labels are 0, 2; no training example has 1",
        ),
        (
            [{"text": f"a {i}", "label": "no"} for i in range(8)],
            [],
            r"training examples have the label no",
        ),
        (
            [{"text": f"a {i}", "label": float("1.5")} for i in range(8)],
            [],
            r"all training examples have the number",
        ),
        ([{"text": "a", "label": ["x", "x"]}, *GOOD], [], r"line 1: field 'label' has 'x' twice"),
        (
            [{"tokens": ["a", "b"], "tags": ["O"]}] * 4,
            [],
            r"line 1: field 'tags' has 1 tags and field 'tokens' 2",
        ),
        ([{"tokens": ["a", ""], "tags": ["O", "O"]}] * 4, [], r"line 1: field 'tokens\[1\]' is empty"),
        ([{"sentence": "a", "label": 1}] * 4, [], r"there is no column 'text'; found label, sentence"),
        (GOOD, ["data.columns={text: texd}"], r"no row has a column 'texd'"),
        (GOOD, ["data.columns={txt: text}"], r"data.columns has 'txt'"),
        (GOOD, ["task.metric=pearson"], r"task.metric=pearson is not measured"),
        (GOOD, ["task.positive=maybe"], r"task.positive=maybe is not one of"),
        (GOOD, ["task.problem=regression"], r"line 1: field 'label' is 'no'; expected a number"),
        (GOOD, ["trainer.max_length=3"], r"leaves no room for text"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused_by_row_and_field(
    rows: list[dict[str, Any]], settings: list[str], complaint: str, world: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    given = ["task=classification", f"model={world / 'bert'}", f"data={data}", f"output={tmp_path / 'run'}"]
    with pytest.raises((DataError, UsageError, EncodingError), match=complaint):
        check([*given, *settings], quiet())


def test_held_out_labels_outside_the_set_are_refused_by_row(world: Path, tmp_path: Path) -> None:
    train_file = write(tmp_path / "train.jsonl", GOOD)
    heldout = write(tmp_path / "heldout.jsonl", [{"text": "x", "label": "maybe"}])
    given = [
        "task=classification",
        f"model={world / 'bert'}",
        f"data={train_file}",
        f"data.heldout={heldout}",
    ]
    with pytest.raises(
        DataError, match=r"heldout.jsonl: line 1: the label 'maybe' is not one of the training data"
    ):
        check(given, quiet())


def test_glue_needs_its_subset_alone(world: Path, tmp_path: Path) -> None:
    words = tiny_labeled.sentences(12)
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": w, "sentence2": w[::-1], "label": i % 2, "idx": i} for i, w in enumerate(words)]
    write(tmp_path / "rte" / "train.jsonl", rows)
    write(tmp_path / "rte" / "validation.jsonl", rows[:4])
    given = ["task=classification", f"model={world / 'bert'}", f"data={tmp_path}", "data.subset=rte"]
    task = prepared(*given)
    assert task.problem == "single-label" and task.labels.names == ("entailment", "not_entailment")
    assert len(task.heldout_examples) == 4 and task.heldout_examples[0].text_pair == words[0][::-1]
    assert next(iter(task.metric_order())) == "accuracy"
    hidden = write(tmp_path / "rte" / "test.jsonl", [{**rows[0], "label": -1}])
    with pytest.raises(DataError, match=r"GLUE keeps this label secret"):
        prepared(*given, f"data.heldout={hidden}")


def test_the_recipes_are_read(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "recipes"
    for name in ("glue.yaml", "boolq-classification.yaml"):
        assert load_recipe([str(folder / name), f"output.dir={tmp_path}"]).task.kind == "classification"
    with pytest.raises(RecipeError, match=r"task.problem_type is unknown; set task.problem"):
        load_recipe([str(folder / "glue.yaml"), "task.problem_type=regression"])


# --- Other verbs --------------------------------------------------------------------------------------------


def test_labels_of_an_adapter_keep_its_order_when_it_is_evaluated(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that have one label only, or labels in another order, must not turn predictions around."""
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    changes = {"data.labels": "[yes, no]", "trainer.max_steps": 10}
    run = train(arguments(world, tmp_path, "single-label", "llama", **changes), quiet())
    after = run.read()["metrics"]["after"]
    heldout = str(world / "single-label-heldout.jsonl")
    settings = ["task=classification"]
    report = evaluate(str(world / "llama"), quiet(), adapter=run.lora, data=heldout, settings=settings)
    assert report["accuracy"].tuned == pytest.approx(after["accuracy"])
    assert report["loss"].tuned == pytest.approx(after["loss"], rel=1e-4)
    assert (
        report["mcc"].tuned == pytest.approx(after["mcc"]) and report["mcc"].low <= report["mcc"].difference
    )
    one = write(
        tmp_path / "one.jsonl", [r for r in rows_of("single-label", 16, seed=7) if r["label"] == "no"]
    )
    again = evaluate(str(world / "llama"), quiet(), adapter=run.adapter, data=str(one), settings=settings)
    lines = [json.loads(line) for line in run.predictions.read_text(encoding="utf-8").splitlines()]
    right = [line["tuned_ok"] for line in lines if line["reference"] == "no"]
    assert again["accuracy"].tuned == pytest.approx(sum(right) / len(right))


def test_methods_are_compared_from_the_same_head(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moslora.tasks.head import HeadTask

    starts: dict[tuple[str, int], torch.Tensor] = {}
    original = HeadTask.put_adapter

    def put(self: Any, model: Any, adapter: Any, seed: int) -> Any:
        found = original(self, model, adapter, seed)
        name = type(adapter).__name__
        starts[name, seed] = (
            found.get_base_model().classifier.modules_to_save["default"].weight.detach().clone()
        )
        return found

    monkeypatch.setattr(HeadTask, "put_adapter", put)
    recipe = arguments(world, tmp_path, "single-label", "bert")
    _, verdict = compare(
        recipe,
        quiet(),
        seeds=2,
        rates=[1e-2],
        steps=2,
        validation=8,
        methods=["lora", "moslora"],
        out=tmp_path / "c",
    )
    assert verdict is not None and {c.measure for c in verdict.contrasts} == {"loss", "exact_match"}
    assert torch.equal(starts["LoraConfig", 0], starts["MoSLoRAConfig", 0])
    assert torch.equal(starts["LoraConfig", 1], starts["MoSLoRAConfig", 1])
    assert not torch.equal(starts["LoraConfig", 0], starts["LoraConfig", 1])


def test_a_model_with_its_head_may_be_handed_over(world: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "bert", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(world / "bert")
    run = moslora.train(
        task="classification",
        model=model,
        tokenizer=tokenizer,
        data=rows_of("single-label", 24),
        heldout=rows_of("single-label", 8, seed=7),
        trainer={"max_steps": 2},
        output=tmp_path / "run",
    )
    assert run.proofs["reload"]["passed"] and set(run.metrics["after"]) >= {"loss", "accuracy", "mcc"}
    language = transformers.AutoModelForMaskedLM.from_pretrained(world / "bert")
    with pytest.raises(UsageError, match=r"model is a BertForMaskedLM, and this task needs a model"):
        moslora.train(
            task="classification",
            model=language,
            tokenizer=tokenizer,
            data=rows_of("single-label", 24),
            trainer={"max_steps": 2},
            output=tmp_path / "other",
        )


def test_a_dry_run_shows_one_example_with_its_label(world: Path, tmp_path: Path) -> None:
    import io

    stream = io.StringIO()
    check(arguments(world, tmp_path, "single-label", "bert"), Display(stream))
    shown = stream.getvalue()
    assert "[CLS]" in shown and "Label: " in shown and "head" in shown
    assert not (tmp_path / "single-label-bert").exists()


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "llama"])
def test_a_plan_counts_the_head(family: str, world: Path, tmp_path: Path) -> None:
    from moslora.memory.plan import count_memory

    given = arguments(world, tmp_path, "single-label", family, **{"data.labels": "[no, yes]"})
    task = prepared(*given)
    plan = count_memory(load_recipe(given), length=32)
    if family != "bert":  # whose pooler is missing, which a plan without weights cannot know
        assert plan.trained == sum(part.trained for part in task.count())
    assert plan.logits == 0 and all(placement.total > 0 for placement in plan.placements)


def test_whole_numbers_keep_their_labels_when_an_adapter_is_evaluated(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels that count from 1 are not places that count from 0."""
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    numbers = {"yes": 2, "no": 1}
    files = [
        write(
            tmp_path / f"{seed}.jsonl",
            [{**r, "label": numbers[r["label"]]} for r in rows_of("single-label", 32, seed)],
        )
        for seed in (0, 7)
    ]
    changes = {"data": files[0], "data.heldout": files[1], "trainer.max_steps": 10}
    run = train(arguments(world, tmp_path, "single-label", "llama", **changes), quiet())
    after = run.read()["metrics"]["after"]
    assert after["accuracy"] > 0.6
    settings = ["task=classification"]
    report = evaluate(str(world / "llama"), quiet(), adapter=run.lora, data=str(files[1]), settings=settings)
    assert report["accuracy"].tuned == pytest.approx(after["accuracy"])


def test_a_classifier_starts_from_another_with_its_head_and_labels(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    given = {"data.labels": "[yes, no]", "trainer.max_steps": 3}
    first = train(arguments(world, tmp_path / "first", "single-label", "bert", **given), quiet())
    start = {"adapter.start_from": first.adapter, "trainer.max_steps": 1, "trainer.learning_rate": "1e-12"}
    left = [
        s
        for s in arguments(world, tmp_path / "second", "single-label", "bert", **start)
        if "adapter.r=" not in s
    ]
    second = train(left, quiet())
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    assert one.keys() == two.keys() and any("classifier" in name for name in one)
    assert max(float((tensor - two[name]).abs().max()) for name, tensor in one.items()) < 1e-9
    assert AutoConfig.from_pretrained(second.lora).id2label == {0: "yes", 1: "no"}  # and not sorted
    assert second.read()["metrics"]["after"]["loss"] == pytest.approx(
        first.read()["metrics"]["after"]["loss"], rel=1e-6
    )
    with pytest.raises(UsageError, match=r"the start brings its own head"):
        check([*left, "task.head=new"], quiet())
    other = write(
        tmp_path / "three.jsonl", [{"text": f"{'abc'[i % 3]} {i}", "label": "xyz"[i % 3]} for i in range(9)]
    )
    with pytest.raises(DataError, match=r"the label 'x' is not one of the adapter"):
        check([*left, f"data={other}"], quiet())
    numbers = [f"data={world / 'regression.jsonl'}", f"data.heldout={world / 'regression-heldout.jsonl'}"]
    with pytest.raises(UsageError, match=r"has a head of 2 outputs .*needs 1 of a model"):
        check([*left, *numbers], quiet())
