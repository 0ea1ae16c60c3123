"""Parameter groups in transformers' Trainer, by both ways that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

import tiny
from moslora import MoSLoRAConfig, param_groups

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

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append({group["name"]: group["lr"] for group in run.optimizer.param_groups})
        return step(*args, **kwargs)

    run.optimizer.step = watched
    run.train()
    assert len(seen) == 4
    for index, rates in enumerate(seen):  # linearly down to nothing after four steps
        assert rates == pytest.approx({name: rate * (1 - index / 4) for name, rate in RATES.items()})
    decays = {group["name"]: group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays == {"A": 0.1, "mixer": 0.1, "B": 0.1, "vectors": 0.0}
    for name, parameter in run.model.named_parameters():
        moves = "moslora_" in name and "moslora_M" not in name
        assert torch.equal(parameter, before[name]) is not moves, name
