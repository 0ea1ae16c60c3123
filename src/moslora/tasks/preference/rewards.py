"""What a model makes of preferences: log-probabilities, rewards, and how far it is from its reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.metrics.answers import wilson_interval
from moslora.recipe.preferences import PreferenceLoss
from moslora.tasks.preference.encoding import Judged
from moslora.tasks.text.loss import logits_are_plain, text_batches, unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Scored", "reference_of", "score_preferences"]

# Positions whose distributions over the vocabulary are in memory at a time, twice.
KL_ROWS = 256


@dataclass(frozen=True)
class Side:
    """What was measured of one answer.

    Attributes:
        logp: Its log-probability, in nats: the sum over its tokens.
        reference: The reference's.
        tokens: How many those are.
        kl: KL divergence of the model from the reference, in nats: the sum over its tokens' positions.
    """

    logp: float
    reference: float
    tokens: int
    kl: float

    def reward(self, loss: PreferenceLoss, beta: float) -> float:
        """Return the answer's reward in a loss, unitless."""
        mean = self.logp / self.tokens
        match loss.reward:
            case "ratio":
                return beta * (self.logp - self.reference)
            case "mean ratio":
                return beta * (self.logp - self.reference) / self.tokens
            case "bare mean ratio":
                return (self.logp - self.reference) / self.tokens
            case "sum":
                return beta * self.logp
            case "mean":
                return beta * mean
            case "odds":
                return mean - _log1mexp(mean)


@dataclass(frozen=True)
class Scored:
    """What was measured of one preference.

    Attributes:
        chosen, rejected: Of its answers; None for one that it does not have.
    """

    chosen: Side | None
    rejected: Side | None

    @property
    def sides(self) -> tuple[Side, ...]:
        """The measured answers."""
        return tuple(side for side in (self.chosen, self.rejected) if side is not None)

    def margin(self, loss: PreferenceLoss, beta: float) -> float:
        """Return the reward of the chosen answer over the rejected one's; what is not there has a reward of 0."""
        rewards = [0.0 if side is None else side.reward(loss, beta) for side in (self.chosen, self.rejected)]
        return rewards[0] - rewards[1]

    def is_preferred(self) -> bool | None:
        """Return whether the model finds the chosen answer more probable than the rejected one; None if one lacks."""
        if self.chosen is None or self.rejected is None:
            return None
        return self.chosen.logp > self.rejected.logp


def measures_of(
    scored: Sequence[Scored], loss: PreferenceLoss, beta: float
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return what a report shows of scored preferences: numbers by name, and intervals of those that are shares.

    Args:
        scored: Held-out preferences.
        loss: The recipe's.
        beta: Of it.
    """
    margins = [one.margin(loss, beta) for one in scored]
    halves = [(margin > 0) + (margin == 0) / 2 for margin in margins]
    metrics = {
        "loss": fmean(map(negative_log_sigmoid, margins)),
        "reward_accuracy": fmean(halves),
        "reward_margin": _margin_of_means(scored, loss, beta),
    }
    intervals = {}
    if any(margins):  # a model is indifferent between answers by the measure of itself
        intervals["reward_accuracy"] = wilson_interval(round(sum(halves)), len(halves))
    preferred = [found for one in scored if (found := one.is_preferred()) is not None]
    if preferred:
        metrics["prefers_chosen"] = fmean(map(float, preferred))
        intervals["prefers_chosen"] = wilson_interval(sum(preferred), len(preferred))
    for name in ("chosen", "rejected"):
        sides = [side for one in scored if (side := getattr(one, name)) is not None]
        if sides:
            metrics[f"{name}_logp"] = fmean(side.logp for side in sides)
    every = [side for one in scored for side in one.sides]
    metrics["kl"] = sum(side.kl for side in every) / max(1, sum(side.tokens for side in every))
    return metrics, intervals


def _margin_of_means(scored: Sequence[Scored], loss: PreferenceLoss, beta: float) -> float:
    means = []
    for name in ("chosen", "rejected"):
        rewards = [side.reward(loss, beta) for one in scored if (side := getattr(one, name)) is not None]
        means.append(fmean(rewards) if rewards else 0.0)
    return means[0] - means[1]


def negative_log_sigmoid(margin: float) -> float:
    """Return ``-log σ(margin)``, the negative log-likelihood of a preference, in nats."""
    import math

    return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)


def _log1mexp(x: float) -> float:
    """Return ``log(1 - exp(x))`` for x below 0."""
    import math

    x = min(x, -1e-12)  # a mean token that is certain
    return math.log(-math.expm1(x)) if x > -math.log(2) else math.log1p(-math.exp(x))


# --- The reference ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reference_of(model: Any, start: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Make a model its own reference inside the block.

    Args:
        model: A model, adapted or not. One without an adapter is its own reference.
        start: The values that the trained parameters had when they were the reference, by their names; None for the
            base, with the adapter switched off.
    """
    if not hasattr(model, "disable_adapter"):
        yield
        return
    if start is None:
        with model.disable_adapter():
            yield
        return
    own = {name: parameter.data for name, parameter in model.named_parameters() if name in start}
    parameters = dict(model.named_parameters())
    try:
        for name, values in start.items():
            parameters[name].data = values.to(parameters[name].device)
        yield
    finally:
        for name, values in own.items():
            parameters[name].data = values


def score_preferences(
    model: nn.Module,
    judged: Sequence[Judged],
    device: str,
    pad_id: int,
    start: Mapping[str, Tensor] | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> list[Scored]:
    """Measure answers under a model and its reference.

    Args:
        model: A causal language model, adapted or not; it is put into evaluation mode.
        judged: Encoded preferences.
        device: Where the model is.
        pad_id: Token to pad short rows with.
        start: As for ``reference_of``.
        on_batch: Called after each batch with its number of rows.

    Returns:
        One for each preference, in their order.
    """
    model.eval()
    flat = [row for one in judged for row in one.rows]
    sides: list[Side | None] = [None] * len(flat)
    for numbers, tensors in text_batches(flat, pad_id):
        arguments = {name: tensor.to(device) for name, tensor in tensors.items()}
        for number, side in zip(numbers, _score_batch(model, arguments, start), strict=True):
            sides[number] = side
        on_batch(len(numbers))
    left = iter(sides)
    return [
        Scored(*(None if row is None else next(left) for row in (one.chosen, one.rejected))) for one in judged
    ]


def _score_batch(
    model: Any, arguments: dict[str, Tensor], start: Mapping[str, Tensor] | None
) -> Iterator[Side]:
    import torch
    from torch.nn import functional as F

    labels = arguments.pop("labels")
    targets = labels[:, 1:]
    compared = targets != -100  # (rows, length - 1)
    wanted = targets[compared]
    sums = torch.zeros(4, len(labels), dtype=torch.float64, device=labels.device)
    own, adapted = _positions(model, arguments, compared), hasattr(model, "disable_adapter")
    with reference_of(model, start):
        reference = _positions(model, arguments, compared) if adapted else own
    row_of = compared.nonzero()[:, 0]
    with torch.inference_mode():
        for at in range(0, len(wanted), KL_ROWS):
            part = slice(at, at + KL_ROWS)
            log_p = F.log_softmax(_logits(model, own[part]), dim=-1)  # (positions, vocabulary)
            if adapted:
                with reference_of(model, start):
                    log_q = F.log_softmax(_logits(model, reference[part]), dim=-1)
            else:
                log_q = log_p
            index = wanted[part, None]
            kl = (log_p.exp() * (log_p - log_q)).nan_to_num().sum(-1)
            columns = (log_p.gather(1, index)[:, 0], log_q.gather(1, index)[:, 0], torch.ones_like(kl), kl)
            for total, column in zip(sums, columns, strict=True):
                total.index_add_(0, row_of[part], column.double())
    for logp, ref, count, kl in sums.T.tolist():
        yield Side(logp, ref, int(count), max(kl, 0.0))


def _positions(model: Any, arguments: Mapping[str, Tensor], compared: Tensor) -> Tensor:
    """Return what the head makes logits of at the compared positions, ``(positions, d)``, or these themselves."""
    import torch

    base = unwrapped(model)
    with torch.inference_mode():
        if logits_are_plain(base):
            hidden: Tensor = base.base_model(**arguments, use_cache=False).last_hidden_state[:, :-1][compared]
            return hidden
        logits: Tensor = model(**arguments, use_cache=False).logits[:, :-1][compared]
        return logits


def _logits(model: Any, positions: Tensor) -> Tensor:
    base = unwrapped(model)
    logits: Tensor = base.get_output_embeddings()(positions) if logits_are_plain(base) else positions
    return logits.float()
