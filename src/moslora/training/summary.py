"""Tables and samples that a run shows on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.metrics.change import baseline_sentence, price_sentence, training_verdict
from moslora.metrics.scored import is_share
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.tasks.task import Answer, Count, Evaluation, Task
from moslora.training.context import RunContext
from moslora.wording import evenly_spaced, one_line

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.recipe.schema import Recipe


def show_counts(counts: Sequence[Count], display: Display) -> None:
    """Show parameters of the base and of what is trained, part by part."""
    if not counts:
        return
    rows = [[c.part, f"{c.base:,}", f"{c.trained:,}"] for c in counts]
    base, trained = sum(c.base for c in counts), sum(c.trained for c in counts)
    if len(counts) > 1:
        rows.append(["all", f"{base:,}", f"{trained:,}"])
    display.table("Parameters, counted from the configuration", ["", "base", "trained"], rows)
    display.say(f"Training {trained:,} parameters beside a base of {base:,} ({trained / base:.2%}).")


def show_settings(recipe: Recipe, device: str, display: Display) -> None:
    """Show how a recipe trains, defaults included: what is to be held against a paper or another run."""
    trainer = resolve_trainer_arguments(recipe, device)
    rows_each, accumulated = (
        trainer["per_device_train_batch_size"],
        trainer.get("gradient_accumulation_steps", 1),
    )
    steps = trainer.get("max_steps", -1)
    settings: dict[str, Any] = {
        "length": f"{steps} steps" if steps > 0 else f"epochs: {trainer['num_train_epochs']:g}",
        "rows of a step": f"{rows_each} × {accumulated} accumulated, on each GPU",
        "learning rate": f"{trainer['learning_rate']:g}, {trainer.get('lr_scheduler_type')}",
        "warm-up": trainer.get("warmup_steps"),
        "weight decay": trainer.get("weight_decay"),
        "gradients clipped at": trainer.get("max_grad_norm"),
        "order of rows": trainer.get("train_sampling_strategy"),
        "tokens at most": trainer.get("max_length"),
        "precision": next((name for name in ("fp16", "bf16") if trainer.get(name)), "float32"),
        "base": f"{recipe.model.name}, {recipe.model.dtype}, {getattr(recipe.model, 'quantization', 'none')}",
        "pictures made square": getattr(recipe.data, "square", None),
    }
    adapter = dict(recipe.adapter)
    settings |= {f"adapter.{name}": value for name, value in adapter.items() if name != "target_modules"}
    scopes = getattr(recipe, "scopes", None)
    if scopes is not None:
        settings |= {f"scopes.{name}": value for name, value in scopes.model_dump(exclude_none=True).items()}
    rows = [[name, str(value)] for name, value in settings.items() if value is not None]
    display.table("How it trains", ["", ""], rows)


def show_result(run: RunContext, task: Task, before: Evaluation, after: Evaluation, display: Display) -> None:
    """Show measurements, samples of answers, proofs and where everything was written."""
    record = run.directory.read()
    display.say()
    names = () if run.start_from is None else ("start", "tuned")
    show_measurements(record["metrics"], display, *names)
    show_costs(record.get("also", {}), display)
    if after.fidelity:
        _show_fidelity(run, before.fidelity, after.fidelity)
    if after.answers:
        _show_samples(choose_samples(before.answers, after.answers, run.recipe.task.samples), display)
    show_proofs(record["proofs"], display)
    path = run.directory.path
    for place, format_ in task.exports.values():
        what = {"kohya": "For ComfyUI and A1111:       "}.get(format_, "Plain LoRA, loads anywhere:  ")
        display.say(f"{what} {path / place}")
    display.say(f"Native, to train further:     {path / 'adapter'}")
    display.say(f"Report, opens in a browser:   {path / 'report.html'}")


def show_measurements(
    measured: Mapping[str, Any], display: Display, started: str = "weighted sum", ended: str = "mixed"
) -> None:
    """Show held-out measurements side by side.

    Args:
        measured: ``metrics`` of ``run.json``: of ``before``, ``after``, and ``start`` where adapters are mixed.
        display: Where to.
        started, ended: What ``start`` and ``after`` are called where there is a ``start``.
    """
    columns = {"base": "before", "tuned": "after"}
    if "start" in measured:
        columns = {"base": "before", started: "start", ended: "after"}
    if "baseline" in measured:
        columns = {"without a model": "baseline", **columns}
    intervals = measured["intervals"]
    rows = []
    for key in measured["after"]:
        form = "{:.1%}" if is_share(key, key in intervals["after"]) else "{:.4f}"
        cells = [measured[stage].get(key) for stage in columns.values()]
        rows.append([key.replace("_", " "), *("" if cell is None else form.format(cell) for cell in cells)])
        if any(key in intervals.get(stage, {}) for stage in columns.values()):
            ends = [intervals.get(stage, {}).get(key) for stage in columns.values()]
            rows.append(
                ["  95 % interval", *("" if e is None else f"{form} to {form}".format(*e) for e in ends)]
            )
    examples, answers = measured["examples"], measured["answers"]
    some = f", {answers} of them answered" if 0 < answers < examples else ""
    display.table(f"{examples} {measured['unit']}{some}", ["", *columns], rows)
    if measured.get("baseline_note"):
        display.say(measured["baseline_note"])
    against = baseline_sentence(measured)
    if against is not None:
        display.say(against, style="" if against.startswith("Better") else "bold yellow")
    change, verdict = training_verdict(measured["before"], measured["after"], measured["unit"])
    display.say(verdict, style="green" if change == "better" else "bold yellow")


def show_costs(also: Mapping[str, Any], display: Display) -> None:
    """Show what tuning cost on data that it was not about.

    Args:
        also: ``also`` of ``run.json``; empty if it was not measured.
        display: Where to.
    """
    for name, cost in also.items():
        rows = []
        for key, label in (("loss", "loss"), ("kl", "KL from the base")):
            found = cost["change"][key]
            ends = "" if found is None else "{:+.4f} to {:+.4f}".format(found["low"], found["high"])
            values = (cost["before"][key], cost["after"][key])
            rows.append([label, *("not finite" if v is None else f"{v:.4f}" for v in values), ends])
        title = f"What it cost, {name}: {cost['passages']} passages, {cost['tokens']} tokens"
        display.table(title, ["", "base", "tuned", "change, 95 %"], rows)
        display.say(price_sentence(name, cost))


def show_proofs(proofs: Mapping[str, Any], display: Display) -> None:
    """Show what was proven, with the numbers.

    Args:
        proofs: ``proofs`` of ``run.json``.
        display: Where to.
    """
    from moslora.training.reload_proof.proof import READERS

    fold, reload = proofs["fold"], proofs["reload"]
    reader = READERS[reload["reader"]]
    error, modules = fold["max_relative_error"], fold["modules"]
    folded = f"Proven: fold, largest relative error of ΔW {error:.1e} over {modules} modules"
    if reload.get("passed", True) is None:
        display.say(f"{folded}.", style="green")
        display.say(
            f"Not proven: reload in {reader.name} could not be carried out. To do it: {reload['prove_with']}",
            style="yellow",
        )
    else:
        display.say(
            f"{folded}; reload in {reader.name}, largest {reader.what} difference "
            f"{reload['max_logit_difference']:.1e} (the adapter moves {reader.what}s by up to "
            f"{reload['adapter_effect']:.2g}).",
            style="green",
        )
    if "frozen" in proofs:
        frozen = proofs["frozen"]
        display.say(
            f"Proven: the {frozen['tensors']} A and B of {frozen['modules']} modules are the sources', bit for bit; "
            f"the mixers moved by up to {frozen['moved']:.0%} of their start.",
            style="green",
        )


def _show_fidelity(run: RunContext, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Show scores of pictures, and which are absent and why."""
    from moslora.tasks.image.fidelity import SCORES

    changes = run.directory.read().get("fidelity", {}).get("change", {})
    rows = []
    for name in SCORES:
        if name in after:
            one, two, change = before[name]["mean"], after[name]["mean"], changes[name]
            ends = " ({:+.3f} to {:+.3f})".format(*change["interval"]) if change["interval"] else ""
            model = f"{after[name]['title']}, {after[name]['model']}"
            rows.append([name, f"{one:.3f}", f"{two:.3f}", f"{change['mean']:+.3f}{ends}", model])
    if rows:
        columns = ["", "base", "tuned", "change, 95 % over prompts", "model"]
        run.display.table("Fidelity: mean cosine", columns, rows)
    for name, why in after.get("absent", {}).items():
        run.display.say(f"{name} is not computed: {why}.")


def choose_samples(
    before: Sequence[Answer], after: Sequence[Answer], count: int
) -> list[tuple[Answer, Answer]]:
    """Choose examples to show: mostly typical ones, and failures in their share, at least one if any."""
    pairs = list(zip(before, after, strict=True))
    if count <= 0 or not pairs:
        return []
    wrong = [p for p in pairs if p[1].correct is False]
    right = [p for p in pairs if p[1].correct is not False]
    share = min(len(wrong), max(1, round(count * len(wrong) / len(pairs)))) if wrong else 0
    chosen = evenly_spaced(right, count - share) + evenly_spaced(wrong, share)
    return chosen or evenly_spaced(pairs, count)


def _show_samples(pairs: Sequence[tuple[Answer, Answer]], display: Display) -> None:
    from rich.text import Text

    marks = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}
    for base, tuned in pairs:
        text = Text()
        text.append(f"{one_line(tuned.prompt, 300)}\n", "bold")
        for name, answer in (("base ", base), ("tuned", tuned)):
            mark, style = marks[answer.correct]
            text.append(f"  {name} {mark} ", style)
            text.append(f"{one_line(answer.text, 200) or '(nothing)'}\n")
        if tuned.correct is False:
            text.append(f"  right   {one_line(tuned.reference, 200)}\n", "dim")
        display.show(text)
