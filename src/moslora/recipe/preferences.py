"""The losses of ``task: preference``: which of TRL's trainers has each, and what a reward is in it.

A pair says that one answer is preferred to another. Every loss here is a function of a *reward* of each answer, which
is made of the answer's log-probability ``log p`` (summed over its n tokens), that of the reference ``log q``, and β.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["LOSSES", "PreferenceLoss", "unfit_preferences"]

Reward = Literal["ratio", "mean ratio", "bare mean ratio", "sum", "mean", "odds"]


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss that learns from preferences.

    Attributes:
        trainer: Whose it is: ``"dpo"`` and ``"kto"`` are trainers of TRL, ``"cpo"`` and ``"orpo"`` of
            ``trl.experimental``.
        loss_type: What that trainer calls it; None where it has one alone.
        reward: What an answer's reward is: ``"ratio"`` β·(log p - log q), ``"mean ratio"`` the same over n,
            ``"bare mean ratio"`` that without β, ``"sum"`` β·log p, ``"mean"`` β·log p / n, ``"odds"`` the log-odds of
            the mean token.
        beta: Its usual β.
        source: Where it is from.
        defaults: Fields of the trainer's configuration that are otherwise than TRL's.
    """

    trainer: Literal["dpo", "kto", "cpo", "orpo"]
    loss_type: str | None
    reward: Reward
    beta: float
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_reference(self) -> bool:
        """Whether log-probabilities of a reference are part of it."""
        return self.trainer in ("dpo", "kto")


# TRL's β are 0.1. SimPO's paper has 2.0 to 2.5: its rewards are means over tokens. TRL adds the loss of supervised
# fine-tuning to SimPO (cpo_alpha 1), which is another method of its paper, so here it is 0.
LOSSES: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss("dpo", "sigmoid", "ratio", 0.1, "arXiv:2305.18290"),
    "ipo": PreferenceLoss("dpo", "ipo", "bare mean ratio", 0.1, "arXiv:2310.12036"),
    "hinge": PreferenceLoss("dpo", "hinge", "ratio", 0.1, "arXiv:2309.06657"),
    "robust": PreferenceLoss("dpo", "robust", "ratio", 0.1, "arXiv:2403.00409", {"label_smoothing": 0.1}),
    "exo": PreferenceLoss("dpo", "exo_pair", "ratio", 0.1, "arXiv:2402.00856", {"label_smoothing": 1e-3}),
    "nca": PreferenceLoss("dpo", "nca_pair", "ratio", 0.1, "arXiv:2402.05369"),
    "bco": PreferenceLoss("dpo", "bco_pair", "ratio", 0.1, "arXiv:2404.04656"),
    "sppo": PreferenceLoss("dpo", "sppo_hard", "ratio", 0.1, "arXiv:2405.00675"),
    "aot": PreferenceLoss("dpo", "aot", "ratio", 0.1, "arXiv:2406.05882"),
    "aot-unpaired": PreferenceLoss("dpo", "aot_unpaired", "ratio", 0.1, "arXiv:2406.05882"),
    "apo-zero": PreferenceLoss("dpo", "apo_zero", "ratio", 0.1, "arXiv:2408.06266"),
    "apo-down": PreferenceLoss("dpo", "apo_down", "ratio", 0.1, "arXiv:2408.06266"),
    "discopop": PreferenceLoss("dpo", "discopop", "ratio", 0.1, "arXiv:2406.08414"),
    "dpo-norm": PreferenceLoss("dpo", "sigmoid_norm", "mean ratio", 0.1, "arXiv:2411.15124"),
    "kto": PreferenceLoss("kto", "kto", "ratio", 0.1, "arXiv:2402.01306"),
    "apo-zero-unpaired": PreferenceLoss("kto", "apo_zero_unpaired", "ratio", 0.1, "arXiv:2408.06266"),
    "orpo": PreferenceLoss("orpo", None, "odds", 0.1, "arXiv:2403.07691"),
    "cpo": PreferenceLoss("cpo", "sigmoid", "sum", 0.1, "arXiv:2401.08417"),
    "simpo": PreferenceLoss("cpo", "simpo", "mean", 2.0, "arXiv:2405.14734", {"cpo_alpha": 0.0}),
}
# TRL's trainer refuses these once the model is loaded; they can be known before.
DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


def unfit_preferences(
    task: Mapping[str, Any], trainer: Mapping[str, Any], adapter: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what does not go together in a recipe of ``task: preference``, a line each.

    Args:
        task, trainer, adapter: The sections, of checked types; ``adapter`` with ``start_from`` where it is given.
    """
    name = task.get("loss", "dpo")
    loss = LOSSES.get(name)
    if loss is None:
        return
    reference = task.get("reference", "auto")
    if loss.has_reference and reference == "none":
        yield f"task.reference=none cannot be set: task.loss={name} compares with a reference. Set base or start."
    if not loss.has_reference and reference in ("base", "start"):
        yield f"task.reference={reference} cannot be set: task.loss={name} has no reference. Leave it out."
    if reference == "start" and not adapter.get("start_from"):
        yield "task.reference=start needs adapter.start_from, the adapter that is the reference."
    if adapter.get("lora_dropout") and trainer.get("disable_dropout", True):
        yield (
            f"adapter.lora_dropout={adapter['lora_dropout']:g} would do nothing: trainer.disable_dropout is on for "
            "preferences, as in TRL, so that policy and reference differ by their weights alone. Leave one out, or set "
            "trainer.disable_dropout=false."
        )
    smoothing = trainer.get("label_smoothing", loss.defaults.get("label_smoothing", 0.0))
    if name == "robust" and not 0 <= smoothing < 0.5:
        yield f"trainer.label_smoothing={smoothing:g} must be at least 0 and below 0.5 for task.loss=robust."
    if name == "exo" and not 0 < smoothing < 1:
        yield (
            f"trainer.label_smoothing={smoothing:g} must be above 0 and below 1 for task.loss=exo; its paper has "
            "0.001."
        )
    divergence = trainer.get("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl" and loss.loss_type not in DIFFERENCES:
        yield f"trainer.f_divergence_type={divergence} cannot be set for task.loss={name}: it is not defined for it."
    if trainer.get("use_weighting") and name in ("aot", "aot-unpaired"):
        yield f"trainer.use_weighting cannot be set for task.loss={name}, which sorts the pairs of a batch."
    if name == "kto":
        if trainer.get("per_device_train_batch_size", 2) < 2:
            yield (
                "trainer.per_device_train_batch_size=1 cannot be set for task.loss=kto: its estimate of the KL pairs "
                "the prompts of a batch with each other's answers. Set 2 or more."
            )
        if trainer.get("train_sampling_strategy", "sequential") != "sequential":
            yield (
                "trainer.train_sampling_strategy cannot be set for task.loss=kto, whose batches are made before "
                "training; their rows are shuffled once, by the seed."
            )
