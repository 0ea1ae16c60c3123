"""What can be reached without a model: always the most frequent class, set of labels or tag, or the mean number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

__all__ = ["constant_losses"]


def constant_losses(
    learned: Sequence[Any], truth: Sequence[Any], problem: str, size: int
) -> tuple[float, list[Any]]:
    """Return the loss of predicting the frequencies of the training data, and what that predicts.

    Args:
        learned: Labels of the training examples: a class, a list of labels, a number, or a list of tags.
        truth: Those of the held-out examples.
        problem: Which of these it is.
        size: How many labels there are.

    Returns:
        The mean loss, and a prediction for each held-out example. Frequencies are of one example more of each label, so
        that none is 0.
    """
    if problem == "regression":
        mean = fmean(learned)
        return fmean((value - mean) ** 2 for value in truth), [mean] * len(truth)
    if problem == "multi-label":
        counts = Counter(index for row in learned for index in row)
        shares = [(counts[index] + 1) / (len(learned) + 2) for index in range(size)]
        losses = [
            -math.log(share if index in row else 1 - share)
            for row in truth
            for index, share in enumerate(shares)
        ]
        usual = [index for index, share in enumerate(shares) if share > 0.5]
        return fmean(losses), [usual] * len(truth)
    is_tags = problem == "tokens"
    counts = Counter(index for row in learned for index in (row if is_tags else [row]))
    total = sum(counts.values()) + size
    flat = [index for row in truth for index in (row if is_tags else [row])]
    loss = fmean(-math.log((counts[index] + 1) / total) for index in flat)
    most = max(range(size), key=lambda index: counts[index])
    return loss, [[most] * len(row) if is_tags else most for row in truth]
