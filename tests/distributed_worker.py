"""One of several processes that train a tiny adapted Llama together; tests/test_distributed.py starts them.

``python distributed_worker.py FOLDER RANK WORLD_SIZE`` trains in each of the ``WAYS``, saves the adapter into
FOLDER/WAY, loads it into a fresh model that is spread in the same way, and leaves what happened in FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tiny
from moslora import MoSLoRAConfig

ROWS, STEPS = 4, 3
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def adapted(seed: int = 1) -> PeftModel:
    base = tiny.llama()
    torch.manual_seed(seed)
    config = MoSLoRAConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["norm"], init_lora_weights=False
    )
    return get_peft_model(base, config)


def train(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """Train on this process's share of each batch; the losses are of the whole batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for step in range(STEPS):
        ids = tiny.tokens(rows=ROWS, seed=step)[rank * ROWS // world : (rank + 1) * ROWS // world]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    return losses


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    ids = tiny.tokens(rows=ROWS, seed=9)
    return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def ddp(model: PeftModel) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp1(model: PeftModel) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model: PeftModel) -> nn.Module:
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


WAYS: dict[str, Callable[[PeftModel], nn.Module]] = {"ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2}


def attempt(action: Callable[[], object]) -> str:
    """What an action says when it refuses."""
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def live(way: str, folder: Path, rank: int, world: int) -> dict[str, Any]:
    model = adapted()
    wrapped = WAYS[way](model)
    found: dict[str, Any] = {"losses": train(wrapped, rank, world), "trained": loss_of(wrapped)}
    save = partial(model.save_pretrained, folder, is_main_process=rank == 0)
    found["saving"] = attempt(save)
    if way == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped):  # the way out that the message names
            save()
    dist.barrier()
    if way == "fsdp2":
        found["merging"] = attempt(model.merge_adapter)
        with model.disable_adapter():
            found["disabled"] = loss_of(wrapped)
        found["after"] = loss_of(wrapped)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model.add_adapter("late", MoSLoRAConfig(r=2, target_modules=TARGETS))
        found["late"] = [str(warning.message) for warning in said]
        model.delete_adapter("late")
    if way != "fsdp1":  # a model that is flattened takes in no tensors
        sources = {
            "from file": load_file(folder / "adapter_model.safetensors"),
            "from memory": get_peft_model_state_dict(model),
        }
        for name, tensors in sources.items():
            fresh = adapted(seed=3)
            wrapped = WAYS[way](fresh)
            set_peft_model_state_dict(fresh, tensors)
            found[name] = loss_of(wrapped)
    return found


def main(folder: Path, rank: int, world: int) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {way: live(way, folder / way, rank, world) for way in WAYS}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
