"""The advice: one entry for each setting and case, with its reason, its source, and who disagrees.

Where a number is ours and nobody's result, its source is ``GUESS``; tests/test_advise.py holds figures to their JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moslora.advice.situation import Situation
from moslora.advice.sources import GUESS

__all__ = ["HOME_BEST", "RULES", "Dissent", "Proposal", "Rule", "known_kinds", "rate_by_width"]

SHORT_RUN = 100  # optimizer steps: below, the best rate is about 15 times full fine-tuning's instead of 10
BITS_PER_PARAMETER = 2.0
BITS_PER_TOKEN = 2.9  # of a loss of 2 nats; what is to be learned is at most that
LARGEST_BATCH = 32
FEW_STEPS, MOST_EPOCHS = 100, 5
LARGEST_RANK, LEAST_RANK = 256, 8
# Full fine-tuning's rate, how often LoRA's is that, and how it falls with width, by family.
FULL_RATE, TIMES, WIDTH = 5e-5, 10, 2000
NARROWEST, WIDEST = 1024, 16384  # of models that are fine-tuned
FALLBACK_RATE = 2e-4  # our default
EXPONENTS: Mapping[str, float] = {"llama": 0.781, "qwen": 0.0775}
# The rates that were best in benchmarks/results/evidence/home, and the lowest and highest that were stable.
HOME_BEST: Mapping[str, tuple[float, float, float]] = {
    "lora": (3e-3, 1e-3, 9e-3),
    "moslora": (9e-3, 3e-3, 9e-3),
}
HOME_WIDTH, HOME_STEPS = 576, 20


@dataclass(frozen=True)
class Proposal:
    """What a rule says of a situation.

    Attributes:
        text: What is advised, for people.
        fits: Whether the recipe is as advised; None where nothing can be said of that.
        overrides: Settings that bring the recipe there; empty if it fits.
        why: What the rule's reason adds for this situation.
        is_guess: Whether a part of it is ours, beyond the rule's sources.
    """

    text: str
    fits: bool | None
    overrides: tuple[str, ...] = ()
    why: str = ""
    is_guess: bool = False


@dataclass(frozen=True)
class Dissent:
    """A result that does not agree.

    Attributes:
        text: What was found.
        source: A key of ``SOURCES``.
    """

    text: str
    source: str


@dataclass(frozen=True)
class Rule:
    """A piece of advice.

    Attributes:
        key: The setting, as ``section.key``.
        kinds: The tasks that it is for.
        propose: Says what it advises; None where it has nothing to say.
        why: The reason.
        sources: Keys of ``SOURCES``; empty if it is a guess of ours.
        dissent: Who disagrees.
        ours: What we measured ourselves.
    """

    key: str
    kinds: tuple[str, ...]
    propose: Callable[[Situation], Proposal | None]
    why: str
    sources: tuple[str, ...] = ()
    dissent: tuple[Dissent, ...] = ()
    ours: str = ""

    @property
    def source(self) -> str:
        """Keys of the sources, or that it is a guess."""
        return ", ".join(self.sources) or GUESS


LANGUAGE = ("text", "vision")
HEADS = ("classification", "reward")
PAIRS = ("preference",)
EVERY = (*LANGUAGE, *HEADS, *PAIRS, "image")


# --- Learning rate --------------------------------------------------------------------------------------------


def rate_by_width(hidden: int, family: str, steps: int | None) -> tuple[float, bool]:
    """Return a learning rate for LoRA, and whether the family is none that the rule was fitted on.

    Args:
        hidden: Width of the hidden states.
        family: ``model_type`` of the base.
        steps: Optimizer steps; None if unknown.

    Example:
        >>> rate_by_width(4096, "llama", 1000), rate_by_width(4096, "qwen3", 50)
        ((0.00029, False), (0.00071, False))
    """
    known = [p for name, p in EXPONENTS.items() if name in family.lower()]
    p = known[0] if known else sum(EXPONENTS.values()) / len(EXPONENTS)
    rate = (
        FULL_RATE * TIMES * (WIDTH / hidden) ** p * (1.5 if steps is not None and steps < SHORT_RUN else 1.0)
    )
    return _rounded(rate), not known


def _rounded(value: float, digits: int = 2) -> float:
    return float(f"{value:.{digits - 1}e}")


def _rate_proposal(
    s: Situation, rate: float, why: str = "", within: float = 2.0, guess: bool = False
) -> Proposal:
    """Propose a rate; one within a factor of it is as good."""
    now = s.recipe.get("trainer.learning_rate")
    fits = (
        isinstance(now, int | float)
        and rate / within <= now * (1 + 1e-9)
        and now <= rate * within * (1 + 1e-9)
    )
    text = f"{rate:.2g} ({rate / within:.2g} to {rate * within:.2g})"
    return Proposal(text, fits, () if fits else (f"trainer.learning_rate={rate:.2g}",), why, guess)


def _rate(s: Situation) -> Proposal:
    if s.hidden is None:
        least, most = (rate_by_width(width, "llama", None)[0] for width in (WIDEST, NARROWEST))
        now = s.recipe.get("trainer.learning_rate")
        fits = isinstance(now, int | float) and least / 2 <= now <= most * 2
        why = f"The base's width is not known: {least:.2g} is for {WIDEST}, {most:.2g} for {NARROWEST}."
        overrides = () if fits else (f"trainer.learning_rate={FALLBACK_RATE:g}",)
        return Proposal(f"{least:.2g} to {most:.2g}", fits, overrides, why, True)
    rate, is_other = rate_by_width(s.hidden, s.architecture, s.steps)
    whys = [f"Here: width {s.hidden}."]
    if s.steps is not None and s.steps < SHORT_RUN:
        whys.append(f"A run of {s.steps} steps is below {SHORT_RUN}: 1.5 times that.")
    if is_other:
        whys.append(
            f"The rule was fitted on Llama and Qwen; {s.architecture or 'this architecture'} takes the mean of both "
            "exponents, which is a guess."
        )
    if s.hidden < WIDTH / 2:
        whys.append("The rule was not fitted on models so narrow.")
    return _rate_proposal(s, rate, " ".join(whys), 2.0, is_other or s.hidden < WIDTH / 2)


def _preference_rate(s: Situation) -> Proposal:
    why = "" if s.loss in ("", "dpo") else f"No source is known for {s.loss}; that of DPO is the nearest."
    return _rate_proposal(s, 1e-5, why, 2.0, bool(why))


def _beta(s: Situation) -> Proposal | None:
    now = s.recipe.get("task.beta")
    if not isinstance(now, int | float) or s.loss not in ("", "dpo", "ipo", "kto"):
        return None
    fits = 0.05 <= now <= 0.2
    return Proposal("0.1", fits, () if fits else ("task.beta=0.1",))


# --- Rank, batch, targets, length, scale -------------------------------------------------------------------------


def _rank(s: Situation) -> Proposal:
    if s.tokens is None or not s.trained:
        return Proposal(
            "as it is", None, (), "Tokens or layers are not known, so the capacity was not compared."
        )
    each = s.trained / s.rank
    bits = s.tokens * BITS_PER_TOKEN
    enough = max(1.0, bits / BITS_PER_PARAMETER / each)
    about = "about " if s.is_estimate else ""
    held = (
        f"{_bits(s.trained * BITS_PER_PARAMETER)} fit into {s.trained:,} parameters; the data have at most "
        f"{about}{_bits(bits)} ({about}{s.tokens:,} trained tokens of {BITS_PER_TOKEN} bits, a loss of 2 nats, "
        "which is our assumption)."
    )
    if enough <= s.rank:
        return Proposal(f"{s.rank} is enough", True, (), held)
    wanted = min(LARGEST_RANK, max(LEAST_RANK, 2 ** math.ceil(math.log2(enough))))
    if wanted <= s.rank:
        why = f"{held} No rank up to {LARGEST_RANK} holds all of that: full fine-tuning could learn more."
        return Proposal(f"{s.rank}", True, (), why)
    return Proposal(f"{wanted}", False, (f"adapter.r={wanted}",), held)


def _bits(bits: float) -> str:
    for unit in ("bits", "kbit", "Mbit"):
        if bits < 1000:
            return f"{bits:.3g} {unit}"
        bits /= 1000
    return f"{bits:.3g} Gbit"


def _rank_of_rewards(s: Situation) -> Proposal:
    fits = s.rank <= LARGEST_BATCH
    return Proposal("1 to 32", fits, () if fits else ("adapter.r=32",))


def _rank_of_pictures(s: Situation) -> Proposal:
    return Proposal(
        "4 (one subject); more for a style", s.rank <= 64, () if s.rank <= 64 else ("adapter.r=16",)
    )


def _batch(s: Situation) -> Proposal:
    fits = s.rows < LARGEST_BATCH
    overrides: tuple[str, ...] = ()
    if not fits:
        overrides = ("trainer.per_device_train_batch_size=16",)
        if int(s.recipe.get("trainer.gradient_accumulation_steps") or 1) > 1:
            overrides += ("trainer.gradient_accumulation_steps=1",)
    return Proposal("below 32 rows a step, over all devices", fits, overrides)


def _targets(s: Situation) -> Proposal:
    if not s.modules.get("mlp"):
        return Proposal(
            "all-linear", None, (), "Its layers are not known by kind here, so this was not checked."
        )
    fits = s.adapted.get("mlp", 0) > 0
    of = f"MLPs: {s.adapted.get('mlp', 0)} of {s.modules['mlp']} layers are adapted"
    of += f"; attention: {s.adapted.get('attention', 0)} of {s.modules.get('attention', 0)}."
    key = "scopes.language=adapter" if s.kind == "vision" else "adapter.target_modules=all-linear"
    return Proposal("MLPs among them (all-linear)", fits, () if fits else (key,), of, s.kind not in LANGUAGE)


def _targets_of_pictures(s: Situation) -> Proposal:
    return Proposal("attention of the denoiser", True if "adapter.target_modules" not in s.given else None)


def _experts(s: Situation) -> Proposal | None:
    if s.experts is None:
        return None
    each, pattern = max(1, s.rank // s.experts), s.recipe.get("adapter.rank_pattern") or {}
    names = map(str, s.recipe.get("adapter.target_parameters") or ())
    own = sorted({name.rpartition(".")[2] for name in names if "expert" in name})
    why = f"{s.experts} experts are active for a token" + ("." if own else ", and none is adapted here.")
    fits = all(pattern.get(name) == each for name in own) if own and each < s.rank else None
    value = ", ".join(f"{name}: {each}" for name in own)
    overrides = (f"adapter.rank_pattern={{{value}}}",) if fits is False and not pattern else ()
    return Proposal(f"rank {each} in experts", fits, overrides, why)


def _length(s: Situation) -> Proposal | None:
    if s.steps is None or s.examples is None or s.epochs is None:
        return None
    now = f"{s.steps} steps, {s.epochs:.2g} epochs of {s.examples:,} rows."
    if s.steps < FEW_STEPS and s.epochs < 3:
        per_epoch = max(1, math.ceil(s.examples / s.rows))
        epochs = min(3, max(1, math.ceil(FEW_STEPS / per_epoch)))
        longer = epochs * per_epoch > s.steps
        overrides = (f"trainer.num_train_epochs={epochs}",) if longer else ()
        if longer and "trainer.max_steps" in s.given:
            overrides = (f"trainer.max_steps={epochs * per_epoch}",)
        return Proposal("100 steps, at most 3 epochs", not longer, overrides, now)
    if s.epochs > MOST_EPOCHS:
        text = "at most 5 epochs, by the held-out loss"
        overrides = ("trainer.num_train_epochs=3",)
        if "trainer.max_steps" in s.given:
            overrides = (f"trainer.max_steps={max(1, math.ceil(s.examples / s.rows)) * 3}",)
        return Proposal(text, False, overrides, now)
    return Proposal("as it is", True, (), now)


def _alpha(s: Situation) -> Proposal:
    now = s.recipe.get("adapter.lora_alpha")
    fits = isinstance(now, int | float) and 16 <= now <= 64
    why = f"The scale here is {_scale(s):.3g}." if _scale(s) is not None else ""
    return Proposal("32, whatever the rank", fits, () if fits else ("adapter.lora_alpha=32",), why)


def _scale(s: Situation) -> float | None:
    alpha = s.recipe.get("adapter.lora_alpha")
    if not isinstance(alpha, int | float):
        return None
    return float(alpha) / (math.sqrt(s.rank) if s.recipe.get("adapter.use_rslora") else s.rank)


def _alpha_of_pictures(s: Situation) -> Proposal:
    now = s.recipe.get("adapter.lora_alpha")
    fits = now == s.rank
    return Proposal(f"the rank ({s.rank})", fits, () if fits else (f"adapter.lora_alpha={s.rank}",))


def _mixer(s: Situation) -> Proposal | None:
    if s.recipe.get("adapter.mixer") != "kaiming":
        return None
    matched = bool(s.recipe.get("adapter.match_scale"))
    text = "either; at one rate, false is LoRA at 0.58 of its scale" if not matched else "either"
    return Proposal(text, True, ())


def _start_of_mixer(s: Situation) -> Proposal | None:
    mixer = s.recipe.get("adapter.mixer")
    if mixer not in ("kaiming", "orthogonal") or s.recipe.get("adapter.match_scale"):
        return None
    return Proposal(
        "orthogonal", mixer == "orthogonal", ("adapter.mixer=orthogonal",) * (mixer != "orthogonal")
    )


def _fixed(rate: float, within: float = 2.0) -> Callable[[Situation], Proposal]:
    return lambda s: _rate_proposal(s, rate, "", within)


RULES: tuple[Rule, ...] = (
    Rule(
        "trainer.learning_rate",
        LANGUAGE,
        _rate,
        "LoRA's best rate is about 10 times full fine-tuning's (9.8 over 14 models; about 15 in runs below 100 steps) "
        "and moves less than 2 times from rank 4 to 512: 5e-5 · 10 · (2000 / width)^p.",
        ("regret", "tinker"),
        (
            Dissent("The factor of 10 depends on the start of the factors and on alpha.", "alpha"),
            Dissent(
                "MoSLoRA's peak on GSM8K was at 5e-4 and LoRA's at 1e-3 (one seed); MoSLoRA falls sooner above it.",
                "lorafactory",
            ),
        ),
        "On SmolLM2-135M (width 576, 20 steps) LoRA was best at 3e-3 of four rates and stable from 1e-3 to 9e-3, "
        "MoSLoRA with a kaiming mixer best at 9e-3, stable from 3e-3; the rule says 2e-3 (benchmarks/results/"
        "evidence/home). Full fine-tuning was best at 3e-4 there, of 1e-4 to 9e-3: LoRA's rate was 10 times its "
        "(two seeds; benchmarks/results/advice-rate.json).",
    ),
    Rule(
        "trainer.learning_rate",
        PAIRS,
        _preference_rate,
        "DPO moves a model that is tuned already: 1e-5.",
        ("tinker",),
    ),
    Rule("task.beta", PAIRS, _beta, "DPO's beta.", ("tinker",)),
    Rule(
        "trainer.learning_rate",
        ("classification",),
        _fixed(1e-4, 5.0),
        "On GLUE at rank 8 both LoRA (79.57) and MoSLoRA (79.66) peak at 1e-4.",
        ("lorafactory",),
        (
            Dissent(
                "At 5e-4 MoSLoRA fell to 68.65 and LoRA only to 78.67, so do not go far above.", "lorafactory"
            ),
        ),
    ),
    Rule(
        "trainer.learning_rate",
        ("reward",),
        _fixed(1e-5, 5.0),
        "No source is known; it is that of preferences, on the same pairs.",
    ),
    Rule(
        "trainer.learning_rate",
        ("rl", "grpo", "rloo"),
        _fixed(4e-5, 2.0),
        "The rate of reinforcement learning with LoRA.",
        ("tinker",),
        (Dissent("With verifiable rewards DoRA and others beat LoRA, and PiSSA collapses.", "rl"),),
    ),
    Rule(
        "trainer.learning_rate",
        ("image",),
        _fixed(1e-4, 3.0),
        "The method's runs on SDXL with a few pictures of one subject.",
        ("moslora",),
    ),
    Rule(
        "adapter.r",
        ("text", "vision", "classification"),
        _rank,
        "An adapter holds about 2 bits a parameter; below that the rank costs little but memory, and the best rate "
        "hardly depends on it. For supervised fine-tuning on much data TRL's page takes 256.",
        ("regret", "trl"),
    ),
    Rule(
        "adapter.r",
        ("preference", "reward"),
        lambda s: Proposal("as it is", None),
        "No source is known for pairs. A label has one bit, so that a rank for text is ample.",
    ),
    Rule(
        "adapter.r",
        ("rl", "grpo", "rloo"),
        _rank_of_rewards,
        "A reward has about one bit, so that rank 1 learns as well as full fine-tuning.",
        ("regret", "trl"),
    ),
    Rule(
        "adapter.r",
        ("image",),
        _rank_of_pictures,
        "Five pictures of one subject were learned at rank 4.",
        ("moslora",),
    ),
    Rule(
        "trainer.per_device_train_batch_size",
        (*LANGUAGE, *HEADS, *PAIRS),
        _batch,
        "Large batches cost LoRA more than full fine-tuning, and a higher rank does not help.",
        ("regret", "trl"),
        (Dissent("The size of the batch explains gains of methods that contradict each other.", "batch"),),
    ),
    Rule(
        "adapter.target_modules",
        (*LANGUAGE, *HEADS, *PAIRS),
        _targets,
        "Attention alone at rank 256 learned worse than MLPs alone at 128; MLPs alone about as well as all layers.",
        ("regret",),
        (),
        "On SmolLM2-135M at as many parameters, attention alone ended worse than all layers by 0.107 (0.045 to 0.181; "
        "three seeds of 20 steps), MLPs alone by -0.001 (-0.036 to 0.041; benchmarks/results/advice-targets.json).",
    ),
    Rule(
        "adapter.target_modules",
        ("image",),
        _targets_of_pictures,
        "What the method's and diffusers' runs adapt. That MLPs must be among the targets was found on language "
        "models.",
        ("moslora",),
    ),
    Rule(
        "adapter.rank_pattern",
        LANGUAGE,
        _experts,
        "Experts share the tokens: the rank divided by how many are active.",
        ("regret",),
    ),
    Rule(
        "trainer.num_train_epochs",
        (*LANGUAGE, *HEADS, *PAIRS),
        _length,
        "Below about 100 updates warm-up and schedule are most of a run; beyond a few epochs small data are learned by "
        "heart. Let the held-out loss decide.",
    ),
    Rule(
        "adapter.lora_alpha",
        (*LANGUAGE, *HEADS, *PAIRS),
        _alpha,
        "Alpha 32, A uniform within 1/√d and B zero could not be improved on.",
        ("regret",),
        (
            Dissent(
                "The best rate moves with alpha and with the start, so a change of it wants a new rate.",
                "alpha",
            ),
        ),
    ),
    Rule(
        "adapter.lora_alpha",
        ("image",),
        _alpha_of_pictures,
        "The method's runs on SDXL have a scale of 1.",
        ("moslora",),
    ),
    Rule(
        "adapter.mixer",
        LANGUAGE,
        _start_of_mixer,
        "A kaiming mixer starts at 0.58 of LoRA's scale, and at LoRA's rate trains as LoRA does from there; an "
        "orthogonal one starts at all of it.",
        ("maths",),
        (Dissent("The method's own language runs start kaiming.", "moslora"),),
        "On the demo's data at LoRA's rate a kaiming mixer was behind LoRA by 0.041 of held-out loss (0.028 to 0.055), "
        "an orthogonal one by -0.000 (-0.009 to 0.008; 8 fresh seeds, benchmarks/results/evidence/home/confirmed).",
    ),
    Rule(
        "adapter.match_scale",
        EVERY,
        _mixer,
        "A kaiming mixer starts at 0.58 of LoRA's scale, so that LoRA's best rate is not its own; match_scale=true "
        "starts at all of it.",
        ("maths",),
        (),
        "LoRA started at 0.58 of its scale was worse on the demo's data, by 0.007 to 0.027 of held-out loss ("
        "benchmarks/results/evidence/home), and no different on two other tasks.",
    ),
)


def known_kinds() -> frozenset[str]:
    """Return the tasks that any rule is for."""
    return frozenset(kind for rule in RULES for kind in rule.kinds)
