"""The second stage of a comparison: the methods at their chosen rates, on seeds that chose nothing.

```
runs/compare-NAME/
├─ confirm.json     rates, and each contrast's verdicts: on how many seeds, waited for or not
└─ confirm/*.json   one per finished cell, as in cells/; other rates than the best are here, too
```

How many seeds a contrast takes follows from its own cells in the order of seeds (``moslora.metrics.sequential``), so
it is the same after an interruption, and whatever the workers. Losses are not shown before they are judged.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.bounded import read_json
from moslora.comparison.cell_files import read_cells
from moslora.comparison.confirmed import Asked, Found, confirm_methods, level_of, settle_pair, times
from moslora.comparison.costs import cost_of_pairs, not_finite, with_cost_sentences
from moslora.comparison.forecast import say_second_stage, say_widths
from moslora.comparison.off_rates import price_rates, say_prices
from moslora.comparison.plan import Comparison, Engine, Planned
from moslora.comparison.results import Confirmation, Verdict
from moslora.comparison.runners import run_all
from moslora.errors import UsageError
from moslora.files import write_text
from moslora.metrics.sequential import FIRST, Goal, Look
from moslora.training.stop import StopRequest

if TYPE_CHECKING:
    from moslora.comparison.bench import Bench
    from moslora.display import Display
    from moslora.tasks.language import LanguageTask

__all__ = ["SecondStage", "Wanted", "check_wanted"]

# The fresh seeds begin this far after the recipe's, which rates are tuned on.
FRESH = 1000
# Seeds at most, where only a width is asked for.
MOST_SEEDS = 100
CONFIRM_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Wanted:
    """What is asked of the second stage.

    Attributes:
        goal: How many seeds, or how narrow an interval.
        factors: Other rates to price, as multiples of each method's best one.
        priced_seeds: On how many of the fresh seeds.
    """

    goal: Goal
    factors: Sequence[float] = ()
    priced_seeds: int = 0


def check_wanted(
    confirm: int | None, width: float | None, off_rates: Sequence[float], off_seeds: int | None
) -> Wanted | None:
    """Check what is asked of the second stage; None if nothing is.

    Args:
        confirm: Fresh seeds; with ``width`` at most.
        width: Half-width of the intervals to reach.
        off_rates: Multiples of each method's best rate to price.
        off_seeds: On how many seeds; None for those of ``confirm``, or with ``width`` the first look's.

    Raises:
        UsageError: If a number is out of range, or a price is asked for without a confirmation.
    """
    if confirm is None and width is None:
        for name, given in (
            ("off_rates (--off-rates)", bool(off_rates)),
            ("off_seeds (--off-seeds)", off_seeds),
        ):
            if given:
                raise UsageError(f"{name} is a part of the second stage; add confirm (--confirm N).")
        return None
    if confirm is not None and confirm < 2:
        raise UsageError(
            f"confirm={confirm} seeds show no noise between seeds; take at least 2, better 10 or more."
        )
    if width is not None and not 0 < width < float("inf"):
        raise UsageError(
            f"width={width} must be a positive number: half of the interval's length, in nats per token."
        )
    goal = Goal(MOST_SEEDS if confirm is None else confirm, width)
    factors = [float(factor) for factor in off_rates]
    wrong = [factor for factor in factors if not 0 < factor < float("inf") or factor == 1]
    if wrong or len({f"{factor:g}" for factor in factors}) != len(factors):
        raise UsageError(
            f"off_rates={factors} must be positive, all different, and none of them 1: multiples of the best rate."
        )
    usual = goal.seeds if width is None else min(FIRST, goal.seeds)
    seeds = usual if off_seeds is None else off_seeds
    if factors and not 2 <= seeds <= goal.seeds:
        raise UsageError(f"off_seeds={seeds} must be from 2 to the {goal.seeds} seeds of the confirmation.")
    if off_seeds is not None and not factors:
        raise UsageError(
            "off_seeds (--off-seeds) says on how many seeds rates are priced; add off_rates (--off-rates)."
        )
    return Wanted(goal, sorted(factors), seeds if factors else 0)


class SecondStage:
    """The second stage of one comparison.

    Args:
        plan: Of the first stage.
        rates: The rate of each method that has one.
        display: Where to tell of progress.

    Attributes:
        record: What ``confirm.json`` holds.
    """

    def __init__(self, plan: Comparison, rates: Mapping[str, float], display: Display) -> None:
        self.plan = dataclasses.replace(plan, stage=2, examples=None)
        self.rates, self.display = dict(rates), display
        self.file = plan.directory / "confirm.json"
        self.record = self._read() if self.file.exists() else self._begin()

    @classmethod
    def of(cls, plan: Comparison, tuned: Verdict, display: Display) -> SecondStage:
        """Return the second stage of a comparison whose first has a verdict."""
        rates = {one.name: one.best_rate for one in tuned.methods if one.best_rate is not None}
        return cls(plan, rates, display)

    @classmethod
    def was_begun(cls, plan: Comparison) -> bool:
        """Tell whether the comparison's folder has one."""
        return (plan.directory / "confirm.json").exists()

    def _begin(self) -> dict[str, Any]:
        return {
            "schema_version": CONFIRM_SCHEMA_VERSION,
            "rates": self.rates,
            "commands": [],
            "contrasts": [],
            "prices": [],
        }

    def _read(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = read_json(self.file)
            rates = record["rates"]
            for contrast in record["contrasts"]:
                assert contrast["looks"] and all(look["seeds"] > 1 for look in contrast["looks"])
            assert isinstance(record["prices"], list) and isinstance(record["commands"], list)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UsageError(
                f"{self.file} is damaged; restore it from a copy. It has on how many seeds verdicts were given, "
                "without which further ones cannot keep the error rate."
            ) from error
        if rates != self.rates:
            raise UsageError(
                f"{self.file} confirms the rates {rates}, but the first stage now says {self.rates}: its cells were "
                "changed. Restore them, or name another folder with --out."
            )
        return record

    def _write(self) -> None:
        write_text(self.file, json.dumps(self.record, indent=2, ensure_ascii=False))

    # ---- what is there -------------------------------------------------------------------------------

    def seeds(self, many: int) -> list[int]:
        """Return fresh seeds: none that a rate was tuned on.

        Args:
            many: How many.
        """
        used = {*self.plan.seeds, *self.plan.given.seeds}
        found: list[int] = []
        seed = self.plan.recipe.seed + FRESH
        while len(found) < many:
            if seed not in used:
                found.append(seed)
            seed += 1
        return found

    def cells(self, seeds: int, factors: Sequence[float] = ()) -> list[Planned]:
        """Return the cells of all methods at their best rates, and at multiples of them.

        Args:
            seeds: How many.
            factors: The multiples.
        """
        return [
            (method, times(self.rates[method.name], factor), seed)
            for factor in (1.0, *factors)
            for seed in self.seeds(seeds)
            for method in self.plan.methods
            if method.name in self.rates
        ]

    def found(self, seeds: int, factors: Sequence[float] = ()) -> Found:
        """Return what is there of these cells."""
        there = read_cells(dataclasses.replace(self.plan, confirmed=self.cells(seeds, factors)))
        base = read_json(self.plan.base_file)["test"] if self.plan.base_file.exists() else []
        kept = {(cell.method, cell.learning_rate, cell.seed): cell for cell in there}
        return Found(self.rates, self.seeds(seeds), kept, base)

    def asked(self, pairs: Sequence[tuple[str, str]] = ()) -> list[Asked]:
        """Return the contrasts that have verdicts, and others that are asked for now.

        Args:
            pairs: Methods and baselines.
        """
        known = [
            Asked((one["method"], one["baseline"]), [Look(**look) for look in one["looks"]], one["late"])
            for one in self.record["contrasts"]
        ]
        there = {one.pair for one in known}
        new = [pair for pair in pairs if pair not in there and all(name in self.rates for name in pair)]
        return known + [Asked(pair, [], bool(known)) for pair in new]

    # ---- running it ----------------------------------------------------------------------------------

    def announce(self, wanted: Wanted, tuned: Verdict, examples: int, workers: int) -> None:
        """Say what there is to do, how long it takes and what it can show.

        Args:
            wanted: What is asked for.
            tuned: The first stage's verdict.
            examples: Held-out examples.
            workers: Cells at the same time.
        """
        wanted = self._with_earlier(wanted)
        say_second_stage(
            self.plan,
            self.found(self._most(wanted)),
            self.asked(self.plan.pairs),
            wanted.goal,
            (len(wanted.factors), wanted.priced_seeds),
            self._away_left(wanted),
            tuned,
            examples,
            workers,
            self.display,
        )

    def _away_left(self, wanted: Wanted) -> dict[str, int]:
        """Return how many cells at other rates than the best are missing, by method."""
        away = [c for c in self.cells(wanted.priced_seeds, wanted.factors) if c[1] != self.rates[c[0].name]]
        left = [
            method.name for method, rate, seed in away if not self.plan.cell_file(method, rate, seed).exists()
        ]
        return {name: left.count(name) for name in self.rates}

    def run(
        self,
        wanted: Wanted,
        tuned: Verdict,
        task: LanguageTask,
        stop: StopRequest,
        engine: Engine,
        bench: Bench | None,
        command: str,
    ) -> None:
        """Train what is missing until every contrast is settled, and record the verdicts.

        Args:
            wanted: What is asked for.
            tuned: The first stage's verdict, for what it says of time and spread.
            task: Of this stage, prepared.
            stop: Asked between pieces of work.
            engine: Where and how.
            bench: Of the first stage; None to load the base.
            command: How it was called, to be kept.

        Raises:
            Stopped: If asked to stop.
        """
        wanted = self._with_earlier(wanted)
        asked = self.asked(self.plan.pairs)
        self.plan.folder.mkdir(exist_ok=True)
        if command not in self.record["commands"]:
            self.record["commands"].append(command)
        self._write()
        begun = False
        for cells in self._waves(asked, wanted):
            if not begun:
                self.announce(wanted, tuned, len(task.heldout_set), engine.workers or 1)
                begun = True
            plan = dataclasses.replace(self.plan, confirmed=cells)
            bench = run_all(plan, task, self.display, stop, engine, bench)
            say_widths(self.found(self._most(wanted)), asked, wanted.goal, self.display)
        self._conclude(asked, wanted)

    def _with_earlier(self, wanted: Wanted) -> Wanted:
        """Return what is asked for, prices that were judged before among it: none is taken back."""
        if not wanted.factors or not self.record["prices"]:
            return wanted
        last = self.record["prices"][-1]
        factors = sorted({*wanted.factors, *last["factors"]})
        return dataclasses.replace(
            wanted, factors=factors, priced_seeds=max(wanted.priced_seeds, last["seeds"])
        )

    def _most(self, wanted: Wanted) -> int:
        """Return the most seeds that any contrast or price may have."""
        earlier = [look.seeds for one in self.asked() for look in one.looks]
        return max([wanted.goal.seeds, wanted.priced_seeds, *earlier])

    def _waves(self, asked: Sequence[Asked], wanted: Wanted) -> Iterator[list[Planned]]:
        """Yield the cells that are wanted next, those that are there among them, until none is missing."""
        most = self._most(wanted)
        place = {seed: index for index, seed in enumerate(self.seeds(most))}
        away = self.cells(wanted.priced_seeds, wanted.factors)
        while True:
            found = self.found(most)
            many = dict.fromkeys(self.rates, wanted.priced_seeds)
            for one in asked:
                seeds = settle_pair(found, one, wanted.goal).seeds
                for name in one.pair:
                    many[name] = max(many[name], seeds)
            best = [cell for cell in self.cells(most) if place[cell[2]] < many[cell[0].name]]
            cells = [*best, *(cell for cell in away if cell[1] != self.rates[cell[0].name])]
            plan = dataclasses.replace(self.plan, confirmed=cells)
            if plan.base_file.exists() and all(plan.cell_file(*cell).exists() for cell in cells):
                return
            yield cells

    def _conclude(self, asked: Sequence[Asked], wanted: Wanted) -> None:
        """Record the verdicts that are given now, before any of them is shown."""
        found = self.found(self._most(wanted))
        self.record["contrasts"] = []
        for one in asked:
            settled = settle_pair(found, one, wanted.goal)
            assert settled.looks is not None, "every wave goes on until it is settled"
            looks = [dataclasses.asdict(look) for look in settled.looks]
            method, baseline = one.pair
            self.record["contrasts"].append(
                {"method": method, "baseline": baseline, "late": one.late, "looks": looks}
            )
        price = {"factors": list(wanted.factors), "seeds": wanted.priced_seeds}
        if wanted.factors and price not in self.record["prices"]:
            self.record["prices"].append(price)
        self.record["goal"] = dataclasses.asdict(wanted.goal)
        self._write()

    # ---- what came of it -----------------------------------------------------------------------------

    def judge(self, judged_by: str) -> Confirmation | None:
        """Judge what has a verdict; None while nothing has.

        Args:
            judged_by: What grades of a benchmark's questions are called.
        """
        if "goal" not in self.record:
            return None
        goal, prices = Goal(**self.record["goal"]), self.record["prices"]
        wanted = Wanted(goal)
        if prices:
            wanted = Wanted(goal, prices[-1]["factors"], prices[-1]["seeds"])
        asked = self.asked()
        found = self.found(self._most(wanted), wanted.factors)
        if self._lacks(found, asked, wanted):
            return None
        confirmation = confirm_methods(found, asked, goal, judged_by, wanted.priced_seeds)
        confirmation = self._with_costs(confirmation, found, asked)
        if not prices:
            return confirmation
        priced = price_rates(found, self.plan.baseline, wanted.factors, wanted.priced_seeds, len(prices))
        said = say_prices(priced, self.plan.baseline)
        return dataclasses.replace(confirmation, prices=priced, sentences=[*confirmation.sentences, *said])

    def _lacks(self, found: Found, asked: Sequence[Asked], wanted: Wanted) -> bool:
        """Tell whether a cell is gone on which a verdict was given: it is trained again before anything is judged."""
        of_pairs = [(name, 1.0, one.looks[-1].seeds) for one in asked for name in one.pair]
        away = [(name, f, wanted.priced_seeds) for name in self.rates for f in (1.0, *wanted.factors)]
        return not found.base or any(
            len(found.of(name, factor)) < seeds for name, factor, seeds in [*of_pairs, *away]
        )

    def _with_costs(self, confirmation: Confirmation, found: Found, asked: Sequence[Asked]) -> Confirmation:
        """Add what methods cost on data that tuning is not about, where that was measured."""
        base = read_json(self.plan.base_file).get("also") or {}
        if not base:
            return confirmation
        cells = {one.pair: [found.of(name)[: one.looks[-1].seeds] for name in one.pair] for one in asked}
        told = [(c.method, c.baseline) for c in confirmation.contrasts if c.measure == "loss"]
        levels = {one.pair: level_of(one) for one in asked}
        costs = cost_of_pairs([(pair, cells[pair], levels[pair]) for pair in told], base)
        chosen = {name: of for pair in told for name, of in zip(pair, cells[pair], strict=True)}
        said = confirmation.sentences
        return dataclasses.replace(
            confirmation,
            sentences=[*with_cost_sentences(said, told, costs), *said[len(told) :]],
            cautions=[*confirmation.cautions, *not_finite(chosen, base)],
            costs=costs,
        )
