"""Trainings over one frozen base at once: what does a step of one cost, beside a step alone?

K cells, each with its own adapter, seed and order of examples, go through one forward and backward together, as with
``moslora compare --together K``. Steps are interleaved in random order in one process; what is reported is the time per
cell and step relative to that of a cell alone, as medians. Optimiser, schedule and data loading are in it.

    python benchmarks/together.py [--quick] [--cells 1,2,4,8,16] [--rows N] [--rounds N] [--model NAME] [--data FILE]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from measure import header, interleave, over, place, write
from transformers import PrinterCallback, TrainerCallback

from moslora.comparison.lanes import Surroundings
from moslora.comparison.methods import METHODS
from moslora.comparison.together import share_weights, train_together
from moslora.display import Display
from moslora.models.loading import default_device
from moslora.recipe.loading import load_recipe
from moslora.tasks.text.task import TextTask

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
HOME = Path(__file__).parents[1] / "recipes" / "home" / "train.jsonl"


class Trainings:
    """Cells that train one step whenever they are told to.

    Args:
        task: Their data.
        base: Their base.
        count: How many; None for one as it runs alone.
        scratch: A folder that the trainers may name.
    """

    def __init__(self, task: TextTask, base: Any, count: int | None, scratch: Path) -> None:
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)
        self.closed = False
        self.error: BaseException | None = None
        outer = self

        class Gate(TrainerCallback):
            """Holds the first cell up before each step, and with it all others."""

            def __init__(self, holds: bool) -> None:
                self.holds = holds

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if self.holds:
                    outer.arrived.release()
                    outer.go.acquire()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                control.should_training_stop = outer.closed
                return control

        trainers, surroundings = [], []
        for seed in range(count or 1):
            own = copy.copy(task)
            own.recipe = task.recipe.model_copy(
                update={"seed": seed, "trainer": {**task.recipe.trainer, "seed": seed, "data_seed": seed}}
            )
            config = METHODS["moslora"].configure(task.recipe.adapter)
            trainers.append(own.build_trainer(share_weights(base), config, scratch, [Gate(holds=seed == 0)]))
            trainers[-1].remove_callback(PrinterCallback)
            surroundings.append(Surroundings.now())

        def work() -> None:
            try:
                if count is None:
                    trainers[0].train()
                else:
                    for error in train_together(base, trainers, surroundings):
                        if error is not None:
                            raise error
            except BaseException as error:
                self.error = error
            self.arrived.release()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        self.arrived.acquire()

    def step(self) -> None:
        """Train one step of every cell, from where the first would begin one to where it would begin the next."""
        self.go.release()
        self.arrived.acquire()
        if self.error is not None:
            raise RuntimeError("a training ended") from self.error

    def close(self) -> None:
        """End it."""
        self.closed = True
        self.go.release()
        self.thread.join()


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default=str(HOME))
    parser.add_argument("--cells", default="1,2,4,8,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--quick", action="store_true", help="two cells, two rounds of two rows")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.cells, options.rounds, options.rank, options.rows = "1,2", 2, 4, 2
    counts = [int(count) for count in options.cells.split(",")]
    if options.device != default_device():
        parser.error(f"--device {options.device}: recipes train on {default_device()} here")

    settings = {
        "model": options.model,
        "model.dtype": "float32" if options.dtype == "auto" and options.device == "cpu" else options.dtype,
        "data": options.data,
        "adapter.r": options.rank,
        "adapter.lora_alpha": 2 * options.rank,
        "adapter.lora_dropout": options.dropout,
        "adapter.target_modules": f"[{','.join(TARGETS)}]",
        "trainer.per_device_train_batch_size": options.rows,
        "trainer.max_steps": 10_000,
        "trainer.padding_free": "true",
        "trainer.report_to": "none",
        "trainer.save_strategy": "no",
        "trainer.logging_strategy": "no",
        "trainer.disable_tqdm": "true",
    }
    task = TextTask(load_recipe([f"{k}={v}" for k, v in settings.items()]), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    base: Any = task.load()
    with tempfile.TemporaryDirectory() as folder:
        contenders = {"alone": Trainings(task, base, None, Path(folder))}
        for count in counts:
            contenders[str(count)] = Trainings(task, base, count, Path(folder))
        steps = {name: trainings.step for name, trainings in contenders.items()}
        times = interleave(steps, options.rounds, options.device, lambda line: print(line, flush=True))
        for trainings in contenders.values():
            trainings.close()
    tokens = sum(len(e.input_ids) for e in task.train_set) / len(task.train_set) * options.rows
    result = header(
        "one step of one of K trainings over one frozen base: time over that of a training alone",
        options.device,
        model=options.model,
        shape={"rows": options.rows, "tokens": round(tokens), "rank": options.rank, "targets": TARGETS},
        dropout=options.dropout,
        dtype=str(next(base.parameters()).dtype),
        rounds=options.rounds,
    )
    result["contenders"] = {}
    for name, spent in times.items():
        each = [one / (1 if name == "alone" else int(name)) for one in spent]
        result["contenders"][name] = over(each, times["alone"])
        found = result["contenders"][name]
        print(
            f"{name:>6} {found['median_seconds']:.3f} s per cell and step, {found['over_floor']:.3f} × alone"
        )
    if options.device.startswith("cuda"):
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    write(result, options.out or place("together", options.device))


if __name__ == "__main__":
    main()
