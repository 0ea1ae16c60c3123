"""Training that starts from an adapter, runs that are trained longer, and the lineage that travels with an adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import moslora
import moslora.training.run
import tiny
from moslora import MoSLoRAConfig
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.lineage import LINEAGE, lineage_of
from moslora.display import Display
from moslora.errors import AdapterError, RecipeError, Stopped, UsageError
from moslora.recipe.loading import load_recipe
from moslora.training.run import check, resume, train
from moslora.training.run_directory import RunDirectory
from moslora.training.start_from import open_start
from test_train import arguments, stop_at, weights
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def quiet() -> Display:
    return Display(quiet=True)


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes longer than a run."""
    monkeypatch.setattr(moslora.training.run, "write_report", lambda *_, **__: None)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    tiny.save_chat_data(folder / "heldout.jsonl", 5)
    return folder


FEW = {"task.generate_examples": 0, "task.metric": "none", "adapter.lora_dropout": 0.0}
# An adapter that says nothing of structure itself: the start's counts.
UNSAID = ("adapter.r", "adapter.lora_dropout")


def started(world: Path, out: Path, start: Path, **changes: object) -> list[str]:
    own = arguments(world, out, **{**FEW, "adapter.start_from": start, **changes})
    return [one for one in own if one.partition("=")[0] not in UNSAID or one.partition("=")[0] in changes]


def made(world: Path, folder: Path, config: Any) -> Path:
    """An adapter that is not a fresh one, saved by PEFT."""
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.save_pretrained(folder)
    return folder


STARTS: dict[str, Any] = {
    "native": lambda: MoSLoRAConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"),
    "plain LoRA": lambda: LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "patterns": lambda: MoSLoRAConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 7.0},
        use_rslora=True, mixer="orthogonal", task_type="CAUSAL_LM",
    ),
    "pissa": lambda: MoSLoRAConfig(r=4, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"),
    "DoRA": lambda: MoSLoRAConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "own mixer": lambda: MoSLoRAConfig(r=4, target_modules="all-linear", mixer=torch.eye(4) * 2, task_type="CAUSAL_LM"),
    "whole embedding": lambda: MoSLoRAConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", STARTS)
def test_training_starts_with_the_logits_of_the_adapter_that_it_starts_from(
    kind: str, world: Path, tmp_path: Path
) -> None:
    path = made(world, tmp_path / "start", STARTS[kind]())
    recipe = load_recipe(started(world, tmp_path, path))
    start = open_start(recipe)
    assert start is not None
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    fresh = get_peft_model(base, MoSLoRAConfig(task_type="CAUSAL_LM", **recipe.adapter))
    start.put_into(fresh)
    ids = tiny.tokens(2, 12)
    from peft import PeftModel

    again = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    with torch.no_grad():
        plain = again(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(again, path).eval()(input_ids=ids).logits
        found = fresh.eval()(input_ids=ids).logits
    assert relative_error(found, wanted) < MODEL
    assert relative_error(plain, wanted) > 1e-3


@pytest.fixture(scope="module")
def first(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moslora.training.run, "write_report", lambda *_, **__: None)
        out = tmp_path_factory.mktemp("runs")
        return train(arguments(world, out, **{**FEW, "trainer.max_steps": 3}), quiet())


def test_a_run_continues_an_adapter_and_tells_its_lineage(
    first: RunDirectory, world: Path, tmp_path: Path
) -> None:
    run = train(started(world, tmp_path, first.adapter, **{"trainer.max_steps": 3}), quiet())
    record = run.read()
    metrics = record["metrics"]
    assert metrics["start"]["loss"] == pytest.approx(first.read()["metrics"]["after"]["loss"], rel=1e-5)
    assert metrics["after"]["loss"] < metrics["start"]["loss"] < metrics["before"]["loss"]
    assert record["hashes"]["start"].keys() == {"adapter_model.safetensors", "adapter_config.json"}
    assert record["start_from"]["path"] == str(first.adapter)
    assert "start_from" in run.recipe.read_text() and load_recipe([str(run.recipe)]).adapter["r"] == 4
    story = lineage_of(run.adapter)
    assert story is not None and story["start"]["lineage"]["run"] == "run" and story["steps"] == 3
    assert story["data"]["train"] == record["hashes"]["data"]["train"]
    inspection = moslora.inspect(run.lora)
    assert len(inspection.lineage) == 2 and "starting from" in inspection.lineage[0]


def test_a_run_from_an_adapter_that_was_stopped_ends_with_the_same_weights(
    first: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"trainer.max_steps": 4}
    whole = train(started(world, tmp_path / "whole", first.lora, **own), quiet())
    stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        train(started(world, tmp_path / "parts", first.lora, **own), quiet())
    parts = resume(tmp_path / "parts" / "run", quiet())
    one, two = weights(whole), weights(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_start_that_changed_is_not_continued_with(
    first: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first.adapter, tmp_path / "start")
    stop_at(monkeypatch, 1)
    with pytest.raises(Stopped):
        train(started(world, tmp_path, tmp_path / "start", **{"trainer.max_steps": 3}), quiet())
    (tmp_path / "start" / "adapter_config.json").write_text(
        (first.adapter / "adapter_config.json").read_text() + "\n"
    )
    with pytest.raises(UsageError, match="its start changed"):
        resume(tmp_path / "run", quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter.r": 8}, r"adapter\.r is 8, and the adapter that it starts from .* has 4"),
        ({"adapter.target_modules": "[q_proj]"}, r"adapter\.target_modules is"),
        ({"adapter.mixer": "kaiming"}, r"adapter\.mixer is 'kaiming'"),
        ({"adapter.use_dora": "true"}, r"adapter\.use_dora is True"),
        ({"adapter.init_lora_weights": "pissa"}, r"adapter\.init_lora_weights is 'pissa'"),
    ],
)
def test_what_contradicts_the_start_is_refused_by_name(
    changes: dict[str, object], message: str, first: RunDirectory, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(started(world, tmp_path, first.adapter, **changes))


def test_what_a_start_says_may_be_said_again_and_dropout_is_free(
    first: RunDirectory, world: Path, tmp_path: Path
) -> None:
    own = {"adapter.r": 4, "adapter.mixer": "orthogonal", "adapter.lora_dropout": 0.2}
    recipe = load_recipe(started(world, tmp_path, first.adapter, **own))
    assert recipe.adapter["lora_dropout"] == 0.2 and recipe.adapter["lora_alpha"] == 32


def test_a_start_that_is_not_an_adapter_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapter\.start_from: .*does not exist"):
        load_recipe(started(world, tmp_path, tmp_path / "none"))
    with pytest.raises(RecipeError, match=r"adapter\.start_from: .*whole model"):
        load_recipe(started(world, tmp_path, world / "base"))
    with pytest.raises(RecipeError, match=r"set adapter\.start_from"):
        load_recipe([*arguments(world, tmp_path, **FEW), f"start_from={tmp_path}"])


def test_a_start_of_another_base_is_refused_by_its_hashes(
    first: RunDirectory, world: Path, tmp_path: Path
) -> None:
    tiny.save_chat_model(tmp_path / "other", seed=1)
    shutil.copytree(first.lora, tmp_path / "alone")  # away from its run, with its lineage
    with pytest.raises(AdapterError, match="was trained on another base"):
        check(started(world, tmp_path, tmp_path / "alone", model=tmp_path / "other"), quiet())


def test_a_start_is_neither_compared_nor_given_to_pictures(
    first: RunDirectory, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="start_from cannot be compared"):
        moslora.compare(settings=started(world, tmp_path, first.adapter), methods=["lora", "moslora"])
    with pytest.raises(RecipeError, match=r"adapter\.start_from cannot be set for task=image"):
        load_recipe(["task=image", "model=m", "data=d", f"adapter.start_from={first.adapter}"])


# --- Longer -------------------------------------------------------------------------------------------------


def test_a_completed_run_is_trained_longer_and_keeps_its_history(
    world: Path, tmp_path: Path, first: RunDirectory
) -> None:
    shutil.copytree(first.path, tmp_path / "run")
    resume(tmp_path / "run", quiet(), settings=["trainer.max_steps=6"])
    run = moslora.Run(tmp_path / "run")
    record = run.record
    assert (
        record["status"] == "completed"
        and record["metrics"]["after"]["loss"] < first.read()["metrics"]["after"]["loss"]
    )
    [kept] = record["history"]
    assert kept["steps"] == 3 and kept["trainer"] == {"max_steps": 3}
    assert kept["metrics"] == first.read()["metrics"]["after"]
    assert load_recipe([str(tmp_path / "run" / "recipe.yaml")]).trainer["max_steps"] == 6
    steps = [line["step"] for line in run.history if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    rates = {line["step"]: line["learning_rate"] for line in run.history if "learning_rate" in line}
    assert rates[3] < rates[4]  # the schedule had ended, and is stretched
    story = lineage_of(run.adapter)
    assert story is not None and story["steps"] == 6
    again = RunDirectory(tmp_path / "run")
    with pytest.raises(UsageError, match="is not longer"):
        resume(again.path, quiet(), settings=["trainer.max_steps=6"])


def test_a_constant_rate_trained_longer_is_the_run_that_was_long_from_the_beginning(
    world: Path, tmp_path: Path
) -> None:
    own = {**FEW, "trainer.lr_scheduler_type": "constant", "trainer.warmup_steps": 0}
    long = train(arguments(world, tmp_path / "long", **own, **{"trainer.max_steps": 5}), quiet())
    short = train(arguments(world, tmp_path / "short", **own, **{"trainer.max_steps": 3}), quiet())
    longer = resume(short.path, quiet(), settings=["trainer.max_steps=5"])
    one, two = weights(long), weights(longer)
    assert all(torch.equal(one[name], two[name]) for name in one)
    costs = [moslora.Run(run.path).also["general"]["after"] for run in (long, longer)]
    assert costs[0] == costs[1] != moslora.Run(longer.path).record["history"][0]["also"]["general"]


def test_a_lengthening_that_was_killed_is_made_up_for(
    world: Path, tmp_path: Path, first: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first.path, tmp_path / "run")

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(moslora.training.longer, "write_text", die)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run", quiet(), settings=["trainer.max_steps=5"])
    record = resume(tmp_path / "run", quiet()).read()
    assert record["status"] == "completed" and len(record["history"]) == 1
    assert load_recipe([str(tmp_path / "run" / "recipe.yaml")]).trainer["max_steps"] == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.max_step=9"], r"Did you mean 'trainer\.max_steps'"),
        (["trainer.learning_rate=1e-3"], r"adapter\.start_from="),
        (["trainer.max_steps=2"], r"has taken 3 steps"),
        (["trainer.num_train_epochs=9"], r"does not count"),
    ],
)
def test_what_is_not_longer_is_refused(settings: list[str], message: str, first: RunDirectory) -> None:
    before = first.read()
    with pytest.raises(UsageError, match=message):
        resume(first.path, quiet(), settings=settings)
    assert first.read() == before


def test_a_completed_run_says_how_to_train_it_longer(first: RunDirectory) -> None:
    with pytest.raises(UsageError, match=r"trainer\.max_steps=N.*adapter\.start_from="):
        resume(first.path, quiet())


# --- Lineage ------------------------------------------------------------------------------------------------


def test_a_lineage_goes_along_with_an_export_and_is_not_told_of_other_tensors(
    first: RunDirectory, tmp_path: Path
) -> None:
    moslora.export(first.adapter, tmp_path / "lora")
    story = lineage_of(tmp_path / "lora")
    assert story is not None and story["task"] == "text" and story == lineage_of(first.adapter)
    assert json.loads((first.adapter / "moslora_lineage.json").read_text())["base"]["fingerprint"]
    shutil.copytree(first.adapter, tmp_path / "moved")
    assert lineage_of(tmp_path / "moved") == story
    shutil.copy(first.lora / "adapter_model.safetensors", tmp_path / "moved" / "adapter_model.safetensors")
    assert lineage_of(tmp_path / "moved") is None
    (tmp_path / "lora" / LINEAGE).write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match=f"{LINEAGE} cannot be read"):
        assert lineage_of(tmp_path / "lora") is None
    assert read_adapter(tmp_path / "lora").is_folded
