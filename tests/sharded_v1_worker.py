"""One of two processes that train adapters under FSDP's first version; tests/test_fsdp1.py starts them.

``python sharded_v1_worker.py FOLDER RANK WORLD_SIZE`` leaves the losses of each way, and of one process alone, in
FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import tiny
from moslora import MoSLoRAConfig

ROWS, STEPS = 4, 3
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.weight)


class Mixture(nn.Module):
    """What torch reads without calling a module of its own: an attention's projections and experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = Experts()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.sin(input_ids[..., None] * torch.arange(1, 17))
        return self.experts(self.attention(x, x, x, need_weights=False)[0]).square().mean()


def build(kind: str) -> PeftModel:
    base = Mixture() if kind == "held as parameters" else tiny.llama()
    torch.manual_seed(1)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    if kind != "LoRA":
        settings["mixer"] = "kaiming"  # smaller at first, so that three steps bring the loss down
    if kind == "held as parameters":
        settings |= {"target_modules": ["attention"], "target_parameters": ["experts.weight"]}
    else:
        settings |= LINEAR | ({"use_dora": True} if kind == "DoRA" else {})
    return get_peft_model(base, (LoraConfig if kind == "LoRA" else MoSLoRAConfig)(**settings))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    if isinstance(out, Tensor):
        return out
    return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for step in range(STEPS):
        ids = tiny.tokens(rows=ROWS, seed=step)[rank * ROWS // world : (rank + 1) * ROWS // world]
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def wrapped(model: PeftModel, strategy: str, policy: bool) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        use_orig_params=True,
        device_id=torch.device("cpu"),
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if policy else None,
        sharding_strategy=ShardingStrategy[strategy],
    )


WAYS = [
    (kind, strategy, policy)
    for kind, policies in (
        ("LoRA", [True]),
        ("linear", [True]),
        ("DoRA", [True]),
        ("held as parameters", [True, False]),
    )
    for strategy in ("FULL_SHARD", "NO_SHARD")
    for policy in policies
]


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    results = {}
    for kind, strategy, policy in WAYS:
        model = wrapped(build(kind), strategy, policy)
        losses = train(model, rank, world)
        results[f"{kind}, {strategy}{', policy' * policy}"] = {
            "together": losses,
            "alone": train(build(kind)),
        }
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
