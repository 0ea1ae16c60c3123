"""Batches of several lanes, concatenated along the batch dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moslora.comparison.lanes import CannotShare, Lane

if TYPE_CHECKING:
    from torch import Tensor


# What a batch may hold; anything else has a meaning that is not known here.
KNOWN_INPUTS = {"input_ids", "labels", "attention_mask", "position_ids"}
# Where examples begin in rows that hold several, for kernels that read nothing else; position ids say it too.
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass
class Span:
    """A lane's rows of the joint batch.

    Attributes:
        lane: The training.
        rows: How many rows are its own, after those of the lanes before it.
        length: How many positions of each row are its own; the rest is padding.
    """

    lane: Lane
    rows: int
    length: int


@dataclass
class Layout:
    """Which rows and positions of the current joint batch belong to which lane."""

    spans: list[Span] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and positions per row."""
        return sum(s.rows for s in self.spans), max(s.length for s in self.spans)


def concatenate_batches(lanes: Sequence[Lane]) -> tuple[dict[str, Tensor], Layout]:
    """Concatenate the lanes' batches along the batch dimension; short rows are padded on the right.

    A causal model does not attend to padding on the right, and where a batch has a mask, the mask excludes it. In
    padding-free rows, which position ids separate, the padding is one more example.

    Args:
        lanes: The trainings, each with the inputs of its next batch.

    Returns:
        Inputs by name, each ``(all rows, longest row)``, without labels; and their layout.

    Raises:
        CannotShare: If the batches have different inputs, or one that cannot be concatenated.
    """
    import torch
    from torch.nn import functional as F

    keys = {frozenset(name for name in lane.inputs if lane.inputs[name] is not None) for lane in lanes}
    names = next(iter(keys))
    names, boundaries = names - BOUNDARIES, names & BOUNDARIES
    unknown = names - KNOWN_INPUTS
    if boundaries and "position_ids" not in names:
        unknown = unknown | boundaries
    if len(keys) > 1 or unknown:
        differing = ", ".join(sorted(unknown)) or " and ".join(str(sorted(key)) for key in keys)
        raise CannotShare(f"their batches cannot be concatenated: {differing}")
    layout = Layout([Span(lane, *lane.inputs["input_ids"].shape) for lane in lanes])
    _, longest = layout.shape
    joint = {}
    for name in sorted(names - {"labels"}):
        parts = []
        for span in layout.spans:
            part, missing = span.lane.inputs[name], longest - span.length
            if name == "position_ids":
                padding = torch.arange(missing, device=part.device, dtype=part.dtype).expand(span.rows, -1)
                parts.append(torch.cat([part.expand(span.rows, -1), padding], dim=1))
            else:
                parts.append(F.pad(part, (0, missing)))  # token 0, or a mask's 0
        joint[name] = torch.cat(parts)  # (all rows, longest)
    return joint, layout
