"""Which share of each factor's entries does a short QLoRA through TRL move?

TRL holds what it trains over a quantized base in bfloat16, where a step can round to nothing. The demo's model is
loaded in nf4 through bitsandbytes, and trained by TRL's SFTTrainer on the demo's requests: PEFT's LoRA, mixers of two
starts, and both with DoRA's magnitude, all else being TRL's defaults. An entry has moved if what would be saved of it
differs between before and after. Wants bitsandbytes: ``pip install 'moslora[gguf,quant]'``.

    python benchmarks/moves.py [--base MODEL] [--rank R] [--steps N] [--learning-rate X] [--device cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from moslora import MoSLoRAConfig
from moslora.models.gguf import materialize
from moslora.models.names import resolve_model

DATA = Path(__file__).resolve().parent.parent / "recipes" / "home" / "train.jsonl"
FACTOR = re.compile(r"lora_(A|M|B|magnitude)")
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "LoRA": (LoraConfig, {}),
    "MoSLoRA, kaiming": (MoSLoRAConfig, {}),
    "MoSLoRA, orthogonal": (MoSLoRAConfig, {"mixer": "orthogonal"}),
    "LoRA with DoRA": (LoraConfig, {"use_dora": True}),
    "MoSLoRA, kaiming, with DoRA": (MoSLoRAConfig, {"use_dora": True}),
}


def factors(model: Any) -> dict[str, torch.Tensor]:
    """Return every factor as a file would have it."""
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def train(method: str, base: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one method and count what moved."""
    cls, own = METHODS[method]
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    torch.manual_seed(measure.SEED)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch,
            max_length=256,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=options.device == "cpu",
            seed=measure.SEED,
            model_init_kwargs={"device_map": {"": options.device}},
        ),
        train_dataset=Dataset.from_list([{"messages": row["messages"]} for row in rows]),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        peft_config=cls(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            **own,
        ),
    )
    before, started = factors(trainer.model), time.perf_counter()
    trainer.train()
    moved: dict[str, list[int]] = {}
    for name, end in factors(trainer.model).items():
        counts = moved.setdefault(FACTOR.search(name)[1], [0, 0])  # type: ignore[index]
        counts[0] += int((before[name] != end).sum())
        counts[1] += end.numel()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    return {
        "moved": {factor: {"share": n / total, "entries": total} for factor, (n, total) in moved.items()},
        "trained_in": sorted(str(dtype).removeprefix("torch.") for dtype in dtypes),
        "losses": [losses[0], losses[-1]],
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Parse the command line, train each method and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = str(materialize(resolve_model(options.base), "float32", say=print).path)
    settings = {
        "base": options.base,
        "quantization": "nf4",
        "optimizer": "AdamW, TRL's defaults",
        "data": DATA.name,
    }
    settings |= {name: getattr(options, name) for name in ("rank", "steps", "batch", "learning_rate")}
    result = measure.header((__doc__ or "").splitlines()[0], options.device, **settings)
    result["contenders"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            found = result["contenders"][method] = train(method, base, Path(folder), options)
            shares = ", ".join(f"{factor} {one['share']:.2%}" for factor, one in found["moved"].items())
            print(f"{method}: {shares}", flush=True)
    measure.write(result, options.out or measure.place("moves", options.device))


if __name__ == "__main__":
    main()
