"""Whether a generated answer is right, and the confidence interval of the share of right answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import sqrt
from statistics import NormalDist
from typing import Any

from moslora.data.strict_json import parse_json
from moslora.errors import UsageError

__all__ = ["ANSWER_METRICS", "choice_equal", "json_equal", "short_equal", "text_equal", "wilson_interval"]


def json_equal(answer: str, reference: str) -> bool:
    """Return whether the whole answer parses as JSON and has the reference's value.

    The order of keys does not count, that of lists does. 1 equals 1.0, as JSON has one kind of number; true
    does not equal 1. An answer with NaN, with a key twice, or with anything but white space around the JSON
    is wrong.

    Args:
        answer: What the model wrote.
        reference: What it should have written.

    Raises:
        UsageError: If the reference is not JSON: then no answer could be right.
    """
    try:
        expected = parse_json(reference)
    except ValueError as problem:
        raise UsageError(
            f"the reference {reference[:60]!r} is not JSON: {problem}. Correct it, or take metric=text."
        ) from None
    try:
        return _same(parse_json(answer), expected)
    except ValueError:
        return False


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)  # Python has True == 1


def text_equal(answer: str, reference: str) -> bool:
    """Return whether both texts are equal but for white space around them."""
    return answer.strip() == reference.strip()


def short_equal(answer: str, reference: str) -> bool:
    """Return whether both are the same short answer, without regard to case, articles, white space and punctuation."""
    return _short(answer) == _short(reference)


def _short(text: str) -> str:
    words = re.sub(r"[^\w\s'-]", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def choice_equal(answer: str, reference: str) -> bool:
    """Return whether both name the same option of a multiple choice, as ``B``, ``(B)``, ``B.`` or ``B. cat``.

    Raises:
        UsageError: If the reference does not begin with the letter of an option: then no answer could be right.
    """
    expected = _option(reference)
    if expected is None:
        raise UsageError(
            f"the reference {reference[:60]!r} names no option. Begin it with a letter, such as B."
        )
    return _option(answer) == expected


def _option(text: str) -> str | None:
    found = re.match(r"\s*\(?([A-Z])(?:[).:]|\s*$)", text)
    return found[1] if found else None


ANSWER_METRICS: dict[str, Callable[[str, str], bool]] = {
    "json": json_equal,
    "text": text_equal,
    "short": short_equal,
    "choice": choice_equal,
}


def wilson_interval(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a share (E. B. Wilson, 1927).

    Unlike mean ± 2 standard errors, it stays within [0, 1] and is right near both ends and for few trials.

    Args:
        successes: How many of ``total``.
        total: Number of trials; with none, all of [0, 1] is possible.
        level: Confidence, between 0 and 1.

    Returns:
        Lower and upper bound.

    Raises:
        UsageError: If ``successes`` is not between 0 and ``total``, or ``level`` is out of range.
    """
    if not 0 <= successes <= total:
        raise UsageError(f"successes={successes} must be between 0 and total={total}.")
    if not 0 < level < 1:
        raise UsageError(f"level={level} must be between 0 and 1, both excluded.")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # At the ends the bound is exact; rounding alone would leave 1e-17 there.
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == total else middle + half
