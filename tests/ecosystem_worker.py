"""One of several processes that train with LoRA and with ours side by side; tests/test_ecosystem.py starts them.

``python ecosystem_worker.py FOLDER GROUP RANK WORLD_SIZE`` trains each case of a group with each method, first alone on
whole batches, then with the others on its share of them, and leaves in FOLDER/RANK.json what happened. FOLDER/base is
a tiny chat model.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kinds
import laws
from ecosystem_scripts import KIND, METHODS, STEPS, causal, configure, language_model, logged

ROWS, RATE = 2, 0.5
LOW = torch.bfloat16


@dataclass
class Spread:
    """A model that several processes hold together, and how it is trained."""

    model: Any
    backward: Callable[[Tensor], object] = lambda loss: loss.backward()
    step: Callable[[], object] | None = None
    is_low: bool = False
    is_whole: bool = False  # whether each process holds all of it


def ddp(model: Any) -> Spread:
    return Spread(DistributedDataParallel(model), is_whole=True)


def fsdp1(
    model: Any, policy: bool = True, strategy: str = "FULL_SHARD", original: bool = True, low: bool = False
) -> Spread:
    """FSDP as Trainer wraps every PEFT model, with PEFT's policy; or the whole model as one unit."""
    wrapped = FullyShardedDataParallel(
        model,
        use_orig_params=original,
        device_id=torch.device("cpu"),
        auto_wrap_policy=fsdp_auto_wrap_policy(model) if policy else None,
        sharding_strategy=ShardingStrategy[strategy],
        mixed_precision=MixedPrecision(param_dtype=LOW) if low else None,
    )
    return Spread(wrapped, is_low=low, is_whole=strategy == "NO_SHARD")


def fsdp2(model: Any, blocks: bool = True, low: bool = False) -> Spread:
    """Each block of the model by itself, then the rest, as torch's tutorials shard."""
    settings = {"mp_policy": MixedPrecisionPolicy(param_dtype=LOW)} if low else {}
    for name, module in model.named_modules():
        if blocks and name.rpartition(".")[0].endswith("layers"):
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    return Spread(model, is_low=low)


def zero(stage: int, low: bool = False) -> dict[str, Any]:
    """DeepSpeed's settings; nothing is too small to be partitioned."""
    return {
        "train_batch_size": ROWS,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": low},
    }


def deepspeed(model: Any, stage: int, low: bool = False) -> Spread:
    import deepspeed as library

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = library.initialize(model=model, optimizer=optimizer, config=zero(stage, low))
    return Spread(engine, engine.backward, engine.step)


def partitioned(build: Callable[[], nn.Module]) -> nn.Module:
    """A base whose weights are partitioned before it is adapted, as transformers loads it for ZeRO-3."""
    import deepspeed as library

    model = build()
    with library.zero.Init(module=model, config_dict_or_path=zero(3)):
        return model


@dataclass
class Case:
    """What is trained together, and how it is spread."""

    spread: partial[Spread]
    kind: str = "Llama"
    more: dict[str, Any] = field(default_factory=dict)
    base: Callable[[Callable[[], nn.Module]], nn.Module] = lambda build: build()
    is_cast: bool = False  # whether what is trained is cast by name, as TRL does, and not told that it trains

    @property
    def is_low(self) -> bool:
        """Whether anything is computed in 16 bits."""
        return self.is_cast or "bf16" in self.kind or bool(self.spread.keywords.get("low"))

    @property
    def methods(self) -> tuple[str, ...]:
        has_own_M = "init_lora_weights" in self.more or self.is_cast
        return ("lora", "moslora") if has_own_M else ("lora", "held", "moslora")


DORA, PISSA = {"use_dora": True}, {"init_lora_weights": "pissa"}
POLICY = "FSDP, PEFT's policy"
TORCH: dict[str, Case] = {
    "DDP": Case(partial(ddp)),
    **{
        f"{POLICY}, {strategy}, use_orig_params={original}": Case(
            partial(fsdp1, strategy=strategy, original=original)
        )
        for strategy in ("FULL_SHARD", "NO_SHARD")
        for original in (True, False)
    },
    f"{POLICY}, bfloat16 base": Case(partial(fsdp1), "Llama, bf16"),
    f"{POLICY}, mixed precision": Case(partial(fsdp1, low=True)),
    f"{POLICY}, embedding": Case(partial(fsdp1), "tied embedding"),
    f"{POLICY}, experts": Case(partial(fsdp1), "Mixtral"),
    f"{POLICY}, DoRA": Case(partial(fsdp1), more=DORA),
    f"{POLICY}, PiSSA": Case(partial(fsdp1), more=PISSA),
    "FSDP, one unit": Case(partial(fsdp1, policy=False)),
    "FSDP, one unit, mixed precision": Case(partial(fsdp1, policy=False, low=True)),
    "FSDP, one unit, cast and sharded before train()": Case(
        partial(fsdp1, policy=False), "Llama, bf16", is_cast=True
    ),
    "FSDP, one unit, attention": Case(partial(fsdp1, policy=False), "Multihead-Attention"),
    "FSDP, one unit, experts": Case(partial(fsdp1, policy=False), "Mixtral"),
    "FSDP2": Case(partial(fsdp2)),
    "FSDP2, bfloat16 base": Case(partial(fsdp2), "Llama, bf16"),
    "FSDP2, mixed precision": Case(partial(fsdp2, low=True)),
    "FSDP2, cast and sharded before train()": Case(partial(fsdp2), "Llama, bf16", is_cast=True),
    "FSDP2, embedding": Case(partial(fsdp2), "tied embedding"),
    "FSDP2, attention": Case(partial(fsdp2, blocks=False), "Multihead-Attention"),
    "FSDP2, experts": Case(partial(fsdp2), "Mixtral"),
    "FSDP2, DoRA": Case(partial(fsdp2), more=DORA),
    "FSDP2, PiSSA": Case(partial(fsdp2), more=PISSA),
}
DEEPSPEED: dict[str, Case] = {
    **{f"ZeRO-{stage}": Case(partial(deepspeed, stage=stage)) for stage in (1, 2, 3)},
    **{f"ZeRO-{stage}, bf16": Case(partial(deepspeed, stage=stage, low=True)) for stage in (2, 3)},
    **{
        f"ZeRO-3, partitioned base{name}": Case(partial(deepspeed, stage=3), more=more, base=partitioned)
        for name, more in (("", {}), (", DoRA", DORA), (", PiSSA", PISSA))
    },
}
GROUPS = {"torch": TORCH, "deepspeed": DEEPSPEED}
# What LoRA says where it cannot.
LORA_SAYS = {
    "FSDP, PEFT's policy, experts": "is invalid for input of size",
    "FSDP, PEFT's policy, DoRA": "tuple index out of range",
    "FSDP, one unit, experts": "is a view and its base or another view of its base has been modified inplace",
    "FSDP2, attention": "Some parameters are not in the module tree",
    "ZeRO-3, partitioned base, DoRA": "must match the size of tensor",
    "ZeRO-3, partitioned base, PiSSA": "must have at least 2 dimensions",
}
# What torch says of a frozen mixer in float32, which shares a group with the base's weights.
HELD_SAYS = {f"{POLICY}, bfloat16 base": "Must flatten tensors with uniform dtype"}
# Trainer's own ways, by the version of FSDP; what is logged and saved is compared.
TRAINERS: dict[str, dict[str, Any]] = {
    "Trainer, DDP": {},
    "Trainer, FSDP": {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
    "Trainer, FSDP, bf16": {
        "bf16": True,
        "fsdp": True,
        "fsdp_config": {"version": 1, "sync_module_states": False},
    },
    "Trainer, FSDP2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "Trainer, FSDP2, bf16": {"bf16": True, "fsdp": True, "fsdp_config": {"version": 2}},
}


def adapted(case: Case, method: str) -> nn.Module:
    kind = kinds.ALL[case.kind]
    cls, own = METHODS[method]
    own = {} if "init_lora_weights" in case.more else own  # the start says what M is
    model = laws.adapt(lambda: case.base(kind.build), cls, **{**kind.settings, **own, **case.more})
    if method == "lora":
        kind.judge(model)
    if not case.is_cast:
        return model.train()
    for p in model.parameters():
        p.data = p.data.to(LOW) if p.requires_grad else p.data
    return model


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """This process's part of each factor that is trained, by its letter; flattened parameters have none."""
    named = [(KIND.search(name), p) for name, p in model.named_parameters() if p.requires_grad]
    whole = (p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for _, p in named)
    return [
        (found[1] if found else "?", p.detach().clone()) for (found, _), p in zip(named, whole, strict=True)
    ]


def train(kind: kinds.Kind, spread: Spread, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Train on this process's share of a batch; the losses are of the whole."""
    model = spread.model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    batch = {n: v[share] if isinstance(v, Tensor) else v for n, v in kind.inputs(kind.dtype).items()}
    before, losses = trained(model), []
    model.train()
    for _ in range(STEPS):
        with torch.autocast("cpu", LOW) if spread.is_low else nullcontext():
            out = model(**batch)
        loss = (out if isinstance(out, Tensor) else out["logits"]).float().square().mean()
        spread.backward(loss)
        (spread.step or optimizer.step)()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    moved: dict[str, list[int]] = {}
    for (letter, start), (_, end) in zip(before, trained(model), strict=True):
        counts = moved.setdefault(letter, [0, 0])
        counts[0] += int((start != end).sum())
        counts[1] += start.numel()
    return {"losses": losses, "moved": moved}


def drift(model: nn.Module, world: int) -> float:
    """How far apart what each process trained is, where each holds all of it."""
    mine = torch.cat([p.flatten() for _, p in trained(model)])
    everyones = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyones, mine)
    return max(float((other - mine).abs().max()) for other in everyones)


ALONE: dict[str, dict[str, Any]] = {}


def run(case: Case, method: str, rank: int, world: int) -> dict[str, Any]:
    kind = kinds.ALL[case.kind]
    key = f"{case.kind}, {case.more}, {case.is_cast}, {method}"
    if key not in ALONE:
        ALONE[key] = train(kind, Spread(adapted(replace(case, base=lambda build: build()), method)))
    found = {"alone": ALONE[key]}
    try:
        spread = case.spread(adapted(case, method))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["together"] = train(kind, spread, rank, world)
        found["warned"] = sorted({str(warning.message) for warning in caught})
        if spread.is_whole:
            found["drift"] = drift(spread.model, world)
    except Exception as error:  # a refusal is a result, too; the tests judge it
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def run_trainer(name: str, method: str, folder: Path) -> dict[str, Any]:
    """transformers' Trainer on a PEFT model, as a launcher starts it; FSDP thinks that the CPUs are GPUs."""
    torch.manual_seed(1)
    config = configure(method)(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(causal(folder / "base"), config)
    try:
        trainer = language_model(
            model,
            folder / "base",
            folder / "out",
            per_device_train_batch_size=1,
            prepare=lambda: (
                PartialState._shared_state.update(distributed_type=DistributedType.MULTI_GPU)
                if TRAINERS[name]
                else None
            ),
            **TRAINERS[name],
        )
        trainer.train()
        if (
            TRAINERS[name].get("fsdp_config", {}).get("version") != 1
        ):  # torch crashes there on a CPU, with LoRA too
            trainer.save_model(str(folder / "saved" / name / method))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"log": logged(trainer), "wrapped": type(trainer.model_wrapped).__name__}


def main(folder: Path, group: str, rank: int, world: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_SIZE": world,
        "MASTER_PORT": 29511,
    }
    os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", ACCELERATE_TORCH_DEVICE="cpu")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=300),
    )
    found: dict[str, Any] = {
        name: {method: run(case, method, rank, world) for method in case.methods}
        for name, case in GROUPS[group].items()
    }
    if group == "torch":
        found |= {
            name: {method: run_trainer(name, method, folder) for method in ("lora", "held", "moslora")}
            for name in TRAINERS
        }
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
