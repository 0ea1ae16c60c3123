"""Evaluate: base and tuned model side by side, on the same items, with intervals and the items that changed.

Held-out loss and answers on one's own data, or commonsense tasks by the published protocol and by log-likelihood. That
the adapter took part is proven first: an evaluation that ignores it is a known accident, and looks like "no effect".
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.display import Display
from moslora.errors import ProofError
from moslora.evaluation.commonsense import (
    BEAMS,
    NEW_TOKENS,
    PUBLISHED,
    REPORTED,
    TASKS,
    Question,
    answer_text_prompt,
    eval_prompt,
    extract,
    read_questions,
)
from moslora.metrics.answers import wilson_interval
from moslora.metrics.intervals import paired_examples
from moslora.models.gguf import materialize
from moslora.models.loading import default_device, load_model, load_tokenizer
from moslora.models.names import resolve_model
from moslora.recipe.schema import load_recipe
from moslora.training.run_directory import write_whole

if TYPE_CHECKING:
    from moslora.evaluation.lm_eval import TaskScores
    from moslora.models.names import ModelSource

__all__ = ["PROTOCOLS", "Activity", "Measure", "Report", "evaluate", "show"]

# Questions generated at once; beams multiply it. The published script takes one, which gives the same beams.
BATCH = 8
# Prompts on which the adapter has to show itself, and tokens of each.
PROBES, PROBE_TOKENS = 4, 128


@dataclass(frozen=True)
class Activity:
    """What the adapter does to the logits.

    Attributes:
        effect: Largest difference of logits with and without it, on real prompts.
        learned: Whether any ΔW differs from zero; None where its format has no ΔW that is read.
        modules: How many modules of the model carry it.
    """

    effect: float
    learned: bool | None
    modules: int


@dataclass(frozen=True)
class Measure:
    """One number of base and tuned model on the same items.

    Attributes:
        name: ``"loss"``, ``"exact_match"``, or a task's name (accuracy); where there are pictures ``"accuracy"`` and
            ``"accuracy_shuffled_images"``.
        items: How many.
        base: Of the base; None if the adapted model alone was asked for.
        base_interval: 95 %; None for losses, whose spread between examples is no error of the difference.
        tuned, tuned_interval: Of the adapted model; None without an adapter.
        difference, low, high, p: Tuned less base, paired over items; None without an adapter.
        fixed, broken: Items that became right, and that became wrong; None for losses.
        published: MoSLoRA's published figure for LLaMA-3-8B, where there is one.
        protocol: By which it was judged, of commonsense tasks.
        unread: How many answers of the last model asked showed no choice, and count as wrong; None where none can.
    """

    name: str
    items: int
    base: float
    base_interval: tuple[float, float] | None = None
    tuned: float | None = None
    tuned_interval: tuple[float, float] | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    fixed: int | None = None
    broken: int | None = None
    published: float | None = None
    protocol: str = ""
    unread: int | None = None


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        model: The base.
        adapter: Its adapter, or None.
        protocol: ``"data"``, ``"lm-eval"``, or keys of ``PROTOCOLS`` separated by commas.
        activity: Whether the adapter took part; None without one.
        measures: In order.
        predictions: Every item with what both models did.
    """

    model: str
    adapter: str | None
    protocol: str
    activity: Activity | None
    measures: Sequence[Measure]
    predictions: Sequence[dict[str, Any]] = field(default_factory=tuple)


def evaluate(
    model: str,
    display: Display,
    *,
    adapter: Path | None = None,
    recipe: str | None = None,
    data: str | None = None,
    settings: Sequence[str] = (),
    tasks: Sequence[str] = (),
    protocol: str = "answer-text",
    harness: Sequence[str] = (),
    limit: int | None = None,
    predictions: Path | None = None,
) -> Report:
    """Evaluate a model, and an adapter beside it.

    Args:
        model: The base: hub id, folder, GGUF file or packaged name.
        display: Where to tell of progress.
        adapter: A directory that PEFT loads; None for the base alone.
        recipe: Its held-out data, metric and settings are used.
        data: A file of examples to judge by; with ``tasks`` the folder of their data.
        settings: ``section.key=value`` over the recipe.
        tasks: Commonsense tasks, keys of ``TASKS``.
        protocol: For tasks, keys of ``PROTOCOLS`` separated by commas; several are shown side by side.
        harness: Tasks of EleutherAI's lm-eval, by name or as paths of its YAML files.
        limit: Items at most, of each task.
        predictions: A JSONL to write every item to; must not exist yet.

    Returns:
        The report.

    Raises:
        ValueError: If something cannot be used.
        ProofError: If the adapter has weights that the model does not feel.
    """
    if predictions is not None and predictions.exists():
        raise FileExistsError(f"{predictions} exists already; name another file for the predictions.")
    protocols = list(dict.fromkeys(name.strip() for name in protocol.split(",") if name.strip()))
    for name in protocols or [protocol]:
        if name not in PROTOCOLS:
            raise ValueError(f"protocol={name!r} is unknown; choose from {', '.join(PROTOCOLS)}.")
    if not tasks and not harness and recipe is None and data is None:
        raise ValueError(
            "Nothing to evaluate on: give --data FILE, --recipe FILE, --task NAME with --data FOLDER, or --lm-eval "
            "TASKS."
        )
    if harness and (tasks or recipe is not None or data is not None):
        raise ValueError("--lm-eval brings its own data; run it without --task, --recipe and --data.")
    if harness:
        report = _by_harness(model, display, adapter, harness, limit)
    elif tasks:
        report = _by_tasks(model, display, adapter, data, tasks, protocols, limit)
    else:
        report = _by_data(model, display, adapter, recipe, data, settings, limit)
    if predictions is not None:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in report.predictions)
        write_whole(predictions, "".join(lines))
    return report


# --- One's own data -----------------------------------------------------------------------------------------


def _by_data(
    model: str,
    display: Display,
    adapter: Path | None,
    recipe: str | None,
    data: str | None,
    settings: Sequence[str],
    limit: int | None,
) -> Report:
    from moslora.tasks import find_task
    from moslora.tasks.text.task import TextTask, question

    # Nothing is trained on, so a file of examples serves as both halves of a recipe.
    given = [] if data is None else [f"data={data}", f"data.heldout={data}"]
    wanted = load_recipe([*([recipe] if recipe else []), f"model={model}", *given, *settings])
    kind = find_task(wanted.task.kind)
    if not issubclass(kind, TextTask):
        raise ValueError(f"task.kind={wanted.task.kind} cannot be evaluated here; only text and vision can.")
    task = kind(wanted, Display(quiet=True), lambda: None)
    task.measures_only = True
    task.read()
    if limit is not None:
        every = len(task.heldout_examples)
        count = min(limit, every)
        task.heldout_examples = [task.heldout_examples[i * every // count] for i in range(count)]
    task.prepare()
    task.display = display
    base = task.load()
    judges = wanted.task.metric != "none"

    def measured(of: Any, label: str) -> tuple[list[float], list[Any], list[Any]]:
        losses = task.score(of, task.heldout_set, label)
        answers = task.ask(of, task.asked, label) if len(task.asked) else []
        return losses, answers, task.ask_shuffled(of, label) if answers and judges else []

    losses, answers, shuffled = measured(base, "base")
    tuned_losses: list[float] | None = None
    tuned_answers: list[Any] = []
    tuned_shuffled: list[Any] = []
    activity = None
    if adapter is not None:
        adapted = _with_adapter(base, adapter)
        activity = _prove_active(adapted, adapter, task.probe(), task.device)
        tuned_losses, tuned_answers, tuned_shuffled = measured(adapted, "tuned")
    measures = [_loss(losses, tuned_losses)]
    shares = {task.share: (answers, tuned_answers)}
    shares |= {f"{task.share}_shuffled_images": (shuffled, tuned_shuffled)} if shuffled else {}
    if answers and judges:
        for name, (before, after) in shares.items():
            right = [[bool(a.correct) for a in of] for of in (before, after)]
            measures.append(_share(name, right[0], right[1] if adapter is not None else None))
    asked, strange = (
        {a.place: (a, b) for a, b in itertools.zip_longest(one, two)}
        for one, two in ((answers, tuned_answers), (shuffled, tuned_shuffled))
    )
    lines = []
    for index, encoded in enumerate(task.heldout_set):
        was, now = asked.get(encoded.place, (None, None))
        line = {
            "place": encoded.place,
            "prompt": question(task.by_place[encoded.place]),
            "reference": encoded.answer,
            "base_loss": losses[index],
            "tuned_loss": None if tuned_losses is None else tuned_losses[index],
            "base": None if was is None else was.text,
            "tuned": None if now is None else now.text,
            "base_ok": None if was is None else was.correct,
            "tuned_ok": None if now is None else now.correct,
        }
        pictures = task.pictures_of(task.by_place[encoded.place])
        if pictures:
            line["pictures"] = pictures
        if encoded.place in strange:
            was, now = strange[encoded.place]
            line["other_pictures"] = list(was.pictures)
            line |= {
                "base_shuffled": was.text,
                "tuned_shuffled": None if now is None else now.text,
                "base_shuffled_ok": was.correct,
                "tuned_shuffled_ok": None if now is None else now.correct,
            }
        lines.append(line)
    return Report(model, None if adapter is None else str(adapter), "data", activity, measures, lines)


def _loss(base: Sequence[float], tuned: Sequence[float] | None) -> Measure:
    if tuned is None:
        return Measure("loss", len(base), fmean(base))
    differences = [b - a for a, b in zip(base, tuned, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise ValueError(
            "A held-out loss is NaN or infinite: the adapter or the base is broken (moslora doctor)."
        )
    found = paired_examples(differences) if len(differences) > 1 else None
    return Measure(
        "loss",
        len(base),
        fmean(base),
        tuned=fmean(tuned),
        difference=fmean(differences),
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        p=None if found is None else found.p,
    )


def _share(name: str, base: Sequence[bool], tuned: Sequence[bool] | None, **more: Any) -> Measure:
    """Compare shares of right items; p is McNemar's exact one, as the report of a run has it."""
    from moslora.reports.run import sign_test

    measure = Measure(name, len(base), fmean(base), wilson_interval(sum(base), len(base)), **more)
    if tuned is None:
        return measure
    fixed = sum(b and not a for a, b in zip(base, tuned, strict=True))
    broken = sum(a and not b for a, b in zip(base, tuned, strict=True))
    differences = [float(b) - float(a) for a, b in zip(base, tuned, strict=True)]
    found = paired_examples(differences) if len(differences) > 1 else None
    return dataclasses.replace(
        measure,
        tuned=fmean(tuned),
        tuned_interval=wilson_interval(sum(tuned), len(tuned)),
        difference=fmean(differences),
        low=None if found is None else max(-1.0, found.low),
        high=None if found is None else min(1.0, found.high),
        p=sign_test(fixed, broken) if fixed + broken else 1.0,
        fixed=fixed,
        broken=broken,
    )


# --- The adapter --------------------------------------------------------------------------------------------


def _with_adapter(base: Any, adapter: Path) -> Any:
    """Put an adapter into a model, as PEFT does; every tensor of its file has to find its place."""
    import warnings

    from peft import PeftModel

    import moslora  # noqa: F401 - registers MOSLORA with PEFT

    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(
            f"{adapter} is no adapter directory that PEFT loads; bring others in with: moslora import {adapter} OUT"
        )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    missing = [str(w.message).splitlines()[0] for w in said if "missing adapter keys" in str(w.message)]
    if missing:
        raise ProofError(f"{adapter} does not fit this base: {missing[0][:300]}")
    return adapted


def _prove_active(adapted: Any, adapter: Path, inputs: Sequence[Any], device: str) -> Activity:
    """Prove that logits with the adapter differ from those without; tell "learned nothing" from "not felt".

    Inputs are token ids ``(1, length)``, or all arguments by name, each.

    Raises:
        ProofError: If its ΔW is not zero and the logits do not move.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    effect = 0.0
    chosen = [i if isinstance(i, Mapping) else {"input_ids": i} for i in inputs[:PROBES]]
    with torch.inference_mode():
        for given in chosen:
            arguments = {name: value.to(device) for name, value in given.items()}
            active = adapted(**arguments).logits
            with adapted.disable_adapter():
                plain = adapted(**arguments).logits
            effect = max(effect, float((active.float() - plain.float()).abs().max()))
    learned = _learned(adapter)
    if effect == 0 and learned is not False:
        raise ProofError(
            f"{adapter} changes no logit of this model on {len(chosen)} prompts"
            + (", though its ΔW is not zero" if learned else "")
            + ": it was not applied. Is it for this base? (moslora doctor ADAPTER --base MODEL)"
        )
    modules = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    return Activity(effect, learned, modules)


def _as_inputs(prompts: Sequence[Sequence[int]]) -> list[Any]:
    import torch

    return [torch.tensor([list(ids)[:PROBE_TOKENS]]) for ids in prompts if ids][:PROBES]


def _learned(adapter: Path) -> bool | None:
    from moslora.adapters.formats.reading import read_adapter
    from moslora.errors import AdapterError

    try:
        found = read_adapter(adapter)
    except (AdapterError, ValueError):
        return None  # another method's: it has no factors that are read here
    return any(factors.norm() > 0 for factors in found.modules.values())


# --- Commonsense tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """A loaded model's surroundings."""

    tokenizer: Any
    device: str
    display: Display


Protocol = Callable[[Any, _Judge, str, Sequence[Question]], list[tuple[str, str]]]


def _generate(model: Any, judge: _Judge, task: str, questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Ask as published: the prompt to the letter, four beams, and the first match of the task's pattern."""
    import torch
    from transformers import GenerationConfig

    tokenizer = judge.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    config = GenerationConfig(
        do_sample=False,
        num_beams=BEAMS,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    prompts = [tokenizer(eval_prompt(q), verbose=False)["input_ids"] for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    with judge.display.progress(f"{task}, answers", len(prompts)) as progress:
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            length = max(len(prompts[i]) for i in chosen)
            ids = torch.full((len(chosen), length), int(pad))
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, length - len(prompts[i]) :] = 1
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids.to(judge.device),
                    attention_mask=mask.to(judge.device),
                    generation_config=config,
                )
            found = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            for i, text in zip(chosen, found, strict=True):
                texts[i] = text
            progress.advance(len(chosen))
    return [(extract(task, text), text) for text in texts]


def _likeliest(
    prompt: Callable[[Question], str], choice: Callable[[str, str], str], by_length: bool
) -> Protocol:
    """Make a protocol that takes the likeliest choice."""

    def judge_all(
        model: Any, judge: _Judge, task: str, questions: Sequence[Question]
    ) -> list[tuple[str, str]]:
        from moslora.metrics.choices import score_choices

        found = []
        with judge.display.progress(f"{task}, choices", len(questions)) as progress:
            for question in questions:
                texts = [choice(label, text) for label, text in question.choices.items()]
                scores = score_choices(model, judge.tokenizer, prompt(question), texts, judge.device)
                if by_length:
                    scores = [s / len(t.encode()) for s, t in zip(scores, texts, strict=True)]
                best = max(range(len(scores)), key=lambda i: scores[i])
                label = list(question.choices)[best]
                found.append((label, question.choices[label]))
                progress.advance()
        return found

    return judge_all


PROTOCOLS: dict[str, Protocol] = {
    "published": _generate,
    # The same prompt; which of "the correct answer is answer1", "… answer2" is likeliest. No answer goes unread.
    "label": _likeliest(eval_prompt, lambda label, text: f"the correct answer is {label}", False),
    # The question alone; which answer's text is likeliest, per byte. For models that know no labels.
    "answer-text": _likeliest(answer_text_prompt, lambda label, text: f" {text}", True),
}


def _by_tasks(
    model: str,
    display: Display,
    adapter: Path | None,
    data: str | None,
    tasks: Sequence[str],
    protocols: Sequence[str],
    limit: int | None,
) -> Report:
    if data is None:
        raise ValueError(
            "Commonsense tasks need --data FOLDER, which holds one folder per task with its test.json."
        )
    names = _task_names(tasks, Path(data), display)
    questions = {name: read_questions(Path(data), name, limit) for name in names}
    judge, base = _loaded(model, display)

    def judged(of: Any) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """By protocol and task, each item's label and text."""
        return {(p, n): PROTOCOLS[p](of, judge, n, questions[n]) for p in protocols for n in names}

    before, after = judged(base), None
    activity = None
    if adapter is not None:
        adapted = _with_adapter(base, adapter)
        probes = [
            judge.tokenizer(eval_prompt(q))["input_ids"] for q in next(iter(questions.values()))[:PROBES]
        ]
        activity = _prove_active(adapted, adapter, _as_inputs(probes), judge.device)
        after = judged(adapted)
    measures, lines = [], []
    for protocol, name in before:
        asked, found = questions[name], before[protocol, name]
        right = [label == q.answer for (label, _), q in zip(found, asked, strict=True)]
        found_then = None if after is None else after[protocol, name]
        then = None
        if found_then is not None:
            then = [label == q.answer for (label, _), q in zip(found_then, asked, strict=True)]
        last = found if found_then is None else found_then
        unread = sum(label == "" for label, _ in last) if protocol == "published" else None
        measures.append(
            _share(name, right, then, published=PUBLISHED.get(name), protocol=protocol, unread=unread)
        )
        for index, q in enumerate(asked):
            lines.append(
                {
                    "place": q.place,
                    "protocol": protocol,
                    "prompt": q.instruction,
                    "reference": q.answer,
                    "base": found[index][1],
                    "base_label": found[index][0],
                    "base_ok": right[index],
                    "tuned": None if found_then is None else found_then[index][1],
                    "tuned_label": None if found_then is None else found_then[index][0],
                    "tuned_ok": None if then is None else then[index],
                }
            )
    said = ", ".join(protocols)
    return Report(model, None if adapter is None else str(adapter), said, activity, measures, lines)


def _task_names(tasks: Sequence[str], data: Path, display: Display) -> list[str]:
    """Return the tasks asked for; ``commonsense`` alone means all whose data are there."""
    if list(tasks) != ["commonsense"]:
        return list(tasks)
    there = [name for name in TASKS if (data / name / "test.json").is_file()]
    missing = [name for name in TASKS if name not in there]
    if missing and there:
        display.warn(
            f"{data} has {len(there)} of the eight tasks; without {', '.join(missing)} their mean is not the published "
            "one."
        )
    return there or list(TASKS)


def _loaded(model: str, display: Display) -> tuple[_Judge, Any]:
    source: ModelSource = materialize(resolve_model(model), "float32", say=display.say)
    device = default_device()
    return _Judge(load_tokenizer(source), device, display), load_model(source, device=device)


# --- Tasks of lm-eval ---------------------------------------------------------------------------------------


def _by_harness(
    model: str, display: Display, adapter: Path | None, tasks: Sequence[str], limit: int | None
) -> Report:
    from moslora.evaluation.lm_eval import Harness

    harness = Harness(tasks, limit)
    judge, base = _loaded(model, display)
    before = harness.run(base, judge.tokenizer)
    after, activity = None, None
    if adapter is not None:
        adapted = _with_adapter(base, adapter)
        prompts = [text for task in before for text in task.prompts() if text][:PROBES]
        probes = [judge.tokenizer(text, verbose=False)["input_ids"] for text in prompts or ["The"]]
        activity = _prove_active(adapted, adapter, _as_inputs(probes), judge.device)
        after = harness.run(adapted, judge.tokenizer)
        _check_felt(before, after, adapter, activity)
    measures, lines = [], []
    for index, task in enumerate(before):
        tuned = None if after is None else after[index]
        for metric in task.metrics:
            measures.append(_of_harness(task, tuned, metric))
        lines += _items(task, tuned)
    return Report(model, None if adapter is None else str(adapter), "lm-eval", activity, measures, lines)


def _check_felt(
    before: Sequence[TaskScores], after: Sequence[TaskScores], adapter: Path, activity: Activity
) -> None:
    """Fail if the harness got the very same likelihoods with the adapter as without, though it moves logits.

    Raises:
        ProofError: Then.
    """
    one, other = [task.outputs() for task in before], [task.outputs() for task in after]
    if activity.effect > 0 and one == other and _has_number(one):
        raise ProofError(
            f"lm-eval's likelihoods are the same with {adapter} as without, though it moves logits by "
            f"{activity.effect:.3g}: the adapter was not applied in the evaluation."
        )


def _has_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_number, value))
    return isinstance(value, float)


def _of_harness(task: TaskScores, tuned: TaskScores | None, metric: str) -> Measure:
    """Compare one metric, paired over items where it has a value for each."""
    name = f"{task.name} {metric.removesuffix(',none')}"
    one, other = task.per_item(metric), None if tuned is None else tuned.per_item(metric)
    shares = all(
        values is not None and set(values) <= {0.0, 1.0} for values in (one, other if tuned else one)
    )
    if one is not None and shares:
        return _share(name, [v == 1 for v in one], None if other is None else [v == 1 for v in other])
    measure = Measure(name, len(task.items(metric)), task.metrics[metric])
    if tuned is None:
        return measure
    differences = [] if one is None or other is None else [b - a for a, b in zip(one, other, strict=True)]
    found = paired_examples(differences) if len(differences) > 1 else None
    return dataclasses.replace(
        measure,
        tuned=tuned.metrics[metric],
        difference=tuned.metrics[metric] - task.metrics[metric],
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        p=None if found is None else found.p,
    )


def _items(task: TaskScores, tuned: TaskScores | None) -> list[dict[str, Any]]:
    def right(scores: TaskScores | None, index: int) -> bool | None:
        value = (
            None
            if scores is None
            else scores.samples[index].get("acc", scores.samples[index].get("exact_match"))
        )
        return bool(value) if value in (0, 1) else None

    answers = task.answers()
    others = None if tuned is None else tuned.answers()
    return [
        {
            "place": f"{task.name}:{sample['doc_id']}",
            "filter": sample["filter"],
            "prompt": prompt,
            "reference": answers[index][0],
            "base": answers[index][1],
            "base_ok": right(task, index),
            "tuned": None if others is None else others[index][1],
            "tuned_ok": right(tuned, index),
        }
        for index, (sample, prompt) in enumerate(zip(task.samples, task.prompts(), strict=True))
    ]


# --- In words -----------------------------------------------------------------------------------------------


def show(report: Report, display: Display, samples: int = 3) -> None:
    """Write a report for people.

    Args:
        report: What to show.
        display: Where to.
        samples: Items to show of those fixed, and of those broken.
    """
    if report.activity is not None:
        active = report.activity
        if active.effect == 0:
            display.warn(f"{report.adapter} learned nothing: every ΔW is 0, so base and tuned are one model.")
        else:
            display.say(
                f"Proven: the adapter takes part in {active.modules} modules; logits move by up to {active.effect:.3g}."
            )
    kinds = list(dict.fromkeys(m.protocol for m in report.measures))
    for protocol in kinds:
        _show_measures(report, protocol, display)
    if len(kinds) > 1:
        _show_protocols(report, kinds, display)
    if any(m.published is not None for m in report.measures):
        _show_reported(report, display)
    for change, before in (("fixed", False), ("broken", True)):
        changed = [p for p in report.predictions if p["base_ok"] is before and p["tuned_ok"] is (not before)]
        for line in changed[:samples]:
            display.say(f"{change}: {_short(line['prompt'])}")
            display.say(
                f"  base {_short(line['base'])!r}  tuned {_short(line['tuned'])!r}  right {line['reference']!r}"
            )


def _show_measures(report: Report, protocol: str, display: Display) -> None:
    measures = [m for m in report.measures if m.protocol == protocol]
    published = any(m.published is not None for m in measures)
    unread = any(m.unread is not None for m in measures)
    rows = []
    for m in measures:
        form = "{:.4f}" if m.base_interval is None else "{:.1%}"
        cells = [m.name.replace("_", " "), str(m.items), form.format(m.base) + _ends(m.base_interval)]
        if report.adapter is not None:
            cells += _of_tuned(m, form)
        cells += [] if not unread else ["" if m.unread is None else str(m.unread)]
        cells += [] if not published else ["" if m.published is None else f"{m.published:.1f} %"]
        rows.append(cells)
    columns = ["", "items", "base"]
    if report.adapter is not None:
        columns += ["tuned", "difference (95 %)", "p", "fixed / broken"]
    columns += ["no choice found"] if unread else []
    if published:
        columns.append("published, of LLaMA-3-8B")
        base, tuned = _means(measures)
        mean = [f"mean of {len(measures)} tasks", "", f"{base:.1%}"]
        if report.adapter is not None:
            mean += [f"{tuned:.1%}", f"{tuned - base:+.1%}", "", ""]
        mean += [""] if unread else []
        own = [m.published for m in measures if m.published is not None]
        rows.append([*mean, f"{fmean(own):.1f} %" + ("" if len(own) == len(TASKS) else " (these)")])
    display.table(f"{report.model}, protocol {protocol or report.protocol}", columns, rows)


def _of_tuned(m: Measure, form: str) -> list[str]:
    if m.tuned is None or m.difference is None:
        return [""] * 4
    signed = form.replace(":", ":+")
    reach = "" if m.low is None or m.high is None else f" ({signed.format(m.low)} to {signed.format(m.high)})"
    return [
        form.format(m.tuned) + _ends(m.tuned_interval),
        signed.format(m.difference) + reach,
        "" if m.p is None else f"{m.p:.2g}",
        "" if m.fixed is None else f"{m.fixed} / {m.broken}",
    ]


def _means(measures: Sequence[Measure]) -> tuple[float, float]:
    return fmean(m.base for m in measures), fmean(m.tuned or 0.0 for m in measures)


def _show_protocols(report: Report, protocols: Sequence[str], display: Display) -> None:
    """Show how protocols differ on the same models and items."""
    tuned = report.adapter is not None
    by = {(m.protocol, m.name): m for m in report.measures}
    names = list(dict.fromkeys(m.name for m in report.measures))
    rows = []
    for name in names:
        found = [by[protocol, name] for protocol in protocols]
        cells = [f"{m.base:.1%}" + (f" → {m.tuned:.1%}" if m.tuned is not None else "") for m in found]
        rows.append([name, *cells])
    means = [_means([m for m in report.measures if m.protocol == protocol]) for protocol in protocols]
    rows.append(["mean", *(f"{base:.1%}" + (f" → {then:.1%}" if tuned else "") for base, then in means)])
    display.table(
        "The same model and items by each protocol" + (", base → tuned" if tuned else ""),
        ["", *protocols],
        rows,
    )
    key = "tuned_label" if tuned else "base_label"
    labels = {(p["protocol"], p["place"]): p[key] for p in report.predictions}
    first = protocols[0]
    for other in protocols[1:]:
        places = [place for protocol, place in labels if protocol == first]
        same = fmean(labels[first, place] == labels[other, place] for place in places)
        display.say(f"{first} and {other} choose the same answer on {same:.0%} of the items.")


def _show_reported(report: Report, display: Display) -> None:
    rows = [
        [r.source, r.model, r.setting, f"{r.lora:.2f} %", f"{r.moslora:.2f} %", f"{r.moslora - r.lora:+.2f}"]
        for r in REPORTED
    ]
    display.table(
        "What others report, mean of eight tasks",
        ["source", "model", "setting", "LoRA", "MoSLoRA", "difference"],
        rows,
    )
    display.say(
        f"These are of other models, trained on 170 thousand examples: nothing that {report.model} scores here can be "
        "held against them. They show that the gain is contested."
    )


def _ends(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else " ({:.1%} to {:.1%})".format(*interval)


def _short(text: str, length: int = 160) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"
