"""All speed questions on the GPU of this machine, in one command: what ``make bench-gpu`` runs.

LLaMA-3-8B's shapes in bfloat16, 8192 tokens, dropout 0 and 0.05, the Triton kernels beside torch's operations; unsloth
and Liger join where they are installed. Each script runs in a process of its own and leaves a result named by the GPU
under ``results/``; one that fails is named at the end and the others run all the same. Then the tables are written.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --quick [--model DIR] [--data FILE]    (tiny shapes, on any machine; keeps nothing)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
# A block of LLaMA-3-8B: q and o, k and v, gate and up, down.
SIZES = ("4096", "4096x1024", "4096x14336", "14336x4096")
COMMANDS = {
    "layer": ("--sizes", *SIZES, "--tokens", "8192", "--ranks", "16", "64", "--dropouts", "0", "0.05"),
    "step": (
        *("--layers", "4", "--hidden", "4096", "--inner", "14336", "--heads", "32", "--kv-heads", "8"),
        *("--rows", "4", "--length", "2048", "--dtype", "bfloat16"),
    ),
    "job": (),
    "together": (),
    "scale": (),
    "roofline": (),
}
# Of these, what takes a base and data; and what counts and measures nothing.
TRAINING, COUNTING = ("job", "together"), ("roofline",)


def command(script: str, device: str, out: Path | None, options: argparse.Namespace) -> list[str]:
    """Return the command that runs a script."""
    flags = list(COMMANDS[script]) if not options.quick else []
    if script not in COUNTING:
        flags += ["--device", device, *(["--quick"] if options.quick else [])]
    if script in TRAINING:
        for name in ("model", "data"):
            flags += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    if out is not None:
        flags += ["--out", str(out)]
    return [sys.executable, str(HERE / f"{script}.py"), *flags]


def main() -> None:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes, to see that it runs; keeps nothing"
    )
    parser.add_argument("--model", default=None, help="another base for the jobs")
    parser.add_argument("--data", default=None, help="another file of conversations for the jobs")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        parser.error("torch sees no GPU here. --quick runs the same scripts at tiny shapes on a CPU.")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for script in options.only:
            print(f"== {script}", flush=True)
            out = Path(folder) / f"{script}.json" if options.quick else None
            done = subprocess.run(command(script, device, out, options)).returncode
            if done or (out is not None and not out.is_file()):
                failed.append(script)
    if not options.quick:
        subprocess.run([sys.executable, str(HERE / "table.py")], check=True)
    print(
        "\n".join(f"failed: {script}" for script in failed)
        or f"All of {', '.join(options.only)} ran on {device}."
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
