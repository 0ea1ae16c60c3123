"""Text that tuning is not about, and what tuning cost there: ``evaluation.also``.

The set that comes with the package, ``general``, has passages of several registers and questions with answers. Its text
was written for it, so no model was trained on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moslora.data
from moslora.data.columns import without_keys
from moslora.data.encoding import encode_all
from moslora.data.files import read_records
from moslora.data.shapes import Example, to_examples
from moslora.data.splitting import thin_out
from moslora.data.tokenization import IGNORED, Encoded, Encoder, trained_count
from moslora.distributed import Team
from moslora.errors import EncodingError
from moslora.metrics.intervals import paired_examples
from moslora.recipe.schema import SHIPPED
from moslora.tasks.text.cost import Changed, Costs, passage_costs
from moslora.tasks.text.loss import Batch, text_batches
from moslora.tasks.text.room import check_tokens, positions_of

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["AlsoExamples", "AlsoSet", "encode_also", "measure_set", "per_token", "read_also", "summarize"]

SHIPPED_FILES = ("texts.jsonl", "questions.jsonl")
LEAST = 2  # tokens of a passage, the first of which nothing comes before


@dataclass(frozen=True)
class AlsoExamples:
    """A set as it was read.

    Attributes:
        name: What it is called in tables and records.
        source: The file or hub id; ``general`` for the package's own.
        sha256: Of the file, or of the package's files together.
        examples: Its passages.
    """

    name: str
    source: str
    sha256: str
    examples: Sequence[Example]


@dataclass(frozen=True)
class AlsoSet:
    """A set, encoded.

    Attributes:
        name, source, sha256: As it was read.
        passages: Those that are measured.
        kinds: The register of each; empty where the data names none.
    """

    name: str
    source: str
    sha256: str
    passages: Sequence[Encoded]
    kinds: Sequence[str]


def read_also(also: Sequence[str], ignore: Sequence[str]) -> list[AlsoExamples]:
    """Read the sets that a recipe names.

    Args:
        also: ``evaluation.also``.
        ignore: ``data.ignore``.

    Raises:
        DataError: If one cannot be used.
    """
    stems = [Path(source).stem for source in also]
    found = []
    for source, stem in zip(also, stems, strict=True):
        if source == SHIPPED:
            found.append(_shipped())
            continue
        records, _ = without_keys(read_records(source), ignore)
        examples = to_examples(records)
        # Names are keys of records; two files of one name are told apart by their folders.
        name = source if stems.count(stem) > 1 or stem == SHIPPED else stem
        found.append(AlsoExamples(name, records.source, records.sha256, examples))
    return found


def _shipped() -> AlsoExamples:
    import hashlib

    folder = Path(moslora.data.__file__).parent / "general"
    parts = [read_records(str(folder / name)) for name in SHIPPED_FILES]
    examples = [
        replace(example, place=f"{Path(part.source).name}, {example.place}")
        for part in parts
        for example in to_examples(part)
    ]
    both = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    return AlsoExamples(SHIPPED, SHIPPED, both, examples)


def encode_also(
    sets: Sequence[AlsoExamples],
    encoder: Encoder,
    config: Any,
    limit: int | None = None,
    text_encoder: Encoder | None = None,
    warn: Callable[[str], object] = lambda _: None,
) -> list[AlsoSet]:
    """Encode sets as the task's own examples are.

    The package's own set is cut to what the model can look up, and left without an end of text, which an instruct model
    has no reason to expect there; what this model's template or vocabulary cannot hold of it is left out. Whatever is
    not measured of a set is counted in a warning.

    Args:
        sets: As they were read.
        encoder: The task's.
        config: The model's configuration.
        limit: Passages of each set at most, evenly spread; None for all.
        text_encoder: For passages of plain text, where the task's is for conversations alone.
        warn: Told what is left out.

    Raises:
        EncodingError: If a set of the user's cannot be encoded.
    """
    encoded = []
    size = getattr(_text_config(config), "vocab_size", None)
    for also in sets:
        examples = also.examples if limit is None else thin_out(also.examples, limit)
        groups = {
            text_encoder or encoder: [e for e in examples if e.text is not None],
            encoder: [e for e in examples if e.text is None or text_encoder is None],
        }
        passages: list[Encoded] = []
        for chosen, group in groups.items():
            if also.source == SHIPPED:
                passages += _of_shipped(group, _within(chosen, config), size)
            elif group:
                try:
                    passages += encode_all(group, chosen)[0]
                    check_tokens(size, {also.name: passages})
                except EncodingError as problem:
                    raise EncodingError(f"evaluation.also, {also.source}: {problem}") from problem
        kinds = {example.place: str(example.extra.get("kind") or "") for example in examples}
        passages = [passage for passage in passages if trained_count(passage.labels)]
        if len(passages) < len(examples):
            what = (
                "nothing of it is" if not passages else f"{len(passages)} of its {len(examples)} passages are"
            )
            warn(
                f"evaluation.also, {also.name}: {what} measured. The rest has no token to measure under this "
                "model's template, vocabulary and length."
            )
        if passages:
            names = [kinds[passage.place] for passage in passages]
            encoded.append(AlsoSet(also.name, also.source, also.sha256, passages, names))
    return encoded


def _of_shipped(examples: Sequence[Example], encoder: Encoder, size: Any) -> list[Encoded]:
    passages = []
    for example in examples:
        try:
            passage = encoder.encode(example)
        except EncodingError:
            continue  # a template that takes no such question
        if passage is None or (isinstance(size, int) and max(passage.input_ids) >= size):
            continue
        passages.append(passage if example.text is None else _without_end(passage, encoder))
    return passages


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _within(encoder: Encoder, config: Any) -> Encoder:
    """Return an encoder that cuts to the positions that a model has."""
    limits = [n for n in (encoder.max_length, positions_of(config)) if n is not None]
    return replace(encoder, max_length=max(LEAST, min(limits)) if limits else None, too_long="cut")


def _without_end(encoded: Encoded, encoder: Encoder) -> Encoded:
    end = encoder.tokenizer.eos_token_id
    if encoded.was_cut or not encoded.labels or encoded.labels[-1] != end:
        return encoded
    return replace(encoded, labels=[*encoded.labels[:-1], IGNORED])


def measure_set(
    also: AlsoSet,
    model: nn.Module,
    pad_id: int,
    device: str,
    changed: Changed = (),
    tuned: bool = True,
    done: Callable[[int], None] = lambda _: None,
    team: Team | None = None,
) -> Costs:
    """Measure base and tuned model on a set.

    Args:
        also: The set.
        model: The tuned model, or the base if not ``tuned``.
        pad_id: Token to pad short passages with.
        device: Where the model is.
        changed: From ``keep_changed``.
        tuned: Whether there is a tuned model.
        done: Told after each batch how many passages it had; of several processes, after each has had one.
        team: The processes that share the passages out; this one alone if None.

    Returns:
        Sums of each passage.
    """
    total = len(also.passages)
    costs = Costs([0] * total, *([0.0] * total for _ in range(3)))
    batches = text_batches(also.passages, pad_id)

    def work(batch: Batch) -> tuple[list[int], dict[str, Tensor]]:
        (measured,) = passage_costs(model, [batch], device, changed, tuned)
        return measured

    def told(chosen: Sequence[Batch], _: Any) -> None:
        done(sum(len(numbers) for numbers, _ in chosen))

    for numbers, sums in (team or Team()).share(batches, work, told):
        for name, values in sums.items():
            column = getattr(costs, name)
            for number, value in zip(numbers, values.tolist(), strict=True):
                column[number] = value
    return costs if tuned else replace(costs, tuned=[], kl=[])


def per_token(sums: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Return the share of each passage in a mean over tokens: numbers whose plain mean is that mean.

    Args:
        sums: Of each passage.
        tokens: Of each passage.
    """
    scale = len(tokens) / max(1, sum(tokens))
    return [value * scale for value in sums]


def summarize(also: AlsoSet, costs: Costs) -> dict[str, Any]:
    """Return what tuning cost on a set, ready for JSON.

    Args:
        also: The set.
        costs: What was measured on it, with a tuned model.

    Returns:
        ``before`` and ``after`` with the means over tokens, in nats; ``change`` with 95 % intervals over passages;
        ``kinds`` with the same means by register. A number that is not finite is null.
    """
    tokens = costs.tokens
    shares = {name: per_token(getattr(costs, name), tokens) for name in ("base", "tuned", "kl")}
    moved = [after - before for before, after in zip(shares["base"], shares["tuned"], strict=True)]
    kinds = {}
    for kind in dict.fromkeys(also.kinds):
        own = [number for number, of in enumerate(also.kinds) if of == kind]
        count = sum(tokens[number] for number in own)
        means = {
            name: _finite(sum(getattr(costs, name)[number] for number in own) / max(1, count))
            for name in ("base", "tuned", "kl")
        }
        kinds[kind] = {"passages": len(own), "tokens": count, **means}
    return {
        "source": also.source,
        "sha256": also.sha256,
        "passages": len(tokens),
        "tokens": sum(tokens),
        "before": {"loss": _mean(shares["base"]), "kl": 0.0},
        "after": {"loss": _mean(shares["tuned"]), "kl": _mean(shares["kl"])},
        "change": {"loss": _with_interval(moved), "kl": _with_interval(shares["kl"])},
        "kinds": kinds if len(kinds) > 1 else {},
    }


def _mean(values: Sequence[float]) -> float | None:
    return _finite(math.fsum(values) / len(values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_interval(values: Sequence[float]) -> dict[str, float] | None:
    """Return a mean with its interval over passages; None where it has none."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    found = paired_examples(list(values))
    return {"mean": found.mean, "low": found.low, "high": found.high, "p": found.p}
