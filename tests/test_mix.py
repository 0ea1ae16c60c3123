"""Mixers learned over several frozen adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from moslora.adapters.arithmetic import add
from moslora.adapters.formats.reading import read_adapter
from moslora.adapters.inspection import inspect_adapter
from moslora.cli import app
from moslora.errors import AdapterError, ProofError, Stopped
from moslora.training.mix import open_mix
from moslora.training.run import resume, train
from moslora.training.run_directory import RunDirectory
from test_train import arguments, quiet, stop_at, weights

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, and two adapters whose modules and ranks differ, one a plain LoRA."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    tiny.save_chat_data(folder / "heldout.jsonl", 5)
    for name, changes in (
        ("one", {"adapter.target_modules": "[q_proj, down_proj]"}),
        ("two", {"adapter.target_modules": "[q_proj, v_proj]", "adapter.r": 3, "adapter.lora_alpha": 7}),
    ):
        train([*arguments(folder, folder, **changes), f"output.name={name}", "task.metric=none"], quiet())
    return folder


def sources(world: Path) -> list[Path]:
    return [world / "one" / "adapter", world / "two" / "lora"]


def mixing(world: Path, out: Path, weights: str = "[1.0, 0.5]", **changes: object) -> list[str]:
    listed = json.dumps([str(path) for path in sources(world)])
    return [*arguments(world, out, **changes), f"mix.adapters={listed}", f"mix.weights={weights}"]


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train(mixing(world, tmp_path_factory.mktemp("runs")), quiet(), "moslora mix ...")


def test_a_mix_starts_as_the_weighted_sum_and_trains_the_mixers_alone(
    finished: RunDirectory, world: Path
) -> None:
    whole = add([read_adapter(path) for path in sources(world)], [1.0, 0.5])
    mixed = read_adapter(finished.adapter)
    assert mixed.modules.keys() == whole.modules.keys()
    for name, start in whole.modules.items():
        end = mixed.modules[name]
        assert torch.equal(start.A, end.A) and torch.equal(start.B, end.B) and end.scale == 1
        assert not torch.equal(start.M, end.M)
    first = read_adapter(sources(world)[0]).modules["model.layers.0.self_attn.q_proj"]
    q = mixed.modules["model.layers.0.self_attn.q_proj"]
    assert torch.equal(q.A[:4], first.A) and torch.equal(q.B[:, :4], first.B * first.scale)
    assert q.r == 7 and q.M[:4, 4:].any() and q.M[4:, :4].any()  # cross terms were learned
    record = finished.read()
    assert record["trainable_parameters"] == sum(f.M.numel() for f in mixed.modules.values())
    assert record["proofs"]["frozen"]["tensors"] == 2 * len(whole.modules)
    assert record["metrics"]["after"]["loss"] < record["metrics"]["start"]["loss"]


def test_what_is_measured_at_the_start_is_the_weighted_sum(
    finished: RunDirectory, world: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    from moslora.adapters.combine import combine
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    combine(sources(world), [1.0, 0.5], tmp_path / "sum")
    task = TextTask(load_recipe(arguments(world, tmp_path)), quiet(), lambda: None)
    task.read()
    task.prepare()
    model: Any = PeftModel.from_pretrained(task.load(), tmp_path / "sum")
    expected = task.evaluate(model, "sum").metrics["loss"]
    assert finished.read()["metrics"]["start"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_start_of_a_mix_is_kept_and_inspected(finished: RunDirectory, world: Path) -> None:
    start = open_mix(sources(world), [1.0, 0.5]).whole
    mixed = read_adapter(finished.adapter)
    for report in inspect_adapter(finished.adapter).modules:
        M0, M = start.modules[report.module].M.double(), mixed.modules[report.module].M.double()
        assert report.moved == pytest.approx(float((M - M0).norm() / M0.norm()))


def test_a_mix_resumed_ends_bit_for_bit_as_uninterrupted(
    finished: RunDirectory, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        train(mixing(world, tmp_path), quiet())
    resumed = resume(tmp_path / "run", quiet())
    assert all(torch.equal(weights(resumed)[name], t) for name, t in weights(finished).items())
    starts = [load_file(run.adapter / "moslora_start.safetensors") for run in (resumed, finished)]
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], t) for name, t in starts[1].items())


def test_changed_sources_are_refused_on_resuming(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    mine = Path(shutil.copytree(world / "two" / "lora", tmp_path / "mine"))
    listed = json.dumps([str(world / "one" / "adapter"), str(mine)])
    stop_at(monkeypatch, 1)
    with pytest.raises(Stopped):
        train([*arguments(world, tmp_path), f"mix.adapters={listed}"], quiet())
    file = mine / "adapter_model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="its adapters changed since it began"):
        resume(tmp_path / "run", quiet())
    assert RunDirectory.open(tmp_path / "run").read()["status"] == "interrupted"


def test_a_factor_that_moved_fails_the_proof(finished: RunDirectory, world: Path, tmp_path: Path) -> None:
    import shutil

    mix = open_mix(sources(world), [1.0, 0.5])
    mix.prove(finished.adapter)
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "a"))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "moslora_A" in name)
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))
    save_file(tensors, file)
    with pytest.raises(ProofError, match=r"A of .* is not what the sources have"):
        mix.prove(folder)
    unmoved = {n: t for n, t in load_file(finished.adapter / file.name).items() if "moslora_M" not in n}
    started = {f"base_model.model.{n}.moslora_M.weight": f.M for n, f in mix.whole.modules.items()}
    save_file({**unmoved, **started}, file)
    with pytest.raises(ProofError, match="nothing was learned"):
        mix.prove(folder)


def test_what_would_train_more_or_fits_another_base_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\.bias does not go with mix"):
        train(mixing(world, tmp_path, **{"adapter.bias": "all"}), quiet())
    tiny.save_chat_model(tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    save_file({n: t + 0.01 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="trained on another base"):
        train(mixing(world, tmp_path, model=tmp_path / "other"), quiet())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]
    with pytest.raises(AdapterError, match="does not exist"):
        open_mix([world / "one" / "adapter", world / "nothing"])


@pytest.mark.parametrize("weights", ["1", "1,2,3", "one,two"])
def test_weights_are_one_number_for_each_adapter(weights: str) -> None:
    shown = CliRunner().invoke(app, ["mix", "a", "b", "--recipe", "r.yaml", "--weights", weights])
    assert shown.exit_code == 2 and "weights" in shown.output and "Traceback" not in shown.output


def test_the_command_mixes_and_says_what_it_proved(world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = arguments(world, tmp_path, **{"trainer.max_steps": 2})
    recipe.write_text(f"model: {world / 'base'}\ndata: {world / 'train.jsonl'}\n", encoding="utf-8")
    paths = [str(path) for path in sources(world)]
    shown = CliRunner().invoke(
        app, ["mix", *paths, "--recipe", str(recipe), "--weights", "mean", *settings[2:]]
    )
    assert shown.exit_code == 0, shown.output
    assert "Proven: the 12 A and B of 6 modules are the sources', bit for bit" in shown.output
    assert "weighted sum" in shown.output and "weight 0.5" in shown.output
    assert read_adapter(tmp_path / "run" / "lora").is_folded


def test_a_base_that_cannot_be_compared_by_its_hashes_is_warned_of(world: Path) -> None:
    mix = open_mix(sources(world))
    assert mix.weights == (1.0, 1.0) and len(mix.hashes) == 2
    warning = mix.check_base("elsewhere", "/elsewhere", {"method": "commit", "commit": "x"})
    assert warning is not None and "elsewhere" in warning
