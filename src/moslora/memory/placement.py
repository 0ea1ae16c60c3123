"""A fine-tune laid out over GPUs: one GPU, DDP, FSDP; and the smallest card that holds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CARDS", "Placement", "smallest_card"]


# Memory of common cards, in GB of 10⁹ bytes: a vendor's 80 GB are a little more than that.
CARDS = (24, 40, 48, 80, 141)
# What is left free on a card: of the total, for gaps between tensors; and bytes, for CUDA's context and workspaces.
SPARE_SHARE, SPARE_BYTES = 0.10, 1_000_000_000
# Bytes of state that an optimizer keeps for each trained number, by TRL's and transformers' names.
OPTIMISERS: dict[str, float] = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_apex_fused": 8,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "rmsprop": 4,
    "adagrad": 4,
    "sgd": 0,
}


@dataclass(frozen=True)
class Placement:
    """What one way of training takes of each GPU, in bytes.

    Attributes:
        strategy: ``"one"``, ``"DDP"`` or ``"FSDP"``.
        gpus: How many.
        checkpointing: Whether activations are computed again in the backward pass.
        weights: Base and adapter, as they lie there between steps.
        gathered: What FSDP holds whole while a block runs; 0 otherwise.
        gradients: Of what is trained, DDP's buckets included.
        optimiser: Its state.
        activations: All else at the fullest moment of a step, logits included.
        total: The sum.
        card: GB of the smallest of ``CARDS`` that does; None if none does.
    """

    strategy: str
    gpus: int
    checkpointing: bool
    weights: int
    gathered: int
    gradients: int
    optimiser: int
    activations: int
    total: int
    card: int | None


def smallest_card(total: int) -> int | None:
    """Return the GB of the smallest card that ``total`` bytes leave enough room on; None if none does.

    Args:
        total: Bytes at the fullest moment.

    Returns:
        One of ``CARDS``.
    """
    return next((gb for gb in CARDS if total * (1 + SPARE_SHARE) + SPARE_BYTES <= gb * 1e9), None)


def place(
    strategy: str, gpus: int, checkpointing: bool, weights: Weights, state: int, activations: int
) -> Placement:
    """Lay a fine-tune out over GPUs.

    Args:
        strategy: ``"one"``, ``"DDP"`` (each holds all, gradients once more in buckets) or ``"FSDP"`` (each holds its
            share, and whole: what lies outside the blocks, the running block and the next).
        gpus: How many.
        checkpointing: Whether ``activations`` are those under checkpointing.
        weights: What there is.
        state: Bytes of the optimizer's state in all.
        activations: Bytes, on each GPU.

    Returns:
        What each GPU holds.
    """
    shares = gpus if strategy == "FSDP" else 1
    gathered = weights.outside + 2 * weights.largest_block if strategy == "FSDP" else 0
    parts = {
        "weights": -(-weights.bytes // shares),
        "gathered": gathered,
        "gradients": -(-weights.gradients // shares) * (2 if strategy == "DDP" else 1),
        "optimiser": -(-state // shares),
        "activations": activations,
    }
    total = sum(parts.values())
    return Placement(strategy, gpus, checkpointing, **parts, total=total, card=smallest_card(total))


@dataclass(frozen=True)
class Weights:
    """What a model's parameters take.

    Attributes:
        parameters: Of the base.
        trained: Numbers that are trained.
        bytes: Of all parameters and buffers.
        gradients: Bytes of the gradients.
        largest_block: Bytes of the largest repeated block.
        outside: Bytes of what is in no block: embeddings and head.
    """

    parameters: int
    trained: int
    bytes: int
    gradients: int
    largest_block: int
    outside: int

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        """Count an adapted model."""
        held = {id(t): t for t in (*model.parameters(), *model.buffers())}
        whole = sum(t.nbytes for t in held.values())
        trained = [p for p in model.parameters() if p.requires_grad]
        stand_ins = [m for m in model.modules() if hasattr(m, "stands_for")]
        base = sum(p.numel() for n, p in model.named_parameters() if "moslora_" not in n)
        base += sum(m.stands_for - m.weight.numel() for m in stand_ins)  # type: ignore[operator, misc]
        sizes = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in _blocks(model)]
        return cls(
            parameters=base,
            trained=sum(p.numel() for p in trained),
            bytes=whole,
            gradients=sum(p.nbytes for p in trained),
            largest_block=max(sizes, default=0),
            outside=whole - sum(sizes),
        )


def _blocks(model: Any) -> list[nn.Module]:
    """Return the repeated blocks that FSDP wraps, as transformers names them."""
    names = set(getattr(model.get_base_model(), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
