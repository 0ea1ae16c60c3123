"""How long does each verb on a small adapter take, beside importing torch?

An adapter and a base of a few small weights are made once. Every contender is a fresh process: ``python -c "import
torch"``, and each verb. They run in random order, round after round; the first round, which fills the file cache and
compiles, is not counted. Times are medians of wall seconds; what is reported is the ratio to ``import torch`` of the
same round, and beside it the ratio of processor seconds. Several source trees can be measured together, to compare
commits.

    python benchmarks/start.py [--rounds N] [--source NAME=FOLDER ...] [--only VERB ...] [--note TEXT] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, SEED, header, over, write
from safetensors.torch import save_file

from moslora.adapters.factors import Adapter, Factors
from moslora.adapters.formats import native

LAYERS, WIDTH, RANK = 4, 64, 8
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FLOOR = "import torch"
# Words in capitals are places. Those that end with a proof by PEFT's own loader cannot take less than its import.
VERBS = {
    "help": "--help",
    "inspect": "inspect ADAPTER",
    "doctor": "doctor ADAPTER --base BASE",
    "import": "import LORA OUT",
    "export --to native": "export ADAPTER OUT --to native",
    "export --to lora": "export ADAPTER OUT --to lora",
    "combine --to native": "combine ADAPTER ADAPTER --out OUT --to native",
    "combine --to lora": "combine ADAPTER ADAPTER --out OUT --to lora",
    "merge": "merge BASE ADAPTER OUT",
}


def prepare(folder: Path) -> dict[str, str]:
    """Make an adapter, a plain LoRA and a base; return where each is."""
    from moslora.adapters.export import export_adapter

    torch.manual_seed(SEED)
    names = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]
    modules = {
        name: Factors(torch.randn(RANK, WIDTH), torch.randn(RANK, RANK), torch.randn(WIDTH, RANK), 1.0)
        for name in names
    }
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": sorted(k.rpartition(".")[2] for k in KINDS)}
    places = {name: folder / name.lower() for name in ("ADAPTER", "LORA", "BASE")}
    places["ADAPTER"].mkdir()
    native.write(Adapter(modules, {**config, "mixer": "kaiming"}), places["ADAPTER"])
    export_adapter(places["ADAPTER"], places["LORA"], "lora")
    places["BASE"].mkdir()
    base = {f"{name}.weight": torch.randn(WIDTH, WIDTH) for name in names}
    save_file(base, places["BASE"] / "model.safetensors")
    (places["BASE"] / "config.json").write_text('{"model_type": "llama"}')
    return {name: str(path) for name, path in places.items()}


def run(command: list[str], source: Path) -> tuple[float, float]:
    """Run a process with a source tree; return wall seconds and processor seconds."""
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        spent = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{command} failed: {errors.read().decode(errors='replace')}")
    return spent, usage.ru_utime + usage.ru_stime


def summarize(spent: list[tuple[float, float]], floor: list[tuple[float, float]]) -> dict[str, Any]:
    """Summarize wall times, and beside them processor times, which other work on the machine disturbs less."""
    wall, processor = (over([one[k] for one in spent], [one[k] for one in floor]) for k in (0, 1))
    return {**wall, "processor": processor}


def commit_of(source: Path) -> str | None:
    """Return the commit of a source tree, with ``+`` if files differ from it."""
    git = ["git", "-C", str(source)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        return None
    changed = subprocess.run([*git, "status", "--short", "."], capture_output=True, text=True, check=False)
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main() -> None:
    """Measure, print a table and write JSON."""
    own = Path(__file__).parents[1] / "src"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="at least 3")
    parser.add_argument("--source", nargs="+", default=[f"now={own}"], metavar="NAME=FOLDER")
    parser.add_argument("--only", nargs="+", choices=list(VERBS), default=list(VERBS), metavar="VERB")
    parser.add_argument(
        "--note", default="", help="kept in the result, for example that the machine was shared"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "start.json")
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error("--rounds must be at least 3.")
    sources = {name: Path(folder).resolve() for name, _, folder in (s.partition("=") for s in options.source)}
    with tempfile.TemporaryDirectory(prefix="start-") as name:
        folder, out = Path(name), Path(name) / "out"
        places = {**prepare(folder), "OUT": str(out)}
        python = [sys.executable, "-W", "ignore"]
        contenders = {("", FLOOR): ([*python, "-c", FLOOR], own)}
        for tree, source in sources.items():
            for verb in options.only:
                words = [places.get(word, word) for word in VERBS[verb].split()]
                contenders[tree, verb] = ([*python, "-m", "moslora", *words], source)
        times: dict[tuple[str, str], list[tuple[float, float]]] = {contender: [] for contender in contenders}
        order = random.Random(SEED)
        for number in range(options.rounds + 1):
            for contender in order.sample(sorted(contenders), len(contenders)):
                spent = run(*contenders[contender])
                shutil.rmtree(out, ignore_errors=True)
                if number:
                    times[contender].append(spent)
            print(f"round {number}/{options.rounds}", flush=True)
    floor = times["", FLOOR]
    result = header(
        (__doc__ or "").splitlines()[0],
        "cpu",
        note=options.note,
        rounds=options.rounds,
        modules=LAYERS * len(KINDS),
        width=WIDTH,
        rank=RANK,
        floor={"command": FLOOR, **summarize(floor, floor)},
        sources={
            tree: {
                "commit": commit_of(source),
                "verbs": {verb: summarize(times[tree, verb], floor) for verb in options.only},
            }
            for tree, source in sources.items()
        },
    )
    write(result, options.out)
    for tree, measured in result["sources"].items():
        for verb, figures in measured["verbs"].items():
            print(
                f"{tree:<10} {verb:<22} {figures['median_seconds']:6.2f} s, {figures['over_floor']:5.2f} × {FLOOR}; "
                f"processor {figures['processor']['over_floor']:5.2f} ×"
            )


if __name__ == "__main__":
    main()
