"""Parameter groups in transformers' Trainer, by both ways that it has, and LoRA-FA."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer as pefts_create_lorafa_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

import laws
import tiny
import upstream
from moslora import MoSLoRAConfig, create_lorafa_optimizer, param_groups
from tolerances import MODEL, relative_error

RATES = {"A": 1e-2, "mixer": 0.0, "B": 4e-2, "vectors": 1e-2}


def trainer(folder: Path, way: str) -> Trainer:
    torch.manual_seed(0)
    config = MoSLoRAConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), config)
    groups = param_groups(model, lr=1e-2, mixer_lr_ratio=0, b_lr_ratio=4, weight_decay=0.1)
    passed: dict[str, Any] = {
        "optimizers": {"optimizers": (AdamW(groups), None)},
        "optimizer_cls_and_kwargs": {"optimizer_cls_and_kwargs": (AdamW, {"params": groups, "eps": 1e-6})},
    }[way]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=123.0,  # has no say
        lr_scheduler_type="linear",
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    data = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(rows=8)]
    return Trainer(model, arguments, train_dataset=data, **passed)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_the_trainer_keeps_each_groups_rate_and_scales_it_by_its_schedule(way: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, way)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    seen: list[dict[str, float]] = []
    run.create_optimizer_and_scheduler(4)
    step = run.optimizer.step

    def watched(_: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({group["name"]: group["lr"] for group in run.optimizer.param_groups})
        return step(*args, **kwargs)

    run.optimizer.step = MethodType(watched, run.optimizer)  # schedules look for a method
    run.train()
    assert len(seen) == 4
    for index, rates in enumerate(seen):  # linearly down to nothing after four steps
        assert rates == pytest.approx({name: rate * (1 - index / 4) for name, rate in RATES.items()})
    decays = {group["name"]: group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays == {"A": 0.1, "mixer": 0.1, "B": 0.1, "vectors": 0.0}
    for name, parameter in run.model.named_parameters():
        moves = "moslora_" in name and "moslora_M" not in name
        assert torch.equal(parameter, before[name]) is not moves, name


# ---- LoRA-FA -------------------------------------------------------------------------------------------------

LORA_FA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}


def trained(model: PeftModel, optimizer: Any, steps: int = 3) -> list[float]:
    losses = []
    for seed in range(steps):
        ids = tiny.tokens(seed=seed)
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def adapted(cls: type, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.llama(), cls(**{**LORA_FA, "modules_to_save": ["norm"], **changes}))


@upstream.needs("PEFT's optimizer takes one scale for all ranks before", peft="0.20")
def test_with_a_fixed_mixer_lora_fa_is_pefts_of_the_folded_adapter() -> None:
    ours = adapted(MoSLoRAConfig, mixer="orthogonal", train_mixer=False, match_scale=True)
    lora = adapted(LoraConfig)
    held = laws.factors_by_key(lora)
    with torch.no_grad():
        for name, A in laws.factors_by_key(ours).items():
            if ".moslora_A." in name:
                M = laws.factors_by_key(ours)[name.replace("_A", "_M", 1)]
                held[name.replace("moslora_", "lora_")].copy_(M @ A)
    arguments = {"r": 4, "lora_alpha": 6, "lr": 1e-2, "weight_decay": 0.1}
    expected = trained(lora, pefts_create_lorafa_optimizer(lora, **arguments))
    optimizer = create_lorafa_optimizer(ours, 1e-2, 0.1)
    assert isinstance(optimizer, LoraFAOptimizer)
    assert relative_error(torch.tensor(trained(ours, optimizer)), torch.tensor(expected)) < MODEL
    assert expected[0] != expected[-1]


def test_lora_fa_trains_everything_but_a_and_its_state_travels() -> None:
    model = adapted(MoSLoRAConfig)
    optimizer = create_lorafa_optimizer(model, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, optimizer)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any("moslora_A" in name for name in moved)
    for part in ("moslora_M", "moslora_B", "modules_to_save"):
        expected = {name for name in before if f".{part}." in name}
        assert expected and expected <= moved
    model.add_adapter("other", MoSLoRAConfig(**LORA_FA))
    for name in ("other", "default"):
        model.set_adapter(name)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".moslora_A.default" in name)
    twin = adapted(MoSLoRAConfig)
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if ".other." not in n})
    again = create_lorafa_optimizer(twin, 1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert trained(model, optimizer) == trained(twin, again)


def test_lora_fa_is_refused_where_b_has_no_such_gradient() -> None:
    with pytest.raises(ValueError, match=r"DoRA's magnitude.*param_groups"):
        create_lorafa_optimizer(adapted(MoSLoRAConfig, use_dora=True), 1e-3)
    with pytest.raises(ValueError, match=r"embed_tokens.*Embedding.*target_modules"):
        create_lorafa_optimizer(
            adapted(MoSLoRAConfig, target_modules=["embed_tokens"], rank_pattern={}), 1e-3
        )
    with pytest.raises(ValueError, match=r"Call moslora.create_lorafa_optimizer\(model, lr"):
        pefts_create_lorafa_optimizer(adapted(MoSLoRAConfig), r=4, lora_alpha=6, lr=1e-3)
    with pytest.raises(ValueError, match="trains no MoSLoRA factor"):
        create_lorafa_optimizer(nn.Linear(2, 2), 1e-3)
