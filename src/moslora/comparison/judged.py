"""A vision-language benchmark as what the methods of a comparison are judged by, beside their held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError
from moslora.evaluation.benchmarks.asking import Asker
from moslora.evaluation.benchmarks.grading import answered_publicly, grade, scored
from moslora.evaluation.benchmarks.prompts import prompt_for
from moslora.evaluation.benchmarks.rules import RULES_VERSION
from moslora.evaluation.benchmarks.table import Benchmark, find_benchmark
from moslora.evaluation.benchmarks.tsv import BenchmarkFile, read_benchmark_file

if TYPE_CHECKING:
    from moslora.comparison.plan import Comparison
    from moslora.display import Display

__all__ = ["BenchmarkJudge"]


class BenchmarkJudge:
    """Asks trained models a benchmark's questions.

    Args:
        file: The benchmark's file, read and checked.
        benchmark: Which benchmark it is.
        known_as: What the user calls it.

    Attributes:
        name: What it is called in tables.
    """

    def __init__(self, file: BenchmarkFile, benchmark: Benchmark, known_as: str | None) -> None:
        self.file, self.benchmark = file, benchmark
        self.items = scored(benchmark, file.items)
        self.name = benchmark.name if known_as is None else f"{file.path.stem} ({known_as})"

    @classmethod
    def of(cls, plan: Comparison) -> BenchmarkJudge | None:
        """Read the benchmark that a comparison names.

        Args:
            plan: What is compared.

        Raises:
            DataError, UsageError: If it cannot be used.
        """
        if plan.benchmark is None:
            return None
        kind: str = plan.recipe.task.kind
        if kind != "vision":
            raise UsageError(f"--benchmark needs a recipe of task: vision; this one is task: {kind}.")
        file = read_benchmark_file(Path(plan.benchmark))
        benchmark, _ = find_benchmark(file, plan.benchmark_as)
        judge = cls(file, benchmark, plan.benchmark_as)
        if not judge.items:
            raise UsageError(
                f"{benchmark.name} is scored by another model, so methods cannot be judged by it here."
            )
        if not answered_publicly(benchmark, file.items):
            raise UsageError(f"{file.path} has no answers, so methods cannot be judged by it.")
        return judge

    def identity(self) -> dict[str, Any]:
        """Return what its numbers depend on."""
        return {"file": self.file.sha256, "benchmark": self.benchmark.name, "rules": RULES_VERSION}

    def judge(self, task: Any, model: Any, label: str, display: Display) -> list[float]:
        """Ask a model everything.

        Args:
            task: Of vision, prepared.
            model: Base or adapted model.
            label: Its name in the progress display.
            display: Where progress is shown.

        Returns:
            One grade per question, picture, set or row, as the benchmark draws them: 1 if it is right, or a mean.
        """
        data = task.recipe.data
        asker = Asker(
            model,
            False,
            task.encoder,
            task.device,
            display,
            data.max_pixels,
            data.square,
            prompt_for(model.config.model_type),
        )
        answers = asker.answer_all(self.benchmark, self.file, self.items, label, task.raise_if_stopped)
        units: dict[str, list[float]] = {}
        for row in grade(self.benchmark, self.items, answers):
            units.setdefault(row.unit, []).append(row.grade)
        join: Any = (lambda grades: float(all(grades))) if self.benchmark.circular else _mean
        return [join(grades) for grades in units.values()]


def _mean(grades: Sequence[float]) -> float:
    return fmean(grades)
