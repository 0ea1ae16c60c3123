"""One adapted linear layer: time and bytes kept for backward, over the frozen layer's own.

The floor is the frozen layer's forward and the gradient of its input. Contenders run interleaved, in random order.
On a GPU the kernels run beside torch's operations; if a warning says that a size was refused, its row is torch's.

    python benchmarks/layer.py [--quick] [--sizes N …] [--tokens N …] [--ranks N …] [--dropouts P …] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from measure import RESULTS, SEED, header, interleave, over, saved_bytes, write
from peft import LoraConfig, get_peft_model

from moslora import MoSLoRAConfig, kernels, ops
from moslora.models import default_device

FLOOR = "frozen linear"
# Small layers are timed more often: up to ten times, until a round is so many floating-point operations.
ENOUGH = 2e10


def measure_case(
    size: int, tokens: int, rank: int, dropout: float, rounds: int, device: str, dtype: torch.dtype
) -> dict[str, object]:
    """Time one shape."""
    torch.manual_seed(SEED)
    rounds *= max(1, min(10, round(ENOUGH / (4 * size * size * tokens))))
    settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout, "target_modules": ["0"]}
    x = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(tokens, size, device=device, dtype=dtype)

    def make(
        config: LoraConfig | MoSLoRAConfig | None, fused: bool = True, kernels: bool = False
    ) -> Callable[[], torch.Tensor]:
        torch.manual_seed(SEED)
        model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False))
        model = model.to(device, dtype).requires_grad_(False)
        if config is not None:
            model = get_peft_model(model, config).train()

        def forward() -> torch.Tensor:
            with contextlib.nullcontext() if fused else ops.fusing(False), ops.using_kernels(kernels):
                out: torch.Tensor = model(x)
            return out

        return forward

    forwards = {
        FLOOR: make(None),
        "PEFT LoRA": make(LoraConfig(**settings)),
        "PEFT DoRA": make(LoraConfig(**settings, use_dora=True)),
        "mixer as a chain": make(MoSLoRAConfig(**settings), fused=False),
        "MoSLoRA": make(MoSLoRAConfig(**settings)),
    }
    if kernels.is_available(x, rank) and not kernels.INTERPRETED:
        forwards["MoSLoRA, kernels"] = make(MoSLoRAConfig(**settings), kernels=True)
    steps = {name: lambda f=forward: f().backward(cotangent) for name, forward in forwards.items()}
    times = interleave(steps, rounds, device)
    return {
        "size": size,
        "tokens": tokens,
        "rank": rank,
        "dropout": dropout,
        "rounds": rounds,
        "contenders": {
            name: {**over(spent, times[FLOOR]), "saved_bytes": saved_bytes(forwards[name])}
            for name, spent in times.items()
        },
    }


def main() -> None:
    """Measure every combination and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[576, 1536, 4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 4096, 16384])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--quick", action="store_true", help="few small shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.tokens, options.ranks, options.rounds = [576], [64, 512], [16], 3
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    question = "one adapted linear: time over the frozen layer's, bytes kept for backward"
    result = header(question, options.device, dtype=dtype, rounds=options.rounds)
    cases = []
    for shape in itertools.product(options.sizes, options.tokens, options.ranks, options.dropouts):
        cases.append(measure_case(*shape, options.rounds, options.device, getattr(torch, dtype)))
        ours, peft = (cases[-1]["contenders"][name] for name in ("MoSLoRA", "PEFT LoRA"))
        print(
            f"{shape}: ours {ours['over_floor']:.3f} × floor, PEFT LoRA {peft['over_floor']:.3f}", flush=True
        )
        # After every case, so that a run that is cut off leaves what it has.
        write({**result, "cases": cases}, options.out or RESULTS / f"layer-{options.device}.json", say=False)
    print(f"Wrote {options.out or RESULTS}")


if __name__ == "__main__":
    main()
