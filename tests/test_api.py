"""The Python API: objects in, typed results out, and nothing of the caller's is changed."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import json
import os
import re
import signal
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

import moslora
import tiny
from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import native
from moslora.data.writing import write_rows
from moslora.display import Display, Printable


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


AT_REST = ["export", "import_adapter", "combine", "merge", "inspect", "doctor", "push", "plan"]
VERBS = [
    *AT_REST,
    "train",
    "check",
    "resume",
    "mix",
    "evaluate",
    "compare",
    "check_comparison",
    "report",
    "advise",
    "chat",
]


@pytest.mark.parametrize("name", VERBS)
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


DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = (DOCS / "reference.md").read_text(encoding="utf-8")
PAGES = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("advise.md", "chat.md"))
BLOCKS = re.findall(r"^```python\n(.*?)^```", REFERENCE + PAGES, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_reference_runs_as_it_stands(block: str, here: Path) -> None:
    exec(compile(block, "docs/reference.md", "exec"), {"__name__": "__main__"})


def test_the_reference_documents_every_function_and_result() -> None:
    for name in VERBS:
        assert f"::: {getattr(moslora, name).__module__}.{name}\n" in REFERENCE


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


# --- Training -----------------------------------------------------------------------------------------------

QUICK = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 1}


def rows(count: int = 24, word: str = "say") -> list[dict[str, str]]:
    return [{"prompt": f"{word} {n % 5} {n}", "completion": f"{n % 5}"} for n in range(count)]


def state_of(model: torch.nn.Module) -> dict[str, object]:
    """All that a model is, but for what its weights are."""
    return {
        name: (
            type(module),
            module.training,
            sorted(vars(module)),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            [(key, p.requires_grad, p.dtype, p.grad) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    } | {"config": model.config.to_dict(), "generation": model.generation_config.to_dict()}


class Counter(TrainerCallback):  # type: ignore[misc]
    steps = 0

    def on_step_end(self, *arguments: object, **_: object) -> None:
        self.steps += 1


def right(answer: str, reference: str) -> bool:
    return answer == reference


def closeness(answer: str, reference: str) -> float:
    return 1 / (1 + abs(len(answer) - len(reference)))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_model_that_is_handed_over_is_afterwards_as_it_was(here: Path, bias: str) -> None:
    settings = {"vocab_size": 259, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 2}
    model = tiny.llama(3, attention_bias=True, **settings).train()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    ids = tiny.tokens()
    with torch.no_grad():
        logits, weights, state = model(ids).logits, copy.deepcopy(model.state_dict()), state_of(model)
    counter = Counter()
    run = moslora.train(
        model=model,
        tokenizer=tiny.tokenizer(),
        data=rows(),
        heldout=datasets.Dataset.from_list(rows(6, "tell")),
        adapter=moslora.MoSLoRAConfig(r=4, target_modules="all-linear", bias=bias, mixer="orthogonal"),
        trainer={**QUICK, "gradient_checkpointing": True, "learning_rate": 1e-2},
        task={"max_new_tokens": 4},
        output=here / "runs" / "objects",
        callbacks=[counter],
        metrics={"right": right, "closeness": closeness},
        seed=1,
    )
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in now)
    assert state_of(model) == state
    handle.remove()
    before = len(seen)
    model(ids)
    assert len(seen) == before, "the handle of a hook of the caller's still removes it"
    assert counter.steps == 2 and run.path == here / "runs" / "objects"
    assert run.metrics["before"].keys() == {"loss", "right", "closeness"} == run.metrics["after"].keys()
    assert run.metrics["intervals"]["after"].keys() == {"right"}
    assert all(proof["passed"] for proof in run.proofs.values())
    assert (run.path / "base" / "model.safetensors").exists() and (run.path / "tokenizer").is_dir()
    assert [line["step"] for line in run.history][:2] == [1, 2]
    assert {"prompt", "reference", "base", "tuned"} <= run.answers[0].keys() and len(run.answers) == 6
    assert "base" in repr(run) and "Proven" in repr(run) and str(run.report) in repr(run)
    assert run.report.exists() and run.adapter.is_dir() and run.to_dict()["status"] == "completed"
    recipe = (run.path / "recipe.yaml").read_text()
    assert "orthogonal" in recipe and str(run.path / "data" / "train.jsonl") in recipe


def test_a_model_of_a_folder_is_named_and_not_saved_again(here: Path) -> None:
    model = LlamaForCausalLM.from_pretrained("base-model")
    run = moslora.train(
        model=model, data=rows(), trainer=QUICK, output="runs/named", progress=Display(io.StringIO())
    )
    assert not (run.path / "base").exists() and not (run.path / "tokenizer").exists()
    assert f"name: {(here / 'base-model').absolute()}" in (run.path / "recipe.yaml").read_text()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    again = moslora.train(model=model, data=rows(), trainer=QUICK, output="runs/changed")
    assert (again.path / "base").is_dir(), "its weights are no longer the folder's"
    assert again.proofs["reload"]["passed"]


def test_an_interrupted_run_of_objects_is_resumed(here: Path) -> None:
    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: object, **_: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    model = tiny.llama(3, vocab_size=259, max_position_embeddings=256, bos_token_id=None)
    given = {"model": model, "tokenizer": tiny.tokenizer(), "data": rows(), "trainer": QUICK}
    with pytest.raises(moslora.Stopped):
        moslora.train(**given, callbacks=[Stop()], output="runs/stopped")
    assert not hasattr(model, "peft_config")
    run = moslora.resume("runs/stopped", metrics=None)
    assert run.record["status"] == "completed" and run.proofs["reload"]["passed"]
    with pytest.raises(moslora.UsageError, match="nothing is left"):
        moslora.resume(run.path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": []}, "empty"),
        ({"data": [{"prompt": "a"}] * 3}, "completion"),
        ({"data": [{"prompt": "a", "completion": object()}]}, "row 1"),
        ({"data": [7]}, "row 1: is a int"),
        ({"data": 7}, "data is a int"),
        ({"adapter": object()}, "MoSLoRAConfig"),
        ({"adapter": moslora.MoSLoRAConfig(mixer=torch.eye(8))}, "mixer"),
        ({"callbacks": [print]}, "TrainerCallback"),
        ({"metrics": {"right": 1}}, "metrics"),
        ({"metrics": {"loss": right}}, "measured already"),
        ({"metrics": {"text": lambda answer, reference: answer}}, "return a bool"),
        ({"model": torch.nn.Linear(2, 2)}, "from_pretrained"),
        ({"model": tiny.llama(vocab_size=259)}, "tokenizer"),
        ({"tokenizer": tiny.tokenizer(), "processor": tiny.tokenizer()}, "both"),
        ({"trainer": {"lr": 1}}, r"trainer\.learning_rate"),
        ({"task": "image"}, "task=image takes paths"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # objects have other names in every process
)
def test_what_cannot_be_used_leaves_no_run_directory(
    here: Path, given: dict[str, object], message: str
) -> None:
    usable = {"model": "base-model", "data": rows(), "trainer": QUICK, "output": "runs/none"}
    with pytest.raises(moslora.MoSLoRAError, match=message):
        moslora.train(**{**usable, **given})  # type: ignore[arg-type]
    assert not Path("runs").exists()


@pytest.mark.filterwarnings("ignore:The adapter changes the base's logits by no more than rounding")
def test_a_section_over_a_recipe_and_shorthands(here: Path) -> None:
    Path("recipe.yaml").write_text(
        "model: base-model\ndata: data.jsonl\ntrainer: {max_steps: 50, logging_steps: 1}\n"
    )
    run = moslora.train(
        "recipe.yaml",
        trainer={"max_steps": 2, "learning_rate": 1e-2},
        adapter={"r": 2},
        output="runs/merged",
        seed=3,
    )
    trainer = run.record["trainer"]
    assert trainer["max_steps"] == 2 and trainer["logging_steps"] == 1 and run.record["seed"] == 3
    assert moslora.inspect(run.adapter).modules[0].rank == 2


def test_pictures_of_rows_become_files(tmp_path: Path) -> None:
    from PIL import Image

    row = {"images": [Image.new("RGB", (4, 4), "red")], "n": numpy.int64(3), "x": numpy.ones(2)}
    write_rows([row, row], tmp_path / "data" / "rows.jsonl", "data")
    lines = [json.loads(line) for line in (tmp_path / "data" / "rows.jsonl").read_text().splitlines()]
    assert lines[0] == lines[1] and lines[0]["n"] == 3 and lines[0]["x"] == [1.0, 1.0]
    assert Image.open(lines[0]["images"][0]).getpixel((0, 0)) == (255, 0, 0)
    assert len(list((tmp_path / "data" / "pictures").iterdir())) == 1


# --- Judging ------------------------------------------------------------------------------------------------


def test_a_model_is_evaluated_with_rows_and_metrics_and_is_as_before(here: Path) -> None:
    model = tiny.llama(3, vocab_size=259, max_position_embeddings=256, bos_token_id=None)
    state = state_of(model)
    report = moslora.evaluate(
        model,
        tiny.tokenizer(),
        rows(6),
        adapter=here / "my-adapter",
        metrics={"right": right, "closeness": closeness},
        task={"max_new_tokens": 4},
        predictions="items.jsonl",
    )
    assert state_of(model) == state
    names = ["loss", "right", "closeness", "loss_general", "kl_general"]
    assert [measure.name for measure in report.measures] == names
    assert report["loss"].difference is not None and report["right"].base_interval is not None
    assert "the adapter is active in 4 modules" in repr(report) and "LlamaForCausalLM" in repr(report)
    assert len(Path("items.jsonl").read_text().splitlines()) == 6
    with pytest.raises(moslora.UsageError, match="Nothing to evaluate"):
        moslora.evaluate(model)
    with pytest.raises(moslora.ExistsError, match="exists already"):
        moslora.evaluate(model, tiny.tokenizer(), rows(6), predictions="items.jsonl")
    with pytest.raises(KeyError, match="was not measured"):
        report["none"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": {"data": "data.jsonl"}}, "recipe would not be used"),
        ({"task": {"metric": "json"}}, "task would not be used"),
        ({"data": [{"prompt": "a"}]}, "folder of their data"),
    ],
    ids=["recipe", "section", "rows"],
)
def test_published_tasks_refuse_what_they_would_ignore(
    here: Path, given: dict[str, object], message: str
) -> None:
    with pytest.raises(moslora.UsageError, match=message):
        moslora.evaluate("base-model", tasks=["boolq"], **given)


def test_a_comparison_of_rows_goes_on_with_the_same_call(here: Path) -> None:
    model = LlamaForCausalLM.from_pretrained("base-model")
    given = {"model": model, "data": rows(), "heldout": rows(6, "tell"), "out": "runs/comparison"}
    settings = {"seeds": 2, "learning_rates": [1e-2], "steps": 2, "validation": 4, "adapter": {"r": 2}}
    result = moslora.compare(**given, **settings)
    assert result.report.exists() and result.results.exists()
    assert "lora" in repr(result) and str(result.report) in repr(result)
    shown = io.StringIO()
    again = moslora.compare(**given, **settings, progress=Display(shown))
    assert again.verdict == result.verdict and "Continuing" in shown.getvalue()
    with pytest.raises(moslora.UsageError, match="holds a comparison with other"):
        moslora.compare(**{**given, "data": rows(23)}, **settings)
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(moslora.UsageError, match="No folder holds"):
        moslora.compare(**given, **settings)


@pytest.mark.filterwarnings("ignore:The adapter changes the base's logits by no more than rounding")
def test_a_vision_model_is_handed_over_with_its_processor_and_pictures(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    import tiny_vision

    tiny_vision.save_llava(tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    state = state_of(model)
    pictures = [Image.new("RGB", (16, 16), (n * 9, 0, 0)) for n in range(12)]
    examples = [
        {
            "images": [picture],
            "messages": [
                {"role": "user", "content": "<image>\nred?"},
                {"role": "assistant", "content": str(n % 2)},
            ],
        }
        for n, picture in enumerate(pictures)
    ]
    run = moslora.train(
        task={"kind": "vision", "max_new_tokens": 2},
        model=model,
        processor=AutoProcessor.from_pretrained(tmp_path / "llava"),
        data=examples[:8],
        heldout=examples[8:],
        adapter={"r": 2},
        trainer=QUICK,
        output=tmp_path / "runs" / "vision",
    )
    assert state_of(model) == state and run.proofs["reload"]["passed"]
    assert len(list((run.path / "data" / "pictures").iterdir())) == 12
