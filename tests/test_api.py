"""The Python API: objects in, typed results out, and nothing of the caller's is changed."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import moslora
import tiny
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import native
from moslora.display import Printable


def save_adapter(path: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    modules = {
        f"model.layers.{layer}.self_attn.{name}": Factors(
            torch.randn(4, 32, generator=generator),
            torch.randn(4, 4, generator=generator),
            torch.randn(32, 4, generator=generator),
            0.1,
        )
        for layer in range(2)
        for name in ("q_proj", "o_proj")
    }
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "mixer": "kaiming"}
    path.mkdir()
    native.write(Adapter(modules, config), path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_chat_model(tmp_path_factory.mktemp("api") / "base-model")


@pytest.fixture
def here(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a model, data and adapters, which is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base-model").symlink_to(base)
    tiny.save_chat_data(tmp_path / "data.jsonl")
    save_adapter(tmp_path / "my-adapter")
    save_adapter(tmp_path / "other-adapter", seed=1)
    moslora.export("my-adapter", "plain-lora")
    return tmp_path


def test_every_public_name_is_there_and_every_error_has_the_same_base() -> None:
    for name in moslora.__all__:
        value = getattr(moslora, name)
        assert value.__doc__
        if name.endswith("Error"):
            assert issubclass(value, moslora.MoSLoRAError)
    assert set(moslora.__all__) <= set(dir(moslora))


@pytest.mark.parametrize(
    "name", ["export", "import_adapter", "combine", "merge", "inspect", "doctor", "plan"]
)
def test_the_examples_of_a_public_function_run(name: str, here: Path) -> None:
    run_examples(name)


def run_examples(name: str) -> None:
    function = getattr(moslora, name)
    module = importlib.import_module(function.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, module, {"moslora": moslora})
    assert tests and tests[0].examples, f"moslora.{name} has no example"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for test in tests:
        assert runner.run(test).failed == 0, f"an example of moslora.{name} failed; see the output"


def test_results_carry_path_and_proof_and_read_as_the_command_prints(here: Path) -> None:
    exported = moslora.export("my-adapter", "out.gguf", "gguf", base="base-model")
    assert exported.path == Path("out.gguf") and exported.path.exists() and exported.proof.passed
    assert repr(exported) == str(exported)
    assert "Read my-adapter: native, 4 modules." in repr(exported) and "Proven" in repr(exported)
    combined = moslora.combine(["my-adapter", "other-adapter"], "both", rank=4)
    assert "Read other-adapter, weight 1." in repr(combined) and "Rank 4" in repr(combined)
    merged = moslora.merge("base-model", "my-adapter", "merged")
    assert merged.proof.modules == 4 and "Wrote merged" in repr(merged)
    for result in (exported, combined, merged):
        assert isinstance(result, Printable) and result.to_dict()["out"] == str(result.path)


def test_inspection_diagnosis_and_plan_read_as_tables(here: Path) -> None:
    inspection = moslora.inspect("my-adapter", "base-model", html="page.html")
    assert Path("page.html").exists() and len(inspection.modules) == 4
    assert "q_proj" in repr(inspection) and "eff. rank" in repr(inspection)
    diagnosis = moslora.doctor(Path("my-adapter"), engines=["peft"])
    assert diagnosis.is_usable and diagnosis.verdict in repr(diagnosis)
    plan = moslora.plan({"model": "base-model", "adapter": {"r": 4}}, trainer={"max_length": 32})
    assert plan.length == 32 and "FSDP, 2" in repr(plan) and "\x1b" not in repr(plan)


def test_a_recipe_in_python_is_checked_as_a_file_is(here: Path) -> None:
    with pytest.raises(moslora.RecipeError, match=r"trainer\.lr"):
        moslora.plan({"model": "base-model"}, trainer={"lr": 1e-3})
    with pytest.raises(moslora.RecipeError, match="recipe is a int"):
        moslora.plan(7)  # type: ignore[arg-type]
    with pytest.raises(moslora.MoSLoRAError, match="does not exist"):
        moslora.plan("no-such.yaml")
    with pytest.raises(moslora.UsageError, match="progress"):
        moslora.inspect("my-adapter", progress="loud")
