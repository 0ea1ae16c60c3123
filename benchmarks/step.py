"""One training step: what does the adapter add to the frozen base's own forward and backward?

The floor is the frozen base's forward plus the gradient of its input, through which every adapter has to
go. Contenders run interleaved, in random order, in one process; times are medians, and what is reported is
the ratio to the floor.

    python benchmarks/step.py [--rounds N] [--rank R] [--rows N] [--length N] [--model NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from moslora import MoSLoRAConfig, ops
from moslora.models import default_device, load_model, materialise, resolve_model
from moslora.rundir import collect_hardware, collect_versions, write_whole

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SEED = 0


def saved_bytes(step: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that one forward keeps for backward, parameters left out."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not tensor.is_leaf:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(storages.values())


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step-cpu.json")
    options = parser.parse_args()

    device = default_device()
    source = materialise(resolve_model(options.model), "float32", say=print)
    torch.manual_seed(SEED)
    settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": TARGETS}

    def body(config: LoraConfig | MoSLoRAConfig | None) -> torch.nn.Module:
        model = load_model(source, "auto", False, None, device)
        model.requires_grad_(False)
        adapted = model if config is None else get_peft_model(model, config).base_model.model
        return adapted.model.train()  # the transformer without its output head

    contenders: dict[str, tuple[torch.nn.Module, bool]] = {
        "frozen base": (body(None), True),
        "PEFT LoRA": (body(LoraConfig(**settings)), True),
        "MoSLoRA": (body(MoSLoRAConfig(**settings)), True),
        "MoSLoRA, not fused": (body(MoSLoRAConfig(**settings)), False),
        "PEFT LoRA, dropout 0.05": (body(LoraConfig(**settings, lora_dropout=0.05)), True),
        "MoSLoRA, dropout 0.05": (body(MoSLoRAConfig(**settings, lora_dropout=0.05)), True),
    }
    hidden = contenders["frozen base"][0].config.hidden_size
    dtype = next(contenders["frozen base"][0].parameters()).dtype
    x = torch.randn(options.rows, options.length, hidden, device=device, dtype=dtype, requires_grad=True)

    def forward(name: str) -> torch.Tensor:
        model, fused = contenders[name]
        with ops.fusing(fused):
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    def step(name: str) -> float:
        started = time.perf_counter()
        forward(name).backward(cotangent)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    cotangent = torch.randn_like(x).detach()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(SEED)
    for index in range(options.rounds + 1):
        for name in order.sample(sorted(contenders), len(contenders)):
            spent = step(name)
            if index:  # the first round warms up
                times[name].append(spent)
        print(f"round {index}/{options.rounds}", flush=True)

    floor = times["frozen base"]
    result = {
        "question": "one training step of the transformer body: time over the frozen base's, bytes kept",
        "model": options.model,
        "shape": {"rows": options.rows, "length": options.length, "rank": options.rank, "targets": TARGETS},
        "dtype": str(dtype),
        "device": device,
        "rounds": options.rounds,
        "seed": SEED,
        "versions": collect_versions(),
        "hardware": collect_hardware(),
        "contenders": {
            name: {
                "median_seconds": statistics.median(spent),
                # Each round's ratio to the floor of the same round, so that a slow minute hits both.
                "over_floor": statistics.median(a / b for a, b in zip(spent, floor, strict=True)),
                "quartiles": [
                    round(q, 4)
                    for q in statistics.quantiles((a / b for a, b in zip(spent, floor, strict=True)), n=4)
                ],
                "saved_bytes": saved_bytes(lambda name=name: forward(name)),
            }
            for name, spent in times.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, json.dumps(result, indent=2) + "\n")
    for name, found in result["contenders"].items():
        print(f"{name:26} {found['over_floor']:.3f} × floor   {found['saved_bytes'] / 1e6:6.0f} MB kept")
    print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
