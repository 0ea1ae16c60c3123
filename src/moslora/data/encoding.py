"""All examples of a data set encoded, with the counts of the set and the warnings that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moslora.data.batched import batched
from moslora.data.shapes import Example
from moslora.data.tokenization import Encoded, Encoder, trained_count
from moslora.errors import EncodingError

__all__ = [
    "SHOWN_ROWS",
    "Summary",
    "Tally",
    "encode_all",
    "lengths_of",
    "none_left",
    "several_failed",
    "summarized",
]

SHOWN_ROWS = 3  # places that a warning or an error names
AT_ONCE = 256  # examples


@dataclass(frozen=True)
class Summary:
    """Counts of a set of encoded examples; dropped ones count in ``dropped`` and ``longest`` only.

    Attributes:
        examples: How many there are to train on.
        tokens: Their tokens.
        trained_tokens: Those of them that are trained on.
        longest: Tokens of the longest example, before any cut or drop.
        cut: How many lost their end.
        dropped: How many were dropped for their length.
        without_end: How many have no end-of-turn token among their trained tokens, and do not teach to stop.
        prompt_differs: How many prompts have other tokens in generation than in training.
        control_text: How many contain a control token in the text of a turn.
        loses_context: How many have an earlier answer, not learned, of which the chat template leaves out text.
        misspelt: How many have tokens that spell another text than what is learned.
        first: Where the first ones of each of these are, and how many more there are.
        max_length: The limit.
        end_tokens: The end-of-turn tokens, as text.
        longest_is_least: Whether ``longest`` is a lower bound.
    """

    examples: int
    tokens: int
    trained_tokens: int
    longest: int
    cut: int
    dropped: int
    without_end: int
    prompt_differs: int
    control_text: int
    loses_context: int
    misspelt: int
    first: Mapping[str, str]
    max_length: int | None
    end_tokens: tuple[str, ...]
    longest_is_least: bool = False

    def warnings(self) -> list[str]:
        """Return what a person should know before training, most serious first."""
        total = self.examples + self.dropped
        ends = " or ".join(map(repr, self.end_tokens)) or "(the tokenizer names none)"
        warnings = []
        if self.without_end == self.examples:
            warnings.append(
                f"the end-of-turn token {ends} is never among the trained tokens: "
                "the model will not learn to stop"
            )
        elif self.without_end > self.cut:
            warnings.append(
                f"{self.without_end} of {self.examples} examples train no end-of-turn token {ends} "
                f"(first: {self.first['without_end']})"
            )
        more = " and more" if self.longest_is_least else ""
        for count, fate in ((self.dropped, "dropped"), (self.cut, "cut")):
            if count:
                where = f" (first: {self.first[fate]})" if fate in self.first else ""
                warnings.append(
                    f"{count} of {total} examples are longer than max_length={self.max_length} and were "
                    f"{fate}{where}: raise trainer.max_length (the longest has {self.longest} tokens{more})"
                )
        if self.misspelt:
            warnings.append(
                f"in {self.misspelt} of {self.examples} examples the tokens spell another text than what is learned "
                f"(first: {self.first['misspelt']}): the tokenizer has no tokens for some characters, or changes them. "
                "Write these texts with characters that it has, or choose another model"
            )
        if self.loses_context:
            warnings.append(
                f"in {self.loses_context} of {self.examples} examples the chat template leaves out text of an earlier "
                f"answer, most often its thoughts (first: {self.first['loses_context']}): the model does not read it, "
                "in training as in generation"
            )
        if self.prompt_differs:
            warnings.append(
                f"in {self.prompt_differs} of {self.examples} examples (first: "
                f"{self.first['prompt_differs']}) the prompt has other tokens in generation than in "
                "training: white space between prompt and answer is joined into one token (move it from the prompt's "
                "end to the answer's start, or remove it), or the chat template is at fault"
            )
        if self.control_text:
            warnings.append(
                f"{self.control_text} of {self.examples} examples contain a control token in their text (first: "
                f"{self.first['control_text']}), which the model will read as one: remove it unless it is intended"
            )
        return warnings


COUNTED = (
    "examples", "tokens", "trained_tokens", "cut", "dropped", "without_end", "prompt_differs", "control_text",
    "loses_context", "misspelt",
)  # fmt: skip
TOTALS = COUNTED[:3]  # what nobody asks the places of


def _listed(places: Sequence[str], count: int) -> str:
    """Return the first places, and how many more there are."""
    more = count - len(places)
    return ", ".join(places) + (f" and {more} more" if more > 0 else "")


class Tally:
    """Counts encoded examples one by one, without keeping them.

    Args:
        encoder: What encodes them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.longest, self.longest_is_least = 0, False
        self._first: dict[str, list[str]] = {}
        self._counts = dict.fromkeys(COUNTED, 0)

    def add(self, whole: Encoded, fitted: Encoded | None) -> None:
        """Count an example.

        Args:
            whole: From ``Encoder.encode_whole``.
            fitted: The same after ``Encoder.fit``; None if it was dropped.
        """
        if whole.full_length > self.longest:
            self.longest, self.longest_is_least = whole.full_length, whole.is_start
        if fitted is None:
            self._counts["dropped"] += 1
            places = self._first.setdefault("dropped", [])
            if len(places) < SHOWN_ROWS:
                places.append(whole.place)
            return
        counted = {
            "examples": 1,
            "tokens": len(fitted.input_ids),
            "trained_tokens": trained_count(fitted.labels),
            "cut": fitted.was_cut,
            "without_end": self.encoder.stop_ids.isdisjoint(fitted.labels),
            "prompt_differs": fitted.prompt_differs,
            "control_text": fitted.control_text,
            "loses_context": fitted.loses_context,
            "misspelt": fitted.misspelt,
        }
        for name, count in counted.items():
            self._counts[name] += int(count)
            if not count or name in TOTALS:
                continue
            places = self._first.setdefault(name, [])
            if len(places) < SHOWN_ROWS:
                places.append(whole.place)

    def summary(self) -> Summary:
        """Return the counts so far."""
        return summarized(self.encoder, self._counts, self._first, self.longest, self.longest_is_least)


def encode_all(examples: Sequence[Example], encoder: Encoder) -> tuple[list[Encoded], Summary]:
    """Encode every example and count what happened.

    Args:
        examples: The examples.
        encoder: How to encode them.

    Returns:
        The encoded examples in order, without those dropped, and the counts.

    Raises:
        EncodingError: If examples cannot be encoded, naming the first and how many more; or if none is left.
    """
    encoded: list[Encoded] = []
    problems: list[tuple[str, EncodingError]] = []
    tally = Tally(encoder)
    at_once = batched(encoder)
    for start in range(0, len(examples), AT_ONCE):
        several = examples[start : start + AT_ONCE]
        for example, whole in zip(several, at_once.encode_many(several), strict=True):
            try:
                if isinstance(whole, EncodingError):
                    raise whole
                fitted = encoder.fit(whole)
            except EncodingError as problem:
                problems.append((example.place, problem))
                continue
            tally.add(whole, fitted)
            if fitted is not None:
                encoded.append(fitted)
    if problems:
        error = several_failed([(place, str(problem)) for place, problem in problems], len(problems))
        raise error from problems[0][1].__cause__
    if not encoded:
        raise none_left(len(examples), encoder, tally.longest)
    return encoded, tally.summary()


def several_failed(problems: Sequence[tuple[str, str]], count: int) -> EncodingError:
    """Return one error for examples that cannot be encoded.

    Args:
        problems: Of the first of them, the place and what is wrong.
        count: How many there are.
    """
    others = _listed([place for place, _ in problems[1 : 1 + SHOWN_ROWS]], count - 1)
    many = "s cannot" if count > 2 else " cannot"
    more = f" ({count - 1} more example{many} be encoded either: {others})" if others else ""
    return EncodingError(f"{problems[0][1]}{more}")


def none_left(count: int, encoder: Encoder, longest: int) -> EncodingError:
    """Return the error of a set whose examples were all dropped.

    Args:
        count: How many there were.
        encoder: What has the limit.
        longest: Tokens of the longest.
    """
    return EncodingError(
        f"none of {count} examples is left within max_length={encoder.max_length}: raise "
        f"trainer.max_length (the longest has {longest} tokens)."
    )


def summarized(
    encoder: Encoder,
    counts: Mapping[str, int],
    first: Mapping[str, Sequence[str]],
    longest: int,
    longest_is_least: bool,
) -> Summary:
    """Return counts of a set in the form in which they are shown.

    Args:
        encoder: What encoded it.
        counts: By the names in ``COUNTED``; those that are not there are 0.
        first: Places of the first ones, by the same names.
        longest: Tokens of the longest example.
        longest_is_least: Whether that is a lower bound.
    """
    names = encoder.tokenizer.convert_ids_to_tokens(sorted(encoder.stop_ids))
    return Summary(
        **{name: counts.get(name, 0) for name in COUNTED},
        first={name: _listed(places, counts[name]) for name, places in first.items()},
        longest=longest,
        longest_is_least=longest_is_least,
        max_length=encoder.max_length,
        end_tokens=tuple(names),
    )


def lengths_of(encoded: Sequence[Any]) -> list[int]:
    """Return the number of tokens of each encoded example, which those in files have ready.

    Args:
        encoded: The examples.
    """
    known = getattr(encoded, "lengths", None)
    return [len(one.input_ids) for one in encoded] if known is None else known
