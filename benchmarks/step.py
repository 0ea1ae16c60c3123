"""One training step: what does the adapter add to the frozen base's own forward and backward?

The floor is the frozen base's forward plus the gradient of its input, through which every adapter has to
go. Contenders run interleaved, in random order, in one process; times are medians, and what is reported is
the ratio to the floor. On a GPU the Triton kernels join.

    python benchmarks/step.py [--rounds N] [--rank R] [--rows N] [--length N] [--model NAME] [--out FILE]
    python benchmarks/step.py --layers 4 --hidden 4096 --inner 14336 --heads 32 --kv-heads 8   (random Llama)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import SEED, header, interleave, over, place, saved_bytes, write
from peft import LoraConfig, get_peft_model

from moslora import MoSLoRAConfig
from moslora.core import ops
from moslora.models.gguf import materialize
from moslora.models.loading import default_device, load_model
from moslora.models.names import resolve_model

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def llama(options: argparse.Namespace) -> torch.nn.Module:
    """Make a Llama of random weights; only its body is run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kind = "float32" if options.device == "cpu" else "bfloat16"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=options.hidden,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads or options.heads,
        dtype=kind if options.dtype == "auto" else options.dtype,
    )
    with torch.device(options.device):
        return LlamaForCausalLM(config).to(getattr(torch, kind if options.dtype == "auto" else options.dtype))


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    for name in ("--layers", "--hidden", "--inner", "--heads", "--kv-heads"):
        parser.add_argument(
            name, type=int, default=None, help="a random Llama of this shape, all but kv-heads"
        )
    parser.add_argument(
        "--dtype", default="auto", help="float32 on a CPU, the checkpoint's or bfloat16 on a GPU"
    )
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--quick", action="store_true", help="a narrow Llama and few rounds")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.hidden, options.inner, options.heads, options.rounds = 2, 128, 256, 4, 3
    shape = [options.layers, options.hidden, options.inner, options.heads]
    if any(shape) and not all(shape):
        parser.error("a shape takes --layers, --hidden, --inner and --heads together")

    device = options.device
    source = None if all(shape) else materialize(resolve_model(options.model), "float32", say=print)
    torch.manual_seed(SEED)
    settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": TARGETS}

    def body(config: LoraConfig | MoSLoRAConfig | None) -> torch.nn.Module:
        model = llama(options) if source is None else load_model(source, options.dtype, False, None, device)
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
    if device.startswith("cuda"):
        for case in ("", ", dropout 0.05"):
            contenders[f"MoSLoRA, kernels{case}"] = contenders[f"MoSLoRA{case}"]
    hidden = contenders["frozen base"][0].config.hidden_size
    dtype = next(contenders["frozen base"][0].parameters()).dtype
    x = torch.randn(options.rows, options.length, hidden, device=device, dtype=dtype, requires_grad=True)

    def forward(name: str) -> torch.Tensor:
        model, fused = contenders[name]
        with ops.fusing(fused), ops.using_kernels("kernels" in name):
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    cotangent = torch.randn_like(x).detach()
    steps = {name: lambda name=name: forward(name).backward(cotangent) for name in contenders}
    times = interleave(steps, options.rounds, device, lambda line: print(line, flush=True))
    result = header(
        "one training step of the transformer body: time over the frozen base's, bytes kept",
        device,
        model=options.model
        if source
        else dict(zip(["layers", "hidden", "inner", "heads"], shape, strict=True)),
        shape={"rows": options.rows, "length": options.length, "rank": options.rank, "targets": TARGETS},
        dtype=str(dtype),
        rounds=options.rounds,
    )
    result["contenders"] = {
        name: {
            **over(spent, times["frozen base"]),
            "saved_bytes": saved_bytes(lambda name=name: forward(name)),
        }
        for name, spent in times.items()
    }
    for name, found in result["contenders"].items():
        print(f"{name:26} {found['over_floor']:.3f} × floor   {found['saved_bytes'] / 1e6:6.0f} MB kept")
    write(result, options.out or place("step", device))


if __name__ == "__main__":
    main()
