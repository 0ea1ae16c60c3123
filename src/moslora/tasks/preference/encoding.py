"""Preferences as token ids: both answers behind their prompt, with what is compared labeled, and their counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import Summary, Tally
from moslora.data.preferences import Preference
from moslora.data.preview import preview
from moslora.data.tokenization import IGNORED, Encoded, Encoder
from moslora.errors import EncodingError

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["Judged", "Lengths", "encode_preferences", "show_preferences"]

SHOWN = 2048  # tokens of each answer's row that the preview shows


@dataclass(frozen=True)
class Judged:
    """A preference, encoded.

    Attributes:
        place: Where it stands in its file.
        chosen: The prompt with the answer that is preferred, or wanted; None for one that is not wanted.
        rejected: The prompt with the answer that is not; None for one that is wanted.
    """

    place: str
    chosen: Encoded | None
    rejected: Encoded | None

    @property
    def rows(self) -> tuple[Encoded, ...]:
        """The one or two rows that the model sees."""
        return tuple(row for row in (self.chosen, self.rejected) if row is not None)

    @property
    def is_pair(self) -> bool:
        """Whether it has both answers."""
        return len(self.rows) == 2

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the first row."""
        return self.rows[0].input_ids

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens from which an answer is generated."""
        return self.rows[0].prompt_ids

    @property
    def answer(self) -> str:
        """The answer that is preferred, or wanted; empty where there is none."""
        return "" if self.chosen is None else self.chosen.answer


@dataclass(frozen=True)
class Lengths:
    """Mean lengths of answers in tokens; 0 where there are none.

    Attributes:
        chosen, rejected: Of preferred or wanted answers, and of the others.
        longer: Share of pairs in which the preferred answer is the longer one, both of one length counting half; None
            without pairs.
    """

    chosen: float
    rejected: float
    longer: float | None

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Lengths:
        """Measure them."""
        chosen = [answer_length(one.chosen) for one in judged if one.chosen is not None]
        rejected = [answer_length(one.rejected) for one in judged if one.rejected is not None]
        pairs = [
            (answer_length(one.chosen), answer_length(one.rejected))
            for one in judged
            if one.chosen is not None and one.rejected is not None
        ]
        longer = fmean((a > b) + (a == b) / 2 for a, b in pairs) if pairs else None
        return cls(fmean(chosen or [0]), fmean(rejected or [0]), longer)

    def sentence(self) -> str:
        """Say them in words."""
        if self.longer is None:
            return (
                f"Wanted answers have {self.chosen:.1f} tokens on average, unwanted ones {self.rejected:.1f}."
            )
        return (
            f"Preferred answers have {self.chosen:.1f} tokens on average, rejected ones {self.rejected:.1f}; the "
            f"preferred one is the longer in {self.longer:.0%} of the pairs."
        )

    def warning(self) -> str | None:
        """Say what length alone can teach; None if it can teach little."""
        if self.longer is None or 0.2 <= self.longer <= 0.8:
            return None
        which, other = ("longer", "long") if self.longer > 0.5 else ("shorter", "short")
        share = max(self.longer, 1 - self.longer)
        return (
            f"In {share:.0%} of the pairs the preferred answer is the {which} one, so a model can do well by {other} "
            "answers alone. Look at answer_tokens after training; losses that divide by length (ipo, dpo-norm, simpo) "
            "are less open to it."
        )


def answer_length(row: Encoded) -> int:
    """Return how many tokens of a row are compared."""
    return sum(label != IGNORED for label in row.labels)


def encode_preferences(preferences: Sequence[Preference], encoder: Encoder) -> tuple[list[Judged], Summary]:
    """Encode every preference and count what happened; one of whose answers is dropped goes as a whole.

    Args:
        preferences: The preferences.
        encoder: How to encode their answers, each behind its prompt.

    Returns:
        The encoded ones in order, and the counts of their rows.

    Raises:
        EncodingError: If answers cannot be encoded, or both of a pair are the same tokens, naming the first and how
            many more; or if none is left.
    """
    judged: list[Judged] = []
    problems: list[EncodingError] = []
    tally = Tally(encoder)
    for preference in preferences:
        try:
            whole = [
                None if one is None else encoder.encode_whole(one)
                for one in (preference.chosen, preference.rejected)
            ]
            if None not in whole and _tokens(whole[0]) == _tokens(whole[1]):
                raise EncodingError(
                    f"{preference.place}: fields 'chosen' and 'rejected' are the same tokens, so nothing is preferred; "
                    "remove the row."
                )
            fitted = [None if one is None else encoder.fit(one) for one in whole]
        except EncodingError as problem:
            problems.append(problem)
            continue
        kept = [one for one, was in zip(fitted, whole, strict=True) if was is not None]
        if None in kept or (len(kept) == 2 and _tokens(kept[0]) == _tokens(kept[1])):
            kept = [None] * len(kept)  # what tells the answers apart was beyond the limit
        for one, was in zip(kept, (one for one in whole if one is not None), strict=True):
            tally.add(was, one)
        if None not in kept:
            judged.append(
                Judged(preference.place, *(None if one is None else _trimmed(one) for one in fitted))
            )
    if problems:
        more = f" ({len(problems) - 1} more rows cannot be encoded either)" if problems[1:] else ""
        raise EncodingError(f"{problems[0]}{more}") from problems[0].__cause__
    if not judged:
        raise EncodingError(
            f"none of {len(preferences)} rows is left within max_length={encoder.max_length}: raise "
            f"trainer.max_length (the longest has {tally.longest} tokens)."
        )
    return judged, tally.summary()


def _tokens(row: Encoded | None) -> Any:
    return None if row is None else _trimmed(row).input_ids


def _trimmed(row: Encoded) -> Encoded:
    """Return a row without what follows the last compared token: no answer's probability depends on it."""
    from dataclasses import replace

    end = max(at for at, label in enumerate(row.labels) if label != IGNORED) + 1
    return replace(row, input_ids=row.input_ids[:end], labels=row.labels[:end])


def show_preferences(
    display: Display,
    tokenizer: Any,
    train: Sequence[Judged],
    heldout: Sequence[Judged],
    summaries: Sequence[Summary],
    learns_prompts: bool,
) -> None:
    """Show what is learned, with one preference whose compared tokens are marked.

    Args:
        display: Where to show it.
        tokenizer: The model's.
        train, heldout: The encoded preferences.
        summaries: Counts of both.
        learns_prompts: Whether the loss learns the tokens of a chosen answer's prompt too.
    """
    from rich.text import Text

    what = "pairs" if train[0].is_pair else "answers"
    counts = summaries[0]
    display.say(
        f"Training {what}: {len(train)}, held out: {len(heldout)}. Tokens: {counts.tokens}, of which compared: "
        f"{counts.trained_tokens} ({counts.trained_tokens / counts.tokens:.0%}). Longest row: {counts.longest} tokens. "
        f"{Lengths.of(train).sentence()}"
    )
    first = (
        [train[0]]
        if train[0].is_pair
        else [next(p for p in train if getattr(p, k)) for k in ("chosen", "rejected")]
    )
    marked = Text("One preference; ")
    marked.append("⟦what is made more likely⟧", "bold green")
    marked.append(", ")
    marked.append("⟦what is made less likely⟧", "bold red")
    marked.append(":\n")
    for side, style in (("chosen", "bold green"), ("rejected", "bold red")):
        row = next(found for one in first if (found := getattr(one, side)) is not None)
        for piece, compared in preview(row, tokenizer, SHOWN):
            counted = compared or (learns_prompts and side == "chosen")
            marked.append(f"⟦{piece}⟧" if counted else piece, style if counted else "dim")
        marked.append("\n")
    display.show(marked)
    if learns_prompts:
        display.say("This loss of TRL's learns the tokens of the chosen answer's prompt as well.")
    display.say()
    for what, summary in zip(("Training data", "Held-out data"), summaries, strict=True):
        for warning in summary.warnings():
            display.warn(f"{what}: {warning}")
    if lengths := Lengths.of(train).warning():
        display.warn(lengths)
