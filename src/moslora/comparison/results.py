"""What a comparison found: the values of its cells, of its verdict, and of its second stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moslora.metrics.intervals import Difference
from moslora.metrics.sequential import Goal, Look

__all__ = [
    "Cell",
    "Confirmation",
    "ConfirmedContrast",
    "ConfirmedMethod",
    "Contrast",
    "Cost",
    "Given",
    "MethodResult",
    "Point",
    "Price",
    "Verdict",
]

Status = Literal["done", "diverged", "crashed"]


@dataclass(frozen=True)
class Cell:
    """One training and what came of it.

    Attributes:
        method: Its name.
        learning_rate: Peak rate of the schedule.
        seed: Of initial values and data order.
        status: ``"done"``, ``"diverged"`` (a value was NaN or infinite) or ``"crashed"``.
        reason: Why it is not done, in words.
        validation: Loss of each validation example, in nats per trained token; None unless done.
        test: The same of each held-out example.
        correct: Whether each answered held-out example was right, or a grade of each unit of a benchmark; None without.
        train_loss: Mean training loss of the last logged steps; None if there is none.
        seconds: Wall-clock time of the training alone.
        cpu_seconds: Processor time of it.
        cell_seconds: Wall-clock time with evaluation, from which the rest is estimated.
        peak_bytes: Peak of memory while training: of the GPU, or of the whole process on a CPU; None if not known.
        trainable_parameters: How many.
        together: How many cells were trained at once over one base; times are the whole's divided by it, and the peak
            of memory is the whole's.
        also: By data that tuning is not about: ``loss``, and ``kl`` from the base, of each passage, as its share in the
            mean over tokens; None where that was not measured.
    """

    method: str
    learning_rate: float
    seed: int
    status: Status
    reason: str | None = None
    validation: Sequence[float] | None = None
    test: Sequence[float] | None = None
    correct: Sequence[float] | None = None
    train_loss: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    cell_seconds: float = 0.0
    peak_bytes: int | None = None
    trainable_parameters: int | None = None
    together: int = 1
    also: Mapping[str, Mapping[str, Sequence[float]]] | None = None


@dataclass(frozen=True)
class Point:
    """One seed at one rate, as shown.

    Attributes:
        learning_rate, seed, status, reason: Of the cell.
        validation, test: Mean losses; None unless done.
    """

    learning_rate: float
    seed: int
    status: Status
    reason: str | None
    validation: float | None
    test: float | None


@dataclass(frozen=True)
class MethodResult:
    """A method at its best learning rate.

    Attributes:
        name: Of the method.
        points: Every cell, whatever came of it.
        best_rate: With the lowest mean validation loss among rates at which every seed finished; None if there is none.
        at_edge: Whether that is the lowest or the highest rate tried, so that a better one may lie outside.
        stable: Lowest and highest rate around the best one that keep 90 % of its improvement over the base.
        score: Mean held-out loss over seeds and examples, at the best rate.
        interval: Its 95 % interval over seeds, for these examples.
        exact_match: Mean share of right answers there; None without a metric.
        diverged, crashed: How many cells.
        trainable_parameters: How many.
        seconds, cpu_seconds: Medians of the training time of a cell.
        peak_bytes: Largest peak of memory over the method's cells.
    """

    name: str
    points: Sequence[Point]
    best_rate: float | None
    at_edge: Literal["lowest", "highest"] | None
    stable: tuple[float, float] | None
    score: float | None
    interval: tuple[float, float] | None
    exact_match: float | None
    diverged: int
    crashed: int
    trainable_parameters: int | None
    seconds: float | None
    cpu_seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Contrast:
    """A method against another, mostly the baseline, each at its best rate.

    Attributes:
        method, baseline: Their names.
        measure: ``"loss"`` (lower is better) or ``"exact_match"`` (higher is better).
        difference: Method less baseline, same seeds and same examples.
        p_corrected: Holm's, over all methods compared by this measure.
        detectable: The smallest true difference that this much data would have shown four times out of five.
        found: ``"better"``, ``"worse"``, or ``"none"`` if no difference could be shown.
        by_seed: The mean difference of each seed.
    """

    method: str
    baseline: str
    measure: Literal["loss", "exact_match"]
    difference: Difference
    p_corrected: float
    detectable: float
    found: Literal["better", "worse", "none"]
    by_seed: Sequence[float]


@dataclass(frozen=True)
class Cost:
    """What a method costs on data that tuning is not about, against the baseline, each at its best rate.

    Attributes:
        method, baseline: Their names.
        data: The name of the data.
        measure: ``"loss"``, or ``"kl"``, KL(base ‖ tuned); nats a token, lower is better.
        value, baseline_value: Means over seeds and tokens.
        difference: Method less baseline, same seeds and same passages.
        p_corrected: Holm's, over all methods compared on this data by this measure.
        found: ``"more"``, ``"less"``, or ``"none"`` if no difference could be shown.
    """

    method: str
    baseline: str
    data: str
    measure: Literal["loss", "kl"]
    value: float
    baseline_value: float
    difference: Difference
    p_corrected: float
    found: Literal["more", "less", "none"]


@dataclass(frozen=True)
class ConfirmedMethod:
    """A method at the rate that was chosen before, on fresh seeds.

    Attributes:
        name: Of the method.
        rate: Its learning rate.
        points: Every fresh seed at this rate.
        score: Mean held-out loss over the seeds that finished; None if none did.
        interval: Its 95 % interval over seeds, for these examples.
        exact_match: Mean grade of a benchmark's questions; None without.
        diverged, crashed: How many seeds.
        seconds: Median of the training time of a cell.
    """

    name: str
    rate: float
    points: Sequence[Point]
    score: float | None
    interval: tuple[float, float] | None
    exact_match: float | None
    diverged: int
    crashed: int
    seconds: float | None


@dataclass(frozen=True)
class ConfirmedContrast:
    """A method against another, on fresh seeds.

    Attributes:
        method, baseline: Their names.
        measure: ``"loss"`` or ``"exact_match"``.
        difference: Method less baseline; its level is that of this verdict, so that all verdicts together keep 95 %.
        p_corrected: Corrected for the number of verdicts and, by Holm, for the number of contrasts.
        detectable: The smallest true difference that so many seeds and examples show four times out of five.
        found: ``"better"``, ``"worse"``, or ``"none"``.
        by_seed: The mean difference of each seed that finished with both.
        lost: Seeds at which method and baseline did not finish.
        looks: The verdicts that were given on these seeds, this one the last.
        half_width: Half of the interval's length.
        reached: Whether it is as narrow as asked; None where nothing was asked.
        limit: What adds more to the half-width, ``"seeds"`` or ``"examples"``.
        late: Whether it was asked for after a result was there.
    """

    method: str
    baseline: str
    measure: Literal["loss", "exact_match"]
    difference: Difference
    p_corrected: float
    detectable: float
    found: Literal["better", "worse", "none"]
    by_seed: Sequence[float]
    lost: tuple[int, int]
    looks: Sequence[Look]
    half_width: float
    reached: bool | None
    limit: Literal["seeds", "examples"]
    late: bool


@dataclass(frozen=True)
class Price:
    """What a method pays at another rate than its best one.

    Attributes:
        method: Its name.
        factor: The rate is this times the best one.
        rate: The rate.
        seeds: How many were trained.
        diverged, crashed: How many of them did not finish.
        lost_interval: 95 % interval of the share that did not finish (Wilson).
        worse_than_base: How many finished with a higher held-out loss than the untrained base.
        score: Mean held-out loss of those that finished; None if none did.
        difference: Loss there less loss at the best rate, same seeds; None with fewer than two.
        p_corrected: Of no price, by Holm over all prices.
        beside_baseline: This price less the baseline's at the same factor, same seeds; None for the baseline.
        p_beside_corrected: Of no difference between them, by Holm over all such differences.
    """

    method: str
    factor: float
    rate: float
    seeds: int
    diverged: int
    crashed: int
    lost_interval: tuple[float, float]
    worse_than_base: int
    score: float | None
    difference: Difference | None
    p_corrected: float | None
    beside_baseline: Difference | None
    p_beside_corrected: float | None


@dataclass(frozen=True)
class Confirmation:
    """The second stage: methods at their best rates, on seeds that chose nothing.

    Attributes:
        goal: What was asked for last.
        seeds: The fresh seeds, in order, as many as any method needed.
        examples: Held-out examples.
        base_loss: Mean held-out loss of the untrained base.
        methods: Those that have a rate.
        contrasts: By loss first, then by a benchmark.
        prices: By method and factor; empty unless asked for.
        sentences: What was found, in plain words.
        cautions: What a reader has to know beside them.
        complete: Whether every contrast has a result: at least two seeds that finished with both methods.
        costs: What methods cost on other data, on the same seeds; empty where that was not measured.
    """

    goal: Goal
    seeds: Sequence[int]
    examples: int
    base_loss: float
    methods: Sequence[ConfirmedMethod]
    contrasts: Sequence[ConfirmedContrast]
    prices: Sequence[Price]
    sentences: Sequence[str]
    cautions: Sequence[str]
    complete: bool
    costs: Sequence[Cost] = ()


@dataclass(frozen=True)
class Given:
    """Learning rates that were tuned elsewhere.

    Attributes:
        rates: By method.
        source: Where they are from, in words.
        sha256: Of the file they were read from; None where they were given by hand.
        seeds: On which they were tuned, where that is known.
    """

    rates: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    sha256: str | None = None
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison.

    Attributes:
        baseline: The method that the others are compared with.
        base_loss: Mean held-out loss of the untrained base.
        methods: In the order asked for, the baseline among them.
        contrasts: By loss first, then by exact match.
        sentences: What was found, in plain words, one per method compared.
        cautions: What a reader has to know beside them.
        complete: Whether every method has a result.
        judged_by: What ``exact_match`` stands for: exact match, or a benchmark's name.
        base_judged: The untrained base's share of it; None where it was not measured.
        given: Rates that were tuned elsewhere, and where; None if all were tuned here.
        costs: What methods cost on other data; empty where that was not measured.
        base_also: The untrained base's loss there, by the name of the data.
        points_also: Every finished cell's held-out loss beside its costs.
        confirmation: The second stage, on fresh seeds; None without.
        schema_version: Of this record; that of version 0.1 has none.
    """

    baseline: str
    base_loss: float
    methods: Sequence[MethodResult]
    contrasts: Sequence[Contrast]
    sentences: Sequence[str]
    cautions: Sequence[str]
    complete: bool
    judged_by: str = "exact match"
    base_judged: float | None = None
    given: Given | None = None
    costs: Sequence[Cost] = ()
    base_also: Mapping[str, float] | None = None
    points_also: Sequence[Mapping[str, Any]] = ()
    confirmation: Confirmation | None = None
    schema_version: int = 2
