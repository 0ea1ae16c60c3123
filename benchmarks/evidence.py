"""Is the learned mixer worth it? Five methods, four learning rates or more and five seeds on three small tasks.

``home`` teaches a form (requests to JSON), ``facts`` content (invented people), ``commonsense`` neither: its questions
want what a base model knows already. Each is one ``moslora compare`` on SmolLM2-135M; it continues if stopped.
What it found is kept under ``benchmarks/results/evidence/``, one folder per task, every example's loss included, and
in README's table.

    python benchmarks/evidence.py [home] [facts] [commonsense] [--commonsense FOLDER] [--folder DIR] [--workers N]
    python benchmarks/evidence.py --confirm 30 [--width 0.02] [--off-seeds 8] [TASK...]
    python benchmarks/evidence.py --table      writes README's table from what is kept

With ``--confirm`` the methods are trained on fresh seeds at the rates that were found, judged on all held-out
examples: is the learned mixer better than its frozen start, and either than LoRA; what does a wrong rate cost; does the
mixer want a rate or a decay of its own; how much is the scale at the start? Variants of ``moslora`` that were not tuned
before are tuned first, on three seeds. It is kept under ``confirmed/`` of the task's folder; the same command
continues, and with more seeds adds to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

from moslora.comparison.compare import compare
from moslora.comparison.confirmed import Asked, Found, confirm_methods
from moslora.comparison.off_rates import price_rates, say_prices
from moslora.comparison.verdict import Cell, judge
from moslora.display import Display
from moslora.evaluation.commonsense.questions import read_questions, write_answer_texts
from moslora.files import write_text
from moslora.metrics.intervals import paired_difference
from moslora.metrics.sequential import FIRST, Goal, Look
from moslora.training.provenance import collect_hardware

ROOT = Path(__file__).resolve().parents[1]
KEPT = RESULTS / "evidence"
METHODS = ("lora", "lora-matched", "frozen-mixer", "moslora", "moslora-orthogonal")
RATES = (1e-3, 3e-3, 9e-3, 2.7e-2)
SEEDS = 5
WHOLE = [
    "evidence-commonsense.yaml",
    "trainer.per_device_train_batch_size=32",
    "trainer.max_steps=260",
    "trainer.warmup_steps=26",
]
# Each task's recipe and overrides, steps, examples set aside for choosing rates, held-out examples, and rates. On
# commonsense LoRA was best at the lowest of the four, so all methods got one below.
TASKS: dict[str, tuple[list[str], int, int, int, tuple[float, ...]]] = {
    "home": (["compare-demo.yaml", "model.dtype=bfloat16"], 20, 32, 80, RATES),
    "facts": (["evidence-facts.yaml"], 32, 12, 40, RATES),
    "commonsense": (["evidence-commonsense.yaml"], 12, 24, 60, (3e-4, *RATES)),
    # All 8,327 questions once. It is for --confirm alone: tuned on three seeds, judged on fresh ones.
    "commonsense-whole": (WHOLE, 260, 256, 60, (2e-4, 6e-4, 1.8e-3)),
}
SMALL = ("home", "facts", "commonsense")
COMMONSENSE = ("ARC-Easy", "ARC-Challenge", "openbookqa")
# Variants of ``moslora`` that only the second stage has; seeds and held-out examples with which they are tuned.
VARIANTS = ("moslora-matched", "moslora-slow-mixer", "moslora-fast-mixer", "moslora-mixer-decay")
TUNING_SEEDS, TUNING_EXAMPLES = 3, 24
# Beside each method with LoRA: the learned mixer with its frozen start, this with LoRA at the mixer's scale, and
# each variant with what it varies.
CONTRASTS = (
    ("moslora", "frozen-mixer"),
    ("frozen-mixer", "lora-matched"),
    *((variant, "moslora") for variant in VARIANTS),
)
OFF_RATES = (0.333, 3.0, 10.0)
# Held-out questions of each of commonsense's tasks, and requests of home, in the second stage; the first 200 of the
# latter are the recipe's, the others come from the same generator.
QUESTIONS = 200
REQUESTS = 200
BEGIN, END = "<!-- evidence -->", "<!-- /evidence -->"


def prepare_commonsense(source: Path, folder: Path, questions: int = 20) -> list[str]:
    """Write the questions as a recipe reads them: all of training, and some of each task's test.

    Returns:
        What the recipe must be told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = [question for task in COMMONSENSE for question in read_questions(source, task, split="train")]
    heldout = [question for task in COMMONSENSE for question in read_questions(source, task, limit=questions)]
    write_answer_texts(train, folder / "train.jsonl")
    write_answer_texts(heldout, folder / "heldout.jsonl")
    return [f"data.train={folder / 'train.jsonl'}", f"data.heldout={folder / 'heldout.jsonl'}"]


def prepare_home(folder: Path, requests: int) -> list[str]:
    """Write home's data with more held-out requests than the recipe has.

    Returns:
        What the recipe must be told.
    """
    file = ROOT / "recipes" / "home" / "generate.py"
    spec = importlib.util.spec_from_file_location("home_generate", file)
    assert spec and spec.loader
    home = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where its dataclasses look
    spec.loader.exec_module(home)
    folder.mkdir(parents=True, exist_ok=True)
    home.write(folder, -(-requests // len(home.HELDOUT_TURNS)))
    return [f"data.train={folder / 'train.jsonl'}", f"data.heldout={folder / 'heldout.jsonl'}"]


def settings_of(
    task: str,
    folder: Path,
    commonsense: Path | None,
    questions: int,
    dtype: str | None = None,
    requests: int = REQUESTS,
) -> list[str]:
    """Return a task's recipe with its overrides, its data written."""
    recipe, *overrides = TASKS[task][0]
    if dtype is not None:
        overrides = [*(one for one in overrides if "model.dtype" not in one), f"model.dtype={dtype}"]
    if task == "home" and requests != REQUESTS:
        overrides += prepare_home(folder, requests)
    if task.startswith("commonsense"):
        if commonsense is None:
            raise SystemExit(
                f"commonsense wants --commonsense FOLDER with LLM-Adapters' folders {', '.join(COMMONSENSE)}."
            )
        overrides += prepare_commonsense(commonsense, folder, questions)
    return [str(ROOT / "recipes" / recipe), *overrides]


def confirm(task: str, wanted: argparse.Namespace) -> None:
    """Confirm on fresh seeds what was found on one task, and keep it."""
    _, steps, validation, _, rates = TASKS[task]
    folder = wanted.folder.resolve()
    methods = tuple(wanted.methods.split(",")) if wanted.methods else (*METHODS, *VARIANTS)
    before = KEPT / task / "results.json"
    tuned = {m["name"] for m in json.loads(before.read_text())["methods"]} if before.exists() else set()
    data = folder / f"{'commonsense' if task.startswith('commonsense') else task}-data-confirmed"
    settings = settings_of(
        task, data, wanted.commonsense, wanted.questions, wanted.dtype, wanted.home_examples
    )
    settings += wanted.set or []
    if f"model.dtype={wanted.dtype}" not in TASKS[task][0] and wanted.dtype is not None:
        print(f"Rates of {task} were tuned with the recipe's own dtype, and are confirmed in {wanted.dtype}.")
    if not wanted.general:
        settings.append("evaluation.also=[]")  # it takes as long again as a short training
    directory, _ = compare(
        settings,
        Display(),
        methods=methods,
        baseline="lora",
        seeds=wanted.tuning_seeds,
        rates=() if set(methods) <= tuned else rates,
        rates_from=before if before.exists() else None,
        steps=steps,
        validation=validation,
        examples=TUNING_EXAMPLES,
        contrasts=[":".join(pair) for pair in CONTRASTS if set(pair) <= set(methods)],
        confirm=wanted.confirm,
        width=wanted.width,
        off_rates=OFF_RATES if wanted.off_seeds else (),
        off_seeds=wanted.off_seeds or None,
        out=folder / f"{task}-confirmed",
        workers=wanted.workers,
        together=wanted.together,
        command=shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]]),
    )
    identity = json.loads((directory / "compare.json").read_text())
    record = {
        "question": "Do fresh seeds confirm what tuning found?",
        "task": task,
        **json.loads((directory / "results.json").read_text()),
        "looks": json.loads((directory / "confirm.json").read_text()),
        "model": identity["identity"]["recipe"]["model"],
        "general_text": wanted.general,
        "versions": identity["versions"],
        "hardware": collect_hardware(),
    }
    keep_cells(directory, KEPT / task / "confirmed", record)


def judge_stopped(task: str, directory: Path) -> None:
    """Judge what there is of a confirmation that was cut off from outside, and keep it; nothing is trained.

    The order of seeds is fixed and nothing was looked at before, so each contrast is judged on the first seeds that
    both of its methods have, at the level of a first verdict; wrong rates of those methods that have all of them.

    Args:
        task: Of ``TASKS``.
        directory: The comparison's folder.
    """
    begun = json.loads((directory / "compare.json").read_text())
    rates: dict[str, float] = json.loads((directory / "confirm.json").read_text())["rates"]
    stored = [json.loads(file.read_text()) for file in sorted((directory / "confirm").glob("*_*_*.json"))]
    cells = [Cell(**cell) for cell in stored]
    base = json.loads((directory / "confirm" / "base.json").read_text())["test"]
    seeds = sorted({cell.seed for cell in cells})
    kept = {(cell.method, cell.learning_rate, cell.seed): cell for cell in cells}
    found = Found(rates, seeds, kept, base)
    pairs = [*((name, "lora") for name in rates if name != "lora"), *CONTRASTS]
    asked = []
    for pair in pairs:
        both = min((len(found.of(name)) if name in rates else 0) for name in pair)
        if both >= FIRST:
            asked.append(Asked(pair, [Look(both)]))
    judged = {name for one in asked for name in one.pair}
    found = dataclasses.replace(found, rates={name: rates[name] for name in rates if name in judged})
    goal = Goal(max(one.looks[-1].seeds for one in asked))
    factors = [f for f in OFF_RATES if len(found.of("lora", f)) >= FIRST]
    whole = {name: all(len(found.of(name, f)) >= FIRST for f in factors) for name in found.rates}
    priced = dataclasses.replace(found, rates={name: found.rates[name] for name in whole if whole[name]})
    prices = price_rates(priced, "lora", factors, FIRST, 1) if factors else []
    confirmation = confirm_methods(found, asked, goal, "answers")
    sentences = [*confirmation.sentences, *say_prices(prices, "lora")]
    confirmation = dataclasses.replace(confirmation, prices=prices, sentences=sentences)
    print("\n".join([*confirmation.sentences, *confirmation.cautions]))
    recipe = begun["identity"]["recipe"]
    keep_record(
        KEPT / task / "confirmed",
        {
            "question": "Do fresh seeds confirm what tuning found?",
            "task": task,
            "stopped": "Cut off with its machine; contrasts are judged on the seeds that both methods have.",
            "confirmation": dataclasses.asdict(confirmation),
            "model": recipe["model"],
            "trainer": begun["identity"]["trainer"],
            "versions": begun["versions"],
            "hardware": begun["hardware"],
        },
        [{"method": "base", "test": base}, *stored],
    )


def run(task: str, folder: Path, workers: int, commonsense: Path | None) -> None:
    """Compare on one task and keep what was found."""
    _, steps, validation, examples, rates = TASKS[task]
    directory, verdict = compare(
        settings_of(task, folder / "commonsense-data", commonsense, 20),
        Display(),
        methods=METHODS,
        seeds=SEEDS,
        rates=rates,
        steps=steps,
        validation=validation,
        examples=examples,
        out=folder / task,
        workers=workers,
    )
    if verdict is None:
        raise SystemExit(f"{directory} has no verdict.")
    keep(task, directory)


def keep(task: str, directory: Path) -> None:
    """Copy a finished comparison's results, and judge the mixer against its own frozen start too."""
    stored = stored_cells(directory)
    base = json.loads((directory / "cells" / "base.json").read_text())
    cells = [Cell(**cell) for cell in stored if "method" in cell]
    pair = ("frozen-mixer", "moslora")
    learned = judge(
        [cell for cell in cells if cell.method in pair], pair, pair[0], base["validation"], base["test"]
    )
    identity = json.loads((directory / "compare.json").read_text())
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "task": task,
        **json.loads((directory / "results.json").read_text()),
        "learned_against_frozen": [dataclasses.asdict(contrast) for contrast in learned.contrasts],
        "versions": identity["versions"],
        "hardware": collect_hardware(),
    }
    keep_cells(directory, KEPT / task, record)


def stored_cells(directory: Path) -> list[dict[str, Any]]:
    """Read the cells of both stages, and the base's losses."""
    files = [*sorted((directory / "cells").glob("*.json")), *sorted((directory / "confirm").glob("*.json"))]
    return [json.loads(file.read_text()) for file in files]


def keep_cells(directory: Path, target: Path, record: dict[str, Any]) -> None:
    """Write what is kept of a comparison: its results, every example's loss of every cell, and its page."""
    keep_record(target, record, stored_cells(directory))
    # Places on the machine that ran it say nothing to a reader.
    page = (directory / "report.html").read_text(encoding="utf-8")
    page = page.replace(str(directory.parent), "runs/evidence")
    write_text(target / "report.html", re.sub(r"/[^\s\"'<>]*/recipes/", "recipes/", page))


def keep_record(target: Path, record: dict[str, Any], stored: Sequence[dict[str, Any]]) -> None:
    """Write results, and every example's loss of every cell beside them."""
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1).replace(f"{ROOT}/", "")  # places say nothing to a reader
    write_text(target / "results.json", text + "\n")
    rounded = [
        {k: [round(x, 5) for x in v] if k in ("validation", "test") and v else v for k, v in cell.items()}
        for cell in stored
    ]
    lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in rounded)
    write_text(target / "cells.json", f"[\n{lines}\n]\n")


def at_the_baselines_rate(task: str, baseline: str = "lora") -> list[dict[str, Any]]:
    """Compare every method with the baseline at one rate, the baseline's best: only the name of the class changed.

    Fresh seeds are taken where a method has two or more at that rate (within 1 %), else those that rates were tuned on.

    Args:
        task: Of ``TASKS``; its kept cells are read.
        baseline: The method that the others are compared with.

    Returns:
        Method, difference of held-out losses with its 95 % interval, and whether the seeds are fresh.
    """
    confirmed = KEPT / task / "confirmed"
    told = []
    for folder in (confirmed, KEPT / task):
        if not (folder / "cells.json").exists():
            continue
        found = json.loads((folder / "results.json").read_text())
        methods = found.get("confirmation", found)["methods"]
        (best,) = (m.get("rate", m.get("best_rate")) for m in methods if m["name"] == baseline)
        cells = [cell for cell in json.loads((folder / "cells.json").read_text()) if cell.get("test")]
        near = [c for c in cells if "seed" in c and abs(c["learning_rate"] / best - 1) < 0.01]
        own = {c["seed"]: c["test"] for c in near if c["method"] == baseline}
        for name in dict.fromkeys(m["name"] for m in methods):
            theirs = {c["seed"]: c["test"] for c in near if c["method"] == name}
            both = sorted(own.keys() & theirs.keys())
            if name == baseline or len(both) < 2 or any(one["method"] == name for one in told):
                continue
            rows = [[a - b for a, b in zip(theirs[seed], own[seed], strict=True)] for seed in both]
            difference = dataclasses.asdict(paired_difference(rows, 0.95))
            told.append(
                {"method": name, "rate": best, "fresh": folder == confirmed, "difference": difference}
            )
    return told


def signed(low: float, high: float) -> str:
    """Write an interval."""
    return f"{low:+.3f} to {high:+.3f}"


def table() -> str:
    """Return README's table and the answers to the three questions, from what is kept."""
    lines = [
        "| task | method | best rate | held-out loss | minus LoRA's, 95 % | p | stable rates |",
        "|---|---|---|---|---|---|---|",
    ]
    learned, better, same, ranges = [], [], [], []
    for task in TASKS:
        file = KEPT / task / "results.json"
        if not file.exists():
            continue
        found: dict[str, Any] = json.loads(file.read_text())
        contrasts = {c["method"]: c for c in found["contrasts"] if c["measure"] == "loss"}
        for method in found["methods"]:
            contrast = contrasts.get(method["name"])
            stable = method["stable"]
            cells = [
                task if method is found["methods"][0] else "",
                f"`{method['name']}`",
                "none" if method["best_rate"] is None else f"{method['best_rate']:g}",
                "none" if method["score"] is None else f"{method['score']:.3f}",
                signed(contrast["difference"]["low"], contrast["difference"]["high"]) if contrast else "",
                as_p(contrast["p_corrected"]) if contrast else "",
                f"{stable[0]:g} to {stable[1]:g}" if stable else "none",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        for contrast in found["learned_against_frozen"]:
            if contrast["measure"] == "loss":
                learned.append(f"{task} {describe(contrast)}")
        better += [
            f"{task}, `{name}` {describe(contrasts[name])}"
            for name in ("moslora", "moslora-orthogonal")
            if name in contrasts
        ]
        same += [
            f"{task}, `{one['method']}` {one['difference']['mean']:+.3f} "
            f"({signed(one['difference']['low'], one['difference']['high'])}"
            f"{', fresh seeds' if one['fresh'] else ''})"
            for one in at_the_baselines_rate(task)
            if one["method"] in METHODS
        ]
        spans = {m["name"]: m["stable"] and m["stable"][1] / m["stable"][0] for m in found["methods"]}
        ranges.append(
            f"{task}: "
            + ", ".join(f"`{name}` {'none' if not span else f'{span:.3g}×'}" for name, span in spans.items())
        )
    confirmed = confirmed_table()
    answers = [
        ("Is the learned mixer better than its frozen start?", learned),
        ("Is either better than LoRA at LoRA's best rate?", better),
        (
            "And at LoRA's best rate itself, where only the class's name changes? (each interval by itself)",
            same,
        ),
        ("Is the stable range of rates wider? (highest ÷ lowest of those tried)", ranges),
    ]
    parts = ["\n".join(lines)] + [f"*{question}* {'; '.join(said)}." for question, said in answers if said]
    return "\n\n".join([*parts, confirmed] if confirmed else parts)


def confirmed_table() -> str:
    """Return the table of what fresh seeds confirmed; empty while there is none."""
    lines = [
        "| task | on fresh seeds | held-out loss, difference | interval | seeds, examples | p "
        "| price at 1/3, 3, 10 times its rate, less LoRA's |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        file = KEPT / task / "confirmed" / "results.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())["confirmation"]
        contrasts = [c for c in found["contrasts"] if c["measure"] == "loss"]
        for contrast in contrasts:
            difference = contrast["difference"]
            cells = [
                task if contrast is contrasts[0] else "",
                f"`{contrast['method']}` less `{contrast['baseline']}`",
                f"{difference['mean']:+.3f}",
                signed(difference["low"], difference["high"]),
                f"{difference['seeds']}, {difference['examples']}",
                as_p(contrast["p_corrected"]),
                prices_of(found["prices"], contrast["method"], contrast["baseline"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def as_p(value: float) -> str:
    """Write a p-value; none is zero."""
    return "< 0.01" if value < 0.005 else f"{value:.2f}"


def prices_of(prices: Sequence[dict[str, Any]], method: str, baseline: str) -> str:
    """Say what wrong rates cost a method beside LoRA; only its own contrast with LoRA has that."""
    own = [p for p in prices if p["method"] == method and baseline == "lora"]
    parts = []
    for price in own:
        beside = price["beside_baseline"]
        lost = price["diverged"] + price["crashed"]
        text = (
            "lost"
            if beside is None
            else f"{beside['mean']:+.2f} ({beside['low']:+.2f} to {beside['high']:+.2f})"
        )
        parts.append(text + (f", {lost} of {price['seeds']} lost" if lost else ""))
    return "; ".join(parts)


def describe(contrast: dict[str, Any]) -> str:
    """Say what a contrast found, in few words; lower loss is better."""
    difference = contrast["difference"]
    word = {"better": "better", "worse": "worse", "none": "no difference shown"}[contrast["found"]]
    return (
        f"{word} ({difference['mean']:+.3f}, {signed(difference['low'], difference['high'])}, "
        f"p {contrast['p_corrected']:.2f})"
    )


def write_table(readme: Path) -> None:
    """Put the table between its marks in README."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme} lacks the marks {BEGIN} and {END}.")
    write_text(readme, f"{before}{BEGIN}\n{table()}\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; all if none")
    parser.add_argument("--commonsense", type=Path, help="folder of LLM-Adapters' tasks")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="where cells are kept")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="cells at once over one base")
    parser.add_argument("--confirm", type=int, metavar="N", help="on N fresh seeds; with --width at most")
    parser.add_argument(
        "--width", type=float, help="until intervals are no wider than ± this, in nats per token"
    )
    parser.add_argument(
        "--tuning-seeds", type=int, default=TUNING_SEEDS, help="where a rate is not known yet"
    )
    parser.add_argument("--off-seeds", type=int, default=8, help="seeds at wrong rates; 0 for none")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="held out, of each commonsense task")
    parser.add_argument(
        "--home-examples", type=int, default=REQUESTS, help="held out of home, with --confirm"
    )
    parser.add_argument("--set", nargs="+", metavar="KEY=VALUE", help="of the recipe, with --confirm")
    parser.add_argument(
        "--dtype", help="of the base, with --confirm; float32 is faster on a CPU that only emulates bfloat16"
    )
    parser.add_argument(
        "--general", action="store_true", help="with --confirm: the loss on general text, too"
    )
    parser.add_argument("--methods", help=f"with --confirm; default: {','.join((*METHODS, *VARIANTS))}")
    parser.add_argument(
        "--judge", type=Path, metavar="DIR", help="what there is of one task's stopped confirmation"
    )
    parser.add_argument("--table", action="store_true", help="only write README's table")
    wanted = parser.parse_args(arguments)
    if wanted.width is not None and wanted.confirm is None:
        parser.error("--width is for --confirm N, which is the most seeds")
    unknown = set(wanted.tasks) - set(TASKS)
    if unknown:
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    if wanted.judge is not None:
        if len(wanted.tasks) != 1:
            parser.error("--judge DIR is for one task; name it")
        judge_stopped(wanted.tasks[0], wanted.judge)
    elif not wanted.table:
        for task in wanted.tasks or SMALL:
            if wanted.confirm is not None:
                confirm(task, wanted)
                continue
            if task not in SMALL:
                parser.error(f"{task} is for --confirm N")
            run(task, wanted.folder.resolve(), wanted.workers, wanted.commonsense)
    write_table(ROOT / "README.md")


if __name__ == "__main__":
    main()
