"""What tuning cost: loss and KL from the base on text that tuning is not about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from typer.testing import CliRunner

import tiny
from moslora import MoSLoRAConfig
from moslora.cli import app
from moslora.comparison.costs import with_costs
from moslora.comparison.verdict import Cell, judge
from moslora.data.shapes import Example
from moslora.data.tokenization import IGNORED, Encoded, Encoder
from moslora.display import Display
from moslora.errors import DataError, RecipeError
from moslora.files import sha256
from moslora.recipe.loading import load_recipe
from moslora.reports.pareto import frontier
from moslora.reports.run import write_report
from moslora.tasks import also, find_task
from moslora.tasks.text import cost
from moslora.training.run import train
from moslora.training.run_directory import RunDirectory
from tolerances import MODEL

VOCABULARY = 64


def passages(count: int = 5) -> also.AlsoSet:
    """Passages of token ids, of which a part is measured."""
    made = []
    for number in range(count):
        ids = tiny.tokens(1, 6 + number, VOCABULARY, seed=number)[0].tolist()
        labels = [IGNORED, *ids[1:]] if number % 2 else [IGNORED] * 3 + ids[3:]
        made.append(Encoded(ids, labels, [], "", False, f"line {number + 1}", len(ids), False, False))
    return also.AlsoSet("toy", "toy.jsonl", "", made, ["odd" if n % 2 else "even" for n in range(count)])


def by_hand(base, tuned, toy: also.AlsoSet) -> dict[str, float]:
    """The means over measured tokens, one passage at a time, from whole logits."""
    sums, count = {"base": 0.0, "tuned": 0.0, "kl": 0.0}, 0
    for passage in toy.passages:
        ids, labels = torch.tensor([passage.input_ids]), torch.tensor(passage.labels[1:])
        at = labels != IGNORED
        with torch.no_grad():
            one, two = (m(input_ids=ids).logits[0, :-1][at].double() for m in (base.eval(), tuned.eval()))
        sums["base"] += float(F.cross_entropy(one, labels[at], reduction="sum"))
        sums["tuned"] += float(F.cross_entropy(two, labels[at], reduction="sum"))
        p, q = one.log_softmax(-1), two.log_softmax(-1)
        sums["kl"] += float(F.kl_div(q, p, log_target=True, reduction="sum"))
        count += int(at.sum())
    return {name: value / count for name, value in sums.items()}


def disturb(model: torch.nn.Module) -> None:
    """Move everything that would be trained."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def summary(model, toy: also.AlsoSet, changed=()) -> dict:
    return also.summarize(toy, also.measure_set(toy, model, 0, "cpu", changed))


CONFIGS = {
    "moslora": MoSLoRAConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "frozen mixer": MoSLoRAConfig(r=4, train_mixer=False, target_modules="all-linear"),
    "pissa": MoSLoRAConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"),
    "dora": MoSLoRAConfig(r=4, use_dora=True, target_modules="all-linear"),
    "head and its copy": MoSLoRAConfig(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"]),
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora from pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_divergence_are_those_of_whole_logits_computed_one_by_one(name):
    toy, base, model = passages(), tiny.llama(), tiny.llama()
    changed = cost.keep_changed(model, CONFIGS[name])
    adapted = get_peft_model(model, dataclasses.replace(CONFIGS[name]))
    disturb(adapted)
    wanted = [p.requires_grad for p in adapted.parameters()]
    found, expected = summary(adapted, toy, changed), by_hand(base, adapted, toy)
    assert found["before"]["loss"] == pytest.approx(expected["base"], rel=MODEL)
    assert found["after"]["loss"] == pytest.approx(expected["tuned"], rel=MODEL)
    assert found["after"]["kl"] == pytest.approx(expected["kl"], rel=MODEL) and expected["kl"] > 1e-3
    assert [p.requires_grad for p in adapted.parameters()] == wanted, "measuring makes nothing trainable"


@pytest.mark.parametrize("name", ["moslora", "frozen mixer", "lora", "dora"])
def test_an_adapter_that_learned_nothing_is_at_no_distance_from_its_base(name):
    found = summary(get_peft_model(tiny.llama(), dataclasses.replace(CONFIGS[name])), passages())
    assert found["after"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["change"]["loss"]["mean"] == pytest.approx(0, abs=1e-6)


def test_biases_that_are_trained_in_place_are_put_back_for_the_base_and_stay_trained():
    toy, base = passages(), tiny.gpt2()
    model = tiny.gpt2()
    config = MoSLoRAConfig(r=4, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    changed = cost.keep_changed(model, config)
    adapted = get_peft_model(model, config)
    disturb(adapted)
    trained = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    found, expected = summary(adapted, toy, changed), by_hand(base, adapted, toy)
    assert found["before"]["loss"] == pytest.approx(expected["base"], rel=MODEL)
    assert found["after"]["kl"] == pytest.approx(expected["kl"], rel=MODEL)
    assert all(torch.equal(p, trained[name]) for name, p in adapted.named_parameters())


def test_a_model_that_was_trained_whole_is_held_against_the_copy_of_what_it_was():
    toy, base, model = passages(), tiny.llama(), tiny.llama()
    changed = cost.keep_changed(model, None)
    disturb(model)
    found, expected = summary(model, toy, changed), by_hand(base, model, toy)
    assert found["after"]["kl"] == pytest.approx(expected["kl"], rel=MODEL) and expected["kl"] > 1e-3


def test_what_the_base_never_says_counts_nothing():
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    tuned = torch.tensor([[0.25, 0.75, 0.0]]).log()
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    assert float(cost._divergence(base, tuned)) == pytest.approx(float(expected), rel=MODEL)


def test_registers_add_up_to_the_whole():
    toy = passages()
    adapted = get_peft_model(tiny.llama(), dataclasses.replace(CONFIGS["moslora"]))
    disturb(adapted)
    found = summary(adapted, toy)
    kinds = found["kinds"].values()
    assert sum(kind["tokens"] for kind in kinds) == found["tokens"]
    assert sum(k["kl"] * k["tokens"] for k in kinds) / found["tokens"] == pytest.approx(found["after"]["kl"])


# ---- the text that comes with the package ------------------------------------------------------------------


def test_the_shipped_text_has_several_registers_and_no_end_of_text_to_learn(monkeypatch):
    monkeypatch.setattr(also, "SHIPPED_FILES", ("texts.jsonl", "questions.jsonl"))
    [read] = also.read_also(["general"], [])
    tokenizer = tiny.tokenizer()
    [found] = also.encode_also([read], Encoder(tokenizer), tiny.llama(vocab_size=259).config)
    assert {"prose", "dialogue", "arithmetic", "code", "lists", "questions"} <= set(found.kinds)
    assert len(found.passages) == len({tuple(p.input_ids) for p in found.passages}) >= 50
    texts = [p for p, kind in zip(found.passages, found.kinds, strict=True) if kind != "questions"]
    assert all(tokenizer.eos_token_id not in passage.labels for passage in texts)


def test_the_shipped_text_is_cut_to_the_positions_of_a_model_and_keeps_to_its_vocabulary():
    [read] = also.read_also(["general"], [])
    config = tiny.llama(vocab_size=200, max_position_embeddings=24).config
    for found in also.encode_also([read], Encoder(tiny.tokenizer(), max_length=40), config):
        assert max(len(passage.input_ids) for passage in found.passages) <= 24
        assert max(max(passage.input_ids) for passage in found.passages) < 200


def test_a_template_that_takes_no_such_question_leaves_it_out():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    [read] = also.read_also(["general"], [])
    said: list[str] = []
    config = tiny.llama(vocab_size=259).config
    assert also.encode_also([read], Encoder(tokenizer), config, warn=said.append) == []
    assert said[0].startswith("evaluation.also, general: nothing of it is measured.")


def test_passages_of_which_nothing_can_be_measured_are_counted_aloud():
    said: list[str] = []
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    examples = [Example("line 1", text="some text"), *also.read_also(["general"], [])[0].examples]
    own = also.AlsoExamples("general", "general", "", examples)
    [found] = also.encode_also([own], Encoder(tokenizer), tiny.llama(vocab_size=259).config, warn=said.append)
    assert len(found.passages) == 1
    assert said[0].startswith(f"evaluation.also, general: 1 of its {len(examples)} passages are measured.")


# ---- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("also")
    tiny.save_chat_model(folder / "model")
    tiny.save_chat_data(folder / "data.jsonl")
    rows = [{"text": f"a line of other text, {number}", "kind": "other"} for number in range(4)]
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(place: Path, name: str, *settings: str) -> list[str]:
    fixed = ["trainer.max_steps=3", "trainer.learning_rate=0.02", "adapter.r=4", "task.generate_examples=0"]
    files = [f"model={place / 'model'}", f"data={place / 'data.jsonl'}", f"output={place / name}"]
    return [*files, *fixed, *settings]


@pytest.fixture(scope="module")
def run(place) -> RunDirectory:
    return train(
        arguments(place, "with", f"evaluation.also=[general,{place / 'other.jsonl'}]"), Display(quiet=True)
    )


def test_a_run_tells_what_it_cost_in_its_record_its_report_and_its_recipe(run):
    found = run.read()["also"]
    assert set(found) == {"general", "other"} and found["other"]["passages"] == 4
    for set_ in found.values():
        assert set_["before"]["loss"] != set_["after"]["loss"] and set_["after"]["kl"] > 0
        low, high = set_["change"]["kl"]["low"], set_["change"]["kl"]["high"]
        assert low < set_["after"]["kl"] < high
    page = run.report.read_text()
    assert "What tuning cost" in page and "KL from the base" in page
    assert load_recipe([str(run.recipe)]).evaluation.also[0] == "general"


def test_measuring_what_it_cost_changes_no_bit_of_what_is_trained(run, place):
    without = train(arguments(place, "without", "evaluation.also=[]"), Display(quiet=True))
    assert "also" not in without.read()
    for one, two in zip(*(sorted(r.lora.glob("*.safetensors")) for r in (run, without)), strict=True):
        assert sha256(one) == sha256(two)
    assert run.read()["metrics"] == without.read()["metrics"]
    page = write_report(without.path)
    assert "What tuning cost" not in page.read_text()


def test_a_run_of_an_older_version_goes_on_and_its_report_is_made_again(place):
    """Such a run has neither the section in its recipe nor anything of it in its record."""
    from moslora.training import run as stages

    begun = train(arguments(place, "old", "evaluation.also=[]"), Display(quiet=True))
    recipe = begun.recipe.read_text().replace("evaluation:\n  also: []\n", "")
    begun.recipe.write_text(recipe)
    assert "evaluation" not in recipe
    begun.update(status="interrupted")
    (begun.path / "evaluation-after.json").unlink()
    done = stages.resume(begun.path, Display(quiet=True))
    assert done.read()["status"] == "completed" and done.read()["also"]["general"]["after"]["kl"] > 0


def test_evaluate_gives_the_figures_of_the_run(run, place):
    common = [
        "evaluate",
        str(place / "model"),
        "--adapter",
        str(run.lora),
        "--data",
        str(place / "data.jsonl"),
    ]
    done = CliRunner().invoke(app, [*common, "--json", f"evaluation.also=[general,{place / 'other.jsonl'}]"])
    assert done.exit_code == 0, done.output
    measures = {m["name"]: m for m in json.loads(done.stdout)["measures"]}
    for name, kept in run.read()["also"].items():
        assert measures[f"loss_{name}"]["base"] == pytest.approx(kept["before"]["loss"], rel=MODEL)
        assert measures[f"loss_{name}"]["tuned"] == pytest.approx(kept["after"]["loss"], rel=MODEL)
        assert measures[f"kl_{name}"]["tuned"] == pytest.approx(kept["after"]["kl"], rel=MODEL)


def test_a_set_that_cannot_be_read_is_refused_before_a_model_is_loaded(place, monkeypatch):
    recipe = load_recipe(arguments(place, "no", f"evaluation.also=[{place / 'othr.jsonl'}]"))
    task = find_task("text")(recipe, Display(quiet=True), lambda: None)
    with pytest.raises(DataError, match=r"Did you mean .*other\.jsonl"):
        task.read()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("evaluation.also=[general,general]", "names general once"),
        ("evaluation.als=[]", "evaluation.also|Did you mean 'also'"),
        ("evaluation.also=general", "list"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused_in_words(place, setting, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(arguments(place, "no", setting))


def test_pictures_are_not_measured_by_text():
    with pytest.raises(RecipeError, match=r"evaluation\.also cannot be set for task=image"):
        load_recipe(["task=image", "model=x/y", "data=pictures", "evaluation.also=[general]"])
    assert load_recipe(["task=image", "model=x/y", "data=pictures"]).evaluation.also == []


# ---- in a comparison ---------------------------------------------------------------------------------------


def cells(prices: dict[str, float], gains: dict[str, float]) -> list[Cell]:
    made = []
    for method, price in prices.items():
        for seed in range(3):
            wobble = [0.01 * ((seed + number) % 3) for number in range(8)]
            losses = [gains[method] + w for w in wobble]
            shares = {"loss": [price + w for w in wobble], "kl": [price / 10 + w / 10 for w in wobble]}
            also_of = {"general": shares}
            made.append(Cell(method, 1e-3, seed, "done", validation=losses, test=losses, also=also_of))
    return made


def test_a_verdict_reads_better_by_so_much_at_the_price_of_so_much():
    found = cells({"lora": 2.0, "mine": 2.5}, {"lora": 1.0, "mine": 0.5})
    base = {"general": {"loss": [1.9] * 8}}
    verdict = with_costs(judge(found, ["lora", "mine"], "lora", [3.0] * 8, [3.0] * 8), found, base)
    [sentence] = verdict.sentences
    assert "mine is better than lora" in sentence and "-0.5000" in sentence
    assert "The price, against lora: loss on general text +0.5000" in sentence
    assert "KL from the base 0.2510 against 0.2010 nats a token" in sentence
    by = {price.measure: price for price in verdict.costs}
    assert by["loss"].found == "more" and by["loss"].difference.mean == pytest.approx(0.5)
    assert by["kl"].value - by["kl"].baseline_value == pytest.approx(0.05)
    assert verdict.base_also == {"general": pytest.approx(1.9)}
    json.dumps(dataclasses.asdict(verdict), allow_nan=False)


@pytest.mark.parametrize(
    ("price", "said"), [(1.5, "It costs less than lora"), (2.0, "No difference in price")]
)
def test_a_price_that_is_lower_or_not_shown_is_said_so(price, said):
    found = cells({"lora": 2.0, "mine": price}, {"lora": 1.0, "mine": 0.5})
    verdict = judge(found, ["lora", "mine"], "lora", [3.0] * 8, [3.0] * 8)
    assert said in with_costs(verdict, found, {"general": {"loss": [1.9] * 8}}).sentences[0]


def test_cells_of_an_older_version_have_a_verdict_without_prices():
    old = [
        dataclasses.replace(cell, also=None)
        for cell in cells({"lora": 2.0, "mine": 2.5}, {"lora": 1.0, "mine": 0.5})
    ]
    verdict = judge(old, ["lora", "mine"], "lora", [3.0] * 8, [3.0] * 8)
    assert with_costs(verdict, old, {}) == verdict
    assert with_costs(verdict, old, {"general": {"loss": [1.0] * 8}}).costs == []


def test_the_frontier_holds_what_no_other_beats_in_both():
    points = {"a": (1.0, 3.0), "b": (2.0, 1.0), "c": (2.0, 3.0), "d": (1.5, 2.0)}
    assert frontier(points) == ["a", "d", "b"]
    beaten = {
        n for n, p in points.items() if any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.values())
    }
    assert set(points) - beaten == set(frontier(points))
