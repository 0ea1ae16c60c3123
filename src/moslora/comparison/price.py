"""The price of a method, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moslora.metrics.intervals import Difference

__all__ = ["Price"]


@dataclass(frozen=True)
class Price:
    """What a method costs on data that tuning is not about, against the baseline, each at its best rate.

    Attributes:
        method, baseline: Their names.
        data: The name of the data.
        measure: ``"loss"``, or ``"kl"``, KL(base ‖ tuned); nats a token, lower is better.
        value, baseline_value: Means over seeds and tokens.
        difference: Method less baseline, same seeds and same passages.
        p_corrected: Holm's, over all methods compared on this data by this measure.
        found: ``"more"``, ``"less"``, or ``"none"`` if no difference could be shown.
    """

    method: str
    baseline: str
    data: str
    measure: Literal["loss", "kl"]
    value: float
    baseline_value: float
    difference: Difference
    p_corrected: float
    found: Literal["more", "less", "none"]
