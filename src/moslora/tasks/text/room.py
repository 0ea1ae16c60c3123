"""Whether a model has a place for every token and every position of the rows that it will see, before it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.data.encoding import lengths_of
from moslora.data.stored.encoding import EncodedSet
from moslora.errors import EncodingError

if TYPE_CHECKING:
    from moslora.data.tokenization import Encoded

__all__ = ["check_room", "check_tokens", "positions_of"]

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# What a configuration has whose model computes positions instead of looking them up.
COMPUTED = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base", "alibi")


def check_room(
    config: Any,
    sets: Mapping[str, Sequence[Encoded]],
    asked: Sequence[Encoded],
    new_tokens: int,
    warn: Callable[[str], None],
) -> None:
    """Refuse rows that a model cannot look up, and warn of those that are longer than it was made for.

    Args:
        config: The model's configuration.
        sets: Encoded examples by what they are called.
        asked: Those whose answers are generated.
        new_tokens: How many tokens an answer may have.
        warn: Told of rows beyond the context of a model that computes its positions.

    Raises:
        EncodingError: If a token is beyond the vocabulary, or a row beyond the positions of a model that looks them up.
    """
    check_tokens(getattr(config, "vocab_size", None), sets)
    limit = positions_of(config)
    if limit is None:
        return
    rows = [
        (length, f"{place} of the {what} data", 0)
        for what, s in sets.items()
        for length, place in _longest(s)
    ]
    rows += [(len(e.prompt_ids) + new_tokens, f"{e.place} of the held-out data", new_tokens) for e in asked]
    length, place, answer = max(rows, default=(0, "", 0))
    if length <= limit:
        return
    with_answer = f", {answer} of them for the answer (task.max_new_tokens)" if answer else ""
    what = f"{place} takes {length} tokens{with_answer}, and the model was made for {limit}"
    if any(getattr(config, name, None) for name in COMPUTED):
        warn(f"{what}: beyond them its answers get worse. Lower trainer.max_length, or keep to shorter rows.")
        return
    raise EncodingError(
        f"{what}, which it looks up by position. Set trainer.max_length={limit}"
        + (
            ", lower task.max_new_tokens or leave out the row."
            if answer
            else " or lower, or shorten the row."
        )
    )


def _longest(examples: Sequence[Encoded]) -> list[tuple[int, str]]:
    """Return length and place of the longest examples."""
    lengths = lengths_of(examples)
    most = max(lengths, default=0)
    found = [at for at, length in enumerate(lengths) if length == most]
    # Of examples in files there may be very many that are cut to one length.
    found = found[:1] if isinstance(examples, EncodedSet) else found
    return [(most, examples[at].place) for at in found]


def positions_of(config: Any) -> int | None:
    """Return for how many positions a model was made; None if its configuration does not say.

    Args:
        config: The model's configuration; of a model with several parts, that of its text counts.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = (getattr(text, name, None) for name in POSITIONS)
    limit = next((number for number in known if isinstance(number, int)), None)
    return None if limit is None or limit < 1 else limit


def check_tokens(size: Any, sets: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a token that the embedding has no row for.

    Args:
        size: Of the model's vocabulary, if it is known.
        sets: Encoded examples by what they are called.

    Raises:
        EncodingError: If there is one.
    """
    if not isinstance(size, int):
        return
    for what, examples in sets.items():
        if isinstance(examples, EncodedSet):
            # Of examples in files the largest token is known.
            examples = examples.select((examples.column("largest") >= size).nonzero()[0][:1])
        for encoded in examples:
            largest = max(encoded.input_ids, default=0)
            if largest >= size:
                raise EncodingError(
                    f"{encoded.place} of the {what} data has the token {largest}, and the model's vocabulary ends at "
                    f"{size - 1}: the tokenizer belongs to another model, or has tokens that were added after. Name "
                    "the model's own tokenizer (model.tokenizer), or save the model with its embedding resized."
                )
