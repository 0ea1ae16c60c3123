"""How does the cost of a training step grow with tokens, rank, width, depth and the number of adapters?

A random Llama is changed along one axis at a time, the others staying where they are. At each point the frozen base
(the floor), PEFT's LoRA and MoSLoRA run interleaved, in random order (on a CPU by processor time of one thread, which
others on the machine disturb less than the clock); and the products that only a mixer needs (M·A in both passes and the
gradients of M and A out of that of M·A, or their like of r²·tokens where tokens are fewer than inputs) are timed by
themselves.

    python benchmarks/scale.py [--quick] [--rounds N] [--device D] [--out FILE]
    python benchmarks/scale.py --plot     (only draws docs/scale.svg from what was measured)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import SEED, header, interleave, over, place, write
from peft import LoraConfig, get_peft_model

from moslora import MoSLoRAConfig
from moslora.core import ops
from moslora.models.loading import default_device

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
FLOOR, PEFT, OURS, MIXER = "frozen base", "PEFT LoRA", "MoSLoRA", "mixer alone"
CENTRE = {"tokens": 256, "rank": 16, "width": 512, "depth": 4, "loaded": 1, "active": 1}
AXES = {
    "rank": (4, 8, 16, 32, 64, 128, 256),
    "tokens": (64, 128, 256, 512, 1024),
    "width": (256, 512, 1024),
    "depth": (1, 2, 4, 8),
    "loaded": (1, 2, 4, 8),  # adapters in the model, one of them active
    "active": (1, 2, 4, 8),  # adapters that act and train together
}
QUICK = {name: values[:2] for name, values in AXES.items()}
LABELS = {
    "tokens": "tokens",
    "rank": "rank",
    "width": "width",
    "depth": "layers",
    "loaded": "adapters loaded, one active",
    "active": "adapters active at once",
}


def llama(width: int, depth: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Make a Llama of random weights; only its body is run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=4096,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def measure_point(point: dict[str, int], rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Time one point."""
    settings = {"r": point["rank"], "lora_alpha": 2 * point["rank"], "target_modules": TARGETS}
    adapters = [f"a{index}" for index in range(max(point["loaded"], point["active"]))]
    x = torch.randn(1, point["tokens"], point["width"], device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn_like(x).detach()

    def body(config: LoraConfig | MoSLoRAConfig | None) -> torch.nn.Module:
        model = llama(point["width"], point["depth"], device, dtype).requires_grad_(False)
        if config is not None:
            peft = get_peft_model(model, config, adapter_name=adapters[0])
            for name in adapters[1:]:
                peft.add_adapter(name, config)
            peft.base_model.set_adapter(adapters[: point["active"]])
            model = peft.base_model.model
        return model.model.train()

    def step(model: torch.nn.Module) -> Callable[[], None]:
        return lambda: model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(cotangent)

    ours = body(MoSLoRAConfig(**settings))
    contenders = {
        FLOOR: step(body(None)),
        PEFT: step(body(LoraConfig(**settings))),
        OURS: step(ours),
        MIXER: mixer_alone(ours, adapters[: point["active"]], point["tokens"]),
    }
    times = interleave(contenders, rounds, device, clock=time.process_time)
    found = {name: over(spent, times[FLOOR]) for name, spent in times.items()}
    for name, spent in times.items():
        beyond = [a - b for a, b in zip(spent, times[FLOOR], strict=True)]
        found[name]["seconds_beyond_floor"] = statistics.median(beyond) if name in (PEFT, OURS) else None
    share = [a / b for a, b in zip(times[MIXER], times[OURS], strict=True)]
    return {**point, "contenders": found, "mixer_share": statistics.median(share)}


def mixer_alone(model: torch.nn.Module, adapters: list[str], tokens: int) -> Callable[[], None]:
    """Return what runs all products of a step that are there for M's sake, and nothing else."""
    composed, chained = [], []
    for module in model.modules():
        if hasattr(module, "moslora_M"):
            for name in adapters:
                A, M = (factor.detach() for factor in module.factors(name)[:2])
                if ops.chains(tokens, A.shape[1]):
                    chained.append((M, A.new_ones(tokens, len(M)), A.new_ones(tokens, len(M))))
                else:
                    composed.append((A, M, torch.randn_like(A)))

    def run() -> None:
        for A, M, dlow in composed:
            _ = M @ A  # (r, in), forward
            _ = M @ A  # (r, in), backward
            _ = M.T @ dlow  # (r, in), dA
            _ = dlow @ A.T  # (r, r), dM
        for M, K, D in chained:
            _ = K @ M.T  # (tokens, r), forward
            _ = K @ M.T  # (tokens, r), backward
            _ = D @ M  # (tokens, r)
            _ = D.T @ K  # (r, r), dM

    return run


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw one panel for each axis: milliseconds of the floor, and of what comes on top of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "moslora"  # the same result gives the same file
    axes = [axis for axis in AXES if axis in result["axes"]]
    figure, panels = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained", sharey=True)
    lines = (
        (FLOOR, "frozen base", "#888888", "--"),
        (PEFT, "PEFT's LoRA on top", "#d95f02", "-"),
        (OURS, "MoSLoRA on top", "#1b6ca8", "-"),
        (MIXER, "of that, for the mixer alone", "#1b6ca8", ":"),
    )
    for panel, axis in zip(panels.flat, axes, strict=False):
        points = result["axes"][axis]
        xs = [point[axis] for point in points]
        for name, label, colour, style in lines:
            key = "median_seconds" if name in (FLOOR, MIXER) else "seconds_beyond_floor"
            ys = [1e3 * point["contenders"][name][key] for point in points]
            shown = [(x, y) for x, y in zip(xs, ys, strict=True) if y > 0]
            if shown:  # a difference of two timings may be below nothing
                panel.plot(
                    *zip(*shown, strict=True), style, color=colour, marker="o", markersize=3.5, label=label
                )
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis])
        panel.set_xticks(xs, [str(x) for x in xs])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    for row in panels:
        row[0].set_ylabel("ms a step" if result["device"] != "cpu" else "ms of one core a step")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    print(f"Wrote {out}")


def main() -> None:
    """Measure along every axis and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default=None, help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--quick", action="store_true", help="two narrow points of each axis")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", action="store_true", help="draw what was measured, and stop")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "docs" / "scale.svg")
    options = parser.parse_args()
    out = options.out or place("scale", options.device)
    if options.plot:
        plot(json.loads(out.read_text(encoding="utf-8")), options.figure)
        return
    centre, axes, rounds = dict(CENTRE), dict(AXES), options.rounds
    if options.quick:
        centre |= {"tokens": 16, "width": 64, "depth": 1, "rank": 4}
        axes, rounds = QUICK | {"width": (64, 128), "tokens": (8, 16)}, 2
    torch.set_num_threads(1)
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    question = "one training step: how its cost grows with tokens, rank, width, depth and adapters"
    result = header(question, options.device, dtype=dtype, rounds=rounds, centre=centre, targets=TARGETS)
    result["axes"] = {}
    for axis, values in axes.items():
        result["axes"][axis] = []
        for value in values:
            found = measure_point({**centre, axis: value}, rounds, options.device, getattr(torch, dtype))
            result["axes"][axis].append(found)
            one = found["contenders"]
            print(
                f"{axis} {value}: ours {one[OURS]['over_floor']:.3f} × floor, PEFT {one[PEFT]['over_floor']:.3f}, "
                f"mixer {found['mixer_share']:.2%} of ours",
                flush=True,
            )
            # After every point, so that a run that is cut off leaves what it has.
            write(result, out, say=False)
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
