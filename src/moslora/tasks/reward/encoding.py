"""Pairs of answers as token ids, each behind its prompt, and what is shown of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import Summary, Tally
from moslora.data.preferences import Preference
from moslora.data.tokenization import Encoder, decode
from moslora.errors import EncodingError

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["EncodedPair", "encode_pairs", "longer_share", "show_pairs"]

SHOWN = 1024  # tokens of each answer's row that the preview shows


@dataclass(frozen=True)
class EncodedPair:
    """A pair, ready to train and to be scored.

    Attributes:
        place: Where it stands in its file.
        chosen_ids, rejected_ids: Tokens of prompt and answer.
        answer: The chosen answer, as text.
        rejected: The rejected answer.
    """

    place: str
    chosen_ids: list[int]
    rejected_ids: list[int]
    answer: str
    rejected: str

    @property
    def input_ids(self) -> list[int]:
        """The tokens of the longer row."""
        return max(self.chosen_ids, self.rejected_ids, key=len)


def encode_pairs(pairs: Sequence[Preference], encoder: Encoder) -> tuple[list[EncodedPair], Summary]:
    """Encode every pair and count what happened; a pair of which an answer is dropped goes as a whole.

    Args:
        pairs: The pairs.
        encoder: How to encode the answers, each behind its prompt.

    Returns:
        The encoded pairs in order, and the counts of their rows.

    Raises:
        EncodingError: If answers cannot be encoded, or both are the same tokens, naming the first and how many more; or
            if none is left.
    """
    found: list[EncodedPair] = []
    problems: list[EncodingError] = []
    tally = Tally(encoder)
    for pair in pairs:
        assert pair.chosen is not None and pair.rejected is not None
        try:
            whole = [encoder.encode_whole(one) for one in (pair.chosen, pair.rejected)]
            if whole[0].input_ids == whole[1].input_ids:
                raise EncodingError(
                    f"{pair.place}: fields 'chosen' and 'rejected' are the same tokens, so nothing is preferred; "
                    "remove the row."
                )
            fitted = [encoder.fit(one) for one in whole]
        except EncodingError as problem:
            problems.append(problem)
            continue
        one, two = fitted
        if one is None or two is None or one.input_ids == two.input_ids:
            one = two = None  # what tells the answers apart was beyond the limit
        for row, kept in zip(whole, (one, two), strict=True):
            tally.add(row, kept)
        if one is not None and two is not None:
            found.append(EncodedPair(pair.place, one.input_ids, two.input_ids, one.answer, two.answer))
    if problems:
        more = f" ({len(problems) - 1} more pairs cannot be encoded either)" if problems[1:] else ""
        raise EncodingError(f"{problems[0]}{more}") from problems[0].__cause__
    if not found:
        raise EncodingError(
            f"none of {len(pairs)} pairs is left within max_length={encoder.max_length}: raise trainer.max_length (the "
            f"longest row has {tally.longest} tokens)."
        )
    return found, tally.summary()


def longer_share(pairs: Sequence[EncodedPair]) -> float:
    """Return the share of pairs in which the chosen answer is the longer one; of one length counts half."""
    lengths = [(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return fmean((one > two) + (one == two) / 2 for one, two in lengths)


def show_pairs(
    display: Display,
    tokenizer: Any,
    train: Sequence[EncodedPair],
    heldout: Sequence[EncodedPair],
    summaries: Sequence[Summary],
) -> None:
    """Show what is learned, with one pair as the model reads it.

    Args:
        display: Where to show it.
        tokenizer: The model's.
        train, heldout: The encoded pairs.
        summaries: Counts of both.
    """
    from rich.text import Text

    longer = longer_share(train)
    display.say(
        f"Training pairs: {len(train)}, held out: {len(heldout)}. Tokens: {summaries[0].tokens}. Longest row: "
        f"{summaries[0].longest} tokens. The chosen answer is the longer one in {longer:.0%} of the pairs."
    )
    marked = Text("One pair, as the model reads it; ")
    for name, ids, style in (
        ("chosen", train[0].chosen_ids, "bold green"),
        ("rejected", train[0].rejected_ids, "bold red"),
    ):
        marked.append(f"\n{name}: ", style)
        marked.append(decode(ids[:SHOWN], tokenizer), "dim")
        if len(ids) > SHOWN:
            marked.append(f" … and {len(ids) - SHOWN} more tokens", "dim")
    display.show(marked)
    display.say()
    if not 0.2 <= longer <= 0.8:
        which = "longer" if longer > 0.5 else "shorter"
        display.warn(
            f"In {max(longer, 1 - longer):.0%} of the pairs the chosen answer is the {which} one, so a reward for "
            "length alone does well. Compare the accuracy with that of length, which stands beside it."
        )
    for what, summary in zip(("Training data", "Held-out data"), summaries, strict=True):
        for warning in summary.warnings():
            if "learn to stop" not in warning and "end-of-turn" not in warning:
                display.warn(f"{what}: {warning}")
