"""A base model with a head for a task: classes, tags, a number or a reward, which the base's own weights may lack.

A head that the base does not have is drawn here, from a seed: normal, as wide as the base's configuration says, biases
zero. Everything else that is missing is an error, as in any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.errors import ModelError
from moslora.models.loading import check_loaded, load_config, load_with_info
from moslora.models.names import ModelSource

if TYPE_CHECKING:
    from torch import nn

__all__ = ["draw_head", "head_modules", "load_with_head", "own_head"]

# A layer of some encoders between backbone and head; checkpoints of language models leave it out.
POOLER = "pooler"


def own_head(config: Any, auto_class: str) -> bool:
    """Tell whether a configuration is of a model that has a head of this kind already.

    Args:
        config: Of transformers.
        auto_class: ``AutoModelFor…`` that would load it.
    """
    ending = auto_class.removeprefix("Auto").removeprefix("Model")
    return any(str(name).endswith(ending) for name in getattr(config, "architectures", None) or ())


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that a model has beside its backbone, those with weights.

    Args:
        model: Of transformers, ``…ForSequenceClassification`` or ``…ForTokenClassification``.
    """
    backbone = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, module in model.named_children()
        if name != backbone and next(module.parameters(), None) is not None
    ]


def load_with_head(
    source: ModelSource,
    settings: Mapping[str, Any],
    seed: int,
    dtype: str,
    trust_remote_code: bool,
    attn_implementation: str | None,
    device: str,
    auto_class: str,
    quantization: dict[str, Any] | None,
    new: bool = False,
) -> tuple[Any, tuple[str, ...]]:
    """Load a base, with its own head or a fresh one.

    Args:
        source, dtype, trust_remote_code, attn_implementation, device, auto_class, quantization: As for ``load_model``.
        settings: Of the configuration: the head's size and names, the kind of the problem, the token that pads.
        seed: Of a fresh head.
        new: Whether a head that the base has is replaced.

    Returns:
        The model, in evaluation mode, and the modules that are fresh.

    Raises:
        ModelError: If the base cannot be loaded, or lacks anything but a head.
    """
    import torch

    config = load_config(source, trust_remote_code)
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):  # what the loader draws is drawn again below
        model, info = load_with_info(
            source,
            dtype,
            trust_remote_code,
            attn_implementation,
            device,
            auto_class,
            quantization,
            config=config,
            ignore_mismatched_sizes=new,
        )
    heads = head_modules(model)
    if not heads:
        raise ModelError(
            f"{source.name} has no head that could be trained: {type(model).__name__} is one module."
        )
    lost = {
        _name_of(key) for problem in ("missing_keys", "mismatched_keys") for key in info.get(problem) or ()
    }
    fresh = {owner for key in lost for owner in [_owner(key, heads)] if owner is not None}
    rest = {
        problem: [key for key in info.get(problem) or () if _owner(_name_of(key), heads) is None]
        for problem in ("missing_keys", "mismatched_keys", "error_msgs")
    }
    backbone = getattr(model, "base_model_prefix", "")
    # What a base has beside its backbone, as the head of a language model, has no use here.
    strange = [
        key
        for key in map(str, info.get("unexpected_keys") or ())
        if key.startswith(f"{backbone}.") and f".{POOLER}." not in f".{key}"
    ]
    check_loaded(source, {**rest, "unexpected_keys": strange})
    if new:
        fresh |= set(heads)
    draw_head({name: model.get_submodule(name) for name in fresh}, config, seed)
    return model, tuple(sorted(fresh))


def _name_of(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple | list) else key)


def _owner(key: str, heads: Sequence[str]) -> str | None:
    """Return the head, or the pooler of a backbone, that a tensor belongs to."""
    head = next((name for name in heads if key.startswith(f"{name}.")), None)
    if head is not None:
        return head
    parts = key.split(".")
    return ".".join(parts[: parts.index(POOLER) + 1]) if POOLER in parts[:2] else None


def draw_head(modules: Mapping[str, nn.Module], config: Any, seed: int) -> None:
    """Draw the weights of a head anew.

    Args:
        modules: By name; changed in place.
        config: The model's configuration, which says how wide weights are drawn.
        seed: The same gives the same weights, on every device.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    width = getattr(config, "initializer_range", None) or 0.02
    with torch.no_grad():
        for _, part in sorted(modules.items()):
            for module in part.modules():
                weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
                if isinstance(weight, torch.Tensor) and weight.ndim > 1:
                    drawn = torch.randn(weight.shape, generator=generator) * width
                    weight.copy_(drawn.to(weight.dtype))
                elif isinstance(weight, torch.Tensor):
                    weight.fill_(1.0)  # of a normalization
                if isinstance(bias, torch.Tensor):
                    bias.zero_()
