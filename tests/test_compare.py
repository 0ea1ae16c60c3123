from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moslora.comparison.compare
import moslora.comparison.methods
import tiny
from moslora.comparison.bench import Bench
from moslora.comparison.cells import in_groups, prepare_task
from moslora.comparison.compare import compare
from moslora.comparison.methods import METHODS, default_methods, find_method
from moslora.comparison.verdict import Verdict
from moslora.display import Display
from moslora.errors import Stopped
from moslora.recipe.loading import load_recipe
from moslora.reports.again import remake_report
from moslora.tuner.config import MoSLoRAConfig
from tolerances import MODEL

pytestmark = pytest.mark.filterwarnings(
    # datasets forks a pool for nothing, TRL and accelerate use torch names that torch has renamed.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 40)
    tiny.save_chat_data(folder / "heldout.jsonl", 6)
    return folder


def arguments(world: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "model": world / "base",
        "data": world / "train.jsonl",
        "data.heldout": world / "heldout.jsonl",
        "adapter.r": 4,
        "trainer.max_steps": 3,
        "trainer.per_device_train_batch_size": 4,
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def run(world: Path, out: Path, **options: Any) -> tuple[Path, Verdict]:
    settings: dict[str, Any] = {
        "methods": ["lora", "moslora"],
        "seeds": 2,
        "rates": [1e-3, 1e-2],
        "validation": 4,
        "out": out,
        **options,
    }
    own = settings.pop("arguments", arguments(world))
    folder, verdict = compare(own, Display(quiet=True), **settings)
    assert verdict is not None
    return folder, verdict


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    files = (folder / "cells").glob("*.json")
    return {f.stem: json.loads(f.read_text()) for f in files if f.stem != "base"}


def test_without_methods_it_takes_lora_and_the_default_mixer_or_what_the_folder_began_with(
    world: Path, tmp_path: Path
) -> None:
    short = arguments(world, **{"trainer.max_steps": 1})
    folder, verdict = run(world, tmp_path / "new", methods=None, arguments=short, rates=[1e-2])
    assert [m.name for m in verdict.methods] == ["lora", "moslora-orthogonal"]
    assert find_method("moslora-orthogonal").configure({}).mixer == MoSLoRAConfig().mixer  # type: ignore[union-attr]
    begun = json.loads((folder / "compare.json").read_text())["identity"]["methods"]
    old = {"lora": begun["lora"], "moslora": begun["moslora-orthogonal"]}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "compare.json").write_text(json.dumps({"identity": {"methods": old}}))
    assert tuple(default_methods(tmp_path / "old")) == ("lora", "moslora")
    assert tuple(default_methods(folder)) == ("lora", "moslora-orthogonal")
    (tmp_path / "old" / "compare.json").write_text("[]")
    assert tuple(default_methods(tmp_path / "old")) == ("lora", "moslora-orthogonal")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """The cells that are run from here on."""
    ran: list[tuple[str, float, int]] = []
    original = Bench.run

    def spy(self: Bench, method: Any, rate: float, seed: int) -> Any:
        ran.append((method.name, rate, seed))
        return original(self, method, rate, seed)

    monkeypatch.setattr(Bench, "run", spy)
    return ran


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    return run(world, tmp_path_factory.mktemp("runs") / "c", methods=["lora", "pissa", "moslora", "full"])


def test_a_comparison_leaves_every_cell_a_verdict_and_a_page(finished):
    folder, verdict = finished
    found = cells(folder)
    assert len(found) == 4 * 2 * 2 and {c["status"] for c in found.values()} == {"done"}
    assert [m.name for m in verdict.methods] == ["lora", "pissa", "moslora", "full"]
    assert [c.method for c in verdict.contrasts] == ["pissa", "moslora", "full"]
    assert json.loads((folder / "results.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(verdict))
    )
    page = (folder / "report.html").read_text()
    assert verdict.sentences[0].split(",")[0] in page and page.count("<svg") == 4  # the last is the price
    assert not re.search(r'(?:src|href)="?(?:https?:)?//', page)
    assert not list((folder / "cells").glob("*.started"))
    (folder / "report.html").unlink()
    assert remake_report(folder).read_text() == page


def test_trained_parameters_are_those_of_the_method(finished, world):
    _, verdict = finished
    lora, _, moslora, full = (m.trainable_parameters for m in verdict.methods)
    modules = 2 * 7
    assert lora is not None and moslora == lora + modules * 4 * 4
    assert full == sum(p.numel() for p in tiny.llama(vocab_size=259).parameters())


def test_a_finished_comparison_runs_nothing_again_and_says_the_same(finished, world, monkeypatch):
    folder, verdict = finished
    ran = counted(monkeypatch)
    again = run(world, folder, methods=["lora", "pissa", "moslora", "full"])[1]
    assert ran == [] and again == verdict


def test_a_cell_alone_gives_what_it_gave_after_others(finished, world, tmp_path, monkeypatch):
    """So adapters leave nothing behind, and the order of cells does not count."""
    folder, _ = finished
    alone, _ = run(world, tmp_path / "c", methods=["moslora", "lora"], rates=[1e-2])
    before, after = cells(folder), cells(alone)
    for name in ("moslora_0.01_0", "lora_0.01_1"):
        for key in ("validation", "test", "train_loss"):
            assert before[name][key] == after[name][key], (name, key)


def test_a_stopped_comparison_goes_on_and_runs_no_cell_twice(world, tmp_path, monkeypatch):
    original = Bench.run
    ran: list[tuple[str, float, int]] = []

    def stopping(self: Bench, method: Any, rate: float, seed: int) -> Any:
        if len(ran) == 2:
            raise Stopped(2)
        ran.append((method.name, rate, seed))
        return original(self, method, rate, seed)

    monkeypatch.setattr(Bench, "run", stopping)
    with pytest.raises(Stopped):
        run(world, tmp_path / "c", rates=[1e-3])
    monkeypatch.setattr(Bench, "run", original)
    later = counted(monkeypatch)
    folder, _ = run(world, tmp_path / "c", rates=[1e-3])
    assert len(ran) == 2 and len(later) == 2 and not set(ran) & set(later)
    assert len(cells(folder)) == 4


@pytest.mark.parametrize("together", [1, 2])
def test_crashed_and_diverged_cells_are_shown_and_the_base_is_whole_after_them(
    world, tmp_path, monkeypatch, together
):
    original = moslora.comparison.methods.Method.configure

    def configure(self: Any, adapter: Any) -> Any:
        config = original(self, adapter)
        if self.name == "dora" and armed:
            config.target_modules = {"no_such_module"}
        return config

    armed: list[int] = []
    monkeypatch.setattr(moslora.comparison.methods.Method, "configure", configure)

    def poison(model: Any) -> None:
        armed.append(1)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))

    poisoned = dataclasses.replace(METHODS["frozen-mixer"], adjust=poison)
    monkeypatch.setitem(METHODS, "frozen-mixer", poisoned)
    folder, verdict = run(
        world, tmp_path / "c", methods=["lora", "frozen-mixer", "dora"], rates=[1e-3], together=together
    )
    states = {name: c["status"] for name, c in cells(folder).items()}
    assert states == {
        f"{m}_0.001_{s}": state
        for m, state in (("lora", "done"), ("frozen-mixer", "diverged"), ("dora", "crashed"))
        for s in (0, 1)
    }
    assert not verdict.complete and len(verdict.sentences) == 2
    page = (folder / "report.html").read_text()
    assert "no_such_module" in page and "NaN" in page


def test_a_cell_in_which_the_process_died_again_and_again_counts_as_crashed(finished, world, tmp_path):
    out = tmp_path / "c"
    run(world, out, rates=[1e-3])
    file = out / "cells" / "moslora_0.001_1.json"
    file.unlink()
    file.with_suffix(".started").write_text("2")
    _, verdict = run(world, out, rates=[1e-3])
    assert json.loads(file.read_text())["status"] == "crashed"
    assert verdict.methods[1].crashed == 1 and verdict.methods[1].score is None


def test_a_folder_with_another_comparison_is_refused(finished, world):
    folder, _ = finished
    with pytest.raises(ValueError, match="other methods"):
        run(world, folder, methods=["lora", "dora"])
    with pytest.raises(ValueError, match="recipe"):
        run(
            world,
            folder,
            methods=["lora", "pissa", "moslora", "full"],
            arguments=arguments(world, seed=0, **{"adapter.r": 8}),
        )
    with pytest.raises(ValueError, match="not a comparison"):
        run(world, folder / "cells")


def test_a_comparison_from_before_a_key_was_there_goes_on(finished, world, tmp_path):
    folder, _ = finished
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    record = json.loads((older / "compare.json").read_text())
    assert record["identity"]["recipe"]["model"].pop("tokenizer") is None
    (older / "compare.json").write_text(json.dumps(record))
    methods = ["lora", "pissa", "moslora", "full"]
    assert run(world, older, methods=methods)[1] is not None
    record["identity"]["recipe"]["model"]["tokenizer"] = "another"
    (older / "compare.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="other recipe"):
        run(world, older, methods=methods)


def test_a_comparison_from_before_costs_were_measured_goes_on_without_them(world, tmp_path, finished):
    folder, _ = finished
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    record = json.loads((older / "compare.json").read_text())
    del record["identity"]["recipe"]["evaluation"], record["identity"]["also"]
    (older / "compare.json").write_text(json.dumps(record))
    for cell in (older / "cells").glob("*.json"):
        kept = json.loads(cell.read_text())
        kept.pop("also", None)
        cell.write_text(json.dumps(kept))
    verdict = run(world, older, methods=["lora", "pissa", "moslora", "full"])[1]
    assert not verdict.costs and verdict.contrasts
    with pytest.raises(ValueError, match="other recipe"):
        asked = arguments(world, seed=0, **{"evaluation.also": f"[{world / 'heldout.jsonl'}]"})
        run(world, older, methods=["lora", "pissa", "moslora", "full"], arguments=asked)


def test_methods_start_where_they_should(world, tmp_path):
    """LoRA and MoSLoRA draw one A for a seed; the matched LoRA has it at the scale that M gives it."""
    from peft import get_peft_model

    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "mixer": "orthogonal"}
    models: dict[str, Any] = {}
    for name in ("lora", "moslora", "frozen-mixer", "lora-matched", "rslora", "two-subspace", "dora"):
        torch.manual_seed(3)
        base = tiny.llama()
        torch.manual_seed(7)
        models[name] = get_peft_model(base, METHODS[name].configure(adapter))
        if METHODS[name].adjust is not None:
            METHODS[name].adjust(models[name])

    def layer(name: str) -> Any:
        return models[name].base_model.model.model.layers[1].self_attn.q_proj

    A, M, _, scale = layer("moslora").factors("default")
    assert torch.equal(layer("lora").lora_A["default"].weight, A)
    assert torch.equal(layer("frozen-mixer").factors("default")[1], M)
    assert not layer("frozen-mixer").moslora_M["default"].weight.requires_grad
    matched = layer("lora-matched").factors("default")
    assert torch.equal(matched[1], torch.eye(4))
    torch.testing.assert_close(matched[0], A * (M @ A).norm() / A.norm())
    assert scale == layer("lora").scaling["default"] == 2
    assert layer("rslora").scaling["default"] == 4
    counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    assert counts["lora"] == counts["lora-matched"] == counts["frozen-mixer"] == counts["two-subspace"]
    assert counts["lora"] < counts["moslora"] < counts["dora"]


def test_a_users_own_configuration_is_a_method(tmp_path):
    folder = tmp_path / "mine"
    METHODS["rslora"].configure({"r": 3, "target_modules": ["q_proj"]}).save_pretrained(folder)
    method = find_method(str(folder))
    assert method.name == "mine" and method.configure({"r": 99}).r == 3
    assert method.configure({}).use_rslora and not method.configure({}).inference_mode
    written = tmp_path / "vera.yaml"
    written.write_text("peft_type: VERA\nr: 8\ntarget_modules: [q_proj]\n")
    assert find_method(str(written)).configure({}).peft_type == "VERA"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ["lora", "mslora"]}, "Did you mean 'moslora'"),
        ({"methods": ["lora", "lora"]}, "none of them twice"),
        ({"methods": ["lora"]}, "at least two"),
        ({"baseline": "dora"}, "none of the methods"),
        ({"seeds": 1}, "no noise between seeds"),
        ({"rates": [1e-3, -1.0]}, "positive"),
        ({"rates": [1e-3, 1e-3]}, "different"),
        ({"workers": 0}, "at least 1"),
        ({"together": 0}, "at least 1"),
        ({"engine": "rey"}, "choose one of local, ray"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(world, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        run(world, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_no_example_serves_two_purposes(world, tmp_path):
    plan = moslora.comparison.compare._plan(
        load_recipe(arguments(world)), ["lora", "moslora"], 2, [1e-3], None, None, 8, 4, tmp_path / "c"
    )
    task = prepare_task(plan, Display(quiet=True), lambda: None)
    train, validation = ({e.place for e in part} for part in (task.train_set, task.validation_set))
    assert validation and not train & validation and len(task.heldout_set) == 4


def test_exact_match_is_measured_where_the_recipe_has_a_metric(world, tmp_path):
    own = arguments(world, **{"task.metric": "json", "task.max_new_tokens": 4, "task.generate_examples": 3})
    folder, verdict = run(world, tmp_path / "c", rates=[1e-3], arguments=own)
    assert all(len(c["correct"]) == 3 for c in cells(folder).values())
    assert [c.measure for c in verdict.contrasts] == ["loss", "exact_match"]


def test_a_dry_run_leaves_nothing(world, tmp_path):
    _, verdict = compare(
        arguments(world), Display(quiet=True), out=tmp_path / "c", validation=4, plan_only=True
    )
    assert verdict is None and not (tmp_path / "c").exists()


def test_workers_give_the_numbers_of_a_single_process(finished, world, tmp_path):
    folder, _ = finished
    shared, _ = run(world, tmp_path / "c", methods=["lora", "moslora"], rates=[1e-2], workers=2)
    alone, beside = cells(folder), cells(shared)
    assert len(beside) == 4
    for name, cell in beside.items():
        # Each worker has a share of the threads, so sums may be taken in another order.
        assert cell["test"] == pytest.approx(alone[name]["test"], rel=MODEL), name


def test_cells_trained_together_give_the_numbers_of_cells_alone(finished, world, tmp_path):
    folder, _ = finished
    methods = ["lora", "pissa", "moslora", "full"]
    shared, verdict = run(world, tmp_path / "c", methods=methods, together=3)
    alone, beside = cells(folder), cells(shared)
    assert beside.keys() == alone.keys()
    for name, cell in beside.items():
        assert cell["test"] == pytest.approx(alone[name]["test"], rel=MODEL), name
        assert cell["train_loss"] == pytest.approx(alone[name]["train_loss"], rel=MODEL), name
        # Two by two, for four at most three at once; these two change the base.
        assert cell["together"] == (1 if name.startswith(("pissa", "full")) else 2)
    assert any("trained 1 to 2 at a time" in caution for caution in verdict.cautions)


def test_cells_that_cannot_share_a_base_run_alone_and_it_is_said(finished, world, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr("moslora.comparison.joint_batch.KNOWN_INPUTS", {"input_ids"})
    monkeypatch.setattr("moslora.comparison.joint_batch.BOUNDARIES", set())
    stream = io.StringIO()
    settings = {"methods": ["lora", "moslora"], "seeds": 2, "rates": [1e-2], "validation": 4, "together": 2}
    compare(arguments(world), Display(stream), out=tmp_path / "c", **settings)
    alone, beside = cells(folder), cells(tmp_path / "c")
    assert stream.getvalue().count("one after the other") == 2
    for name, cell in beside.items():
        assert cell["test"] == alone[name]["test"] and cell["together"] == 1


def test_groups_are_of_one_method_alike_in_size_and_without_cells_in_which_a_process_died(world, tmp_path):
    plan = moslora.comparison.compare._plan(
        load_recipe(arguments(world)),
        ["lora", "full", "moslora"],
        5,
        [1e-3],
        None,
        None,
        8,
        4,
        tmp_path / "c",
    )
    (tmp_path / "c" / "cells").mkdir(parents=True)
    plan.mark(plan.cells[1]).write_text("1")
    groups = in_groups(plan, plan.cells, 3)
    found = [(group[0][0].name, [seed for _, _, seed in group]) for group in groups]
    assert all(len({method.name for method, _, _ in group}) == 1 for group in groups)
    assert found == [
        ("lora", [0, 2]),
        ("lora", [3, 4]),
        ("lora", [1]),
        *(("full", [seed]) for seed in range(5)),
        ("moslora", [0, 1, 2]),
        ("moslora", [3, 4]),
    ]


def test_the_command_prints_the_verdict_as_json_and_says_1_where_a_method_has_no_result(
    world, tmp_path, monkeypatch
):
    from typer.testing import CliRunner

    from moslora.cli import app

    monkeypatch.setattr("sys.argv", ["moslora", "compare"])
    out = tmp_path / "c"
    options = ["--seeds", "2", "--learning-rates", "1e-3", "--validation", "4", "--out", str(out), "--json"]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["no_such_module"]}))
    call = ["compare", *arguments(world), *options, "--methods"]
    done = CliRunner().invoke(app, [*call, f"lora,{bad}"])
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["methods"][1]["crashed"] == 2 and not result["complete"]
    again = CliRunner().invoke(app, [*call, "lora,dora"])
    assert again.exit_code == 2 and "other methods" in again.stderr
