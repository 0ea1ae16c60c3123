"""What does merging on disk cost beside copying the same bytes, and beside PEFT?

A Llama of random bfloat16 weights, several shards, and an adapter on all its linear layers are made once. Contenders,
each a process of its own so that peak memory can be told apart, run in random order, round after round: ``cp``,
``moslora merge``, and PEFT's ``merge_and_unload`` with ``save_pretrained``. Starting Python with what ``moslora merge``
imports is timed beside them. Wall times are medians; what is reported is the ratio to ``cp``.

    python benchmarks/merge.py [--gigabytes N] [--rounds N] [--rank R] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEED = 0
WIDTH, INNER, VOCABULARY = 2048, 5632, 32000

WITH_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).save_pretrained(out, max_shard_size="1GB")
"""


def prepare(folder: Path, gigabytes: float, rank: int) -> None:
    """Write base and adapter."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from moslora import MoSLoRAConfig
    from moslora.adapters.export import export_adapter

    per_layer = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
    layers = max(1, round((gigabytes * 1e9 - 4 * WIDTH * VOCABULARY) / per_layer))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    arguments = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    get_peft_model(model, MoSLoRAConfig(**arguments)).save_pretrained(folder / "native")
    export_adapter(folder / "native", folder / "lora")


def run(command: list[str]) -> tuple[float, float]:
    """Run a process; return wall seconds and peak megabytes."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        raise RuntimeError(f"{command} failed: {process.stderr.read().decode() if process.stderr else ''}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary one by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge.json")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-", dir=wanted.folder) as name:
        folder = Path(name)
        # A process of its own: a child's peak memory counts from its parent's, which so stays small.
        maker = multiprocessing.get_context("spawn").Process(
            target=prepare, args=(folder, wanted.gigabytes, wanted.rank)
        )
        maker.start()
        maker.join()
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        base, out = str(folder / "base"), folder / "out"
        python = [sys.executable, "-W", "ignore"]
        contenders = {
            "cp": ["cp", "-r", base, str(out)],
            "moslora merge": [*python, "-m", "moslora", "merge", base, str(folder / "native"), str(out)],
            "PEFT merge_and_unload": [*python, "-c", WITH_PEFT, base, str(folder / "lora"), str(out)],
            "imports of moslora merge": [*python, "-c", "import torch, moslora.adapters.merge"],
        }
        rounds: dict[str, list[tuple[float, float]]] = {contender: [] for contender in contenders}
        order = random.Random(SEED)
        for number in range(wanted.rounds + 1):  # the first warms the file cache up and is not counted
            for contender in order.sample(sorted(contenders), len(contenders)):
                measured = run(contenders[contender])
                shutil.rmtree(out, ignore_errors=True)
                if number:
                    rounds[contender].append(measured)
                print(f"round {number} {contender}: {measured[0]:.2f} s, {measured[1]:.0f} MB", flush=True)
    from moslora.files import write_text
    from moslora.training.provenance import collect_hardware, collect_versions

    floor = statistics.median(seconds for seconds, _ in rounds["cp"])
    results = {
        contender: {
            "seconds": statistics.median(seconds for seconds, _ in measured),
            "ratio_to_cp": statistics.median(seconds for seconds, _ in measured) / floor,
            "peak_megabytes": max(peak for _, peak in measured),
            "all_seconds": [seconds for seconds, _ in measured],
        }
        for contender, measured in rounds.items()
    }
    record = {
        "question": (__doc__ or "").splitlines()[0],
        "bytes": size,
        "rounds": wanted.rounds,
        "rank": wanted.rank,
        "seed": SEED,
        "results": results,
        "hardware": collect_hardware(),
        "versions": collect_versions(),
    }
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(wanted.out, json.dumps(record, indent=2) + "\n")
    for contender, figures in results.items():
        print(
            f"{contender:<26} {figures['seconds']:8.2f} s {figures['ratio_to_cp']:7.2f} × cp "
            f"{figures['peak_megabytes']:8.0f} MB"
        )


if __name__ == "__main__":
    main()
