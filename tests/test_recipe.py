"""Laws of the recipe: everything wrong is named at once, and what is written reads back equal."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moslora.errors import RecipeError
from moslora.recipe import checking, field_types, schema, trainer_arguments, yaml_core
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import Recipe
from moslora.recipe.trainer_arguments import TRAINER_DEFAULTS, build_trainer_config, resolve_trainer_arguments

MINIMUM = ["model=org/base", "data=org/examples"]


@pytest.fixture(autouse=True)
def _adapter_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's own laws hold whatever the adapter's fields are; see also the test that uses them."""
    fields = {"r": int, "lora_alpha": float, "lora_dropout": float, "mixer": str}
    names = list[str] | set[str] | str | None
    every = {**fields, "target_modules": names, "rank_pattern": dict[str, int], "train_mixer": bool | None}
    monkeypatch.setattr(checking, "_adapter_fields", lambda: every)
    monkeypatch.setattr(checking, "_adapter_complaint", lambda arguments: [])


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(*arguments: str, base: Path | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(arguments, base)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# --- Reading


def test_a_file_and_its_overrides_say_the_same_as_overrides_alone(tmp_path: Path) -> None:
    file = write(tmp_path, "model: org/base\ndata: {train: org/examples, limit: 5}\nadapter: {r: 4}\n")
    from_file = load_recipe([file, "seed=3"], tmp_path)
    alone = load_recipe([*MINIMUM, "data.limit=5", "adapter.r=4", "seed=3"], tmp_path)
    assert from_file == alone


def test_shorthands_mean_their_section(tmp_path: Path) -> None:
    short = load_recipe(["task=text", *MINIMUM, "output=a/b"], tmp_path)
    keys = [
        "task.kind=text",
        "model.name=org/base",
        "data.train=org/examples",
        "output.dir=a",
        "output.name=b",
    ]
    assert short == load_recipe(keys, tmp_path)
    assert load_recipe([*MINIMUM, "output=name"], tmp_path).output.dir == str(tmp_path / "runs")


def test_a_shorthand_forgets_what_belonged_to_the_value_it_replaces(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: {name: a/b, revision: abc, dtype: float32}\n"
        "data: {train: c/d, heldout: c/heldout, format: alpaca, limit: 7}",
    )
    recipe = load_recipe([file, "data.heldout_split=dev", "model=e/f", "data=g/h"])
    assert (recipe.model.name, recipe.model.revision, recipe.model.dtype) == ("e/f", None, "float32")
    assert (recipe.data.heldout, recipe.data.format, recipe.data.limit) == (None, "auto", 7)
    assert recipe.data.heldout_split == "dev", "whatever the order of the overrides"


def test_paths_in_a_file_are_beside_it_and_paths_in_overrides_are_in_the_current_folder(
    tmp_path: Path,
) -> None:
    recipe_folder, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipe_folder, here):
        folder.mkdir()
        (folder / "both.jsonl").touch()
    (here / "only.jsonl").touch()
    file = write(recipe_folder, "model: org/base\ndata: {train: both.jsonl, heldout: only.jsonl}")
    read = load_recipe([file], here)
    assert read.data.train == str(recipe_folder / "both.jsonl")
    assert read.data.heldout == str(here / "only.jsonl")
    assert read.output.dir == str(here / "runs")
    assert load_recipe([file, "data=both.jsonl"], here).data.train == str(here / "both.jsonl")
    assert load_recipe([file, "data.train=absent.jsonl"], here).data.train == "absent.jsonl"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-.5", -0.5),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("=", "="),
        ("~", None),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("1_000", "1_000"),
    ],
)
def test_values_are_yaml_1_2(text: str, value: Any) -> None:
    found = yaml_core.parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


def test_what_reads_as_a_number_may_be_a_name_on_the_command_line() -> None:
    recipe = load_recipe([*MINIMUM, "model.revision=0012", "output=7"])
    assert (recipe.model.revision, recipe.output.name) == ("0012", "7")


def test_a_modules_name_keeps_its_points() -> None:
    recipe = load_recipe([*MINIMUM, "adapter.rank_pattern.model.layers.0.q_proj=4"])
    assert recipe.adapter["rank_pattern"] == {"model.layers.0.q_proj": 4}


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-at-all/x", "../../..//nowhere"])
def test_a_name_that_is_no_path_is_left_for_the_reader(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(["model=a/b", "data=c/d", f"data={name}"], tmp_path)
    assert recipe.data.train == name


def test_a_setting_inside_a_single_value_is_refused_and_inside_null_is_made(tmp_path: Path) -> None:
    file = write(tmp_path, "model: a/b\ndata: c/d\nadapter: {rank_pattern: null, r: 4}\nseed: 1")
    assert load_recipe([file, "adapter.rank_pattern.q=2"]).adapter["rank_pattern"] == {"q": 2}
    assert "single value 4" in problems(file, "adapter.r.q=2")[0]
    assert "single value 1" in problems(file, "seed.x=2")[0]


def test_anchors_do_not_share_what_an_override_changes(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "model: a/b\ndata: c/d\nadapter: {rank_pattern: &x {q: 2}}\ntrainer: {lr_scheduler_kwargs: *x}",
    )
    recipe = load_recipe([file, "adapter.rank_pattern.q=5"])
    assert recipe.trainer["lr_scheduler_kwargs"] == {"q": 2}


# --- Writing

texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12
) | st.sampled_from(
    ["no", "yes", "1e-3", "010", "~", "null", "true", "0x1", ".inf", "=", "<<", "a: b", " # c", "2026-01-01"]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


@given(
    texts, texts, st.dictionaries(texts, values, max_size=4), st.floats(1e-9, 0.49), st.integers(0, 2**32 - 1)
)
def test_what_is_written_reads_back_equal(
    model: str, data: str, free: dict[str, Any], fraction: float, seed: int
) -> None:
    recipe = Recipe.model_validate(
        {
            "model": {"name": model},
            "data": {"train": data, "heldout_fraction": fraction},
            "adapter": free,
            "trainer": free,
            "seed": seed,
        }
    )
    assert Recipe.model_validate(yaml_core.parse_yaml(recipe.to_yaml(), "here")) == recipe


def test_a_written_recipe_is_complete_and_loads_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    recipe = load_recipe(["model=org/base", "data=x.jsonl", "adapter.mixer=orthogonal"], tmp_path)
    text = recipe.to_yaml()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert load_recipe([write(elsewhere, text)], elsewhere) == recipe
    # What training starts from stands in the adapter section, where there is one.
    assert yaml.safe_load(text).keys() == Recipe.model_fields.keys() - {"start_from", "parallel"}


# --- Refusing


def test_every_problem_is_named_at_once_with_its_place_and_the_nearest_name() -> None:
    found = problems(
        *MINIMUM,
        "adapter.lora_aplha=3",
        "adapter.r=many",
        "task.metric=jsno",
        "data.heldout_fraction=0.9",
        "data.tran=x",
        "seed=true",
        "lr=1",
        "trainr.x=1",
        "output.name=a/b",
        "word",
    )
    expected = {
        "adapter.lora_aplha is unknown. Did you mean 'lora_alpha'?",
        "adapter.r is 'many' (a text), but must be a whole number.",
        "task.metric is 'jsno' (a text), but must be 'none', 'json' or 'text'. Did you mean 'json'?",
        "data.heldout_fraction is 0.9 (a number); it should be less than 0.5.",
        "data.tran is unknown. Did you mean 'train'?",
        "seed is True (a truth value); it should be a valid integer.",
        "lr is unknown; set trainer.learning_rate.",
        "trainr is unknown. Did you mean 'trainer'?",
    }
    assert expected <= set(found)
    assert len(found) == len(expected) + 2, "and the two not spelled out here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a remark", "is empty"),
        ("- model: a", "holds a list"),
        ("just words", "the single value"),
        ("model: a\nmodel: b", "line 2, column 1: model occurs twice; it was set in line 1"),
        ("model: a/b\ndata: c/d\nadapter: {r: 1, r: 2}", "line 3, column 17: r occurs twice"),
        ("model: [a", "line 1, column 10"),
        ("model:\n\t- a", "line 2, column 1"),
        ("1: a", "a key must be a plain name"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("adapter: &a {x: *a}", "or for one that holds itself; write it without aliases"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("model: a/b\n---\ndata: c", "line 2"),
        ("model: a/b", "data is missing; name the examples"),
        ("model: {dtype: float32}\ndata: a/b", "model.name is missing"),
        ("model: [a]\ndata: a/b", "model is ['a'] (a list), but must be a mapping, or one name."),
        ("model: a/b\ndata: c/d\nadapter: 5", "adapter is 5 (a whole number); it should be a valid mapping."),
        (
            "model: {name: 5}\ndata: c/d",
            "model.name is 5 (a whole number), but must be a text; put it in quotes.",
        ),
        ("model: a/b\ndata: ''", "data.train is '' (a text), but must be a file or hub id; it is empty."),
        (
            "model: a/b\ndata: c/d\nadapter: {task_type: x}",
            "adapter.task_type cannot be set: the task sets it.",
        ),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    assert message in "\n".join(problems(file))


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "model: a", "mine.yaml")
    (tmp_path / "weights").write_bytes(b"\x00\x01\xff" * 100)
    (tmp_path / "large.jsonl").write_text("x" * (2 << 20))
    assert f"Did you mean {tmp_path / 'mine.yaml'}?" in problems(str(tmp_path / "mien.yaml"))[0]
    assert "is a folder" in problems(str(tmp_path))[0]
    assert "binary" in problems(str(tmp_path / "weights"))[0]
    assert "more than 1 MiB" in problems(str(tmp_path / "large.jsonl"))[0]
    assert "no recipe" in problems()[0]


@given(st.text(max_size=40))
def test_no_text_makes_anything_but_a_recipe_error(text: str) -> None:
    for arguments in ([text], [*MINIMUM, text], [*MINIMUM, f"adapter={text}"], [*MINIMUM, f"model={text}"]):
        try:
            load_recipe(arguments)
        except RecipeError as error:
            assert error.problems


# --- The libraries' own sections


def test_the_adapters_arguments_are_the_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("moslora.tuner.config") is None:
        pytest.skip("needs MoSLoRAConfig")
    monkeypatch.undo()
    assert load_recipe([*MINIMUM, "adapter.target_modules=[q_proj]"]).adapter["target_modules"] == ["q_proj"]
    assert "orthogonal" in problems(*MINIMUM, "adapter.mixer=ortogonal")[0]
    assert problems(*MINIMUM, "adapter.r=true", "adapter.mixr=x") == [
        "adapter.r is True (a truth value), but must be a whole number.",
        "adapter.mixr is unknown. Did you mean 'mixer'?",
    ]


def test_the_trainers_arguments_are_trls() -> None:
    found = problems(
        *MINIMUM,
        "trainer.learning_rate=fast",
        "trainer.max_stpes=5",
        "trainer.lr_scheduler_type=cosin",
        "trainer.max_steps=true",
        "trainer.learning_rate_decay_of_mine=1",
        "trainer.output_dir=x",
        "trainer.resume_from_checkpoint=x",
        "trainer.hub_token=secret",
        "trainer.warmup_ratio=0.1",
    )
    assert found[0] == "trainer.learning_rate is 'fast' (a text), but must be a number."
    assert found[1] == "trainer.max_stpes is unknown. Did you mean 'max_steps'?"
    assert found[2].endswith("Did you mean 'cosine'?")
    assert found[3] == "trainer.max_steps is True (a truth value), but must be a whole number."
    assert "moslora train --resume RUN" in found[6]
    assert "secret'" not in found[7], "and its value is not repeated"
    assert "warmup_steps" in found[8]


def test_every_default_of_ours_is_a_field_of_trls_and_trls_accepts_it(tmp_path: Path) -> None:
    recipe = load_recipe([*MINIMUM, "seed=5"])
    known = trainer_arguments.trainer_fields()
    assert all(default.reason for default in TRAINER_DEFAULTS.values())
    assert resolve_trainer_arguments(recipe, "cpu").keys() <= known.keys()
    for default, name in ((d, n) for n, d in TRAINER_DEFAULTS.items() if n in known):
        for value in (default.cpu, default.gpu):
            assert field_types.convert(value, known[name]) == value
    config = build_trainer_config(recipe, "cpu", tmp_path / "checkpoints")
    assert (config.seed, config.data_seed, config.bf16, config.use_cpu) == (5, 5, False, True)
    assert not config.gradient_checkpointing and config.warmup_steps == 0.03
    assert not (tmp_path / "checkpoints").exists()


def test_the_users_value_wins_under_either_of_its_names(tmp_path: Path) -> None:
    given = ["trainer.gradient_checkpointing=true", "trainer.learning_rate=1e-4", "trainer.seed=9"]
    recipe = load_recipe([*MINIMUM, *given])
    config = build_trainer_config(recipe, "cpu", tmp_path, max_steps=3)
    assert (config.gradient_checkpointing, config.learning_rate, config.seed) == (True, 1e-4, 9)
    assert config.max_steps == 3


def test_short_runs_log_every_step() -> None:
    recipe = load_recipe([*MINIMUM, "trainer.max_steps=20"])
    assert resolve_trainer_arguments(recipe, "cpu")["logging_steps"] == 1
    assert resolve_trainer_arguments(load_recipe(MINIMUM), "cpu", steps=1000)["logging_steps"] == 10


def test_settings_that_do_not_go_together_are_a_recipe_error(tmp_path: Path) -> None:
    recipe = load_recipe([*MINIMUM, "trainer.load_best_model_at_end=true"])
    with pytest.raises(RecipeError, match=r"trainer: .*save and eval strategy"):
        build_trainer_config(recipe, "cpu", tmp_path)


def test_numbers_are_finite() -> None:
    assert not any(math.isfinite(v) for v in (float("nan"), float("inf")))
    assert "must be a number" in problems(*MINIMUM, "adapter.lora_alpha=.nan")[0]
    assert "finite" in problems(*MINIMUM, "data.heldout_fraction=.nan")[0]


def test_the_reference_names_every_key() -> None:
    reference = (Path(__file__).parents[1] / "docs" / "recipe.md").read_text(encoding="utf-8")
    sections = [section for kind in schema.SECTIONS_OF.values() for section in kind.values()]
    keys = {key for section in sections for key in section.model_fields} - {"dir", "name"}
    missing = sorted(key for key in (keys | TRAINER_DEFAULTS.keys()) if f"`{key}`" not in reference)
    assert not missing


@pytest.mark.parametrize(
    ("kind", "part"), [("vision", "vision"), ("vision", "projector"), ("image", "text_encoders")]
)
def test_a_rank_of_a_part_that_is_not_adapted_is_refused_and_not_ignored(kind: str, part: str) -> None:
    given = [f"task={kind}", *MINIMUM, f"scopes.{part}_r=8"]
    (said,) = problems(*given, f"scopes.{part}=frozen")
    assert f"one with {part}: adapter where {part}_r is given" in said
    assert getattr(load_recipe([*given, f"scopes.{part}=adapter"]).scopes, f"{part}_r") == 8
