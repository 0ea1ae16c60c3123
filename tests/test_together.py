from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from moslora.comparison.lanes import CannotShare, Surroundings
from moslora.comparison.methods import METHODS
from moslora.comparison.together import share_weights, train_together
from moslora.display import Display
from moslora.recipe.loading import load_recipe
from moslora.tasks.text.task import TextTask
from tolerances import MODEL, relative_error

pytestmark = pytest.mark.filterwarnings(
    # datasets forks a pool for nothing, TRL and accelerate use torch names that torch has renamed.
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)

STEPS = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    draw = random.Random(0)
    lines = []
    for index in range(40):
        words = " ".join("abcdefgh"[draw.randrange(8)] for _ in range(draw.randrange(1, 30)))
        lines.append(json.dumps({"prompt": f"say {words}", "completion": f" {index % 7} {words[:9]}"}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "heldout.jsonl").write_text("\n".join(lines[:4]).replace("say", "tell") + "\n")
    return folder


def prepare(world: Path, *more: str) -> TextTask:
    settings = {
        "model": world / "base",
        "data": world / "train.jsonl",
        "data.heldout": world / "heldout.jsonl",
        "adapter.r": 4,
        "adapter.lora_dropout": 0.2,
        "trainer.max_steps": STEPS,
        "trainer.per_device_train_batch_size": 3,
        "trainer.logging_steps": 1,
        "trainer.logging_nan_inf_filter": False,
        "trainer.save_strategy": "no",
        "trainer.report_to": "none",
        "trainer.max_grad_norm": 0.05,  # so low that it always clips
        "trainer.disable_tqdm": True,
    }
    arguments = {**{k: str(v) for k, v in settings.items()}, **dict(m.split("=", 1) for m in more)}
    recipe = load_recipe([f"{key}={value}" for key, value in arguments.items()])
    task = TextTask(recipe, Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    return task


Cell = tuple[str, float, int]


def make(task: TextTask, base: Any, cell: Cell, out: Path) -> Any:
    from transformers import PrinterCallback

    name, rate, seed = cell
    trainer = {**task.recipe.trainer, "learning_rate": rate, "seed": seed, "data_seed": seed}
    task.recipe = task.recipe.model_copy(update={"trainer": trainer, "seed": seed})
    method = METHODS[name]
    made = task.build_trainer(base, method.configure(task.recipe.adapter), out, [])
    made.remove_callback(PrinterCallback)
    if method.adjust is not None:
        method.adjust(made.model)
    return made


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def adapter(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def alone(task: TextTask, cells: list[Cell], out: Path) -> list[Any]:
    found = []
    for cell in cells:
        trainer = make(task, task.load(), cell, out)
        trainer.train()
        found.append(trainer)
    return found


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam divides a gradient by its own size, so that in float32 rounding alone would show after a few steps."""
    load = TextTask.load
    monkeypatch.setattr(TextTask, "load", lambda self: load(self).double())


def together(task: TextTask, cells: list[Cell], out: Path) -> list[Any]:
    base = task.load()
    trainers, surroundings = [], []
    for cell in cells:
        trainers.append(make(task, share_weights(base), cell, out))
        surroundings.append(Surroundings.now())
    errors = train_together(base, trainers, surroundings)
    assert errors == [None] * len(cells)
    return trainers


def check_same(ones: list[Any], others: list[Any]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert losses(one) == pytest.approx(losses(other), rel=MODEL)
        assert len(losses(one)) == STEPS
        assert relative_error(adapter(one), adapter(other)) < MODEL


CELLS: list[Cell] = [
    ("lora", 1e-2, 0),
    ("moslora", 3e-3, 1),
    ("lora-matched", 2e-2, 2),
    ("dora", 5e-3, 0),
]


@pytest.mark.parametrize(
    "more",
    [
        ("trainer.padding_free=true",),
        ("trainer.padding_free=false", "trainer.gradient_accumulation_steps=2", "adapter.lora_dropout=0"),
    ],
    ids=["end to end", "padded, accumulated"],
)
def test_every_cell_trains_as_it_does_alone(world, tmp_path, in_float64, more):
    """Other methods, rates, seeds and row lengths beside it change nothing but the order of sums."""
    task = prepare(world, *more)
    check_same(together(task, CELLS, tmp_path), alone(task, CELLS, tmp_path))


def test_a_cell_that_diverges_leaves_the_others_alone(world, tmp_path, in_float64):
    task = prepare(world, "trainer.max_grad_norm=0", "trainer.padding_free=true")
    cells: list[Cell] = [("lora", 1e-2, 0), ("moslora", 1e30, 1), ("moslora", 1e-2, 2)]
    beside = together(task, cells, tmp_path)
    assert not all(map(math.isfinite, losses(beside[1])))
    ones = alone(task, [cells[0], cells[2]], tmp_path)
    check_same([beside[0], beside[2]], ones)


def test_in_float32_losses_stay_within_rounding(world, tmp_path):
    task = prepare(world, "trainer.max_steps=4")
    for one, other in zip(together(task, CELLS[:3], tmp_path), alone(task, CELLS[:3], tmp_path), strict=True):
        assert losses(one) == pytest.approx(losses(other), rel=MODEL)


def test_a_cell_whose_trainer_fails_leaves_the_others_alone(world, tmp_path, in_float64):
    task = prepare(world)
    base = task.load()
    trainers, surroundings = [], []
    for cell in CELLS[:3]:
        trainers.append(make(task, share_weights(base), cell, tmp_path))
        surroundings.append(Surroundings.now())
    step = trainers[1].create_optimizer

    def failing(*_: Any) -> Any:
        step()
        failing_step = trainers[1].optimizer.step
        calls = []

        def fail(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 5:
                raise ArithmeticError("as if")
            return failing_step(*args, **kwargs)

        trainers[1].optimizer.step = fail
        return trainers[1].optimizer

    trainers[1].create_optimizer = failing
    errors = train_together(base, trainers, surroundings)
    assert [type(error) for error in errors] == [type(None), ArithmeticError, type(None)]
    check_same([trainers[0], trainers[2]], alone(task, [CELLS[0], CELLS[2]], tmp_path))


def test_the_base_and_the_random_state_are_what_they_were(world, tmp_path):
    task = prepare(world, "trainer.max_steps=2")
    base = task.load()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    kinds = [type(module) for module in base.modules()]
    trainers, surroundings = [], []
    for cell in CELLS[:2]:
        trainers.append(make(task, share_weights(base), cell, tmp_path))
        surroundings.append(Surroundings.now())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    train_together(base, trainers, surroundings)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in base.modules()] == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    # What was trained is an ordinary model again, on the base's own tensors.
    own = trainers[1].model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(own.base_layer) is torch.nn.Linear
    assert own.base_layer.weight is base.model.layers[0].self_attn.q_proj.weight


def refused(task: TextTask, cells: list[Cell], out: Path, base: Any = None) -> str:
    base = task.load() if base is None else base
    trainers, surroundings = [], []
    for cell in cells:
        trainers.append(make(task, share_weights(base), cell, out))
        surroundings.append(Surroundings.now())
    with pytest.raises(CannotShare) as said:
        train_together(base, trainers, surroundings)
    return str(said.value)


def test_what_would_not_be_the_cell_alone_is_refused(world, tmp_path):
    task = prepare(world, "adapter.bias=all")
    base = task.load()
    base.model.norm.bias = torch.nn.Parameter(torch.zeros(32))
    assert "weights of the base" in refused(task, CELLS[:2], tmp_path, base)
    task = prepare(world, "trainer.gradient_checkpointing=true")
    assert "checkpointing" in refused(task, CELLS[:2], tmp_path)
    task = prepare(world)
    base = task.load()
    base.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "longest row" in refused(task, CELLS[:2], tmp_path, base)
    # The base draws random numbers of its own, which no stream of a cell can give to its rows alone.
    task = prepare(world)
    base = task.load()
    base.config.attention_dropout = 0.5
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert "random numbers" in refused(task, CELLS[:2], tmp_path, base)
    # Rows are not independent.
    task = prepare(world)
    base = task.load()
    base.model.layers[0].register_forward_hook(lambda _, __, out: out + out.mean(dim=(0, 1)))
    assert "in the first step" in refused(task, CELLS[:2], tmp_path, base)


def test_experts_that_see_no_rows_are_refused(world, tmp_path):
    task = prepare(world)
    base = task.load()

    class Flat(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.flatten(0, 1)).view(x.shape)

    base.model.layers[1].mlp = Flat(base.model.layers[1].mlp)
    assert "whole rows" in refused(task, CELLS[:2], tmp_path, base)


def test_a_model_whose_forward_was_replaced_is_not_copied(world):
    """A copy would run the original's layers, and leave its own adapters out."""
    base = prepare(world).load()
    mlp = base.model.layers[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x)
    with pytest.raises(CannotShare, match="replaced"):
        share_weights(base)
