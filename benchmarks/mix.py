"""Does a learned mixer of two trained adapters do what their sum cannot?

Two skills from the demo's world: *when* (one command with a time, a delay, a duration or a condition) and *many* (two
or three commands at once). The task that needs both asks for several commands with a time or a condition; neither
adapter saw such a request. ``moslora mix`` learns the mixer of both on a few of them. Beside it stand each adapter
alone, the plain sum, the mean, and a fresh adapter trained on the same few requests, which says what those alone give.
All of it is drawn and trained anew for every seed; held-out requests share no wording and no device-and-room pair with
training. Rates are first guesses; none was tuned.

    python benchmarks/mix.py --folder DIR [--seeds 0,1,2] [--examples 48] [--steps 36] [--out FILE]

DIR keeps what was trained, so that a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

HOME = Path(__file__).resolve().parent.parent / "recipes" / "home"
SKILLS = ("when", "many")
SKILL_STEPS, SKILL_EXAMPLES, BATCH, HELDOUT = 60, 240, 4, 48
RATES = {"skill": 2e-3, "mix": 5e-3, "fresh": 2e-3}
TARGETS = "[q_proj, k_proj, v_proj, up_proj, down_proj]"


def home() -> ModuleType:
    """Load the demo's generator."""
    spec = importlib.util.spec_from_file_location("home", HOME / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["home"] = module
    spec.loader.exec_module(module)
    return module


def belongs(example: Any) -> str:
    """Tell which skill a request needs: ``when``, ``many`` or ``both``; nothing for plain requests."""
    late = any(c.if_ or c.at or c.after or c.for_ for c in example.commands)
    many = len(example.commands) > 1
    return "both" if late and many else "when" if late else "many" if many else ""


def draw(generate: ModuleType, skill: str, split: str, count: int, seed: object) -> list[Any]:
    """Draw requests of a skill."""
    chance = random.Random(f"mix-{seed}-{skill}-{split}")
    pool = generate.pairs_of_split()[split]
    found: dict[str, Any] = {}
    while len(found) < count:
        kind = chance.choice(("time", "condition", "multi"))
        draft = generate.Draft(chance, split, pool, generate.PEOPLE)
        try:
            request, commands = generate.KINDS[kind](draft)
        except generate.DeadEnd:
            continue
        example = generate.Example(kind, request, commands, frozenset(), frozenset())
        if belongs(example) == skill:
            found.setdefault(request.lower(), example)
    return list(found.values())


def settings(folder: Path, name: str, data: str, steps: int, rate: float, seed: int) -> list[str]:
    """Say what the runs have in common."""
    return [
        "model=smollm2-135m-instruct",
        "model.dtype=float32",
        f"data={folder / data}.jsonl",
        f"data.heldout={folder / 'heldout.jsonl'}",
        "adapter.r=16",
        "adapter.lora_alpha=32",
        f"adapter.target_modules={TARGETS}",
        "task.generate_examples=0",
        f"trainer.learning_rate={rate}",
        "trainer.lr_scheduler_type=linear",
        "trainer.warmup_steps=3",
        f"trainer.per_device_train_batch_size={BATCH}",
        f"trainer.max_steps={steps}",
        "trainer.padding_free=true",
        "trainer.max_length=null",
        f"seed={seed}",
        f"output.dir={folder}",
        f"output.name={name}",
    ]


def trained(folder: Path, name: str, arguments: list[str]) -> dict[str, Any]:
    """Train, or read what an earlier call has trained."""
    from moslora.display import Display
    from moslora.training.run import train

    record = folder / name / "run.json"
    if not (record.exists() and json.loads(record.read_text(encoding="utf-8"))["status"] == "completed"):
        start = time.process_time()
        train(arguments, Display(quiet=True), f"benchmarks/mix.py: {name}")
        print(f"  {name}: trained in {time.process_time() - start:.0f} CPU seconds", flush=True)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return found


def measured(folder: Path, name: str, adapter: Path | None, heldout: Path) -> dict[str, Any]:
    """Measure held-out loss and exact match, or read what an earlier call has measured."""
    kept = folder / f"measured-{name}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    from peft import PeftModel

    from moslora.display import Display
    from moslora.recipe.loading import load_recipe
    from moslora.tasks.text.task import TextTask

    arguments = [
        *("model=smollm2-135m-instruct", "model.dtype=float32", f"data={folder / 'few.jsonl'}"),
        *(f"data.heldout={heldout}", "task.metric=json", "task.max_new_tokens=96", "trainer.max_length=null"),
        "trainer.padding_free=true",
    ]
    task = TextTask(load_recipe(arguments), Display(quiet=True), lambda: None)
    task.read()
    task.prepare()
    model: Any = task.load()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    found_now = task.evaluate(model, name)
    right = [bool(answer.correct) for answer in found_now.answers]
    result = {"loss": found_now.metrics["loss"], "exact_match": sum(right) / len(right), "right": right}
    kept.write_text(json.dumps(result), encoding="utf-8")
    print(f"  {name}: loss {result['loss']:.4f}, exact match {result['exact_match']:.1%}", flush=True)
    return result


def one_seed(root: Path, seed: int, examples: int, steps: int, starts: list[str]) -> dict[str, Any]:
    """Train and measure everything of one seed."""
    import torch

    from moslora.adapters.combine import combine

    folder = root / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    generate = home()
    sizes = {"when": SKILL_EXAMPLES, "many": SKILL_EXAMPLES, "few": examples, "heldout": HELDOUT}
    for name, count in sizes.items():
        split = "heldout" if name == "heldout" else "train"
        skill = name if name in SKILLS else "both"
        lines = [e.to_line() for e in draw(generate, skill, split, count, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    heldout = folder / "heldout.jsonl"
    contenders: dict[str, Path | None] = {"base": None}
    for skill in SKILLS:
        trained(folder, skill, settings(folder, skill, skill, SKILL_STEPS, RATES["skill"], seed))
        contenders[f"{skill} alone"] = folder / skill / "lora"
    sources = [folder / skill / "adapter" for skill in SKILLS]
    for name, weight in (("sum", 1.0), ("mean", 0.5)):
        if not (folder / name).exists():
            combine(sources, [weight, weight], folder / name)
        contenders[name] = folder / name
    record: dict[str, Any] = {}
    for start in starts:
        name = f"mix-from-{start}"
        wanted = settings(folder, name, "few", steps, RATES["mix"], seed)
        listed = json.dumps([str(source) for source in sources])
        weight = {"sum": 1.0, "mean": 0.5}[start]
        mixing = [f"mix.adapters={listed}", f"mix.weights={[weight, weight]}"]
        record[name] = trained(folder, name, [*wanted, *mixing])["proofs"]
        contenders[f"mix from {start}"] = folder / name / "lora"
    fresh = settings(folder, "fresh", "few", steps, RATES["fresh"], seed)
    trained(folder, "fresh", ["adapter.r=32" if a == "adapter.r=16" else a for a in fresh])
    contenders["fresh adapter, the same few"] = folder / "fresh" / "lora"
    with torch.random.fork_rng():
        results = {
            name: measured(folder, name.replace(" ", "-").replace(",", ""), adapter, heldout)
            for name, adapter in contenders.items()
        }
    return {"results": results, "proofs": record}


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean over seeds, by Student's t."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}[len(values)]
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--examples", type=int, default=48, help="requests that mix and fresh learn from")
    parser.add_argument("--steps", type=int, default=36, help="of mix and fresh")
    parser.add_argument("--starts", default="sum", help="sum, mean or both, separated by commas")
    parser.add_argument("--mix-rate", type=float, default=RATES["mix"])
    parser.add_argument("--fresh-rate", type=float, default=RATES["fresh"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mix.json")
    wanted = parser.parse_args()
    RATES.update(mix=wanted.mix_rate, fresh=wanted.fresh_rate)
    seeds = [int(seed) for seed in wanted.seeds.split(",")]
    start = time.process_time()
    runs = {}
    for seed in seeds:
        print(f"seed {seed}", flush=True)
        runs[seed] = one_seed(wanted.folder, seed, wanted.examples, wanted.steps, wanted.starts.split(","))
    from moslora.files import write_text
    from moslora.metrics.answers import wilson_interval
    from moslora.training.provenance import collect_hardware, collect_versions

    names = list(runs[seeds[0]]["results"])
    mixed = f"mix from {wanted.starts.split(',')[0]}"
    table: dict[str, Any] = {}
    for name in names:
        of_seed = [runs[seed]["results"][name] for seed in seeds]
        right = [hit for result in of_seed for hit in result["right"]]
        losses = [result["loss"] for result in of_seed]
        less = [runs[seed]["results"][mixed]["loss"] - loss for seed, loss in zip(seeds, losses, strict=True)]
        table[name] = {
            "loss": statistics.mean(losses),
            "losses": losses,
            "exact_match": sum(right) / len(right),
            "exact_match_interval": wilson_interval(sum(right), len(right)),
            "exact_matches": [result["exact_match"] for result in of_seed],
            f"loss of {mixed} minus this": statistics.mean(less),
            "its 95 % interval over seeds": interval(less) if len(seeds) > 1 else None,
        }
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "seeds": seeds,
        "skill_steps": SKILL_STEPS,
        "batch": BATCH,
        "few_examples": wanted.examples,
        "steps": wanted.steps,
        "heldout_per_seed": HELDOUT,
        "rates": RATES,
        "results": table,
        "proofs": {str(seed): runs[seed]["proofs"] for seed in seeds},
        "cpu_seconds_of_this_call": time.process_time() - start,
        "hardware": collect_hardware(),
        "versions": collect_versions(),
    }
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(wanted.out, json.dumps(record, indent=2) + "\n")
    for name, figures in table.items():
        print(
            f"{name:<28} loss {figures['loss']:.4f} ({', '.join(f'{v:.4f}' for v in figures['losses'])})  exact match "
            f"{figures['exact_match']:.1%} ({', '.join(f'{v:.0%}' for v in figures['exact_matches'])})"
        )


if __name__ == "__main__":
    main()
