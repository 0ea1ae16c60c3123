"""Answers of one model as graded rows: what an answer says, by rule, and whether that is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moslora.evaluation.benchmarks.rules import (
    TEXT_RULES,
    contains_any,
    find_choice,
    find_yes_or_no,
    split_answers,
)
from moslora.evaluation.benchmarks.scores import Graded
from moslora.evaluation.benchmarks.table import Benchmark, read_choices
from moslora.evaluation.benchmarks.tsv import LETTERS, Item
from moslora.wording import one_line

__all__ = ["answered_publicly", "grade", "options_of", "scored", "unit_of"]

# A rotation's index is its question's and a multiple of this (VLMEvalKit, multiple_choice.py).
ROTATION = 1_000_000
OTHER = "Other Answers"  # what stands against the answer of a question without options, in MMMU


def scored(benchmark: Benchmark, items: Sequence[Item]) -> list[Item]:
    """Return the items that are scored by rule: of MathVista those with options, of judged benchmarks none.

    Args:
        benchmark: Which benchmark it is.
        items: Its rows.
    """
    if benchmark.score == "mathvista":
        return [item for item in items if item.cells.get("question_type") == "multi_choice"]
    return [] if benchmark.kind == "judged" else list(items)


def answered_publicly(benchmark: Benchmark, items: Sequence[Item]) -> bool:
    """Tell whether a file has the answer of every item; of test splits it is often kept back.

    Args:
        benchmark: Which benchmark it is.
        items: Its rows.
    """
    return all(item.cells.get("answer") for item in scored(benchmark, items))


def options_of(benchmark: Benchmark, item: Item) -> dict[str, str]:
    """Return the options that an answer is read against, by letter.

    Args:
        benchmark: Which benchmark it is.
        item: One of its rows.
    """
    if benchmark.score == "mathvista":
        return dict(zip(LETTERS, read_choices(item.cells["choices"]), strict=False))
    if benchmark.kind == "choice" and not item.options:
        return {"A": item.cells.get("answer", ""), "B": OTHER}
    return item.options


def expected_answer(benchmark: Benchmark, item: Item) -> str:
    """Return the right answer: a letter, yes or no, or the texts that are accepted.

    Args:
        benchmark: Which benchmark it is.
        item: One of its rows.
    """
    answer = item.cells.get("answer", "")
    if benchmark.score == "mathvista":
        return item.cells.get("answer_option", "")
    if benchmark.kind == "choice" and answer not in LETTERS:
        return "A"  # of a question without options
    return answer


def grade(benchmark: Benchmark, items: Sequence[Item], answers: Sequence[str]) -> list[Graded]:
    """Grade a model's answers.

    Args:
        benchmark: Which benchmark it is.
        items: Rows that are scored.
        answers: What the model wrote, in the same order.
    """
    grades = []
    for item, answer in zip(items, answers, strict=True):
        expected = expected_answer(benchmark, item)
        if benchmark.kind == "text":
            found, right = "", _text_grade(benchmark, item, answer)
        elif benchmark.kind == "yes-no":
            found = find_yes_or_no(answer)
            right = float(found == expected)
        else:
            found = find_choice(answer, options_of(benchmark, item))
            right = float(found == expected)
        unit, group = _unit(benchmark, item)
        grades.append(
            Graded(unit, group, _categories(benchmark, item), right, found, expected, _keys(benchmark, item))
        )
    return grades


def _text_grade(benchmark: Benchmark, item: Item, answer: str) -> float:
    references = split_answers(item.cells.get("answer", ""))
    if benchmark.rule == "contains":
        return contains_any(answer, references, item.cells.get("category", ""))
    return TEXT_RULES[benchmark.rule](answer, references)


def unit_of(benchmark: Benchmark, item: Item) -> str:
    """Return the question, picture, set or row that an item is drawn with.

    Args:
        benchmark: Which benchmark it is.
        item: One of its rows.
    """
    return _unit(benchmark, item)[0]


def _unit(benchmark: Benchmark, item: Item) -> tuple[str, str]:
    """Return what an item is drawn with, and whose grades count together with its own."""
    shown = item.cells.get("image_path") or item.shows
    if benchmark.circular:
        question = item.cells.get("g_index") or str(int(item.index) % ROTATION)
        return question, question
    if benchmark.unit == "set":
        return _hallusion(item)[2], item.index
    if benchmark.unit == "picture":
        return shown, f"{item.cells.get('category', '')} {shown}"
    return item.index, item.index


def _categories(benchmark: Benchmark, item: Item) -> tuple[str, ...]:
    names = [item.cells.get(column, "") for column in ("l2-category", "category")]
    if benchmark.score == "f1":
        return tuple(item.cells.get("category", "").split(",")) if item.cells.get("category") else ()
    if benchmark.score == "mme":
        return (item.cells["category"],)
    return tuple(dict.fromkeys(one_line(name) for name in names if name))


def _keys(benchmark: Benchmark, item: Item) -> tuple[str, ...]:
    return _hallusion(item)[:2] if benchmark.score == "hallusion" else ()


def _hallusion(item: Item) -> tuple[str, str, str]:
    """Return figure, question and set of an item of HallusionBench: parts four to six of its index."""
    parts: Mapping[int, str] = dict(enumerate(item.index.split("_")))
    of = f"{item.cells.get('l2-category', '')}_{parts.get(3, '')}"
    return f"{of}_{parts.get(4, '')}", f"{of}_{parts.get(5, '')}", of
