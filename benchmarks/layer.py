"""One adapted linear layer: time and bytes kept for backward, over the frozen layer's own.

The floor is the frozen layer's forward and the gradient of its input. Contenders run interleaved, in random order.
On a GPU the kernels run beside torch's operations; if a warning says that a size was refused, its row is torch's.
unsloth's path joins where it is installed and there is no dropout (which sends unsloth to PEFT's own layer).

    python benchmarks/layer.py [--quick] [--sizes N|INxOUT …] [--tokens N …] [--ranks N …] [--dropouts P …] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from measure import SEED, header, interleave, over, place, saved_bytes, write
from peft import LoraConfig, get_peft_model

from moslora import MoSLoRAConfig
from moslora.core import ops
from moslora.core.kernels import programs
from moslora.core.kernels import update as kernels
from moslora.models.loading import default_device

FLOOR = "frozen linear"
# Small layers are timed more often: up to ten times, until a round is so many floating-point operations.
ENOUGH = 2e10


def read_size(text: str) -> tuple[int, int]:
    """Read ``N`` or ``INxOUT``."""
    n_in, _, n_out = text.partition("x")
    return int(n_in), int(n_out or n_in)


def unsloth_path(x: torch.Tensor, n_out: int, rank: int) -> Callable[[], torch.Tensor] | None:
    """Return unsloth's LoRA layer on weights of its own; None where there is none, with the reason said."""
    if not x.is_cuda or importlib.util.find_spec("unsloth") is None:
        return None
    try:
        fast_lora = importlib.import_module("unsloth.kernels.fast_lora")
        draw = {"device": x.device, "dtype": x.dtype}
        weight = torch.randn(n_out, x.shape[-1], **draw) / x.shape[-1] ** 0.5
        # As peft_model.py of unsloth holds them: float32, cast inside.
        A = torch.randn(rank, x.shape[-1], device=x.device, requires_grad=True)
        B = torch.zeros(n_out, rank, device=x.device, requires_grad=True)
        path: Callable[[], torch.Tensor] = lambda: fast_lora.LoRA_W.apply(x[None], weight, None, A, B, 2.0)[0]  # noqa: E731
        path().sum().backward()
        x.grad = None
    except Exception as error:  # what a package that patches others may raise is not known here
        print(f"unsloth's path is left out: {type(error).__name__}: {error}", flush=True)
        return None
    return path


def measure_case(
    size: tuple[int, int],
    tokens: int,
    rank: int,
    dropout: float,
    rounds: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, object]:
    """Time one shape."""
    torch.manual_seed(SEED)
    n_in, n_out = size
    rounds *= max(1, min(10, round(ENOUGH / (4 * n_in * n_out * tokens))))
    settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": dropout, "target_modules": ["0"]}
    x = torch.randn(tokens, n_in, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(tokens, n_out, device=device, dtype=dtype)

    def make(
        config: LoraConfig | MoSLoRAConfig | None, fused: bool = True, kernels: bool = False
    ) -> Callable[[], torch.Tensor]:
        torch.manual_seed(SEED)
        model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(n_in, n_out, bias=False))
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
    if kernels.is_available(x, rank) and not programs.INTERPRETED:
        forwards["MoSLoRA, kernels"] = make(MoSLoRAConfig(**settings), kernels=True)
    theirs = unsloth_path(x, n_out, rank) if not dropout else None
    if theirs is not None:
        forwards["unsloth"] = theirs
    steps = {name: lambda f=forward: f().backward(cotangent) for name, forward in forwards.items()}
    times = interleave(steps, rounds, device)
    return {
        "size": n_in,
        "out": n_out,
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
    parser.add_argument(
        "--sizes", type=read_size, nargs="+", default=[(n, n) for n in (576, 1536, 4096, 8192)]
    )
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
        options.sizes, options.tokens, options.ranks, options.rounds = [(576, 192)], [64, 512], [16], 3
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    question = "one adapted linear: time over the frozen layer's, bytes kept for backward"
    result = header(question, options.device, dtype=dtype, rounds=options.rounds)
    out = options.out or place("layer", options.device)
    cases = []
    for shape in itertools.product(options.sizes, options.tokens, options.ranks, options.dropouts):
        cases.append(measure_case(*shape, options.rounds, options.device, getattr(torch, dtype)))
        ours, peft = (cases[-1]["contenders"][name] for name in ("MoSLoRA", "PEFT LoRA"))
        print(
            f"{shape}: ours {ours['over_floor']:.3f} × floor, PEFT LoRA {peft['over_floor']:.3f}", flush=True
        )
        # After every case, so that a run that is cut off leaves what it has.
        write({**result, "cases": cases}, out, say=False)
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
