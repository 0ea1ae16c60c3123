"""An encoded example as text: which parts are trained on."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from moslora.data.tokenization import IGNORED, Encoded, common_length, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["preview"]


def preview(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return an example as pieces of text, each with whether it is trained on.

    The pieces join to the whole decoded text, control tokens included. If a piece ends inside a character that takes
    several tokens, the whole character goes to the later piece.

    Args:
        encoded: The example.
        tokenizer: The model's.
    """
    whole = decode(encoded.input_ids, tokenizer)
    trained = [label != IGNORED for label in encoded.labels]
    starts = [at for at in range(len(trained)) if at == 0 or trained[at] != trained[at - 1]]
    # An incomplete character decodes as �, so only the common prefix with the whole text counts.
    cuts = [common_length(decode(encoded.input_ids[:at], tokenizer), whole) for at in starts]
    cuts = [*accumulate(cuts, max), len(whole)]
    pieces = zip(pairwise(cuts), starts, strict=True)
    return [(whole[start:stop], trained[at]) for (start, stop), at in pieces if stop > start]
