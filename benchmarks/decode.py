"""Generating token by token with an adapter that is not merged: time over the base's own.

A text model and a LLaVA with a picture, one and eight sequences at once. Contenders generate the same number of tokens,
interleaved in random order; the whole is done in several fresh processes, and the range of their medians is kept.

    python benchmarks/decode.py [--processes N] [--rounds N] [--new-tokens N] [--model NAME|DIR] [--device D] [--quick]
        [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import SEED, header, interleave, over, place, write
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from moslora import MoSLoRAConfig
from moslora.models.loading import default_device, load_model
from moslora.models.names import resolve_model

FLOOR = "base"
BATCHES = (1, 8)
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK, PROMPT = 16, 32
PICTURE = 7  # the token that stands for one patch


def text_model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a language model and a prompt of random tokens, shape ``(1, PROMPT)``."""
    model = load_model(resolve_model(options.model), dtype="float32", device=options.device)
    vocabulary = min(1000, model.config.vocab_size)
    return model, {"input_ids": torch.randint(10, vocabulary, (1, PROMPT), device=options.device)}


def vision_model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a LLaVA of random weights, about as wide as the text model, and a prompt with one picture."""
    layers = 2 if options.quick else 12
    words = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=8192,
    )  # fmt: skip
    pictures = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=64,
        patch_size=16,
    )
    config = LlavaConfig(vision_config=pictures, text_config=words, image_token_index=PICTURE)
    model = LlavaForConditionalGeneration(config).to(options.device).eval()
    patches = (64 // 16) ** 2
    ids = torch.cat([torch.full((1, patches), PICTURE), torch.randint(10, 1000, (1, PROMPT))], dim=1)
    return model, {
        "input_ids": ids.to(options.device),
        "pixel_values": torch.randn(1, 3, 64, 64, device=options.device),
    }


MODELS: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, dict[str, torch.Tensor]]]] = {
    "text": text_model,
    "LLaVA": vision_model,
}


def contenders_of(base: nn.Module) -> dict[str, nn.Module]:
    """Return the base, two adapted copies whose B is not zero, and a merged one."""
    base.requires_grad_(False).eval()
    settings = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": rf".*language_model.*({'|'.join(TARGETS)})",
    }
    if not hasattr(base.config, "vision_config"):
        settings["target_modules"] = TARGETS
    made: dict[str, nn.Module] = {FLOOR: base}
    for name, config in (("PEFT LoRA", LoraConfig), ("MoSLoRA", MoSLoRAConfig)):
        torch.manual_seed(SEED)
        model = get_peft_model(copy.deepcopy(base), config(**settings)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "_B." in key:
                    parameter.normal_(std=0.01)
        made[name] = model
    made["MoSLoRA, merged"] = copy.deepcopy(made["MoSLoRA"]).merge_and_unload()
    return made


def measure_one(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every model and batch once, in this process."""
    torch.set_num_threads(1 if options.device == "cpu" else torch.get_num_threads())
    cases = []
    for kind, make in MODELS.items():
        torch.manual_seed(SEED)
        base, prompt = make(options)
        made = contenders_of(base)
        for batch in BATCHES:
            many = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in prompt.items()}
            many["attention_mask"] = torch.ones_like(many["input_ids"])
            exactly = {"max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens}

            def generate(model: Any, many: dict[str, torch.Tensor] = many, exactly: Any = exactly) -> None:
                with torch.inference_mode():
                    found = model.generate(**many, **exactly, do_sample=False, pad_token_id=0)
                assert found.shape[1] >= exactly["min_new_tokens"]

            works = {name: lambda model=model: generate(model) for name, model in made.items()}
            times = interleave(works, options.rounds, options.device)
            tokens = batch * options.new_tokens
            found = {
                name: {**over(spent, times[FLOOR]), "tokens_per_second": tokens / statistics.median(spent)}
                for name, spent in times.items()
            }
            cases.append({"model": kind, "batch": batch, "contenders": found})
    return cases


def in_processes(options: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Measure in fresh processes, one after the other."""
    found = []
    for number in range(options.processes):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "one.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(file)]
            subprocess.run(command, check=True)
            found.append(json.loads(file.read_text()))
        print(f"process {number + 1} of {options.processes} done", flush=True)
    return found


def together(measured: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put what the processes found beside each other: medians of their medians, and the range."""
    cases = []
    for same in zip(*measured, strict=True):
        contenders = {}
        for name in same[0]["contenders"]:
            each = [one["contenders"][name] for one in same]
            ratios = [one["over_floor"] for one in each]
            contenders[name] = {
                "over_floor": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
                "tokens_per_second": statistics.median(one["tokens_per_second"] for one in each),
            }
        cases.append({"model": same[0]["model"], "batch": same[0]["batch"], "contenders": contenders})
    return cases


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--quick", action="store_true", help="one process, few tokens, to see that it runs")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--one", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.processes, options.rounds, options.new_tokens = 1, 1, 2
    if options.one is not None:
        options.one.write_text(json.dumps(measure_one(options)))
        return
    result = header(
        "generating token by token with an adapter: time over the base's",
        options.device,
        model=options.model if options.model in ("smollm2-135m-instruct",) else "another",
        rank=RANK,
        prompt=PROMPT,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        processes=options.processes,
        threads=1 if options.device == "cpu" else None,
    )
    cases = together(in_processes(options))
    for case in cases:
        told = ", ".join(f"{name} {c['over_floor']:.3f}" for name, c in case["contenders"].items())
        print(f"{case['model']}, batch {case['batch']}: {told}", flush=True)
    write({**result, "cases": cases}, options.out or place("decode", options.device))


if __name__ == "__main__":
    main()
