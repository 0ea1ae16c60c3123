"""What is compared: methods, rates and seeds, and the files of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moslora.comparison.methods import Method
from moslora.comparison.results import Given
from moslora.recipe.schema import Recipe

__all__ = ["Comparison", "Engine", "Planned"]


# Versions on which a cell's numbers depend; with others a comparison does not continue.
DECISIVE = ("torch", "transformers", "peft", "trl", "moslora")
Planned = tuple[Method, float, int]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        recipe: With the steps asked for.
        methods: In the order asked for, the baseline first in the order of running.
        rates: Learning rates, rising.
        seeds: Shared by all methods.
        baseline: The method that the others are compared with.
        validation: Examples to set aside for choosing rates.
        examples: Held-out examples to judge by; None for all.
        directory: Where it is kept.
        benchmark: File of a vision-language benchmark whose questions judge the methods, too; None for none.
        benchmark_as: Which benchmark it is, where the file does not tell.
        given: Learning rates that were tuned elsewhere; their methods are not tuned here.
        contrasts: Pairs of methods to compare, beside each method with the baseline.
        stage: 1 where rates are tuned, 2 where the methods at their best rates are confirmed on fresh seeds.
        confirmed: The cells of stage 2; those of stage 1 follow from the rest.
    """

    recipe: Recipe
    methods: Sequence[Method]
    rates: Sequence[float]
    seeds: Sequence[int]
    baseline: str
    validation: int
    examples: int | None
    directory: Path
    benchmark: Path | None = None
    benchmark_as: str | None = None
    given: Given = field(default_factory=Given)
    contrasts: Sequence[tuple[str, str]] = ()
    stage: int = 1
    confirmed: Sequence[Planned] = ()

    @property
    def cells(self) -> list[Planned]:
        """Every cell in the order of running: the baseline's middle rate first, as its seeds show the noise."""
        if self.stage == 2:
            return list(self.confirmed)
        methods = sorted(self.tuned, key=lambda m: m.name != self.baseline)
        if not methods:
            return []
        middle = self.rates[len(self.rates) // 2]
        rates = sorted(self.rates, key=lambda rate: rate != middle)
        return [(m, rate, seed) for m in methods for rate in rates for seed in self.seeds]

    @property
    def tuned(self) -> list[Method]:
        """The methods whose rate is chosen here."""
        return [method for method in self.methods if method.name not in self.given.rates]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """What is compared with what: each method with the baseline, and the pairs asked for beside them."""
        with_baseline = [(m.name, self.baseline) for m in self.methods if m.name != self.baseline]
        return list(dict.fromkeys([*with_baseline, *self.contrasts]))

    @property
    def folder(self) -> Path:
        """Where the cells of this stage are kept."""
        return self.directory / ("cells" if self.stage == 1 else "confirm")

    @property
    def base_file(self) -> Path:
        """Where the untrained base's losses are kept."""
        return self.folder / "base.json"

    def cell_file(self, method: Method, rate: float, seed: int) -> Path:
        """Where a cell's result is kept."""
        return self.file_of(method.name, rate, seed)

    def file_of(self, name: str, rate: float, seed: int) -> Path:
        """The same by the method's name."""
        return self.folder / f"{name}_{rate:g}_{seed}.json"

    def mark(self, cell: Planned) -> Path:
        """Where it is noted that a cell was begun, and how often."""
        return self.cell_file(*cell).with_suffix(".started")


@dataclass(frozen=True)
class Engine:
    """How cells are run.

    Attributes:
        name: A key of ``ENGINES``.
        workers: Processes side by side; None for the engine's own choice.
        together: Cells that a process trains at once over one base, at most.
    """

    name: str = "local"
    workers: int | None = None
    together: int = 1
