"""Metrics of predictions that are held against labels.

Every metric here is a function of how often each example counts. Counting each once gives the metric; ``resampling.py``
draws other counts, and has its interval from them.

Where a metric is not defined, as F1 of a class that nobody predicted and nothing has, or a correlation with a constant,
it is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = [
    "NUMBERS",
    "SHARES",
    "ClassScores",
    "LabelSetScores",
    "Scores",
    "TagScores",
    "ValueScores",
    "confusion",
    "entities",
    "has_spans",
    "is_share",
    "ratio",
    "scores_of",
]

# Metrics that are shown in percent, and those that are numbers.
SHARES = (
    "accuracy",
    "exact_match",
    "f1",
    "f1_macro",
    "f1_micro",
    "entity_f1",
    "entity_precision",
    "entity_recall",
)
NUMBERS = ("mcc", "pearson", "spearman", "margin", "calibration_error")


def is_share(name: str, has_interval: bool) -> bool:
    """Tell whether a metric is shown in percent.

    Args:
        name: The metric's.
        has_interval: Whether it has an interval; of other tasks' metrics, shares alone have one.
    """
    return name in SHARES or (has_interval and name not in NUMBERS)


class Scores(ABC):
    """Predictions of all examples, from which metrics are computed for any counts of the examples."""

    # The share of examples that are right, if there is one: its interval is Wilson's.
    share = ""

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many examples there are."""

    @property
    @abstractmethod
    def right(self) -> Array | None:
        """Which examples are right as a whole, ``(examples,)``; None where that has no meaning."""

    @abstractmethod
    def measure(self, counts: Array) -> dict[str, Array]:
        """Compute the metrics.

        Args:
            counts: How often each example counts, ``(draws, examples)``.

        Returns:
            By name, ``(draws,)``.
        """


class ClassScores(Scores):
    """One class per example.

    Args:
        truth, predicted: Indices of classes, one per example.
        classes: How many there are.
        positive: The class whose F1 is taken; None for none.
    """

    share = "accuracy"

    def __init__(
        self, truth: Sequence[int], predicted: Sequence[int], classes: int, positive: int | None
    ) -> None:
        import numpy as np

        self.truth, self.predicted = np.asarray(truth, dtype=int), np.asarray(predicted, dtype=int)
        self.classes, self.positive = classes, positive

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.truth)

    @property
    def right(self) -> Array | None:
        """Which are right."""
        return self.truth == self.predicted  # type: ignore[no-any-return]

    def measure(self, counts: Array) -> dict[str, Array]:
        """Compute accuracy, F1 and Matthews' correlation."""
        import numpy as np

        eye = np.eye(self.classes)
        gold, own = eye[self.truth], eye[self.predicted]  # (examples, classes)
        in_gold, in_own, both = counts @ gold, counts @ own, counts @ (gold * own)
        total, right = counts.sum(axis=1), both.sum(axis=1)
        found = {"accuracy": ratio(right, total)}
        by_class = ratio(2 * both, in_gold + in_own)  # (draws, classes)
        if self.positive is not None:
            found["f1"] = by_class[:, self.positive]
        present = (in_gold + in_own) > 0
        found["f1_macro"] = ratio((by_class * present).sum(axis=1), present.sum(axis=1))
        # J. Gorodkin, 2004: for two classes it is Matthews' own.
        covariance = right * total - (in_gold * in_own).sum(axis=1)
        spread = (total**2 - (in_gold**2).sum(axis=1)) * (total**2 - (in_own**2).sum(axis=1))
        found["mcc"] = ratio(covariance, np.sqrt(np.clip(spread, 0, None)))
        return found


class LabelSetScores(Scores):
    """Any number of labels per example.

    Args:
        truth, predicted: 0 or 1 for each label, ``(examples, labels)``.
    """

    share = "exact_match"

    def __init__(self, truth: Sequence[Sequence[float]], predicted: Sequence[Sequence[float]]) -> None:
        import numpy as np

        self.truth, self.predicted = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.truth)

    @property
    def right(self) -> Array | None:
        """Which have exactly the right labels."""
        return (self.truth == self.predicted).all(axis=1)  # type: ignore[no-any-return]

    def measure(self, counts: Array) -> dict[str, Array]:
        """Compute the share of exact matches and F1."""
        gold, own = counts @ self.truth, counts @ self.predicted
        both = counts @ (self.truth * self.predicted)
        present = (gold + own) > 0
        by_label = ratio(2 * both, gold + own) * present
        return {
            "exact_match": ratio(counts @ self.right, counts.sum(axis=1)),
            "f1_micro": ratio(2 * both.sum(axis=1), (gold + own).sum(axis=1)),
            "f1_macro": ratio(by_label.sum(axis=1), present.sum(axis=1)),
        }


class ValueScores(Scores):
    """One number per example.

    Args:
        truth, predicted: The numbers.
    """

    def __init__(self, truth: Sequence[float], predicted: Sequence[float]) -> None:
        import numpy as np

        self.truth, self.predicted = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return len(self.truth)

    @property
    def right(self) -> Array | None:
        """None: a number is near or far, not right or wrong."""
        return None

    def measure(self, counts: Array) -> dict[str, Array]:
        """Compute Pearson's and Spearman's correlation."""
        import numpy as np

        one = np.broadcast_to(self.truth, counts.shape)
        two = np.broadcast_to(self.predicted, counts.shape)
        return {
            "pearson": _correlation(one, two, counts),
            "spearman": _correlation(_ranks(self.truth, counts), _ranks(self.predicted, counts), counts),
        }


class TagScores(Scores):
    """One tag per word; examples are sentences, which are drawn as wholes.

    Args:
        truth, predicted: Indices of tags, a sequence for each sentence.
        names: The tags' names. Where they are of the form ``B-x``, ``I-x`` and ``O``, spans are scored too, as CoNLL
            does it.
    """

    def __init__(
        self, truth: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], names: Sequence[str]
    ) -> None:
        import numpy as np

        self.truth = [np.asarray(row, dtype=int) for row in truth]
        self.predicted = [np.asarray(row, dtype=int) for row in predicted]
        self.names = list(names)
        self.has_spans = has_spans(names)

    @property
    def examples(self) -> int:
        """How many sentences there are."""
        return len(self.truth)

    @property
    def right(self) -> Array | None:
        """Which sentences have every tag right."""
        import numpy as np

        return np.asarray([bool((a == b).all()) for a, b in zip(self.truth, self.predicted, strict=True)])

    def measure(self, counts: Array) -> dict[str, Array]:
        """Compute accuracy over words, F1 over tags, and precision, recall and F1 over spans."""
        import numpy as np

        size = len(self.names)
        pairs = list(zip(self.truth, self.predicted, strict=True))
        gold = np.stack([np.bincount(a, minlength=size) for a, _ in pairs])  # (sentences, tags)
        own = np.stack([np.bincount(b, minlength=size) for _, b in pairs])
        both = np.stack([np.bincount(a[a == b], minlength=size) for a, b in pairs])
        in_gold, in_own, in_both = counts @ gold, counts @ own, counts @ both
        present = (in_gold + in_own) > 0
        by_tag = ratio(2 * in_both, in_gold + in_own) * present
        found = {
            "accuracy": ratio(in_both.sum(axis=1), in_gold.sum(axis=1)),
            "f1_macro": ratio(by_tag.sum(axis=1), present.sum(axis=1)),
        }
        if self.has_spans:
            spans = [[entities([self.names[i] for i in row]) for row in pair] for pair in pairs]
            true, said = (counts @ [len(pair[side]) for pair in spans] for side in (0, 1))
            hits = counts @ [len(pair[0] & pair[1]) for pair in spans]
            found |= {
                "entity_f1": ratio(2 * hits, true + said),
                "entity_precision": ratio(hits, said),
                "entity_recall": ratio(hits, true),
            }
        return found


def has_spans(names: Sequence[str]) -> bool:
    """Tell whether tags mark spans: ``B-x`` where one begins, ``I-x`` where it goes on, ``O`` outside."""
    return len(names) > 1 and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def scores_of(
    problem: str, names: Sequence[str], positive: int | None, truth: Sequence[Any], predicted: Sequence[Any]
) -> Scores:
    """Return predictions, to be measured.

    Args:
        problem: ``"single-label"``, ``"multi-label"``, ``"regression"`` or ``"tokens"``.
        names: The labels' names; none for numbers.
        positive: The class whose F1 is taken.
        truth, predicted: A class, a list of labels, a number, or a list of tags for each example.
    """
    if problem == "regression":
        return ValueScores(truth, predicted)
    if problem == "tokens":
        return TagScores(truth, predicted, names)
    if problem == "multi-label":
        both = [[[float(i in row) for i in range(len(names))] for row in side] for side in (truth, predicted)]
        return LabelSetScores(*both)
    return ClassScores(truth, predicted, len(names), positive)


def confusion(truth: Sequence[int], predicted: Sequence[int], classes: int) -> list[list[int]]:
    """Count examples by their class and the class that was predicted.

    Args:
        truth, predicted: Indices of classes.
        classes: How many there are.

    Returns:
        A row for each class, a column for each prediction.
    """
    table = [[0] * classes for _ in range(classes)]
    for one, two in zip(truth, predicted, strict=True):
        table[one][two] += 1
    return table


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return the spans that tags mark: their kind, first word and the word after the last.

    A span begins at ``B-x``, and at an ``I-x`` that follows no tag of the same kind.

    Example:
        >>> sorted(entities(["B-x", "I-x", "O", "I-y", "B-y"]))
        [('x', 0, 2), ('y', 3, 4), ('y', 4, 5)]
    """
    found = set()
    kind, start = "", 0
    for index, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        goes_on = mark == "I" and name == kind
        if kind and not goes_on:
            found.add((kind, start, index))
            kind = ""
        if tag != "O" and not goes_on:
            kind, start = name, index
    return found


def ratio(top: Array, bottom: Array) -> Array:
    """Divide; 0 where there is nothing to divide by.

    Args:
        top, bottom: Of shapes that broadcast.
    """
    import numpy as np

    top, bottom = np.broadcast_arrays(np.asarray(top, dtype=float), np.asarray(bottom, dtype=float))
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)  # type: ignore[no-any-return]


def _correlation(one: Array, two: Array, counts: Array) -> Array:
    """Return Pearson's correlation of weighted values, ``(draws, examples)`` each."""
    import numpy as np

    total = counts.sum(axis=1, keepdims=True)
    a, b = (x - (counts * x).sum(axis=1, keepdims=True) / total for x in (one, two))
    spread = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    # What rounding leaves of a constant is no spread.
    scale = np.sqrt((counts * one * one).sum(axis=1) * (counts * two * two).sum(axis=1))
    return np.clip(ratio((counts * a * b).sum(axis=1), np.where(spread > 1e-12 * scale, spread, 0)), -1, 1)


def _ranks(values: Array, counts: Array) -> Array:
    """Return each example's rank among the drawn ones, equal values sharing the mean of theirs."""
    import numpy as np

    _, group = np.unique(values, return_inverse=True)  # (examples,)
    inside = np.zeros((len(counts), group.max() + 1))
    np.add.at(inside.T, group, counts.T)
    before = np.cumsum(inside, axis=1) - inside
    return (before + (inside + 1) / 2)[:, group]
