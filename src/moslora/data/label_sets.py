"""The set of labels: their names and order, from the recipe, a trained head or the training data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moslora.data.faults import Faults, listed, quoted
from moslora.data.labeled import Labeled
from moslora.errors import DataError
from moslora.wording import did_you_mean

__all__ = ["LabelSet", "as_label_set", "check_all_present", "classes_of", "find_labels", "index_labels"]


@dataclass(frozen=True)
class LabelSet:
    """Labels in order.

    Attributes:
        names: Their names, by which a model's configuration knows them.
        numbers: The whole numbers that stand for them in the data; None where the data have the names.
        origin: Where they are from, for messages.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...] | None
    origin: str

    def index(self, label: str | int) -> int | None:
        """Return a label's place in the set; None if it is not in it."""
        if isinstance(label, int):
            numbers = self.numbers if self.numbers is not None else tuple(range(len(self.names)))
            return numbers.index(label) if label in numbers else None
        return self.names.index(label) if label in self.names else None

    @property
    def spelled(self) -> list[str]:
        """The labels as data have them."""
        return list(self.names if self.numbers is None else map(str, self.numbers))


def classes_of(example: Labeled) -> tuple[str | int, ...]:
    """Return the labels that an example has."""
    return example.label if isinstance(example.label, tuple) else (example.label,)


def find_labels(
    given: Sequence[str | int] | None, examples: Sequence[Labeled], source: str, known: LabelSet | None = None
) -> LabelSet:
    """Find out the set of labels.

    Args:
        given: The recipe's ``data.labels``.
        examples: The training examples.
        source: Their file, for messages.
        known: The labels of a head that is trained already.

    Returns:
        The recipe's, else the head's, else those of the examples: texts sorted, whole numbers from 0 on.

    Raises:
        DataError: If whole numbers leave one out, or there is only one label.
    """
    present = {label for example in examples for label in classes_of(example)}
    if given is not None:
        twice = next((label for label in given if list(map(str, given)).count(str(label)) > 1), None)
        if twice is not None:
            raise DataError(source, [f"data.labels has {twice!r} twice"], "Name each label once.")
        numbers = tuple(label for label in given if isinstance(label, int))
        if numbers and len(numbers) != len(given):
            raise DataError(
                source, ["data.labels mixes texts and whole numbers"], "Put all of them in quotes, or none."
            )
        return LabelSet(tuple(map(str, given)), numbers or None, "data.labels")
    if known is not None:
        return known
    texts = sorted(label for label in present if isinstance(label, str))
    found = sorted(label for label in present if isinstance(label, int))
    if texts:
        labels = LabelSet(tuple(texts), None, "the training data")
    else:
        if found and found[0] in (0, 1):
            missing = sorted(set(range(found[0], found[-1])) - set(found))
            if missing:
                raise DataError(
                    source,
                    [f"the labels are {listed(found)}; no training example has {listed(missing)}"],
                    f"Add examples, or name the labels that there are: data.labels=[{listed(found)}].",
                )
        labels = LabelSet(tuple(map(str, found)), tuple(found), "the training data")
    if len(labels.names) < 2:
        raise DataError(
            source,
            [f"all {len(examples)} training examples have the label {listed(labels.names)}"],
            "Give examples of at least two labels; with one there is nothing to learn.",
        )
    return labels


def index_labels(examples: Sequence[Labeled], labels: LabelSet, source: str) -> list[tuple[int, ...]]:
    """Return the indices of each example's labels.

    Args:
        examples: Training or held-out examples.
        labels: The set.
        source: Their file, for messages.

    Raises:
        DataError: If a label is not in the set; each is named by its row.
    """
    faults = Faults(source)
    found = []
    for example in examples:
        indices = []
        for label in classes_of(example):
            index = labels.index(label)
            if index is None:
                hint = did_you_mean(label, labels.spelled) if isinstance(label, str) else ""
                shown = quoted(label) if isinstance(label, str) else str(label)
                faults.add(example.place, f"the label {shown} is not one of {labels.origin}.{hint}")
            else:
                indices.append(index)
        found.append(tuple(indices))
    faults.raise_if_any(
        f"The labels are {listed(labels.spelled)}. Correct these rows, or name all in data.labels."
    )
    return found


def check_all_present(indices: Iterable[Sequence[int]], labels: LabelSet, source: str) -> None:
    """Refuse a set with a label that no training example has: nothing would be learned of it.

    Raises:
        DataError: Names each.
    """
    present = {index for row in indices for index in row}
    absent = [name for index, name in enumerate(labels.names) if index not in present]
    if absent:
        raise DataError(
            source,
            [f"no training example has the label {listed(map(quoted, absent))}, which {labels.origin} names"],
            "Add examples of it, or take it out of data.labels. (data.limit may have left them out.)",
        )


def as_label_set(names: Any, origin: str) -> LabelSet | None:
    """Make a set of a configuration's ``id2label``.

    Args:
        names: By index, as text or whole number.
        origin: Where it is from, for messages.

    Returns:
        The set; None where the names are transformers' placeholders or no names at all.
    """
    if not isinstance(names, dict) or not names:
        return None
    ordered = [str(name) for _, name in sorted((int(index), name) for index, name in names.items())]
    if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)):
        return None
    # Names that are whole numbers stand for those numbers in the data, and not for their places.
    numbers = [int(name) for name in ordered if re.fullmatch(r"-?\d+", name)]
    return LabelSet(tuple(ordered), tuple(numbers) if len(numbers) == len(ordered) else None, origin)
