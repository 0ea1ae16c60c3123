"""How soon is the studio usable, and does it stay so with 100 runs and 100,000 logged steps?

The command serves the page. Times are wall seconds in the browser, medians and ranges: from asking for the page to the
first list that can be pressed, and from pressing a run or a tab to what it shows. Beside them stand the processor
seconds of the imports, the load of the machine, and the seconds that the server takes for a look at all runs.

    python benchmarks/studio.py [--rounds N] [--note TEXT] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from measure import RESULTS, header, write

RUNS, STEPS = 100, 100_000
PACKAGES = ("gradio", "playwright")


def prepare(root: Path) -> None:
    """Write runs that ended, one of them with many logged steps."""
    from moslora.training.run_directory import RunDirectory

    for number in range(RUNS):
        run = RunDirectory.create(root / "runs", f"run-{number:03d}", "model: base\ndata: rows.jsonl\n")
        steps = STEPS if number == RUNS - 1 else 200
        lines = (
            {
                "step": n + 1,
                "loss": 2 / math.sqrt(n + 1) + 0.1 * math.sin(n),
                "learning_rate": 1e-3,
                "epoch": n / steps,
            }
            for n in range(steps)
        )
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        run.update(
            trainer={"max_steps": steps},
            metrics={"before": {"loss": 3.0}, "after": {"loss": 0.5}},
            timing={"train_seconds": 100.0},
            status="completed",
        )


def imports() -> dict[str, float]:
    """Return wall and processor seconds of importing what the page is made from, in a fresh process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import moslora.studio.page"], check=True)
    spent = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": spent, "cpu_seconds": cpu}


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve the page by the command, and yield where it is."""
    command = [sys.executable, "-m", "moslora", "studio", str(root), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield next(found[0] for line in process.stdout if (found := re.search(r"http\S+", line)))
    finally:
        process.terminate()
        process.wait()


def timed(action: Any, condition: Any) -> float:
    """Return the seconds from an action to what it is to show."""
    started = time.perf_counter()
    action()
    condition()
    return time.perf_counter() - started


def views(browser: Any, url: str) -> dict[str, float]:
    """Open the page afresh and go through it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    entries = page.locator("#runs button")
    found = {"first usable page": timed(lambda: page.goto(url), lambda: entries.nth(RUNS - 1).wait_for())}

    def press(name: str) -> Any:
        return lambda: page.locator("#runs").get_by_text(name, exact=True).click()

    def shown(name: str) -> Any:
        return lambda: page.locator("#run").get_by_role("heading", name=name).wait_for()

    long, short = f"runs/run-{RUNS - 1:03d}", "runs/run-001"
    found[f"a run with {STEPS:,} steps"] = timed(press(long), shown(long))
    found["a run with 200 steps"] = timed(press(short), shown(short))
    page.wait_for_timeout(3000)
    for tab, sign in (("Compare", "Start comparing"), ("Adapters", "Look it over"), ("Chat", "Load")):
        go = page.get_by_role("tab", name=tab, exact=True).first
        found[f"tab {tab}"] = timed(go.click, page.get_by_role("button", name=sign, exact=True).wait_for)
    go = page.get_by_role("tab", name="Train", exact=True).first
    found["tab Train"] = timed(go.click, page.get_by_label("Name of the run").wait_for)
    context.close()
    return found


def looks(root: Path, rounds: int) -> dict[str, float]:
    """Return the server's seconds for a look at all runs: the first one, and the median of later ones."""
    from moslora.studio.runs import Library
    from moslora.studio.watching import run_list
    from moslora.studio.workspace import Workspace

    library = Library(Workspace.open(root))
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run_list(library.runs(), [], "")
        times.append(time.perf_counter() - started)
    return {"first": times[0], "later": median(times[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=RESULTS / "studio.json")
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        root = Path(folder)
        prepare(root)
        taken = [imports() for _ in range(3)]
        look = looks(root, asked.rounds)
        load = os.getloadavg()[0]
        with serving(root) as url, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            views(browser, url)  # imports what is imported late, and fills caches
            rounds = [views(browser, url) for _ in range(asked.rounds)]
            browser_version = browser.version
            browser.close()
    seconds = {
        name: {
            "median": median(r[name] for r in rounds),
            "range": [min(r[name] for r in rounds), max(r[name] for r in rounds)],
        }
        for name in rounds[0]
    }
    result = {
        **header("how soon is the studio usable, and does it stay so with many runs", "cpu", note=asked.note),
        "packages": {name: version(name) for name in PACKAGES} | {"chromium": browser_version},
        "runs": RUNS,
        "steps": STEPS,
        "rounds": asked.rounds,
        "load_average_before": load,
        "imports": taken,
        "server_look_seconds": look,
        "seconds": seconds,
    }
    for name, value in seconds.items():
        print(f"{name}: {value['median']:.2f} s ({value['range'][0]:.2f} to {value['range'][1]:.2f})")
    write(asked.out, result)


if __name__ == "__main__":
    main()
