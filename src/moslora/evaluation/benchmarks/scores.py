"""Scores of a benchmark: base, adapter and their paired difference, with intervals over what is drawn at random.

Rows of one question (its rotations) or about one picture stand and fall together, so an interval over rows would be too
narrow. What is resampled is the unit: a question, picture or set, as the benchmark's table says. Every score is
computed from sums over units, so that a resample is a weighting of them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.metrics.answers import wilson_interval
from moslora.metrics.intervals import holm

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SCORES", "Figure", "Graded", "compare_scores"]

# Resamplings; the ends of a 95 % interval then vary by about 3 % of its width.
DRAWS = 2000
LEVEL = 0.95
# Resamplings at once, times units: bounds their memory to 40 MB.
AT_ONCE = 5_000_000
# MME's categories (A. Fu et al., arXiv:2306.13394); the published score has no others.
PERCEPTION = (
    "OCR",
    "artwork",
    "celebrity",
    "color",
    "count",
    "existence",
    "landmark",
    "position",
    "posters",
    "scene",
)
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")


@dataclass(frozen=True, slots=True)
class Graded:
    """One row, graded for one model.

    Attributes:
        unit: The question, picture, set or row that it is drawn with.
        group: Rows whose grades count together: rotations of a question, or questions about a picture.
        categories: Those that it is counted in.
        grade: 1 if it is right, or a share.
        found: What was read in the answer; empty where nothing has to be.
        expected: The right answer.
        keys: What else a score groups by.
    """

    unit: str
    group: str
    categories: tuple[str, ...]
    grade: float
    found: str = ""
    expected: str = ""
    keys: tuple[str, ...] = ()


Rows = Sequence[Graded]
Sums = Mapping[str, Any]  # by name, of one unit a number, of all resamples an array


@dataclass(frozen=True)
class Score:
    """A score as sums over units.

    Attributes:
        count: From the rows of one unit to its sums.
        value: From sums over all units to the score.
        full: The score if everything is right.
    """

    count: Callable[[Rows], dict[str, float]]
    value: Callable[[Sums], Any]
    full: float = 100.0


def _ratio(right: Any, all_: Any, scale: float = 100.0) -> Any:
    """Divide, and give 0 where there is nothing to divide by: a resample may miss a category."""
    import numpy as np

    right, all_ = np.asarray(right, dtype=float), np.asarray(all_, dtype=float)
    return scale * np.divide(right, all_, out=np.zeros_like(right), where=all_ > 0)


def _sum_grades(rows: Rows) -> dict[str, float]:
    return {"right": sum(row.grade for row in rows), "all": len(rows)}


def _sum_groups(name: Callable[[Graded], str]) -> Callable[[Rows], dict[str, float]]:
    def count(rows: Rows) -> dict[str, float]:
        groups: dict[str, bool] = {}
        for row in rows:
            groups[name(row)] = groups.get(name(row), True) and row.grade == 1
        return {"right": sum(groups.values()), "all": len(groups)}

    return count


def _share(sums: Sums) -> Any:
    return _ratio(sums["right"], sums["all"])


ACCURACY = Score(_sum_grades, _share)
CIRCULAR = Score(_sum_groups(lambda row: row.group), _share)


def _sum_yes(rows: Rows) -> dict[str, float]:
    """Count as POPE does: a row once in each category that it names."""
    sums = {"right": 0.0, "found": 0.0, "expected": 0.0}
    for row in rows:
        times = max(1, len(row.categories))
        sums["found"] += times * (row.found == "Yes")
        sums["expected"] += times * (row.expected == "Yes")
        sums["right"] += times * (row.found == row.expected == "Yes")
    return sums


def _mme(categories: Sequence[str] | None) -> Score:
    """Return MME's score: of each category the accuracy, and the share of pictures of which both answers are right."""

    def count(rows: Rows) -> dict[str, float]:
        sums: dict[str, float] = {}
        for name in {row.categories[0] for row in rows}:
            if categories is not None and name not in categories:
                continue
            own = [row for row in rows if row.categories[0] == name]
            for part, rule in (("single", ACCURACY), ("both", CIRCULAR)):
                sums |= {f"{name}\t{part}\t{key}": value for key, value in rule.count(own).items()}
        return sums

    def value(sums: Sums) -> Any:
        parts = sorted({key.rsplit("\t", 1)[0] for key in sums})
        return sum((_ratio(sums[f"{p}\tright"], sums[f"{p}\tall"]) for p in parts), start=_ratio(0.0, 0.0))

    return Score(count, value, 200.0 * len(categories or ("one",)))


# A benchmark's numbers by name, the headline first; all but MME's in percent.
SCORES: Mapping[str, Mapping[str, Score]] = {
    "accuracy": {"accuracy": ACCURACY},
    "circular": {"circular accuracy": CIRCULAR, "accuracy of single rows": ACCURACY},
    "mme": {
        "MME, of 2800": _mme([*PERCEPTION, *REASONING]),
        "perception, of 2000": _mme(PERCEPTION),
        "reasoning, of 800": _mme(REASONING),
    },
    "f1": {
        "F1 of yes": Score(_sum_yes, lambda s: _ratio(2 * s["right"], s["found"] + s["expected"])),
        "accuracy": ACCURACY,
    },
    "hallusion": {
        "aAcc": ACCURACY,
        "fAcc": Score(_sum_groups(lambda row: row.keys[0]), _share),
        "qAcc": Score(_sum_groups(lambda row: row.keys[1]), _share),
    },
    "vqa": {"VQA accuracy": ACCURACY},
    "anls": {"ANLS": ACCURACY},
    "relaxed": {"relaxed accuracy": ACCURACY},
    "contains": {"accuracy": ACCURACY},
    "mathvista": {"accuracy, questions with options": ACCURACY},
}


@dataclass(frozen=True)
class Figure:
    """A score of base and adapter.

    Attributes:
        name: What it is.
        units: How many questions, pictures, sets or rows it is over; intervals are over them, too.
        base, base_low, base_high: Of the base, with its 95 % interval.
        tuned, tuned_low, tuned_high: Of the adapter; None without one.
        difference, low, high, p: Adapter less base on the same units; None without an adapter. The p-values of
            categories are Holm-corrected.
    """

    name: str
    units: int
    base: float
    base_low: float
    base_high: float
    tuned: float | None = None
    tuned_low: float | None = None
    tuned_high: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def compare_scores(score: str, base: Rows, tuned: Rows | None) -> tuple[list[Figure], list[Figure]]:
    """Score both models, and their difference.

    Args:
        score: A key of ``SCORES``.
        base: Graded rows of the base, at least one.
        tuned: Those of the adapter, in the same order; None without one.

    Returns:
        The benchmark's numbers, the headline first; and the headline of each category, by name.
    """
    # Of MME a part may have no row in the file.
    there = {name: rule for name, rule in SCORES[score].items() if any(rule.count([row]) for row in base)}
    figures = [_figure(name, rule, base, tuned) for name, rule in there.items()]
    headline = _mme(None) if score == "mme" else next(iter(SCORES[score].values()))
    names = sorted({name for row in base for name in row.categories})
    categories = []
    for name in names if len(names) > 1 else []:
        chosen = [number for number, row in enumerate(base) if name in row.categories]
        parts = [None if of is None else [_within(of[n], name) for n in chosen] for of in (base, tuned)]
        assert parts[0] is not None, "there is a base"
        categories.append(_figure(name, headline, parts[0], parts[1]))
    if tuned is not None:
        corrected = holm([1.0 if figure.p is None else figure.p for figure in categories])
        categories = [dataclasses.replace(f, p=p) for f, p in zip(categories, corrected, strict=True)]
    return figures, categories


def _within(row: Graded, category: str) -> Graded:
    return dataclasses.replace(row, categories=(category,))


def _figure(name: str, score: Score, base: Rows, tuned: Rows | None) -> Figure:
    """Score both, and resample their units together."""
    import numpy as np

    members: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(base):
        members[row.unit].append(number)
    tables = [None if of is None else _table(score, of, list(members.values())) for of in (base, tuned)]
    found, then = tables
    assert found is not None, "there is a base"
    draws = _resampled(score, [table for table in tables if table is not None], len(members))
    own = float(score.value({key: values.sum() for key, values in found.items()}))
    figure = Figure(name, len(members), own, *_interval(found, draws[0], own, score.full))
    if then is None:
        return figure
    other = float(score.value({key: values.sum() for key, values in then.items()}))
    differences = draws[1] - draws[0]
    low, high = _ends(differences)
    if differences.min() == differences.max():
        # Every unit has one difference, which resampling takes for certain: so many others there may be among all.
        others = wilson_interval(0, len(members), LEVEL)[1]
        low = high = other - own
        low = -score.full * others if low == 0 else low * (1 - others) if low > 0 else low
        high = score.full * others if high == 0 else high * (1 - others) if high < 0 else high
    tuned_low, tuned_high = _interval(then, draws[1], other, score.full)
    return dataclasses.replace(
        figure,
        tuned=other,
        tuned_low=tuned_low,
        tuned_high=tuned_high,
        difference=other - own,
        low=low,
        high=high,
        p=_p_value(found, then, np.asarray(differences)),
    )


def _table(score: Score, rows: Rows, members: Sequence[Sequence[int]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return each unit's sums, by name: ``(units,)``."""
    import numpy as np

    sums = [score.count([rows[number] for number in unit]) for unit in members]
    keys = sorted({key for one in sums for key in one})
    return {key: np.array([one.get(key, 0.0) for one in sums]) for key in keys}


def _resampled(score: Score, tables: Sequence[Mapping[str, Any]], units: int) -> list[np.ndarray[Any, Any]]:
    """Return the scores of every resample, the same resamples for all tables: ``(draws,)`` each."""
    import numpy as np

    random = np.random.default_rng(0)
    at_once = max(1, AT_ONCE // units)
    found: list[list[Any]] = [[] for _ in tables]
    for start in range(0, DRAWS, at_once):
        count = min(at_once, DRAWS - start)
        weights = random.multinomial(units, [1 / units] * units, size=count)
        for values, table in zip(found, tables, strict=True):
            values.append(score.value({key: weights @ column for key, column in table.items()}))
    return [np.concatenate([np.broadcast_to(v, np.shape(v) or (1,)) for v in values]) for values in found]


def _is_share(table: Mapping[str, Any]) -> bool:
    """Tell whether a score is the share of units that are right, each once."""
    return bool(
        table.keys() == {"right", "all"}
        and (table["all"] == 1).all()
        and ((table["right"] == 0) | (table["right"] == 1)).all()
    )


def _interval(
    table: Mapping[str, Any], draws: np.ndarray[Any, Any], score: float, full: float
) -> tuple[float, float]:
    """Return Wilson's interval of a share, which is right near both ends, and the bootstrap's of anything else.

    Where every unit is wrong, or every unit right, resampling would give an interval of no width; it is Wilson's, too.
    """
    units = len(next(iter(table.values())))
    if _is_share(table):
        low, high = wilson_interval(int(table["right"].sum()), units, LEVEL)
        return 100 * low, 100 * high
    if draws.min() == draws.max() and score in (0.0, full):
        low, high = wilson_interval(units if score else 0, units, LEVEL)
        return full * low, full * high
    return _ends(draws)


def _ends(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _p_value(base: Mapping[str, Any], tuned: Mapping[str, Any], differences: np.ndarray[Any, Any]) -> float:
    """Return McNemar's exact p of a share, and the bootstrap's of anything else."""
    from moslora.reports.metric_rows import sign_test

    if _is_share(base) and _is_share(tuned):
        fixed = int((tuned["right"] > base["right"]).sum())
        broken = int((tuned["right"] < base["right"]).sum())
        return sign_test(fixed, broken) if fixed + broken else 1.0
    beyond = min(float((differences <= 0).mean()), float((differences >= 0).mean()))
    return min(1.0, max(2 * beyond, 2 / DRAWS))
