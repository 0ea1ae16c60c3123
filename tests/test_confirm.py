"""Laws of a comparison's second stage: fresh seeds, all held-out examples, nothing lost and nothing taken back."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from moslora.comparison.bench import Bench
from moslora.comparison.compare import compare
from moslora.comparison.confirmed import Asked, Found, confirm_methods
from moslora.comparison.forecast import expected_seeds
from moslora.comparison.given import read_rates
from moslora.comparison.methods import METHODS, find_method
from moslora.comparison.off_rates import price_rates, say_prices
from moslora.comparison.results import Cell, Confirmation, Verdict
from moslora.display import Display
from moslora.errors import Stopped
from moslora.metrics.intervals import holm, paired_difference
from moslora.metrics.sequential import Goal, Look, level_of_look
from moslora.reports.again import remake_report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 40)
    tiny.save_chat_data(folder / "heldout.jsonl", 9)
    return folder


def run(world: Path, out: Path, shown: io.StringIO | None = None, **options: Any) -> Verdict:
    own = [
        f"model={world / 'base'}",
        f"data={world / 'train.jsonl'}",
        f"data.heldout={world / 'heldout.jsonl'}",
        "adapter.r=2",
        "adapter.target_modules=[q_proj]",
        "trainer.max_steps=3",  # the first is at rate 0, and a mixer moves when B has
        "trainer.per_device_train_batch_size=2",
    ]
    settings: dict[str, Any] = {
        "methods": ["lora", "moslora"],
        "seeds": 2,
        "rates": [1e-3, 1e-2],
        "validation": 4,
        "examples": 5,
        **options,
    }
    display = Display(quiet=True) if shown is None else Display(shown)
    verdict = compare(own, display, out=out, **settings)[1]
    assert verdict is not None
    return verdict


def of(verdict: Verdict) -> Confirmation:
    assert verdict.confirmation is not None
    return verdict.confirmation


def cells(folder: Path, stage: str = "confirm") -> dict[str, dict[str, Any]]:
    return {f.stem: json.loads(f.read_text()) for f in (folder / stage).glob("*.json") if f.stem != "base"}


def counted(monkeypatch: pytest.MonkeyPatch, most: int = 10**6) -> list[tuple[str, float, int]]:
    """The cells that are run from here on; after ``most`` it is as if Ctrl-C was pressed."""
    ran: list[tuple[str, float, int]] = []
    original = Bench.run

    def spy(self: Bench, method: Any, rate: float, seed: int) -> Any:
        if len(ran) == most:
            raise Stopped(2)
        ran.append((method.name, rate, seed))
        return original(self, method, rate, seed)

    monkeypatch.setattr(Bench, "run", spy)
    return ran


@pytest.fixture(scope="module")
def tuned(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of one stage."""
    folder = tmp_path_factory.mktemp("runs") / "c"
    run(world, folder, methods=["lora", "moslora", "frozen-mixer"])
    return folder


ASKED: dict[str, Any] = {
    "methods": ["lora", "moslora", "frozen-mixer"],
    "contrasts": ["moslora:frozen-mixer"],
    "confirm": 3,
    "off_rates": [0.1, 10],
    "off_seeds": 2,
}
# Without prices.
PLAIN: dict[str, Any] = {"off_rates": (), "off_seeds": None}


@pytest.fixture(scope="module")
def confirmed(world: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    folder = tmp_path_factory.mktemp("runs") / "c"
    shutil.copytree(tuned, folder)
    return folder, run(world, folder, **ASKED)


def test_a_finished_comparison_is_confirmed_without_tuning_again(confirmed, tuned):
    folder, verdict = confirmed
    assert cells(folder, "cells") == cells(tuned, "cells")
    stored = cells(folder)
    assert len(stored) == 3 * (3 + 2 * 2)
    fresh, used = {c["seed"] for c in stored.values()}, {c["seed"] for c in cells(tuned, "cells").values()}
    assert len(fresh) == 3 and not fresh & used
    # All held-out examples, and nothing that only tuning needs.
    assert all(
        len(c["test"]) == 9 and c["validation"] is None and c["correct"] is None for c in stored.values()
    )
    assert of(verdict).examples == 9 and of(verdict).complete


def test_a_confirmation_is_what_a_calculation_from_its_cells_gives(confirmed):
    folder, verdict = confirmed
    rates = {m.name: m.best_rate for m in verdict.methods}
    seeds = of(verdict).seeds

    def losses(name: str, factor: float = 1) -> list[list[float]]:
        stored = cells(folder)
        return [stored[f"{name}_{rates[name] * factor:g}_{seed}"]["test"] for seed in seeds]

    for contrast in of(verdict).contrasts:
        rows = [
            [a - b for a, b in zip(one, two, strict=True)]
            for one, two in zip(losses(contrast.method), losses(contrast.baseline), strict=True)
        ]
        assert contrast.difference == paired_difference(rows, level_of_look(1))
        assert contrast.difference.mean != 0
    corrected = holm([min(1.0, contrast.difference.p / 0.8) for contrast in of(verdict).contrasts])
    assert [contrast.p_corrected for contrast in of(verdict).contrasts] == pytest.approx(corrected)
    assert [(c.method, c.baseline) for c in of(verdict).contrasts] == [
        ("moslora", "lora"),
        ("frozen-mixer", "lora"),
        ("moslora", "frozen-mixer"),
    ]
    assert [(c.method, c.baseline) for c in verdict.contrasts] == [
        (c.method, c.baseline) for c in of(verdict).contrasts
    ]


def test_a_price_is_the_loss_beside_the_best_rate_on_the_same_seeds(confirmed):
    folder, verdict = confirmed
    stored, seeds = cells(folder), of(verdict).seeds[:2]
    prices = {(p.method, p.factor): p for p in of(verdict).prices}
    assert len(prices) == 6

    def rows(name: str, factor: float) -> list[list[float]]:
        best = prices[name, factor].rate / factor
        return [
            [
                a - b
                for a, b in zip(
                    stored[f"{name}_{best * factor:g}_{seed}"]["test"],
                    stored[f"{name}_{best:g}_{seed}"]["test"],
                    strict=True,
                )
            ]
            for seed in seeds
        ]

    own, theirs = rows("moslora", 10), rows("lora", 10)
    price = prices["moslora", 10]
    assert price.difference.mean == pytest.approx(paired_difference(own).mean)
    beside = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(own, theirs, strict=True)]
    assert price.beside_baseline.mean == pytest.approx(paired_difference(beside).mean)
    assert prices["lora", 10].beside_baseline is None and price.seeds == 2


def test_what_methods_cost_is_judged_on_the_same_fresh_seeds(confirmed):
    folder, verdict = confirmed
    stored, rates = cells(folder), {m.name: m.best_rate for m in verdict.methods}
    costs = {(c.method, c.baseline, c.measure): c for c in of(verdict).costs}
    assert len(costs) == 3 * 2
    for (method, baseline, measure), cost in costs.items():
        one, two = (
            [
                stored[f"{name}_{rates[name]:g}_{seed}"]["also"]["general"][measure]
                for seed in of(verdict).seeds
            ]
            for name in (method, baseline)
        )
        rows = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(one, two, strict=True)]
        assert cost.difference == paired_difference(rows, level_of_look(1))
    for contrast, sentence in zip(of(verdict).contrasts, of(verdict).sentences, strict=False):
        cost = costs[contrast.method, contrast.baseline, "loss"]
        assert f"loss on general text {cost.difference.mean:+.4f}" in sentence
    page = (folder / "report.html").read_text()
    assert "What it cost on fresh seeds" in page and "What it cost in the first stage" in page


def test_a_verdict_whose_cell_is_gone_is_not_told_as_one_of_lost_seeds(confirmed, world, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(confirmed[0], folder)
    cell = next((folder / "confirm").glob("moslora_*.json"))
    cell.unlink()
    shown = io.StringIO()
    assert run(world, folder, shown, methods=ASKED["methods"]).confirmation is None
    assert "is not finished; --confirm or --width continues it" in shown.getvalue()
    again = run(world, folder, **ASKED)
    assert of(again).contrasts == of(confirmed[1]).contrasts and cell.exists()


def test_the_same_command_runs_nothing_again_and_says_the_same(confirmed, world, monkeypatch):
    folder, verdict = confirmed
    record = (folder / "confirm.json").read_text()
    ran = counted(monkeypatch)
    assert run(world, folder, **ASKED) == verdict
    # Without the options of the second stage it is shown, not lost.
    plain = run(world, folder, methods=ASKED["methods"])
    assert of(plain) == of(verdict) and ran == []
    assert (folder / "confirm.json").read_text() == record
    assert json.loads((folder / "results.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(plain))
    )


def test_the_page_shows_both_stages_and_is_made_again_from_what_is_kept(confirmed):
    folder, verdict = confirmed
    page = (folder / "report.html").read_text()
    for sentence in of(verdict).sentences:
        assert sentence.split(",")[0].replace("'", "&#39;") in page
    assert "Fresh seeds" in page and "Wrong rates" in page and page.count("<svg") == 6
    assert not re.search(r'(?:src|href)="?(?:https?:)?//', page)
    (folder / "report.html").unlink()
    assert remake_report(folder).read_text() == page


def test_results_of_one_stage_as_version_0_1_left_them_are_shown(tuned, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(tuned, folder)
    results = json.loads((folder / "results.json").read_text())
    for key in ("confirmation", "given", "schema_version"):
        del results[key]
    (folder / "results.json").write_text(json.dumps(results))
    assert "Fresh seeds" not in remake_report(folder).read_text()


def test_a_stopped_confirmation_goes_on_and_ends_as_an_undisturbed_one(
    confirmed, tuned, world, tmp_path, monkeypatch
):
    folder = tmp_path / "c"
    shutil.copytree(tuned, folder)
    shown = io.StringIO()
    with monkeypatch.context() as patch:
        first = counted(patch, 4)
        with pytest.raises(Stopped):
            run(world, folder, shown, **{**ASKED, **PLAIN})
    assert "4 of the second stage" in shown.getvalue()
    # A cell that was cut off, and the leavings of one that was being written.
    (folder / "confirm" / ".lora.json.0123abcd-1-0123abcd.part").touch()
    half_way = json.loads((folder / "results.json").read_text())
    assert half_way["confirmation"] is None and half_way["contrasts"]
    with monkeypatch.context() as patch:
        second = counted(patch)
        verdict = run(world, folder, **{**ASKED, **PLAIN})
    assert not set(first) & set(second) and len(first) + len(second) == 9
    whole = {k: v["test"] for k, v in cells(confirmed[0]).items()}
    assert all(v["test"] == whole[k] for k, v in cells(folder).items())
    assert [c.difference for c in of(verdict).contrasts] == [c.difference for c in of(confirmed[1]).contrasts]
    assert not list((folder / "confirm").glob(".*"))


def test_more_seeds_are_a_second_verdict_whoever_trains_them(confirmed, world, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(confirmed[0], folder)
    shown = io.StringIO()
    verdict = run(world, folder, shown, **{**ASKED, "confirm": 5, "together": 2, **PLAIN})
    assert verdict.complete
    for contrast in of(verdict).contrasts:
        assert [look.seeds for look in contrast.looks] == [3, 5]
        assert contrast.difference.level == level_of_look(2) and contrast.difference.seeds == 5
    # Corrected for the second verdict's part of the level: a tenth.
    corrected = holm([min(1.0, 10 * contrast.difference.p) for contrast in of(verdict).contrasts])
    assert [contrast.p_corrected for contrast in of(verdict).contrasts] == pytest.approx(corrected)
    assert "verdict 2, after one on 3 seeds" in shown.getvalue()
    assert of(verdict).prices == of(confirmed[1]).prices


def test_a_width_adds_seeds_and_says_what_they_take_and_no_loss_before_the_end(world, tmp_path):
    shown = io.StringIO()
    options = {"confirm": 9, "width": 1e-7, "rates": (), "rates_from": "lora=0.01,moslora=0.01"}
    verdict = run(world, tmp_path / "c", shown, **options)
    said = shown.getvalue()
    assert "half-width" in said and "after 8 seeds" in said and "spread of the first 8 seeds" in said
    running = said[said.index("Second stage: lora at") : said.index("Second stage: fresh seeds")]
    assert running.count("done in") == 18
    for cell in cells(tmp_path / "c").values():
        assert f"{sum(cell['test']) / len(cell['test']):.4f}" not in running
    (contrast,) = of(verdict).contrasts
    assert contrast.looks == [Look(9, 1e-7)] and contrast.reached is False
    assert "moslora less lora: the interval is" in of(verdict).cautions[0]
    # A wider one is there already: what was judged stays judged.
    again = run(world, tmp_path / "c", **{**options, "width": 1.0})
    assert of(again).contrasts[0].looks == contrast.looks


def test_a_lost_seed_is_told_and_its_method_is_not_called_better(world, tmp_path):
    folder = tmp_path / "c"
    options = {"confirm": 3, "rates": (), "rates_from": "lora=0.01,moslora=0.01"}
    run(world, folder, **options)
    for file in (folder / "confirm").glob("moslora_*.json"):  # as if it had been far better
        cell = json.loads(file.read_text())
        cell["test"] = [value / 100 for value in cell["test"]]
        if cell["seed"] % 1000 == 1:
            cell |= {"status": "diverged", "reason": "NaN", "test": None}
        file.write_text(json.dumps(cell))
    verdict = run(world, folder, **options)
    (contrast,) = of(verdict).contrasts
    assert contrast.lost == (1, 0) and contrast.difference.seeds == 2
    assert contrast.difference.high < 0 and contrast.found == "none"
    assert "moslora did not finish at 1 of 3 seeds" in of(verdict).sentences[0]
    assert of(verdict).methods[1].diverged == 1


def test_rates_tuned_elsewhere_are_not_tuned_again_and_their_source_is_kept(confirmed, world, tmp_path):
    source = confirmed[0] / "results.json"
    rates = {m["name"]: m["best_rate"] for m in json.loads(source.read_text())["methods"]}
    out = tmp_path / "c"
    options = {"methods": ASKED["methods"], "confirm": 2, "rates": ()}
    verdict = run(world, out, **options, rates_from=confirmed[0])
    assert cells(out, "cells") == {} and len(cells(out)) == 6
    alone, beside = cells(confirmed[0]), cells(out)
    assert all(cell["test"] == alone[name]["test"] for name, cell in beside.items())
    assert {m.name: m.best_rate for m in verdict.methods} == rates
    kept = json.loads((out / "compare.json").read_text())["identity"]["rates_from"]
    assert kept["rates"] == rates and len(kept["sha256"]) == 64 and kept["seeds"] == [0, 1]
    assert "Fresh seeds" in (out / "report.html").read_text()
    # From a comparison whose rates came from another: the seeds that chose them are still not fresh.
    assert read_rates(out).seeds == [0, 1]
    with pytest.raises(ValueError, match="rates_from"):
        run(world, out, **options, rates_from="lora=0.5,moslora=0.5,frozen-mixer=0.5")


def test_methods_without_a_given_rate_are_tuned_and_the_given_ones_are_not(world, tmp_path):
    out = tmp_path / "c"
    verdict = run(world, out, methods=["lora", "moslora"], confirm=2, rates_from={"lora": 0.02})
    assert {c["method"] for c in cells(out, "cells").values()} == {"moslora"}
    assert verdict.methods[0].best_rate == 0.02 and not verdict.methods[0].points
    assert len(of(verdict).contrasts) == 1 and not verdict.contrasts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confirm": 1}, "at least 2"),
        ({"width": -1.0}, "positive"),
        ({"width": float("nan")}, "positive"),
        ({"off_rates": [3]}, "add confirm"),
        ({"confirm": 4, "off_rates": [1.0]}, "none of them 1"),
        ({"confirm": 4, "off_rates": [3, 3]}, "all different"),
        ({"confirm": 4, "off_rates": [3], "off_seeds": 5}, "from 2 to the 4"),
        ({"confirm": 4, "off_seeds": 3}, "add off_rates"),
        ({"contrasts": ["moslora:dora"]}, "not two of the methods"),
        ({"contrasts": ["lora:moslora"]}, "compared with the baseline"),
        ({"rates_from": "lora=0.1"}, "add confirm"),
        ({"rates_from": "lora=fast", "confirm": 4}, "not a positive number"),
        ({"rates_from": "lora=0.1,moslra=0.1", "confirm": 4}, "Did you mean 'moslora'"),
        ({"rates_from": "no-such-file.json", "confirm": 4}, "neither"),
        ({"rates_from": "lora=0.1,moslora=0.1", "confirm": 4}, "would be ignored"),
    ],
)
def test_what_cannot_be_confirmed_is_refused_before_anything_is_written(world, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        run(world, tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_a_changed_first_stage_or_a_damaged_record_is_refused(confirmed, world, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(confirmed[0], folder)
    record = folder / "confirm.json"
    whole = json.loads(record.read_text())
    record.write_text(json.dumps({**whole, "rates": {**whole["rates"], "lora": 0.5}}))
    with pytest.raises(ValueError, match="now says"):
        run(world, folder, **ASKED)
    record.write_text('{"schema_version": 1}')
    with pytest.raises(ValueError, match="damaged"):
        run(world, folder, **ASKED)


def test_a_dry_run_says_what_the_second_stage_takes_and_leaves_nothing(tuned, world, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(tuned, folder)
    before = sorted(path.name for path in folder.rglob("*"))
    shown = io.StringIO()
    own = {"plan_only": True, "width": 0.5, "confirm": 20, "methods": ASKED["methods"]}
    with pytest.raises(AssertionError):  # a plan has no verdict
        run(world, folder, shown, **own)
    assert "at the pace so far" in shown.getvalue() and "moslora less lora" in shown.getvalue()
    assert sorted(path.name for path in folder.rglob("*")) == before


# --- Methods --------------------------------------------------------------------------------------------------


def test_mixers_are_trained_at_their_own_rate_and_decay():
    from peft import get_peft_model
    from torch.optim import AdamW

    from moslora.tuner.param_groups import train_mixers_apart

    model = get_peft_model(tiny.llama(), METHODS["moslora"].configure({"r": 2, "target_modules": ["q_proj"]}))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW([{"params": trained[:2]}, {"params": trained[2:], "weight_decay": 0.5}], lr=0.1)
    train_mixers_apart(optimizer, model, 10.0, 0.25)
    mixers = {id(p) for name, p in model.named_parameters() if "moslora_M" in name}
    seen = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(one for one, _ in seen) == sorted(map(id, trained))
    for one, group in seen:
        assert group["lr"] == pytest.approx(1.0 if one in mixers else 0.1)
        assert (group["weight_decay"] == 0.25) == (one in mixers)
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="taken steps"):
        train_mixers_apart(optimizer, model)
    with pytest.raises(ValueError, match="trains no mixer"):
        train_mixers_apart(AdamW(trained), tiny.llama())


def test_a_method_of_a_tenth_of_the_mixers_rate_moves_mixers_a_tenth_as_far(world, tmp_path):
    """The first step is at rate 0, so all see the same two gradients, of which Adam makes a step of the rate."""
    from moslora.comparison.cells import prepare_task
    from moslora.comparison.compare import _plan
    from moslora.recipe.loading import load_recipe
    from moslora.training.stop import StopRequest

    recipe = load_recipe(
        [f"model={world / 'base'}", f"data={world / 'train.jsonl'}", "adapter.r=2", "trainer.max_steps=2"]
    )
    names = ["moslora", "moslora-slow-mixer", "moslora-fast-mixer", "lora-xs"]
    plan = _plan(recipe, names, 2, [1e-3], None, None, 4, None, tmp_path / "c")
    display = Display(quiet=True)
    stop = StopRequest(display)
    task = prepare_task(plan, display, stop.check)
    moved: dict[str, dict[str, float]] = {}
    for method in plan.methods:
        bench = Bench(plan, task, display, stop)
        _, trainer = bench._make(bench.model, method, 1e-3, 0)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "moslora_" in n}
        trainer.train()
        after = dict(trainer.model.named_parameters())
        moved[method.name] = {
            kind: max(
                float((after[n].detach() - b).abs().max())
                for n, b in before.items()
                if f"moslora_{kind}" in n
            )
            for kind in "AMB"
        }
    assert moved["moslora-slow-mixer"]["M"] == pytest.approx(moved["moslora"]["M"] / 10, rel=0.01)
    assert moved["moslora-fast-mixer"]["M"] == pytest.approx(moved["moslora"]["M"] * 10, rel=0.01)
    assert moved["moslora-slow-mixer"]["B"] == pytest.approx(moved["moslora"]["B"], rel=0.01)
    assert moved["lora-xs"]["A"] == moved["lora-xs"]["B"] == 0 < moved["lora-xs"]["M"]


def test_a_file_of_a_method_may_say_how_its_mixers_are_trained(tmp_path):
    file = tmp_path / "slow.yaml"
    file.write_text(
        "peft_type: MOSLORA\nr: 2\ntarget_modules: [q_proj]\nmixer_lr_ratio: 0.5\nmixer_weight_decay: 1\n"
    )
    method = find_method(str(file))
    assert method.mixer_training == {"mixer_lr_ratio": 0.5, "mixer_weight_decay": 1.0}
    assert method.configure({}).r == 2 and find_method(str(method.origin)).name == method.name
    file.write_text("peft_type: LORA\nr: 2\nmixer_lr_ratio: 0.5\n")
    with pytest.raises(ValueError, match="only peft_type: MOSLORA"):
        find_method(str(file))
    file.write_text("peft_type: MOSLORA\nr: 2\nmixer_lr_ratio: -1\n")
    with pytest.raises(ValueError, match="number of at least 0"):
        find_method(str(file))


def test_a_goal_is_kept_as_it_was_asked_for(confirmed):
    assert of(confirmed[1]).goal == Goal(3, None)


# --- From made cells ----------------------------------------------------------------------------------------

FRESH = list(range(1000, 1030))


def made(
    losses: dict[tuple[str, float], float], lost: dict[tuple[str, float], set[int]] | None = None
) -> Found:
    """Cells of every fresh seed: the loss of a method at a rate, some seeds of which diverged."""
    there = {}
    for (method, rate), loss in losses.items():
        for seed in FRESH:
            noise = torch.Generator().manual_seed(hash((seed, rate)) % 2**31)
            test = (loss + 0.01 * torch.randn(20, generator=noise)).tolist()
            is_lost = seed in (lost or {}).get((method, rate), ())
            state = {"status": "diverged", "reason": "NaN"} if is_lost else {"status": "done", "test": test}
            there[method, rate, seed] = Cell(method, rate, seed, **state)
    rates = {method: 1e-3 for method, _ in losses}
    return Found(rates, FRESH, there, [2.0] * 20)


def test_later_verdicts_still_find_what_is_there():
    found = made({("lora", 1e-3): 1.5, ("a", 1e-3): 1.0, ("b", 1e-3): 1.0, ("c", 1e-3): 1.0})
    for count in range(1, 7):
        looks = [Look(5 + 4 * index) for index in range(count)]
        asked = [Asked((name, "lora"), looks) for name in "abc"]
        confirmation = confirm_methods(found, asked, Goal(looks[-1].seeds), "x")
        assert [contrast.found for contrast in confirmation.contrasts] == ["better"] * 3, count


def test_seeds_of_a_verdict_that_is_not_given_yet_are_not_shown():
    found = made({("lora", 1e-3): 1.5, ("a", 1e-3): 1.0})
    confirmation = confirm_methods(found, [Asked(("a", "lora"), [Look(8)])], Goal(30), "x")
    assert [len(method.points) for method in confirmation.methods] == [8, 8]
    assert confirmation.seeds == FRESH[:8]


def test_who_was_ahead_and_lost_more_seeds_is_said_to_have_been_so():
    found = made({("lora", 1e-3): 1.5, ("a", 1e-3): 1.0}, {("a", 1e-3): {1003}})
    [sentence] = confirm_methods(found, [Asked(("a", "lora"), [Look(10)])], Goal(10), "x").sentences
    assert "a was ahead of lora in the seeds that both finished" in sentence
    assert "not called better" in sentence and "no difference" not in sentence


def test_survivors_are_not_said_to_pay_less():
    losses = {("lora", 1e-3): 1.0, ("a", 1e-3): 1.0, ("lora", 1e-2): 1.5, ("a", 1e-2): 1.1}
    found = made(losses, {("a", 1e-2): set(range(1003, 1008))})
    prices = price_rates(found, "lora", [10.0], 8, 1)
    said = " ".join(say_prices(prices, "lora"))
    assert "a did not finish at 5 of 8 seeds" in said and "nothing is said of its price" in said
    assert "pays" not in said and "could a difference from the baseline's price be shown" in said
    [price] = [one for one in prices if one.method == "a"]
    low, high = price.lost_interval
    assert low < 5 / 8 < high and price.worse_than_base == 0
    whole = price_rates(made(losses), "lora", [10.0], 8, 1)
    assert "a pays less than lora does at 10 times its own: -0.4000" in " ".join(say_prices(whole, "lora"))
    of_price = holm([min(1.0, one.difference.p / 0.8) for one in whole])
    assert [one.p_corrected for one in whole] == pytest.approx(of_price)
    worse = price_rates(made({**losses, ("a", 1e-2): 2.5}), "lora", [10.0], 8, 1)
    assert [one.worse_than_base for one in worse if one.method == "a"] == [8]


def test_the_forecast_of_seeds_is_what_the_width_then_takes():
    rows = [[1.0 * seed + number / 10 for number in range(20)] for seed in (-2, -1, 0, 1, 2, 0, 1, -1)]
    difference = paired_difference(rows)
    wanted = expected_seeds(difference, 0.3, 0.95)
    many = [rows[index % 8] for index in range(int(wanted))]
    seen = paired_difference(many)
    assert (seen.high - seen.low) / 2 == pytest.approx(0.3, rel=0.15)
