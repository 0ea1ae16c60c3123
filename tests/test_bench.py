"""A bench: cells that leave no trace on the base, and answers that are each cell's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from moslora.comparison.bench import Bench
from moslora.comparison.cells import in_groups, prepare_task, run_unkept
from moslora.comparison.compare import _plan
from moslora.display import Display
from moslora.recipe.loading import load_recipe
from moslora.tasks.text.task import TextTask
from moslora.training.stop import StopRequest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    tiny.save_chat_data(folder / "heldout.jsonl", 6)

    def made() -> Bench:
        given = [f"model={folder}/base", f"data={folder}/train.jsonl", f"data.heldout={folder}/heldout.jsonl"]
        given += ["adapter.r=4", "trainer.max_steps=4", "trainer.per_device_train_batch_size=4"]
        given += ["task.metric=json", "task.generate_examples=3", "task.max_new_tokens=6"]
        plan = _plan(load_recipe(given), ["lora", "moslora"], 5, [3e-2], None, None, 4, None, folder / "c")
        display = Display(quiet=True)
        stop = StopRequest(display)
        return Bench(plan, prepare_task(plan, display, stop.check), display, stop)

    return made


def traces(model: Any) -> dict[str, Any]:
    """What could be left on a model, by the name of its module."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks") and value}
        found[name] = (type(module), sorted(own), hooks, module.training, sorted(vars(module)))
    found["flags"] = [(name, p.requires_grad, p.grad is None, id(p)) for name, p in model.named_parameters()]
    found["buffers"] = [(name, id(b)) for name, b in model.named_buffers()]
    found["configs"] = (model.config.to_dict(), model.generation_config.to_dict())
    return found


def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The answers of each cell that is measured from here on, by the cell's label."""
    found: dict[str, list[str]] = {}
    ask = TextTask.ask

    def asking(self: TextTask, model: Any, chosen: Any, label: str) -> Any:
        given = ask(self, model, chosen, label)
        found[label] = [answer.text for answer in given]
        return given

    monkeypatch.setattr(TextTask, "ask", asking)
    return found


def test_answers_of_cells_in_groups_of_two_two_and_one_are_those_of_each_cell_alone(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of a base that TRL had patched ran the base itself when it generated, without an adapter."""
    bench = make()
    before = traces(bench.model)
    base = bench.model
    cells = [cell for cell in bench.plan.cells if cell[0].name == "moslora"]
    groups = in_groups(bench.plan, cells, 2)
    assert [len(group) for group in groups] == [2, 2, 1]
    with monkeypatch.context() as patch:
        alone = answers(patch)
        single = {cell: bench.run(*cell) for cell in cells}
    assert traces(bench.model) == before and bench.model is base
    together = answers(monkeypatch)
    mixed = [cell for group in groups for cell in run_unkept(bench, group)]
    assert not bench.alone and [cell.together for cell in mixed] == [2, 2, 2, 2, 1]
    assert traces(bench.model) == before and bench.model is base
    assert together == alone and len(alone) == 5
    plain = bench.task.ask(bench.model, bench.task.asked, "the base")
    assert all(texts != [answer.text for answer in plain] for texts in alone.values())
    for cell in mixed:
        other = next(
            one
            for key, one in single.items()
            if (key[0].name, *key[1:]) == (cell.method, cell.learning_rate, cell.seed)
        )
        assert cell.correct == other.correct and cell.status == "done"
        assert cell.test == pytest.approx(other.test, rel=1e-3)


def test_a_cell_that_fails_leaves_no_trace_either(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    before, base = traces(bench.model), bench.model
    bars: list[str] = []
    progress = bench.display.progress

    class Watched:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __enter__(self) -> Any:
            bars.append("open")
            return self.inner.__enter__()

        def __exit__(self, *ended: Any) -> Any:
            bars.append("closed")
            return self.inner.__exit__(*ended)

    monkeypatch.setattr(bench.display, "progress", lambda *given: Watched(progress(*given)))
    original = torch.optim.AdamW.step

    def failing(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    cell = bench.run(*bench.plan.cells[0])
    assert cell.status == "crashed" and "out of memory" in str(cell.reason)
    assert traces(bench.model) == before and bench.model is base
    assert bars == ["open", "closed"]  # a bar that is left open hides the cursor and is in the next one's way
    monkeypatch.setattr(torch.optim.AdamW, "step", original)
    assert bench.run(*bench.plan.cells[0]).status == "done"


def test_many_cells_nest_nothing(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    monkeypatch.setattr(Bench, "_measure", lambda *_: None)
    monkeypatch.setattr("transformers.Trainer.train", lambda *_, **__: None)
    before = traces(bench.model)
    for _ in range(30):
        bench._train_and_measure(*bench.plan.cells[0])
    assert traces(bench.model) == before and "forward" not in vars(bench.model)
