"""Is the learned mixer worth it? Five methods, four learning rates or more and five seeds on three small tasks.

``home`` teaches a form (requests to JSON), ``facts`` content (invented people), ``commonsense`` neither: its questions
want what a base model knows already. Each is one ``moslora compare`` on SmolLM2-135M; it continues if stopped.
What it found is kept under ``benchmarks/results/evidence/``, one folder per task, every example's loss included, and
in README's table.

    python benchmarks/evidence.py [home] [facts] [commonsense] [--commonsense FOLDER] [--folder DIR] [--workers N]
    python benchmarks/evidence.py --table      writes README's table from what is kept
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

from moslora.comparison.compare import compare
from moslora.comparison.verdict import Cell, judge
from moslora.display import Display
from moslora.evaluation.commonsense.questions import read_questions, write_answer_texts
from moslora.files import write_text
from moslora.training.provenance import collect_hardware

ROOT = Path(__file__).resolve().parents[1]
KEPT = RESULTS / "evidence"
METHODS = ("lora", "lora-matched", "frozen-mixer", "moslora", "moslora-orthogonal")
RATES = (1e-3, 3e-3, 9e-3, 2.7e-2)
SEEDS = 5
# Each task's recipe and overrides, steps, examples set aside for choosing rates, held-out examples, and rates. On
# commonsense LoRA was best at the lowest of the four, so all methods got one below.
TASKS: dict[str, tuple[list[str], int, int, int, tuple[float, ...]]] = {
    "home": (["compare-demo.yaml", "model.dtype=bfloat16"], 20, 32, 80, RATES),
    "facts": (["evidence-facts.yaml"], 32, 12, 40, RATES),
    "commonsense": (["evidence-commonsense.yaml"], 12, 24, 60, (3e-4, *RATES)),
}
COMMONSENSE = ("ARC-Easy", "ARC-Challenge", "openbookqa")
BEGIN, END = "<!-- evidence -->", "<!-- /evidence -->"


def prepare_commonsense(source: Path, folder: Path) -> list[str]:
    """Write the questions as a recipe reads them: all of training, and twenty of each task's test.

    Returns:
        What the recipe must be told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = [question for task in COMMONSENSE for question in read_questions(source, task, split="train")]
    heldout = [question for task in COMMONSENSE for question in read_questions(source, task, limit=20)]
    write_answer_texts(train, folder / "train.jsonl")
    write_answer_texts(heldout, folder / "heldout.jsonl")
    return [f"data.train={folder / 'train.jsonl'}", f"data.heldout={folder / 'heldout.jsonl'}"]


def run(task: str, folder: Path, workers: int, commonsense: Path | None) -> None:
    """Compare on one task and keep what was found."""
    (recipe, *overrides), steps, validation, examples, rates = TASKS[task]
    if task == "commonsense":
        if commonsense is None:
            raise SystemExit(
                f"commonsense wants --commonsense FOLDER with LLM-Adapters' folders {', '.join(COMMONSENSE)}."
            )
        overrides += prepare_commonsense(commonsense, folder / "commonsense-data")
    directory, verdict = compare(
        [str(ROOT / "recipes" / recipe), *overrides],
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
    stored = [json.loads(file.read_text()) for file in sorted((directory / "cells").glob("*.json"))]
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
    target = KEPT / task
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "results.json", json.dumps(record, indent=1) + "\n")
    rounded = [
        {k: [round(x, 5) for x in v] if k in ("validation", "test") and v else v for k, v in cell.items()}
        for cell in stored
    ]
    lines = ",\n".join(json.dumps(cell, separators=(",", ":")) for cell in rounded)
    write_text(target / "cells.json", f"[\n{lines}\n]\n")
    # Places on the machine that ran it say nothing to a reader.
    page = (directory / "report.html").read_text(encoding="utf-8")
    page = page.replace(str(directory.parent), "runs/evidence")
    write_text(target / "report.html", re.sub(r"/[^\s\"'<>]*/recipes/", "recipes/", page))


def signed(low: float, high: float) -> str:
    """Write an interval."""
    return f"{low:+.3f} to {high:+.3f}"


def table() -> str:
    """Return README's table and the answers to the three questions, from what is kept."""
    lines = [
        "| task | method | best rate | held-out loss | minus LoRA's, 95 % | p | stable rates |",
        "|---|---|---|---|---|---|---|",
    ]
    learned, better, ranges = [], [], []
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
                f"{contrast['p_corrected']:.2f}" if contrast else "",
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
        spans = {m["name"]: m["stable"] and m["stable"][1] / m["stable"][0] for m in found["methods"]}
        ranges.append(
            f"{task}: "
            + ", ".join(f"`{name}` {'none' if not span else f'{span:.3g}×'}" for name, span in spans.items())
        )
    answers = [
        ("Is the learned mixer better than its frozen start?", learned),
        ("Is either better than LoRA at LoRA's best rate?", better),
        ("Is the stable range of rates wider? (highest ÷ lowest of those tried)", ranges),
    ]
    parts = ["\n".join(lines)] + [f"*{question}* {'; '.join(said)}." for question, said in answers if said]
    return "\n\n".join(parts)


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
    parser.add_argument("--table", action="store_true", help="only write README's table")
    wanted = parser.parse_args(arguments)
    unknown = set(wanted.tasks) - set(TASKS)
    if unknown:
        parser.error(f"unknown tasks {', '.join(sorted(unknown))}; choose from {', '.join(TASKS)}")
    if not wanted.table:
        for task in wanted.tasks or TASKS:
            run(task, wanted.folder.resolve(), wanted.workers, wanted.commonsense)
    write_table(ROOT / "README.md")


if __name__ == "__main__":
    main()
