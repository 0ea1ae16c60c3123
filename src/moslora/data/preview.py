"""An encoded example as text: which parts are trained on."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from moslora.data.tokenization import IGNORED, Encoded, common_length, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MOST", "preview"]


MOST = (
    4096  # tokens of an example that are shown; where pieces begin takes the square of their number to find
)


def preview(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> list[tuple[str, bool]]:
    """Return an example as pieces of text, each with whether it is trained on.

    The pieces join to the whole decoded text, control tokens included. If a piece ends inside a character that takes
    several tokens, the whole character goes to the later piece.

    Args:
        encoded: The example.
        tokenizer: The model's.
        most: How many tokens are shown; the rest is counted in a last piece. None for all.
    """
    if most is not None and len(encoded.input_ids) > most:
        start = replace(encoded, input_ids=encoded.input_ids[:most], labels=encoded.labels[:most])
        rest = f" … and {len(encoded.input_ids) - most} more tokens"
        return [*preview(start, tokenizer), (rest, False)]
    whole = decode(encoded.input_ids, tokenizer)
    trained = [label != IGNORED for label in encoded.labels]
    starts = [at for at in range(len(trained)) if at == 0 or trained[at] != trained[at - 1]]
    # An incomplete character decodes as �, so only the common prefix with the whole text counts.
    cuts = [common_length(decode(encoded.input_ids[:at], tokenizer), whole) for at in starts]
    cuts = [*accumulate(cuts, max), len(whole)]
    pieces = zip(pairwise(cuts), starts, strict=True)
    return [(whole[start:stop], trained[at]) for (start, stop), at in pieces if stop > start]
