"""Does a confirmation keep its error rate? Two methods that are the same, compared again and again.

Scores are drawn, not trained: a seed's, an example's and their meeting's part, normal or with long tails. Each trial
is settled by the package's own rule (``moslora.metrics.sequential.settle``), on as many seeds as it asks for, and the
share of trials in which a difference is found is counted. Beside it stands the plain rule: stop when the interval at
95 % is narrow enough, and report it. A *peeker* goes on after every verdict that found nothing, to half the width or
twice the seeds, up to three verdicts in all, and counts as wrong if any of them found a difference.

    python benchmarks/sequential.py [--trials N]
    python benchmarks/sequential.py --table      writes the table of docs/compare.md from what is kept
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, write

from moslora.files import write_text
from moslora.metrics.intervals import Difference, paired_difference
from moslora.metrics.sequential import GROWTH, Goal, Look, half_width, settle

KEPT = RESULTS / "sequential.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "compare.md"
BEGIN, END = "<!-- sequential -->", "<!-- /sequential -->"
LEVEL = 0.95
MOST = 120
# Spreads of a seed's, an example's and their meeting's part of a difference, how many examples, the width asked for.
WORLDS: dict[str, tuple[float, float, float, int, float, str]] = {
    "seeds only, about 12 needed": (1.0, 0.0, 0.01, 20, 0.60, "normal"),
    "seeds only, about 20 needed": (1.0, 0.0, 0.01, 20, 0.45, "normal"),
    "seeds only, about 45 needed": (1.0, 0.0, 0.01, 20, 0.30, "normal"),
    "seeds with long tails": (1.0, 0.0, 0.01, 20, 0.45, "student"),
    "seeds of skewed scores": (1.0, 0.0, 0.01, 20, 0.45, "skewed scores"),
    "not identical: a skewed difference of mean 0": (1.0, 0.0, 0.01, 20, 0.45, "skewed"),
    "seeds and 60 examples": (0.5, 1.0, 1.0, 60, 0.35, "normal"),
    "seeds and 60 skewed examples": (0.5, 1.0, 1.0, 60, 0.35, "skewed"),
    "examples are the limit": (0.3, 1.0, 1.0, 60, 0.10, "normal"),
}


def draw(
    rng: np.random.Generator, world: tuple[float, float, float, int, float, str]
) -> np.ndarray[Any, Any]:
    """Draw the differences of two methods, of expectation 0: ``(MOST, examples)``."""
    seed, example, rest, examples, _, shape = world
    shapes: dict[str, Callable[..., Any]] = {
        "normal": rng.standard_normal,
        "student": lambda size: rng.standard_t(3, size) / math.sqrt(3),
        "skewed": lambda size: rng.exponential(1.0, size) - 1.0,
        # Scores of either method are skewed; their difference is not, because the methods are the same.
        "skewed scores": lambda size: (
            (rng.exponential(1.0, size) - rng.exponential(1.0, size)) / math.sqrt(2)
        ),
    }
    part = shapes[shape]
    return seed * part((MOST, 1)) + example * part((1, examples)) + rest * part((MOST, examples))


def plainly(rows: np.ndarray[Any, Any], width: float) -> tuple[int, Difference]:
    """Stop when Student's interval at 95 % is narrow enough, looking at the same growing numbers of seeds."""
    seeds = 5
    while True:
        found = paired_difference(rows[:seeds], LEVEL)
        if half_width(found) <= width or seeds >= len(rows):
            return seeds, found
        seeds = min(math.ceil(seeds * GROWTH), len(rows))


def run(name: str, trials: int) -> dict[str, Any]:
    """Count wrong verdicts in one world."""
    world = WORLDS[name]
    width = world[4]
    rng = np.random.default_rng(sum(map(ord, name)))
    wrong = dict.fromkeys(("plain", "fixed", "width", "peeker"), 0)
    seeds: dict[str, list[int]] = {"plain": [], "width": []}
    for _ in range(trials):
        rows = draw(rng, world)
        many, found = plainly(rows, width)
        wrong["plain"] += found.p < 1 - LEVEL
        seeds["plain"].append(many)
        fixed = settle(rows[:20], Goal(20))
        wrong["fixed"] += differs(fixed.difference)
        looks: list[Look] = []
        goal = Goal(MOST // 2, width)
        for turn in range(3):
            settled = settle(rows, goal, looks)
            if settled.looks is None:
                break
            looks = list(settled.looks)
            found_now = differs(settled.difference)
            if turn == 0:
                wrong["width"] += found_now
                seeds["width"].append(settled.seeds)
            if found_now:
                wrong["peeker"] += 1
                break
            goal = Goal(min(goal.seeds * 2, MOST), (goal.width or width) / 2)
    return {
        "world": name,
        "trials": trials,
        "wrong": {rule: round(count / trials, 4) for rule, count in wrong.items()},
        "error_of_these": round(math.sqrt(0.05 * 0.95 / trials), 4),
        "mean_seeds": {rule: round(float(np.mean(many)), 1) for rule, many in seeds.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Return the table of docs/compare.md."""
    lines = [
        "| drawn | plain | 20 seeds | by width | going on | seeds by width |",
        "|---|---|---|---|---|---|",
    ]
    for world in result["worlds"]:
        wrong = world["wrong"]
        shares = " | ".join(f"{100 * wrong[rule]:.1f} %" for rule in ("plain", "fixed", "width", "peeker"))
        lines.append(f"| {world['world']} | {shares} | {world['mean_seeds']['width']:.0f} |")
    return "\n".join(lines)


def write_table(page: Path, result: dict[str, Any]) -> None:
    """Put the table between its marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks the marks {BEGIN} and {END}.")
    write_text(page, f"{before}{BEGIN}\n{table(result)}\n{END}{after}")


def differs(found: Difference | None) -> bool:
    """Tell whether a difference was found: zero is outside the interval of this look."""
    return found is not None and found.p < 1 - found.level


def main() -> None:
    """Run all worlds and keep what was counted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--worlds", help="only these, separated by ;, the others as they are kept")
    parser.add_argument("--table", action="store_true", help="only write the table from what is kept")
    asked = parser.parse_args()
    if asked.table:
        write_table(PAGE, json.loads(KEPT.read_text(encoding="utf-8")))
        return
    kept = json.loads(KEPT.read_text(encoding="utf-8"))["worlds"] if asked.worlds else []
    known = {world["world"]: world for world in kept}
    for name in asked.worlds.split(";") if asked.worlds else WORLDS:
        known[name] = run(name, asked.trials)
        print(known[name], flush=True)
    worlds = [known[name] for name in WORLDS if name in known]
    result = {"question": (__doc__ or "").splitlines()[0], "level": LEVEL, "worlds": worlds}
    write(result, KEPT, say=False)
    write_table(PAGE, result)


if __name__ == "__main__":
    main()
