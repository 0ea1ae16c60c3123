"""A whole fine-tuning job on completion-only data: examples per second and peak memory, beside TRL with PEFT LoRA.

Every contender is the trainer as its users get it, on the same encoded examples in the same order, each in a process of
its own so that peak memory can be told apart, in random order round after round. Before that, the same adapter (an
identity mixer, frozen, beside LoRA) has to give the same losses, or nothing is measured. Loading is not counted.

    python benchmarks/job.py [--quick] [--model NAME] [--data FILE] [--steps N] [--rows N] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import SEED, header, place, write

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
DATA = Path(__file__).parents[1] / "recipes" / "home" / "train.jsonl"
# Losses are logged in float32; both sum the same terms in another order.
SAME_LOSS = 5e-5


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in this process."""
    if options.contender.startswith("unsloth"):
        importlib.import_module("unsloth")  # first: it changes transformers and TRL as they are imported
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback

    from moslora import MoSLoRAConfig
    from moslora.display import Display
    from moslora.recipe.loading import load_recipe
    from moslora.recipe.trainer_arguments import build_trainer_config
    from moslora.tasks.text.task import TextTask

    arguments = [
        f"model={options.model}",
        f"data={options.data}",
        "task.generate_examples=0",
        f"trainer.max_steps={options.steps}",
        f"trainer.per_device_train_batch_size={options.rows}",
        "trainer.logging_steps=1",
        "trainer.save_strategy=no",
        f"trainer.use_cpu={str(options.device == 'cpu').lower()}",
        f"seed={SEED}",
    ]
    task = TextTask(load_recipe(arguments), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    settings: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": 2 * options.rank,
        "lora_dropout": options.dropout,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    }
    ours = options.contender.startswith("MoSLoRA")
    mixer = {"mixer": "identity", "train_mixer": False} if "identity" in options.contender else {}
    clock: dict[str, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.update(wall=time.perf_counter(), cpu=time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        if ours:
            config = MoSLoRAConfig(**settings, **mixer)
            trainer: Any = task.build_trainer(task.load(), config, Path(folder), [Clock()])
        else:
            from datasets import Dataset
            from trl import SFTTrainer

            config = build_trainer_config(task.recipe, task.device, folder)
            config.dataset_kwargs = {"skip_prepare_dataset": True}
            config.use_liger_kernel = options.contender.startswith("liger")
            rows = {"input_ids": [e.input_ids for e in task.train_set]}
            rows["labels"] = [e.labels for e in task.train_set]
            torch.manual_seed(SEED)
            model, peft_config = task.load(), LoraConfig(**settings)
            if options.contender.startswith("unsloth"):
                model, peft_config = unsloth_model(model, settings, Path(folder)), None
            trainer = SFTTrainer(
                model=model,
                args=config,
                train_dataset=Dataset.from_dict(rows),
                processing_class=task.tokenizer,
                peft_config=peft_config,
                callbacks=[Clock()],
            )
        trainer.train()
        if options.device != "cpu":
            torch.cuda.synchronize()
        spent = {
            name: now - clock[name]
            for name, now in (("wall", time.perf_counter()), ("cpu", time.process_time()))
        }
    on_gpu = options.device != "cpu"
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    examples = options.steps * options.rows
    return {
        "examples_per_second": examples / spent["wall"],
        "cpu_seconds_per_example": spent["cpu"] / examples,
        "peak_bytes": peak,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def unsloth_model(model: Any, settings: dict[str, Any], folder: Path) -> Any:
    """Return the same weights with LoRA on them, as unsloth loads them."""
    fast: Any = importlib.import_module("unsloth").FastLanguageModel
    model.save_pretrained(folder / "base")
    loaded, _ = fast.from_pretrained(str(folder / "base"), load_in_4bit=False, dtype=model.dtype)
    given = {name: value for name, value in settings.items() if name != "task_type"}
    return fast.get_peft_model(loaded, **given, bias="none", use_gradient_checkpointing=False)


def summarise(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over rounds, every round's CPU seconds, and the losses of the first."""
    keys = ("examples_per_second", "cpu_seconds_per_example", "peak_bytes")
    return {
        **{key: statistics.median(found[key] for found in measured) for key in keys},
        "all_cpu_seconds_per_example": [found["cpu_seconds_per_example"] for found in measured],
        "losses": measured[0]["losses"],
    }


def main() -> None:
    """Run all contenders and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check-steps", type=int, default=3, help="whose losses are compared before")
    parser.add_argument("--device", default=None, help="where to train; a GPU where there is one")
    parser.add_argument("--quick", action="store_true", help="two steps of two examples, once")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--contender", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rows, options.rounds = 2, 2, 1
    if options.device is None:
        from moslora.models.loading import default_device

        options.device = default_device()
    if options.contender is not None:
        options.out.write_text(json.dumps(train(options)))
        return

    def run(contender: str, **changes: object) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            given = {**vars(options), **changes, "contender": contender, "out": Path(folder) / "result.json"}
            flags = [
                w for k, v in given.items() if k != "quick" for w in (f"--{k.replace('_', '-')}", str(v))
            ]
            subprocess.run(
                [sys.executable, "-W", "ignore", __file__, *flags], check=True, stdout=subprocess.DEVNULL
            )
            found: dict[str, Any] = json.loads(Path(given["out"]).read_text())
            return found

    # Dropout draws other masks in another layout, so the comparison is without.
    one, two = (
        run(c, dropout=0.0, steps=options.check_steps)["losses"]
        for c in ("MoSLoRA, identity", "TRL + PEFT LoRA")
    )
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    print(f"same adapter: losses differ by at most {apart:.1e} in {len(one)} steps", flush=True)
    if not apart < SAME_LOSS:
        raise SystemExit(f"The same adapter has other losses, so nothing is measured: {one} against {two}.")
    contenders = ["MoSLoRA", "TRL + PEFT LoRA"]
    if options.device != "cpu":
        # Never required: what is not installed, or fails at two steps, is left out with a word.
        for package, name in (("liger_kernel", "liger + PEFT LoRA"), ("unsloth", "unsloth")):
            if importlib.util.find_spec(package) is None:
                continue
            try:
                run(name, steps=2)
                contenders.append(name)
            except subprocess.CalledProcessError as error:
                print(f"{name} is left out: it ended with {error.returncode}", flush=True)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    order = random.Random(SEED)
    settings = {
        k: str(v) for k, v in vars(options).items() if k not in ("out", "contender", "device", "rounds")
    }
    root = DATA.parents[2]
    settings["data"] = str(
        options.data.relative_to(root) if root in options.data.parents else options.data.name
    )
    for done in range(1, options.rounds + 1):
        for name in order.sample(contenders, len(contenders)):
            rounds[name].append(run(name))
            print(f"{name}: {rounds[name][-1]['examples_per_second']:.2f} examples/s", flush=True)
        # After every round, so that a run that is cut off leaves what it has.
        told = {**settings, "rounds": done}
        result = header("a fine-tuning job: examples per second, peak memory", options.device, settings=told)
        result["largest_loss_difference"] = apart
        result["contenders"] = {name: summarise(measured) for name, measured in rounds.items()}
        write(result, options.out or place("job", options.device))


if __name__ == "__main__":
    main()
