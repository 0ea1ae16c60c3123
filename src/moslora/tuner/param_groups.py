"""Optimizer groups: a learning rate of their own for the mixers and for B."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from moslora.errors import UsageError
from moslora.tuner.names import MAGNITUDE, factor_in

__all__ = ["param_groups", "train_mixers_apart"]


def param_groups(
    model: nn.Module,
    lr: float,
    mixer_lr_ratio: float = 1.0,
    b_lr_ratio: float = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Sort the trained parameters of a model into groups for any torch optimizer.

    B at a higher rate than A is LoRA+ (arXiv:2402.12354). Everything trained that is not a factor (biases,
    ``modules_to_save``) has the plain rate.

    transformers' Trainer, and TRL's, take them in either of two ways:

        Trainer(model, args, ..., optimizers=(AdamW(param_groups(model, 1e-4, b_lr_ratio=16)), None))
        Trainer(model, args, ..., optimizer_cls_and_kwargs=(AdamW, {"params": param_groups(model, 1e-4)}))

    The Trainer's schedule then scales each group's own rate; ``learning_rate`` and ``weight_decay`` in its arguments
    are ignored.

    Args:
        model: A model with MoSLoRA adapters, as ``get_peft_model`` returns it.
        lr: Learning rate of A, and of everything that is not a factor; positive.
        mixer_lr_ratio: The mixers' rate is this times ``lr``; at least 0.
        b_lr_ratio: B's rate, and that of a bias on B, is this times ``lr``; at least 0.
        weight_decay: Of all groups but those of vectors, as biases and DoRA's magnitudes are, which have none; at
            least 0.

    Returns:
        Groups with ``name``, ``params``, ``lr`` and ``weight_decay``: ``A``, ``mixer``, ``B``, ``B bias``, ``other``
        and ``vectors``, those without a parameter left out. Every trained parameter is in one of them.

    Raises:
        ValueError: If a number is out of range, or the model trains no MoSLoRA factor.

    Example:
        >>> from torch.optim import AdamW
        >>> from peft import get_peft_model
        >>> from moslora import MoSLoRAConfig, param_groups
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), MoSLoRAConfig(r=2, target_modules=["0"]))
        >>> optimizer = AdamW(param_groups(model, 1e-3, mixer_lr_ratio=0.5, b_lr_ratio=16))
        >>> {group["name"]: group["lr"] for group in optimizer.param_groups}
        {'A': 0.001, 'mixer': 0.0005, 'B': 0.016}
    """
    values = {"mixer_lr_ratio": mixer_lr_ratio, "b_lr_ratio": b_lr_ratio, "weight_decay": weight_decay}
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name}={value!r} must be a number of at least 0.")
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"lr={lr!r} must be a positive number.")
    rates = {"A": lr, "mixer": lr * mixer_lr_ratio, "B": lr * b_lr_ratio, "B bias": lr * b_lr_ratio}
    rates |= {"other": lr, "vectors": lr}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factor_in(name)
        if factor is not None:
            group = "B bias" if name.endswith(".bias") else {"A": "A", "M": "mixer", "B": "B"}[factor]
            members[group].append(parameter)
        else:
            # A convolution's magnitude is a vector, too, of shape (1, out, 1, …).
            is_vector = parameter.ndim < 2 or f".{MAGNITUDE}." in name
            members["vectors" if is_vector else "other"].append(parameter)
    if not members["A"] and not members["B"] and not members["mixer"]:
        raise UsageError(
            "The model trains no MoSLoRA factor. Make it with get_peft_model(model, MoSLoRAConfig(...)), or "
            "load it with is_trainable=True."
        )
    return [
        {
            "name": group,
            "params": parameters,
            "lr": rates[group],
            "weight_decay": 0.0 if group in ("vectors", "B bias") else weight_decay,
        }
        for group, parameters in members.items()
        if parameters
    ]


def train_mixers_apart(
    optimizer: Optimizer, model: nn.Module, lr_ratio: float = 1.0, weight_decay: float | None = None
) -> None:
    """Give the mixers of an optimizer that has taken no step yet a rate and a weight decay of their own.

    Whatever optimizer the trainer was told to use stays, with its other settings; ``param_groups`` is for making one.

    Args:
        optimizer: Over the model's trained parameters.
        model: A model with MoSLoRA adapters.
        lr_ratio: The mixers' rate is this times that of their group.
        weight_decay: The mixers' weight decay; None leaves their group's.

    Raises:
        UsageError: If no mixer is trained, or the optimizer has taken a step.
    """
    mixers = {id(p) for name, p in model.named_parameters() if p.requires_grad and factor_in(name) == "M"}
    if not mixers or optimizer.state:
        reason = "has taken steps already" if mixers else "trains no mixer"
        raise UsageError(f"Mixers cannot be trained apart: the optimizer {reason}.")
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in mixers]
        if not own:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in mixers]
        apart = {key: value for key, value in group.items() if key != "params"}
        apart["lr"] = group["lr"] * lr_ratio
        if weight_decay is not None:
            apart["weight_decay"] = weight_decay
        optimizer.add_param_group({**apart, "params": own})
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
