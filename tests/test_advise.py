"""Laws of the advice: what it says of a recipe is true of it, its overrides bring it there, its sources are named."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import moslora
import tiny
from moslora.advice.advise import advise_on
from moslora.advice.rules import HOME_BEST, HOME_STEPS, HOME_WIDTH, RULES, rate_by_width
from moslora.advice.situation import Situation, kind_of_layer
from moslora.advice.sources import GUESS, SOURCES
from moslora.cli import app
from moslora.display import Silence
from moslora.recipe.schema import RECIPES
from verbs import World

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("world"))


def by_key(advice: object) -> dict[str, object]:
    return {one.key: one for one in advice.recommendations}  # type: ignore[attr-defined]


def test_every_rule_has_a_source_that_is_listed_or_is_called_a_guess() -> None:
    for rule in RULES:
        assert set(rule.sources) <= SOURCES.keys() and rule.why.endswith((".", ")"))
        assert {one.source for one in rule.dissent} <= SOURCES.keys()
        assert rule.sources or rule.source == GUESS
    used = {key for rule in RULES for key in (*rule.sources, *(one.source for one in rule.dissent))}
    assert {"regret", "tinker", "trl", "alpha", "batch", "rl"} <= used


def test_a_setting_has_one_piece_of_advice_for_each_task() -> None:
    pairs = [(rule.key, kind) for rule in RULES for kind in rule.kinds]
    assert len(pairs) == len(set(pairs))


@given(st.integers(256, 16384), st.sampled_from(["llama", "qwen3", "gemma"]), st.integers(100, 10**6))
def test_the_rate_falls_with_width_and_is_half_as_high_again_in_short_runs(
    hidden: int, family: str, steps: int
) -> None:
    rate, _ = rate_by_width(hidden, family, steps)
    wider, _ = rate_by_width(2 * hidden, family, steps)
    short, _ = rate_by_width(hidden, family, 99)
    assert wider <= rate and short / rate == pytest.approx(1.5, rel=0.12)
    p = {"llama": 0.781, "qwen3": 0.0775}.get(family, (0.781 + 0.0775) / 2)
    assert rate == pytest.approx(5e-4 * (2000 / hidden) ** p, rel=0.06)


def test_our_figures_in_the_rules_are_those_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_evidence import load

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = json.loads((ROOT / "benchmarks/results/evidence/home/results.json").read_text(encoding="utf-8"))
    methods = {method["name"]: method for method in found["methods"]}
    for name, (best, low, high) in HOME_BEST.items():
        assert (best, [low, high]) == (methods[name]["best_rate"], methods[name]["stable"])
    advised, _ = rate_by_width(HOME_WIDTH, "llama", HOME_STEPS)
    assert f"the rule says {advised:.0e}".replace("e-03", "e-3") in " ".join(rule.ours for rule in RULES)
    rates = json.loads((ROOT / "benchmarks/results/advice-rate.json").read_text(encoding="utf-8"))
    best = {method["name"]: method["best_rate"] for method in rates["methods"]}
    (text,) = (rule.ours for rule in RULES if rule.key == "trainer.learning_rate" and "home" in rule.ours)
    assert f"Full fine-tuning was best at {best['full']:.0e}".replace("e-04", "e-4") in text
    assert f"LoRA's rate was {best['lora'] / best['full']:.0f} times its" in text
    targets = json.loads((ROOT / "benchmarks/results/advice-targets.json").read_text(encoding="utf-8"))
    (text,) = (rule.ours for rule in RULES if rule.key == "adapter.target_modules" and rule.ours)
    for name in ("attention", "mlp"):
        (one,) = (c for c in targets["contrasts"] if c["method"].endswith(name) and c["measure"] == "loss")
        mean, low, high = (f"{one['difference'][key]:.3f}" for key in ("mean", "low", "high"))
        assert f"by {mean} ({low} to {high}" in text
    low, high = HOME_BEST["lora"][1:]
    assert low <= advised <= high  # the advice is within what was stable here
    matched = next(c for c in found["contrasts"] if c["method"] == "lora-matched" and c["measure"] == "loss")
    ends = [matched["difference"][end] for end in ("low", "high")]
    assert f"by {ends[0]:.3f} to {ends[1]:.3f}" in " ".join(rule.ours for rule in RULES)
    evidence = load(ROOT / "benchmarks" / "evidence.py")
    same = {one["method"]: one["difference"] for one in evidence.at_the_baselines_rate("home")}
    for name in ("moslora", "moslora-orthogonal"):
        mean, low, high = (f"{same[name][key]:.3f}" for key in ("mean", "low", "high"))
        (text,) = (rule.ours for rule in RULES if rule.key == "adapter.mixer")
        assert re.search(rf"by {mean}[^(]*\({low} to {high}", text)


def test_what_the_advice_says_of_a_recipe_is_counted_from_it(world: World) -> None:
    advice = moslora.advise(
        model=str(world.base),
        data={"train": str(world.data), "heldout": str(world.heldout)},
        trainer={"max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    )
    s = advice.situation
    rows = [json.loads(line) for line in world.data.read_text(encoding="utf-8").splitlines()]
    # A byte is a token here; the end of the turn is learned, too.
    tokens = sum(len(row["messages"][1]["content"].encode()) + 1 for row in rows)
    assert (s.examples, s.steps, s.rows, s.hidden, s.architecture) == (len(rows), 7, 8, 32, "llama")
    assert s.tokens == pytest.approx(tokens, rel=0.2) and not s.is_estimate
    assert s.modules == {"attention": 8, "mlp": 6, "other": 0} == s.adapted
    assert s.trained == sum(f.A.numel() + f.B.numel() + f.M.numel() for f in _fresh(world).modules.values())


def _fresh(world: World) -> moslora.Adapter:
    from peft import get_peft_model

    folder = world.folder / "fresh"
    if not folder.exists():
        model = get_peft_model(
            tiny.llama(vocab_size=259), moslora.MoSLoRAConfig(r=16, target_modules="all-linear")
        )
        model.save_pretrained(folder)
    return moslora.read_adapter(folder)


@pytest.mark.parametrize(
    ("settings", "override"),
    [
        ("adapter.target_modules=[q_proj]", "adapter.target_modules=all-linear"),
        ("trainer.learning_rate=1e-6", "trainer.learning_rate="),
        ("trainer.learning_rate=0.9", "trainer.learning_rate="),
        ("trainer.per_device_train_batch_size=64", "trainer.per_device_train_batch_size=16"),
        ("trainer.gradient_accumulation_steps=8", "trainer.gradient_accumulation_steps=1"),
        ("adapter.lora_alpha=1", "adapter.lora_alpha=32"),
        ("trainer.num_train_epochs=40", "trainer.num_train_epochs=3"),
    ],
)
def test_overrides_bring_a_recipe_to_what_is_advised(world: World, settings: str, override: str) -> None:
    start = [f"model={world.base}", f"data={world.data}", settings]
    advice = moslora.advise(settings=start)
    assert any(one.startswith(override) for one in advice.overrides), advice.overrides
    assert override in advice.command_tail and settings not in advice.command_tail.split()
    again = moslora.advise(settings=[*start, *advice.overrides])
    key = override.partition("=")[0]
    assert not any(one.startswith(key) for one in again.overrides), again.overrides


def test_a_rank_is_enough_exactly_when_its_bits_hold_the_data() -> None:
    for tokens in (10, 10**5, 10**7, 10**9):
        situation = Situation(
            "text", {"adapter.r": 16, "adapter.lora_alpha": 32}, frozenset(), trained=16_000, tokens=tokens
        )
        rank = by_key(advise_on(situation))["adapter.r"]
        needed = tokens * 2.9 / 2 / 1000
        assert rank.fits is (needed <= 16)  # type: ignore[attr-defined]
        if needed > 16:
            wanted = int(rank.advised)  # type: ignore[attr-defined]
            assert wanted == min(256, 2 ** math.ceil(math.log2(needed)))


def test_every_task_gets_advice_and_an_unknown_one_is_told_that_it_is_a_guess() -> None:
    settings = {"trainer.learning_rate": 2e-4, "adapter.r": 16, "adapter.lora_alpha": 32}
    for kind in (*RECIPES, "preference", "classification", "reward", "rl"):
        advice = advise_on(Situation(kind, settings, frozenset()))
        assert "trainer.learning_rate" in by_key(advice) and not any(
            "No rule" in note for note in advice.notes
        )
    other = advise_on(Situation("music", settings, frozenset()))
    assert any("music" in note and GUESS in note for note in other.notes)
    assert all(one.is_guess and GUESS in one.source for one in other.recommendations)


def test_preferences_are_advised_their_own_rate_and_beta() -> None:
    settings = {"trainer.learning_rate": 2e-4, "task.beta": 0.9}
    found = by_key(advise_on(Situation("preference", settings, frozenset(), loss="dpo")))
    assert found["trainer.learning_rate"].overrides == ("trainer.learning_rate=1e-05",)  # type: ignore[attr-defined]
    assert found["task.beta"].overrides == ("task.beta=0.1",)  # type: ignore[attr-defined]


def test_what_is_not_at_hand_is_said_and_the_rest_is_advised(world: World, tmp_path: Path) -> None:
    advice = moslora.advise(model="org/unknown")
    said = " ".join(advice.notes)
    assert (
        "configuration was not read" in said
        and "No data are named" in said
        and advice.situation.hidden is None
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((world.base / "config.json").read_bytes())
    advice = moslora.advise(model=str(bare), data=str(world.data))
    assert (
        advice.situation.is_estimate
        and advice.situation.tokens
        and "estimated by characters" in " ".join(advice.notes)
    )
    missing = moslora.advise(model=str(world.base), data=str(tmp_path / "none.jsonl"))
    assert "moslora train would refuse them" in " ".join(missing.notes)


def test_the_command_prints_a_line_that_trains(world: World, tmp_path: Path) -> None:
    arguments = [f"model={world.base}", f"data={world.data}", "trainer.learning_rate=1e-6", "output.name=a b"]
    done = CliRunner().invoke(app, ["advise", *arguments], env={"COLUMNS": "140", "NO_COLOR": "1"})
    assert done.exit_code == 0 and "Against it" in done.output and "our guess" in done.output
    line = next(line for line in done.output.splitlines() if line.startswith("To try it: moslora train "))
    import shlex

    words = shlex.split(line.removeprefix("To try it: moslora train "))
    assert CliRunner().invoke(app, ["train", "--dry-run", *words]).exit_code == 0
    told = json.loads(CliRunner().invoke(app, ["advise", *arguments, "--json"]).stdout)
    assert all(one["source"] for one in told["recommendations"]) and told["overrides"] == [
        w for w in words if w not in arguments
    ]


def test_a_dry_run_has_the_short_form_of_the_same(world: World) -> None:
    settings = [f"model={world.base}", f"data={world.data}", "trainer.learning_rate=1e-6"]
    done = CliRunner().invoke(app, ["train", "--dry-run", *settings], env={"COLUMNS": "200"})
    overrides = moslora.advise(settings=settings, progress=Silence()).overrides
    assert overrides and all(one in done.output for one in overrides)
    assert "Advice: trainer.learning_rate is 1e-06" in done.output


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.mlp.down_proj", "mlp"),
        ("transformer.h.0.attn.c_attn", "attention"),
        ("transformer.h.0.mlp.c_proj", "mlp"),
        ("bert.encoder.layer.0.attention.self.query", "attention"),
        ("bert.encoder.layer.0.attention.output.dense", "attention"),
        ("bert.encoder.layer.0.intermediate.dense", "mlp"),
        ("bert.encoder.layer.0.output.dense", "other"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "mlp"),
        ("gpt_neox.layers.0.attention.query_key_value", "attention"),
        ("score", "other"),
    ],
)
def test_layers_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of_layer(name) == kind


def test_the_script_of_the_figures_makes_as_many_parameters_of_each_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from test_evidence import load

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = load(ROOT / "benchmarks" / "advice.py")
    each = {"q_proj": 1152, "k_proj": 768, "v_proj": 768, "o_proj": 1152}
    each |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2112)
    counts = [t["r"] * sum(each[name] for name in t["target_modules"]) for t in script.TARGETS.values()]
    assert max(counts) / fmean(counts) < 1.02


def test_ranks_of_experts_come_with_an_override_where_experts_are_adapted() -> None:
    from moslora.advice.rules import _experts

    recipe = {"adapter.r": 16, "adapter.target_parameters": ["mlp.experts.down_proj", "experts.gate_up_proj"]}
    found = _experts(Situation("text", recipe, frozenset(), experts=8))
    assert found is not None and found.fits is False
    assert found.overrides == ("adapter.rank_pattern={down_proj: 2, gate_up_proj: 2}",)
    pattern = {"adapter.rank_pattern": {"down_proj": 2, "gate_up_proj": 2}}
    done = _experts(Situation("text", {**recipe, **pattern}, frozenset(), experts=8))
    assert done is not None and done.fits and not done.overrides
    plain = _experts(Situation("text", {"adapter.r": 16}, frozenset(), experts=8))
    assert plain is not None and plain.fits is None and "none is adapted" in plain.why
