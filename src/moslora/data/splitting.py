"""Held-out examples: split off by content, and the prompts that both sides share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from moslora.data.shapes import Example
from moslora.errors import UsageError

__all__ = [
    "draw_of",
    "mark_of",
    "overlap",
    "pick",
    "prompt_of",
    "set_aside",
    "share_draw",
    "split_heldout",
    "thin_out",
]


def prompt_of(example: Example) -> str:
    """Return what identifies an example's prompt: everything before its last answer, or its text."""
    if example.text is not None:
        return example.text
    if example.messages is None:
        return (
            json.dumps([example.prompt, *_variables(example)])
            if _variables(example)
            else example.prompt or ""
        )
    turns = example.messages
    last = max(i for i, message in enumerate(turns) if message.role == "assistant" and message.trained)
    return json.dumps([*(message.says() for message in turns[:last]), *_variables(example)])


def split_heldout(
    examples: Sequence[Example],
    fraction: float,
    seed: int,
    identity: Callable[[Example], Sequence[str]] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Split by a hash of each example's content, so that examples added later do not move the others.

    Equal examples are on the same side. The share held out is ``fraction`` on average; if one side would be
    empty, the nearest example is moved there.

    Args:
        examples: At least two that differ.
        fraction: Share to hold out, between 0 and 1.
        seed: Another seed is another split.
        identity: What makes examples equal, such as the pictures that they show; their content if None.

    Returns:
        Training and held-out examples, both in the order given, none empty.

    Raises:
        UsageError: If ``fraction`` is out of range, or fewer than two examples differ.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"fraction={fraction} must be between 0 and 1, both excluded.")
    if identity is None and hasattr(examples, "draws"):  # of examples that lie in files
        draws = examples.draws(seed).tolist()
    else:
        draws = [draw_of(e, seed) if identity is None else _draw(list(identity(e)), seed) for e in examples]
    if len(set(draws)) < 2:
        raise UsageError(
            f"{len(examples)} examples with {len(set(draws))} distinct cannot be split in two; add some."
        )
    lowest, highest = min(draws), max(draws)
    held_out = [draw == lowest or (draw < fraction and draw != highest) for draw in draws]
    train = [position for position, out in enumerate(held_out) if not out]
    return pick(examples, train), pick(examples, [position for position, out in enumerate(held_out) if out])


def pick(examples: Sequence[Example], positions: Any) -> Any:
    """Return some examples, in the order asked for.

    Args:
        examples: In a list, or in files, where they stay.
        positions: Which ones.
    """
    if hasattr(examples, "select"):
        return examples.select(positions)
    return [examples[position] for position in positions]


def set_aside(
    examples: Sequence[Example],
    count: int,
    seed: int,
    marks: Callable[[Example], Sequence[str]],
    identity: Callable[[Example], Sequence[str]] | None = None,
) -> tuple[list[Example], list[Example]]:
    """Take examples out of the training data, for example to choose a learning rate by.

    Args:
        examples: The training data.
        count: About how many to take; at most a quarter.
        seed: Another seed takes others.
        marks: What a remaining example must not share with one that was taken, such as its prompt. If all share
            something, all remain.
        identity: As for ``split_heldout``.

    Returns:
        The remaining examples, and those that were taken.

    Raises:
        UsageError: If fewer than two examples differ.
    """
    rest, aside = split_heldout(examples, min(0.25, count / len(examples)), seed, identity)
    if identity is None and hasattr(examples, "prompts"):
        import numpy

        alone = numpy.flatnonzero(~numpy.isin(_marks(rest), _marks(aside)))
        return (pick(rest, alone) if len(alone) else rest), aside
    taken_marks = {mark for example in aside for mark in marks(example)}
    return [example for example in rest if taken_marks.isdisjoint(marks(example))] or rest, aside


def thin_out(examples: Sequence[Example], count: int) -> list[Example]:
    """Return at most ``count`` examples, evenly spread, in their order."""
    total = len(examples)
    chosen = [i * total // count for i in range(count)] if count < total else range(total)
    return pick(examples, chosen)  # type: ignore[no-any-return]


def draw_of(example: Example, seed: int) -> float:
    """Return a number in [0, 1) that depends on an example's content and the seed alone.

    Args:
        example: Any example.
        seed: Another seed gives another number.
    """
    return _draw(_content(example), seed)


def share_draw(example: Example, seed: int) -> str:
    """Return what decides whether an example is in a share of its file, as hexadecimal digits.

    Args:
        example: Any example.
        seed: Another seed takes another share.
    """
    turns = [message.says() for message in example.messages or ()]
    content = [seed, "weight", turns, example.prompt, example.completion, example.text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _content(example: Example) -> list[Any]:
    turns = [(m.role, m.content, m.trained, *m.says()[2:]) for m in example.messages or ()]
    return [turns, example.prompt, example.completion, example.text, *_variables(example)]


def _variables(example: Example) -> list[Any]:
    """Return the template's variables, if there are any: without, a hash is what it was before there were any."""
    return [dict(example.template_arguments)] if example.template_arguments else []


def _draw(content: Sequence[Any], seed: int) -> float:
    """Return a number in [0, 1) that depends on content and seed alone."""
    text = json.dumps([seed, *content])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def overlap(train: Iterable[Example], heldout: Iterable[Example]) -> int:
    """Return how many held-out examples have a prompt that a training example has too."""
    if hasattr(train, "prompts") or hasattr(heldout, "prompts"):
        import numpy

        return int(numpy.isin(_marks(heldout), _marks(train)).sum())
    trained_prompts = {prompt_of(example) for example in train}
    return sum(prompt_of(example) in trained_prompts for example in heldout)


def mark_of(text: str) -> int:
    """Return 64 bits of a hash of a text.

    Args:
        text: Such as a prompt.
    """
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _marks(examples: Any) -> Any:
    """Return ``mark_of`` the prompts of examples, which those in files have ready."""
    import numpy

    if hasattr(examples, "prompts"):
        return examples.prompts()
    return numpy.array([mark_of(prompt_of(example)) for example in examples], dtype=numpy.uint64)
