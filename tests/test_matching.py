"""Settings of an adapter that fit nothing in a model, or say two things of one module."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model

import tiny
from moslora import MoSLoRAConfig
from moslora.api.planning import plan
from moslora.display import Display
from moslora.errors import RecipeError
from moslora.training.run import check, train
from moslora.tuner.layer import MoSLoRALayer
from moslora.tuner.matching import UnfitSettingWarning, find_misfits
from test_tuner_experts import build

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*_pattern keys did not match:RuntimeWarning",  # PEFT 0.21.2's own words
    "ignore:You have passed exclude_modules",
)

ALL = {"target_modules": "all-linear"}
LAYER_0 = r"layers\.0\.self_attn\.q_proj"
# What is set, and what has to be said of it.
UNFIT: list[tuple[dict[str, Any], str]] = [
    (
        {"target_modules": ["q_proj", "qq_proj"]},
        "target_modules has 'qq_proj', which fits no module .* 'q_proj'",
    ),
    (
        {"target_modules": ["q_proj", "self_attn.kproj"]},
        "'self_attn.kproj', which fits no .* 'self_attn.k_proj'",
    ),
    ({"target_modules": r".*\.qproj"}, "target_modules is .* fits no module"),
    ({**ALL, "modules_to_save": ["score"]}, "modules_to_save has 'score', which fits no module"),
    (
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        "modules_to_save leaves out every",
    ),
    ({**ALL, "exclude_modules": ["down_pro"]}, "exclude_modules has 'down_pro', .* 'down_proj'"),
    ({**ALL, "exclude_modules": "vision.*"}, "exclude_modules is 'vision.*', which fits no module"),
    (
        {**ALL, "target_parameters": ["experts.weight"]},
        "target_parameters has 'experts.weight', which fits no param",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, "layers_to_transform has 7"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [-1, 0]}, "layers_to_transform has -1"),
    (
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": 0},
        "'embed_tokens', but layers_to_transform leaves",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["layer"]},
        "'layer', .* 'layers'",
    ),
    (
        {**ALL, "trainable_token_indices": [3, 64]},
        "trainable_token_indices has 64, which is no token.* 0 to 63",
    ),
    (
        {**ALL, "trainable_token_indices": {"embed": [3]}},
        "trainable_token_indices has 'embed', which fits no module",
    ),
    (
        {**ALL, "rank_pattern": {"qproj": 2}},
        "rank_pattern has 'qproj', which fits no adapted module .* 'q_proj'",
    ),
    ({**ALL, "alpha_pattern": {"^q_proj": 2}}, r"alpha_pattern has '\^q_proj', which fits no adapted module"),
    (
        {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
        "rank_pattern has 'k_proj', which fits no adapted",
    ),
    ({**ALL, "rank_pattern": {"(q_proj": 2}}, r"'\(q_proj', which is not a regular expression"),
    ({**ALL, "bias": "all"}, "bias is 'all', but the base has no biases"),
    ({**ALL, "rank_pattern": {"q_proj": 2, rf".*\.{LAYER_0}": 4}}, "the first counts, and saving sorts them"),
    (
        {**ALL, "alpha_pattern": {"q_proj": 2, "self_attn.q_proj": 4}},
        "the first counts, and the other never does",
    ),
]
FIT: list[dict[str, Any]] = [
    {},
    ALL,
    {**ALL, "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},  # what PEFT itself adds
    {**ALL, "exclude_modules": ["lm_head"]},
    {"target_modules": r".*\.[qv]_proj", "rank_pattern": {"q_proj": 2}},
    {
        "target_modules": ["q_proj", "embed_tokens"],
        "layers_to_transform": None,
        "modules_to_save": ["lm_head"],
    },
    {
        **ALL,
        "rank_pattern": {"q_proj": 2, r"layers\.\d+\.mlp\.(up|down)_proj": 4, "^model.layers.0.*k_proj": 3},
    },
    {**ALL, "rank_pattern": {"q_proj": 2, "self_attn.q_proj": 2}},  # two keys, and they agree
]


@pytest.mark.parametrize(("settings", "said"), UNFIT)
def test_a_setting_that_does_nothing_or_says_two_things_is_found(settings: dict[str, Any], said: str) -> None:
    import re

    found = [
        str(misfit)
        for misfit in find_misfits(MoSLoRAConfig(**settings), tiny.llama())
        if not misfit.is_harmless
    ]
    assert len(found) == 1 + ("layers_pattern" in settings) and re.search(said, found[-1]), found


@pytest.mark.parametrize("settings", FIT)
def test_nothing_is_said_of_settings_that_fit(settings: dict[str, Any]) -> None:
    config = MoSLoRAConfig(**settings)
    before = dict(vars(config))
    assert find_misfits(config, tiny.llama()) == []
    assert vars(config) == before


def test_names_that_older_transformers_use_fit_and_so_do_experts() -> None:
    names = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    assert find_misfits(MoSLoRAConfig(**names), build("mixtral")) == []


def test_a_script_of_peft_is_warned_and_trains_what_fits() -> None:
    config = MoSLoRAConfig(target_modules=["q_proj", "qq_proj"], task_type="CAUSAL_LM")
    with pytest.warns(
        UnfitSettingWarning, match=r"'qq_proj', which fits no module of the base\. Did you mean 'q_proj'"
    ):
        model = get_peft_model(tiny.llama(), config)
    assert any("q_proj.moslora_A" in name for name, _ in model.named_parameters())


def alphas(model: Any) -> dict[str, float]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoSLoRALayer)}
    return {name: layer.scaling["default"] for name, layer in layers.items()}


def test_the_key_that_counts_in_training_counts_when_the_adapter_is_loaded(tmp_path: Path) -> None:
    """PEFT takes the first key that fits and saves keys sorted: its LoRA comes back with another scale."""
    alpha = {"q_proj": 2, rf".*\.{LAYER_0}": 4}
    config = MoSLoRAConfig(r=2, target_modules=["q_proj"], alpha_pattern=alpha, task_type="CAUSAL_LM")
    with pytest.warns(UnfitSettingWarning, match="which both fit model.layers.0.self_attn.q_proj"):
        model = get_peft_model(tiny.llama(), config)
    assert set(alphas(model).values()) == {1.0}
    model.save_pretrained(tmp_path)
    assert alphas(PeftModel.from_pretrained(tiny.llama(), tmp_path)) == alphas(model)
    # The way out that the message names.
    narrower = rf"^(?!model\.{LAYER_0}$)(.*[.])?q_proj"
    apart = {narrower: 2, rf".*\.{LAYER_0}": 4}
    config = MoSLoRAConfig(r=2, target_modules=["q_proj"], alpha_pattern=apart, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(tiny.llama(), config)
    assert sorted(alphas(model).values()) == [1.0, 2.0]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    return [f"model={folder}/base", f"data={tiny.save_chat_data(folder / 'data.jsonl', 8)}"]


@pytest.mark.parametrize("verb", ["dry run", "plan", "train", "compare"])
def test_every_verb_refuses_such_settings_before_anything_is_loaded_or_written(
    verb: str, given: list[str], tmp_path: Path
) -> None:
    from moslora.comparison.compare import compare

    runs = tmp_path / "runs"
    wrong = [*given, "adapter.rank_pattern.qproj=2", "adapter.modules_to_save=[score]", f"output={runs}/a"]
    verbs: dict[str, Any] = {
        "dry run": lambda: check(wrong, Display(quiet=True)),
        "plan": lambda: plan(settings=[*wrong, "trainer.max_length=8"]),
        "train": lambda: train(wrong, Display(quiet=True)),
        "compare": lambda: compare(wrong, Display(quiet=True), plan_only=True),
    }
    with pytest.raises(RecipeError) as said:
        verbs[verb]()
    assert {problem.split(" has ")[0] for problem in said.value.problems} == {
        "adapter.rank_pattern",
        "adapter.modules_to_save",
    }
    assert not runs.exists()


def test_what_could_not_be_shipped_is_refused_before_the_first_step(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moslora.adapters.formats import lora
    from moslora.errors import UsageError

    def without_one(*given: Any) -> Any:
        config = original(*given)
        config["target_modules"] = config["target_modules"][1:]
        return config

    original = lora.lora_config
    monkeypatch.setattr(lora, "lora_config", without_one)
    few = ["task.generate_examples=0", "trainer.max_steps=1", f"output={tmp_path}/runs/a"]
    with pytest.raises(UsageError, match="Nothing was trained"):
        train([*given, *few], Display(quiet=True))
    record = json.loads((tmp_path / "runs" / "a" / "run.json").read_text())
    assert record["status"] == "failed" and "Nothing was trained" in record["error"]
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").read_text() == ""
    assert not list((tmp_path / "runs" / "a").glob(".start*"))
