"""Preparing data: rows a second beside TRL's own preparation of the same file, and the memory that it takes.

The rows have prompt and completion as messages, of which both learn the completion alone; both go through the model's
own chat template and tokenizer, and end in token ids and labels in Arrow files. Every contender is a process of its own
without a cache, with the same number of worker processes, in random order round after round. The token ids of both are
compared first, and the labels but for the last one, which is the line break that the template writes after an answer;
TRL learns that, too. Where they differ, nothing is measured. Then a larger file is prepared twice, to see what memory
each process takes, and how soon a second start is at its first step, with a model of a few weights.

    python benchmarks/data.py [--rows N] [--processes N] [--rounds N] [--memory-rows N] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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

GENERAL = Path(__file__).parents[1] / "src" / "moslora" / "data" / "general" / "texts.jsonl"
MAX_LENGTH = 2048
PROMPT_WORDS, ANSWER_WORDS = 90, 260  # about 500 tokens together


def make_rows(path: Path, count: int) -> None:
    """Write rows of about 500 tokens, made of the general text's words."""
    words = [word for line in GENERAL.open(encoding="utf-8") for word in json.loads(line)["text"].split()]
    draw = random.Random(SEED)

    def some(number: int) -> str:
        start = draw.randrange(len(words) - number)
        return " ".join(words[start : start + number])

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            prompt = [{"role": "user", "content": f"{number} {some(PROMPT_WORDS)}"}]
            completion = [{"role": "assistant", "content": some(ANSWER_WORDS)}]
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def make_model(folder: Path, tokenizer: str) -> None:
    """Save a model of a few weights with a real tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from moslora.models.loading import load_tokenizer
    from moslora.models.names import resolve_model

    tok: Any
    if Path(tokenizer).is_dir():
        tok = AutoTokenizer.from_pretrained(tokenizer)
    else:
        from moslora.recipe.schema import ModelSection
        from moslora.tasks.base_model import BaseModel

        base = BaseModel(ModelSection(name=resolve_model(tokenizer).name), "AutoModelForCausalLM")
        base.find(True)
        base.convert(lambda _: None)
        tok = load_tokenizer(base.tokenizer_source, False)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)


def digest(rows: Any, count: int) -> str:
    """Hash the first rows' token ids and labels."""
    hashed = hashlib.sha256()
    for number in range(min(count, len(rows))):
        row = rows[number]
        hashed.update(json.dumps([row["input_ids"], row["labels"][:-1]]).encode())
    return hashed.hexdigest()


def prepare_ours(options: argparse.Namespace) -> tuple[Any, Any]:
    """Read and tokenize as a run does."""
    from moslora.display import Display
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    arguments = [
        f"model={options.model}",
        f"data.train={options.data}",
        # Held out of another file, so that both prepare the same rows.
        f"data.heldout={options.data.with_name('heldout.jsonl')}",
        "data.cache=always",
        "evaluation.also=[]",
        "task.generate_examples=0",
        f"trainer.max_length={MAX_LENGTH}",
        f"trainer.dataset_num_proc={options.processes}",
        "trainer.use_cpu=true",
        "trainer.max_steps=1",
        "trainer.per_device_train_batch_size=1",
        "trainer.save_strategy=no",
        f"seed={SEED}",
    ]
    task = TextTask(load_recipe(arguments), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    train: Any = task.train_set
    return train.as_dataset(), task


def prepare_trl(options: argparse.Namespace, folder: str) -> Any:
    """Read and tokenize as TRL does, when its trainer is made."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=str(options.data), split="train", cache_dir=f"{folder}/cache")
    config = SFTConfig(
        output_dir=f"{folder}/out",
        max_length=MAX_LENGTH,
        dataset_num_proc=options.processes,
        use_cpu=True,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    return trainer.train_dataset


def processor_seconds() -> float:
    """Return what this process and its children have used."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def contend(options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in this process."""
    import torch
    import trl

    assert torch and trl  # both need them, and importing them is not what is measured
    began, spent = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        if options.contender == "TRL":
            rows = prepare_trl(options, folder)
        else:
            rows, _ = prepare_ours(options)
        seconds, processor = time.perf_counter() - began, processor_seconds() - spent
        count = len(rows)
        peaks = [resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return {
            "rows": count,
            "rows_per_second": count / seconds,
            "rows_per_processor_second": count / processor,
            "peak_bytes": peaks[0] * 1024,
            "peak_bytes_of_a_worker": peaks[1] * 1024,
            "digest": digest(rows, options.compared),
        }


def first_step(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, and train one step; the seconds count from the start of the process, imports included."""
    import psutil
    from transformers import TrainerCallback

    from moslora import MoSLoRAConfig

    began = psutil.Process().create_time()
    found: dict[str, float] = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["seconds"] = time.time() - began
            found["processor_seconds"] = processor_seconds()

    rows, task = prepare_ours(options)
    with tempfile.TemporaryDirectory() as folder:
        config = MoSLoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        task.build_trainer(task.load(), config, Path(folder), [Clock()]).train()
    peaks = [resource.getrusage(of).ru_maxrss for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "rows": len(rows),
        "tokens": task.train_summary.tokens,
        **found,
        "peak_bytes": peaks[0] * 1024,
        "peak_bytes_of_a_worker": peaks[1] * 1024,
    }


def summarize(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over rounds, and every round's rates."""
    keys = ("rows_per_second", "rows_per_processor_second", "peak_bytes", "peak_bytes_of_a_worker")
    every = {f"all_{key}": [round(one[key], 2) for one in measured] for key in keys[:2]}
    return {**{key: statistics.median(one[key] for one in measured) for key in keys}, **every}


def main() -> None:
    """Run all contenders and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="whose tokenizer is used")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compared", type=int, default=1000, help="rows whose tokens are compared")
    parser.add_argument(
        "--note", default="", help="kept in the result, for example that the machine was shared"
    )
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--data", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--contender", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender is not None:
        found = first_step(options) if options.contender == "first step" else contend(options)
        options.out.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        folder = Path(name)
        make_model(folder / "model", options.model)
        data, large = folder / "rows.jsonl", folder / "many.jsonl"
        make_rows(data, options.rows)
        make_rows(folder / "heldout.jsonl", 20)

        def run(contender: str, data: Path, cache: str) -> dict[str, Any]:
            out = folder / "found.json"
            given = {**vars(options), "contender": contender, "data": data, "out": out}
            given["model"] = folder / "model"
            flags = [w for k, v in given.items() for w in (f"--{k.replace('_', '-')}", str(v))]
            # The processes are the parallelism, for both.
            environment = {**os.environ, "MOSLORA_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
            command = [sys.executable, "-W", "ignore", __file__, *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            found: dict[str, Any] = json.loads(out.read_text())
            return found

        contenders = ["moslora", "TRL"]
        rounds: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
        order = random.Random(SEED)
        result: dict[str, Any] = {}
        settings = {k: getattr(options, k) for k in ("model", "rows", "memory_rows", "processes", "note")}

        def keep() -> None:
            settings["model"] = Path(options.model).name  # a name, or a folder's
            told = {**settings, "rounds": len(rounds["TRL"]), "max_length": MAX_LENGTH}
            head = header(
                "preparing data: rows per second, peak memory, a second start", "cpu", settings=told
            )
            write({**head, **result}, options.out or place("data", "cpu"))

        for done in range(options.rounds):
            for contender in order.sample(contenders, len(contenders)):
                with tempfile.TemporaryDirectory() as cache:
                    rounds[contender].append(run(contender, data, cache))
                print(f"{contender}: {rounds[contender][-1]}", flush=True)
            if not done and len({rounds[c][0]["digest"] for c in contenders}) > 1:
                raise SystemExit("Token ids or labels differ, so nothing is measured.")
            result["contenders"] = {name: summarize(measured) for name, measured in rounds.items()}
            keep()
        make_rows(large, options.memory_rows)
        with tempfile.TemporaryDirectory() as cache:
            result["first_start"] = run("first step", large, cache)
            print(result["first_start"], flush=True)
            starts = [run("first step", large, cache) for _ in range(3)]
            result["second_start"] = {k: statistics.median(one[k] for one in starts) for k in starts[0]}
            result["second_start"]["all_seconds"] = [round(one["seconds"], 2) for one in starts]
            result["source_bytes"] = large.stat().st_size
        keep()
        print(result["second_start"])


if __name__ == "__main__":
    main()
