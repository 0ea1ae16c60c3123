"""Pairs of rewards: how often the chosen answer has the higher one, by how much, and whether margins can be believed.

A margin m says that the chosen answer is preferred with probability sigmoid(m). Of pairs for which a model is 80 %
sure, four in five should be right; how far shares are from that is the expected calibration error (C. Guo and others,
2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moslora.metrics.scored import Scores, ratio

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["PairScores", "reliability"]

# Bins of equal width in which probabilities are held against shares.
BINS = 10


class PairScores(Scores):
    """The reward of the chosen answer less that of the rejected one, one margin per pair.

    Args:
        margins: In nats: by the model, the chosen one is preferred with probability ``sigmoid(margin)``.
    """

    share = "accuracy"

    def __init__(self, margins: Sequence[float]) -> None:
        import numpy as np

        self.margins = np.asarray(margins, dtype=float)

    @property
    def examples(self) -> int:
        """How many pairs there are."""
        return len(self.margins)

    @property
    def right(self) -> Array | None:
        """Which chosen answers have the higher reward."""
        return self.margins > 0

    def measure(self, counts: Array) -> dict[str, Array]:
        """Compute accuracy, mean margin and expected calibration error."""
        import numpy as np

        total = counts.sum(axis=1)
        confidence, bins = _confidence(self.margins)
        error = np.zeros(len(counts))
        for index in range(BINS):
            inside = bins == index
            # How far the mean confidence of a bin is from its share of right ones, weighted by its size.
            error += np.abs(counts[:, inside] @ (confidence[inside] - (self.margins[inside] > 0)))
        return {
            "accuracy": ratio(counts @ (self.margins > 0), total),
            "margin": ratio(counts @ self.margins, total),
            "calibration_error": ratio(error, total),
        }


def reliability(margins: Sequence[float]) -> list[tuple[float, float, int, float, float]]:
    """Return by bin of confidence how often the preferred answer is the chosen one.

    Args:
        margins: As for ``PairScores``.

    Returns:
        For each bin that has pairs: its ends, how many, mean confidence, and the share that is right.
    """
    import numpy as np

    values = np.asarray(margins, dtype=float)
    confidence, bins = _confidence(values)
    width = 0.5 / BINS
    rows = []
    for index in range(BINS):
        inside = bins == index
        if count := int(inside.sum()):
            low = 0.5 + index * width
            right = float((values[inside] > 0).mean())
            rows.append((low, low + width, count, float(confidence[inside].mean()), right))
    return rows


def _confidence(margins: Array) -> tuple[Array, Array]:
    """Return the probability of the answer that is preferred, from 1/2 to 1, and its bin."""
    import numpy as np

    confidence = 1 / (1 + np.exp(-np.abs(np.clip(margins, -700, 700))))
    return confidence, np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
