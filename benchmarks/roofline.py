"""What can an adapted linear cost on an H100 at best? COMPUTED from bytes and flops, not measured.

Each kernel takes the longer of its flops at 989 TFLOP/s (bf16, dense) and its bytes at 3.35 TB/s, NVIDIA's figures for
the H100 SXM (https://www.nvidia.com/en-us/data-center/h100/), and kernels follow each other. Tensors of rank r, partial
sums included, are counted; launches, caches and drawing the dropout mask are not.

    python benchmarks/roofline.py [--tokens N] [--flops TFLOPS] [--bandwidth TBS] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
ITEM = 2  # bytes of bfloat16


def kernels(name: str, T: int, n_in: int, n_out: int, r: int, dropout: bool) -> list[tuple[float, float]]:
    """Return flops and bytes of each kernel of one forward and backward pass."""
    X, Y, W, H = ITEM * T * n_in, ITEM * T * n_out, ITEM * n_in * n_out, ITEM * T * r
    product = (2.0 * T * n_in * n_out, X + Y + W)
    thin_in, thin_out = 2.0 * T * n_in * r, 2.0 * T * n_out * r
    floor = [product, product]
    if name == "floor":
        return floor
    if name in ("PEFT LoRA", "mixer chain"):
        steps = [
            (thin_in, X + H), (thin_out, H + Y), (0, 2 * Y), (0, 3 * Y),  # A, B, · s, + result
            (0, 2 * Y), (thin_out, Y + H), (thin_out, Y + H), (thin_in, X + H), (thin_in, H + X), (0, 3 * X),
        ]  # fmt: skip
        if dropout:  # a mask of one byte
            steps += [(0, 2 * X + T * n_in), (0, 2 * X + T * n_in)]
        if name == "mixer chain":
            steps += [(2.0 * T * r * r, 2 * H)] * 3
        return floor + steps
    splits, blocks = 8, -(-n_out // 256)
    steps = [(thin_in, X + H), (thin_in, X + H + 8.0 * splits * n_in * r)]  # H, dA'
    if r <= 32:
        steps.append((2 * thin_out, Y + H + 8.0 * (blocks * T + splits * n_out) * r))  # D and dB
    else:
        steps += [(thin_out, Y + H), (thin_out, Y + H + 8.0 * splits * n_out * r)]
    if name == "ours, separate":
        return [*floor, *steps, (thin_out, 2 * Y + H), (thin_in, 2 * X + H)]
    return [*((f + extra, b + H) for (f, b), extra in zip(floor, (thin_out, thin_in), strict=True)), *steps]


def main() -> None:
    parser = argparse.ArgumentParser(description="Count an adapted linear against the roofline.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--flops", type=float, default=989.0, help="TFLOP/s")
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "roofline.json")
    options = parser.parse_args()
    rows = []
    for r in (16, 64):
        for dropout in (False, True):
            total: dict[str, float] = {}
            for n_in, n_out in (*SHAPES, (0, 0)):
                row = {"in": n_in or "all four", "out": n_out or "all four", "r": r, "dropout": dropout}
                for name in ("floor", "PEFT LoRA", "mixer chain", "ours, separate", "ours, fused"):
                    if n_in:
                        steps = kernels(name, options.tokens, n_in, n_out, r, dropout)
                        us = sum(max(f / options.flops, b / options.bandwidth) / 1e6 for f, b in steps)
                        total[name] = total.get(name, 0.0) + us
                        row[name] = {
                            "gflop": round(sum(f for f, _ in steps) / 1e9, 1),
                            "megabytes": round(sum(b for _, b in steps) / 1e6, 1),
                        }
                    else:
                        us, row[name] = total[name], {}
                    row[name] |= {"microseconds": round(us, 1)}
                    floor_us = row["floor"]["microseconds"]
                    row[name]["overhead_percent"] = round(100 * (us / floor_us - 1), 1)
                rows.append(row)
    found = {
        "kind": "COMPUTED from bytes and flops, not measured",
        "tokens": options.tokens, "dtype": "bfloat16", "tflops": options.flops, "terabytes_per_s": options.bandwidth,
        "rows": rows,
    }  # fmt: skip
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| in → out | r | dropout | floor, µs | PEFT LoRA | mixer chain | ours, separate | ours, fused |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        percents = [f"+{row[n]['overhead_percent']} %" for n in list(row)[5:]]
        name = f"{row['in']} → {row['out']}" if row["in"] != "all four" else "all four"
        cells = [name, row["r"], "yes" if row["dropout"] else "no", row["floor"]["microseconds"], *percents]
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
