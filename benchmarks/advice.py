"""Is the advice true here? The two pieces that matter most, each as one ``moslora compare`` on the demo's data.

``rate``: LoRA's best learning rate over full fine-tuning's, said to be about 10, and about 15 in runs below 100 steps.
``targets``: attention alone, MLPs alone and all linear layers at about the same number of trained parameters.
Each continues if stopped. What it found is kept in ``benchmarks/results/advice-NAME.json``.

    python benchmarks/advice.py [rate] [targets] [--folder DIR] [--seeds N] [--steps N] [--rates LIST]
        [--dtype NAME] [--workers N]
    python benchmarks/advice.py --commands     prints the same as command lines, and runs nothing
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS

from moslora.comparison.compare import compare
from moslora.display import Display
from moslora.files import write_text
from moslora.training.provenance import collect_hardware

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "compare-demo.yaml"
STEPS, SEEDS, VALIDATION, EXAMPLES = 20, 3, 32, 80
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Ranks that give SmolLM2-135M about as many trained parameters: 3840, 6336 and 10,176 for each rank and layer.
TARGETS: dict[str, dict[str, Any]] = {
    "all": {"r": 12, "target_modules": [*ATTENTION, *MLP]},
    "mlp": {"r": 19, "target_modules": MLP},
    "attention": {"r": 32, "target_modules": ATTENTION},
}
RATES: dict[str, tuple[float, ...]] = {
    "rate": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 9e-3),
    "targets": (1e-3, 3e-3, 9e-3),
}


def methods_of(question: str, folder: Path) -> list[str]:
    """Return the methods that a question compares, the baseline first; configurations are written into ``folder``."""
    if question == "rate":
        return ["lora", "moslora", "full"]
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, changes in TARGETS.items():
        file = folder / f"{name}.json"
        about = {"peft_type": "LORA", "lora_alpha": 32, "lora_dropout": 0.0, **changes}
        write_text(file, json.dumps(about, indent=1) + "\n")
        names.append(str(file))
    return names


def command(question: str, folder: Path, wanted: argparse.Namespace) -> str:
    """Return the comparison as a command line."""
    words = ["moslora", "compare", f"recipes/{RECIPE}", *settings_of(wanted)]
    words += ["--methods", ",".join(methods_of(question, folder / "methods"))]
    words += ["--learning-rates", ",".join(f"{rate:g}" for rate in rates_of(question, wanted))]
    words += ["--seeds", str(wanted.seeds), "--steps", str(wanted.steps), "--validation", str(VALIDATION)]
    words += ["--examples", str(EXAMPLES), "--out", str(folder / question)]
    return shlex.join(words)


def settings_of(wanted: argparse.Namespace) -> list[str]:
    """Return what is told the recipe; the loss on general text would take as long again as a training."""
    return [f"model.dtype={wanted.dtype}", "evaluation.also=[]"]


def rates_of(question: str, wanted: argparse.Namespace) -> tuple[float, ...]:
    """Return the learning rates that a question tries."""
    return tuple(float(rate) for rate in wanted.rates.split(",")) if wanted.rates else RATES[question]


def run(question: str, folder: Path, wanted: argparse.Namespace) -> None:
    """Compare, and keep what was found."""
    directory, verdict = compare(
        [str(ROOT / "recipes" / RECIPE), *settings_of(wanted)],
        Display(),
        methods=methods_of(question, folder / "methods"),
        seeds=wanted.seeds,
        rates=rates_of(question, wanted),
        steps=wanted.steps,
        validation=VALIDATION,
        examples=EXAMPLES,
        out=folder / question,
        workers=wanted.workers,
    )
    if verdict is None:
        raise SystemExit(f"{directory} has no verdict.")
    found = json.loads((directory / "results.json").read_text())
    identity = json.loads((directory / "compare.json").read_text())
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "name": question,
        "command": f"python benchmarks/advice.py {question} --seeds {wanted.seeds} --steps {wanted.steps}"
        + f" --dtype {wanted.dtype}"
        + (f" --rates {wanted.rates}" if wanted.rates else ""),
        "steps": wanted.steps,
        "seeds": wanted.seeds,
        "targets": TARGETS if question == "targets" else None,
        **{key: found[key] for key in ("baseline", "base_loss", "contrasts", "sentences", "cautions")},
        "methods": [
            {
                **{
                    key: method[key]
                    for key in ("name", "best_rate", "at_edge", "stable", "score", "interval")
                },
                "trainable_parameters": method["trainable_parameters"],
                "points": method["points"],
            }
            for method in found["methods"]
        ],
        "versions": identity["versions"],
        "hardware": collect_hardware(),
    }
    write_text(RESULTS / f"advice-{question}.json", json.dumps(record, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(RATES)}; all if none"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/advice"), help="where cells are kept")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--rates", default="", help="learning rates, separated by commas, instead of the table's"
    )
    parser.add_argument(
        "--dtype", default="float32", help="of the base; bfloat16 is slow on a CPU that only emulates it"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--commands", action="store_true", help="print command lines only")
    wanted = parser.parse_args(arguments)
    unknown = set(wanted.questions) - set(RATES)
    if unknown:
        parser.error(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(RATES)}")
    for question in wanted.questions or RATES:
        if wanted.commands:
            print(command(question, wanted.folder, wanted))
        else:
            run(question, wanted.folder.resolve(), wanted)


if __name__ == "__main__":
    main()
