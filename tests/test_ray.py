"""Cells on a local Ray cluster; skipped where Ray is not installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import tiny
from moslora.comparison.compare import compare
from moslora.display import Display
from moslora.errors import TrainingError
from tolerances import MODEL

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of its processes and ports


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 40)
    tiny.save_chat_data(folder / "heldout.jsonl", 6)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Workers read what the driver's environment says, this folder's modules among it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def run(world: Path, out: Path, **options: Any) -> dict[str, dict[str, Any]]:
    own = [
        f"model={world / 'base'}",
        f"data={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        "adapter.r=4",
        "trainer.max_steps=3",
        "trainer.per_device_train_batch_size=4",
    ]
    compare(own, Display(quiet=True), seeds=2, rates=[1e-2], validation=4, out=out, **options)
    files = (out / "cells").glob("*.json")
    return {file.stem: json.loads(file.read_text()) for file in files if file.stem != "base"}


def test_a_cluster_gives_the_numbers_of_one_process_and_goes_on_where_it_was(world, tmp_path):
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}))
    methods = ["lora", "moslora", str(own)]
    alone = run(world, tmp_path / "alone", methods=methods)
    out = tmp_path / "ray"
    beside = run(world, out, methods=methods, engine="ray", workers=2, together=2)
    assert beside.keys() == alone.keys() and len(beside) == 6
    for name, cell in beside.items():
        assert cell["test"] == pytest.approx(alone[name]["test"], rel=MODEL), name
        assert cell["together"] == (1 if name.startswith("mine") else 2)
    (out / "cells" / "lora_0.01_1.json").unlink()
    kept = (out / "cells" / "lora_0.01_0.json").stat().st_mtime_ns
    again = run(world, out, methods=methods, engine="ray")
    assert again["lora_0.01_1"]["test"] == pytest.approx(alone["lora_0.01_1"]["test"], rel=MODEL)
    assert (out / "cells" / "lora_0.01_0.json").stat().st_mtime_ns == kept
    assert not list((out / "cells").glob("*.started"))


def test_a_cell_in_which_workers_die_counts_as_crashed_and_the_others_are_whole(world, tmp_path, monkeypatch):
    import moslora.comparison.methods
    import ray_deadly

    monkeypatch.setitem(moslora.comparison.methods.METHODS, "moslora", ray_deadly.METHOD)
    found = run(world, tmp_path / "c", methods=["lora", "moslora"], engine="ray", together=2)
    assert {name: cell["status"] for name, cell in found.items()} == {
        "lora_0.01_0": "done",
        "lora_0.01_1": "done",
        "moslora_0.01_0": "done",
        "moslora_0.01_1": "crashed",
    }
    assert "died 2 times" in found["moslora_0.01_1"]["reason"]


def test_a_worker_that_finds_another_base_is_refused(world, tmp_path, monkeypatch):
    from moslora.tasks.text.task import TextTask

    hashes = TextTask.hashes  # of this process alone: the workers' have the true ones
    monkeypatch.setattr(TextTask, "hashes", lambda self: {**hashes(self), "base": "another"})
    with pytest.raises(TrainingError, match="another base"):
        run(world, tmp_path / "c", methods=["lora", "moslora"], engine="ray")
