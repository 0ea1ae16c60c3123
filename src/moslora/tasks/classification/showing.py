"""What people see of labeled data and of predictions: counts, one example as a model reads it, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.metrics.scored import confusion
from moslora.tasks.classification.encoding import EncodedLabel, LabelSummary
from moslora.tasks.task import Table

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["show_labeled", "table_of"]

# Classes of a confusion matrix that are shown; of more the most frequent, and the rest together.
MOST_CLASSES = 12
MOST_TOKENS = 400  # of the example that is shown
REST = "all others"


def show_labeled(
    display: Display,
    problem: str,
    counts: Mapping[str, int] | None,
    train: LabelSummary,
    heldout: LabelSummary,
    example: EncodedLabel,
    tokenizer: Any,
) -> None:
    """Show what is trained on, with one example as the model reads it, and its label.

    Args:
        display: Where to show it.
        problem: Which kind of labels it is.
        counts: Training examples (of tags: words) by label; None for numbers.
        train, heldout: Counts of the encoded examples.
        example: The first training example.
        tokenizer: The model's.
    """
    from rich.text import Text

    display.say(
        f"Training examples: {train.examples}, held out: {heldout.examples}. Tokens: {train.tokens}. Longest example: "
        f"{train.longest} tokens. Problem: {problem}."
    )
    if counts is not None:
        most = sorted(counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count}" for name, count in most[:MOST_CLASSES])
        more = f" and {len(most) - MOST_CLASSES} more labels" if len(most) > MOST_CLASSES else ""
        display.say(f"Labels in the training data: {shown}{more}.")
    ids = example.input_ids[:MOST_TOKENS]
    marked = Text("One example, as the model reads it:\n")
    if example.heads:
        words = set(example.heads)
        tags = iter(example.answer.split(" "))
        for position, token in enumerate(ids):
            text = tokenizer.decode([token])
            if position in words:
                marked.append(f"{text}", "bold")
                marked.append(f"⟨{next(tags, '')}⟩", "bold green")
            else:
                marked.append(text, "dim")
    else:
        marked.append(tokenizer.decode(ids), "dim")
        if len(example.input_ids) > MOST_TOKENS:
            marked.append(f" … and {len(example.input_ids) - MOST_TOKENS} more tokens", "dim")
        marked.append("\nLabel: ")
        marked.append(example.answer, "bold green")
    display.show(marked)
    display.say()
    for name, summary in (("Training data", train), ("Held-out data", heldout)):
        for warning in summary.warnings():
            display.warn(f"{name}: {warning}")


def table_of(problem: str, truth: Sequence[Any], predicted: Sequence[Any], names: Sequence[str]) -> Table:
    """Return predictions counted: a confusion matrix, or a line for each label or tag.

    Args:
        problem: Which kind of labels it is.
        truth, predicted: Of the held-out examples.
        names: The labels' names.
    """
    if problem == "single-label":
        return confusion_table(truth, predicted, names)
    return (tag_table if problem == "tokens" else label_table)(truth, predicted, names)


def confusion_table(truth: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> Table:
    """Return examples counted by their class and the class that was predicted.

    Args:
        truth, predicted: Indices of classes.
        names: The classes' names.
    """
    shown = list(range(len(names)))
    if len(names) > MOST_CLASSES:
        frequent = sorted(shown, key=lambda index: -sum(1 for one in truth if one == index))
        shown = sorted(frequent[:MOST_CLASSES])
    place = {index: at for at, index in enumerate(shown)}
    rest = len(shown)
    size = rest + (1 if rest < len(names) else 0)
    counts = confusion(
        [place.get(one, rest) for one in truth], [place.get(one, rest) for one in predicted], size
    )
    labels = [names[index] for index in shown] + [REST] * (size - rest)
    return Table(
        "Confusion matrix",
        ["is ╲ predicted", *labels],
        [[label, *row] for label, row in zip(labels, counts, strict=True)],
        "Held-out examples by their label (rows) and the predicted one (columns); shades are shares of a row.",
        shades=True,
    )


def label_table(
    truth: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], names: Sequence[str]
) -> Table:
    """Return how each of several labels was predicted.

    Args:
        truth, predicted: Indices of labels of each example.
        names: The labels' names.
    """
    rows = []
    for index, name in enumerate(names):
        has = [index in row for row in truth]
        said = [index in row for row in predicted]
        both = sum(a and b for a, b in zip(has, said, strict=True))
        rows.append(_row(name, sum(has), sum(said), both))
    return Table(
        "By label",
        ["label", *COUNTED],
        rows,
        "Held-out examples that have, are given, and have and are given it.",
    )


COUNTED = ("have it", "given it", "both", "precision", "recall", "F1")


def _row(name: str, has: int, said: int, both: int) -> list[Any]:
    """Return a line of counts with what follows from them; a dash where nothing does."""
    precision, recall = (f"{both / of:.3f}" if of else "—" for of in (said, has))
    f1 = f"{2 * both / (has + said):.3f}" if has + said else "—"
    return [name, has, said, both, precision, recall, f1]


def tag_table(
    truth: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], names: Sequence[str]
) -> Table:
    """Return how each tag was predicted.

    Args:
        truth, predicted: Indices of tags of each sentence's words.
        names: The tags' names.
    """
    pairs = [pair for one, two in zip(truth, predicted, strict=True) for pair in zip(one, two, strict=True)]
    rows = []
    for index, name in enumerate(names):
        has, said = (sum(pair[side] == index for pair in pairs) for side in (0, 1))
        rows.append(_row(name, has, said, sum(pair == (index, index) for pair in pairs)))
    return Table(
        "By tag",
        ["tag", *COUNTED],
        rows,
        "Held-out words that have, are given, and have and are given the tag.",
    )
