"""What does a short run of the demo cost on text that it is not about, and what does measuring that take?

Trains recipes/demo.yaml for a few steps, or takes a run that is there, and writes its held-out loss, its loss and KL
from the base on the general set, and the processor time of measuring them beside that of a training step's two passes.

    python benchmarks/price.py [--steps N] [--run DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model

from moslora.display import Display
from moslora.recipe.loading import load_recipe
from moslora.tasks import find_task
from moslora.training.provenance import collect_hardware, collect_versions
from moslora.training.run import train
from moslora.training.run_directory import RunDirectory

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "recipes" / "demo.yaml"
ROWS = 4  # of a training step, as the recipe has it


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the processor time of this process's threads that something takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def costs() -> dict[str, float]:
    """Measure the processor time of the measurement, and of a step's forward and backward pass."""
    torch.set_num_threads(1)
    task: Any = find_task("text")(load_recipe([str(DEMO)]), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model = task.load()
    adapted = get_peft_model(model, task.adapter_config(model))
    measuring = cpu_seconds(lambda: task.measure_also(adapted))
    _, batch = next(iter(task.batches(task.train_set[:ROWS])))

    def step() -> None:
        adapted(**batch).loss.backward()

    adapted.train()
    step()
    return {"measuring": measuring, "forward_and_backward": median(cpu_seconds(step) for _ in range(3))}


def main() -> None:
    """Train or read a run, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "price.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run is None:
            settings = [
                f"trainer.max_steps={arguments.steps}",
                "task.generate_examples=0",
                "task.metric=none",
            ]
            run = train([str(DEMO), *settings, f"output={folder}/run"], Display())
        else:
            run = RunDirectory.open(arguments.run)
        record = run.read()
    result = {
        "question": (__doc__ or "").splitlines()[0],
        "steps": record["trainer"]["max_steps"],
        "heldout": {stage: record["metrics"][stage]["loss"] for stage in ("before", "after")},
        "also": record["also"],
        "cpu_seconds": costs(),
        "seed": record["seed"],
        "versions": collect_versions(),
        "hardware": collect_hardware(),
    }
    arguments.out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("heldout", "cpu_seconds")}, indent=2))


if __name__ == "__main__":
    main()
